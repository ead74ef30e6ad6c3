"""The leaderboard's result files: what it wrote of each route, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irlvla import FileError
from irlvla.errors import did_you_mean
from irlvla_bench2drive.routes import Route, routes

SLOW = "min_speed_infractions"  #: these say how fast the car was, and are no infractions


@dataclass(frozen=True)
class Record:
    """One driven route."""

    route: Route
    status: str  #: "Completed", "Perfect", "Failed - Agent crashed", ...
    score: float  #: driving score [%]: completion times penalties
    completion: float  #: of the route [%]
    infractions: Mapping[str, tuple[str, ...]]  #: messages by kind
    save_name: str  #: of the folder that the agent wrote

    @property
    def succeeded(self) -> bool:
        """Whether the route was finished without an infraction; a low speed is none."""
        return self.status in ("Completed", "Perfect") and not any(found for kind, found in self.infractions.items() if kind != SLOW)


def read_records(files: Sequence[Path]) -> list[Record]:
    """The records of all files, in order of the numbers of their routes.

    Args:
        files: results as the leaderboard writes them (one for each process of an evaluation), or one that was merged of them.

    Raises:
        FileError: a file is missing, no JSON, of another layout, or holds a route that is unknown or was there already.
    """
    found: dict[str, tuple[Record, Path]] = {}
    for file in files:
        for number, written in enumerate(_written(file)):
            record = _record(file, number, written)
            if (twice := found.get(record.route.id)) is not None:
                raise FileError(f"route {record.route.id} is in {twice[1]} and again in {file}; give each route once")
            found[record.route.id] = record, file
    return [found[id][0] for id in routes() if id in found]


def _written(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise FileError(f"{file} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{file} is no JSON, or cut off: {error}") from error
    try:
        records = content["_checkpoint"]["records"]
    except (KeyError, TypeError) as error:
        raise FileError(f"{file} is no result file of the leaderboard: it has no _checkpoint with records") from error
    if not isinstance(records, list):
        raise FileError(f"{file} is no result file of the leaderboard: its records are no list")
    return records


def _record(file: Path, number: int, written: Any) -> Record:
    try:
        scores = written["scores"]
        return Record(
            route=_route(file, str(written["route_id"])),
            status=str(written["status"]),
            score=_number(scores["score_composed"]),
            completion=_number(scores["score_route"]),
            infractions={str(kind): _messages(kind, found) for kind, found in written["infractions"].items()},
            save_name=str(written.get("save_name") or ""),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        cause = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{file}: record {number} (from 0) is not as the leaderboard writes them: {cause}") from error


def _messages(kind: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list):
        raise ValueError(f"the infractions {kind!r} are no list")
    return tuple(map(str, found))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 100.0:
        raise ValueError(f"the score {value!r} is not between 0 and 100")
    return float(value)


def _route(file: Path, name: str) -> Route:
    match = re.fullmatch(r"RouteScenario_(\d+)_rep\d+", name)
    if match is None:
        raise FileError(f"{file}: {name!r} is not how the leaderboard names a route (RouteScenario_1711_rep0)")
    if match[1] not in routes():
        near = did_you_mean(match[1], routes())
        raise FileError(f"{file}: route {match[1]} is none of the 220 of Bench2Drive. {near}".rstrip())
    return routes()[match[1]]
