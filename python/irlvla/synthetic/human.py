"""The person at the wheel: competent, imperfect. Steers along the line he has in mind, with delays, a lag and a wandering aim."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from irlvla.synthetic.angles import Array, angle_of, between, cosine_sine, cosine_sine_of, wrap
from irlvla.synthetic.paths import GRID, Path
from irlvla.synthetic.roads import beside
from irlvla.synthetic.world import STEP, STEPS
from irlvla.types import REAR_AXLE_TO_CENTRE, WHEEL_BASE, StateIndex

CARELESS = 0.08  # share of people who drive close and wander
LAG = 0.45  # of the way to the wanted curvature that the wheel turns in a step
LEAD = 0.25  # he turns it so much ahead of a bend [s]
SHARPEST = 0.2  # curvature [1/m]
RETURN, SHORTEST = 0.7, 3.5  # a deviation is undone within some such lengths [s], [m]
JERK, BRAKE_JERK, HARD_JERK = 2.0, 3.5, 12.0  # of the foot: on the pedal, on the brake, when it must be [m/s^3]
HARD = -4.0  # [m/s^2]


@dataclass(frozen=True)
class Character:
    """How somebody drives."""

    factor: float  # of the speed limit
    comfort: float  # sideways, in bends [m/s^2]
    headway: float  # [s]
    min_gap: float  # to what stands ahead [m]
    delay: int  # steps between seeing and acting
    wander: float  # amplitude of the wandering of the aim, of the room on either side of the car
    bias: float  # of that room: so far to the left of the middle of the lane

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Character:
        careless = rng.random() < CARELESS
        return cls(
            factor=between(rng, 0.96, 1.06),
            comfort=between(rng, 1.6, 2.2),
            headway=between(rng, 1.0, 1.5) * (0.75 if careless else 1.0),
            min_gap=between(rng, 2.5, 3.5),
            delay=int(rng.integers(2, 5)),
            wander=between(rng, 0.03, 0.15) + (between(rng, 0.2, 0.7) if careless else 0.0),
            bias=between(rng, -0.2, 0.2),
        )


class Driver:
    """Drives a kinematic bicycle along a route, step by step."""

    left = 0.0  # of the route, where the rear axle is [m]

    def __init__(self, rng: np.random.Generator, character: Character, path: Path, aside: Array, room: float) -> None:
        """`aside` is where to be at each `GRID` of the route, to the left of it; `room` is left on either side of the car [m]."""
        aside = aside + room * character.bias
        xy = beside(path.poses(GRID * np.arange(len(aside), dtype=np.float64)), aside)[:, :2]
        xy[2:-2] = (xy[:-4] + xy[1:-3] + xy[2:-2] + xy[3:-1] + xy[4:]) * 0.2  # nobody turns the wheel at once
        step = np.diff(xy, axis=0)
        heading = angle_of(step[:, 0], step[:, 1])
        heading[1:] = heading[0] + np.cumsum(wrap(np.diff(heading)))  # of each piece
        middle = np.concatenate([heading[:1], 0.5 * (heading[1:] + heading[:-1]), heading[-1:]])  # at each point
        bend = np.diff(heading, prepend=heading[0], append=heading[-1]) / GRID
        bend[1:-1] = (bend[:-2] + bend[1:-1] + bend[2:]) * (1.0 / 3.0)
        cosine, sine = cosine_sine(middle)
        self._line = list(zip(xy[:, 0].tolist(), xy[:, 1].tolist(), middle.tolist(), cosine.tolist(), sine.tolist(), strict=True))
        self._bend, self._aside = bend.tolist(), aside.tolist()
        phase, period = between(rng, 0.0, 6.28, 2), between(rng, 3.0, 9.0, 2)
        time = np.arange(STEPS)[:, None] * STEP
        self._wander = (0.5 * room * character.wander * cosine_sine(phase + time * (6.28 / period))[0]).sum(axis=1).tolist()
        self._wishes: deque[float] = deque(maxlen=character.delay + 1)
        self._rows: list[tuple[float, ...]] = []

    def start(self, place: float, speed: float) -> None:
        """Set off with the centre of the car at a place of the route."""
        self._place = place - REAR_AXLE_TO_CENTRE
        index = int(self._place / GRID)
        x, y, heading, cosine, sine = self._line[index]
        ahead = self._place - index * GRID
        self._state = x + ahead * cosine, y + ahead * sine, heading, speed, 0.0, self._bend[index]

    def drive(self, wanted: float) -> tuple[float, float]:
        """One step. Takes the acceleration that would be right now; returns the place of the car's centre and its speed."""
        self._rows.append(self._state)
        x, y, heading, speed, acceleration, curvature = self._state
        acceleration = self._pedal(wanted, speed, acceleration)
        after = max(speed + acceleration * STEP, 0.0)
        steered = curvature + LAG * (self._wheel(x, y, heading, speed) - curvature)
        driven, turn = 0.5 * (speed + after) * STEP, 0.25 * (speed + after) * (curvature + steered) * STEP
        cosine, sine = cosine_sine_of(heading + 0.5 * turn)
        self._state = x + driven * cosine, y + driven * sine, heading + turn, after, acceleration, steered
        return self._place + driven + REAR_AXLE_TO_CENTRE, after

    def _pedal(self, wanted: float, speed: float, acceleration: float) -> float:
        """The acceleration that follows, late and not at once, when another one is wanted."""
        self._wishes.append(wanted)
        wish = self._wishes[0]
        down = HARD_JERK if wish < HARD else BRAKE_JERK
        up = JERK if wish > -1.0 else down
        acceleration += min(max(wish - acceleration, -down * STEP), up * STEP)
        return max(acceleration, -speed / STEP)

    def _wheel(self, x: float, y: float, heading: float, speed: float) -> float:
        """The curvature of the line in mind, corrected for where the car is and where it points."""
        index = min(int((self._place + speed * STEP * (len(self._rows) > 1)) / GRID), len(self._line) - 2)
        px, py, direction, cosine, sine = self._line[index]
        dx, dy = x - px, y - py
        ahead, off = dx * cosine + dy * sine, dy * cosine - dx * sine
        self._place = index * GRID + ahead
        bend = self._bend[index]
        off -= 0.5 * bend * ahead * ahead  # the line turns between its points
        self.left = self._aside[index] + off
        lead = min(int((self._place + LEAD * speed) / GRID + 0.5), len(self._bend) - 1)
        length = max(RETURN * speed, SHORTEST)
        error = heading - direction - bend * ahead
        wanted = self._bend[lead] - (off - self._wander[len(self._rows) - 1]) / (length * length) - 1.8 * error / length
        return min(max(wanted, -SHARPEST), SHARPEST)

    def states(self) -> Float[np.ndarray, "STEPS 11"]:
        """The whole drive, columns of StateIndex."""
        x, y, heading, speed, acceleration, curvature = np.array(self._rows).T
        states = np.zeros((STEPS, len(StateIndex)))
        steering = angle_of(np.ones(STEPS), WHEEL_BASE * curvature)
        turning = speed * curvature
        states[:, StateIndex.X], states[:, StateIndex.Y], states[:, StateIndex.HEADING] = x, y, heading
        states[:, StateIndex.VX], states[:, StateIndex.AX], states[:, StateIndex.AY] = speed, acceleration, speed * turning
        states[:, StateIndex.STEERING], states[:, StateIndex.ANGULAR_VELOCITY] = steering, turning
        states[1:, StateIndex.STEERING_RATE] = np.diff(steering) / STEP
        states[1:, StateIndex.ANGULAR_ACCELERATION] = np.diff(turning) / STEP
        return states
