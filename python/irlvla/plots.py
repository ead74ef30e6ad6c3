"""The course of a training as a picture, from what it logged."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from irlvla.errors import FileError
from irlvla.files import write_whole
from irlvla.types import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[int], list[float]]  # steps and values
REFERENCES = {"human": "-.", "constant_velocity": ":"}  # what is reached without learning, logged at step 0
SMOOTHING = 0.05  #: share of the curve over which losses are averaged


def draw_learning_curve(metrics: Path, out: Path) -> Path:
    """Draw the losses, the EPDMS of held-out scenes with its sub-metrics, and the displacement over the steps of a run.

    Level lines are what people reach in these scenes, and what constant velocity does.

    Args:
        metrics: the metrics.jsonl of a run, which may be in progress.
        out: the picture (.png).

    Raises:
        FileError: there are no metrics, or no losses among them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes a second to import
    from matplotlib.figure import Figure

    curves = read_curves(metrics)
    losses = [name for name in curves if name.startswith("losses/")]
    if not losses:
        raise FileError(f"{metrics} holds no losses to draw")
    figure = Figure(figsize=(13.0, 8.0))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.07, top=0.95, wspace=0.12, hspace=0.25)
    axes = figure.subplots(2, 2).flat
    _draw_losses(axes[0], {name.removeprefix("losses/"): curves[name] for name in losses})
    _draw_held_out(axes[1], "EPDMS in held-out scenes", curves, ["epdms"])
    _draw_held_out(axes[2], "its sub-metrics", curves, METRICS, compare=False)
    _draw_held_out(axes[3], "displacement from the human's drive [m]", curves, ["ade", "fde"])
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
    shown = [name for name in names if f"validation/{name}" in curves]
    for i, name in enumerate(shown):
        axes.plot(*curves[f"validation/{name}"], color=f"C{i}", marker=".", label=name)
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
