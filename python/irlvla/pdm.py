"""PDM-Closed: the rule-based plan that ego progress is measured against, for scenes that carry none.

As NAVSIM v2.2 computes it for its metric cache: three paths (the centreline and its parallels 1 m to the right and to
the left) times five IDM policies (20 ... 100 % of the speed limit) make 15 proposals; each is tracked by the simulated
car and scored against a constant-velocity forecast of what is seen at t = 0, and the best one is the plan.

Letters: M objects, E edges of their outlines, K bars that cover them, U = 20 updates of the leader (every 2nd step). Arrays
of proposals are "3 5 ...": path, policy. "Sic" marks what looks like a slip and is the devkit's.

Two things cannot be told from a scene. The devkit keeps one planner per worker, whose list of objects to ignore (those
that touched the car at t = 0) grows over all scenes that the worker has seen; here it starts empty. And an object that
was seen in one later key frame only stands in the devkit's traffic from t = 0 on; here it is taken for seen at t = 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from irlvla import ops
from irlvla.corridor import (
    HALF_LENGTH,
    OFFSETS,
    Array,
    Corridor,
    Indices,
    Mask,
    Paths,
    Polygon,
    box_edges,
    clearance,
    clip,
    project,
    thin_bars,
    wrap,
)
from irlvla.errors import InputError
from irlvla.types import METRICS, PROGRESS_THRESHOLD, REAR_AXLE_TO_CENTRE, STEP, STEPS, Epdms, Kind, Scene, StateIndex

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the speed limit
UNKNOWN_LIMIT = 15.0  # [m/s]
MIN_GAP, HEADWAY, ACCELERATION, DECELERATION, EXPONENT = 1.0, 1.5, 1.5, 3.0, 10  # IDM [m, s, m/s^2, m/s^2, 1]
CORRIDOR_STEPS = 50  # the corridor is as long as the fastest policy drives in these
EVERY = 2  # steps between updates of the leader and of the forecast
RADIUS = 100.0  # objects further from the car are ignored [m]
TREE_CHILDREN = 10  # of a node of the devkit's search tree
NEAREST_STATIC = 50  # how many are considered
NEAREST = {Kind.VEHICLE: 50, Kind.PEDESTRIAN: 25, Kind.BICYCLE: 10}

UPDATE_TIMES = np.arange(EVERY, STEPS, EVERY) * STEP  # [s]


def pdm_closed(scenes: Scene) -> Float[Tensor, "B 41 3"]:
    """The PDM-Closed plan of each scene: map-frame rear-axle poses at 0.1 s, what `Scene.reference` holds.

    As in the devkit these are the poses of the proposal itself, before the tracker. NaN where a scene has no
    centreline (no points, or no length): it has no PDM-Closed plan.
    """
    forecasts = forecast(scenes)
    poses = proposals(forecasts)
    routed = ~poses.isnan().flatten(1).any(1)
    plans = torch.full((len(scenes), STEPS, 3), torch.nan, dtype=torch.float64)
    if routed.any():
        candidates = poses[routed]
        scores = score_batch(forecasts[routed.nonzero().squeeze(1)], candidates)
        best = torch.from_numpy(scores.cpu().numpy().argmax(axis=1))  # numpy: the first of equals wins
        plans[routed] = candidates[torch.arange(len(best)), best]
    return plans.to(scenes.device)


def reference_plans(scenes: Scene) -> Float[Tensor, "B 41 3"]:
    """What progress is measured against: `Scene.reference`, and the PDM-Closed plan of the scenes that carry none."""
    reference = scenes.reference.double()
    missing = reference.isnan().flatten(1).any(1).nonzero()[:, 0]
    return reference.index_put((missing,), pdm_closed(scenes[missing.cpu()]).to(reference)) if len(missing) else reference


# -- scores ------------------------------------------------------------------------------------------------------------


def score_batch(scenes: Scene, poses: Float[Tensor, "B 15 41 3"]) -> Float[Tensor, "B 15"]:
    """What the devkit maximises: EPDMS without EC; EP against the best proposal of the scene itself, HC 1 (it sees no history)."""
    values, progress = _measure(scenes, poses)
    column = {name: values[..., i] for i, name in enumerate(METRICS)}
    lawful = column["nc"] * column["dac"] * column["ddc"] * column["tlc"]
    best = (progress * lawful).amax(dim=-1, keepdim=True)
    column["ep"].copy_(torch.where(best > PROGRESS_THRESHOLD, (progress / best).clamp(0.0, 1.0), 1.0))
    column["hc"].fill_(1.0)
    column["ec"].fill_(torch.nan)
    return Epdms(values).score()


def _measure(scenes: Scene, poses: Float[Tensor, "B 15 41 3"]) -> tuple[Float[Tensor, "B 15 9"], Float[Tensor, "B 15"]]:
    """Sub-metrics (EP, HC and EC are not read) and progress [m] of map-frame poses: the only place that calls the scorer.

    The tracker follows the poses as they are, at exact steps of 0.1 s. Agents that touch the car at t = 0 do not count.
    """
    count = poses.shape[1]
    states = ops.track(poses.flatten(0, 1), scenes.ego.repeat_interleave(count, dim=0))
    index = torch.arange(len(scenes)).repeat_interleave(count)
    metrics, *_ = ops.score(ops.prepare(scenes), states, index, source=ops.STATES, remove_touching=True)
    metrics = metrics.unflatten(0, (len(scenes), count))
    nc, dac, ddc, tlc, progress, ttc, lk = metrics[..., :7].unbind(-1)
    unread = torch.full_like(progress, torch.nan)
    return torch.stack([nc, dac, ddc, tlc, unread, ttc, lk, unread, unread], dim=-1), progress


# -- forecast ----------------------------------------------------------------------------------------------------------


def forecast(scenes: Scene) -> Scene:
    """The scenes as PDM-Closed expects them to unfold: constant velocity, lights as they are at t = 0.

    Kept are the nearest objects of each kind within 100 m, at t = 0. Boxes glide along their heading, backwards if the
    velocity points backwards, and move every 2nd step only. The velocities stay as measured.
    """
    scenes = scenes.to("cpu", torch.float64)
    state, valid = scenes.agent_state[:, 0].numpy(), scenes.agent_valid[:, 0].numpy()
    kind = scenes.agent_kind.numpy()
    spans = itertools.pairwise(scenes.agent_offsets.tolist())
    chosen = [
        first + _considered(state[first:last], valid[first:last], kind[first:last], ego)
        for (first, last), ego in zip(spans, scenes.ego.numpy(), strict=True)
    ]
    rows = np.concatenate([np.zeros(0, np.int64), *chosen])
    times = np.arange(STEPS) // EVERY * EVERY * STEP
    future = np.repeat(state[rows, None], STEPS, axis=1)
    future[..., :2] += times[:, None] * _drift(state[rows], kind[rows])[:, None]
    return dataclasses.replace(
        scenes,
        agent_offsets=torch.from_numpy(np.cumsum([0, *map(len, chosen)])).to(scenes.agent_offsets),
        agent_token=tuple(scenes.agent_token[i] for i in rows.tolist()),
        agent_kind=torch.from_numpy(kind[rows]),
        agent_size=scenes.agent_size[torch.from_numpy(rows)],
        agent_valid=torch.ones(len(rows), STEPS, dtype=torch.bool),
        agent_state=torch.from_numpy(future),
        light_red=scenes.light_red[:, :1].repeat(1, STEPS),
    )


def _considered(state: Array, valid: Mask, kind: Indices, ego: Array) -> Indices:
    """Rows of the objects that the planner considers: static ones first, then by kind, the nearest of each first."""
    centre = ego[:2] + REAR_AXLE_TO_CENTRE * np.array([np.cos(ego[2]), np.sin(ego[2])])
    distance = np.hypot(*(state[:, :2] - centre).T)
    order = np.argsort(distance, kind="stable")
    order = order[valid[order] & (distance[order] <= RADIUS)]
    groups = [order[~_moves(kind[order])][:NEAREST_STATIC]]
    groups += [order[kind[order] == moving][:most] for moving, most in NEAREST.items()]
    return np.concatenate(groups)


def _moves(kind: Indices) -> Mask:
    return kind <= Kind.BICYCLE  # nuPlan's AGENT_TYPES; all others are static objects


def _drift(state: Array, kind: Indices) -> Array:
    """Velocities "M 2" of the forecast: the measured speed along the heading or against it."""
    heading, vx, vy = state[:, 2], state[:, 3], state[:, 4]
    forward = np.abs(wrap(heading - np.arctan2(vy, vx))) < np.pi / 2
    course = np.where(forward, heading, wrap(heading + np.pi))
    speed = np.where(_moves(kind), np.hypot(vx, vy), 0.0)
    return np.stack([np.cos(course) * speed, np.sin(course) * speed], axis=-1)


# -- proposals ---------------------------------------------------------------------------------------------------------


def proposals(scenes: Scene) -> Float[Tensor, "B 15 41 3"]:
    """The 15 proposals of each forecast scene (see `forecast`), path by path; NaN for a scene without centreline."""
    limit = scenes.speed_limit.numpy()
    if (limit <= 0.0).any():
        scene = int((limit <= 0.0).argmax())
        raise InputError(f"speed_limit must be positive, or NaN where unknown; that of scene {scene} is {limit[scene]}")
    limit = np.where(np.isnan(limit), UNKNOWN_LIMIT, limit)
    poses = np.full((len(scenes), len(OFFSETS), len(FRACTIONS), STEPS, 3), np.nan)
    for i, (first, last) in enumerate(itertools.pairwise(scenes.centerline_offsets.tolist())):
        paths = Paths.beside(scenes.centerline[first:last].numpy())
        if paths.length[0] > 0.0:
            poses[i] = _unroll(paths, scenes.ego[i].numpy(), np.array(FRACTIONS) * limit[i], _Objects.of(scenes, i))
    return torch.from_numpy(poses.reshape(len(scenes), len(OFFSETS) * len(FRACTIONS), STEPS, 3))


def _unroll(paths: Paths, ego: Array, target: Array, objects: _Objects) -> Array:
    """Poses "3 5 41 3" of the proposals: all policies drive along each path, behind the leader in its corridor."""
    start = paths.project(_rear_axle(ego))
    reach = target.max() * CORRIDOR_STEPS * STEP
    corridors = [Corridor.around(paths.substring(path, start[path], start[path] + reach)) for path in range(len(start))]
    traffic = _Traffic.within(corridors, paths, objects)
    progress = np.repeat(start[:, None], len(target), axis=1)
    speed = np.full(progress.shape, ego[StateIndex.VX])
    leader = _Leader(*np.zeros((3, *progress.shape)))  # sic: at step 1 something stands at the start of the path
    driven = [progress]
    for step in range(1, STEPS):
        if step % EVERY == 0:
            leader = _leaders(paths, progress, traffic, step // EVERY - 1)
        progress, speed = _follow(progress, speed, leader, target)
        driven.append(progress)
    return paths.poses_at(np.stack(driven, axis=-1).reshape(len(start), -1)).reshape(*progress.shape, STEPS, 3)


@dataclass(frozen=True)
class _Leader:
    """What each proposal follows, each "3 5" or "3 1": progress along the path [m], speed [m/s], distance to its rear [m]."""

    progress: Array
    speed: Array
    rear: Array


def _follow(progress: Array, speed: Array, leader: _Leader, target: Array) -> tuple[Array, Array]:
    """One Euler step of the intelligent driver model."""
    desired = MIN_GAP + speed * HEADWAY + (speed * (speed - leader.speed)) / (2 * math.sqrt(ACCELERATION * DECELERATION))
    gap = np.maximum(leader.progress - progress - leader.rear, MIN_GAP)
    acceleration = ACCELERATION * (1 - (speed / target) ** EXPONENT - (desired / gap) ** 2)
    return progress + STEP * speed, speed + STEP * clip(acceleration, -DECELERATION, ACCELERATION)


def _leaders(paths: Paths, progress: Array, traffic: _Traffic, update: int) -> _Leader:
    """The nearest object ahead of each proposal, or the end of the path.

    Ahead: its centroid projects beyond the rear axle, and it touches the corridor. Nearest: by the distance of the
    outlines. Sic: the devkit fills one array policy by policy and forgets to clear it, so a red light inherits the
    speed of the previous policy's leader, and the distance to the rear stays once a slower policy had a free road.
    """
    ahead = traffic.progress[update][:, None] > progress[..., None]  # "3 5 M"
    free = ~ahead.any(axis=-1)
    rear = np.where(np.logical_or.accumulate(free, axis=1), HALF_LENGTH, 0.0)
    end = paths.length[:, None]
    if free.all():
        return _Leader(end, np.zeros_like(end), rear)
    poses = paths.poses_at(progress)
    distance = np.where(ahead, clearance(poses, traffic.edges[update], traffic.first), np.inf)
    nearest = distance.argmin(axis=-1)
    gap = distance.min(axis=-1)
    if ((distance == 0.0).sum(axis=-1) > 1).any():  # the car overlaps several at once: the first that is visited leads
        nearest = np.where(distance == gap[..., None], traffic.visiting_ranks(update), len(traffic.all.first)).argmin(axis=-1)
    measured = ~free & ~traffic.light[nearest]
    speed = np.where(measured, traffic.speed[nearest] * np.cos(wrap(traffic.heading[nearest] - poses[..., 2])), 0.0)
    policy = np.maximum.accumulate(np.where(measured, np.arange(progress.shape[1]), -1), axis=1)  # the last that measured
    inherited = np.where(policy >= 0, speed[np.arange(len(speed))[:, None], policy], 0.0)
    return _Leader(np.where(free, end, progress + gap), inherited, rear)


# -- objects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Objects:
    """What may be in the way: boxes, then red lights (the polygons of their lane connectors), at t = 0.

    `edges` "E 2 2" (start, end) are the outlines of the M objects one after the other, from `first` "M" on. `bars` "K 5"
    (centre, heading, half length, half width) touch what the outlines touch: the boxes themselves, and the edges of the
    lights as boxes of no width; `bar_of` "K" is the object that each belongs to.
    """

    edges: Array
    first: Indices
    bars: Array
    bar_of: Indices
    centre: Array  # "M 2", centroids
    drift: Array  # "M 2", velocities in the forecast [m/s]
    heading: Array  # "M"
    speed: Array  # "M", along the heading [m/s]
    light: Mask  # "M"
    ignored: Mask  # "M": boxes that touch the car, lights that contain all of it

    @classmethod
    def of(cls, scenes: Scene, index: int) -> _Objects:
        """The objects of one forecast scene."""
        first, last = scenes.agent_offsets[index : index + 2].tolist()
        state, kind, size = (t[first:last].numpy() for t in (scenes.agent_state[:, 0], scenes.agent_kind, scenes.agent_size))
        lights, ego = _red_lights(scenes, index), scenes.ego[index, :3].numpy()
        inside = [light.contains(ego) for light in lights]
        count, zeros = len(state), np.zeros(len(lights))
        edges = [box_edges(state, size), *(light.edges for light in lights)]
        sizes = np.array([4] * count + [len(light.edges) for light in lights], dtype=np.int64)
        return cls(
            edges=np.concatenate(edges),
            first=np.cumsum(sizes) - sizes,
            bars=np.concatenate([np.concatenate([state[:, :3], size / 2.0], axis=-1), *(thin_bars(part) for part in edges[1:])]),
            bar_of=np.concatenate([np.arange(count), np.repeat(np.arange(count, len(sizes)), sizes[count:])]),
            centre=np.concatenate([state[:, :2], *(light.centroid()[None] for light in lights)]),
            drift=np.concatenate([_drift(state, kind), np.zeros((len(lights), 2))]),
            heading=np.concatenate([state[:, 2], zeros]),
            speed=np.concatenate([np.where(_moves(kind), np.hypot(state[:, 3], state[:, 4]), 0.0), zeros]),
            light=np.arange(len(sizes)) >= count,
            ignored=np.concatenate([clearance(ego, edges[0], 4 * np.arange(count)) == 0.0, np.array(inside, dtype=bool)]),
        )

    def outline(self, row: int) -> Array:
        """Edges of one object."""
        return self.edges[self.first[row] :][: np.diff(self.first, append=len(self.edges))[row]]

    def touching(self, corridor: Corridor) -> Mask:
        """Which objects touch a corridor at which updates, "U M"."""
        low, high = corridor.contact(self.bars)
        near = np.flatnonzero((low <= high).any(axis=-1))
        owner = self.bar_of[near]
        heading = self.bars[near, 2]
        along = self.drift[owner, 0] * np.cos(heading) + self.drift[owner, 1] * np.sin(heading)
        glide = (UPDATE_TIMES[:, None] * along)[..., None]
        update, bar = np.nonzero(((low[near] <= glide) & (glide <= high[near])).any(axis=-1))
        touching = np.zeros((len(UPDATE_TIMES), len(self.first)), dtype=bool)
        touching[update, owner[bar]] = True
        for row in np.flatnonzero(self.light).tolist():
            touching[:, row] |= corridor.starts_in(self.outline(row))  # the corridor lies in the polygon
        return touching


@dataclass(frozen=True)
class _Traffic:
    """The objects that ever touch a corridor and are not ignored, over the updates of the leader; M are those only."""

    all: _Objects
    rows: Indices  # "M", among all
    progress: Array  # "U 3 M": progress of the centroid along each path; -inf while the object does not touch its corridor
    edges: Array  # "U E 2 2"
    first: Indices  # "M"
    heading: Array  # "M"
    speed: Array  # "M"
    light: Mask  # "M"

    @classmethod
    def within(cls, corridors: list[Corridor], paths: Paths, objects: _Objects) -> _Traffic:
        touching = np.stack([objects.touching(corridor) & ~objects.ignored for corridor in corridors], axis=1)  # "U 3 M"
        rows = np.flatnonzero(touching.any(axis=(0, 1)))
        touching = touching[..., rows]
        moving = np.any(objects.drift[rows] != 0.0, axis=-1)
        progress = np.full(touching.shape, -np.inf)
        for path in np.flatnonzero(touching.any(axis=(0, 2))).tolist():
            update, row = np.nonzero(touching[:, path])
            place, which = np.unique(np.where(moving[row], update, 0) * len(rows) + row, return_inverse=True)  # standing ones: once
            when, what = place // len(rows), rows[place % len(rows)]
            centre = objects.centre[what] + UPDATE_TIMES[when, None] * objects.drift[what]
            progress[update, path, row] = project(centre, paths.poses[path, :, :2], paths.progress[path])[which]
        sizes = np.diff(objects.first, append=len(objects.edges))[rows]
        first = np.cumsum(sizes) - sizes
        edge = np.repeat(objects.first[rows] - first, sizes) + np.arange(sizes.sum())
        edges = objects.edges[edge] + UPDATE_TIMES[:, None, None, None] * np.repeat(objects.drift[rows], sizes, axis=0)[:, None]
        return cls(objects, rows, progress, edges, first, objects.heading[rows], objects.speed[rows], objects.light[rows])

    def visiting_ranks(self, update: int) -> Indices:
        """Ranks "M" in the order in which the devkit's search tree of one update, of all objects, visits them."""
        objects = self.all
        sizes = np.diff(objects.first, append=len(objects.edges))
        points = objects.edges[:, 0] + UPDATE_TIMES[update] * np.repeat(objects.drift, sizes, axis=0)
        low, high = np.minimum.reduceat(points, objects.first), np.maximum.reduceat(points, objects.first)
        return np.argsort(_visiting_order(low, high))[self.rows]


def _visiting_order(low: Array, high: Array) -> Indices:
    """The order in which GEOS's sort-tile-recursive tree visits objects with these lower and upper corners "M 2".

    Level by level the nodes are sorted by x into about square-root-many slices, each slice by y into families of 10.
    """
    nodes = [np.array([row]) for row in range(len(low))]
    while len(nodes) > 1:
        slices = math.ceil(math.sqrt(math.ceil(len(nodes) / TREE_CHILDREN)))
        by_x = np.argsort(low[:, 0] + high[:, 0], kind="stable")
        families: list[Indices] = []
        for part in _chunks(by_x, math.ceil(len(nodes) / slices)):
            families += _chunks(part[np.argsort(low[part, 1] + high[part, 1], kind="stable")], TREE_CHILDREN)
        nodes = [np.concatenate([nodes[child] for child in family]) for family in families]
        low = np.stack([low[family].min(axis=0) for family in families])
        high = np.stack([high[family].max(axis=0) for family in families])
    return nodes[0]


def _chunks(rows: Indices, size: int) -> list[Indices]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _red_lights(scenes: Scene, index: int) -> list[Polygon]:
    """Polygons of one scene's connectors on the route whose light is red at t = 0."""
    first, last = scenes.light_offsets[index : index + 2].tolist()
    red = scenes.light_polygon[first:last][scenes.light_red[first:last, 0]] + scenes.polygon_offsets[index]
    return [_polygon(scenes, row) for row in red.tolist() if scenes.polygon_on_route[row]]


def _polygon(scenes: Scene, row: int) -> Polygon:
    first, last = scenes.ring_offsets[row : row + 2].tolist()
    edges: list[Array] = []
    signs: list[Array] = []
    for start, end in itertools.pairwise(scenes.point_offsets[first : last + 1].tolist()):
        ring = scenes.points[start:end].numpy()
        local = ring - ring[:1]
        turn = np.sign((local[:-1, 0] * local[1:, 1] - local[1:, 0] * local[:-1, 1]).sum())
        edges.append(np.stack([ring, np.roll(ring, -1, axis=0)], axis=1))
        signs.append(np.full(len(ring), -turn if signs else turn))
    return Polygon(np.concatenate(edges), np.concatenate(signs))


def _rear_axle(ego: Array) -> Array:
    """The rear axle "2" as nuPlan's ego state returns it: by way of the centre, which rounds."""
    forward = REAR_AXLE_TO_CENTRE * np.array([np.cos(ego[2]), np.sin(ego[2])])
    return (ego[:2] + forward) - forward
