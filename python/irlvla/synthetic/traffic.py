"""Traffic: vehicles follow lanes by the intelligent driver model, stop at red lights and give way where lanes cross.

Letters: V vehicles (the first is the person's car), N lanes, O obstacles, P presences: what there is to meet in lanes, that is
V vehicles, then those of them that may be in a second lane too, then O obstacles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from irlvla.synthetic.angles import Array
from irlvla.synthetic.conflicts import Conflicts
from irlvla.synthetic.layouts import Layout
from irlvla.synthetic.paths import EASE, GRID, Path
from irlvla.synthetic.world import STEP, STEPS
from irlvla.types import Kind

Mask = Bool[np.ndarray, " STEPS"]

BRAKING, HARDEST = 2.0, 8.0  # comfortable and greatest deceleration [m/s^2]
PULL = {Kind.VEHICLE: 1.5, Kind.BICYCLE: 0.8}  # greatest acceleration [m/s^2]
BLEND = 2.0 * math.sqrt(PULL[Kind.VEHICLE] * BRAKING)  # of the intelligent driver model
FIRM = 3.0  # who would have to brake harder than this does not stop for amber [m/s^2]
SOON = 3.6  # time from when people are seen to come until they are in the way [s]
HORIZON = 150.0  # what is further ahead does not matter [m]
COMFORT = 2.4  # sideways, in bends [m/s^2]
IN_LANE = 0.2, 0.85  # of a change of lane: who has come so far is in the new lane; no longer in the old one
OUT_OF_LANE = 0.8  # the person counts as in the next lane, when so far beside his route [m]


@dataclass
class Change:
    """Coming into the lane of a path, from a place on."""

    start: float  # place
    length: float  # [m]
    width: float  # it comes from so far to the left [m]
    side: int  # of the lane that it comes from: 1 left, -1 right, 0 from no lane

    def at(self, place: Array) -> tuple[Array, Array]:
        """Metres to the left of the path, and their change per metre driven."""
        share = np.clip((place - self.start) / self.length, 0.0, 1.0)
        return self.width * (1.0 - share * share * (3.0 - 2.0 * share)), (6.0 * self.width / self.length) * share * (share - 1.0)


@dataclass
class Mover:
    """A vehicle or bicycle that follows lanes."""

    path: Path
    place: float  # at the first step
    size: tuple[float, float, float]
    kind: Kind = Kind.VEHICLE
    role: str = ""
    speed: float | None = None  # at the first step; None = what road and traffic allow
    factor: float = 1.0  # of the speed limit
    comfort: float = COMFORT
    pace: Array | None = None  # the most at each `GRID` of its path, beside the limit [m/s]
    headway: float = 1.3  # [s]
    min_gap: float = 2.0  # to what stands ahead [m]
    delay: float = 0.0  # of its driver, which he allows for [s]
    left: float = 0.0  # beside its path [m]
    script: Array | None = None  # the most acceleration at each step [m/s^2]
    lawless: bool = False  # does not stop at red lights, nor give way
    change: Change | None = None  # of lane


@dataclass
class Obstacle:
    """Something in a lane for which vehicles stop: a red light, people, a car that stands."""

    lane: int
    along: float
    half: float  # of its length
    when: Mask
    light: bool = False
    patient: bool = False  # it is seen to come: who cannot stop in time goes first
    stands: bool = False  # the person may drive round it
    passed: bool = False  # and does


class Person(Protocol):
    """Who drives the first vehicle."""

    left: float  # of the route [m]

    def start(self, place: float, speed: float) -> None: ...

    def drive(self, wanted: float) -> tuple[float, float]:
        """One step: from the acceleration that would be right to place and speed."""
        ...


class Traffic:
    """Everybody who drives, and what is in the way."""

    def __init__(self, layout: Layout, movers: list[Mover], obstacles: list[Obstacle]) -> None:
        self.layout, self.movers, self.obstacles = layout, movers, obstacles
        self.half = np.array([0.5 * mover.size[0] for mover in movers])
        self.headway = np.array([mover.headway for mover in movers])
        self.min_gap = np.array([mover.min_gap for mover in movers])
        self.delay = np.array([mover.delay for mover in movers])
        self.pull = np.array([PULL[mover.kind] for mover in movers])
        self._tabulate_paths()
        self._list_presences()
        self._link_lanes()
        lawless = np.array([mover.lawless for mover in movers])
        self.conflicts = Conflicts.between(layout, [mover.path for mover in movers], lawless)

    def _tabulate_paths(self) -> None:
        """The lanes of each path "V ...", where they begin, where each lane begins on it "V N+1", and its speeds "V places"."""
        movers, nowhere = self.movers, len(self.layout.roads.lanes)
        shape = len(movers), max(len(mover.path.lanes) for mover in movers)
        self.path_lanes, self.path_begins = np.full(shape, nowhere), np.full(shape, np.inf)
        self.begins = np.full((len(movers), nowhere + 1), -np.inf)
        tables = [mover.path.speeds(self.layout, mover.factor, mover.comfort, mover.pace) for mover in movers]
        self.speeds = np.zeros((len(movers), max(map(len, tables))))
        for i, (mover, table) in enumerate(zip(movers, tables, strict=True)):
            lanes, begins = mover.path.lanes, mover.path.begins
            self.path_lanes[i, : len(lanes)] = lanes
            self.path_begins[i, : len(lanes)] = begins
            self.begins[i, list(lanes)] = begins
            self.speeds[i, : len(table)] = table
            self.speeds[i, len(table) :] = table[-1]

    def _list_presences(self) -> None:
        movers, obstacles = self.movers, [item for item in self.obstacles if (self.begins[:, item.lane] >= 0.0).any()]
        changes = [(i, mover.change) for i, mover in enumerate(movers) if mover.change is not None]
        self.second = np.array([0, *(i for i, _ in changes)])
        self.side = np.array([0, *(change.side for _, change in changes)])
        self.change = np.array([(change.start, change.length) for _, change in changes]).reshape(-1, 2)
        always = np.ones((STEPS, len(movers) + len(self.second)), dtype=bool)
        self.seen = np.column_stack([always, *(item.when for item in obstacles)])  # "STEPS P"
        self.presence_half = np.concatenate([self.half, self.half[self.second], [item.half for item in obstacles]])
        vehicles = len(movers) + len(self.second)
        self.places = np.empty((len(movers), vehicles + len(obstacles)))  # of each presence on each path; -inf if it is not there
        lanes = np.array([item.lane for item in obstacles], dtype=np.int64)
        self.places[:, vehicles:] = self.begins[:, lanes] + np.array([item.along for item in obstacles])
        self.light, self.patient, passed = (
            np.array([False] * vehicles + [getattr(item, name) for item in obstacles]) for name in ("light", "patient", "passed")
        )
        owner = np.concatenate([np.arange(len(movers)), self.second, np.full(len(obstacles), -1)])
        lawless = np.array([mover.lawless for mover in movers])
        self.heeds = (owner != np.arange(len(movers))[:, None]) & ~(lawless[:, None] & self.light)  # "V P"
        self.heeds[0] &= ~passed
        self.dismissed = np.zeros(self.heeds.shape, dtype=bool)

    def _link_lanes(self) -> None:
        """The lane to the left (row 1) and to the right (row -1) of each lane "3 N+1", and whether it is driven the other way."""
        layout, nowhere = self.layout, len(self.layout.roads.lanes)
        self.beside = np.full((3, nowhere + 1), nowhere)
        self.oncoming = np.zeros((3, nowhere + 1), dtype=bool)
        for i, lane in enumerate(layout.roads.lanes):
            self.beside[1, i] = layout.opposites.get(i, nowhere) if lane.left is None else lane.left
            self.beside[-1, i] = nowhere if lane.right is None else lane.right
        self.oncoming[1, list(layout.opposites)] = True
        self.lane_length = np.array([*layout.lengths, 0.0])

    # -- what each one sees --------------------------------------------------------------------------------------------

    def _lanes_at(self, place: Array) -> tuple[Int[np.ndarray, " V"], Float[np.ndarray, " V"]]:
        """The lane of each vehicle, and how far along it."""
        index = (self.path_begins <= place[:, None]).sum(axis=1) - 1
        rows = np.arange(len(place))
        return self.path_lanes[rows, index], place - self.path_begins[rows, index]

    def gaps(self, step: int, place: Array, speed: Array) -> tuple[Float[np.ndarray, "V P"], Float[np.ndarray, " P"]]:
        """From the front of each vehicle to what is ahead on its path (inf if it is not); and the speed of that."""
        lane, along = self._lanes_at(place)
        own, own_along = lane[self.second], along[self.second]
        oncoming = self.oncoming[self.side, own]
        beside = self.beside[self.side, own]
        second_along = np.where(oncoming, self.lane_length[own] - own_along, own_along)
        count, vehicles = len(place), len(place) + len(own)
        self.places[:, :vehicles] = self.begins[:, np.concatenate([lane, beside])] + np.concatenate([along, second_along])
        ahead = self.places - place[:, None]
        seen = self._seen(step, place)
        for k, i in enumerate(self.second.tolist()):  # who is in two lanes follows those in both
            if seen[count + k] and not oncoming[k]:
                ahead[i, :count] = np.where(lane == beside[k], along - second_along[k], ahead[i, :count])
        gap = ahead - self.presence_half - self.half[:, None]
        speeds = np.zeros(gap.shape[1])
        speeds[:count], speeds[count:vehicles] = speed, np.where(oncoming, 0.0, speed[self.second])
        return np.where((ahead > 0.0) & self.heeds & seen, gap, np.inf), speeds

    def _seen(self, step: int, place: Array) -> Bool[np.ndarray, " P"]:
        """Which presences there are: who changes lanes leaves one and comes into the other."""
        count, vehicles = len(self.movers), len(self.movers) + len(self.second)
        seen = self.seen[step]
        share = (place[self.second[1:]] - self.change[:, 0]) / self.change[:, 1]
        seen[self.second[1:]], seen[count + 1 : vehicles] = share > IN_LANE[0], share < IN_LANE[1]
        seen[count] = self.side[0] != 0
        return seen

    def _dismiss(self, step: int, gap: Array, speed: Array) -> None:
        """Who cannot stop at ease for what now comes up passes it: an amber light, people if he is gone before they come."""
        new = self.patient & self.seen[step]
        new = np.flatnonzero(new & ~self.seen[step - 1] if step else new)
        if len(new):
            late = gap[:, new] < (speed * (self.delay + speed / (2.0 * FIRM)))[:, None]
            gone = gap[:, new] + 2.0 * (self.half[:, None] + self.presence_half[new]) < (SOON * speed)[:, None]
            self.dismissed[:, new] = late & (gone | self.light[new])

    # -- what each one does --------------------------------------------------------------------------------------------

    def accelerations(self, step: int, place: Array, speed: Array) -> Float[np.ndarray, " V"]:
        """What the intelligent driver model and the rules of the road want of each vehicle [m/s^2]."""
        gap, speeds = self.gaps(step, place, speed)
        self._dismiss(step, gap, speed)
        gap[self.dismissed] = np.inf
        rows, columns = np.nonzero(gap < HORIZON)
        met, its_gap, its_speed = self.conflicts.gaps(place, speed, self.half, self._stopping(gap))
        share = speed / self._targets(place)
        share *= share
        wanted = np.maximum(self.pull * (1.0 - share * share), -FIRM)
        rows, gap = np.concatenate([rows, met]), np.concatenate([gap[rows, columns], its_gap])
        following = self._following(rows, speed[rows], np.concatenate([speeds[columns], its_speed]), gap, wanted[rows])
        np.minimum.at(wanted, rows, following)
        return np.maximum(wanted, -HARDEST)

    def _targets(self, place: Array) -> Array:
        index = np.minimum((place / GRID).astype(np.int64), self.speeds.shape[1] - 1)
        return self.speeds[np.arange(len(place)), index]

    def _following(self, rows: np.ndarray, speed: Array, other: Array, gap: Array, free: Array) -> Array:
        """Accelerations of vehicles behind something: those of the model, but not much below what avoids a collision."""
        closing = speed - other
        desired = self.min_gap[rows] + np.maximum(speed * (self.headway[rows] + closing / BLEND), 0.0)
        ratio = desired / np.maximum(gap, 0.1)
        closing = np.maximum(closing, 0.0)
        needed = closing * closing / (2.0 * np.maximum(gap - 1.0 - 0.5 * closing * self.delay[rows], 0.3))
        return np.maximum(free - self.pull[rows] * (ratio * ratio), -np.maximum(1.15 * needed + 0.3, EASE))

    def first_speeds(self, place: Array) -> Float[np.ndarray, " V"]:
        """Speeds at the first step that fit to the road and to what is ahead."""
        given = np.array([np.nan if mover.speed is None else mover.speed for mover in self.movers])
        speed = np.where(np.isnan(given), 0.95 * self._targets(place), given)
        vehicles = len(place) + len(self.second)
        for _ in range(4):  # queues are short
            gap, speeds = self.gaps(0, place, speed)
            room = np.maximum(gap - self.min_gap[:, None], 0.0)
            allowed = np.sqrt(speeds * speeds + 2.0 * EASE * room)
            allowed[:, :vehicles] = np.minimum(allowed[:, :vehicles], room[:, :vehicles] / (0.8 * self.headway[:, None]))
            slow = np.minimum(speed, allowed.min(axis=1))
            rows, gap, its_speed = self.conflicts.gaps(place, slow, self.half, self._stopping(gap))
            np.minimum.at(slow, rows, np.sqrt(its_speed * its_speed + 2.0 * EASE * np.maximum(gap - self.min_gap[rows], 0.0)))
            speed = np.where(np.isnan(given), slow, given)
        return speed

    def _stopping(self, gap: Float[np.ndarray, "V P"]) -> Bool[np.ndarray, " V"]:
        """Who stops at a light."""
        return np.asarray((self.light & (gap < HORIZON)).any(axis=1))


def simulate(traffic: Traffic, person: Person) -> Float[np.ndarray, "STEPS V"]:
    """Places of all vehicles, the first one driven by the person."""
    count = len(traffic.movers)
    place = np.array([mover.place for mover in traffic.movers])
    speed = traffic.first_speeds(place)
    script = np.stack([np.full(STEPS, np.inf) if mover.script is None else mover.script for mover in traffic.movers], axis=1)
    places = np.empty((STEPS, count))
    person.start(float(place[0]), float(speed[0]))
    for step in range(STEPS):
        places[step] = place
        traffic.side[0] = (person.left > OUT_OF_LANE) - (person.left < -OUT_OF_LANE)
        wanted = np.minimum(traffic.accelerations(step, place, speed), script[step])
        after = np.maximum(speed + STEP * wanted, 0.0)
        place, speed = place + (0.5 * STEP) * (speed + after), after
        place[0], speed[0] = person.drive(float(wanted[0]))
    return places
