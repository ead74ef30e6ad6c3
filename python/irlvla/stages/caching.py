"""Scenes that are read in every epoch, kept as shards: made once, under a name that says from what."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from irlvla import configuration
from irlvla.checkpoint.manifest import checksum_of
from irlvla.components import Spec
from irlvla.errors import ConfigError
from irlvla.records import RecordDataset
from irlvla.registry import installed
from irlvla.shards import INDEX, read_index
from irlvla.stages.conversion import ConvertConfig, convert

SERVED = "privileged"  #: a setting that says how scenes are served, not what they are
PER_SHARD = 64  #: what is made again at most when it was interrupted


def cached(spec: Spec, folder: Path | None) -> Spec:
    """The same scenes from shards in a folder, which are made now if they are not there; without a folder, the dataset itself.

    The shards are those of one dataset with all its settings, as this version of its plugin makes it: another gets its own.
    What changed in files that it reads is not seen. Other processes that want the same shards wait until they are whole.

    Raises:
        ConfigError: the dataset makes no records, or rejects its settings.
        FileError: a scene is missing or damaged.
    """
    spec = installed().configure("dataset", spec)
    if folder is None or spec["name"] == "cached":
        return spec
    entry = installed().find("dataset", spec["name"])
    if not issubclass(entry.load(), RecordDataset):
        raise ConfigError(f"cache={folder}: {entry} makes no records (irlvla.RecordDataset), which alone can be kept; set cache=null")
    source = {name: value for name, value in spec.items() if name != SERVED}
    version = entry.plugin.version or checksum_of(entry.plugin)
    shards = folder.expanduser() / f"{spec['name']}-{_digest([source, version])}"
    shards.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{shards}.lock"):
        if not _is_whole(shards):
            convert(configuration.read(ConvertConfig, {"data": source, "out": str(shards), "per_shard": PER_SHARD, "workers": _cores()}))
    served = {name: spec[name] for name in ("size", "cameras", SERVED)}
    return {"name": "cached", "path": str(shards), **served}


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def _is_whole(shards: Path) -> bool:
    if not (shards / INDEX).exists():
        return False
    index = read_index(shards)
    return index["items"] == index["source"]["items"]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
