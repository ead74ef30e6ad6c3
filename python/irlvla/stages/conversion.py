"""From any dataset that reads files to scene shards: once, so that training and scoring need nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from irlvla.components import Config, Spec, pluggable
from irlvla.errors import ConfigError, FileError, IrlvlaError
from irlvla.records import Record, RecordDataset
from irlvla.registry import build
from irlvla.run.progress import track
from irlvla.shards import ShardWriter, Skipped


class ConvertConfig(Config):
    """Settings of `convert`."""

    data: Spec = pluggable("dataset", description="what is converted")
    out: Path = Field(description="folder of the shards; one that was begun is finished")
    per_shard: int = Field(256, ge=1, description="scenes in a shard")
    embed: bool = Field(False, description="put the images into the shards; else they hold the paths")
    skip: bool = Field(False, description="leave out what is missing or damaged, and list it in the index; else stop there")
    workers: int = Field(0, ge=0, description="processes that read; 0 = the main one")


def convert(config: ConvertConfig) -> Path:
    """Write shards; return their folder. A conversion that was stopped goes on, and ends with the same bytes.

    Raises:
        ConfigError: the dataset makes no records.
        FileError: an item is missing or damaged, and `skip` is off; or the folder holds something else.
    """
    dataset = build("dataset", config.data)
    if not isinstance(dataset, RecordDataset):
        raise ConfigError(f"{dataset} cannot be converted: it makes no records (irlvla.RecordDataset)")
    root = dataset.image_root.resolve()
    source = {"data": config.data, "items": len(dataset), "image_root": "" if config.embed else str(root)}
    writer = ShardWriter(config.out, source, config.per_shard)
    rest: Any = _Items(dataset, writer.next_item, root if config.embed else None)
    with track(len(dataset), "convert", writer.next_item) as progress:
        for item in DataLoader(rest, batch_size=None, num_workers=config.workers, collate_fn=_same):
            if isinstance(item, Skipped) and not config.skip:
                raise FileError(f"item {item.item} of {dataset}: {item.reason}. With skip=true it is left out and listed in the index")
            writer.add(item)
            progress.advance(skipped=len(writer.index["skipped"]))
    writer.close()
    return config.out


class _Items(Dataset[Record | Skipped]):
    """The items of a dataset from one on, as records, or as what is wrong with them."""

    def __init__(self, dataset: RecordDataset, first: int, embed: Path | None) -> None:
        self.dataset, self.first, self.embed = dataset, first, embed

    def __len__(self) -> int:
        return len(self.dataset) - self.first

    def __getitem__(self, index: int) -> Record | Skipped:
        item = self.first + index
        if item >= len(self.dataset):
            raise IndexError(item)
        try:
            record = self.dataset.record(item)
            return record if self.embed is None else _embedded(record, self.embed)
        except IrlvlaError as error:
            return Skipped(item, str(error))


def _embedded(record: Record, root: Path) -> Record:
    """The record with the files of its images in it. Raises `FileError` if one is missing."""
    if not any(record.image_path):
        return record
    try:
        files = [(root / path).read_bytes() for path in record.image_path]
    except OSError as error:
        raise FileError(f"the image {error.filename} cannot be read: {error.strerror}") from error
    return dataclasses.replace(
        record,
        image_path=("",) * len(files),
        jpeg_offsets=torch.tensor(list(itertools.accumulate(map(len, files), initial=0))),
        jpeg=torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
    )


def _same(item: Any) -> Any:
    return item
