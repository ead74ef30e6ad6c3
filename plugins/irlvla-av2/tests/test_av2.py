"""The recorded logs, end to end: replaying the drive scores full marks, and what is done to it fails for the right reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pytest
import torch
from PIL import Image

import irlvla
from irlvla import FileError, Layer, Scene
from irlvla.records import Record
from irlvla.shards import with_reference
from irlvla_av2.dataset import Av2Dataset
from irlvla_av2.logs import RING
from irlvla_av2.roads import read_roads

HERE = Path(__file__).resolve()
DATA = Path(os.environ.get("IRLVLA_REAL_DATA", HERE.parents[4] / "shared" / "real")) / "argoverse2_logs"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA} (set IRLVLA_REAL_DATA to another place)")

NC, DAC, DDC = range(3)


def dataset(path: Path = DATA, **settings: object) -> Av2Dataset:
    return Av2Dataset(Av2Dataset.Config(path=path, **settings))


@pytest.fixture(scope="module")
def scenes() -> Scene:
    windows = dataset()
    return with_reference(Record.cat([windows.record(index) for index in range(len(windows))]).scene)


def moved(plan: torch.Tensor, sideways: float) -> torch.Tensor:
    """The plan, moved to the left by a distance that grows over the first second."""
    share = torch.linspace(0.5, 4.0, plan.shape[1], dtype=plan.dtype).clamp(max=1.0)
    heading = plan[..., 2]
    return plan + torch.stack([-heading.sin(), heading.cos(), torch.zeros_like(heading)], -1) * (sideways * share)[:, None]


def test_replay_scores_full_marks(scenes: Scene) -> None:
    """In every window: without a collision, on the road, the right way round."""
    result = irlvla.epdms(scenes, scenes.human, human_filter="none")
    assert len(scenes) == 38
    assert (result.values[:, [NC, DAC, DDC]] == 1.0).all()
    assert result.tlc.eq(1.0).all()


@pytest.mark.parametrize("side", [4.0, -4.0])
def test_sideways_leaves_the_lane(scenes: Scene, side: float) -> None:
    """4 m to a side: into what stands there, off the road, off the route, or off the middle of the lane, and the details say which.

    Not everywhere: in an intersection there are no lanes to keep, and at walking pace a car does not get there in 4 s.
    """
    driving = scenes[(scenes.human[:, -1, 0] > 8.0).nonzero().squeeze(1)]
    result = irlvla.epdms(driving, moved(driving.human, side), human_filter="none", details=True)
    why = result.details
    assert ((result.nc < 1) == (why.collision_step >= 0)).all()
    assert ((result.dac < 1) == why.off_road.any(-1)).all()
    assert ((result.ddc < 1) == (why.oncoming_metres >= 2.0)).all()
    assert ((result.lk < 1) == (why.off_centre_steps >= 20)).all()
    wrong = (result.nc < 1) | (result.dac < 1) | (result.ddc < 1) | (result.lk < 1)
    assert wrong.sum() >= 5


def test_through_the_leader(scenes: Scene) -> None:
    """Straight on at 15 m/s runs into the vehicle ahead, and the collision names it."""
    hits = 0
    for index in range(len(scenes)):
        scene = scenes[index]
        ahead = _leader(scene)
        if ahead is None:
            continue
        plan = torch.zeros(1, 8, 3, dtype=torch.float64)
        plan[0, :, 0] = torch.arange(1, 9) * 0.5 * 15.0
        result = irlvla.epdms(scene, plan, human_filter="none", details=True)
        if result.details.collision_agent.item() == ahead:
            assert result.nc.item() == 0.0
            assert result.ttc.item() == 0.0
            hits += 1
    assert hits >= 3


def _leader(scene: Scene) -> int | None:
    """The nearest vehicle straight ahead, in the way for the whole second."""
    state = scene.in_ego_frame(scene.agent_state[None, :, 0, :3])[0]
    vehicle = (scene.agent_kind == irlvla.Kind.VEHICLE) & scene.agent_valid[:, :10].all(1)
    way = vehicle & (state[:, 0] > 4.0) & (state[:, 0] < 30.0) & (state[:, 1].abs() < 0.5)
    return int(torch.where(way, state[:, 0], torch.inf).argmin()) if way.any() else None


def test_double_speed(scenes: Scene) -> None:
    """Twice as far: nowhere better, and where it runs into something that is what the collision says."""
    driving = scenes[(scenes.human[:, -1, 0] > 8.0).nonzero().squeeze(1)]
    result = irlvla.epdms(driving, driving.human * torch.tensor([2.0, 2.0, 1.0]), human_filter="none", details=True)
    replay = irlvla.epdms(driving, driving.human, human_filter="none")
    assert (result.details.progress > 8.0).all()
    assert result.score().mean() < replay.score().mean() - 0.2
    assert (result.hc == 0).any()


def test_map_of_a_window(scenes: Scene) -> None:
    """Every window has lanes of its route under the car and a centreline that leads on."""
    for index in range(len(scenes)):
        scene = scenes[index]
        layers = set(scene.polygon_layer[scene.polygon_on_route].tolist())
        assert layers <= {Layer.LANE, Layer.LANE_CONNECTOR}
        assert layers
        line = scene.centerline[:, :2]
        assert torch.linalg.vector_norm(line.diff(dim=0), dim=1).max() < 3.0
        assert torch.linalg.vector_norm(line - scene.ego[0, :2], dim=1).min() < 3.0


def test_items_are_in_the_ego_frame() -> None:
    windows = dataset(every=40)
    obs, scene, human = windows[0]
    assert obs.ego.shape == (1, 4, 8)
    assert obs.ego[0, -1, :3].tolist() == [0.0, 0.0, 0.0]
    assert human.poses.shape == (1, 8, 3)
    assert windows[-1][1].token != scene.token
    with pytest.raises(IndexError, match="there is none at 99"):
        windows[99]


def test_cameras(tmp_path: Path) -> None:
    """A log with the recorded calibration and made images: the nearest image of each ring camera, with its lens."""
    log = tmp_path / "log"
    shutil.copytree(DATA / "evaluation/detection/data/adcf7d18-0510-35b0-a2fa-b4cea13a6d76", log)
    shutil.copytree(next(DATA.glob("test_data/sensor/val/*/calibration")), log / "calibration")
    stamps = sorted(set(pyarrow.feather.read_table(log / "annotations.feather")["timestamp_ns"].to_pylist()))
    for name in RING:
        folder = log / "sensors" / "cameras" / name
        folder.mkdir(parents=True)
        size = (155, 204) if name == "ring_front_center" else (204, 155)
        for stamp in stamps[::5]:
            Image.new("RGB", size, (stamp % 251, 0, 0)).save(folder / f"{stamp + 7_000_000}.jpg")
    record = dataset(tmp_path).record(0)
    assert record.cameras.split(",") == list(RING)
    assert all((tmp_path / path).is_file() for path in record.image_path)
    assert record.intrinsics.shape == (1, 7, 3, 3)
    forward = record.camera_to_ego[0, :, :3, 2]
    assert forward[0, 0] > 0.99  # the front camera looks ahead, the rear ones back
    assert (forward[[3, 4], 0] < 0).all()
    obs, *_ = dataset(tmp_path, size=(64, 96))[0]
    assert obs.images.shape == (1, 7, 3, 64, 96)


@pytest.mark.parametrize("name", ["city_SE3_egovehicle.feather", "annotations.feather", "map"])
def test_damaged_logs_say_what_is_wrong(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log"
    shutil.copytree(DATA / "evaluation/detection/data/adcf7d18-0510-35b0-a2fa-b4cea13a6d76", log)
    windows = dataset(tmp_path)
    path = log / name if name != "map" else next(log.glob("map/log_map*"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileError, match=path.name):
        windows.record(0)


def test_no_logs(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no Argoverse 2 log"):
        dataset(tmp_path)
    (tmp_path / "argoverse").mkdir()
    with pytest.raises(FileError, match="'argoverse'"):
        dataset(tmp_path / "argovers")


def test_logs_behind_links(tmp_path: Path) -> None:
    for log in dataset().logs:
        (tmp_path / log.name).symlink_to(log)
    assert [log.name for log in dataset(tmp_path).logs] == sorted(log.name for log in dataset().logs)


def test_roads_of_recorded_maps() -> None:
    """Lanes lie in the drivable area, and their middles in themselves."""
    for path in DATA.rglob("log_map_archive_*.json"):
        roads = read_roads(path)
        assert roads.lanes
        for lane in roads.lanes.values():
            assert np.isfinite(lane.centerline).all()
            assert lane.polygon.is_valid
