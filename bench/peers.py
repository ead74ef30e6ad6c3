"""What the scorer is measured against: the same queries in vectorised shapely, and the official devkit where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import shapely

from irlvla.golden import OFFICIAL
from irlvla.types import STEP, STEPS, Kind, Layer, Scene, StateIndex

# Chrysler Pacifica, rear axle to the middle, half length, half width
CENTRE, HALF_LENGTH, HALF_WIDTH = (4.049 + 1.127) / 2.0 - 1.127, (4.049 + 1.127) / 2.0, 1.1485 * 2.0 / 2.0
TTC_OFFSETS = (0, 3, 6, 9)
TTC_STEPS = STEPS - TTC_OFFSETS[-1]
AHEAD, BEHIND = np.deg2rad(30.0), np.deg2rad(150.0)
DRIVABLE = (Layer.ROADBLOCK, Layer.INTERSECTION, Layer.DRIVABLE_AREA, Layer.CARPARK)


# --- shapely ----------------------------------------------------------------------------------------------------------


class ShapelyScene:
    """One scene as geometries: what does not depend on the candidates, built once."""

    def __init__(self, scene: Scene) -> None:
        self.polygons = polygons_of(scene)
        shapely.prepare(self.polygons)
        self.bounds = shapely.bounds(self.polygons)
        layers = scene.polygon_layer.numpy()
        self.lane = np.isin(layers, (Layer.LANE, Layer.LANE_CONNECTOR))
        self.drivable = np.isin(layers, DRIVABLE)
        self.route = scene.polygon_on_route.numpy()
        self.intersection = layers == Layer.INTERSECTION
        self.line = shapely.linestrings(scene.centerline.numpy()[:, :2])
        shapely.prepare(self.line)
        self.lights, self.red = scene.light_polygon.numpy(), scene.light_red.numpy()
        state, size = scene.agent_state.numpy()[:, :STEPS], scene.agent_size.numpy()
        valid = scene.agent_valid.numpy()[:, :STEPS].copy()
        boxes = np.full(valid.shape, None, dtype=object)
        corners = box(state[..., :3], *(size / 2.0).T[:, :, None])
        boxes[valid] = rectangles(corners[valid])
        ego = shapely.polygons(car(scene.ego.numpy()[0])[:4])
        if len(valid):
            valid[shapely.intersects(boxes[:, 0], ego)] = False  # log replay removes who touches the ego at t = 0
        self.boxes = boxes
        self.present = [np.flatnonzero(valid[:, t]) for t in range(STEPS)]
        self.trees = [shapely.STRtree(boxes[present, t]) for t, present in enumerate(self.present)]
        self.centroid = np.full((*valid.shape, 2), np.nan)
        self.centroid[valid] = np.stack([shapely.get_x(c := shapely.centroid(boxes[valid])), shapely.get_y(c)], -1)
        first = state[np.arange(len(valid)), valid.argmax(1), 3:5]
        self.static = ~np.isin(scene.agent_kind.numpy(), (Kind.VEHICLE, Kind.PEDESTRIAN, Kind.BICYCLE))
        self.standing = self.static | (np.hypot(*first.T) <= 0.05)

    def covers(self, points: np.ndarray, which: np.ndarray) -> np.ndarray:
        """which x ...: is the point strictly inside? Only points within the polygon's bounds are asked."""
        flat = points.reshape(-1, 2)
        inside = np.zeros((len(which), len(flat)), bool)
        for row, i in zip(inside, which, strict=True):
            x0, y0, x1, y1 = self.bounds[i]
            near = np.flatnonzero((flat[:, 0] > x0) & (flat[:, 0] < x1) & (flat[:, 1] > y0) & (flat[:, 1] < y1))
            row[near] = shapely.contains_xy(self.polygons[i], flat[near, 0], flat[near, 1])
        return inside.reshape(len(which), *points.shape[:-1])


@dataclass(frozen=True)
class Contacts:
    """Who touches whom: candidate, agent and a time that orders the contacts."""

    candidate: np.ndarray
    agent: np.ndarray
    order: np.ndarray
    step: np.ndarray

    def lasting(self, bad: np.ndarray, agents: int) -> np.ndarray:
        """Bad contacts that no harmless contact with the same agent came before: a harmless one ends the agent's part."""
        pair = self.candidate * agents + self.agent
        harmless = np.full(pair.max(initial=0) + 1, np.iinfo(np.int64).max)
        np.minimum.at(harmless, pair[~bad], self.order[~bad])
        return bad & (self.order < harmless[pair])


def shapely_score(scene: Scene, states: np.ndarray, prepared: ShapelyScene | None = None) -> dict[str, np.ndarray]:
    """NC, DAC, DDC, TLC, TTC, LK and progress of simulated states (N x 41 x 11) in a batch of one scene, before any filter.

    Everything that depends on geometry; not the simulation and not comfort.
    """
    world = prepared or ShapelyScene(scene)
    n = len(states)
    points = car(states)  # N 41 5 2: four corners, centre
    cars = rectangles(points[:, :, :4])
    speed = np.hypot(states[..., StateIndex.VX], states[..., StateIndex.VY])

    # areas
    corners = world.covers(points[:, :, :4], np.arange(len(world.polygons)))  # P N 41 4
    centre = world.covers(points[:, :, 4], np.flatnonzero(world.route | world.intersection))
    kind = world.route[world.route | world.intersection]
    in_lane = corners[world.lane].sum(-1)
    multiple = ((in_lane > 0).sum(0) > 1) & (in_lane != 4).all(0)
    off_road = ~corners[world.drivable].any(0).all(-1)
    off_route, in_junction = ~centre[kind].any(0), centre[~kind].any(0)
    rear_in_junction = world.covers(states[..., :2], np.flatnonzero(world.intersection)).any(0)
    unclear = multiple | off_road

    # collisions and red lights
    hits = _contacts(world, cars[:, :, None], (0,), STEPS)
    fault = _at_fault(world, hits, states, points, speed, unclear)
    counted = hits.lasting(fault, len(world.standing))
    nc = np.ones(n)
    np.minimum.at(nc, hits.candidate[counted], np.where(world.static[hits.agent[counted]], 0.5, 0.0))
    red = np.zeros(n, bool)
    for light, steps in zip(world.lights, world.red, strict=True):
        red |= shapely.intersects(world.polygons[light], cars[:, steps]).any(1)

    # time to collision: the box moved ahead along the heading
    ahead = np.stack([np.cos(states[..., 2]) * speed, np.sin(states[..., 2]) * speed], -1)[:, :TTC_STEPS]
    moved = [points[:, :TTC_STEPS, :4] + ahead[:, :, None] * (offset * STEP) for offset in TTC_OFFSETS]
    projected = np.stack([cars[:, :TTC_STEPS], *(rectangles(p) for p in moved[1:])], -1)
    projected[speed[:, :TTC_STEPS] < 5e-3] = None
    near = _contacts(world, projected, TTC_OFFSETS, TTC_STEPS)
    at = (near.candidate, near.step)
    angle = _angle(states[at], world.centroid[near.agent, near.step + np.take(TTC_OFFSETS, near.order % len(TTC_OFFSETS))])
    closing = (angle < AHEAD) | ((unclear | rear_in_junction)[at] & ~(angle > BEHIND))
    ttc = np.ones(n)
    ttc[near.candidate[near.lasting(closing, len(world.standing))]] = 0.0

    # driving direction: metres off the route in any 11 steps
    metres = np.zeros((n, STEPS))
    metres[:, 1:] = np.linalg.norm(np.diff(points[:, :, 4], axis=1), axis=-1)
    metres[~off_route | in_junction] = 0.0
    window = np.lib.stride_tricks.sliding_window_view(np.pad(metres, ((0, 0), (10, 0))), 11, axis=1).sum(-1).max(1)

    # lane keeping: 20 steps in a row beside the centreline; steps in a junction do not count
    middles = shapely.points(points[:, :, 4])
    beside = ~shapely.dwithin(world.line, middles, 0.5)
    run, longest = np.zeros(n, int), np.zeros(n, int)
    for t in range(STEPS):
        run = np.where(in_junction[:, t], run, np.where(beside[:, t], run + 1, 0))
        longest = np.maximum(longest, run)
    located = shapely.line_locate_point(world.line, middles[:, [0, -1]])
    return {
        "nc": nc,
        "dac": 1.0 - off_road.any(1),
        "ddc": np.select([window < 2.0, window < 6.0], [1.0, 0.5], 0.0),
        "tlc": 1.0 - red,
        "ttc": ttc,
        "lk": (longest < 20).astype(float),
        "progress": np.maximum(located[:, 1] - located[:, 0], 0.0),
    }


def _contacts(world: ShapelyScene, cars: np.ndarray, offsets: tuple[int, ...], steps: int) -> Contacts:
    """Contacts of boxes (N x steps x offsets) with the agents `offsets` later, in the order of time, then of offsets."""
    found = []
    for t in range(STEPS):
        pairs = [(t - offset, f) for f, offset in enumerate(offsets) if 0 <= t - offset < steps]
        queried = np.concatenate([cars[:, step, f] for step, f in pairs])
        row, agent = world.trees[t].query(queried, predicate="intersects")
        which, candidate = np.divmod(row, len(cars))
        step, f = np.array(pairs)[which].T.reshape(2, -1)
        found.append(np.stack([candidate, world.present[t][agent], step * len(offsets) + f, step]))
    return Contacts(*np.concatenate(found, 1).astype(np.int64))


def _at_fault(
    world: ShapelyScene, hits: Contacts, states: np.ndarray, points: np.ndarray, speed: np.ndarray, unclear: np.ndarray
) -> np.ndarray:
    """Whose fault each contact is, as far as the ego's (navsim get_collision_type)."""
    at = (hits.candidate, hits.step)
    behind = _angle(states[at], world.centroid[hits.agent, hits.step]) > BEHIND
    bumper = shapely.linestrings(points[at][:, [0, 3]])
    front = shapely.intersects(bumper, world.boxes[hits.agent, hits.step])
    return (speed[at] > 0.05) & (world.standing[hits.agent] | (~behind & (front | unclear[at])))


def _angle(poses: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Between the heading and the way to the target; NaN where rounding leaves arccos' domain, as in the devkit."""
    way = target - poses[:, :2]
    with np.errstate(invalid="ignore"):
        way = way / np.linalg.norm(way, axis=-1, keepdims=True)
        return np.arccos(np.cos(poses[:, 2]) * way[:, 0] + np.sin(poses[:, 2]) * way[:, 1])


def box(pose: np.ndarray, half_length: Any, half_width: Any) -> np.ndarray:
    """Corners front left, rear left, rear right, front right (... x 4 x 2) around a centre pose (... x 3)."""
    x, y, heading = pose[..., 0], pose[..., 1], pose[..., 2]
    ahead, left = (np.cos(heading), np.sin(heading)), (np.cos(heading + math.pi / 2), np.sin(heading + math.pi / 2))
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    corner = [[c + (w * half_width * left[i] + l * half_length * ahead[i]) for i, c in enumerate((x, y))] for l, w in signs]
    return np.stack([np.stack(c, -1) for c in corner], -2)


def rectangles(corners: np.ndarray) -> np.ndarray:
    """Polygons from corners (... x 4 x 2), the fastest way that shapely has."""
    rings = np.concatenate([corners, corners[..., :1, :]], -2).reshape(-1, 2)
    count = np.arange(len(rings) // 5 + 1)
    return shapely.from_ragged_array(shapely.GeometryType.POLYGON, rings, (count * 5, count)).reshape(corners.shape[:-2])


def car(states: np.ndarray) -> np.ndarray:
    """Corners and centre (... x 5 x 2) of the ego car from rear-axle states."""
    heading = states[..., 2]
    centre = np.stack([states[..., 0] + CENTRE * np.cos(heading), states[..., 1] + CENTRE * np.sin(heading), heading], -1)
    return np.concatenate([box(centre, HALF_LENGTH, HALF_WIDTH), centre[..., None, :2]], -2)


def polygons_of(scene: Scene) -> np.ndarray:
    """The map of a batch of one scene as shapely polygons."""
    points, ends, rings = scene.points.numpy(), scene.point_offsets.tolist(), scene.ring_offsets.tolist()
    loops = [points[a:b] for a, b in itertools.pairwise(ends)]
    return np.array([shapely.Polygon(loops[a], loops[a + 1 : b]) for a, b in itertools.pairwise(rings)], dtype=object)


# --- the official devkit ----------------------------------------------------------------------------------------------


def devkit_available() -> bool:
    """Is NAVSIM v2 with its nuplan-devkit importable here?"""
    if not (importlib.util.find_spec("navsim") and importlib.util.find_spec("nuplan")):
        return False
    return importlib.util.find_spec("navsim.traffic_agents_policies") is not None


class Devkit:
    """The official scorer on a batch of one Scene. Columns of results: nc dac ddc tlc ep ttc lk hc."""

    COLUMNS = OFFICIAL[:8]

    def __init__(self, scene: Scene) -> None:
        os.environ.setdefault("NUPLAN_MAPS_ROOT", "none")
        from navsim.planning.simulation.planner.pdm_planner.scoring.pdm_scorer import PDMScorer, PDMScorerConfig
        from navsim.planning.simulation.planner.pdm_planner.simulation.pdm_simulator import PDMSimulator
        from navsim.traffic_agents_policies.log_replay_traffic_agents import LogReplayTrafficAgents
        from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling

        self.scene = scene
        self.sampling = TrajectorySampling(num_poses=STEPS - 1, interval_length=STEP)
        self.simulator = PDMSimulator(self.sampling)
        self.scorer = PDMScorer(self.sampling, PDMScorerConfig(human_penalty_filter=True))
        self.traffic = LogReplayTrafficAgents(self.sampling)

    def evaluate(self, plans: np.ndarray) -> np.ndarray:
        """The evaluation call: one candidate at a time, each with the reference and the human filter. N x 8 columns."""
        from navsim.evaluate.pdm_score import pdm_score

        arguments = (self.sampling, self.simulator, self.scorer, self.traffic)
        tables = [pdm_score(self.cache, self._trajectory(plan), *arguments)[0] for plan in plans]
        return np.array([[float(table[column].iloc[0]) for column in self.COLUMNS] for table in tables])

    def batch(self, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One call for the reference and all candidates: N x 8 columns (EP is relative to the best of the batch), and the states."""
        from navsim.evaluate.pdm_score import get_trajectory_as_array, transform_trajectory

        ego = self.cache.ego_state
        paths = [self.cache.trajectory, *(transform_trajectory(self._trajectory(plan), ego) for plan in plans)]
        wanted = np.stack([get_trajectory_as_array(path, self.sampling, ego.time_point) for path in paths])
        states = self.simulator.simulate_proposals(wanted, ego)
        c = self.cache
        tables = self.scorer.score_proposals(
            states,
            c.observation,
            c.centerline,
            c.route_lane_ids,
            c.drivable_area_map,
            c.map_parameters,
            self.traffic.simulate_environment(states[0], c),
            c.past_human_trajectory,
        )
        return np.array([[float(table[column].iloc[0]) for column in self.COLUMNS] for table in tables[1:]]), states[1:]

    def _trajectory(self, plan: np.ndarray) -> Any:
        from navsim.common.dataclasses import Trajectory

        return Trajectory(np.asarray(plan))

    @cached_property
    def cache(self) -> Any:
        """The scene as the MetricCache that the devkit keeps on disk."""
        from navsim.common.enums import SceneFrameType
        from navsim.planning.metric_caching.metric_cache import MetricCache
        from navsim.planning.simulation.planner.pdm_planner.observation.pdm_occupancy_map import PDMDrivableMap
        from navsim.planning.simulation.planner.pdm_planner.utils.pdm_path import PDMPath
        from nuplan.common.actor_state.state_representation import StateSE2
        from nuplan.common.maps.maps_datatypes import SemanticMapLayer
        from nuplan.planning.simulation.trajectory.interpolated_trajectory import InterpolatedTrajectory

        scene, time = self.scene, int(self.scene.time_us[0])
        ego = _ego_state(scene.ego[0].tolist(), time)
        history = zip(scene.history[0].tolist(), scene.history_time_us[0].tolist(), strict=True)
        reference = [_ego_state(pose, time + 100_000 * t) for t, pose in enumerate(scene.reference[0].tolist())]
        tokens = [str(i) for i in range(len(scene.polygon_layer))]
        layers = [SemanticMapLayer(layer) for layer in scene.polygon_layer.tolist()]
        frames = self._frames()
        human = not bool(scene.human.isnan().any())
        return MetricCache(
            file_path=None,
            log_name="bench",
            timepoint=ego.time_point,
            scene_type=SceneFrameType.ORIGINAL if human else SceneFrameType.SYNTHETIC,
            trajectory=InterpolatedTrajectory(reference),
            human_trajectory=self._trajectory(scene.human[0].numpy()) if human else None,
            past_human_trajectory=InterpolatedTrajectory([_ego_state(state, t) for state, t in history]),
            ego_state=ego,
            observation=self._observation(frames, tokens),
            centerline=PDMPath([StateSE2(*point) for point in scene.centerline.tolist()]),
            route_lane_ids=[tokens[i] for i in np.flatnonzero(scene.polygon_on_route.numpy())],
            drivable_area_map=PDMDrivableMap(tokens, layers, list(polygons_of(scene))),
            past_detections_tracks=[],
            current_tracked_objects=frames[:1],
            future_tracked_objects=frames[1:],
            map_parameters=None,
        )

    def _frames(self) -> list[Any]:
        """What is around the ego, one object list per step."""
        from nuplan.common.actor_state.agent import Agent
        from nuplan.common.actor_state.oriented_box import OrientedBox
        from nuplan.common.actor_state.scene_object import SceneObjectMetadata
        from nuplan.common.actor_state.state_representation import StateSE2, StateVector2D
        from nuplan.common.actor_state.static_object import StaticObject
        from nuplan.common.actor_state.tracked_objects import TrackedObjects
        from nuplan.common.actor_state.tracked_objects_types import AGENT_TYPES, TrackedObjectType
        from nuplan.planning.simulation.observation.observation_type import DetectionsTracks

        scene, frames = self.scene, []
        for t in range(STEPS):
            objects = []
            for i in scene.agent_valid[:, t].nonzero()[:, 0].tolist():
                x, y, heading, vx, vy = scene.agent_state[i, t].tolist()
                kind, token = TrackedObjectType(int(scene.agent_kind[i])), scene.agent_token[i]
                about = SceneObjectMetadata(int(scene.time_us[0]), token, i, token)
                shape = OrientedBox(StateSE2(x, y, heading), *scene.agent_size[i].tolist(), 1.5)
                moving = kind in AGENT_TYPES
                objects.append(Agent(kind, shape, StateVector2D(vx, vy), about) if moving else StaticObject(kind, shape, about))
            frames.append(DetectionsTracks(TrackedObjects(objects)))
        return frames

    def _observation(self, frames: list[Any], tokens: list[str]) -> Any:
        from navsim.planning.simulation.planner.pdm_planner.observation.pdm_observation import PDMObservation
        from nuplan.common.maps.maps_datatypes import TrafficLightStatusData, TrafficLightStatusType

        @dataclass
        class Connector:
            polygon: Any

        polygons = polygons_of(self.scene)
        lights = list(zip(self.scene.light_polygon.tolist(), self.scene.light_red.numpy(), strict=True))
        status = [[TrafficLightStatusData(TrafficLightStatusType.RED, tokens[i], 0) for i, red in lights if red[t]] for t in range(STEPS)]
        observation = PDMObservation(self.sampling, self.sampling, 100, observation_sample_res=1, extend_observation_for_ttc=False)
        connectors = {tokens[i]: Connector(polygons[i]) for i, _ in lights}
        observation.update_detections_tracks(frames, status, connectors, compute_traffic_light_data=True)
        return observation


def _ego_state(values: list[float], time_us: int) -> Any:
    from nuplan.common.actor_state.ego_state import EgoState
    from nuplan.common.actor_state.state_representation import StateSE2, StateVector2D, TimePoint
    from nuplan.common.actor_state.vehicle_parameters import get_pacifica_parameters

    x, y, heading, vx, vy, ax, ay, steering, rate, spin, spin_rate = values + [0.0] * (11 - len(values))
    return EgoState.build_from_rear_axle(
        rear_axle_pose=StateSE2(x, y, heading),
        rear_axle_velocity_2d=StateVector2D(vx, vy),
        rear_axle_acceleration_2d=StateVector2D(ax, ay),
        tire_steering_angle=steering,
        time_point=TimePoint(time_us),
        vehicle_parameters=get_pacifica_parameters(),
        angular_vel=spin,
        angular_accel=spin_rate,
        tire_steering_rate=rate,
    )
