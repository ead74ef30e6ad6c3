"""Files that others read: result tables and submissions in the devkit's layout."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irlvla import Epdms, FileError, InputError
from irlvla.files import write_whole

COLUMNS = (
    "no_at_fault_collisions",
    "drivable_area_compliance",
    "driving_direction_compliance",
    "traffic_light_compliance",
    "ego_progress",
    "time_to_collision_within_bound",
    "lane_keeping",
    "history_comfort",
    "two_frame_extended_comfort",
)  # the devkit's names of irlvla.METRICS


def write_results(path: Path, tokens: Sequence[str], result: Epdms) -> Path:
    """The table of a one-stage evaluation, with its last row of means. Values "N 9"."""
    values, scores = result.values.reshape(-1, 9).double().cpu().numpy(), result.score().reshape(-1).double().cpu().numpy()
    if len(values) != len(tokens):
        raise InputError(f"{len(tokens)} tokens for {len(values)} results")
    rows = [[token, True, *row, score] for token, row, score in zip(tokens, values, scores, strict=True)]
    with np.errstate(all="ignore"):
        rows.append(["average_all_frames", True, *_means(values), scores.mean()])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["", "token", "valid", *COLUMNS, "score"])
    for number, row in enumerate(rows):
        writer.writerow([number, *(_plain(value) for value in row)])
    return write_whole(path, stream.getvalue())


def read_results(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Tokens, sub-metrics "N 9" (NaN = not measured) and scores "N" of a one-stage table; without its row of means."""
    try:
        with path.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["token"] != "average_all_frames"]
        values = np.array([[float(row.get(name) or "nan") for name in COLUMNS] for row in rows])
        return [row["token"] for row in rows], values, np.array([float(row["score"]) for row in rows])
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FileError(f"{path} is no result table of NAVSIM: {type(error).__name__}: {error}") from error


def _means(values: np.ndarray) -> list[float]:
    measured = ~np.isnan(values)
    return [float(column[known].mean()) if known.any() else float("nan") for column, known in zip(values.T, measured.T, strict=True)]


def _plain(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else repr(float(value))
    return str(value)
