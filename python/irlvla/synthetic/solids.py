"""What stands on the ground of the embedded world, shaded and in haze, and the order in which it is painted."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from irlvla.synthetic import models
from irlvla.synthetic.angles import Array, angle_of, cosine_sine, cosine_sine_of, wrap
from irlvla.synthetic.appearance import Colour, Daylight, Shapes, to_ego
from irlvla.synthetic.world import PAST, STEP, Actor, Signal, World
from irlvla.types import Kind

LIT: dict[str, Colour] = {"tail": (255, 100, 84), "red lamp": (255, 70, 56), "amber lamp": (255, 190, 40), "green lamp": (60, 255, 170)}
COATS: tuple[Colour, ...] = (  # lighter or darker than asphalt
    (232, 232, 230), (196, 200, 204), (134, 138, 142), (30, 32, 36), (192, 50, 46), (62, 110, 182), (72, 132, 102), (204, 186, 148),
    (224, 148, 48), (138, 98, 154),
)  # fmt: skip
MODELS = {
    Kind.PEDESTRIAN: "person", Kind.BICYCLE: "cyclist", Kind.TRAFFIC_CONE: "cone", Kind.BARRIER: "barrier", Kind.CONSTRUCTION_SIGN: "sign",
    Kind.GENERIC: "crate",
}  # fmt: skip
TALL = 2.1  # vehicles above this height are vans, lorries and buses [m]
BRAKING = -0.6  # brake lights shine below this acceleration [m/s2]
LAMPS, MAST = (0.35, 0.62, 1.5), (0.16, 0.16)  # [m]


class Item(NamedTuple):
    """A model, where it stands and how it is dressed."""

    model: str
    size: tuple[float, float, float]
    pose: tuple[float, float, float, float]  # x, y, heading, height of its bottom (world frame)
    own: Colour = (0, 0, 0)
    lit: str = ""  # what of it shines


@dataclass(frozen=True)
class Solids:
    """N solids as quadrilaterals in the ego frame, grouped by solid."""

    quads: Float[np.ndarray, "Q 4 3"]
    normals: Float[np.ndarray, "Q 3"]  # of any length, outwards
    owner: Int[np.ndarray, " Q"]  # the solid that it belongs to
    shape: Int[np.ndarray, " Q"]  # the shape that it belongs to; rising within a block
    heights: Float[np.ndarray, "Q 2"]  # bottom and top of its block
    colours: Float[np.ndarray, "Q 3"]
    footprints: Float[np.ndarray, "N 4 2"]  # counter-clockwise
    spans: Float[np.ndarray, "N 2"]  # heights of bottom and top
    middles: Float[np.ndarray, "N 3"]
    radii: Float[np.ndarray, " N"]  # of the spheres around them

    def seen_from(self, eye: Float[np.ndarray, "3"], in_view: Bool[np.ndarray, " N"]) -> Shapes:
        """What of some solids is turned towards an eye, from the hidden to what hides it."""
        ordered = np.flatnonzero(in_view)[painting_order(self.footprints[in_view], eye[:2])]
        rank = np.full(len(in_view), -1)
        rank[ordered] = np.arange(len(ordered))
        near = np.flatnonzero(in_view[self.owner])
        chosen = near[(self.normals[near] * (eye - self.quads[near, 0])).sum(1) > 0.0]
        # Of blocks on top of each other, the one at the height of the eye hides its neighbours, and so on away from it.
        above, below = self.heights[chosen, 0] - eye[2], eye[2] - self.heights[chosen, 1]
        chosen = chosen[np.lexsort((self.shape[chosen], -np.maximum(np.maximum(above, below), 0.0), rank[self.owner[chosen]]))]
        first = np.flatnonzero(np.diff(self.shape[chosen], prepend=-1))
        colours = np.concatenate([self.colours[chosen[first]], np.ones((len(first), 1))], axis=1)
        return Shapes(self.quads[chosen].reshape(-1, 3), np.arange(len(chosen) + 1) * 4, np.append(first, len(chosen)), colours)


def painting_order(footprints: Float[np.ndarray, "N 4 2"], eye: Float[np.ndarray, "2"]) -> Int[np.ndarray, " N"]:
    """An order of upright boxes in which none is painted over one that hides it.

    Two boxes that do not overlap are separated by a side of one of them, and the one beyond that side, as seen from the eye, is
    hidden by the other, if any is. Boxes that overlap are ordered by distance.
    """
    count = len(footprints)
    side = np.roll(footprints, -1, axis=1) - footprints
    offset = side[..., 1] * footprints[..., 0] - side[..., 0] * footprints[..., 1]
    corners = footprints.reshape(-1, 2)
    beyond = side[..., 1, None] * corners[:, 0] - side[..., 0, None] * corners[:, 1] - offset[..., None] >= -1e-6
    apart = beyond.reshape(count, 4, count, 4).all(3)  # the other box lies beyond this side of this one
    outside = (side[..., 1] * eye[0] - side[..., 0] * eye[1] - offset > 0.0)[..., None]
    hides = (apart & ~outside).any(1) | (apart & outside).any(1).T  # this one may hide the other
    before = hides.T & ~hides & _same_direction(footprints, eye)
    distance = ((footprints.mean(1) - eye) ** 2).sum(1)
    left, ordered = np.ones(count, dtype=bool), []
    while left.any():
        ready = left & ~before[left].any(0)
        if not ready.any():
            ready[np.flatnonzero(left)[distance[left].argmax()]] = True
        ordered.append(np.flatnonzero(ready))
        left &= ~ready
    return np.concatenate([np.zeros(0, dtype=np.int64), *ordered])


def _same_direction(footprints: Float[np.ndarray, "N 4 2"], eye: Float[np.ndarray, "2"]) -> Bool[np.ndarray, "N N"]:
    """Which boxes lie in a common direction from an eye."""
    middle, corner = footprints.mean(1) - eye, footprints - eye
    bearing = angle_of(middle[:, 0], middle[:, 1])
    spread = wrap(angle_of(corner[..., 0], corner[..., 1]) - bearing[:, None])
    low, high = spread.min(1), spread.max(1)
    turn = wrap(bearing[None, :] - bearing[:, None])
    return (turn + low < high[:, None]) & (turn + high > low[:, None])


# -- from actors and signals -------------------------------------------------------------------------------------------


def solids_of(world: World, step: int, light: Daylight) -> Solids:
    """Actors and traffic lights at a step from t = 0."""
    now = PAST + step
    items = [_actor(actor, now, world.seed) for actor in world.actors if actor.valid[now]]
    items += [item for signal in world.roads.signals for item in _signal(signal, now)]
    size, pose = np.array([item.size for item in items]).reshape(-1, 3), np.array([item.pose for item in items]).reshape(-1, 4)
    pose[:, :2], pose[:, 2] = to_ego(pose[:, :2], world.ego[now]), pose[:, 2] - world.ego[now, 2]
    built = [models.CATALOGUE[item.model] for item in items] or [models.NOTHING]
    owner = np.repeat(np.arange(len(built)), [len(model.shape) for model in built])
    first_shape = np.cumsum([0, *(model.shape.max(initial=-1) + 1 for model in built)])
    quads = _placed(np.concatenate([model.quads for model in built]), size[owner], pose[owner])
    normals = np.cross(quads[:, 1] - quads[:, 0], quads[:, 3] - quads[:, 0])
    return Solids(
        quads=quads,
        normals=normals,
        owner=owner,
        shape=np.concatenate([model.shape for model in built]) + first_shape[owner],
        heights=pose[owner, 3:] + size[owner, 2:] * np.concatenate([model.heights for model in built]),
        colours=_colours(items, owner, np.concatenate([model.colour for model in built]), normals, pose, light),
        footprints=_placed(np.broadcast_to(models.FOOTPRINT, (len(items), 4, 3)), size, pose)[..., :2],
        spans=pose[:, 3:] + size[:, 2:] * np.array([0.0, 1.0]),
        middles=np.concatenate([pose[:, :2], pose[:, 3:] + 0.5 * size[:, 2:]], axis=1),
        radii=0.5 * np.sqrt((size * size).sum(1)),
    )


def _actor(actor: Actor, now: int, seed: int) -> Item:
    x, y, heading, vx, vy = actor.state[now]
    model = MODELS.get(actor.kind) or ("van" if actor.size[2] > TALL else "car")
    before = max(now - 3, 0)
    cosine, sine = cosine_sine_of(float(heading))
    gained = cosine * (vx - actor.state[before, 3]) + sine * (vy - actor.state[before, 4])
    braking = actor.valid[before] and gained < BRAKING * STEP * (now - before)
    coat = COATS[zlib.crc32(f"{seed}/{actor.name}".encode()) % len(COATS)]
    return Item(model, actor.size, (x, y, heading, 0.0), coat, "tail" if braking else "")


def _signal(signal: Signal, now: int) -> tuple[Item, Item]:
    """The lamps and the mast below."""
    x, y, z = signal.position
    bottom = z - 0.5 * LAMPS[2]
    lit = "red lamp" if signal.red[now] else "amber lamp" if signal.amber[now] else "green lamp"
    return Item("lamps", LAMPS, (x, y, signal.heading, bottom), lit=lit), Item("mast", (*MAST, bottom), (x, y, signal.heading, 0.0))


def _placed(
    points: Float[np.ndarray, "N 4 3"], size: Float[np.ndarray, "N 3"], pose: Float[np.ndarray, "N 4"]
) -> Float[np.ndarray, "N 4 3"]:
    """Points of unit boxes, where boxes of some size stand."""
    cosine, sine = cosine_sine(pose[:, 2:3])
    x, y, z = np.moveaxis(points * size[:, None], 2, 0)
    return np.stack([pose[:, :1] + cosine * x - sine * y, pose[:, 1:2] + sine * x + cosine * y, pose[:, 3:] + z], axis=-1)


def _colours(
    items: list[Item], owner: Int[np.ndarray, " Q"], colour: Int[np.ndarray, " Q"], normals: Array, pose: Array, light: Daylight
) -> Float[np.ndarray, "Q 3"]:
    """Colours of the palette, dressed, shaded and in haze."""
    names = list(models.PALETTE)
    dressed = np.tile(np.array(list(models.PALETTE.values()), dtype=np.float64), (len(items), 1, 1))
    for i, item in enumerate(items):
        dressed[i, 0] = item.own
        if item.lit:
            dressed[i, names.index(item.lit)] = LIT[item.lit]
    glows = np.isin(colour, [names.index(name) for name in LIT])
    length = np.sqrt((normals * normals).sum(1, keepdims=True))
    shaded = dressed[owner, colour] * np.where(glows, 1.0, light.brightness(normals / np.maximum(length, 1e-9)))[:, None]
    veil = light.haze(np.sqrt((pose[:, :2] ** 2).sum(1)))[owner, None]
    return np.clip(shaded + (light.horizon - shaded) * veil, 0.0, 255.0)
