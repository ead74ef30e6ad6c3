"""Files that others read: result tables and submissions in the devkit's layout."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from irlvla import InputError
from irlvla.files import write_whole
from irlvla.leaderboard import read_mapping, read_results, write_results

__all__ = ["read_mapping", "read_results", "write_results", "write_submission"]

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
