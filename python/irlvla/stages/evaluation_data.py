"""The scenes of an evaluation, and what was measured of them so far: a scene that fails is kept with its cause, a run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch

from irlvla.aggregation import TwoStageMapping
from irlvla.components import Dataset
from irlvla.errors import InputError, IrlvlaError
from irlvla.files import write_whole
from irlvla.run import Run
from irlvla.stages.batches import SceneBatch, read
from irlvla.stages.measurement import Record
from irlvla.types import Observation, Scene, Trajectory

MEASURED = "scenes.jsonl"  #: what was measured, scene by scene, for a run that is resumed
PATIENCE = 16  #: a driver that fails in so many scenes from the first on is mistaken, not the scenes


class StagedScenes:
    """The scenes of one stage, or of two, those of the second after those of the first.

    Attributes:
        first: how many are of the first.
        mapping: which of the second stage continue which pair of the first.
    """

    def __init__(self, stages: Sequence[Dataset], mapping: TwoStageMapping) -> None:
        self.stages, self.mapping, self.first = stages, mapping, len(stages[0])

    def __len__(self) -> int:
        return sum(map(len, self.stages))

    def __getitem__(self, row: int) -> tuple[Observation, Scene, Trajectory]:
        return self.stages[0][row] if row < self.first else self.stages[1][row - self.first]

    def token(self, row: int) -> str:
        """The name of a scene, without reading it; "#7" if only reading tells."""
        known = self.stages[0].token(row) if row < self.first else self.stages[1].token(row - self.first)
        return known or f"#{row}"

    def __str__(self) -> str:
        return " and ".join(map(str, self.stages))


class Reading(NamedTuple):
    """What became of some rows: those that can be read, and why the others cannot."""

    batch: SceneBatch | None
    unread: list[Record]  # with row, token and error


def read_each(scenes: StagedScenes, rows: Sequence[int]) -> Reading:
    """Read together what can be read. Raises the mistake of scenes that each can be read, and do not fit together."""
    mistake: Exception
    try:
        batch = read(cast(Dataset, scenes), rows)
        if isinstance(batch, SceneBatch):
            return Reading(batch, [])
        mistake = batch
    except Exception as error:
        mistake = error
    if len(rows) == 1:
        return Reading(None, [{"row": rows[0], "token": scenes.token(rows[0]), "error": cause_of(mistake)}])
    unread = [record for row in rows for record in read_each(scenes, [row]).unread]
    if not unread:
        raise mistake
    readable = [row for row in rows if row not in {record["row"] for record in unread}]
    return Reading(read_each(scenes, readable).batch if readable else None, unread)


def cause_of(error: Exception) -> str:
    """What a person is told of an error in one scene."""
    return str(error) if isinstance(error, IrlvlaError) else f"{type(error).__name__}: {error}"


class Measured:
    """The records of a run so far: in memory, and in a file for when it is stopped.

    Attributes:
        records: by row.
    """

    def __init__(self, run: Run, scenes: StagedScenes) -> None:
        self.path, self.is_main, self.scenes = run.directory / MEASURED, run.is_main, scenes
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.records: dict[int, Record] = {}
        for line in lines:
            if line.endswith("\n"):  # a kill may have left a part
                record = json.loads(line)
                self.records[record["row"]] = record
        run.gather(torch.zeros(1, device=run.device))  # all have read before one writes
        if self.is_main and lines and not lines[-1].endswith("\n"):
            write_whole(self.path, "".join(lines[:-1]))

    @property
    def failed(self) -> int:
        """Failures of drivers, and scenes that cannot be read."""
        return sum("error" in of for record in self.records.values() for of in [record, *record.get("policies", {}).values()])

    def batches(self, size: int) -> list[Sequence[int]]:
        """Rows that are left, as whole batches, so that a scene has the same neighbours whenever a run was stopped. None crosses stages."""
        spans = (range(self.scenes.first), range(self.scenes.first, len(self.scenes)))
        batches = [span[first : first + size] for span in spans for first in range(0, len(span), size)]
        return [rows for rows in batches if not all(row in self.records for row in rows)]

    def add(self, records: list[Record]) -> int:
        """Keep records, of which some may be known: all processes get equally many batches. Returns how many are new."""
        new = {record["row"]: record for record in records if record["row"] not in self.records}
        self.records |= new
        if self.is_main:
            with self.path.open("a") as stream:
                stream.write("".join(json.dumps(record) + "\n" for record in new.values()))
        return len(new)

    def require_success(self, names: Iterable[str]) -> None:
        """Raise `InputError` for what has failed in all scenes from the first on: not the scenes are mistaken then."""
        if len(self.records) < min(PATIENCE, len(self.scenes)):
            return
        records = list(self.records.values())
        if all("error" in record for record in records):
            raise InputError(f"none of the first {len(records)} scenes of {self.scenes} can be read: {records[0]['error']}")
        for name in names:
            errors = [record["policies"][name].get("error") for record in records if "policies" in record]
            if all(errors):
                raise InputError(f"policies.{name} fails in all of the first {len(errors)} scenes: {errors[0]}")

    def in_order(self) -> list[Record]:
        """The records of all scenes."""
        return [self.records[row] for row in sorted(self.records)]
