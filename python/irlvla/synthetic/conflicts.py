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
ZIPPER, FILING = 90.0, 0.35  # cars begin to file in so many metres before lanes join, with gaps that grow by so much per metre driven


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
        mine, other = self.mine, self.other
        my_place, my_speed, my_half = place[mine], speed[mine], half[mine]
        its_place, its_speed, its_half = place[other], speed[other], half[other]
        to_enter = self.enter[0] - my_place - my_half
        its_enter, its_leave = self.enter[1] - its_place - its_half, self.leave[1] - its_place + its_half
        there = its_leave > 0.0
        inside = there & (its_enter < 0.0)
        # Along a common stretch: follow who is ahead.
        lead = its_place + self.shift - my_place
        near = there & (its_enter < ZIPPER) & (to_enter < ZIPPER) if self.zipper else inside
        follows = near & (lead > 0.0)
        # Across or into the other's way: stop before it, unless there is time enough.
        soon = its_enter / np.maximum(its_speed, 0.5) < _time(my_speed, self.leave[0] - my_place + my_half) + MARGIN
        soon &= its_leave / np.maximum(its_speed, 1.0) > _time(my_speed, to_enter) - MARGIN
        waits = (self.yields & soon & there & ~stopping[other]) | (inside & np.isnan(self.shift))
        to_stop = to_enter + BEFORE
        waits &= (to_enter > 0.0) & (to_stop > my_speed * my_speed / (2.0 * LATEST))
        rows = np.flatnonzero(follows | waits)
        filing = FILING * np.maximum(to_enter, 0.0) if self.zipper else 0.0
        followed = np.where(follows, lead - my_half - its_half + filing, np.inf)[rows]
        stopped = np.where(waits, to_stop, np.inf)[rows]
        return mine[rows], np.minimum(followed, stopped), np.where(followed < stopped, its_speed[rows], 0.0)


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
