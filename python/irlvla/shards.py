"""Scene shards: a folder of safetensors files and an index. Random access, images by reference or embedded, no pickle.

    OUT/index.json                  what is there, in order
    OUT/shard-00000.safetensors     a `Record` of up to `per_shard` scenes

A shard is mapped, not read: an item touches only its own rows, and memory does not grow with the folder. Shards are written
whole and in order, so a conversion that was killed goes on after its last shard and ends with the same bytes.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irlvla import __version__
from irlvla.errors import FileError
from irlvla.files import write_whole
from irlvla.pdm import reference_plans
from irlvla.records import Record
from irlvla.types import Scene

FORMAT = 1
INDEX = "index.json"
OPEN_SHARDS = 128  # mapped at a time by one process

# -- reading -----------------------------------------------------------------------------------------------------------


class Shards:
    """The records of a folder of shards, each a batch of one. Files are mapped when an item of theirs is first asked for."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises `FileError` if the folder holds no shards, or not all that its index names."""
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._ends = list(itertools.accumulate(shard["scenes"] for shard in self.index["shards"]))
        self._open: OrderedDict[int, Record] = OrderedDict()

    @property
    def image_root(self) -> Path:
        """The folder that image paths are relative to."""
        return Path(self.index["source"].get("image_root") or self.folder)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for the {len(self)} scenes of {self.folder}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        return self._shard(shard)[index - self._ends[shard] + self.index["shards"][shard]["scenes"]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # each worker maps for itself

    def _shard(self, number: int) -> Record:
        if number not in self._open:
            self._open[number] = Record.load(self.folder / self.index["shards"][number]["file"], mapped=True)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def verify(self) -> None:
        """Read every byte. Raises `FileError` naming the first shard that is not as it was written."""
        for shard in self.index["shards"]:
            Record.load(self.folder / shard["file"])


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of shards. Raises `FileError` if there is none, or a newer one, or a shard is missing or cut off."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        shards, number = index["shards"], index["format"]
    except FileNotFoundError as error:
        raise FileError(f"{folder} holds no scene shards: there is no {INDEX}; make some with irlvla convert") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is no index of scene shards: {error}") from error
    if number > FORMAT:
        raise FileError(f"{path} was written by irlvla {index.get('irlvla')} (format {number}); pip install --upgrade irlvla")
    for shard in shards:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            state = "has another size than the index says" if file.is_file() else "is missing"
            raise FileError(f"{file} {state}; convert again: what is whole is kept")
    return index


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """An item that could not be converted, and why."""

    item: int
    reason: str


class ShardWriter:
    """Writes records in order, `per_shard` source items to a shard. Goes on where an earlier writer of the same source was stopped.

    `source` describes what is converted (name, settings, number of items); another source in the same folder is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], source: dict[str, Any], per_shard: int = 256) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, Any] = {"format": FORMAT, "irlvla": __version__, "source": source, "per_shard": per_shard}
        self.index |= {"shards": [], "skipped": [], "items": 0}
        self.index = json.loads(json.dumps(self.index))  # as it is read back
        if (self.folder / INDEX).exists():
            self._resume()
        self._pending: list[Record | Skipped] = []

    @property
    def next_item(self) -> int:
        """The source item that comes next."""
        return self.index["items"] + len(self._pending)

    def add(self, item: Record | Skipped) -> None:
        """Add what became of the next source item."""
        self._pending.append(item)
        if len(self._pending) == self.index["per_shard"]:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        if self._pending or not self.index["items"]:
            self._write()

    def _resume(self) -> None:
        found = read_index(self.folder)
        for name in ("source", "per_shard"):
            if found[name] != self.index[name]:
                raise FileError(
                    f"{self.folder} holds shards of something else ({name}: {found[name]}, now {self.index[name]}); "
                    "choose another folder, or remove it"
                )
        self.index = found

    def _write(self) -> None:
        records = [item for item in self._pending if isinstance(item, Record)]
        if records:
            name = f"shard-{self.index['items'] // self.index['per_shard']:05d}.safetensors"
            merged = Record.cat(records)
            path = dataclasses.replace(merged, scene=with_reference(merged.scene)).save(self.folder / name)
            self.index["shards"].append({"file": name, "scenes": len(records), "bytes": path.stat().st_size})
        self.index["skipped"] += [dataclasses.asdict(item) for item in self._pending if isinstance(item, Skipped)]
        self.index["items"] += len(self._pending)
        write_whole(self.folder / INDEX, json.dumps(self.index, indent=1) + "\n")
        self._pending = []


def with_reference(scenes: Scene) -> Scene:
    """The scenes, with the PDM-Closed plan where they carry none."""
    return dataclasses.replace(scenes, reference=reference_plans(scenes))
