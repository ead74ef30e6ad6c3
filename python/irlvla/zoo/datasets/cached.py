"""Scenes from shards, as `irlvla convert` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from irlvla.records import Record, RecordDataset
from irlvla.shards import Shards


class CachedDataset(RecordDataset):
    """Scene shards: random access, mapped, so memory does not grow with the folder."""

    class Config(RecordDataset.Config):
        path: Path = Field(description="a folder that irlvla convert wrote")

    def __init__(self, config: Any) -> None:
        """Raises `FileError` where there are no shards, or not all of them."""
        super().__init__(config)
        self.shards = Shards(Path(config.path).expanduser())

    @property
    def root(self) -> Path:
        return self.shards.image_root

    def __len__(self) -> int:
        return len(self.shards)

    def record(self, index: int) -> Record:
        return self.shards[index]
