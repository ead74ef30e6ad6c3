"""Where the car is, where it was, and where it is told to go, from what the leaderboard's sensors say."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from irlvla import Command
from irlvla_bench2drive import geometry
from irlvla_bench2drive.geometry import Array, Projection

TRUST = 0.05  #: in one GNSS fix (off by 0.5 m, 20 times a second), against what the wheels say
STANDING = 0.5  #: slower, the steering cannot be told from the drive [m/s]
AHEAD = 20.0  #: how far commands look along the route, as NAVSIM's [m]
WINDOW = 50.0  #: how far ahead of its last place on the route the car may be found [m]

COMMANDS = {
    "LEFT": Command.LEFT,
    "CHANGELANELEFT": Command.LEFT,
    "RIGHT": Command.RIGHT,
    "CHANGELANERIGHT": Command.RIGHT,
    "STRAIGHT": Command.STRAIGHT,
    "LANEFOLLOW": Command.STRAIGHT,
    "VOID": Command.UNKNOWN,
}
"""What the RoadOptions of CARLA's routes are to a policy. Left and right are turns and lane changes, as in NAVSIM."""


class Route:
    """The way to go: a line through nodes, of which each says what the car does from there on."""

    def __init__(self, nodes: Array, options: Sequence[str]) -> None:
        """Nodes "N 2" in the plane, and a RoadOption of each."""
        self.nodes, self.commands = nodes, [COMMANDS[option] for option in options]
        self.along = np.concatenate([[0.0], np.hypot(*np.diff(nodes, axis=0).T).cumsum()])  # of each node [m]
        self.progress = 0.0

    @property
    def heading(self) -> float:
        """Where it leads at first."""
        moved = self.nodes[np.searchsorted(self.along, 0.1).clip(max=len(self.nodes) - 1)] - self.nodes[0]
        return math.atan2(moved[1], moved[0])

    def command(self, place: Array) -> Command:
        """For a car at a place in the plane: the first turn or lane change on the next metres, else straight on.

        Places are followed in time: the car does not go back on its route, and does not skip where the route crosses itself.
        """
        self._follow(place)
        first = int(np.searchsorted(self.along, self.progress, side="right")) - 1
        last = int(np.searchsorted(self.along, self.progress + AHEAD, side="left"))
        coming = self.commands[max(first, 0) : max(last, first + 1)]
        turns = [command for command in coming if command in (Command.LEFT, Command.RIGHT)]
        if turns:
            return turns[0]
        return Command.STRAIGHT if Command.STRAIGHT in coming else Command.UNKNOWN

    def _follow(self, place: Array) -> None:
        starts, steps, lengths = self.nodes[:-1], np.diff(self.nodes, axis=0), np.diff(self.along)
        share = ((place - starts) * steps).sum(axis=1) / np.maximum(lengths**2, 1e-9)
        along = np.clip(self.along[:-1] + share.clip(0.0, 1.0) * lengths, self.progress, self.progress + WINDOW)
        share = (along - self.along[:-1]) / np.maximum(lengths, 1e-9)
        near = np.flatnonzero((share >= 0.0) & (share <= 1.0))
        if len(near):
            distance = np.hypot(*(starts[near] + share[near, None] * steps[near] - place).T)
            self.progress = float(along[near[distance.argmin()]])


class Odometer:
    """What the car did: dead reckoning by speed and compass, and by how much the map is shifted from it, a slow mean of GNSS."""

    def __init__(self, projection: Projection, heading: float) -> None:
        """The heading is what is taken while the compass says nothing."""
        self._projection = projection
        self._states: deque[tuple[float, Array]] = deque()  # time, and columns of irlvla.StateIndex up to steering
        self._heading = heading
        self._shift: Array | None = None

    def update(self, time: float, gps: Array, imu: Array, speed: float, keep: float) -> None:
        """One step: seconds, (latitude, longitude, height), IMU "7", speed [m/s]. States older than `keep` seconds are forgotten."""
        compass = float(imu[6])
        if math.isfinite(compass):  # it is NaN in the first frames
            self._heading += math.remainder(geometry.heading(compass) - self._heading, math.tau)
        forward, left = geometry.acceleration(imu)
        turning = geometry.yaw_rate(imu)
        steering = math.atan2(geometry.WHEEL_BASE * turning, speed) if speed > STANDING else 0.0
        state = np.array([*self._moved(time, speed), self._heading, speed, 0.0, forward, left, steering])
        self._states.append((time, np.nan_to_num(state)))
        while self._states[0][0] < time - keep:
            self._states.popleft()
        shift = self._projection(gps[None, :2])[0] - state[:2]
        self._shift = shift if self._shift is None else self._shift + TRUST * (shift - self._shift)

    def _moved(self, time: float, speed: float) -> Array:
        """Where the car is by dead reckoning."""
        if not self._states:
            return np.zeros(2)
        before, state = self._states[-1]
        distance = (time - before) * (speed + state[3]) / 2.0
        along = (self._heading + state[2]) / 2.0
        return state[:2] + distance * np.array([math.cos(along), math.sin(along)])

    @property
    def place(self) -> Array:
        """Of the rear axle, in the plane."""
        assert self._shift is not None
        return self._states[-1][1][:2] + self._shift

    def history(self, frames: int, interval: float) -> Array:
        """States "H 8" as in `Observation.ego`: oldest first, the last now, poses in the ego frame. Before the first, the car was there."""
        times, states = np.array([time for time, _ in self._states]), np.array([state for _, state in self._states])
        wanted = times[-1] - interval * np.arange(frames - 1, -1, -1)
        found = np.column_stack([np.interp(wanted, times, column) for column in states.T])
        x, y, turn = found[-1, :3]
        dx, dy = (found[:, :2] - (x, y)).T
        found[:, 0], found[:, 1] = math.cos(turn) * dx + math.sin(turn) * dy, math.cos(turn) * dy - math.sin(turn) * dx
        found[:, 2] -= turn
        return found
