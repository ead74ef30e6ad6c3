"""Comfort (the scripts say smoothness): which share of a drive keeps nuPlan's bounds, from what an agent wrote at every step.

What the official script does is done here, what is odd in it too: yaw rates are CARLA's, in degrees per second, but their bounds are
in radians; the yaw acceleration is a second look at the yaw rate; steps of 0.05 s are taken for 0.1 s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import savgol_filter

from irlvla import FileError

Array = NDArray[np.float64]

NAME = "metric_info.json"  #: of the file in the folder of a route
PART = 20  #: steps that are judged together
WINDOW, ORDER, INTERVAL = 7, 2, 0.1  #: of the Savitzky-Golay filter: steps, order of its polynomials, and seconds between steps
LONGITUDINAL = -4.05, 2.40  #: acceleration [m/s^2]
LATERAL, JERK, LONGITUDINAL_JERK = 4.89, 8.37, 4.13  #: magnitudes [m/s^2, m/s^3, m/s^3]
YAW_ACCELERATION, YAW_RATE = 1.93, 0.95


def find_drive(folder: Path, save_name: str) -> Path | None:
    """The file of a route: in the folder that its record names, or in one whose name ends so; None if there is none.

    Raises:
        FileError: there are several.
    """
    if not save_name:
        return None
    found = [folder / save_name / NAME] if (folder / save_name / NAME).is_file() else sorted(folder.glob(f"*_{save_name}/{NAME}"))
    if len(found) > 1:
        raise FileError(f"{folder} holds several drives {save_name}: {found[0].parent.name} and {found[1].parent.name}")
    return found[0] if found else None


def comfort_of(file: Path) -> float | None:
    """Share of the whole parts of a drive that are comfortable, of a shorter drive 0 or 1; None of one that is too short to be judged.

    Raises:
        FileError: the file is no JSON, or of another layout.
    """
    try:
        steps = list(json.loads(file.read_text()).values())
        columns = {
            name: np.array([step[name] for step in steps], dtype=np.float64).reshape(len(steps), 3)
            for name in ("acceleration", "angular_velocity", "forward_vector", "right_vector")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = f"a step has no {error}" if isinstance(error, KeyError) else error
        raise FileError(f"{file} is no whole {NAME}: {cause}") from error
    if len(steps) <= ORDER:
        return None
    signals = _signals(**columns)
    if len(steps) <= PART:
        return float(_is_comfortable(signals))
    parts = [_is_comfortable(signals[:, start : start + PART]) for start in range(0, len(steps) - PART + 1, PART)]
    return parts.count(True) / len(parts)


def _signals(acceleration: Array, angular_velocity: Array, forward_vector: Array, right_vector: Array) -> Array:
    """Longitudinal, lateral and whole acceleration, and yaw rate, "4 N"."""
    flat = acceleration[:, :2]
    along, across = (np.einsum("ij,ij->i", flat, axis[:, :2]) for axis in (forward_vector, right_vector))
    return np.stack([along, across, np.hypot(flat[:, 0], flat[:, 1]), angular_velocity[:, 2]])


def _is_comfortable(signals: Array) -> bool:
    def smooth(values: Array, **derivative: Any) -> Array:
        return savgol_filter(values, min(WINDOW, signals.shape[1]), ORDER, **derivative)

    along, across, whole = (smooth(values) for values in signals[:3])
    turning = smooth(_unwrapped(signals[3]))
    jerk, along_jerk = (smooth(values, deriv=1, delta=INTERVAL) for values in (whole, along))
    return bool(
        np.all((along > LONGITUDINAL[0]) & (along < LONGITUDINAL[1]))
        and np.all(np.abs(across) < LATERAL)
        and np.all(np.abs(jerk) < JERK)
        and np.all(np.abs(along_jerk) < LONGITUDINAL_JERK)
        and np.all(np.abs(turning) < min(YAW_ACCELERATION, YAW_RATE))
    )


def _unwrapped(turning: Array) -> Array:
    """As angles are unwrapped, in turns of 2 pi, although these are rates."""
    turns = np.cumsum(np.round(np.diff(turning) / (2.0 * np.pi)))
    return turning - 2.0 * np.pi * np.concatenate([[0.0], turns])
