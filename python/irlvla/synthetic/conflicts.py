"""Where paths cross, merge or part, and who gives way there.

Letters: V vehicles, C connectors, Z ordered pairs of a vehicle ("mine") and another one whose way it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from irlvla.synthetic.angles import Array
from irlvla.synthetic.layouts import Layout
from irlvla.synthetic.paths import Path

REACH = 0.93  # connectors nearer than this are in each other's way [widths of a lane]
MARGIN = 1.2  # between one car leaving and another entering [s]
STARTING = 1.2  # acceleration that who gives way counts on [m/s^2]
BEFORE = 1.0  # what he stops for is taken to be so far inside the other's way [m]
LATEST = 6.0  # who would have to brake harder than this goes first [m/s^2]
NEAR = 90.0  # cars mind each other from so far before their ways meet [m]
FILING = 0.35  # where they file in by turns, they are content with a gap that is so much shorter per metre that is left


@dataclass(frozen=True)
class Conflicts:
    """Pairs of vehicles whose paths share a stretch, or cross. Places are along the path of each, mine first."""

    mine: Int[np.ndarray, " Z"]
    other: Int[np.ndarray, " Z"]
    enter: Float[np.ndarray, "2 Z"]  # where the common stretch begins
    leave: Float[np.ndarray, "2 Z"]
    shift: Float[np.ndarray, " Z"]  # place of the other + shift = the same place on my path; NaN where paths only cross
    yields: Bool[np.ndarray, " Z"]  # I give way
    zipper: bool

    @classmethod
    def between(cls, layout: Layout, paths: Sequence[Path], lawless: Bool[np.ndarray, " V"]) -> Conflicts:
        lanes = layout.roads.lanes
        connectors = sorted({lane for path in paths for lane in path.lanes if layout.is_connector[lane]})
        column = {lane: i for i, lane in enumerate(connectors)}
        ways = [(i, path) for i, path in enumerate(paths)]
        used = [
            (i, column[lane], float(begin))
            for i, path in ways
            for lane, begin in zip(path.lanes, path.begins, strict=True)
            if lane in column
        ]
        vehicle, which = (np.array([entry[k] for entry in used], dtype=np.int64) for k in (0, 1))
        begin = np.array([entry[2] for entry in used])
        first, last = _overlaps(layout, connectors)
        a, b = np.nonzero(np.isfinite(first)[which[:, None], which] & (vehicle[:, None] != vehicle))
        p, q = which[a], which[b]
        source = np.array([lanes[lane].predecessors[0] for lane in connectors], dtype=np.int64)
        target = np.array([lanes[lane].successors[0] for lane in connectors], dtype=np.int64)
        length = np.array([layout.lengths[lane] for lane in connectors])
        rank = np.array([layout.ranks[lane] * 1000 + lane for lane in connectors])
        parting = source[p] == source[q]
        shift = np.where(parting, begin[a] - begin[b], np.nan)
        shift = np.where(target[p] == target[q], begin[a] + length[p] - begin[b] - length[q], shift)
        yields = ((rank[p] < rank[q]) | lawless[vehicle[b]]) & ~lawless[vehicle[a]] & ~parting & (not layout.zipper)
        enter = np.stack([begin[a] + first[p, q], begin[b] + first[q, p]])
        leave = np.stack([begin[a] + last[p, q], begin[b] + last[q, p]])
        return cls(vehicle[a], vehicle[b], enter, leave, shift, yields, layout.zipper)

    def gaps(self, place: Array, speed: Array, half: Array, stopping: Bool[np.ndarray, " V"]) -> tuple[np.ndarray, Array, Array]:
        """Vehicles; for each a distance from its front to what it follows or stops for; the speed of that.

        `stopping` are those that stop at a light.
        """
        front, rear = place + half, place - half
        to_enter, its_enter = self.enter[0] - front[self.mine], self.enter[1] - front[self.other]
        its_leave = self.leave[1] - rear[self.other]
        now = np.flatnonzero((to_enter < NEAR) & (its_enter < NEAR) & (its_leave > 0.0) & (rear[self.mine] < self.leave[0]))
        if not len(now):
            return now, np.zeros(0), np.zeros(0)
        mine, other, shift = self.mine[now], self.other[now], self.shift[now]
        to_enter, its_enter, its_leave = to_enter[now], its_enter[now], its_leave[now]
        my_speed, its_speed = speed[mine], speed[other]
        # Along a common stretch: follow who is ahead.
        inside = its_enter < 0.0
        follows = (place[other] + shift > place[mine]) & (inside | self.zipper)
        followed = rear[other] + shift - front[mine] + (FILING * np.maximum(to_enter, 0.0) if self.zipper else 0.0)
        # Across or into the other's way: stop before it, unless there is time enough.
        soon = its_enter / np.maximum(its_speed, 0.5) < _time(my_speed, self.leave[0, now] - rear[mine]) + MARGIN
        soon &= its_leave / np.maximum(its_speed, 1.0) > _time(my_speed, to_enter) - MARGIN
        waits = (self.yields[now] & soon & ~stopping[other]) | (inside & np.isnan(shift))
        waits &= (to_enter > 0.0) & (to_enter + BEFORE > my_speed * my_speed / (2.0 * LATEST))
        gap = np.minimum(np.where(follows, followed, np.inf), np.where(waits, to_enter + BEFORE, np.inf))
        return mine, gap, np.where(follows & (followed <= gap), its_speed, 0.0)


def _time(speed: Array, distance: Array) -> Array:
    """Seconds until a distance is driven, when one accelerates now."""
    return (np.sqrt(speed * speed + 2.0 * STARTING * np.maximum(distance, 0.0)) - speed) / STARTING


def _overlaps(layout: Layout, connectors: Sequence[int]) -> tuple[Float[np.ndarray, "C C"], Float[np.ndarray, "C C"]]:
    """First and last distance along each connector at which it is in the way of each other one; inf, -inf if never."""
    if not connectors:
        return np.zeros((0, 0)), np.zeros((0, 0))
    lines = [layout.roads.lanes[lane].centerline for lane in connectors]
    starts = np.cumsum([0, *(len(line) for line in lines[:-1])])
    points = np.concatenate(lines)
    dx, dy = points[:, :1] - points[:, 0], points[:, 1:2] - points[:, 1]
    reach = REACH * layout.roads.lanes[connectors[0]].width
    near = np.logical_or.reduceat(dx * dx + dy * dy < reach * reach, starts, axis=1)  # "points C"
    along = np.concatenate(
        [np.arange(len(line)) * (layout.lengths[lane] / (len(line) - 1)) for line, lane in zip(lines, connectors, strict=True)]
    )
    first = np.minimum.reduceat(np.where(near, along[:, None], np.inf), starts, axis=0)
    last = np.maximum.reduceat(np.where(near, along[:, None], -np.inf), starts, axis=0)
    itself = np.arange(len(connectors))
    first[itself, itself], last[itself, itself] = np.inf, -np.inf
    return first, last
