"""A backbone: a small convolutional network."""

import irlvla
import torch
from pydantic import Field
from torch import nn


class AcmeCnn(irlvla.Backbone):
    """One status token of what all cameras see and of the car's own state."""

    class Config(irlvla.Config):
        width: int = Field(64, ge=1, description="width of the token")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.width = config.width
        self.cnn = nn.Sequential(
            *(nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, config.width)),
        )
        self.state = nn.Linear(8, config.width)

    def forward(self, obs: irlvla.Observation) -> irlvla.Features:
        if obs.images is None:
            raise irlvla.InputError(f"{self} needs images; take a dataset with cameras")
        images = obs.images if obs.images.is_floating_point() else obs.images / 255
        seen = self.cnn(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
        return irlvla.Features(obs, status=torch.tanh(seen + self.state(obs.ego[:, -1])))
