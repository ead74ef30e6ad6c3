"""BEV voxel pooling: features of camera pixels, weighted by their depth distributions, summed into a bird's-eye-view grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops._voxel_pool import NUMBERS
from irlvla.ops.frustums import Grid as Grid
from irlvla.ops.pool_plans import VoxelPoolPlan as VoxelPoolPlan


def voxel_pool(
    features: Float[Tensor, "B N C H W"],
    depth: Float[Tensor, "B N D H W"],
    plan: VoxelPoolPlan,
    *,
    softmax: bool = False,
    dtype: torch.dtype | None = None,
    return_depth: bool = False,
) -> Float[Tensor, "B C X Y"] | tuple[Float[Tensor, "B C X Y"], Float[Tensor, "B N D H W"]]:
    """Features of camera pixels, spread along their rays by their depth, summed into the cells of the plan's grid.

    Sums are float32 whatever goes in and comes out, in the order of the plan: bit-identical from run to run, for any number of
    threads. Gradients reach features and depth, once: there is no second derivative. Features that are channels-last in memory
    are read where they lie, others are copied first; depth may have any layout.

    Args:
        features: float32, float16 or bfloat16.
        depth: float32, float16 or bfloat16, not necessarily that of the features: how much of a pixel's features goes to each
            depth, or with `softmax` the logits of that.
        plan: for a rig of N cameras with H x W features and D depths, shared or one per sample; on the device of the features.
        softmax: take the softmax of depth over D, in float32, on the way.
        dtype: of the result: float32, float16 or bfloat16; by default that of the features. Autocast changes nothing here.
        return_depth: also return the distribution over depths that was used: with `softmax` in float32, else depth itself.

    Returns:
        Sums, channels-last in memory. Cells without points are zero.

    Raises:
        InputError: a wrong shape, dtype or device, or a plan of another geometry.
    """
    _require_poolable(features, depth, plan, dtype)
    rows = features.permute(0, 1, 3, 4, 2).contiguous()
    bev, weights = torch.ops.irlvla.voxel_pool(rows, depth, *plan.tables, plan.samples, plan.grid.cells, softmax, dtype or features.dtype)
    bev = bev.unflatten(1, plan.grid.shape).permute(0, 3, 1, 2)
    if not return_depth:
        return bev
    return bev, weights.permute(0, 1, 3, 4, 2) if softmax else depth


def _require_poolable(features: Tensor, depth: Tensor, plan: VoxelPoolPlan, dtype: torch.dtype | None) -> None:
    if not isinstance(plan, VoxelPoolPlan):
        raise InputError(f"plan must be a VoxelPoolPlan, got {type(plan).__name__}; VoxelPoolPlan.build makes one from a rig")
    for value, name, letters in ((features, "features", "B N C H W"), (depth, "depth", "B N D H W")):
        if not isinstance(value, Tensor) or value.dtype not in NUMBERS:
            raise InputError(
                f"{name} must be a tensor of float32, float16 or bfloat16, got {getattr(value, 'dtype', type(value).__name__)}"
            )
        if value.dim() != 5:
            raise InputError(f"{name} must have shape ({letters.replace(' ', ', ')}), got {tuple(value.shape)}")
        if value.device != plan.device:
            raise InputError(f"{name} is on {value.device} and the plan on {plan.device}; move one with .to()")
    if dtype is not None and dtype not in NUMBERS:
        raise InputError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    batch, cameras, channels, height, width = features.shape
    if channels == 0:
        raise InputError(f"features need at least one channel, got shape {tuple(features.shape)}")
    if (cameras, height, width) != (plan.cameras, plan.height, plan.width):
        raise InputError(
            f"the plan is for {plan.cameras} cameras with {plan.height} x {plan.width} features, "
            f"got features of shape {tuple(features.shape)}: {cameras} cameras, {height} x {width}"
        )
    wanted = batch, plan.cameras, plan.bins, plan.height, plan.width
    if tuple(depth.shape) != wanted:
        raise InputError(f"depth must have shape {wanted} for these features and the plan's {plan.bins} depths, got {tuple(depth.shape)}")
    if plan.samples not in (1, batch):
        raise InputError(f"the plan is for {plan.samples} samples (or 1, shared by all), got features of {batch}")
