"""Whether boxes of actors touch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from irlvla.synthetic.angles import cosine_sine
from irlvla.synthetic.world import Actor

Mask = Bool[np.ndarray, " n"]


def contacts(actors: Sequence[Actor]) -> Int[np.ndarray, "n 3"]:
    """Who touches whom at which step: actor that moves, other actor, step."""
    state = np.stack([actor.state for actor in actors])
    valid = np.stack([actor.valid for actor in actors])
    half = 0.5 * np.array([actor.size[:2] for actor in actors])
    moving = np.flatnonzero((state[..., 3:] != 0.0).any(axis=(1, 2)))
    radius = np.sqrt((half * half).sum(axis=1))
    dx, dy = (state[moving, None, :, k] - state[None, :, :, k] for k in (0, 1))
    reach = radius[moving, None, None] + radius[:, None]
    near = (dx * dx + dy * dy < reach * reach) & valid[moving, None] & valid
    near[np.arange(len(moving)), moving] = False
    row, other, step = np.nonzero(near)
    one = moving[row]
    touch = _touch(-dx[near], -dy[near], state[one, step, 2], state[other, step, 2], half[one], half[other])
    return np.stack([one, other, step], axis=1)[touch]


def _touch(dx, dy, heading, other_heading, half, other_half) -> Mask:  # type: ignore[no-untyped-def]
    """Separating axes: `dx`, `dy` lead from the centres of boxes to those of others."""
    cosine, sine = cosine_sine(heading)
    other_cosine, other_sine = cosine_sine(other_heading)
    along, across = np.abs(cosine * other_cosine + sine * other_sine), np.abs(sine * other_cosine - cosine * other_sine)
    (length, width), (other_length, other_width) = half.T, other_half.T
    apart = np.abs(dx * cosine + dy * sine) > length + other_length * along + other_width * across
    apart |= np.abs(dy * cosine - dx * sine) > width + other_length * across + other_width * along
    apart |= np.abs(dx * other_cosine + dy * other_sine) > other_length + length * along + width * across
    apart |= np.abs(dy * other_cosine - dx * other_sine) > other_width + length * across + width * along
    return ~apart
