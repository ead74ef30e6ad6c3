"""A metric cache as the devkit pickles it, made from classes of the same names and attributes."""

from __future__ import annotations

import itertools
import lzma
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import openscene
import pytest
import shapely
import torch

import irlvla
from irlvla import FileError, Scene
from irlvla.shards import with_reference
from irlvla_navsim.caches import find_caches, read_cache
from irlvla_navsim.dataset import MetricCacheDataset, NavsimDataset

NAMES = {
    "navsim.planning.metric_caching.metric_cache": ["MetricCache"],
    "navsim.common.dataclasses": ["Trajectory"],
    "navsim.planning.simulation.planner.pdm_planner.observation.pdm_observation": ["PDMObservation"],
    "navsim.planning.simulation.planner.pdm_planner.observation.pdm_occupancy_map": ["PDMOccupancyMap", "PDMDrivableMap"],
    "navsim.planning.simulation.planner.pdm_planner.utils.pdm_path": ["PDMPath"],
    "nuplan.common.actor_state.ego_state": ["EgoState"],
    "nuplan.common.actor_state.car_footprint": ["CarFootprint"],
    "nuplan.common.actor_state.dynamic_car_state": ["DynamicCarState"],
    "nuplan.common.actor_state.state_representation": ["StateSE2", "StateVector2D", "TimePoint"],
    "nuplan.common.actor_state.oriented_box": ["OrientedBox"],
    "nuplan.common.actor_state.agent": ["Agent"],
    "nuplan.common.actor_state.scene_object": ["SceneObjectMetadata"],
    "nuplan.common.actor_state.tracked_objects": ["TrackedObjects"],
    "nuplan.common.actor_state.tracked_objects_types": ["TrackedObjectType"],
    "nuplan.common.maps.maps_datatypes": ["SemanticMapLayer"],
    "nuplan.planning.simulation.observation.observation_type": ["DetectionsTracks"],
    "nuplan.planning.simulation.trajectory.interpolated_trajectory": ["InterpolatedTrajectory"],
}
REDUCED = {
    "PDMOccupancyMap",
    "PDMDrivableMap",
    "PDMPath",
    "InterpolatedTrajectory",
    "TrackedObjectType",
    "SemanticMapLayer",
}  # by arguments
SLOTTED = {"StateSE2": ("x", "y", "heading"), "TimePoint": ("time_us",), "StateVector2D": ("_x", "_y")}


@pytest.fixture
def devkit(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes under the devkit's names, which pickle as its own do."""
    found = types.SimpleNamespace()
    for module, names in NAMES.items():
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        made = sys.modules[module]
        for name in names:
            cls = _class(name, module)
            setattr(made, name, cls)
            setattr(found, name, cls)
    return found


def _class(name: str, module: str) -> type:
    def initialise(self: Any, *arguments: Any, **attributes: Any) -> None:
        if name in REDUCED:
            self.arguments = arguments
        for key, value in {**dict(zip(SLOTTED.get(name, ()), arguments, strict=False)), **attributes}.items():
            setattr(self, key, value)

    body: dict[str, Any] = {"__init__": initialise, "__module__": module}
    if name in SLOTTED:
        body["__slots__"] = SLOTTED[name]
    if name in REDUCED:
        body["__reduce__"] = lambda self: (type(self), self.arguments)
    return type(name, (), body)


def cache_of(scene: Scene, d: types.SimpleNamespace) -> Any:
    """The cache that the devkit would have written of a scene."""

    def state(row: torch.Tensor, time_us: int) -> Any:
        x, y, heading, vx, vy, ax, ay = row[:7].tolist()
        centre = d.StateSE2(x + 1.461 * np.cos(heading), y + 1.461 * np.sin(heading), heading)
        motion = d.DynamicCarState(
            _rear_axle_velocity_2d=d.StateVector2D(vx, vy),
            _rear_axle_acceleration_2d=d.StateVector2D(ax, ay),
            _angular_velocity=0.0,
            _angular_acceleration=0.0,
            _tire_steering_rate=0.0,
        )
        footprint = d.CarFootprint(_center=centre)
        return d.EgoState(_car_footprint=footprint, _dynamic_car_state=motion, _tire_steering_angle=0.0, _time_point=d.TimePoint(time_us))

    def tracks(step: int) -> Any:
        things = []
        for agent, name in enumerate(scene.agent_token):
            if scene.agent_valid[agent, step]:
                x, y, heading, vx, vy = scene.agent_state[agent, step].tolist()
                length, width = scene.agent_size[agent].tolist()
                box = d.OrientedBox(_center=d.StateSE2(x, y, heading), _length=length, _width=width, _height=1.5)
                about = d.SceneObjectMetadata(track_token=name, token=name)
                kind = d.TrackedObjectType((int(scene.agent_kind[agent]), "name"))
                things.append(d.Agent(_metadata=about, _tracked_object_type=kind, _box=box, _velocity=d.StateVector2D(vx, vy)))
        return d.DetectionsTracks(tracked_objects=d.TrackedObjects(tracked_objects=things))

    points, bounds = scene.points.numpy(), scene.point_offsets.tolist()
    shapes = np.array([shapely.Polygon(points[a:b]) for a, b in itertools.pairwise(bounds)], dtype=object)
    names = [str(row) for row in range(len(shapes))]
    light = scene.light_polygon.item()
    maps = []
    for step in range(41):
        red = [light] if scene.light_red[0, step] else []
        maps.append(d.PDMOccupancyMap([f"red_light_{row}" for row in red], shapes[red], 10))
    reference = torch.cat([scene.reference[0], torch.zeros(41, 4)], dim=1)
    past = [state(torch.cat([row, torch.zeros(3)]), int(t)) for row, t in zip(scene.history[0], scene.history_time_us[0], strict=True)]
    return d.MetricCache(
        ego_state=state(scene.ego[0], scene.time_us.item()),
        trajectory=d.InterpolatedTrajectory([state(row, 0) for row in reference]),
        human_trajectory=d.Trajectory(poses=scene.human[0].numpy()),
        past_human_trajectory=d.InterpolatedTrajectory(past),
        centerline=d.PDMPath([d.StateSE2(*pose) for pose in scene.centerline.tolist()]),
        route_lane_ids=[name for name, on in zip(names, scene.polygon_on_route.tolist(), strict=True) if on],
        drivable_area_map=d.PDMDrivableMap(names, [d.SemanticMapLayer(layer) for layer in scene.polygon_layer.tolist()], shapes, 10),
        observation=d.PDMObservation(_occupancy_maps=maps),
        current_tracked_objects=[tracks(0)],
        future_tracked_objects=[tracks(step) for step in range(1, 41)],
    )


def test_a_cache_scores_as_the_scene_that_it_is_of(devkit: types.SimpleNamespace, tmp_path: Path) -> None:
    openscene.write_map(tmp_path / "maps")
    openscene.write_log(tmp_path / "logs")
    config = NavsimDataset.Config(logs=tmp_path / "logs", maps=tmp_path / "maps", windows={"frame_interval": 1})
    scene = with_reference(NavsimDataset(config).record(2).scene)
    path = tmp_path / "caches" / "log" / "unknown" / scene.token[0] / "metric_cache.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lzma.compress(pickle.dumps(cache_of(scene, devkit)), preset=0))
    assert find_caches(tmp_path / "caches") == [path]
    read = read_cache(path)
    assert read.token == scene.token
    assert torch.equal(read.agent_valid, scene.agent_valid[:, :41])
    assert torch.allclose(read.ego, scene.ego, atol=1e-9)
    assert torch.equal(read.light_red, scene.light_red)
    plans = scene.human[:, None].repeat(1, 4, 1, 1)
    plans[0, 1, :, 1] += torch.linspace(0, 6, 8)
    plans[0, 2, :, 0] *= 2.0
    plans[0, 3] = 0.0
    expected, found = irlvla.epdms(scene, plans), irlvla.epdms(read, plans)
    assert torch.allclose(found.values, expected.values, atol=1e-6, equal_nan=True)
    assert (expected.values < 1).any()
    dataset = MetricCacheDataset(MetricCacheDataset.Config(path=tmp_path / "caches"))
    assert dataset[0][1].token == scene.token


def test_other_pickles_are_no_caches(tmp_path: Path) -> None:
    path = tmp_path / "metric_cache.pkl"
    path.write_bytes(lzma.compress(pickle.dumps({"a": 1})))
    with pytest.raises(FileError, match="is no metric cache"):
        read_cache(path)
    path.write_bytes(lzma.compress(pickle.dumps({"a": 1}))[:-5])
    with pytest.raises(FileError, match="is damaged"):
        read_cache(path)
    with pytest.raises(FileError, match="holds no metric caches"):
        find_caches(tmp_path)
