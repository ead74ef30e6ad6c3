"""Logs, maps and synthetic scenes that the tests write in the official formats, read back field by field."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openscene
import pytest
import shapely
import torch
from PIL import Image

import irlvla
from irlvla import FileError, Layer, Scene
from irlvla.records import Record
from irlvla.shards import Shards, ShardWriter, with_reference
from irlvla_navsim.dataset import NavsimDataset
from irlvla_navsim.frames import read_log
from irlvla_navsim.maps import find_map, read_map
from irlvla_navsim.pickles import read_pickle
from irlvla_navsim.routes import corrected
from irlvla_navsim.scenes import Window, make_scene
from irlvla_navsim.splits import SPLITS, read_filter, read_split

PRESENT = 5  # frame index of the scene that most tests look at


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openscene")
    openscene.write_map(root / "maps")
    openscene.write_log(root / "logs")
    return root


def dataset(root: Path, **settings: Any) -> NavsimDataset:
    settings = {"logs": root / "logs", "maps": root / "maps", "windows": {"frame_interval": 1}, **settings}
    return NavsimDataset(NavsimDataset.Config(**settings))


@pytest.fixture(scope="module")
def scene(root: Path) -> Scene:
    return dataset(root).record(PRESENT - 3).scene


# -- windows -----------------------------------------------------------------------------------------------------------


def test_windows_are_cut_as_the_devkit_does(root: Path) -> None:
    """Of 20 frames, windows of 4 + 10: one, without overlap; seven, one frame apart. A scene is named after its present frame."""
    assert len(dataset(root, windows={})) == 1
    windows = dataset(root)
    assert len(windows) == 7
    assert [windows.record(index).scene.token[0] for index in (0, 6)] == [f"{3:016x}", f"{9:016x}"]
    assert len(dataset(root, windows={"frame_interval": 1, "max_scenes": 2})) == 2
    assert len(dataset(root, windows={"frame_interval": 1, "tokens": [f"{4:016x}", f"{99:016x}"]})) == 1


def test_filters_of_the_devkit(root: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "navtest.yaml"
    yaml.write_text(
        "_target_: navsim.common.dataclasses.SceneFilter\n_convert_: 'all'\nnum_history_frames: 4\nnum_future_frames: 10\n"
        f"frame_interval: 1\nhas_route: true\nmax_scenes: null\nlog_names:\n- '{next((root / 'logs').glob('*.pkl')).stem}'\n"
        f"tokens:\n- '{4:016x}'\ninclude_synthetic_scenes: false\n"
    )
    assert read_filter(yaml).tokens == frozenset({f"{4:016x}"})
    assert len(dataset(root, filter=yaml)) == 1
    with pytest.raises(FileError, match=r"navtst.yaml does not exist. Did you mean 'navtest.yaml'"):
        read_filter(tmp_path / "navtst.yaml")
    with pytest.raises(irlvla.ConfigError, match="holds no log"):
        dataset(root, windows={"log_names": ["another"]})
    with pytest.raises(FileError, match="no window"):
        dataset(root, windows={"num_future_frames": 40})


def test_official_splits(root: Path) -> None:
    """Their sizes are those that NAVSIM publishes."""
    sizes = {name: (len(read_split(name).tokens or ()), len(read_split(name).log_names or ())) for name in SPLITS}
    assert sizes == {
        "navtrain": (103288, 1192),
        "navtrain_train": (103288, 978),  # of which those of its logs
        "navtrain_val": (103288, 214),
        "navtest": (12146, 136),
        "navmini": (396, 62),
        "navhard_two_stage": (450, 76),
        "warmup_two_stage": (16, 7),
    }
    assert read_split("navtest").length == 14
    assert read_split("navhard_two_stage").num_future_frames == 8
    assert read_split("navmini").frame_interval is None
    with pytest.raises(irlvla.ConfigError, match="give one of them"):
        dataset(root, split="navtest", filter="x.yaml")
    with pytest.raises(irlvla.ConfigError, match="holds no log"):
        dataset(root, split="navtest")


# -- fields ------------------------------------------------------------------------------------------------------------


def test_the_car(scene: Scene) -> None:
    x = openscene.ORIGIN[0] - 40.0 + openscene.SPEED * 0.5 * PRESENT
    assert scene.ego[0].tolist() == pytest.approx([x, openscene.ORIGIN[1] - 1.8, 0.0, 8.0, 0.0, 0.1, -0.05, 0, 0, 0, 0])
    stamps = [openscene.frames(PRESENT + 1)[row]["timestamp"] for row in range(PRESENT - 3, PRESENT + 1)]
    assert scene.history_time_us[0].tolist() == stamps
    assert scene.time_us.item() == stamps[-1]
    assert scene.previous_time_us.item() == stamps[-2]
    assert scene.history[0, :, 0].tolist() == pytest.approx([x - 12, x - 8, x - 4, x])
    assert scene.previous_ego[0, 0].item() == pytest.approx(x - 4)
    expected = torch.zeros(8, 3, dtype=torch.float64)
    expected[:, 0] = torch.arange(1, 9) * 4.0
    assert torch.allclose(scene.human[0], expected, atol=1e-9)


def test_agents_at_ten_hertz(scene: Scene) -> None:
    """Between sightings linearly; absent before the first and after the last; on the map, not on the car."""
    assert scene.agent_token == ("ahead", "parked", "cone", "walking")  # the walker is hidden at t = 0
    state, valid = scene.agent_state, scene.agent_valid
    x = scene.ego[0, 0].item()
    gap = 25.0 + 0.5 * PRESENT
    for step in range(41):
        assert state[0, step, 0].item() == pytest.approx(x + gap + 9.0 * 0.1 * step, abs=1e-6)
    assert state[0, 0, 3:].tolist() == pytest.approx([9.0, 0.0])
    assert torch.allclose(state[1, :, 0], torch.tensor(openscene.ORIGIN[0] - 30.0, dtype=torch.float64))
    assert state[2, :, 3:].eq(0).all()
    assert valid[3].tolist() == [step >= 5 for step in range(51)]
    assert scene.agent_kind.tolist() == [irlvla.Kind.VEHICLE, irlvla.Kind.VEHICLE, irlvla.Kind.TRAFFIC_CONE, irlvla.Kind.PEDESTRIAN]
    assert scene.agent_size[0].tolist() == pytest.approx([4.6, 1.9])


def test_seen_once_stands_there_always(root: Path) -> None:
    """The devkit's rule, and that the fifth second does not change the first four."""
    frames = read_log(next((root / "logs").glob("*.pkl")))
    for seen_at in ([2], [8], [8, 9], [9]):
        changed = [
            frame if row - PRESENT in seen_at else _without(frame, "walking") for row, frame in enumerate(openscene_with_walker(frames))
        ]
        made = make_scene(Window(changed, PRESENT), read_map(find_map(root / "maps", openscene.CITY)))
        valid = made.agent_valid[made.agent_token.index("walking")].tolist()
        first_four = {(2,): True, (8,): True, (8, 9): True, (9,): False}[tuple(seen_at)]
        assert valid[:41] == [first_four] * 41
        assert any(valid[41:])


def openscene_with_walker(frames: list[Any]) -> list[Any]:
    """The frames, the walker in each of them."""
    walker = next(box for frame in frames for box in frame.boxes if box.track == "walking")
    return [dataclasses.replace(frame, boxes=(*_without(frame, "walking").boxes, walker)) for frame in frames]


def _without(frame: Any, track: str) -> Any:
    return dataclasses.replace(frame, boxes=tuple(box for box in frame.boxes if box.track != track))


def test_the_map_around(scene: Scene) -> None:
    layers = scene.polygon_layer.tolist()
    assert {layer: layers.count(layer) for layer in set(layers)} == {
        Layer.ROADBLOCK: 2,
        Layer.LANE: 4,
        Layer.LANE_CONNECTOR: 2,
        Layer.INTERSECTION: 1,
        Layer.CARPARK: 1,
    }
    on_lanes = [layer in (Layer.LANE, Layer.LANE_CONNECTOR) for layer in layers]
    assert scene.polygon_on_route.tolist() == on_lanes
    first, last = scene.point_offsets[0:2].tolist()
    corners = {tuple(np.round(point - openscene.ORIGIN, 3)) for point in scene.points[first:last].numpy()}
    assert corners == {(-60.0, -3.6), (-60.0, 3.6), (0.0, -3.6), (0.0, 3.6)}


def test_red_lights_of_the_route(scene: Scene) -> None:
    """Red at frames 4 to 6, that is from the start for a second: each frame holds for its half second."""
    assert scene.light_polygon.shape == (1,)
    assert scene.polygon_layer[scene.light_polygon].item() == Layer.LANE_CONNECTOR
    assert scene.light_red[0].tolist() == [step < 10 for step in range(41)]


def test_the_centreline(scene: Scene) -> None:
    """The right lane's, through the junction, to the end; joints appear twice, as in the devkit."""
    line = scene.centerline.numpy() - [*openscene.ORIGIN, 0.0]
    assert line[0] == pytest.approx([-60.0, -1.8, 0.0], abs=1e-3)
    assert line[-1] == pytest.approx([80.0, -1.8, 0.0], abs=1e-3)
    assert len(line) == 61 + 21 + 61
    assert scene.speed_limit.item() == 11.0


def test_it_scores(root: Path) -> None:
    """The drive of the log is flawless; onto the car park it is not; and with the light red at the junction it is not either."""
    windows = dataset(root)
    scenes = with_reference(Record.cat([windows.record(index) for index in range(len(windows))]).scene)
    result = irlvla.epdms(scenes, scenes.human, human_filter="none", pdms=True)
    assert result.values[:, [0, 1, 2, 5, 6]].eq(1).all()
    assert result.tlc[0] == 1
    off = scenes.human.clone()
    off[:, 2:, 1] = 9.0
    assert irlvla.epdms(scenes, off, human_filter="none").dac.eq(0).any()


def test_cameras(root: Path, tmp_path: Path) -> None:
    """Paths as recorded, mounts in the frame of the car; images are undistorted to pinhole ones."""
    windows = dataset(root, sensors=tmp_path, size=(64, 96), cameras=["CAM_F0", "CAM_B0"])
    record = windows.record(2)
    assert record.image_path[0] == f"log/CAM_F0/{PRESENT:016x}.jpg"
    assert record.camera_to_ego[0, 0, :3, 2].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert record.camera_to_ego[0, 7, :3, 2].tolist() == pytest.approx([-1.0, 0.0, 0.0])
    with pytest.raises(FileError, match="CAM_F0"):
        windows[2]
    for name in ("CAM_F0", "CAM_B0"):
        path = tmp_path / "log" / name / f"{PRESENT:016x}.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (1920, 1080), (200, 40, 40)).save(path)
    obs, *_ = windows[2]
    assert obs.images.shape == (1, 2, 3, 64, 96)
    assert obs.images[0, 0, 0].float().mean() > 150
    assert obs.command.item() == irlvla.Command.STRAIGHT


def test_shards_hold_the_scenes_as_they_are(root: Path, tmp_path: Path) -> None:
    windows = dataset(root)
    writer = ShardWriter(tmp_path, {"name": "navsim"}, 3)
    for index in range(len(windows)):
        writer.add(windows.record(index))
    writer.close()
    shards = Shards(tmp_path)
    for index in range(len(windows)):
        direct = with_reference(windows.record(index).scene)
        for (name, first), (_, second) in zip(shards[index].scene.tensors(), direct.tensors(), strict=True):
            assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1)), name


# -- routes ------------------------------------------------------------------------------------------------------------


def test_routes_are_corrected(root: Path) -> None:
    """A gap is filled, a car before the route is led to it, one that is on it stays."""
    city = read_map(find_map(root / "maps", openscene.CITY))
    pose = np.array([openscene.ORIGIN[0] - 30.0, openscene.ORIGIN[1] - 1.8, 0.0])
    assert corrected(city, ["11", "12"], pose) == ["11", "21", "12"]
    assert corrected(city, ["12"], pose) == ["11", "21", "12"]
    assert corrected(city, ["11", "21", "12"], pose) == ["11", "21", "12"]


def test_unknown_routes_are_named(root: Path) -> None:
    frames = read_log(next((root / "logs").glob("*.pkl")))
    frames[PRESENT] = dataclasses.replace(frames[PRESENT], route=("11", "77"))
    with pytest.raises(FileError, match="roadblocks that the map lacks: 77"):
        make_scene(Window(frames, PRESENT), read_map(find_map(root / "maps", openscene.CITY)))


# -- damage ------------------------------------------------------------------------------------------------------------


class Trap:
    """What a malicious pickle is made of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Attribute:
    """The same, hidden behind a module that is allowed."""

    def __reduce__(self) -> Any:
        return np.lib.format.open_memmap, ("/tmp/never",)


def traps(path: Path) -> Iterator[bytes]:
    yield pickle.dumps(Trap(path))
    yield pickle.dumps([{"token": Trap(path)}])
    yield pickle.dumps(Attribute())
    yield b'cbuiltins\neval\n(S\'__import__("os").mkdir("' + str(path).encode() + b"\")'\ntR."
    yield b"cnuplan.os\nsystem\n(S'mkdir " + str(path).encode() + b"'\ntR."  # a stub: kept as data, not run
    yield b"cshapely.os\nsystem\n(S'mkdir " + str(path).encode() + b"'\ntR."
    yield b"cnumpy\nload\n(S'" + str(path).encode() + b"'\ntR."


def test_no_pickle_runs_anything(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for number, content in enumerate(traps(sprung)):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(content)
        with pytest.raises(FileError):
            read_log(path)
        assert not sprung.exists()
    with pytest.raises(FileError, match=r"wants to call posix\.mkdir"):
        read_pickle(tmp_path / "0.pkl")


def test_damaged_logs_are_named(root: Path, tmp_path: Path) -> None:
    content = next((root / "logs").glob("*.pkl")).read_bytes()
    path = tmp_path / "log.pkl"
    for cut in range(0, len(content) - 1, len(content) // 40):
        path.write_bytes(content[:cut])
        with pytest.raises(FileError, match=r"log\.pkl"):
            read_log(path)
    frames = openscene.frames(3)
    del frames[1]["timestamp"]
    path.write_bytes(pickle.dumps(frames))
    with pytest.raises(FileError, match="is no OpenScene log: KeyError: 'timestamp'"):
        read_log(path)


def test_damaged_maps_are_named(root: Path, tmp_path: Path) -> None:
    path = find_map(root / "maps", openscene.CITY)
    bad = tmp_path / openscene.CITY / "9" / "map.gpkg"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FileError, match="is no nuPlan map"):
        read_map(bad)
    with pytest.raises(FileError, match="Did you mean 'us-nv-las-vegas-strip'"):
        find_map(root / "maps", "us-nv-las-vegas-stripe")
    assert find_map(root / "maps", "las_vegas") == path


def test_geometries_are_moved_to_metres(root: Path) -> None:
    """There and back through degrees: within a tenth of a millimetre."""
    city = read_map(find_map(root / "maps", openscene.CITY))
    expected = shapely.transform(openscene.tables()["intersections"][0]["geom"], lambda points: points + openscene.ORIGIN)
    assert city.intersections[0].symmetric_difference(expected).area < 1e-3
    assert city.lanes["101"].outgoing == ["301"]
    assert city.lanes["301"].outgoing == ["201"]
    assert city.roadblocks["21"].incoming == ["11"]
    assert np.isnan(city.lanes["301"].speed_limit)
