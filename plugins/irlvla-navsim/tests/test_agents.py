"""Agents of NAVSIM drive here, and get what the devkit gives them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import agents_for_tests
import numpy as np
import openscene
import pytest
import torch

import irlvla
from irlvla import ConfigError, ContractError, FileError, InputError
from irlvla.testing import example_features, example_observation, planner_checks
from irlvla_navsim.agents import NavsimAgentPlanner
from irlvla_navsim.clouds import read_cloud
from irlvla_navsim.dataset import NavsimDataset
from irlvla_navsim.inputs import Camera

LOG = "2021.05.12.22.00.38_veh-35_01008_01518"
SAMPLING = {"_target_": "agents_for_tests.TrajectorySampling", "time_horizon": 4.0, "interval_length": 0.5}

test_planner = planner_checks("navsim_agent", agent="agents_for_tests:ConstantVelocityAgent")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openscene")
    openscene.write_map(root / "maps")
    openscene.write_log(root / "logs", 20, LOG)
    openscene.write_images(root / "sensors", openscene.frames(20, LOG))
    openscene.write_synthetic(root / "scenes", "a" * 17, 9, 0.5, LOG)
    return root


def planner(name: str = "ConstantVelocityAgent", settings: dict[str, Any] | None = None, **folders: Path) -> NavsimAgentPlanner:
    config = NavsimAgentPlanner.Config(agent=f"agents_for_tests:{name}", settings=settings or {}, **folders)
    return NavsimAgentPlanner(config, width=8)


def windows(root: Path, **settings: Any) -> NavsimDataset:
    given = {"logs": root / "logs", "maps": root / "maps", "sensors": root / "sensors", "windows": {"frame_interval": 1}, **settings}
    return NavsimDataset(NavsimDataset.Config(**given))


def features(*observations: irlvla.Observation) -> irlvla.Features:
    return irlvla.Features(irlvla.Observation.cat(observations))


# -- driving -----------------------------------------------------------------------------------------------------------


def test_the_constant_velocity_agent_drives_as_our_own() -> None:
    given = example_features(5, 8)
    own = irlvla.registry.build("planner", "constant_velocity", width=8).sample(given, 2)
    plan = planner().sample(given, 2)
    assert plan.poses.shape == (5, 2, 8, 3)
    assert plan.dt == 0.5
    torch.testing.assert_close(plan.poses, own.poses)


def test_other_samplings_drive_too() -> None:
    fine = {"trajectory_sampling": {**SAMPLING, "interval_length": 0.1}}
    plan = planner(settings=fine).sample(example_features(2, 8), 1)
    assert plan.poses.shape == (2, 1, 40, 3)
    assert plan.dt == 0.1


def test_a_learning_agent_sees(root: Path) -> None:
    """The same from the data, as recorded, and from what policies see, where the images are of one colour each."""
    settings = {"width": 16, "trajectory_sampling": SAMPLING}
    obs = [windows(root, size=(54, 96))[i][0] for i in (0, 3)]
    seen = planner("SeeingAgent", settings).sample(features(*obs), 1)
    read = planner("SeeingAgent", settings, logs=root / "logs", sensors=root / "sensors").sample(features(*obs), 1)
    torch.testing.assert_close(seen.poses, read.poses, atol=0.3, rtol=0.05)  # an undistorted image has dark corners
    assert not torch.equal(read.poses[0], read.poses[1])
    again = planner("SeeingAgent", settings, logs=root / "logs", sensors=root / "sensors").sample(features(obs[1]), 1)
    assert torch.equal(again.poses[0], read.poses[1])


def test_a_checkpoint_is_the_agents_own_affair(root: Path, tmp_path: Path) -> None:
    agent = agents_for_tests.SeeingAgent(4, agents_for_tests.TrajectorySampling())
    torch.save(agent.state_dict(), tmp_path / "agent.ckpt")
    settings = {"width": 4, "trajectory_sampling": SAMPLING, "checkpoint_path": str(tmp_path / "agent.ckpt")}
    made = planner("SeeingAgent", settings, logs=root / "logs", sensors=root / "sensors")
    assert torch.equal(made.agents[0].net[0].weight, agent.net[0].weight)
    assert list(made.parameters()) == []


# -- what it is given --------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_recorded(root: Path) -> None:
    sensors = {"cam_f0": True, "cam_b0": [3]}
    planner("RecordingAgent", {"sensors": sensors}, logs=root / "logs", sensors=root / "sensors").sample(features(windows(root)[2][0]), 1)
    given, raws = agents_for_tests.RecordingAgent.given, openscene.frames(20, LOG)[2:6]
    assert [len(given.ego_statuses), len(given.cameras), len(given.lidars)] == [4, 4, 4]
    for row, (status, raw) in enumerate(zip(given.ego_statuses, raws, strict=True)):
        np.testing.assert_allclose(status.ego_pose, [4.0 * (row - 3), 0.0, 0.0], atol=1e-4)
        assert status.ego_velocity.tolist() == pytest.approx(raw["ego_dynamic_state"][:2])
        assert status.ego_acceleration.tolist() == pytest.approx(raw["ego_dynamic_state"][2:])
        assert status.driving_command.tolist() == raw["driving_command"].tolist()
        assert (status.ego_pose.dtype, status.ego_velocity.dtype, status.in_global_frame) == (np.float32, np.float32, False)
        camera = given.cameras[row].cam_f0
        assert camera.image.shape == (54, 96, 3)
        assert camera.image[0, 0, 0] == pytest.approx(10 * (row + 2), abs=2)
        np.testing.assert_array_equal(camera.intrinsics, raw["cams"]["CAM_F0"]["cam_intrinsic"])
        np.testing.assert_array_equal(camera.distortion, raw["cams"]["CAM_F0"]["distortion"])
        assert given.cameras[row].cam_l0 == Camera()
        assert (given.cameras[row].cam_b0.image is not None) == (row == 3)
        assert given.lidars[row].lidar_pc is None


def test_synthetic_scenes_are_read_too(root: Path) -> None:
    folders = {"scenes": root / "scenes", "scene_sensors": root / "sensors"}
    made = planner("RecordingAgent", {"sensors": {"cam_f0": [3]}}, **folders)
    obs = example_observation(1, cameras=0)
    made.sample(features(type(obs)(("a" * 17,), obs.ego, obs.command)), 1)
    given = agents_for_tests.RecordingAgent.given
    np.testing.assert_allclose(given.ego_statuses[0].ego_pose, [-12.0, 0.0, 0.0], atol=1e-4)
    assert given.cameras[3].cam_f0.image[0, 0, 0] == pytest.approx(90, abs=2)
    with pytest.raises(FileError, match="is neither in the logs nor among the synthetic scenes"):
        made.sample(features(obs), 1)


def test_point_clouds(tmp_path: Path) -> None:
    header = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z intensity lidar_info ring\nSIZE 4 4 4 1 1 2\nTYPE F F F U U U\nCOUNT 1 1 1 1 1 1\n"
        "WIDTH 2\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 2\nDATA binary\n"
    )
    body = struct.pack("<3fBBH", 1.0, 2.0, 3.0, 200, 4, 17) + struct.pack("<3fBBH", -1.0, 0.5, 0.25, 7, 1, 31)
    path = tmp_path / "cloud.pcd"
    path.write_bytes(header.encode() + body)
    cloud = read_cloud(path)
    assert cloud.dtype == np.float32
    assert cloud.T.tolist() == [[1.0, 2.0, 3.0, 200.0, 17.0, 4.0], [-1.0, 0.5, 0.25, 7.0, 31.0, 1.0]]
    path.write_bytes(header.encode() + body[:-3])
    with pytest.raises(FileError, match=r"cloud\.pcd is no binary point cloud"):
        read_cloud(path)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("NoAgent", {}, ConfigError, "agent agents_for_tests:NoAgent cannot be imported: AttributeError"),
        ("NotAnAgent", {}, ContractError, r"agent agents_for_tests:NotAnAgent has no method initialize\(\)"),
        ("FailingAgent", {"width": 3}, ConfigError, "agent agents_for_tests:FailingAgent cannot be built from .*unexpected keyword"),
        ("FailingAgent", {"how": "initialize"}, ConfigError, r"initialize\(\) fails: FileNotFoundError: weights\.ckpt"),
        ("FailingAgent", {"how": "scene"}, ContractError, "FailingAgent requires the truth of the scene"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        planner(name, settings)


def test_an_agent_of_the_devkit_needs_it() -> None:
    with pytest.raises(ConfigError, match="It is written for the devkit, which is not installed here"):
        NavsimAgentPlanner(NavsimAgentPlanner.Config(agent="navsim.agents.constant_velocity_agent.ConstantVelocityAgent"), width=8)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", InputError, "agent agents_for_tests:FailingAgent fails in scene .*: KeyError: 'bev'"),
        ("nan", InputError, "agent agents_for_tests:FailingAgent returns poses that are NaN or infinite in scene"),
        ("shape", ContractError, r"must return poses of shape \(T, 3\), got \(8, 2\)"),
        ("type", ContractError, "must return a Trajectory, .* it returns dict"),
    ],
)
def test_what_it_does_wrong_is_told(how: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        planner("FailingAgent", {"how": how}).sample(example_features(1, 8), 1)


def test_sensors_that_are_not_there_are_told(root: Path) -> None:
    blind = features(windows(root)[0][0])
    with pytest.raises(InputError, match="the agent wants cam_f0; give the data a size, or the agent logs and sensors"):
        planner("RecordingAgent", {"sensors": {"cam_f0": True}}).sample(blind, 1)
    with pytest.raises(InputError, match="the agent wants the lidar, which is read from the data alone"):
        planner("RecordingAgent", {"sensors": {"lidar_pc": [3]}}).sample(blind, 1)
    with pytest.raises(FileError, match="the agent wants cam_f0, and its folder of sensors is not set"):
        planner("RecordingAgent", {"sensors": {"cam_f0": True}}, logs=root / "logs").sample(blind, 1)
    with pytest.raises(FileError, match="holds no log"):
        planner(logs=root / "maps")
