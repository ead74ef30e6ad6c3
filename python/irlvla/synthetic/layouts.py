"""What a road family hands to those who populate it: the roads, and where one may drive, walk, cross and park."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from irlvla.synthetic.angles import Array, cosine_sine_of
from irlvla.synthetic.roads import Draft, Line
from irlvla.synthetic.world import Roads
from irlvla.types import Command, Layer


@dataclass(frozen=True)
class Route:
    """A way that the car may be told to go: lanes and connectors in order, and where along it t = 0 may be [m]."""

    lanes: tuple[int, ...]
    command: Command  # near the junction; elsewhere it is STRAIGHT
    earliest: float
    latest: float
    junction: float = np.inf  # where along it the junction begins [m]


@dataclass(frozen=True)
class Crossing:
    """Where people cross a road: from a pose on one side `length` metres straight on."""

    start: Float[np.ndarray, "3"]
    length: float
    lanes: tuple[tuple[int, float, float, float], ...]  # lane crossed, where along it, from and to which metre of the crossing
    walk: Bool[np.ndarray, " STEPS"]  # when people may be on it


@dataclass(frozen=True)
class Layout:
    """One road family, drawn at random."""

    roads: Roads
    lengths: tuple[float, ...]  # of each lane [m]
    ranks: tuple[int, ...]  # of each lane: where lanes cross, the lower one gives way
    opposites: dict[int, int]  # lanes to the left of which another is driven the other way
    routes: tuple[Route, ...]
    pavements: tuple[Line, ...] = ()  # lines that people walk along
    crossings: tuple[Crossing, ...] = ()
    bays: Float[np.ndarray, "N 3"] = field(default_factory=lambda: np.zeros((0, 3)))  # poses of cars that may be parked
    town: bool = True  # people and bicycles are about
    zipper: bool = False  # where lanes join, cars file in by turns, and none has to stop

    @classmethod
    def of(cls, draft: Draft, routes: Sequence[Route], **rest) -> Layout:  # type: ignore[no-untyped-def]
        return cls(draft.roads(), tuple(draft.lengths), tuple(draft.ranks), draft.opposites, tuple(routes), **rest)

    @functools.cached_property
    def is_connector(self) -> tuple[bool, ...]:
        """Of each lane."""
        return tuple(lane.layer == Layer.LANE_CONNECTOR for lane in self.roads.lanes)

    def moved(self, x: float, y: float, turn: float) -> Layout:
        """The same layout, turned about its origin, which then lies at x, y."""
        roads, crossings, signals = self.roads, self.crossings, self.roads.signals
        lanes, blocks, junctions, parks = roads.lanes, roads.roadblocks, roads.intersections, roads.carparks
        arrays = [*(lane.centerline for lane in lanes), *(lane.polygon for lane in lanes), *blocks, *junctions, *parks]
        arrays += [*(points for _, points in roads.paint), *(signal.position[None] for signal in signals)]
        arrays += [*self.pavements, *(crossing.start[None] for crossing in crossings), self.bays]
        moved = iter(_moved(arrays, x, y, turn))
        return dataclasses.replace(
            self,
            roads=Roads(
                lanes=tuple(map(_with_line, lanes, [next(moved) for _ in lanes], [next(moved) for _ in lanes])),
                roadblocks=tuple(next(moved) for _ in blocks),
                intersections=tuple(next(moved) for _ in junctions),
                carparks=tuple(next(moved) for _ in parks),
                paint=tuple((kind, next(moved)) for kind, _ in roads.paint),
                signals=tuple(
                    dataclasses.replace(signal, position=np.append(next(moved)[0, :2], signal.position[2]), heading=signal.heading + turn)
                    for signal in signals
                ),
            ),
            pavements=tuple(next(moved) for _ in self.pavements),
            crossings=tuple(dataclasses.replace(crossing, start=next(moved)[0]) for crossing in crossings),
            bays=next(moved),
        )


def _with_line(lane, centerline: Line, polygon: Array):  # type: ignore[no-untyped-def]
    return dataclasses.replace(lane, centerline=centerline, polygon=polygon)


def _moved(arrays: Sequence[Array], x: float, y: float, turn: float) -> list[Array]:
    """Points and poses (2 or 3 columns), all turned and shifted."""
    points = np.concatenate([array[:, :2] for array in arrays])
    cosine, sine = cosine_sine_of(turn)
    points = np.stack([cosine * points[:, 0] - sine * points[:, 1] + x, sine * points[:, 0] + cosine * points[:, 1] + y], axis=1)
    made, first = [], 0
    for array in arrays:
        part = points[first : first + len(array)]
        made.append(part if array.shape[1] == 2 else np.column_stack([part, array[:, 2] + turn]))
        first += len(array)
    return made
