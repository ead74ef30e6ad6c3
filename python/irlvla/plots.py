"""The course of a training as a picture, from what it logged; and how well a reward predicts."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from irlvla.errors import FileError
from irlvla.files import write_whole
from irlvla.types import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]  # steps and values
REFERENCES = {"human": "-.", "constant_velocity": ":"}  # what is reached without learning, logged at step 0
Values = np.ndarray[Any, np.dtype[np.float64]]
BINS = 10  # of reliability
SMOOTHING = 0.05  #: share of the curve over which losses are averaged


class Panel(NamedTuple):
    """What was measured in held-out scenes, in one picture."""

    title: str
    names: Sequence[str]  # of validation, or with a slash of any curve
    compare: bool  # with what is reached without looking, and without learning


POLICY_PANELS = (
    Panel("EPDMS in held-out scenes", ["epdms"], True),
    Panel("its sub-metrics", METRICS, False),
    Panel("displacement from the human's drive [m]", ["ade", "fde"], True),
)
REINFORCEMENT_PANELS = (
    *POLICY_PANELS[:2],
    Panel(
        "what is believed, and what is true", [f"{where}/{what}" for where in ("audit", "reward") for what in ("believed", "exact")], False
    ),
)
REWARD_PANELS = (
    Panel("AUC in held-out scenes", [f"auc_{name}" for name in METRICS], False),
    Panel("order of candidates, and EP", ["spearman", "gain", "human_above", "r2_ep"], False),
    Panel("regret of the candidate rated highest", ["regret"], False),
)


def draw_learning_curve(metrics: Path, out: Path, panels: Sequence[Panel] = POLICY_PANELS) -> Path:
    """Draw the losses and what was measured in held-out scenes over the steps of a run.

    Level lines are what people reach in these scenes, and what constant velocity does.

    Args:
        metrics: the metrics.jsonl of a run, which may be in progress.
        out: the picture (.png).
        panels: three of them.

    Raises:
        FileError: there are no metrics, or no losses among them.
    """
    curves = read_curves(metrics)
    losses = [name for name in curves if name.startswith("losses/")]
    if not losses:
        raise FileError(f"{metrics} holds no losses to draw")
    figure = _figure(13.0, 8.0)
    axes = figure.subplots(2, 2).flat
    _draw_losses(axes[0], {name.removeprefix("losses/"): curves[name] for name in losses})
    for axis, panel in zip(axes[1:], panels, strict=True):
        _draw_held_out(axis, panel.title, curves, panel.names, panel.compare)
    return _written(figure, out)


def draw_reliability(predictions: Mapping[str, tuple[Values, Values]], out: Path) -> Path:
    """Draw by metric what happened where a reward predicted so much: on the diagonal it is right, and below it overrates.

    Args:
        predictions: what was predicted, and what it was, by metric.
        out: the picture (.png).
    """
    figure = _figure(12.0, 3.0 * math.ceil(len(predictions) / 4))
    axes = figure.subplots(math.ceil(len(predictions) / 4), 4, squeeze=False).flat
    for axis, (name, (predicted, exact)) in zip(axes, predictions.items(), strict=False):
        bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
        count = np.bincount(bins, minlength=BINS)
        there = count > 0
        x, y = (np.bincount(bins, values, BINS)[there] / count[there] for values in (predicted, exact))
        axis.plot([0.0, 1.0], [0.0, 1.0], color="0.7", linewidth=1.0)
        axis.plot(x, y, marker="o", markersize=3.0)
        axis.bar((np.arange(BINS) + 0.5) / BINS, count / count.sum(), 1.0 / BINS, color="C1", alpha=0.3)
        axis.set(title=name.upper(), xlim=(0.0, 1.0), ylim=(0.0, 1.0))
    for axis in axes[len(predictions) :]:
        axis.axis("off")
    figure.supxlabel("predicted (bars: how often)")
    figure.supylabel("exact")
    return _written(figure, out)


def draw_scores(predicted: Values, exact: Values, out: Path) -> Path:
    """Draw predicted against exact scores of candidates, as a map of how many there are.

    Args:
        predicted, exact: scores, of any shape.
        out: the picture (.png).
    """
    figure = _figure(6.0, 5.4)
    axis = figure.subplots()
    edges = np.linspace(0.0, 1.0, 41)
    table, *_ = np.histogram2d(exact.ravel(), predicted.ravel(), bins=(edges, edges))
    picture = axis.imshow(np.log10(table.T + 1.0), origin="lower", extent=(0.0, 1.0, 0.0, 1.0), cmap="viridis")
    axis.plot([0.0, 1.0], [0.0, 1.0], color="white", linewidth=1.0)
    axis.set(title="score of candidates", xlabel="exact", ylabel="predicted")
    figure.colorbar(picture, label="how many (log10, + 1)")
    return _written(figure, out)


def draw_hacking(courses: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]], out: Path) -> Path:
    """Draw believed and exact score along a search for what a reward overrates.

    Args:
        courses: by the name of the reward: steps, believed score and exact score.
        out: the picture (.png).
    """
    figure = _figure(7.0, 4.5)
    axis = figure.subplots()
    for i, (name, (steps, believed, exact)) in enumerate(courses.items()):
        axis.plot(steps, believed, color=f"C{i}", linestyle="--", label=f"{name}: believed")
        axis.plot(steps, exact, color=f"C{i}", label=f"{name}: exact")
    axis.set(xlabel="step of gradient ascent on the candidate", ylabel="score", ylim=(0.0, 1.02))
    axis.legend(fontsize="small")
    return _written(figure, out)


def _figure(width: float, height: float) -> Figure:
    """Of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _written(figure: Figure, out: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return write_whole(out, picture.getvalue())


def read_curves(metrics: Path) -> dict[str, Curve]:
    """By name the steps where a value was logged, and what it was there. Raises `FileError` if there is no such file."""
    curves: dict[str, Curve] = {}
    try:
        lines = metrics.read_text().splitlines(keepends=True)
    except OSError as error:
        raise FileError(f"{metrics} cannot be read: {error.strerror}") from error
    for line in lines:
        if not line.endswith("\n"):
            continue  # of a run in progress
        values = json.loads(line)
        for name in values.keys() - {"step", "time"}:
            if values[name] is not None:
                steps, found = curves.setdefault(name, ([], []))
                steps.append(values["step"])
                found.append(values[name])
    return dict(sorted(curves.items()))


def _draw_losses(axes: Axes, losses: dict[str, Curve]) -> None:
    """Each loss as it was logged, faint, and its running mean."""
    for i, (name, (steps, values)) in enumerate(losses.items()):
        axes.plot(steps, values, color=f"C{i}", alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=f"C{i}", label=name)
    axes.set_title("losses")
    axes.set_xlabel("step")
    if all(value > 0 for _, values in losses.values() for value in values):
        axes.set_yscale("log")
    axes.legend(fontsize="small")


def _draw_held_out(axes: Axes, title: str, curves: dict[str, Curve], names: Sequence[str], compare: bool = True) -> None:
    """What was measured of the policy; to compare, also with black images, and what people and constant velocity reach."""
    axes.set_title(title)
    axes.set_xlabel("step")
    places = {name: name if "/" in name else f"validation/{name}" for name in names}
    shown = [name for name in names if places[name] in curves]
    for i, name in enumerate(shown):
        axes.plot(*curves[places[name]], color=f"C{i}", marker=".", label=name)
        if compare and f"blanked/{name}" in curves:
            axes.plot(*curves[f"blanked/{name}"], color=f"C{i}", marker=".", linestyle="--", label=f"{name}, black images")
        for reference, style in REFERENCES.items():
            if compare and f"{reference}/{name}" in curves:
                label = f"{name}, {reference.replace('_', ' ')}"
                axes.axhline(curves[f"{reference}/{name}"][1][-1], color=f"C{i}", linestyle=style, linewidth=1.0, label=label)
    if shown:
        axes.legend(fontsize="small", ncols=1 if compare else 2)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)


def _smooth(values: list[float]) -> list[float]:
    """The mean of each value and of those just before it."""
    window = max(1, round(SMOOTHING * len(values)))
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
