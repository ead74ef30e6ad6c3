"""`irlvla convert` and `irlvla show`: any dataset of records becomes shards that hold the same, and any scene a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from irlvla import FileError, InputError, Plan, build, cli, epdms, golden
from irlvla.images import distort, read_image
from irlvla.pictures import KIND_COLOURS, draw_scene, failures, project_onto, score_colour
from irlvla.records import Record, RecordDataset, record
from irlvla.registry import Entry, Plugin, installed
from irlvla.shards import Shards
from irlvla.stages import ConvertConfig, convert
from irlvla.types import Observation

GOLDEN = Path(__file__).parent / "golden" / "public.npz"
run = CliRunner().invoke


class Recorded(RecordDataset):
    """Golden scenes with a camera; items 2 and 5 are damaged."""

    class Config(RecordDataset.Config):
        folder: Path
        damaged: tuple[int, ...] = (2, 5)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scenes = golden.load(GOLDEN)[:8]

    @property
    def root(self) -> Path:
        return Path(self.config.folder)

    def __len__(self) -> int:
        return len(self.scenes)

    def record(self, index: int) -> Record:
        if index in self.config.damaged:
            raise FileError(f"log {index} is damaged")
        lens = torch.tensor([[[40.0, 0, 31.5], [0, 40.0, 23.5], [0, 0, 1]]])
        mount = torch.tensor([[[0.0, 0, 1, 1.6], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]]])
        return record(self.scenes[index].scene, ["front"], [f"{index}.jpg"], lens, mount)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images, and the dataset that refers to them, registered."""
    plugin = Plugin("irlvla-recorded", "1.0", "recorded")
    monkeypatch.setitem(installed().entries["dataset"], "recorded", [Entry("dataset", "recorded", Recorded, plugin)])
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(8):
        Image.new("RGB", (64, 48), (index * 20, 0, 0)).save(folder / f"{index}.jpg")
    return folder


def config(images: Path, out: Path, **settings: Any) -> ConvertConfig:
    data = {"name": "recorded", "folder": str(images), "damaged": settings.pop("damaged", (2, 5))}
    return ConvertConfig(data=data, out=out, per_shard=3, **settings)


def test_shards_hold_what_the_dataset_makes(images: Path, tmp_path: Path) -> None:
    folder = convert(config(images, tmp_path / "out", damaged=()))
    shards, dataset = Shards(folder), Recorded(Recorded.Config(folder=images, damaged=()))
    assert len(shards) == 8
    for index in range(8):
        for (name, mine), (_, theirs) in zip(shards[index].tensors(), dataset.record(index).tensors(), strict=True):
            if name != "scene.reference":
                assert torch.equal(mine.nan_to_num(-7), theirs.nan_to_num(-7)), name


def test_damage_stops_or_is_listed(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"item 2 of .*log 2 is damaged. With skip=true it is left out"):
        convert(config(images, tmp_path / "out"))
    folder = convert(config(images, tmp_path / "skipping", skip=True))
    assert len(Shards(folder)) == 6
    assert [entry["item"] for entry in json.loads((folder / "index.json").read_text())["skipped"]] == [2, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_conversion_goes_on(images: Path, tmp_path: Path, workers: int) -> None:
    """What was stopped by a damaged item goes on when the item is there: with the bytes of one that never stopped."""
    whole = convert(config(images, tmp_path / "whole", damaged=(), workers=workers))
    (images / "4.jpg").rename(tmp_path / "4.jpg")
    with pytest.raises(FileError, match=r"4\.jpg cannot be read"):
        convert(config(images, tmp_path / "embedded", damaged=(), embed=True, workers=workers))
    assert json.loads((tmp_path / "embedded" / "index.json").read_text())["items"] == 3
    (tmp_path / "4.jpg").rename(images / "4.jpg")
    parts = convert(config(images, tmp_path / "embedded", damaged=(), embed=True, workers=workers))
    again = convert(config(images, tmp_path / "again", damaged=(), embed=True))
    for file in again.iterdir():
        assert (parts / file.name).read_bytes() == file.read_bytes()
    assert len(Shards(whole)) == len(Shards(parts))


@pytest.mark.parametrize("embed", [False, True])
def test_images_come_back(images: Path, tmp_path: Path, embed: bool) -> None:
    folder = convert(config(images, tmp_path / "out", damaged=(), embed=embed))
    obs, scene, _ = build("dataset", {"name": "cached", "path": str(folder), "size": [24, 32]})[3]
    assert obs.images.shape == (1, 1, 3, 24, 32)
    assert abs(obs.images[0, 0, 0].float().mean() - 60) < 4
    assert obs.token == scene.token
    assert torch.allclose(obs.intrinsics[0, 0, :2, :2], torch.eye(2) * 20)


def test_the_commands(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(cli.app, ["convert", "recorded", "shards", f"folder={images}", "--skip", "--per-shard", "4"])
    assert done.exit_code == 0, done.output
    assert "6 scenes in 2 shards: shards; left out: 2" in done.output
    done = run(cli.app, ["show", "shards", "size=[48,64]", "--index", "-1", "--width", "600", "--planner", "constant_velocity"])
    assert done.exit_code == 0, done.output
    with Image.open("shards--1.png") as picture:
        assert picture.width == 600
    for arguments, message in (
        (["show", "shards", "--index", "6"], "shards has 6 scenes"),
        (["convert", "recordd", "x"], "Did you mean 'recorded'?"),
        (["convert", "scenes", "x", f"path={GOLDEN}"], "scenes"),
        (["convert", "recorded", "x", "foldr=y"], "Did you mean 'folder'?"),
    ):
        done = run(cli.app, arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_causes_are_those_of_the_score() -> None:
    """For every candidate: a cause for each metric below 1 but EC, none for the others; and its moment is one at which it fails."""
    count = 0
    for example in golden.load(GOLDEN)[:12]:
        scene = example.scene
        result = epdms(scene, torch.from_numpy(example.candidates)[None], human_filter="none", details=True, traffic=example.traffic)
        for row in range(result.values.shape[1]):
            found = {failure.metric: failure for failure in failures(scene, result, row)}
            names = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc")
            assert set(found) == {name for name, value in zip(names, result.values[0, row].tolist(), strict=False) if value < 1}
            why = result.details
            if "dac" in found:
                assert why.off_road[0, row, found["dac"].step]
            if "tlc" in found:
                assert why.red_light[0, row, found["tlc"].step]
            assert all(str(failure).startswith(failure.metric.upper()) for failure in found.values())
            count += len(found)
    assert count > 100


def test_a_picture_shows_what_it_should() -> None:
    """The failing box is marked; more light, more score; another scene, another picture; the same, the same."""
    examples = golden.load(GOLDEN)
    scene, plans = examples[0].scene, torch.from_numpy(examples[0].candidates).double()[None]
    result = epdms(scene, plans, human_filter="none", details=True)
    drawn = draw_scene(scene, Plan(plans, dt=0.5), result, width=400)
    plain = draw_scene(scene, width=400)
    assert drawn.size == plain.size
    assert drawn.tobytes() != plain.tobytes()
    assert drawn.tobytes() == draw_scene(scene, Plan(plans, dt=0.5), result, width=400).tobytes()
    lightness = [sum(score_colour(score)) for score in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert lightness == sorted(lightness)
    with pytest.raises(InputError, match="shows one scene, not 2"):
        draw_scene(type(scene).cat([scene, scene]))
    with pytest.raises(InputError, match="is not that of a plan"):
        draw_scene(scene, Plan(torch.cat([plans, plans], 1), dt=0.5), result)


def test_projected_boxes_lie_where_the_calibration_says() -> None:
    """An agent straight ahead: the corners of its box, by hand, are pixels of its colour."""
    scene = golden.load(GOLDEN)[0].scene
    ego = scene.ego[0, :3]
    ahead = torch.tensor([ego[0] + 20 * ego[2].cos(), ego[1] + 20 * ego[2].sin(), ego[2], 0.0, 0.0], dtype=torch.float64)
    state = scene.agent_state.clone()
    state[0, 0] = ahead
    kinds, valid = torch.zeros_like(scene.agent_kind), torch.zeros_like(scene.agent_valid)
    valid[0, 0] = True
    size = scene.agent_size.clone()
    size[0] = torch.tensor([4.0, 2.0])
    scene = dataclasses.replace(scene, agent_state=state, agent_kind=kinds, agent_valid=valid, agent_size=size)
    mount = torch.tensor([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]], dtype=torch.float64)
    lens = torch.tensor([[200.0, 0, 160], [0, 200.0, 120], [0, 0, 1]], dtype=torch.float64)
    obs = Observation(
        scene.token, torch.zeros(1, 4, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 3, 240, 320, dtype=torch.uint8)
    )
    obs = dataclasses.replace(obs, intrinsics=lens[None, None], camera_to_ego=mount[None, None])
    image = project_onto(obs, 0, scene)
    for x, y, z in ((18.0, 1.0, 0.0), (18.0, -1.0, 1.6), (22.0, 1.0, 1.6)):
        u, v = 160 - 200 * y / x, 120 + 200 * (1.5 - z) / x
        near = {image.getpixel((round(u) + i, round(v) + j)) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        assert KIND_COLOURS[0] in near


def test_jpegs_are_read_as_they_were_written(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (192, 108), (10, 200, 30)).save(stream, "JPEG", quality=95)
    lens = torch.tensor([[150.0, 0, 95.5], [0, 150.0, 53.5], [0, 0, 1]]).double().numpy()
    pixels, fitted = read_image(stream.getvalue(), (32, 64), lens)
    assert pixels.shape == (3, 32, 64)
    assert (pixels.float().mean((1, 2)) - torch.tensor([10.0, 200.0, 30.0])).abs().max() < 3
    assert fitted[0, 0] == pytest.approx(50.0)
    assert fitted[0, 2] == pytest.approx(31.5)  # the middle stays the middle across
    with pytest.raises(FileError, match="is no whole image"):
        read_image(stream.getvalue()[:50], (32, 64), lens)
    with pytest.raises(FileError, match="does not exist"):
        read_image(tmp_path / "none.jpg", (32, 64), lens)


def test_lenses_are_undone_to_the_pixel() -> None:
    """A dot where a distorting lens shows a point of the world lies, in the pinhole image, where its intrinsics say."""
    lens = np.array([[1545.0, 0.0, 960.0], [0.0, 1545.0, 560.0], [0.0, 0.0, 1.0]])
    brown = np.array([-0.356123, 0.172545, -0.00213, 0.000464, -0.05231])  # NAVSIM's
    for ray in ((0.0, 0.0), (0.3, 0.1), (-0.4, -0.05), (0.45, 0.2)):
        u, v = lens[:2, :2] @ distort(np.array(ray), brown) + lens[:2, 2]
        rows, columns = np.mgrid[:1080, :1920]
        dot = np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 6.0**2)) * 255
        stream = io.BytesIO()
        Image.fromarray(np.repeat(dot[..., None], 3, -1).astype(np.uint8)).save(stream, "PNG")
        pixels, fitted = read_image(stream.getvalue(), (256, 704), lens, brown)
        weight = pixels[0].double().numpy()
        height, width = np.mgrid[:256, :704]
        found = np.array([(weight * width).sum(), (weight * height).sum()]) / weight.sum()
        assert found == pytest.approx(fitted[:2, :2] @ np.array(ray) + fitted[:2, 2], abs=0.3)
