"""How sure a mean over scenes is: the bootstrap. Scenes are drawn with replacement, the same ones for all that is compared.

Efron and Tibshirani, An Introduction to the Bootstrap (1993): percentile intervals, and paired differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = dict[str, Any]  #: mean, low, high (None where nothing was measured) and count; of a difference also p

DRAWS = 2_000_000  # numbers that are held at once


def intervals(values: Array, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> list[Interval]:
    """The mean of each column of values "N M" over scenes, with its confidence interval. NaN is not measured, and left out.

    A resample that holds no scene where a column was measured says nothing of that column.
    """
    means = np.concatenate(list(_resampled(values, resamples, seed)))
    tail = 50.0 * (1.0 - confidence)
    found = []
    for column, drawn in zip(values.T, means.T, strict=True):
        known, drawn = column[~np.isnan(column)], drawn[~np.isnan(drawn)]
        low, high = np.percentile(drawn, [tail, 100.0 - tail]).tolist() if len(drawn) else (None, None)
        found.append({"mean": float(known.mean()) if len(known) else None, "low": low, "high": high, "count": len(known)})
    return found


def differences(ours: Array, theirs: Array, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> list[Interval]:
    """Ours less theirs "N M", over the scenes where both were measured, with the interval and the two-sided p-value.

    p: how often a resample has no difference or one of the other sign, twice, and never less than the resamples can tell.
    """
    change = ours - theirs
    found = intervals(change, resamples, seed, confidence)
    for interval, column in zip(found, np.concatenate(list(_resampled(change, resamples, seed))).T, strict=True):
        drawn = column[~np.isnan(column)]
        fewer = min((drawn <= 0.0).sum(), (drawn >= 0.0).sum())
        interval["p"] = min(1.0, 2.0 * (int(fewer) + 1) / (len(drawn) + 1)) if len(drawn) else None
    return found


def _resampled(values: Array, resamples: int, seed: int) -> Iterator[Array]:
    """Means "R M" of resamples, some at a time. A resample is how often each scene was drawn, so that means are a matrix product."""
    scenes, random = len(values), np.random.default_rng(seed)
    measured = ~np.isnan(values)
    sums = np.concatenate([np.where(measured, values, 0.0), measured.astype(np.float64)], axis=1)
    at_once = max(1, DRAWS // max(1, scenes))
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = random.integers(scenes, size=(rows, scenes)) + scenes * np.arange(rows)[:, None]
        total, count = np.split(np.bincount(drawn.ravel(), minlength=rows * scenes).reshape(rows, scenes) @ sums, 2, axis=1)
        with np.errstate(invalid="ignore"):
            yield total / count
