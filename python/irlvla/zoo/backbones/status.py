"""What the car knows of itself, and the command: the blind baseline that every other backbone must beat."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from irlvla import components
from irlvla.errors import InputError
from irlvla.types import Command, Features, Observation

#: Usual magnitudes of x, y, heading, vx, vy, ax, ay and steering over 1.5 s of city driving [m, rad, m/s, m/s^2].
SCALE = (10.0, 1.0, 0.1, 10.0, 0.1, 1.0, 1.0, 0.1)


class StatusBackbone(components.Backbone):
    """An MLP over ego history and command; makes `Features.status`.

    With frames=1 and width=512 it is the encoder of NAVSIM's EgoStatusMLP (three layers, each with a ReLU), which
    sees velocity, acceleration and command; this one also sees the steering angle and, with more frames, the path so far.
    """

    class Config(components.Config):
        width: int = Field(64, ge=1, description="width of the token")
        frames: int = Field(4, ge=1, description="how many frames of the history are read, up to t = 0")

    scale: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = config.width
        self.register_buffer("scale", torch.tensor(SCALE))  # a buffer: it is saved with the weights that rely on it
        layers: list[nn.Module] = []
        for inputs in (len(SCALE) * config.frames + len(Command), self.width, self.width):
            layers += [nn.Linear(inputs, self.width), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)

    def forward(self, obs: Observation) -> Features:
        """Raises `InputError` for a history of fewer frames than it reads."""
        frames = self.config.frames
        if obs.ego.shape[1] < frames:
            raise InputError(f"{self} reads {frames} frames of history, the observation has {obs.ego.shape[1]}; set frames to that or less")
        history = obs.ego[:, -frames:].to(self.scale.dtype) / self.scale
        command = nn.functional.one_hot(obs.command.long(), len(Command)).to(history.dtype)
        return Features(obs, status=self.mlp(torch.cat([history.flatten(1), command], 1)))
