"""What the embedded world is made of: roads, signals, actors and the car that a person drives, over 7 seconds.

One flat world frame per scene: metres, x east, y north, headings counter-clockwise, z up from the road. Time runs on a grid
of 0.1 s from -2.0 s to 5.0 s; t = 0 is the moment at which a policy is asked to plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from jaxtyping import Bool, Float

from irlvla.types import Kind, Layer

STEP = 0.1  #: seconds
PAST, FUTURE = 20, 50  #: steps before and after t = 0
STEPS = PAST + 1 + FUTURE


class Paint(Enum):
    """What is painted on the road."""

    EDGE = "edge"  # solid white, at the edge of the road
    DASHED = "dashed"  # white, between lanes of one direction
    SOLID = "solid"  # white, between lanes of one direction where changing is forbidden
    CENTRE = "centre"  # double yellow, between directions
    STOP = "stop"  # stop line, white, broad
    CROSSING = "crossing"  # zebra; points = the outline of the crossing, ring of 4, stripes along the first edge
    BAY = "bay"  # parking bay, white
    ARROW = "arrow"  # turn arrow; points = its outline


@dataclass(frozen=True)
class Lane:
    """A lane, or a connector through a junction. Indices refer to `Roads`."""

    centerline: Float[np.ndarray, "L 3"]  # x y heading, in driving direction, at most 1 m apart
    polygon: Float[np.ndarray, "V 2"]  # open ring
    layer: Layer  # LANE or LANE_CONNECTOR
    width: float
    speed_limit: float  # [m/s]
    roadblock: int  # the group of parallel lanes of one direction, or of connectors of one turn, that it belongs to
    successors: tuple[int, ...] = ()
    predecessors: tuple[int, ...] = ()
    left: int | None = None  # neighbour of the same direction
    right: int | None = None
    signal: int | None = None  # the signal that governs a connector


@dataclass(frozen=True)
class Signal:
    """A traffic light: its lamp box is seen by drivers who come along `heading`."""

    position: Float[np.ndarray, "3"]  # of the lamp box [m]
    heading: float  # driving direction of those it governs
    red: Bool[np.ndarray, " STEPS"]  # neither red nor amber = green
    amber: Bool[np.ndarray, " STEPS"] = field(default_factory=lambda: np.zeros(STEPS, dtype=bool))  # before it turns red


@dataclass(frozen=True)
class Roads:
    """The static world."""

    lanes: tuple[Lane, ...]
    roadblocks: tuple[Float[np.ndarray, "V 2"], ...]
    intersections: tuple[Float[np.ndarray, "V 2"], ...]
    carparks: tuple[Float[np.ndarray, "V 2"], ...]
    paint: tuple[tuple[Paint, Float[np.ndarray, "M 2"]], ...]
    signals: tuple[Signal, ...]


@dataclass(frozen=True)
class Actor:
    """Anything that can be hit. Static things keep one state."""

    name: str
    kind: Kind
    size: tuple[float, float, float]  # length, width, height [m]
    state: Float[np.ndarray, "STEPS 5"]  # box centre x y, heading, vx vy (world frame)
    valid: Bool[np.ndarray, " STEPS"]
    role: str = ""  # "cut-in", "jaywalker", ... of scripted cases; "" otherwise


@dataclass(frozen=True)
class World:
    """One scene of the embedded world, with all that its cameras can see."""

    token: str
    family: str  # of roads: "straight", "curve", "merge", ...
    case: str  # scripted hard case, or ""
    seed: int
    roads: Roads
    actors: tuple[Actor, ...]
    ego: Float[np.ndarray, "STEPS 11"]  # the person's drive: columns of StateIndex, rear axle
    route: tuple[int, ...]  # lanes and connectors, in order, that lead where the car is told to go
    command: int  # Command
