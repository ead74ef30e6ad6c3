"""What a road family hands to those who populate it: the roads, and where one may drive, walk, cross and park."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from irlvla.synthetic.roads import Draft, Line
from irlvla.synthetic.world import Roads
from irlvla.types import Command


@dataclass(frozen=True)
class Route:
    """A way that the car may be told to go: lanes and connectors in order, and where along it t = 0 may be [m]."""

    lanes: tuple[int, ...]
    command: Command  # that it gets when it is near the junction; STRAIGHT elsewhere
    earliest: float
    latest: float
    junction: float = np.inf  # where along it the junction begins [m]


@dataclass(frozen=True)
class Crossing:
    """Where people cross a road, from a pose on one side, `length` metres straight on."""

    start: tuple[float, float, float]
    length: float
    lanes: tuple[tuple[int, float, float, float], ...]  # lane crossed, where along it, from and to which metre of the crossing
    walk: Bool[np.ndarray, " STEPS"]  # when people may step on to it


@dataclass(frozen=True)
class Layout:
    """One road family, drawn at random."""

    roads: Roads
    ranks: tuple[int, ...]  # of each lane: where lanes cross, the lower one gives way
    routes: tuple[Route, ...]
    pavements: tuple[Line, ...] = ()
    crossings: tuple[Crossing, ...] = ()
    bays: Float[np.ndarray, "N 3"] = np.zeros((0, 3))  # poses of cars that may be parked
    town: bool = True  # people and bicycles are about
    zipper: bool = False  # where lanes join, cars file in by turns, none has to stop

    @classmethod
    def of(cls, draft: Draft, routes: list[Route], **rest) -> Layout:  # type: ignore[no-untyped-def]
        return cls(draft.roads(), tuple(draft.ranks), tuple(routes), **rest)
