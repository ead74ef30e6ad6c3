"""Reading scene shards: scenes per second on one core, and memory, after what is read has been verified.

python bench/bench_shards.py [--scenes 10000]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from irlvla import build
from irlvla.records import record
from irlvla.shards import Shards, ShardWriter
from irlvla.synthetic import synthetic_scenes

DISTINCT = 128  # scenes that are repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=10_000)
    count = parser.parse_args().scenes
    torch.set_num_threads(1)
    scenes = synthetic_scenes(DISTINCT)
    records = [record(scenes[index]) for index in range(DISTINCT)]
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(folder, {"name": "bench"})
        began = time.perf_counter()
        for index in range(count):
            writer.add(records[index % DISTINCT])
        writer.close()
        print(f"written: {count / (time.perf_counter() - began):,.0f} scenes/s, {size(folder) / count / 1e3:.0f} kB each")
        verify(Shards(folder), records)
        dataset = build("dataset", {"name": "cached", "path": folder})
        order = random.Random(0).sample(range(count), count)
        rates: list[tuple[str, Iterable[int], Callable[[int], Any]]] = [
            ("records, in order", range(count), Shards(folder).__getitem__),
            ("records, shuffled", order, Shards(folder).__getitem__),
            ("items of a dataset, in order", range(count), dataset.__getitem__),
            ("items of a dataset, shuffled", order, dataset.__getitem__),
        ]
        for name, indices, read in rates:
            before = resident()
            began = time.perf_counter()
            for index in indices:
                read(index)
            rate = count / (time.perf_counter() - began)
            print(f"{name}: {rate:,.0f} scenes/s per core; private memory grew by {resident() - before:+.1f} MB")


def verify(shards: Shards, records: list[Any]) -> None:
    """What is read is what was written."""
    for index in range(0, len(shards), 97):
        for (name, found), (_, wanted) in zip(shards[index].tensors(), records[index % DISTINCT].tensors(), strict=True):
            assert torch.equal(found.nan_to_num(-7), wanted.nan_to_num(-7)), name


def size(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).iterdir())


def resident() -> float:
    """Memory of this process that is not a mapped file [MB]."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    main()
