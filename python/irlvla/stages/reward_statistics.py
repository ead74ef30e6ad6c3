"""Statistics of a reward: what it predicted of candidates beside what they are worth exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from irlvla.candidates import Source
from irlvla.types import METRICS, Batch, Epdms

BINS = 10  #: of reliability
LEVELS = {"nc": (0.0, 0.5, 1.0), "ddc": (0.0, 0.5, 1.0)}  #: of metrics that know more than kept and failed

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Comparison(Batch):
    """K candidates in each of N scenes. NaN = not measured, or not predicted."""

    predicted: Float[Tensor, "N K 9"]
    exact: Float[Tensor, "N K 9"]
    source: Int[Tensor, "N K"]  # Source

    def scores(self) -> tuple[Array, Array]:
        """Predicted and exact, "N K"; without the metrics that one of them lacks."""
        lacking = self.predicted.isnan() | self.exact.isnan()
        predicted, exact = (_array(Epdms(values.masked_fill(lacking, torch.nan)).score()) for values in (self.predicted, self.exact))
        return predicted, exact

    def column(self, name: str, among: Bool[Tensor, "N K"] | None = None) -> tuple[Array, Array]:
        """What was predicted of a metric, and what it is, where both are known."""
        predicted, exact = self.predicted[..., METRICS.index(name)], self.exact[..., METRICS.index(name)]
        known = ~(predicted.isnan() | exact.isnan())
        known = known if among is None else known & among
        return _array(predicted[known]), _array(exact[known])

    def summary(self) -> dict[str, Any]:
        """All that is reported of them, ready for JSON."""
        by_source = {Source(kind).name.lower(): self._metrics(self.source == kind) for kind in self.source.unique().tolist()}
        predicted, exact = self.scores()
        return {
            "scenes": len(predicted),
            "candidates": predicted.shape[1],
            "metrics": self._metrics(None),
            "spearman": spearman(predicted, exact),
            "best_of": best_of(predicted, exact),
            "human_above": human_above(predicted),
            "sources": by_source,
        }

    def _metrics(self, among: Bool[Tensor, "N K"] | None) -> dict[str, dict[str, Any]]:
        found = {}
        for name in METRICS:
            predicted, exact = self.column(name, among)
            if len(exact):
                found[name] = measured(name, predicted, exact)
        return found


def _array(values: Tensor) -> Array:
    return values.double().cpu().numpy()


def measured(name: str, predicted: Array, exact: Array) -> dict[str, Any]:
    """Of a metric: the count and mean of labels, how far predictions are off, and how well failures, or differences in EP, are told.

    A metric with three values is predicted as an expectation: it fails where it is below 1; its Brier score and its calibration error
    are those of the expectation.
    """
    values: dict[str, Any] = {"count": len(exact), "mean": float(exact.mean()), "predicted": float(predicted.mean())}
    if name == "ep":
        return values | {"r2": r2(predicted, exact), "ece": calibration_error(predicted, exact)}
    values |= {"auc": auc(predicted, exact > 0.75), "brier": brier(predicted, exact), "ece": calibration_error(predicted, exact)}
    return values | ({"confusion": confusion(predicted, exact, LEVELS[name])} if name in LEVELS else {})


# -- statistics --------------------------------------------------------------------------------------------------------


def auc(predicted: Float[np.ndarray, " n"], kept: Bool[np.ndarray, " n"]) -> float | None:
    """The probability that what is kept is rated above what fails, equals counting half; None where all are the same."""
    good, bad = int(kept.sum()), int((~kept).sum())
    if not good or not bad:
        return None
    return float((rankdata(predicted)[kept].sum() - good * (good + 1) / 2) / (good * bad))


def brier(predicted: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> float:
    """The mean squared error of probabilities."""
    return float(np.square(predicted - exact).mean())


def reliability(predicted: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> Float[np.ndarray, "bins 3"]:
    """In bins of equal width of what was predicted: how many there are, and the means of both; bins without any are left out."""
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, values, BINS) for values in (predicted, exact)]
    there = count > 0
    return np.stack([count[there], *(total[there] / count[there] for total in sums)], 1)


def calibration_error(predicted: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> float:
    """By how much predictions are off on average in the bins of `reliability` (expected calibration error)."""
    count, mean, truth = reliability(predicted, exact).T
    return float((count * np.abs(mean - truth)).sum() / count.sum())


def confusion(predicted: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"], levels: tuple[float, ...]) -> list[list[int]]:
    """How often each level (rows) was taken for which (columns): the nearest to the expectation."""
    rows, columns = (np.abs(values[:, None] - np.array(levels)).argmin(1) for values in (exact, predicted))
    table = np.zeros((len(levels), len(levels)), dtype=int)
    np.add.at(table, (rows, columns), 1)
    return table.tolist()


def r2(predicted: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> float | None:
    """The share of the variance that is explained; None where there is none."""
    spread = np.square(exact - exact.mean()).sum()
    return float(1.0 - np.square(predicted - exact).sum() / spread) if spread > 0.0 else None


def spearman(predicted: Float[np.ndarray, "N K"], exact: Float[np.ndarray, "N K"]) -> float | None:
    """The mean over scenes of the rank correlation within each, of those where both differ between candidates."""
    ranks = [rankdata(values, axis=1) for values in (predicted, exact)]
    one, other = (values - values.mean(1, keepdims=True) for values in ranks)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    differ = lengths > 0.0
    return float(((one * other).sum(1)[differ] / lengths[differ]).mean()) if differ.any() else None


def best_of(predicted: Float[np.ndarray, "N K"], exact: Float[np.ndarray, "N K"]) -> dict[str, float | None]:
    """What it is worth to drive the candidate that is rated highest.

    Returns the exact score of a candidate at random, of the one that is chosen, and of the best there is; how much the chosen one
    falls short of that (regret); and what share of the possible gain over chance is reached.
    """
    chosen = np.take_along_axis(exact, predicted.argmax(1)[:, None], 1).mean()
    chance, best = exact.mean(), exact.max(1).mean()
    gain = float((chosen - chance) / (best - chance)) if best > chance else None
    return {"chance": float(chance), "chosen": float(chosen), "best": float(best), "regret": float(best - chosen), "gain": gain}


def human_above(predicted: Float[np.ndarray, "N K"]) -> float | None:
    """How often the human's drive, candidate 0, is rated above another, equals counting half; None where there is no other."""
    human, others = predicted[:, :1], predicted[:, 1:]
    return float(((human > others) + 0.5 * (human == others)).mean()) if others.size else None
