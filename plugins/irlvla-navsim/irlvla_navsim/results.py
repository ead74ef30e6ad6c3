"""Files that others read: result tables and submissions in the devkit's layout."""

from __future__ import annotations

import csv
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from irlvla import Epdms, FileError, InputError
from irlvla.files import write_whole
from irlvla.golden import OFFICIAL

COLUMNS = (*OFFICIAL[:8], "two_frame_extended_comfort")  # names of irlvla.METRICS in result tables


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


# -- submissions -------------------------------------------------------------------------------------------------------


class _Sampling:
    """Stands for nuPlan's TrajectorySampling."""

    def __init__(self, num_poses: int, interval_length: float) -> None:
        self.num_poses, self.time_horizon, self.interval_length = num_poses, num_poses * interval_length, interval_length


class _Trajectory:
    """Stands for NAVSIM's Trajectory."""

    def __init__(self, poses: np.ndarray, dt: float) -> None:
        self.poses, self.trajectory_sampling = poses, _Sampling(len(poses), dt)


# Written as the classes of the devkit, which need not be here; and numpy's as the devkit's numpy 1 knows it.
_REAL_NAMES = {
    f"c{__name__}\n_Trajectory\n": "cnavsim.common.dataclasses\nTrajectory\n",
    f"c{__name__}\n_Sampling\n": "cnuplan.planning.simulation.trajectory.trajectory_sampling\nTrajectorySampling\n",
    "cnumpy._core.multiarray\n": "cnumpy.core.multiarray\n",
}


def write_submission(
    path: Path,
    first: Mapping[str, Any],
    second: Mapping[str, Any] | None = None,
    *,
    dt: float = 0.5,
    team_name: str,
    authors: str,
    email: str,
    institution: str,
    country: str,
) -> Path:
    """A `submission.pkl` for NAVSIM's leaderboards, as `run_create_submission_pickle.py` of the devkit writes it.

    Args:
        first: the plan "T 3" (ego frame) of each first-stage scene by token.
        second: the same of the second stage; None = one stage.
        dt: seconds between the poses.

    Raises:
        InputError: a plan has another shape or is not finite.
    """
    submission = {
        "team_name": team_name,
        "authors": authors,
        "email": email,
        "institution": institution,
        "country / region": country,
        "first_stage_predictions": [_trajectories(first, dt)],
        "second_stage_predictions": [_trajectories(second or {}, dt)],
    }
    content = pickle.dumps(submission, protocol=2)  # its names of classes are lines of text
    for ours, theirs in _REAL_NAMES.items():
        content = content.replace(ours.encode(), theirs.encode())
    return write_whole(path, content)


def _trajectories(plans: Mapping[str, Any], dt: float) -> dict[str, _Trajectory]:
    made = {}
    for token, plan in plans.items():
        poses = np.asarray(plan, dtype=np.float32)
        if poses.ndim != 2 or poses.shape[1] != 3 or not np.isfinite(poses).all():
            raise InputError(f"the plan of {token} must be finite poses (T, 3), got shape {poses.shape}")
        made[str(token)] = _Trajectory(poses, dt)
    return made


# -- the two stages ----------------------------------------------------------------------------------------------------


def read_mapping(path: Path) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Which synthetic scenes continue which recorded pair (`reactive_all_mapping` of a split), as `irlvla.two_stage` takes it."""
    try:
        entries = yaml.safe_load(path.read_text())
        entries = entries["reactive_all_mapping"] if isinstance(entries, dict) else entries
        return {(str(now), str(before)): [(str(a), str(b)) for a, b in followers] for now, before, followers in entries}
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        raise FileError(f"{path} holds no two-stage mapping: {type(error).__name__}: {error}") from error
