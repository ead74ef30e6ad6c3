"""A small network that finds commands by itself: it learns which ones the human follows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.errors import ConfigError, InputError, did_you_mean
from irlvla.types import Features, Observation, Scene
from irlvla.zoo.backbones.encoders import TimmEncoder
from irlvla.zoo.backbones.status import StatusBackbone
from irlvla.zoo.layers import Attention, FeedForward, sinusoids
from irlvla.zoo.reasoners import tokens
from irlvla.zoo.reasoners.actions import PATHS, SPEEDS, UNKNOWN, Commands, Rules, labels_of
from irlvla.zoo.reasoners.tokens import CommandTokens

LOGITS = ("speed_logits", "path_logits")  #: names of its predictions, "B 13" and "B 9"
_LIGHT = {"model": "mobilenetv4_conv_small", "strides": (32,), "channels": 128}
_RAY = 32  # sines and cosines of each coordinate of a viewing direction


class DriverReasoner(components.Reasoner):
    """Two queries, one for the speed and one for the path, look at the images and at the ego status, and name a command each.

    Language tokens are the expected embeddings of the commands and, with states=true, what the queries found. It is trained by
    the cross-entropy with the commands that the human follows, by stated rules (`Rules`); a scene without human drive adds nothing.
    """

    class Config(tokens.Config):
        cameras: Literal["none", "front", "all"] = Field(
            "front", description="what it looks at; front = the camera that looks ahead the most"
        )
        encoder: TimmEncoder.Config = Field(
            default_factory=lambda: TimmEncoder.Config.model_validate(_LIGHT), description="network that reads the images"
        )
        hidden: int = Field(128, ge=8, multiple_of=8, description="width inside")
        layers: int = Field(2, ge=1, description="how many times the queries look")
        frames: int = Field(4, ge=1, description="how many frames of the ego history are read, up to t = 0")
        states: bool = Field(True, description="its hidden states are two more language tokens")
        detach: bool = Field(True, description="losses of the planner do not reach it: commands stay commands")
        weight: float = Field(1.0, ge=0, description="of its losses")
        smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
        counts: dict[str, int] = Field(
            {},
            description="how often each command occurs in training (see irlvla.zoo.reasoners.actions.counts): rare ones weigh more",
        )
        rules: Rules = Field(default_factory=lambda: Rules.model_validate({}), description="which commands a human's drive follows")

    speed_weight: Tensor
    path_weight: Tensor

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        inner = config.hidden
        self.register_buffer("speed_weight", balanced(config.counts, SPEEDS), persistent=False)
        self.register_buffer("path_weight", balanced(config.counts, PATHS), persistent=False)
        if config.cameras != "none":
            self.encoder = TimmEncoder(config.encoder)
            if config.encoder.pretrained:  # what is saved has the weights itself
                self.config = config.model_copy(update={"encoder": self.encoder.config})
            self.patch, self.ray = nn.Linear(self.encoder.width, inner), nn.Linear(3 * _RAY, inner)
        self.status = StatusBackbone(StatusBackbone.Config(width=inner, frames=config.frames))
        self.queries = nn.Parameter(torch.randn(2, inner))
        heads = inner // 8 if inner < 64 else 8
        self.attentions = nn.ModuleList(Attention(inner, heads) for _ in range(config.layers))
        self.feed_forwards = nn.ModuleList(FeedForward(inner, 2 * inner) for _ in range(config.layers))
        self.norm = nn.LayerNorm(inner)
        self.speed, self.path = nn.Linear(inner, len(SPEEDS)), nn.Linear(inner, len(PATHS))
        self.tokens = CommandTokens(config, width, inner if config.states else 0)

    def forward(self, obs: Observation) -> Features:
        """Raises `InputError` for observations without the images or the history that it reads."""
        status = self.status(obs).status[:, None]
        seen = status if self.config.cameras == "none" else torch.cat([status, self._patches(obs)], 1)
        states = self.queries + status
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            states = feed_forward(attention(states, seen))
        states = self.norm(states)
        logits = self.speed(states[:, 0]).float(), self.path(states[:, 1]).float()
        speed, path, found = (value.detach() if self.config.detach else value for value in (*logits, states))
        language = self.tokens(speed.softmax(-1), path.softmax(-1), found if self.config.states else None)
        return Features(obs, language=language, predictions=dict(zip(LOGITS, logits, strict=True)))

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        wanted, weights = labels_of(scene, self.config.rules), (self.speed_weight, self.path_weight)
        losses = {}
        for name, logits, numbers, weight in zip(Commands._fields, _logits(features), wanted, weights, strict=True):
            known = numbers != UNKNOWN
            numbers = numbers.where(known, 0)
            each = nn.functional.cross_entropy(logits, numbers, reduction="none", label_smoothing=self.config.smoothing)
            losses[name] = self.config.weight * (each * weight[numbers] * known).mean()
        return losses

    def accuracy(self, features: Features, scene: Scene) -> dict[str, Float[Tensor, " B"]]:
        """Whether each command is the human's, 1 or 0, by the names "speed" and "path"; NaN without human drive."""
        found = zip(Commands._fields, _logits(features), labels_of(scene, self.config.rules), strict=True)
        return {name: (logits.argmax(-1) == wanted).float().where(wanted != UNKNOWN, torch.nan) for name, logits, wanted in found}

    def _patches(self, obs: Observation) -> Float[Tensor, "B N H"]:
        """What the encoder sees of each image, patch by patch, and in which direction that lies."""
        if obs.images is None or obs.intrinsics is None or obs.camera_to_ego is None:
            raise InputError(
                f"{self} needs images with their calibration, and these observations have none; set cameras=none to do without"
            )
        images, lenses, mounts = obs.images, obs.intrinsics, obs.camera_to_ego
        if self.config.cameras == "front":
            ahead = mounts[:, :, 0, 2].argmax(1)  # x of the optical axes
            images, lenses, mounts = (value[torch.arange(len(value)), ahead, None] for value in (images, lenses, mounts))
        maps = self.encoder(images.flatten(0, 1))
        rays = directions(lenses, mounts, (maps.shape[-2], maps.shape[-1]), (images.shape[-2], images.shape[-1]))
        patches = self.patch(maps.flatten(2).transpose(1, 2)).unflatten(0, images.shape[:2])
        return (patches + self.ray(sinusoids(rays, _RAY, 4.0))).flatten(1, 2)


def directions(
    intrinsics: Float[Tensor, "B C 3 3"], camera_to_ego: Float[Tensor, "B C 4 4"], patches: tuple[int, int], image: tuple[int, int]
) -> Float[Tensor, "B C N 3"]:
    """Unit vectors of the ego frame from each camera through the middle of each patch of its image, row by row.

    Args:
        patches, image: height and width of the image, in patches and in pixels.
    """
    v, u = ((torch.arange(n, device=intrinsics.device) + 0.5) * (size / n) - 0.5 for n, size in zip(patches, image, strict=True))
    rows, columns = torch.meshgrid(v, u, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)], -1).flatten(0, 1).to(intrinsics.dtype)
    rays = torch.linalg.solve(intrinsics, pixels.T.expand(*intrinsics.shape[:2], 3, -1))
    return nn.functional.normalize((camera_to_ego[..., :3, :3] @ rays).transpose(-1, -2), dim=-1)


def balanced(counts: dict[str, int], names: tuple[str, ...]) -> Float[Tensor, " N"]:
    """Weights of commands by how often they occur, inverse to the effective number of samples (Cui et al., CVPR 2019, beta = 0.999).

    Their mean over the data is 1. A command that does not occur weighs as one that occurs once; without counts all weigh 1.

    Raises:
        ConfigError: a name is no command's, or a count is negative.
    """
    if wrong := sorted(counts.keys() - {*SPEEDS, *PATHS}):
        raise ConfigError(f"counts: there is no command {wrong[0]!r}. {did_you_mean(wrong[0], (*SPEEDS, *PATHS))}".rstrip())
    if any(count < 0 for count in counts.values()):
        raise ConfigError(f"counts are at least 0; got {counts}")
    occurring = torch.tensor([counts.get(name, 0) for name in names], dtype=torch.float64)
    if not occurring.any():
        return torch.ones(len(names))
    weights = (1 - 0.999) / (1 - 0.999 ** occurring.clamp(min=1))
    return (weights * occurring.sum() / (weights * occurring).sum()).float()


def _logits(features: Features) -> tuple[Tensor, Tensor]:
    return features.predictions[LOGITS[0]], features.predictions[LOGITS[1]]
