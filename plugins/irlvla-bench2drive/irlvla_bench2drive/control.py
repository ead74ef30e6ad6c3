"""From a plan to the pedals and the wheel, by two PID controllers, with the gains that the public agents of Bench2Drive drive with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from irlvla_bench2drive import geometry
from irlvla_bench2drive.geometry import Array

AIM = 4.0  #: how far along the plan the car aims [m]
SHORT = 0.5  #: a plan that goes no further says nothing about the direction [m]
SPEED_OVER = 1.0  #: the wanted speed is that of the plan's first second
STAND = 0.4  #: slower plans mean to stand [m/s]
TOO_FAST = 1.1  #: times the wanted speed: the car brakes
PUSH, THROTTLE = 0.25, 0.75  #: largest error of the speed that is looked at [m/s], and largest throttle


@dataclass(frozen=True)
class Control:
    """CARLA's: throttle and brake in [0, 1], steer in [-1, 1], to the right."""

    throttle: float
    steer: float
    brake: float


class Pid:
    """A PID controller whose integral is the mean of the last errors."""

    def __init__(self, proportional: float, integral: float, derivative: float, steps: int) -> None:
        self.gains = proportional, integral, derivative
        self.errors = deque([0.0] * steps, maxlen=steps)

    def step(self, error: float) -> float:
        before = self.errors[-1]
        self.errors.append(error)
        proportional, integral, derivative = self.gains
        return proportional * error + integral * float(np.mean(self.errors)) + derivative * (error - before)


class Follower:
    """Follows plans, one at each step of the simulation."""

    def __init__(self) -> None:
        self._turning = Pid(0.75, 0.75, 0.3, 40)
        self._pushing = Pid(5.0, 0.5, 1.0, 40)
        self._angle = 0.0

    def step(self, poses: Array, dt: float, speed: float) -> Control:
        """What to do now about a plan "T 3" in the ego frame, with poses every `dt` seconds, at a speed [m/s]."""
        path = np.concatenate([np.zeros((1, 2)), poses[:, :2]])
        along = np.concatenate([[0.0], np.hypot(*np.diff(path, axis=0).T).cumsum()])
        if along[-1] > SHORT:
            x, y = (float(np.interp(AIM, along, axis)) for axis in path.T)
            self._angle = math.atan2(y, x) / (math.pi / 2.0)
        left = float(np.clip(self._turning.step(self._angle), -1.0, 1.0))
        seconds = min(SPEED_OVER, dt * len(poses))
        wanted = float(np.interp(seconds, dt * np.arange(len(path)), along)) / seconds
        brake = wanted < STAND or speed > TOO_FAST * wanted
        throttle = float(np.clip(self._pushing.step(float(np.clip(wanted - speed, 0.0, PUSH))), 0.0, THROTTLE))
        return Control(0.0 if brake else throttle, geometry.steer(left), float(brake))
