"""Scene shards: what goes in comes out, in any order, after any kill; damage is named."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from irlvla import FileError, InputError, golden, pdm_closed
from irlvla.records import Record, pack, record
from irlvla.shards import INDEX, OPEN_SHARDS, Shards, ShardWriter, Skipped
from irlvla.types import Scene

GOLDEN = Path(__file__).parent / "golden" / "public.npz"
SOURCE = {"name": "golden"}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Different scenes, with images by path and embedded."""
    made = []
    for number, example in enumerate(golden.load(GOLDEN)[:7]):
        images = [f"log/{number}.jpg", jpeg(number)]
        lens, mount = np.tile(np.eye(3), (2, 1, 1)) * (number + 1), np.tile(np.eye(4), (2, 1, 1))
        made.append(record(example.scene, ["front", "back"], images, lens, mount))
    return made


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write(folder: Path, items: list[Record | Skipped], per_shard: int = 3) -> Path:
    writer = ShardWriter(folder, SOURCE, per_shard)
    for item in items[writer.next_item :]:
        writer.add(item)
    writer.close()
    return folder


def assert_equal(first: Record, second: Record) -> None:
    for (name, mine), (_, theirs) in zip(first.tensors(), second.tensors(), strict=True):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine.nan_to_num(-7.0), theirs.nan_to_num(-7.0)), name
    assert first.scene.token == second.scene.token
    assert first.scene.agent_token == second.scene.agent_token
    assert first.image_path == second.image_path


def test_out_comes_what_went_in(records: list[Record], tmp_path: Path) -> None:
    shards = Shards(write(tmp_path, records))
    assert len(shards) == len(records)
    for index in [6, 0, 3, 2, 5, 1, 4, -1]:
        assert_equal(shards[index], records[index])
    with pytest.raises(IndexError, match="out of range for the 7 scenes"):
        shards[7]
    shards.verify()


def test_items_of_a_mapped_shard_are_batches_like_others(records: list[Record], tmp_path: Path) -> None:
    shards = Shards(write(tmp_path, records))
    assert_equal(Record.cat([shards[1], shards[5]]), Record.cat([records[1], records[5]]))
    again = pickle.loads(pickle.dumps(shards))  # as workers get it
    assert_equal(again[4], records[4])


def test_few_shards_are_open_at_a_time(records: list[Record], tmp_path: Path) -> None:
    shards = Shards(write(tmp_path, [*records * 20], per_shard=1))
    for index in range(len(shards)):
        shards[index]
    assert len(shards._open) == OPEN_SHARDS


def test_a_missing_reference_is_filled_in(records: list[Record], tmp_path: Path) -> None:
    scene = records[0].scene
    bare = dataclasses.replace(scene, reference=torch.full_like(scene.reference, torch.nan))
    written = Shards(write(tmp_path, [record(bare), record(scene)]))
    assert torch.equal(written[0].scene.reference, pdm_closed(scene))
    assert torch.equal(written[1].scene.reference, scene.reference)


class KilledError(Exception):
    pass


def test_killed_anywhere_it_ends_with_the_same_bytes(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is stopped before each of its writes in turn, and again when it goes on."""
    items: list[Record | Skipped] = [*records[:4], Skipped(4, "it is damaged"), *records[4:]]
    whole = write(tmp_path / "whole", items)
    replace, left = os.replace, 0

    def dying(*paths: Any) -> None:
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        replace(*paths)

    monkeypatch.setattr("irlvla.files.os.replace", dying)
    for lives in itertools.product(range(7), range(3)):
        folder = tmp_path / str(lives)
        for life in (*lives, 100):
            left = life
            with contextlib.suppress(KilledError):
                write(folder, items)
        assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}
        for file in whole.iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()


def test_skipped_items_are_in_the_index(records: list[Record], tmp_path: Path) -> None:
    folder = write(tmp_path, [records[0], Skipped(1, "log/1.jpg is no whole image"), records[2]])
    assert len(Shards(folder)) == 2
    assert json.loads((folder / INDEX).read_text())["skipped"] == [{"item": 1, "reason": "log/1.jpg is no whole image"}]


def test_another_source_is_refused(records: list[Record], tmp_path: Path) -> None:
    write(tmp_path, records[:1])
    with pytest.raises(FileError, match="holds shards of something else"):
        ShardWriter(tmp_path, {"name": "other"}, 3)
    with pytest.raises(FileError, match="per_shard"):
        ShardWriter(tmp_path, SOURCE, 4)


def test_damage_is_named(records: list[Record], tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", records)
    with pytest.raises(FileError, match="holds no scene shards"):
        Shards(tmp_path)
    index, shard = folder / INDEX, folder / "shard-00001.safetensors"
    text, content = index.read_text(), shard.read_bytes()
    for cut in range(0, len(text) - 1, 37):
        index.write_text(text[:cut])
        with pytest.raises(FileError, match="is no index of scene shards"):
            Shards(folder)
    index.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(FileError, match="pip install --upgrade irlvla"):
        Shards(folder)
    index.write_text(text)
    for cut in range(0, len(content) - 1, len(content) // 50):
        shard.write_bytes(content[:cut])
        with pytest.raises(FileError, match="shard-00001"):
            Shards(folder)
    shard.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(FileError, match=r"shard-00001.*does not match its checksum"):
        Shards(folder).verify()
    shard.unlink()
    with pytest.raises(FileError, match=r"shard-00001\.safetensors is missing"):
        Shards(folder)


def test_record_checks_what_it_is_given(records: list[Record]) -> None:
    scene = records[0].scene
    with pytest.raises(InputError, match="need as many images, got 1"):
        record(scene, ["front", "back"], ["a.jpg"])
    with pytest.raises(InputError, match=r"intrinsics of 1 cameras must have shape \(1, 3, 3\), got \(3, 3\)"):
        record(scene, ["front"], ["a.jpg"], np.eye(3), np.eye(4)[None])


def test_pack_of_nothing_is_a_scene() -> None:
    """No agents, no map, no human: shapes still fit others."""
    empty = pack(
        token="empty",
        time_us=0,
        ego=np.zeros(11),
        history_time_us=np.arange(4) * 500_000,
        history=np.zeros((4, 8)),
        agents=[],
        polygons=[],
        centerline=np.zeros((0, 3)),
    )
    assert len(Scene.cat([empty, golden.load(GOLDEN)[0].scene])) == 2
