"""Image encoders: the pixels of any camera to one map of features, as a convolutional network or a vision transformer sees them.

An encoder is built from its `Config`, tells the `stride` of its map (pixels of an image per cell) and the `width` of its features,
and maps images "M 3 H W" (uint8, or floats in [0, 1]) to "M width H/stride W/stride", channels last in memory.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.errors import ConfigError, FileError, did_you_mean
from irlvla.zoo.libraries import library


class ConvNorm(nn.Sequential):
    """A convolution that keeps the size (divided by `stride`), group normalisation, and a ReLU unless `act` is False."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, act: bool = True) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, group_norm(outputs), *([nn.ReLU(inplace=True)] if act else []))


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 8 channels, 32 groups at most: what a batch holds besides a scene does not matter."""
    groups = next(groups for groups in range(min(32, max(channels // 8, 1)), 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)


def brief(error: object) -> str:
    """What an error of another library says, on one line of bounded length."""
    return textwrap.shorten(str(error), 300, placeholder=" ...")


class Pixels(nn.Module):
    """Images as a network was trained to see them: less the mean colour, divided by its deviation, channels last."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        super().__init__()
        scale = 1.0 / torch.tensor(deviation)[:, None, None]
        self.register_buffer("scale", scale)  # saved: the weights rely on it
        self.register_buffer("shift", -torch.tensor(mean)[:, None, None] * scale)

    def forward(self, images: Tensor) -> Float[Tensor, "M 3 H W"]:
        scale = self.scale if images.is_floating_point() else self.scale / 255.0
        return torch.addcmul(self.shift, images.to(self.shift.dtype, memory_format=torch.channels_last), scale)


class Pyramid(nn.Module):
    """Joins maps of several strides into the finest: the neck of LSS (GeneralizedLSSFPN of BEVFusion).

    From the coarsest on, a map is scaled up, put beside the next finer one, and mixed by a 1x1 and a 3x3 convolution.
    """

    def __init__(self, inputs: list[int], outputs: int) -> None:
        super().__init__()
        *finer, coarsest = inputs
        above = [outputs] * (len(finer) - 1) + [coarsest] if finer else []
        pairs = list(zip(finer, above, strict=True)) or [(coarsest, 0)]
        self.mixers = nn.ModuleList(nn.Sequential(ConvNorm(a + b, outputs, 1), ConvNorm(outputs, outputs)) for a, b in pairs)

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "M D h w"]:
        """Maps from the finest to the coarsest."""
        if len(maps) == 1:
            return self.mixers[0](maps[0])
        joined = maps[-1]
        for finer, mixer in zip(maps[-2::-1], reversed(self.mixers), strict=True):
            grown = nn.functional.interpolate(joined, size=finer.shape[2:], mode="bilinear")
            joined = mixer(torch.cat([finer, grown], 1))
        return joined


# -- timm --------------------------------------------------------------------------------------------------------------


class TimmEncoder(nn.Module):
    """Any network of timm that can return its feature maps, and a `Pyramid` that joins them.

    `config` is afterwards what rebuilds it without reading pretrained weights again: a saved model has them itself.

    Raises:
        ConfigError: timm has no such network, or it has no maps of these strides.
        FileError: the pretrained weights cannot be had, or do not fit the network.
    """

    class Config(components.Config):
        model: str = Field("ese_vovnet99b", description="name of a timm network")
        strides: tuple[int, ...] = Field(
            (16, 32), min_length=1, description="which of its maps, finest first, as pixels per cell; the first is that of the result"
        )
        channels: int = Field(256, ge=1, description="width of the joined map")
        pretrained: bool | Path = Field(
            False, description="weights to begin with: false, true (downloaded by timm), or a safetensors file with timm's names"
        )
        norm: Literal["frozen", "group", "batch"] | None = Field(
            None,
            description="its BatchNorm layers: frozen, replaced by GroupNorm, or kept (they mix the scenes of a batch in training); "
            "null = frozen where pretrained, else group",
        )
        checkpointing: bool = Field(False, description="compute activations again in the backward pass instead of keeping them")
        size: tuple[int, int] | None = Field(None, description="height and width of the images, for networks that are built for one size")

    def __init__(self, config: Any) -> None:
        super().__init__()
        norm = config.norm or ("frozen" if config.pretrained else "group")
        self.config = config.model_copy(update={"pretrained": False, "norm": norm}) if config.pretrained else config
        self.stride, self.width = config.strides[0], config.channels
        timm = library("timm")
        net = _network(timm, config)
        self.pixels = Pixels(net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
        channels = net.feature_info.channels()
        if config.checkpointing:
            _checkpoint(net.model, config.model)
        if norm == "frozen":
            net = timm.layers.freeze_batch_norm_2d(net)
        self.net = _without_batch_norm(timm, net) if norm == "group" else net
        self.neck = Pyramid(channels, config.channels)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Float[Tensor, "M D h w"]:
        maps = self.net(self.pixels(images))
        size = tuple(pixels // self.stride for pixels in images.shape[-2:])
        if maps[0].shape[2:] != size:
            made, given = tuple(maps[0].shape[2:]), tuple(images.shape[-2:])
            remedy = "take another network, or images of another size"
            raise ConfigError(f"timm's {self.config.model!r} makes {made} cells of {given} pixels, where {size} are needed; {remedy}")
        return self.neck(maps)


def _network(timm: ModuleType, config: Any) -> Any:
    """The part of a network that makes the maps of these strides, with its weights."""
    name = config.model
    if not timm.is_model(name):
        raise ConfigError(f"timm {timm.__version__} has no network {name!r}. {did_you_mean(name, timm.list_models())}".rstrip())
    maps: dict[str, Any] = {"features_only": True, "feature_cls": "getter"}  # this one leaves out what lies behind the last map
    if config.size is not None:
        maps["img_size"] = config.size
    try:
        with torch.device("meta"):
            strides = timm.create_model(name, **maps).feature_info.reduction()
    except Exception as error:
        raise ConfigError(f"timm's {name!r} cannot return feature maps: {brief(error)}") from error
    wanted = list(config.strides)
    if wanted != sorted(set(wanted)) or not set(wanted) <= set(strides):
        raise ConfigError(
            f"timm's {name!r} has feature maps of the strides {sorted(set(strides))}; got {wanted}, expected some, finest first"
        )
    levels = [len(strides) - 1 - strides[::-1].index(stride) for stride in wanted]  # of equal ones the last: it has seen most
    weights = _pretrained(timm, config)
    try:
        return timm.create_model(name, out_indices=levels, **weights, **maps)
    except Exception as error:
        if not weights:
            raise
        remedy = "give the path of a safetensors file with them, or pretrained=false"
        what = f"{config.pretrained} does not fit" if isinstance(config.pretrained, Path) else "no pretrained weights were found for"
        raise FileError(f"{what} timm's {name!r} ({brief(error)}); {remedy}") from error


def _pretrained(timm: ModuleType, config: Any) -> dict[str, Any]:
    """How timm is told which weights to load."""
    if isinstance(config.pretrained, bool):
        return {"pretrained": True} if config.pretrained else {}
    try:
        weights = safetensors.torch.load_file(Path(config.pretrained).expanduser())
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{config.pretrained} is no safetensors file of pretrained weights: {error}") from error
    known = timm.models.get_pretrained_cfg(config.model)
    classifier = (known.classifier if known else None) or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    weights = {name: value for name, value in weights.items() if not (heads and name.startswith(heads))}
    # Without classes there is no classifier to be missing: timm then insists on all the other names.
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights, "num_classes": 0}}


def _checkpoint(net: Any, name: str) -> None:
    try:
        net.set_grad_checkpointing(True)
    except Exception as error:
        raise ConfigError(f"timm's {name!r} cannot compute its activations again; set checkpointing=false") from error


def _without_batch_norm(timm: ModuleType, module: nn.Module) -> nn.Module:
    """The network with GroupNorm in the place of BatchNorm; scale and offset stay."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        new = group_norm(module.num_features)
        if isinstance(module, timm.layers.BatchNormAct2d):
            new = timm.layers.GroupNormAct(module.num_features, new.num_groups)
            new.drop, new.act = module.drop, module.act
        if module.affine:
            new.weight, new.bias = module.weight, module.bias
        return new
    for name, child in module.named_children():
        setattr(module, name, _without_batch_norm(timm, child))
    return module
