"""Files in the layout of the official devkit: result tables of both benchmarks, and the mapping between their stages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from irlvla.aggregation import TwoStage
from irlvla.errors import FileError, InputError
from irlvla.files import write_whole
from irlvla.golden import OFFICIAL
from irlvla.types import METRICS, Epdms

COLUMNS = (*OFFICIAL[:8], "two_frame_extended_comfort")  #: names of METRICS in result tables
AVERAGE, ONE, TWO, COMBINED = "average_all_frames", *(f"extended_pdm_score_{row}" for row in ("stage_one", "stage_two", "combined"))

Array = NDArray[np.float64]


def write_results(path: Path, tokens: Sequence[str], result: Epdms) -> Path:
    """The table of a one-stage evaluation, with its last row of means.

    Args:
        result: values "N 9"; a scene that could not be scored is NaN throughout, and not valid.
    """
    values, scores = _numbers(tokens, result)
    valid = np.isfinite(scores)
    rows = [[token, ok, *row, score] for token, ok, row, score in zip(tokens, valid, values, scores, strict=True)]
    rows.append([AVERAGE, valid.all(), *_means(np.column_stack([values, scores]))])
    return _write(path, [*COLUMNS], rows)


def write_two_stages(
    path: Path, tokens: Sequence[str], result: Epdms, totals: TwoStage, second: Sequence[bool], whole: bool = True
) -> Path:
    """The table of a two-stage evaluation, with its last rows of aggregates.

    Args:
        result: values "N 9", with the extended comfort of the pairs.
        totals: the aggregates.
        second: of each frame whether it belongs to the second stage.
        whole: whether the aggregates are of all groups.
    """
    values, scores = _numbers(tokens, result)
    blank = [np.nan] * len(METRICS)
    rows: list[list[Any]] = []
    for token, row, score, later in zip(tokens, values, scores, second, strict=True):
        rows.append([token, np.isfinite(score), *(blank if later else row), *(row if later else blank), score])
    one, two, combined = (total.tolist() for total in (totals.stage_one, totals.stage_two, totals.combined))
    rows.append([ONE, whole, *one[:9], *blank, one[9]])
    rows.append([TWO, whole, *blank, *two[:9], two[9]])
    rows.append([COMBINED, whole, *one[:9], *two[:9], combined[9]])
    return _write(path, [f"{name}_{stage}" for stage in ("stage_one", "stage_two") for name in COLUMNS], rows)


def read_results(path: Path) -> tuple[list[str], Array, Array]:
    """Tokens, sub-metrics "N 9" (NaN = not measured) and scores "N" of a one-stage table; without its row of means."""
    try:
        with path.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["token"] != AVERAGE]
        values = np.array([[float(row.get(name) or "nan") for name in COLUMNS] for row in rows])
        return [row["token"] for row in rows], values, np.array([float(row["score"] or "nan") for row in rows])
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FileError(f"{path} is no result table of NAVSIM: {type(error).__name__}: {error}") from error


def read_mapping(path: Path) -> Mapping[tuple[str, str], list[tuple[str, str]]]:
    """Which synthetic scenes continue which recorded pair (`reactive_all_mapping` of a split), as `irlvla.two_stage` takes it."""
    try:
        text = path.read_text()
        entries = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        entries = entries["reactive_all_mapping"] if isinstance(entries, dict) else entries
        return {(str(now), str(before)): [(str(a), str(b)) for a, b in followers] for now, before, followers in entries}
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        raise FileError(f"{path} holds no two-stage mapping: {type(error).__name__}: {error}") from error


def _numbers(tokens: Sequence[str], result: Epdms) -> tuple[Array, Array]:
    values, scores = result.values.reshape(-1, 9).double().cpu().numpy(), result.score().reshape(-1).double().cpu().numpy()
    if len(values) != len(tokens):
        raise InputError(f"{len(tokens)} tokens for {len(values)} results")
    return values, scores


def _means(values: Array) -> list[float]:
    measured = ~np.isnan(values)
    return [float(column[known].mean()) if known.any() else float("nan") for column, known in zip(values.T, measured.T, strict=True)]


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["", "token", "valid", *columns, "score"])
    for number, row in enumerate(rows):
        writer.writerow([number, *map(_plain, row)])
    return write_whole(path, stream.getvalue())


def _plain(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else repr(float(value))
    return str(value)
