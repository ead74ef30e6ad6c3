"""Bird's-eye view from cameras that a vision transformer sees (DINO, SigLIP and their like), as transformers has them."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.errors import ConfigError, FileError
from irlvla.zoo.backbones.bev import BevBackbone
from irlvla.zoo.backbones.encoders import Pixels, brief
from irlvla.zoo.libraries import library

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its colours


class VitEncoder(nn.Module):
    """An encoder (see `encoders`) whose map is the patch tokens of a vision transformer, each brought to `channels` by a linear layer.

    Position embeddings are interpolated to the shape of the image. Where `stride` is not the size of a patch, the image is scaled
    so that each patch shows `stride` pixels of it: patches of 14 see 256 x 704 as 224 x 616, and the map has 16 x 44 cells.
    Parameters on which no patch depends (poolers, mask tokens) are frozen. `config` is afterwards what rebuilds it without
    reading pretrained weights again.

    Raises:
        ConfigError: transformers has no such architecture, or it is none that turns an image into tokens of patches.
        FileError: the pretrained weights cannot be had, or are not whole.
    """

    class Config(components.Config):
        pretrained: str | None = Field(
            None, description="weights to begin with: a folder, or the name of a model on the Hub, which transformers downloads"
        )
        architecture: dict[str, Any] = Field(
            {"model_type": "dinov2"}, description="without pretrained weights: a transformers configuration, by its model_type"
        )
        stride: int | None = Field(16, ge=1, description="pixels of the image per patch; null = the size of a patch")
        channels: int = Field(256, ge=1, description="width of the map")
        freeze: bool = Field(False, description="keep the transformer as it is and train what follows alone")
        checkpointing: bool = Field(False, description="compute activations again in the backward pass instead of keeping them")
        mean: tuple[float, float, float] | None = Field(
            None, description="of its images' colours; null = as the pretrained model says, else ImageNet's"
        )
        deviation: tuple[float, float, float] | None = Field(None, description="of its images' colours; null as for mean")

    def __init__(self, config: Any) -> None:
        super().__init__()
        transformers = library("transformers")
        self.net = _pretrained(transformers, config) if config.pretrained else _fresh(transformers, config.architecture)
        mean, deviation = _colours(transformers, config)
        self.pixels = Pixels(mean, deviation)
        rebuilt = {"pretrained": None, "architecture": self.net.config.to_diff_dict(), "mean": mean, "deviation": deviation}
        self.config = config.model_copy(update=rebuilt) if config.pretrained else config
        self.options = {"interpolate_pos_encoding": True} if _interpolates_when_told(self.net) else {}
        _freeze_unused(transformers, self.net, self.options)
        self.patch = self.net.config.patch_size
        self.stride, self.width = config.stride or self.patch, config.channels
        if config.freeze:
            self.net.requires_grad_(False)
        if config.checkpointing:
            self.net.gradient_checkpointing_enable()
        self.neck = nn.Sequential(nn.Linear(self.net.config.hidden_size, config.channels), nn.LayerNorm(config.channels))

    def train(self, mode: bool = True) -> VitEncoder:
        super().train(mode)
        self.net.train(mode and not self.config.freeze)  # no dropout in what does not learn
        return self

    def forward(self, images: Tensor) -> Float[Tensor, "M D h w"]:
        height, width = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        pixels = self.pixels(images)
        if self.stride != self.patch:
            size = (height * self.patch, width * self.patch)
            pixels = nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        tokens = self.net(pixels, **self.options).last_hidden_state[:, -height * width :]  # others come first
        return self.neck(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class VitBackbone(BevBackbone):
    """`BevBackbone` with a vision transformer in place of the convolutional network."""

    Encoder: ClassVar[Any] = VitEncoder

    class Config(BevBackbone.Config):
        encoder: VitEncoder.Config = Field(VitEncoder.Config.model_validate({}), description="what sees the images")  # type: ignore[assignment]


def _fresh(transformers: ModuleType, architecture: dict[str, Any]) -> Any:
    """A transformer with random weights."""
    settings = dict(architecture)
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return transformers.AutoModel.from_config(_vision(config))
    except Exception as error:
        raise ConfigError(f"transformers makes no vision model of {architecture}: {brief(error)}") from error


def _pretrained(transformers: ModuleType, config: Any) -> Any:
    try:
        vision = _vision(transformers.AutoConfig.from_pretrained(config.pretrained))
        net, found = transformers.AutoModel.from_pretrained(
            config.pretrained, config=vision, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        remedy = "name a folder that holds one (config.json and model.safetensors), or a model on the Hub that can be reached"
        raise FileError(f"{config.pretrained!r} gives no pretrained vision model: {brief(error)}; {remedy}") from error
    if lost := sorted(found["missing_keys"]):
        raise FileError(f"{config.pretrained!r} lacks {len(lost)} weights of {type(net).__name__}: {brief(', '.join(lost))}")
    return net


def _vision(config: Any) -> Any:
    """The part of a configuration that sees, of a model that also reads."""
    return getattr(config, "vision_config", config)


def _colours(transformers: ModuleType, config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images that a model was trained on."""
    mean, deviation = IMAGENET
    if config.pretrained is not None:
        try:
            found, _ = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(config.pretrained)
            mean, deviation = tuple(found["image_mean"]), tuple(found["image_std"])
        except (OSError, KeyError) as error:
            if config.mean is None or config.deviation is None:
                remedy = "set mean and deviation to those of the images that it was trained on"
                raise ConfigError(
                    f"{config.pretrained!r} does not say how its images were normalised ({brief(error)}); {remedy}"
                ) from error
    return config.mean or mean, config.deviation or deviation


def _interpolates_when_told(net: Any) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(net.forward).parameters


def _freeze_unused(transformers: ModuleType, net: Any, options: dict[str, Any]) -> None:
    """Freeze what patch tokens do not depend on: distributed training waits for gradients of everything else."""
    try:
        with torch.device("meta"), torch.enable_grad():
            twin = transformers.AutoModel.from_config(net.config).eval()
            size = 4 * net.config.patch_size
            tokens = twin(torch.zeros(1, 3, size, size), **options).last_hidden_state[:, -16:]
            gradients = torch.autograd.grad(tokens.sum(), list(twin.parameters()), allow_unused=True)
    except Exception as error:
        raise ConfigError(f"{type(net).__name__} does not turn an image into tokens of patches: {brief(error)}") from error
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
