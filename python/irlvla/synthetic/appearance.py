"""What pictures of the embedded world are made of: flat shapes in space, and the light on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from irlvla.synthetic.angles import Array, cosine_sine_of

Colour = tuple[int, int, int]  # red, green, blue in 0 ... 255


@dataclass(frozen=True)
class Shapes:
    """Flat shapes in the ego frame, each a set of rings of one colour, in the order in which they are painted."""

    points: Float[np.ndarray, "P 3"]
    ring_offsets: Int[np.ndarray, " R+1"]
    shape_offsets: Int[np.ndarray, " S+1"]
    colours: Float[np.ndarray, "S 4"]  # and opacity in 0 ... 1

    @classmethod
    def cat(cls, shapes: Iterable[Shapes]) -> Shapes:
        """One after the other."""
        shapes = list(shapes)
        rings, sets = ([getattr(s, name) for s in shapes] for name in ("ring_offsets", "shape_offsets"))
        points, colours = (np.concatenate([getattr(s, name) for s in shapes]) for name in ("points", "colours"))
        return cls(points, joined_offsets(rings), joined_offsets(sets), colours)


def joined_offsets(parts: list[Int[np.ndarray, " N+1"]]) -> Int[np.ndarray, " M+1"]:
    """Offsets of packed rows that follow each other."""
    return np.cumsum(np.concatenate([[0], *(np.diff(part) for part in parts)]))


@dataclass(frozen=True)
class Daylight:
    """Sun, sky and haze."""

    sun: Float[np.ndarray, "3"]  # direction to it, ego frame
    strength: float  # 0 = overcast, 1 = bright sun
    zenith: Float[np.ndarray, "3"]  # colour of the sky
    horizon: Float[np.ndarray, "3"]  # colour of the sky there, and of haze
    visibility: float  # distance at which haze is half of what is seen [m]

    def haze(self, distance: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """The share of haze in what is seen at a distance."""
        square = distance / self.visibility * (distance / self.visibility)
        return square / (1.0 + square)

    def brightness(self, normals: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, " N"]:
        """How bright surfaces are that face some directions."""
        towards = normals[:, 0] * self.sun[0] + normals[:, 1] * self.sun[1] + normals[:, 2] * self.sun[2]
        return 0.8 + 0.12 * normals[:, 2] + (0.1 + 0.18 * self.strength) * towards

    @classmethod
    def of(cls, seed: int, heading: float) -> Daylight:
        """The light of a world, as seen by a car of some heading."""
        azimuth, height, strength, warmth, clear = np.random.default_rng([seed, 0xDA4]).random(5)
        cosine, sine = cosine_sine_of(azimuth * 2.0 * math.pi - heading)
        slope = 0.5 + height
        strength = max(0.0, 1.5 * strength - 0.5)
        zenith = strength * np.array([88.0, 138.0, 200.0]) + (1.0 - strength) * np.array([160.0, 168.0, 178.0])
        horizon = np.array([208.0, 219.0, 228.0]) + warmth * strength * np.array([16.0, 2.0, -18.0])
        return cls(np.array([cosine, sine, slope]) / math.sqrt(1.0 + slope * slope), strength, zenith, horizon, 180.0 + 220.0 * clear)


def to_ego(points: Float[np.ndarray, "*n 2"], pose: Array) -> Float[np.ndarray, "*n 2"]:
    """Points of the world frame in that of a car at a pose (x, y, heading)."""
    cosine, sine = cosine_sine_of(float(pose[2]))
    x, y = points[..., 0] - pose[0], points[..., 1] - pose[1]
    return np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=-1)
