"""The sub-metrics other than comfort: the traffic and the areas around the ego, and what either says of its states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.ops.reference.shapes import (
    box_centroids,
    box_corners,
    boxes_touch_polygons,
    centres,
    footprints,
    length_of,
    points_in_polygons,
    polygon_rings,
    project,
    quads_touch,
    segments_touch_quads,
)
from irlvla.types import PROGRESS_THRESHOLD, STEP, STEPS, Kind, Layer, Scene, StateIndex

# Scorer (navsim pdm_scorer.py PDMScorerConfig)
STANDING_SPEED = 0.05  # m/s: an ego or a track up to this speed stands (NC)
PROJECTED_SPEED = 0.005  # m/s: a slower ego is not projected ahead (TTC)
TTC_OFFSETS = (0, 3, 6, 9)  # steps: np.arange(0, 10, 3), so the "1 s" horizon ends at 0.9 s
AHEAD, BEHIND = math.radians(30.0), math.radians(150.0)
OFF_ROUTE_WINDOW, OFF_ROUTE_LIMITS = 10, (2.0, 6.0)  # steps; metres for half and for no points (DDC)
OFF_CENTRE_LIMIT, OFF_CENTRE_STEPS = 0.5, 20  # metres; steps in a row that fail (LK)

LANE_LAYERS = (Layer.LANE, Layer.LANE_CONNECTOR)
DRIVABLE_LAYERS = (Layer.ROADBLOCK, Layer.INTERSECTION, Layer.DRIVABLE_AREA, Layer.CARPARK)
MOVING_KINDS = (Kind.VEHICLE, Kind.PEDESTRIAN, Kind.BICYCLE)  # nuplan AGENT_TYPES


# --- agents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agents:
    """The traffic of one scene: A agents over S steps."""

    corners: Float[Tensor, "A S 4 2"]
    centroids: Float[Tensor, "A S 2"]
    valid: Bool[Tensor, "A S"]
    moving_kind: Bool[Tensor, " A"]  # a vehicle, pedestrian or bicycle
    standing: Bool[Tensor, " A"]  # a static object, or at most 0.05 m/s when FIRST seen (navsim pdm_observation.py unique_objects)


def agents_of(scene: Scene, *, remove_touching: bool) -> Agents:
    """Agents of a scene of one; with `remove_touching`, those in contact with the ego at t = 0 are gone for good.

    navsim log_replay_traffic_agents.py simulate_environment (not in v1, not with reactive traffic).
    """
    state, valid = scene.agent_state.double(), scene.agent_valid.clone()
    boxes = torch.cat([state[..., :3], scene.agent_size.double()[:, None].expand(-1, state.shape[1], -1)], -1)
    corners = box_corners(boxes)
    if remove_touching:
        touching = quads_touch(footprints(scene.ego), corners[:, 0]) & valid[:, 0]
        valid &= ~touching[:, None]
    moving_kind = torch.isin(scene.agent_kind, torch.tensor(MOVING_KINDS))
    first_seen = scene.agent_valid.int().argmax(-1)
    velocity = state[torch.arange(len(state)), first_seen, 3:5]
    standing = ~moving_kind | (torch.hypot(velocity[:, 0], velocity[:, 1]) <= STANDING_SPEED)
    return Agents(corners, box_centroids(corners), valid, moving_kind, standing)


def contacts(
    ego_corners: Float[Tensor, "N T 4 2"], agent_corners: Float[Tensor, "A T 4 2"], valid: Bool[Tensor, "A T"]
) -> Bool[Tensor, "N T A"]:
    """Which agents each ego box touches at each step."""
    return quads_touch(ego_corners[:, :, None], agent_corners.transpose(0, 1)) & valid.T


def relative_angle(pose: Float[Tensor, "... 3"], point: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
    """Angle between the heading and the direction to the point, in [0, pi] (nuplan idm/utils.py get_agent_relative_angle).

    NaN, hence neither ahead nor behind, at no distance. Rounding can lift the cosine of an agent exactly in line above 1;
    the devkit's arccos is NaN then, a matter of the last bit of the simulated state. Here the agent is in line.
    """
    vector = point - pose[..., :2]
    direction = vector / length_of(vector)[..., None]
    heading = pose[..., 2]
    return torch.acos((heading.cos() * direction[..., 0] + heading.sin() * direction[..., 1]).clamp(-1.0, 1.0))


def ego_speed(states: Float[Tensor, "... 11"]) -> Float[Tensor, "..."]:
    """Speed without sign [m/s]: a reversing ego counts as driving forwards."""
    return torch.hypot(states[..., StateIndex.VX], states[..., StateIndex.VY])


def moved_ahead(states: Float[Tensor, "N T 11"], offset: int) -> Float[Tensor, "N T 4 2"]:
    """Ego boxes moved straight ahead for `offset` steps at their speed (navsim pdm_scorer.py _calculate_ttc)."""
    speed, heading = ego_speed(states), states[..., StateIndex.HEADING]
    velocity = torch.stack([heading.cos() * speed, heading.sin() * speed], -1)
    return footprints(states) + velocity[..., None, :] * (float(offset) * STEP)


def projected_contacts(
    states: Float[Tensor, "N T 11"], corners: Float[Tensor, "A S 4 2"], valid: Bool[Tensor, "A S"]
) -> Bool[Tensor, "N T 4 A"]:
    """Which agents the ego, moved ahead by each of TTC_OFFSETS, touches where they are by then; none for a standing ego."""
    result = torch.zeros(*states.shape[:2], len(TTC_OFFSETS), len(corners), dtype=torch.bool)
    for i, offset in enumerate(TTC_OFFSETS):
        steps = max(0, min(states.shape[1], corners.shape[1] - offset))
        ahead = slice(offset, offset + steps)
        result[:, :steps, i] = contacts(moved_ahead(states[:, :steps], offset), corners[:, ahead], valid[:, ahead])
    return result & (ego_speed(states) >= PROJECTED_SPEED)[:, :, None, None]


def time_to_collision(states: Float[Tensor, "N 41 11"], boxes: Float[Tensor, "A S 5"], valid: Bool[Tensor, "A S"]) -> Float[Tensor, "N 41"]:
    """Smallest of 0, 0.3, 0.6, 0.9 s after which the ego, moved straight ahead, touches any box of that later step; inf if none.

    No question of fault. Later steps than the boxes have are not looked at; an ego below 0.005 m/s has no collision ahead.
    """
    hit = projected_contacts(states.double(), box_corners(boxes), valid).any(-1)
    seconds = torch.tensor(TTC_OFFSETS, dtype=torch.float64) * STEP
    return torch.where(hit, seconds, math.inf).amin(-1)


# --- areas ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Areas:
    """Where the ego is at each step."""

    multiple_lanes: Bool[Tensor, "N T"]
    off_road: Bool[Tensor, "N T"]
    off_route: Bool[Tensor, "N T"]
    centre_in_intersection: Bool[Tensor, "N T"]
    rear_axle_in_intersection: Bool[Tensor, "N T"]

    @property
    def out_of_lane(self) -> Bool[Tensor, "N T"]:
        """In several lanes or off the road: lateral contacts are then the ego's fault."""
        return self.multiple_lanes | self.off_road


def areas_of(scene: Scene, states: Float[Tensor, "N T 11"]) -> Areas:
    """Areas of the ego (navsim pdm_scorer.py _calculate_ego_area, pdm_occupancy_map.py is_in_layer)."""
    points = torch.cat([footprints(states), centres(states)[..., None, :], states[..., None, :2]], -2)
    inside = points_in_polygons(points.flatten(0, -2), scene.points, scene.point_offsets, scene.ring_offsets)
    inside = inside.unflatten(0, points.shape[:-1])
    corners, centre, rear_axle = inside[..., :4, :], inside[..., 4, :], inside[..., 5, :]
    lane = torch.isin(scene.polygon_layer, torch.tensor(LANE_LAYERS))
    drivable = torch.isin(scene.polygon_layer, torch.tensor(DRIVABLE_LAYERS))
    intersection = scene.polygon_layer == Layer.INTERSECTION
    corners_in_lane = corners[..., lane].sum(-2)
    return Areas(
        # Two consecutive lanes of one street count as several.
        multiple_lanes=((corners_in_lane > 0).sum(-1) > 1) & ~(corners_in_lane == 4).any(-1),
        # Every corner must lie in some polygon, so a corner on an edge that two polygons share is off the road.
        off_road=~corners[..., drivable].any(-1).all(-1),
        # The devkit's "oncoming traffic": nothing looks at the direction of driving.
        off_route=~centre[..., lane & scene.polygon_on_route].any(-1),
        centre_in_intersection=centre[..., intersection].any(-1),
        rear_axle_in_intersection=rear_axle[..., intersection].any(-1),
    )


# --- metrics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A metric with its first infraction: step and agent, -1 if there was none."""

    value: Float[Tensor, " N"]
    step: Int[Tensor, " N"]
    agent: Int[Tensor, " N"]


def judge(count: int, contact: Int[Tensor, "K 3"], guilty: Bool[Tensor, " K"], value: Float[Tensor, " K"]) -> Event:
    """Contacts (candidate, step, agent) in order of time: one without guilt excuses its agent from then on, the others count."""
    worst, step, agent = [1.0] * count, [-1] * count, [-1] * count
    excused = set()
    for (n, t, a), is_guilty, score in zip(contact.tolist(), guilty.tolist(), value.tolist(), strict=True):
        if (n, a) in excused:
            continue
        if not is_guilty:
            excused.add((n, a))
            continue
        worst[n] = min(worst[n], score)
        if step[n] < 0:
            step[n], agent[n] = t, a
    return Event(torch.tensor(worst, dtype=torch.float64), torch.tensor(step, dtype=torch.int64), torch.tensor(agent, dtype=torch.int64))


def no_at_fault_collision(states: Float[Tensor, "N 41 11"], agents: Agents, areas: Areas) -> Event:
    """NC: 0 after an at-fault contact with a vehicle, pedestrian or bicycle, 0.5 with an object.

    navsim pdm_scorer.py _calculate_no_at_fault_collision, pdm_scorer_utils.py get_collision_type.
    """
    ego = footprints(states)
    contact = contacts(ego, agents.corners[:, :STEPS], agents.valid[:, :STEPS]).nonzero()
    n, t, a = contact.unbind(-1)
    driving = ego_speed(states[n, t]) > STANDING_SPEED
    behind = relative_angle(states[n, t, :3], agents.centroids[a, t]) > BEHIND
    frontal = segments_touch_quads(ego[n, t, 0], ego[n, t, 3], agents.corners[a, t])
    at_fault = driving & (agents.standing[a] | (~behind & (frontal | areas.out_of_lane[n, t])))
    return judge(len(states), contact, at_fault, torch.where(agents.moving_kind[a], 0.0, 0.5))


def time_to_collision_within_bound(states: Float[Tensor, "N 41 11"], agents: Agents, areas: Areas, steps: int) -> Event:
    """TTC: 0 if the ego, moved ahead by up to 0.9 s from one of the first `steps` steps, touches an agent in its way.

    navsim pdm_scorer.py _calculate_ttc. An agent that is touched beside or behind is excused, so that hides a later
    frontal contact.
    """
    found = projected_contacts(states[:, :steps], agents.corners, agents.valid).nonzero()  # by candidate, step, offset, agent
    n, t, i, a = found.unbind(-1)
    angle = relative_angle(states[n, t, :3], agents.centroids[a, t + torch.tensor(TTC_OFFSETS)[i]])
    exposed = (areas.out_of_lane | areas.rear_axle_in_intersection)[n, t]
    in_the_way = (angle < AHEAD) | (exposed & ~(angle > BEHIND))
    return judge(len(states), found[:, [0, 1, 3]], in_the_way, torch.zeros(len(found)))


def drivable_area_compliance(areas: Areas) -> Float[Tensor, " N"]:
    """DAC: 0 if off the road at any step (navsim pdm_scorer.py _calculate_drivable_area_compliance)."""
    return (~areas.off_road.any(-1)).double()


def oncoming_metres(states: Float[Tensor, "N 41 11"], counted: Bool[Tensor, "N 41"]) -> Float[Tensor, " N"]:
    """Most metres driven in counted steps within 11 steps (1.1 s; the devkit's slice is one longer than its 1 s)."""
    moved = torch.zeros(states.shape[:2], dtype=torch.float64)
    moved[:, 1:] = length_of(centres(states).diff(dim=1))
    moved = torch.where(counted, moved, 0.0)
    windows = [moved[:, max(0, t - OFF_ROUTE_WINDOW) : t + 1].sum(-1) for t in range(moved.shape[1])]
    return torch.stack(windows, -1).amax(-1)


def driving_direction_compliance(metres: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """DDC: 1 below 2 m off the route, 0.5 below 6 m, else 0 (navsim pdm_scorer.py _calculate_driving_direction_compliance)."""
    half, none = OFF_ROUTE_LIMITS
    return torch.where(metres < half, 1.0, torch.where(metres < none, 0.5, 0.0)).double()


def first_red_light(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Bool[Tensor, "N 41"]:
    """The first step at which the ego box touches a connector whose light is red, wherever the ego started.

    navsim pdm_scorer.py _calculate_traffic_light_compliance; there is no stop line.
    """
    ego = footprints(states)
    touch = boxes_touch_polygons(ego.flatten(0, 1), *polygons_of(scene, scene.light_polygon))
    red = (touch.unflatten(0, ego.shape[:2]) & scene.light_red.T).any(-1)
    return red & (red.cumsum(-1) == 1)


def polygons_of(scene: Scene, chosen: Int[Tensor, " Q"]) -> tuple[Float[Tensor, "V 2"], Int[Tensor, " R+1"], Int[Tensor, " Q+1"]]:
    """Vertices, point offsets and ring offsets of chosen polygons of a scene of one."""
    polygons = list(polygon_rings(scene.points, scene.point_offsets, scene.ring_offsets))
    selected = [polygons[p] for p in chosen.tolist()]
    rings = [ring for polygon in selected for ring in polygon]
    vertices = torch.cat([*rings, torch.zeros(0, 2, dtype=torch.float64)])
    return vertices, offsets_from([len(ring) for ring in rings]), offsets_from([len(polygon) for polygon in selected])


def offsets_from(sizes: list[int]) -> Int[Tensor, " K+1"]:
    return torch.tensor([0, *sizes]).cumsum(0)


def longest_off_centre_run(scene: Scene, states: Float[Tensor, "N 41 11"], areas: Areas) -> Int[Tensor, " N"]:
    """Longest run of steps more than 0.5 m off the centreline (navsim pdm_scorer.py _calculate_lane_keeping).

    Steps in an intersection neither lengthen nor end a run.
    """
    _, distance = project(centres(states).flatten(0, 1), scene.centerline[:, :2])
    off_centre = (distance > OFF_CENTRE_LIMIT).unflatten(0, states.shape[:2])
    longest = []
    for flags, skipped in zip(off_centre.tolist(), areas.centre_in_intersection.tolist(), strict=True):
        run = best = 0
        for off, skip in zip(flags, skipped, strict=True):
            if skip:
                continue
            run = run + 1 if off else 0
            best = max(best, run)
        longest.append(best)
    return torch.tensor(longest, dtype=torch.int64)


def progress_along(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Float[Tensor, " N"]:
    """Metres along the centreline from first to last step, not below 0 (navsim pdm_scorer.py _calculate_progress)."""
    ends = centres(states[:, [0, -1]])
    along, _ = project(ends.flatten(0, 1), scene.centerline[:, :2])
    start, end = along.unflatten(0, ends.shape[:2]).unbind(-1)
    return (end - start).clamp(min=0.0)


def ego_progress(progress: Tensor, multiplier: Tensor, reference: Tensor) -> Float[Tensor, " N"]:
    """EP: progress over the best collision-free, lawful progress of candidate and reference; 1 if that is at most 5 m.

    navsim pdm_scorer.py _aggregate_pdm_scores. The candidate's own violations count below the line only.
    """
    best = torch.maximum(progress * multiplier, reference)
    return torch.where(best > PROGRESS_THRESHOLD, (progress / best).clamp(0.0, 1.0), 1.0)
