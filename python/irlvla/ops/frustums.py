"""Where the points of cameras lie: the ray of every feature, followed to every depth, to a cell of a bird's-eye-view grid.

Everything that decides about a cell is float64 and made of elementwise operations in a fixed order, so that all devices agree
to the bit; products of matrices do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops._native import LIMIT, as_tensor

MAX_ROWS = 255  #: of a run of points: its length is a byte
RIGID = 1e-3  #: how far from the identity a rotation times its transpose may be; calibrations are rounded


@dataclass(frozen=True)
class Grid:
    """A bird's-eye-view grid in the ego frame: low, high and step along x and y, low and high along z [m]. Cells are half open.

    Raises:
        InputError: a range is empty, or no whole number of steps.
    """

    x: tuple[float, float, float] = (-51.2, 51.2, 0.8)
    y: tuple[float, float, float] = (-51.2, 51.2, 0.8)
    z: tuple[float, float] = (-5.0, 3.0)

    def __post_init__(self) -> None:
        for axis, names in (("x", ("low", "high", "step")), ("y", ("low", "high", "step")), ("z", ("low", "high"))):
            given = getattr(self, axis)
            try:
                values = tuple(float(value) for value in given)
            except (TypeError, ValueError):
                values = ()
            if len(values) != len(names) or not all(map(_is_length, values)):
                raise InputError(f"a grid needs {axis} as ({', '.join(names)}) [m], got {given!r}")
            object.__setattr__(self, axis, values)
            _steps(values[0], values[1], values[2] if len(values) == 3 else values[1] - values[0])
        if self.cells >= 2**31:
            raise InputError(f"a grid has fewer than 2**31 cells; {self.shape[0]} x {self.shape[1]} are more")

    @property
    def shape(self) -> tuple[int, int]:
        """Cells along x and y: the last two sizes of what is pooled."""
        return _steps(*self.x), _steps(*self.y)

    @property
    def cells(self) -> int:
        """How many there are; cell (i, j) is number i * shape[1] + j."""
        return self.shape[0] * self.shape[1]

    @property
    def range(self) -> tuple[float, float, float, float]:
        """What it covers, as `Features.bev_range` says it: least x, greatest x, least y, greatest y [m]."""
        return self.x[0], self.x[1], self.y[0], self.y[1]


def depth_bins(low: float = 1.0, high: float = 60.0, step: float = 1.0) -> Float[Tensor, " D"]:
    """The middles of bins that cover low ... high [m, along the optical axis]; the bin of a depth is (depth - low) // step."""
    if not all(map(_is_length, (low, high, step))) or low < 0.0:
        raise InputError(f"depth bins need low >= 0, high and step [m], got {low}, {high} and {step}")
    return low + (torch.arange(_steps(low, high, step), dtype=torch.float64) + 0.5) * step


def _is_length(value: float) -> bool:
    return abs(value) < LIMIT  # NaN is none


def _steps(low: float, high: float, step: float) -> int:
    """How many steps lead from low to high."""
    count = (high - low) / step if step > 0.0 else 0.0
    if round(count) < 1 or abs(count - round(count)) > 1e-6 * count:
        raise InputError(f"there must be a whole number of steps, at least one; {low:g} ... {high:g} in steps of {step:g} is none")
    return round(count)


@dataclass(frozen=True)
class Frustum:
    """What the cameras of a rig have in common, whatever they look at: their features, bins of depth, and the grid."""

    cameras: int
    height: int
    width: int
    depths: tuple[float, ...]
    grid: Grid
    image_size: tuple[int, int]

    @classmethod
    def of(cls, cameras: int, feature_size: object, depths: object, grid: object, image_size: object) -> Frustum:
        """Checked; see `VoxelPoolPlan.build`."""
        if not isinstance(grid, Grid):
            raise InputError(f"grid must be an irlvla.ops.Grid, got {type(grid).__name__}")
        height, width = _size(feature_size, "feature_size")
        bins = as_tensor(depths, "depths").cpu()
        if bins.dim() != 1 or not len(bins) or not all(map(_is_length, bins.tolist())):
            raise InputError(f"depths must be finite numbers [m], at least one, in one dimension; got {depths!r}")
        for what, count, limit in (
            ("bins", len(bins), 2**16 - 1),
            ("rows of features", height, MAX_ROWS + 1),
            ("features of all cameras", cameras * height * width, 2**24),
            ("points of all cameras", cameras * height * width * len(bins), 2**31 - 1),
        ):
            if count > limit:
                raise InputError(f"a plan has at most {limit} {what}, got {count}")
        image = (height, width) if image_size is None else _size(image_size, "image_size")
        return cls(cameras, height, width, tuple(bins.tolist()), grid, image)


def _size(value: object, name: str) -> tuple[int, int]:
    try:
        height, width = (int(number) for number in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise InputError(f"{name} must be (height, width) [pixels], got {value!r}")
    return height, width


# --- rigs ---------------------------------------------------------------------------------------------------------------


def rigs_of(intrinsics: object, camera_to_ego: object) -> Float[Tensor, "B N 25"]:
    """The matrices of each rig, row by row, on the CPU: what tells one from another. B is 1 for a shared one."""
    matrices = []
    for name, value, size in (("intrinsics", intrinsics, 3), ("camera_to_ego", camera_to_ego, 4)):
        given = as_tensor(value, name)
        if given.dim() not in (3, 4) or given.shape[-2:] != (size, size) or 0 in given.shape:
            wanted = f"(cameras, {size}, {size}) or (batch, cameras, {size}, {size})"
            raise InputError(f"{name} must have shape {wanted}, got {tuple(given.shape)}")
        matrices.append(given.reshape(-1, given.shape[-3], size * size).cpu())
    (b, n), (c, m) = (given.shape[:2] for given in matrices)
    if n != m or (b != c and 1 not in (b, c)):
        raise InputError(f"intrinsics are of {b} rigs of {n} cameras, camera_to_ego of {c} rigs of {m}")
    return torch.cat([given.expand(max(b, c), -1, -1) for given in matrices], -1)


def split(rig: Float[Tensor, "N 25"]) -> tuple[Float[Tensor, "N 3 3"], Float[Tensor, "N 4 4"]]:
    """Intrinsics and poses of a rig.

    Raises:
        InputError: one of them is none; the message names the camera.
    """
    k, pose = rig[:, :9].reshape(-1, 3, 3), rig[:, 9:].reshape(-1, 4, 4)
    turned = pose[:, :3, :3] @ pose[:, :3, :3].mT - torch.eye(3, dtype=rig.dtype, device=rig.device)
    last = pose[:, 3] - rig.new_tensor([0.0, 0.0, 0.0, 1.0])
    for fine, what, problem in (
        (rig.abs().amax(1) < LIMIT, rig, "the matrices of camera {} hold NaN, infinity or a value beyond any length: {}"),
        (torch.linalg.det(k).abs() > 1e-9 * k.norm(dim=2).prod(1), k, "intrinsics of camera {} are singular: {}"),
        (turned.abs().amax((1, 2)) < RIGID, pose, "camera_to_ego of camera {} is not rigid: it changes distances: {}"),
        (last.abs().amax(1) < 1e-6, pose, "camera_to_ego of camera {} must have the last row 0 0 0 1: {}"),
    ):
        if not fine.all():
            camera = int((~fine).nonzero()[0])
            raise InputError(problem.format(camera, what[camera].tolist()))
    return k, pose


# --- points -------------------------------------------------------------------------------------------------------------


def cells_of(rig: Float[Tensor, "N 25"], frustum: Frustum, device: torch.device) -> Int[Tensor, "N W D H"]:
    """The cell of each point, -1 if it lies in none."""
    intrinsics, camera_to_ego = split(rig)
    directions = _directions(_inverse(intrinsics).to(device), camera_to_ego.to(device), frustum)
    return _cells(directions, camera_to_ego[:, :3, 3].to(device), frustum)


def _inverse(m: Float[Tensor, "N 3 3"]) -> Float[Tensor, "N 3 3"]:
    """By cofactors."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in m.unbind(-2))
    first, second, third = e * i - f * h, f * g - d * i, d * h - e * g
    rows = [[first, c * h - b * i, b * f - c * e], [second, a * i - c * g, c * d - a * f], [third, b * g - a * h, a * e - b * d]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2) / (a * first + b * second + c * third)[:, None, None]


def _directions(inverse: Float[Tensor, "N 3 3"], camera_to_ego: Float[Tensor, "N 4 4"], frustum: Frustum) -> Float[Tensor, "4 N W H"]:
    """How far a point moves along x, y and z of the ego frame per metre of depth; last, whether its ray points ahead (> 0)."""

    def middles(count: int, pixels: int) -> Tensor:
        return (torch.arange(count, dtype=torch.float64, device=inverse.device) + 0.5) * (pixels / count) - 0.5

    u, v = middles(frustum.width, frustum.image_size[1])[:, None], middles(frustum.height, frustum.image_size[0])
    k, r = inverse[..., None, None], camera_to_ego[..., None, None]
    x, y, z = (k[:, row, 0] * u + k[:, row, 1] * v + k[:, row, 2] for row in range(3))
    x, y = x / z, y / z
    return torch.stack([*(r[:, row, 0] * x + r[:, row, 1] * y + r[:, row, 2] for row in range(3)), z])


def _cells(directions: Float[Tensor, "4 N W H"], origin: Float[Tensor, "N 3"], frustum: Frustum) -> Int[Tensor, "N W D H"]:
    """In place, and without comparing doubles, which takes longer than all the rest: an integer or-ed with a negative one is
    negative, and its sign shifted down is -1.
    """
    depths = torch.tensor(frustum.depths, dtype=torch.float64, device=origin.device)[:, None]
    outside = -(directions[3, :, :, None] <= 0.0).int() | -(depths <= 0.0).int()
    cells, index = torch.zeros_like(outside), torch.empty_like(outside)
    place = torch.empty_like(outside, dtype=torch.float64)
    bottom, top = frustum.grid.z
    for axis, (low, high, step) in enumerate((frustum.grid.x, frustum.grid.y, (bottom, top, top - bottom))):
        count = _steps(low, high, step)
        torch.mul(directions[axis, :, :, None], depths, out=place)
        place.add_(origin[:, axis, None, None, None]).sub_(low).div_(step).floor_().clamp_(-1.0, count)
        index.copy_(place)
        cells.mul_(count).add_(index)
        outside.bitwise_or_(index).bitwise_or_(index.neg_().add_(count - 1))
    return cells.bitwise_or_(outside.bitwise_right_shift_(31))
