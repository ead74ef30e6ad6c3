"""The ops behind `irlvla.ops.voxel_pool`, as torch sees them: `irlvla::voxel_pool` and its gradient.

Features are "B N H W C" here and contiguous, sums "B cells C", weights "B N W D H": as csrc/voxel_pool.h has them. What a plan
says is trusted; its sizes are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops._native import launch, library

#: The types that features, depth and sums may have, as csrc/voxel_pool.h numbers them.
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_TABLES = ("cell_start", "cell_order", "cell_runs", "column_start", "column_runs")
_PLAN = f"{', '.join(f'Tensor {name}' for name in _TABLES)}, int samples, int cells"


# --- forward ------------------------------------------------------------------------------------------------------------


def _forward(features: Tensor, depth: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    *tables, samples, cells, softmax, _ = plan
    batch, cameras, _, height, width = depth.shape
    _require_pixels(features, "features", (batch, cameras, height, width, None), depth.device)
    _require_pixels(depth, "depth", depth.shape, depth.device)
    features = features.contiguous()
    if batch > 1 and depth.stride(0) != cameras * depth.stride(1):
        depth = depth.contiguous()
    bev, weights = _outputs(features, depth, *plan)
    launch(
        "voxel_pool",
        depth.device,
        _sizes(weights, features, tables, samples, cells),
        tuple(tables),
        [NUMBERS[t.dtype] for t in (features, depth, weights, bev)],
        depth.stride()[1:],
        softmax,
        features,
        depth,
        weights,
        bev,
    )
    return bev, weights


def _outputs(features: Tensor, depth: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    *_, cells, softmax, dtype = plan
    batch, cameras, bins, height, width = depth.shape
    wide = softmax or depth.device.type == "cpu"
    weights = depth.new_empty((batch, cameras, width, bins, height), dtype=torch.float32 if wide else depth.dtype)
    return features.new_empty((batch, cells, features.shape[-1]), dtype=dtype), weights


def _require_pixels(value: Tensor, name: str, shape: Sequence[int | None], device: torch.device) -> None:
    if value.dtype not in NUMBERS:
        raise InputError(f"irlvla::voxel_pool needs {name} in float32, float16 or bfloat16, got {value.dtype}")
    if value.device != device:
        raise InputError(f"irlvla::voxel_pool needs {name} on {device}, got {value.device}")
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"irlvla::voxel_pool needs {name} of shape ({wanted}), got {tuple(value.shape)}")


def _sizes(weights: Tensor, features: Tensor, tables: Sequence[Tensor], samples: int, cells: int) -> list[int]:
    """As csrc/bindings.cpp takes them, once the plan has the sizes that it must have."""
    batch, cameras, width, bins, height = weights.shape
    if samples not in (1, batch):
        raise InputError(f"irlvla::voxel_pool needs a plan of 1 or {batch} samples, got one of {samples}")
    runs, columns = len(tables[2]), samples * cameras * width
    shapes = ((samples * cells + 1,), (samples * cells,), (runs, 2), (columns + 1,), (runs, 2))
    for name, table, shape in zip(_TABLES, tables, shapes, strict=True):
        if table.shape != shape or table.dtype != torch.int32 or table.device != weights.device or not table.is_contiguous():
            wanted, given = (
                f"{name} as int32 of shape {shape} on {weights.device}",
                f"{table.dtype} of {tuple(table.shape)} on {table.device}",
            )
            raise InputError(f"irlvla::voxel_pool needs {wanted}, got {given}")
    return [batch, features.shape[-1], samples, cameras, bins, height, width, cells]


# --- backward -----------------------------------------------------------------------------------------------------------


def _backward(bev_grad: Tensor, weights_grad: Tensor | None, features: Tensor, weights: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    *tables, samples, cells, softmax, depth_dtype, _, features_needed, depth_needed = plan
    batch, cameras, width, _, height = weights.shape
    _require_pixels(bev_grad, "bev_grad", (batch, cells, features.shape[-1]), weights.device)
    _require_pixels(features, "features", (batch, cameras, height, width, None), weights.device)
    bev_grad, features, weights = bev_grad.contiguous(), features.contiguous(), weights.contiguous()
    if weights_grad is not None:
        _require_pixels(weights_grad, "weights_grad", weights.shape, weights.device)
        weights_grad = weights_grad.to(weights.dtype).contiguous()
    features_grad, depth_grad = _gradients(bev_grad, weights_grad, features, weights, *plan)
    launch(
        "voxel_pool_backward",
        weights.device,
        _sizes(weights, features, tables, samples, cells),
        tuple(tables),
        [NUMBERS[dtype] for dtype in (features.dtype, depth_dtype, weights.dtype, bev_grad.dtype)],
        depth_grad.stride()[1:] if depth_needed else (0, 0, 0, 0),
        softmax,
        features,
        weights,
        bev_grad,
        0 if weights_grad is None else weights_grad,
        features_grad if features_needed else 0,
        depth_grad if depth_needed else 0,
    )
    return features_grad, depth_grad


def _gradients(bev_grad: Tensor, weights_grad: Tensor | None, features: Tensor, weights: Tensor, *plan: Any) -> tuple[Tensor, Tensor]:
    """Of features and depth, empty where not needed."""
    *_, depth_dtype, bins_last, features_needed, depth_needed = plan
    batch, cameras, width, bins, height = weights.shape
    features_grad = features.new_empty(features.shape if features_needed else (0,))
    if not depth_needed:
        return features_grad, weights.new_empty((0,), dtype=depth_dtype)
    shape = (batch, cameras, height, width, bins) if bins_last else (batch, cameras, bins, height, width)
    depth_grad = weights.new_empty(shape, dtype=depth_dtype)
    return features_grad, depth_grad.permute(0, 1, 4, 2, 3) if bins_last else depth_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, depth, *plan = inputs
    *tables, ctx.samples, ctx.cells, ctx.softmax, _ = plan
    ctx.depth_dtype, ctx.bins_last = depth.dtype, depth.stride(2) == 1
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, output[1], *tables)


def _differentiate(ctx: Any, bev_grad: Tensor | None, weights_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    features, weights, *tables = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    if bev_grad is None:  # the distribution alone was used
        bev_grad = features.new_zeros((features.shape[0], ctx.cells, features.shape[-1]))
    grads = torch.ops.irlvla.voxel_pool_backward(
        bev_grad, weights_grad, features, weights, *tables, ctx.samples, ctx.cells, ctx.softmax, ctx.depth_dtype, ctx.bins_last, *needed
    )
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * (len(tables) + 4)


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise InputError("voxel_pool has no second derivative: differentiate it once, without create_graph=True")


# --- registration -------------------------------------------------------------------------------------------------------

library.define(f"voxel_pool(Tensor features, Tensor depth, {_PLAN}, bool softmax, ScalarType dtype) -> (Tensor, Tensor)")
library.define(
    f"voxel_pool_backward(Tensor bev_grad, Tensor? weights_grad, Tensor features, Tensor weights, {_PLAN}, bool softmax, "
    "ScalarType depth_dtype, bool bins_last, bool features_needed, bool depth_needed) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    library.impl("voxel_pool", _forward, _device)
    library.impl("voxel_pool_backward", _backward, _device)
torch.library.register_fake("irlvla::voxel_pool", _outputs, lib=library)
torch.library.register_fake("irlvla::voxel_pool_backward", _gradients, lib=library)
torch.library.register_autograd("irlvla::voxel_pool", _differentiate, setup_context=_setup_context, lib=library)
torch.library.register_autograd("irlvla::voxel_pool_backward", _refuse, lib=library)
