"""From the maps of cameras to a bird's-eye view: depth head, voxel pooling, BEV encoder (Lift, Splat, Shoot; BEVDepth; BEVDet)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from irlvla import components
from irlvla.ops import Grid, VoxelPoolPlan, depth_bins, voxel_pool
from irlvla.zoo.backbones.encoders import ConvNorm

Span = tuple[float, float, float]  # from, to, step [m]
RAY = 8  #: numbers by which a pixel knows its ray: direction, origin, extent


class Lift(nn.Module):
    """Maps of N cameras "B N C h w" to a grid around the car "B D X Y", channels last in memory.

    Each pixel's feature is spread along its ray by a distribution over depths, and summed into the cells of the grid
    (`irlvla.ops.voxel_pool`); a convolutional BEV encoder follows. The default is the scale of IRL-VLA's neighbour DiffVLA:
    LSSTransform, CustomResNet and FPN_LSS.
    """

    class Config(components.Config):
        x: Span = Field((-32.0, 32.0, 0.5), description="the grid ahead (x of the ego frame): from, to, cell [m]")
        y: Span = Field((-32.0, 32.0, 0.5), description="the grid to the left (y): from, to, cell [m]")
        z: tuple[float, float] = Field((-3.0, 5.0), description="heights that count: from, to [m]")
        depth: Span = Field((1.0, 60.0, 0.5), description="depths along the optical axis: from, to, step [m]")
        channels: int = Field(64, ge=1, description="width of the features that are lifted")
        camera_aware: bool = Field(
            True, description="tell the depth head the ray of each pixel: aware of cameras as that of BEVDepth; LSS's is not"
        )
        widths: tuple[int, ...] = Field(
            (128, 256, 512), min_length=1, description="of the BEV encoder's stages, each at half the resolution"
        )
        blocks: int = Field(2, ge=1, description="residual blocks per stage")
        joined: int = Field(512, ge=1, description="width in which the first and the last stage are joined")

    def __init__(self, config: Any, inputs: int, width: int) -> None:
        """Args:
        inputs: C of the maps.
        width: D of the grid's features.

        Raises:
            InputError: the grid or the depths have no whole number of steps.
        """
        super().__init__()
        self.config = config
        self.grid = Grid(config.x, config.y, config.z)
        self.depths = tuple(depth_bins(*config.depth).tolist())
        self.head = DepthHead(inputs, config.channels, len(self.depths), config.camera_aware)
        self.encoder = BevEncoder(config.channels, config.widths, config.blocks, config.joined, width)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def plan(
        self, intrinsics: Float[Tensor, "B N 3 3"], camera_to_ego: Float[Tensor, "B N 4 4"], size: tuple[int, int], stride: int
    ) -> VoxelPoolPlan:
        """Which pixel of the maps lies at which depth in which cell, for images of a size and maps that are smaller by `stride`."""
        maps = size[0] // stride, size[1] // stride
        return VoxelPoolPlan.build(intrinsics, camera_to_ego, maps, self.depths, self.grid, image_size=size)

    def forward(self, maps: Float[Tensor, "B N C h w"], rays: Float[Tensor, "B N 8 h w"], plan: VoxelPoolPlan) -> Float[Tensor, "B D X Y"]:
        features, depth = self.head(maps, rays)
        return self.encoder(voxel_pool(features, depth, plan, softmax=True))


def rays_of(
    intrinsics: Float[Tensor, "B N 3 3"], camera_to_ego: Float[Tensor, "B N 4 4"], size: tuple[int, int], stride: int
) -> Float[Tensor, "B N 8 h w"]:
    """What each pixel of the maps may know of its camera: the direction of its ray in the ego frame (as far as 1 m along the optical
    axis goes), where the camera is [m], and how many metres the pixel is wide and high at a distance of 1 m."""
    rows, columns = (torch.arange(pixels // stride, device=intrinsics.device) for pixels in size)
    v, u = torch.meshgrid((rows + 0.5) * stride - 0.5, (columns + 0.5) * stride - 0.5, indexing="ij")
    lens, mount = intrinsics.float(), camera_to_ego.float()
    pixels = torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    directions = mount[..., :3, :3] @ lens.inverse() @ pixels
    extent = stride / lens.diagonal(dim1=-2, dim2=-1)[..., :2]
    fixed = torch.cat([mount[..., :3, 3], extent], -1)[..., None].expand(-1, -1, -1, pixels.shape[1])
    return torch.cat([directions, fixed], 2).unflatten(-1, u.shape)


class DepthHead(nn.Module):
    """Features to lift and logits over depths, each by a convolution of its own: both leave it in the layout that pooling reads."""

    def __init__(self, inputs: int, channels: int, bins: int, camera_aware: bool) -> None:
        super().__init__()
        self.mixer = ConvNorm(inputs, inputs)
        layers = nn.Conv2d(RAY, inputs, 1), nn.ReLU(inplace=True), nn.Conv2d(inputs, inputs, 1)
        self.geometry = nn.Sequential(*layers) if camera_aware else None
        self.features = nn.Conv2d(inputs, channels, 1)
        self.depth = nn.Conv2d(inputs, bins, 1)

    def forward(self, maps: Tensor, rays: Tensor) -> tuple[Float[Tensor, "B N C h w"], Float[Tensor, "B N bins h w"]]:
        shape = maps.shape[:2]
        mixed = self.mixer(maps.flatten(0, 1))
        if self.geometry is not None:
            mixed = mixed + self.geometry(rays.flatten(0, 1).to(mixed.dtype, memory_format=torch.channels_last))
        return self.features(mixed).unflatten(0, shape), self.depth(mixed).unflatten(0, shape)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 3x3 convolution where the resolution changes (BEVDet's CustomResNet)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(inputs, outputs, stride=stride), ConvNorm(outputs, outputs, act=False))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 3, stride, 1)

    def forward(self, grid: Tensor) -> Tensor:
        return torch.relu(self.convs(grid) + self.shortcut(grid))


class BevEncoder(nn.Module):
    """Residual stages, each at half the resolution of the one before; the first and the last are joined and brought back to the
    resolution of the grid (BEVDet's CustomResNet and FPN_LSS)."""

    def __init__(self, inputs: int, widths: tuple[int, ...], blocks: int, joined: int, outputs: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(Block(before, after, 2), *(Block(after, after, 1) for _ in range(blocks - 1)))
            for before, after in itertools.pairwise((inputs, *widths))
        )
        beside = widths[0] + (widths[-1] if len(widths) > 1 else 0)
        self.join = nn.Sequential(ConvNorm(beside, joined), ConvNorm(joined, joined))
        self.out = nn.Sequential(ConvNorm(joined, outputs), nn.Conv2d(outputs, outputs, 1))

    def forward(self, grid: Float[Tensor, "B C X Y"]) -> Float[Tensor, "B D X Y"]:
        maps, size = [grid], grid.shape[2:]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        first = maps[1]
        joined = torch.cat([first, _scaled(maps[-1], first.shape[2:])], 1) if len(self.stages) > 1 else first
        return self.out(_scaled(self.join(joined), size))


def _scaled(grid: Tensor, size: Any) -> Tensor:
    return nn.functional.interpolate(grid, size=size, mode="bilinear")


# -- for torch.utils.flop_counter: a product and a sum for each channel of each point, as if all points lay in the grid ----------------


@register_flop_formula(torch.ops.irlvla.voxel_pool)
def _pooling_flops(features: Any, depth: Any, *rest: Any, **options: Any) -> int:
    return 2 * int(features[-1]) * math.prod(depth)


@register_flop_formula(torch.ops.irlvla.voxel_pool_backward)
def _pooling_backward_flops(bev_grad: Any, weights_grad: Any, features: Any, weights: Any, *rest: Any, **options: Any) -> int:
    return 4 * int(features[-1]) * math.prod(weights)  # one for the gradient of the features, one for that of the depth
