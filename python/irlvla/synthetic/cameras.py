"""Cameras of the embedded world: rigs with exact calibration, and what they see.

Pixels are those of `irlvla.images` and OpenCV: the centre of the first one is (0, 0). The frame of a camera has x to the right,
y down and z forward; the ego frame has its origin on the road below the rear axle, x forward, y left, z up.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from irlvla.errors import InputError, did_you_mean
from irlvla.images import fit
from irlvla.ops.painting import paint
from irlvla.synthetic.appearance import Daylight, Shapes, joined_offsets
from irlvla.synthetic.ground import GRASS, haze, horizon, shadows, surfaces
from irlvla.synthetic.solids import solids_of
from irlvla.synthetic.world import FUTURE, PAST, World

NEAR = 0.05  #: what is nearer to a camera's plane is not seen [m]


@dataclass(frozen=True, eq=False)
class Rig:
    """Pinhole cameras on a car, with images of one size.

    Raises:
        InputError: the arrays do not belong together.
    """

    names: tuple[str, ...]
    intrinsics: Float[np.ndarray, "C 3 3"]  # for images of this size
    camera_to_ego: Float[np.ndarray, "C 4 4"]
    height: int
    width: int

    def __post_init__(self) -> None:
        count = len(self.names)
        for name, shape in (("intrinsics", (count, 3, 3)), ("camera_to_ego", (count, 4, 4))):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.shape != shape:
                raise InputError(f"a rig of {count} cameras needs {name} of shape {shape}, got {value.shape}")
            object.__setattr__(self, name, value)
        if self.height < 1 or self.width < 1:
            raise InputError(f"images have at least one pixel; got height {self.height}, width {self.width}")

    def __len__(self) -> int:
        return len(self.names)

    def resized(self, height: int, width: int) -> Rig:
        """The same cameras, their images scaled until they cover the size, then cropped: in the middle across, at the top down."""
        intrinsics = np.stack([fit(k, (self.height, self.width), (height, width)) for k in self.intrinsics])
        return Rig(self.names, intrinsics, self.camera_to_ego, height, width)

    def only(self, *names: str) -> Rig:
        """Some of its cameras, in the order given."""
        for name in names:
            if name not in self.names:
                raise InputError(f"no camera named {name!r}. {did_you_mean(name, self.names)}This rig has {', '.join(self.names)}")
        chosen = [self.names.index(name) for name in names]
        return Rig(names, self.intrinsics[chosen], self.camera_to_ego[chosen], self.height, self.width)

    def project(self, points: Float[np.ndarray, "*n 3"]) -> tuple[Float[np.ndarray, "C *n 2"], Float[np.ndarray, "C *n"]]:
        """Where each camera sees points of the ego frame: pixels (u, v), and how far ahead of it they are (negative: behind it)."""
        pixels, ahead = zip(*(view.pixels(view.to_camera(np.asarray(points, dtype=np.float64))) for view in self.views()), strict=True)
        return np.stack(pixels), np.stack(ahead)

    def views(self) -> list[View]:
        size = self.height, self.width
        return [View(k, pose[:3, :3], pose[:3, 3], size) for k, pose in zip(self.intrinsics, self.camera_to_ego, strict=True)]


@dataclass(frozen=True, eq=False)
class View:
    """One camera."""

    intrinsics: Float[np.ndarray, "3 3"]
    rotation: Float[np.ndarray, "3 3"]  # camera to ego
    eye: Float[np.ndarray, "3"]  # in the ego frame
    size: tuple[int, int]

    def to_camera(self, points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        x, y, z = np.moveaxis(points - self.eye, -1, 0)
        return np.stack([x * r[0] + y * r[1] + z * r[2] for r in self.rotation.T], axis=-1)

    def pixels(self, points: Float[np.ndarray, "*n 3"]) -> tuple[Float[np.ndarray, "*n 2"], Float[np.ndarray, "*n"]]:
        """Where points of the camera's frame are seen, and how far ahead they are."""
        x, y, z = np.moveaxis(points, -1, 0)
        (fx, skew, cx), (_, fy, cy), _ = self.intrinsics
        depth = np.where(z == 0.0, NEAR, z)
        return np.stack([(fx * x + skew * y) / depth + cx, fy * y / depth + cy], axis=-1), z

    def may_see(self, middles: Float[np.ndarray, "N 3"], radii: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Which spheres reach into the pyramid of what is seen: beyond its tip, and none of its sides cuts them off."""
        points = self.to_camera(middles)
        inside = points[:, 2] + radii > NEAR
        for axis, pixels in ((0, self.size[1]), (1, self.size[0])):
            for row, border in ((1.0, -0.5), (-1.0, pixels - 0.5)):
                side = row * (self.intrinsics[axis] - border * self.intrinsics[2])
                inside &= (points * side).sum(1) > -radii * math.sqrt((side * side).sum())
        return inside

    def seen(self, shapes: Shapes) -> tuple[Float[np.ndarray, "P 2"], Int[np.ndarray, " R+1"]]:
        """The rings of shapes as pixels, cut where they come nearer than `NEAR` (Sutherland and Hodgman, all rings at once)."""
        points, offsets = self.to_camera(shapes.points), shapes.ring_offsets
        following = np.arange(1, len(points) + 1)
        following[offsets[1:] - 1] = offsets[:-1]
        ahead = points[:, 2] - NEAR
        kept = ahead > 0.0
        crosses = kept != kept[following]
        made = np.concatenate([[0], np.cumsum(kept.astype(np.int64) + crosses)])
        cut = np.empty((made[-1], 3))
        cut[made[:-1][kept]] = points[kept]
        here, there = points[crosses], points[following[crosses]]
        share = ahead[crosses] / (ahead[crosses] - ahead[following[crosses]])
        cut[made[:-1][crosses] + kept[crosses]] = here + share[:, None] * (there - here)
        return self.pixels(cut)[0], made[offsets]


# -- rigs --------------------------------------------------------------------------------------------------------------


def mounted(yaw: float, pitch: float, roll: float, x: float, y: float, z: float) -> Float[np.ndarray, "4 4"]:
    """camera_to_ego of a camera at (x, y, z) that looks to the left by `yaw`, down by `pitch`, rolled by `roll` [degrees]."""
    a, b, c = (math.radians(angle) for angle in (yaw, pitch, roll))
    turn = np.array([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0], [0.0, 0.0, 1.0]])
    nod = np.array([[math.cos(b), 0.0, math.sin(b)], [0.0, 1.0, 0.0], [-math.sin(b), 0.0, math.cos(b)]])
    tilt = np.array([[1.0, 0.0, 0.0], [0.0, math.cos(c), -math.sin(c)], [0.0, math.sin(c), math.cos(c)]])
    axes = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # the camera's x, y and z in a car that it looks along
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn @ nod @ tilt @ axes, (x, y, z)
    return pose


# The cameras of a nuPlan car, rounded: yaw, pitch, roll, x, y, z. Its lenses distort, those of this world do not. Of its 1080 rows
# 396 are left at a width of 704; the lower 256 of them are seen in an image of 256 x 704.
_NAVSIM = {
    "CAM_F0": (-0.44, 1.31, 0.42, 1.655, -0.012, 1.491),
    "CAM_L0": (54.86, 0.84, -0.18, 1.631, 0.120, 1.481),
    "CAM_L1": (111.38, 1.15, 0.29, 1.299, 0.638, 1.367),
    "CAM_L2": (140.56, 0.87, -0.29, -0.496, 0.548, 1.347),
    "CAM_R0": (-55.55, 0.82, 1.37, 1.618, -0.155, 1.490),
    "CAM_R1": (-112.01, 0.69, 1.07, 1.273, -0.610, 1.372),
    "CAM_R2": (-141.43, 0.95, 2.22, -0.488, -0.493, 1.350),
    "CAM_B0": (179.55, 0.61, 0.71, -0.475, 0.024, 1.434),
}
_NAVSIM_INTRINSICS = np.array([[1545.0, 0.0, 960.0], [0.0, 1545.0, 560.0], [0.0, 0.0, 1.0]])
NAVSIM_RIG = Rig(
    tuple(_NAVSIM), np.tile(_NAVSIM_INTRINSICS, (8, 1, 1)), np.stack([mounted(*pose) for pose in _NAVSIM.values()]), 1080, 1920
)
FRONT_RIG = NAVSIM_RIG.only("CAM_L0", "CAM_F0", "CAM_R0")

# -- pictures ----------------------------------------------------------------------------------------------------------


def render(world: World, rig: Rig = NAVSIM_RIG, size: tuple[int, int] = (256, 704), step: int = 0) -> UInt8[Tensor, "C 3 H W"]:
    """What the cameras of a rig see, in red, green and blue. The same world gives the same pictures.

    Args:
        size: height and width. The calibration of these images is `rig.resized(*size)`.
        step: 0.1 s steps from t = 0, from -20 to 50.

    Raises:
        InputError: the world does not cover the step, or an image has no pixel.
    """
    if not -PAST <= step <= FUTURE:
        raise InputError(f"step is {step}, but a world covers {-PAST} ... {FUTURE}")
    rig = rig.resized(*size)
    pose = world.ego[PAST + step, :3]
    light = Daylight.of(world.seed, pose[2])
    solids = solids_of(world, step, light)
    ground = Shapes.cat(
        [surfaces(world.roads, pose), shadows(solids.footprints, solids.spans, light), haze(light), horizon(world.seed, pose[2], light)]
    )
    skies, points, rings, sets, colours = [], [], [], [], []
    for view in rig.views():
        shapes = Shapes.cat([ground, solids.seen_from(view.eye, view.may_see(solids.middles, solids.radii))])
        pixels, offsets = view.seen(shapes)
        skies.append(_sky(view, light))
        points.append(pixels)
        rings.append(offsets)
        sets.append(shapes.shape_offsets)
        colours.append(shapes.colours)
    return paint(
        torch.from_numpy(np.stack(skies)),
        torch.from_numpy(np.concatenate(points)),
        torch.from_numpy(joined_offsets(rings)),
        torch.from_numpy(joined_offsets(sets)),
        torch.from_numpy(np.cumsum([0, *map(len, colours)])),
        torch.from_numpy(np.concatenate(colours)),
    )


SKY_STEPS, SKY_TOP = 64, 0.15  # shades of the sky, and the sine of the elevation from which it is uniform


def _sky(view: View, light: Daylight) -> UInt8[np.ndarray, "3 H W"]:
    """Grass below the horizon, and above it the sky."""
    height = np.linspace(0.0, 1.0, SKY_STEPS)[:, None]
    colours = np.concatenate([[GRASS], light.horizon + (light.zenith - light.horizon) * height])
    table = np.floor(colours.T + 0.5).astype(np.uint8)
    shades = _shades(view.intrinsics.tobytes(), view.rotation.tobytes(), view.size)
    picture = np.empty((3, *view.size), dtype=np.uint8)
    picture[:, : len(shades)] = np.take(table, shades, axis=1)
    picture[:, len(shades) :] = table[:, :1, None]
    return picture


@functools.lru_cache(maxsize=64)  # a rig has one per camera
def _shades(intrinsics: bytes, rotation: bytes, size: tuple[int, int]) -> Int[np.ndarray, "rows W"]:
    """Which shade of the sky each pixel has, 0 below the horizon; down to the last row in which there is sky."""
    v, u = np.mgrid[: size[0], : size[1]].astype(np.float64)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(np.frombuffer(intrinsics).reshape(3, 3)).T
    up = rays @ np.frombuffer(rotation).reshape(3, 3)[2] / np.sqrt((rays * rays).sum(-1))
    shades = np.where(up < 0.0, 0, 1 + np.minimum(up / SKY_TOP, 1.0) * (SKY_STEPS - 1)).astype(np.intp)
    return shades[: np.flatnonzero(shades.any(1)).max(initial=-1) + 1]
