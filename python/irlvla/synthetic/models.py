"""How the things of the embedded world are built: blocks within a unit box, and patches of paint on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from irlvla.synthetic.appearance import Colour

PALETTE: dict[str, Colour] = {
    "own": (0, 0, 0),  # every solid brings its own
    "glass": (36, 44, 54), "tyre": (28, 28, 30), "sill": (46, 47, 50), "plate": (232, 232, 226), "headlight": (250, 246, 220),
    "skin": (206, 164, 134), "hair": (52, 40, 34), "trousers": (44, 52, 78), "orange": (240, 108, 24), "white": (236, 236, 232),
    "red": (196, 34, 30), "wood": (150, 122, 90), "steel": (86, 90, 94), "housing": (26, 28, 30),
    "tail": (146, 22, 24), "red lamp": (54, 24, 24), "amber lamp": (54, 44, 22), "green lamp": (22, 48, 38),
}  # fmt: skip

# A block's corners: bottom then top, each front left, rear left, rear right, front right. Its faces as seen from outside: bottom
# left, bottom right, top right, top left.
FACES = {
    "front": (3, 0, 4, 7),
    "rear": (1, 2, 6, 5),
    "left": (0, 1, 5, 4),
    "right": (2, 3, 7, 6),
    "top": (5, 6, 7, 4),
    "bottom": (0, 3, 2, 1),
}
SIDES, ENDS = ("left", "right"), ("front", "rear")
AROUND = (*SIDES, *ENDS)

Outline = Float[np.ndarray, "K 4 2"]  # quadrilaterals on a face: how far to the right and up, in 0 ... 1 of it
Patch = tuple[tuple[str, ...], str, Outline]  # faces, colour, where


class Block(NamedTuple):
    """A convex block: a rectangle at the bottom, one at the top, and patches of other colours on its faces."""

    colour: str
    bottom: tuple[float, float, float]  # rear, front, half a width
    top: tuple[float, float, float]
    heights: tuple[float, float]
    patches: tuple[Patch, ...] = ()

    def faces(self) -> dict[str, Float[np.ndarray, "4 3"]]:
        ends = zip((self.bottom, self.top), self.heights, strict=True)
        corners = [(x, y, z) for (rear, front, half), z in ends for x, y in ((front, half), (rear, half), (rear, -half), (front, -half))]
        return {name: np.array(corners)[list(face)] for name, face in FACES.items()}


@dataclass(frozen=True)
class Model:
    """Blocks in a unit box (x forward and y left in -0.5 ... 0.5, z up in 0 ... 1) as quadrilaterals, in the order of painting."""

    quads: Float[np.ndarray, "Q 4 3"]  # counter-clockwise as seen from outside
    shape: Int[np.ndarray, " Q"]  # to which shape each belongs
    colour: Int[np.ndarray, " Q"]  # in PALETTE
    heights: Float[np.ndarray, "Q 2"]  # of its block

    @classmethod
    def of(cls, *blocks: Block) -> Model:
        """Of each block first all faces as one shape, so that there are no seams between them, then each face, then the patches."""
        rows: list[tuple[np.ndarray, int, int, tuple[float, float]]] = []
        colours, shapes = list(PALETTE), 0
        for block in blocks:
            faces = block.faces()
            whole = np.stack(list(faces.values()))
            parts = [(block.colour, whole), *((block.colour, face[None]) for face in whole)]
            for names, colour, outline in block.patches:
                parts += [(colour, _on(faces[name], outline)) for name in names]
            for colour, quads in parts:
                rows += [(quad, shapes, colours.index(colour), block.heights) for quad in quads]
                shapes += 1
        return cls(*map(np.array, zip(*rows, strict=True)))


def _on(face: Float[np.ndarray, "4 3"], outline: Outline) -> Float[np.ndarray, "K 4 3"]:
    u, v = outline[..., :1], outline[..., 1:]
    return (1.0 - v) * ((1.0 - u) * face[0] + u * face[1]) + v * ((1.0 - u) * face[3] + u * face[2])


def panel(left: float, right: float, bottom: float, top: float) -> Outline:
    """A rectangle."""
    return np.array([[(left, bottom), (right, bottom), (right, top), (left, top)]])


def pair(left: float, right: float, bottom: float, top: float) -> Outline:
    """A rectangle, and its mirror image on the other side of the face."""
    return np.concatenate([panel(left, right, bottom, top), panel(1.0 - right, 1.0 - left, bottom, top)])


def disc(u: float, v: float, width: float, height: float) -> Outline:
    """An octagon."""
    near, far = 0.2071, 0.5
    low = ((-near, -far), (near, -far), (far, -near), (-far, -near))
    high = ((-far, near), (far, near), (near, far), (-near, far))
    return np.concatenate([[low], panel(-far, far, -near, near), [high]]) * (width, height) + (u, v)


ALL = panel(0.0, 1.0, 0.0, 1.0)
FULL = (-0.5, 0.5, 0.5)
FOOTPRINT = np.array([(0.5, 0.5, 0.0), (-0.5, 0.5, 0.0), (-0.5, -0.5, 0.0), (0.5, -0.5, 0.0)])  # counter-clockwise

NOTHING = Model(np.zeros((0, 4, 3)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros((0, 2)))
CATALOGUE = {
    "car": Model.of(
        Block("own", FULL, FULL, (0.0, 0.54), (
            (AROUND, "sill", panel(0.0, 1.0, 0.0, 0.22)),
            (SIDES, "tyre", np.concatenate([disc(0.19, 0.35, 0.14, 0.7), disc(0.81, 0.35, 0.14, 0.7)])),
            (("front",), "headlight", pair(0.04, 0.24, 0.55, 0.85)),
            (("front",), "sill", panel(0.3, 0.7, 0.4, 0.75)),
            (("rear",), "tail", pair(0.03, 0.25, 0.55, 0.9)),
            (("rear",), "plate", panel(0.38, 0.62, 0.45, 0.65)),
        )),
        Block("own", (-0.47, 0.22, 0.47), (-0.38, 0.06, 0.38), (0.54, 1.0), (
            (SIDES, "glass", pair(0.08, 0.475, 0.12, 0.82)),
            (ENDS, "glass", panel(0.07, 0.93, 0.1, 0.86)),
        )),
    ),
    "van": Model.of(
        Block("own", FULL, FULL, (0.0, 1.0), (
            (AROUND, "sill", panel(0.0, 1.0, 0.0, 0.12)),
            (SIDES, "tyre", np.concatenate([disc(0.18, 0.15, 0.12, 0.3), disc(0.82, 0.15, 0.12, 0.3)])),
            (("left",), "glass", panel(0.02, 0.2, 0.5, 0.85)),
            (("right",), "glass", panel(0.8, 0.98, 0.5, 0.85)),
            (("front",), "glass", panel(0.06, 0.94, 0.48, 0.88)),
            (("front",), "headlight", pair(0.05, 0.25, 0.2, 0.32)),
            (("rear",), "glass", panel(0.1, 0.9, 0.55, 0.85)),
            (("rear",), "tail", pair(0.03, 0.16, 0.22, 0.42)),
            (("rear",), "plate", panel(0.4, 0.6, 0.18, 0.26)),
        )),
    ),
    "person": Model.of(
        Block("trousers", (-0.3, 0.3, 0.36), (-0.3, 0.3, 0.4), (0.0, 0.5)),
        Block("own", (-0.35, 0.35, 0.46), (-0.35, 0.35, 0.5), (0.5, 0.84)),
        Block("skin", (-0.22, 0.22, 0.22), (-0.22, 0.22, 0.22), (0.84, 1.0), (
            (("top",), "hair", ALL), (("rear",), "hair", panel(0.0, 1.0, 0.3, 1.0)), (SIDES, "hair", panel(0.0, 1.0, 0.7, 1.0)),
        )),
    ),
    "cyclist": Model.of(
        Block("steel", (-0.5, 0.5, 0.1), (-0.5, 0.5, 0.1), (0.0, 0.48), (
            (SIDES, "tyre", np.concatenate([disc(0.19, 0.4, 0.38, 0.8), disc(0.81, 0.4, 0.38, 0.8)])),
            (ENDS, "tyre", ALL),
            (("rear",), "tail", panel(0.1, 0.9, 0.75, 1.0)),
        )),
        Block("own", (-0.26, 0.02, 0.4), (-0.06, 0.22, 0.5), (0.48, 0.84)),
        Block("skin", (0.0, 0.16, 0.2), (0.0, 0.16, 0.2), (0.84, 1.0), ((("top", "rear"), "white", ALL),)),
    ),
    "cone": Model.of(Block("orange", FULL, (-0.08, 0.08, 0.08), (0.0, 1.0), ((AROUND, "white", panel(0.0, 1.0, 0.35, 0.6)),))),
    "barrier": Model.of(Block("white", FULL, FULL, (0.0, 1.0), (
        (SIDES, "red", np.concatenate([panel(k / 5, (k + 0.5) / 5, 0.0, 1.0) for k in range(5)])),
        (ENDS, "red", panel(0.0, 1.0, 0.5, 1.0)),
    ))),
    "sign": Model.of(
        Block("steel", (-0.1, 0.1, 0.1), (-0.1, 0.1, 0.1), (0.0, 0.4)),
        Block("orange", FULL, FULL, (0.4, 1.0), ((ENDS, "housing", panel(0.15, 0.85, 0.4, 0.6)),)),
    ),
    "crate": Model.of(Block("wood", FULL, FULL, (0.0, 1.0), ((AROUND, "sill", panel(0.0, 1.0, 0.42, 0.5)),))),
    "mast": Model.of(Block("steel", FULL, FULL, (0.0, 1.0))),
    "lamps": Model.of(Block("housing", FULL, FULL, (0.0, 1.0), (
        (("rear",), "red lamp", disc(0.5, 0.82, 0.72, 0.29)),
        (("rear",), "amber lamp", disc(0.5, 0.5, 0.72, 0.29)),
        (("rear",), "green lamp", disc(0.5, 0.18, 0.72, 0.29)),
    ))),
}  # fmt: skip
