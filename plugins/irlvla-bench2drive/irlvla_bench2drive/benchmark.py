"""The benchmark `bench2drive`: tables from the result files of drives in CARLA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

import irlvla
from irlvla import FileError
from irlvla_bench2drive.comfort import comfort_of, find_drive
from irlvla_bench2drive.metrics import Ability, ability_of, driving_score, efficiency, mean, success_rate
from irlvla_bench2drive.records import SLOW, Record, read_records
from irlvla_bench2drive.routes import COUNT, routes

Row = dict[str, Any]


class Bench2Drive(irlvla.Benchmark):
    """Bench2Drive: 220 routes in CARLA, driven there by an agent of the leaderboard, and summarised from its result files."""

    class Config(irlvla.Config):
        junctions: Path | None = Field(
            None, description="file that in_carla/junctions.py wrote; without it, traffic signs and the mean ability are bounds"
        )
        drives: Path | None = Field(None, description="folder of what the agent wrote on every route (SAVE_PATH); without it, no comfort")

    def summarise(self, results: Sequence[Path]) -> dict[str, list[Row]]:
        """Tables: every route that did not succeed, the five abilities, and the metrics.

        Raises `FileError` for files that are missing, damaged, of another layout, or hold a route twice.
        """
        records = read_records(results)
        try:
            efficiencies = {record.route.id: efficiency(record) for record in records}
            found = ability_of(records, self._junctions())
        except ValueError as error:
            raise FileError(f"{', '.join(map(str, results))}: {error}") from error
        except KeyError as error:
            raise FileError(f"{self.config.junctions} does not hold route {error}; let junctions.py write it again") from error
        comforts = {record.route.id: self._comfort(record) for record in records}
        return {
            "Routes without success": _routes(records, efficiencies, comforts),
            "Abilities": _abilities(found),
            "Bench2Drive": _metrics(records, efficiencies, comforts, drives=self.config.drives),
        }

    def _junctions(self) -> Mapping[str, float] | None:
        path = self.config.junctions
        if path is None:
            return None
        try:
            shares = {str(route): float(share) for route, share in json.loads(path.read_text())["junctions"].items()}
            if all(math.isfinite(share) for share in shares.values()):
                return shares
            raise ValueError("a share is not finite")
        except FileNotFoundError as error:
            raise FileError(f"benchmark.junctions: {path} does not exist") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"benchmark.junctions: {path} is no file of junctions.py: {error}") from error

    def _comfort(self, record: Record) -> float | None:
        if self.config.drives is None:
            return None
        if not self.config.drives.is_dir():
            raise FileError(f"benchmark.drives: {self.config.drives} is no folder")
        file = find_drive(self.config.drives, record.save_name)
        return None if file is None else comfort_of(file)


def _metrics(
    records: Sequence[Record], efficiencies: Mapping[str, float | None], comforts: Mapping[str, float | None], drives: Path | None
) -> list[Row]:
    fast = [value for value in efficiencies.values() if value is not None]
    smooth = [value for value in comforts.values() if value is not None]
    missing = f", {COUNT - len(records)} missing routes count as 0" if len(records) < COUNT else ""
    comfort = (
        f"{len(smooth)} of {len(records)} drives" if drives else "not known: set benchmark.drives to the folder of metric_info.json files"
    )
    return [
        {"metric": "driving score [0, 100]", "value": driving_score(records), "of": f"{COUNT} routes{missing}"},
        {"metric": "success rate [0, 1]", "value": success_rate(records), "of": f"{COUNT} routes{missing}"},
        {"metric": "efficiency [% of the traffic's speed]", "value": mean(fast), "of": f"{len(fast)} routes that have a speed"},
        {"metric": "comfort [0, 1]", "value": mean(smooth), "of": comfort},
    ]


def _abilities(found: Sequence[Ability]) -> list[Row]:
    rows = [_ability(ability.name, ability.value, ability.bounds, f"{ability.driven} driven routes") for ability in found]
    values = [ability.value for ability in found if ability.value is not None]
    bounds = [ability.bounds for ability in found if ability.bounds is not None]
    whole = len(bounds) == len(found)
    rows.append(
        _ability(
            "mean",
            mean(values) if len(values) == len(found) else None,
            (sum(low for low, _ in bounds) / len(found), sum(high for _, high in bounds) / len(found)) if whole else None,
            f"{len(found)} abilities" if whole else f"none: {len(found) - len(bounds)} abilities without a route",
        )
    )
    return rows


def _ability(name: str, value: float | None, bounds: tuple[float, float] | None, of: str) -> Row:
    """One row; bounds take the place of a value that is undecided."""
    undecided = value is None and bounds is not None
    low, high = bounds if undecided and bounds else (None, None)
    return {
        "ability": name,
        "value": value,
        "at least": low,
        "at most": high,
        "of": of + (" (set benchmark.junctions)" if undecided else ""),
    }


def _routes(records: Sequence[Record], efficiencies: Mapping[str, float | None], comforts: Mapping[str, float | None]) -> list[Row]:
    driven = {record.route.id: record for record in records}
    rows = []
    for id, route in routes().items():
        record = driven.get(id)
        if record is None or not record.succeeded:
            rows.append(
                {
                    "route": id,
                    "town": route.town,
                    "scenario": route.scenario,
                    "status": "missing" if record is None else record.status,
                    "score": record.score if record else 0.0,
                    "efficiency": efficiencies.get(id),
                    "comfort": comforts.get(id),
                    "infractions": _infractions(record) if record else "",
                }
            )
    return rows


def _infractions(record: Record) -> str:
    counts = {kind: len(messages) for kind, messages in record.infractions.items() if messages and kind != SLOW}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
