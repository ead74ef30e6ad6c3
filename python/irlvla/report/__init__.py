"""The report of an evaluation: one HTML file that needs no network and no script."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from numpy.typing import NDArray

from irlvla.files import write_whole
from irlvla.plots import read_curves
from irlvla.report.charts import line_chart
from irlvla.report.gallery import Exhibit, exhibit, improvements, worst
from irlvla.run.journal import CONFIG, ENVIRONMENT, METRICS
from irlvla.run.progress import track
from irlvla.types import METRICS as SUB_METRICS
from irlvla.types import Observation, Plan, Scene, Trajectory

REPORT, SUMMARY, SCORES, PLANS, OFFICIAL = "report.html", "summary.json", "scores.csv", "plans", "official"
BINS = 10  # of a reliability curve

Array = NDArray[np.float64]

#: Charts of a training: what was logged under these names, or begins like them.
CURVES = {
    "EPDMS in held-out scenes": ("validation/epdms", "blanked/epdms"),
    "Reward: believed and exact": ("reward/believed", "reward/exact", "audit/believed", "audit/exact"),
    "Rank correlation with the exact score": ("validation/spearman",),
    "Loss": ("losses/total",),
}


class Scenes(Protocol):
    """What scenes are taken from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Observation, Scene, Trajectory]: ...


def write_report(directory: Path, summary: Mapping[str, Any], scenes: Scenes, gallery: int = 6) -> Path:
    """Write report.html into the directory of an evaluation, from the files there.

    Args:
        summary: what summary.json holds.
        scenes: what was driven in.
        gallery: how many improvements, and how many failures, are shown.
    """
    settings = yaml.safe_load((directory / CONFIG).read_text())
    scores = read_scores(directory / SCORES)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "change": _change, "p": _p, "label": label}
    page = environment.from_string(Path(__file__).with_name("page.html").read_text()).render(
        summary=summary,
        settings=settings,
        stamp=dict(_stamp(json.loads((directory / ENVIRONMENT).read_text()), settings, summary)),
        columns=_columns(summary),
        curves=dict(_curves(summary)),
        reliability=dict(_reliability(scores)),
        exhibits=_exhibits(directory, scenes, summary, settings, scores, gallery),
    )
    return write_whole(directory / REPORT, page)


def read_scores(path: Path) -> dict[str, dict[str, Array]]:
    """The columns of a table of scores by policy; NaN where nothing was measured."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in (rows[0] if rows else {}) if name not in ("policy", "row", "token", "valid", "causes")]
    policies = dict.fromkeys(row["policy"] for row in rows)
    return {
        policy: {name: np.array([float(row[name] or "nan") for row in rows if row["policy"] == policy]) for name in names}
        for policy in policies
    }


def overview(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the shortest table of an evaluation: one row for each policy."""
    there = {name for of in summary["policies"].values() for name, values in of["metrics"].items() if values["count"]}
    shown = [name for name in ("pdms", *SUB_METRICS, "ade") if name in there]
    header = ["policy", "EPDMS", "95 % interval", *map(label, shown), "ms/scene", "failed"]
    rows = []
    for name, of in summary["policies"].items():
        whole = of["metrics"]["epdms"]
        means = [_number(of["metrics"].get(column, {}).get("mean"), 3) for column in shown]
        interval = f"{_number(whole['low'])}-{_number(whole['high'])}"
        rows.append([name, _number(whole["mean"]), interval, *means, _number(of["latency_ms"]["median"], 1), str(of["failed"])])
    return header, rows


# -- what the page says ------------------------------------------------------------------------------------------------


def label(column: str) -> str:
    """The name of a column for readers: "EPDMS", "believed NC", "ADE [m]"."""
    units = {"ade": "ADE [m]", "fde": "FDE [m]", "min_ade": "min ADE [m]", "min_fde": "min FDE [m]", "ahe": "AHE [rad]", "fhe": "FHE [rad]"}
    if column in units:
        return units[column]
    words = column.split("_")
    known = {*SUB_METRICS, "epdms", "pdms"}
    return " ".join(word.upper() if word in known else word for word in words)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _change(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _columns(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which columns stand in which table."""
    there = dict.fromkeys(name for of in summary["policies"].values() for name, values in of["metrics"].items() if values["count"])
    main = [name for name in ("epdms_legacy", "pdms", "believed") if name in there]
    sub = [name for name in SUB_METRICS if name in there]
    v1 = [name for name in there if name.startswith("pdms_")]
    rest = [name for name in there if name not in {"epdms", *main, *sub, *v1} and not name.startswith("believed_")]
    return {"main": main, "sub": sub, "v1": v1, "rest": rest}


def _stamp(environment: Mapping[str, Any], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the numbers were made with."""
    git, machine = environment["git"], environment["machine"]
    yield "dataset", " ".join(f"{name}={value}" for name, value in settings["data"].items() if value not in (None, []))
    yield "scenes", str(summary["scenes"])
    yield "human filter", f"{summary['human_filter']} (the devkit since 359c7f7); legacy: its score before that"
    yield "traffic", settings["traffic"]
    yield "seed", f"{summary['seed']}; {summary['resamples']} resamples"
    yield "versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    yield "commit", "outside of a repository" if git is None else git["commit"] + (", with changes" if git["dirty"] else "")
    plugins = [f"{plugin['name']} {plugin.get('version', '')}".strip() for plugin in environment["plugins"]]
    yield "plugins", ", ".join(dict.fromkeys(plugins))
    yield "machine", ", ".join([f"{machine['cores']} cores of {machine['cpu']}", *(gpu["name"] for gpu in machine["gpus"])])
    yield "started", environment["started"]


def _curves(summary: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Markup]]]:
    """Charts of the trainings that the policies come from, by policy, where these are known."""
    for name, of in summary["policies"].items():
        run = run_of(of["source"].get("policy"))
        if run is not None:
            logged = read_curves(run / METRICS)
            lines = {title: {line: _points(logged[line]) for line in names if line in logged} for title, names in CURVES.items()}
            if charts := {title: line_chart(found) for title, found in lines.items() if any(len(line) > 1 for line in found.values())}:
                yield f"{name} ({run})", charts


def run_of(saved: str | None) -> Path | None:
    """The directory of the run that a saved model lies in; None if it lies in none."""
    parents = Path(saved).resolve().parents if saved and Path(saved).exists() else ()
    return next((folder for folder in parents if (folder / METRICS).exists() and (folder / CONFIG).exists()), None)


def _points(curve: tuple[Sequence[float], Sequence[float]]) -> list[tuple[float, float]]:
    return list(zip(*curve, strict=True))


def _reliability(scores: Mapping[str, Mapping[str, Array]]) -> Iterator[tuple[str, Markup]]:
    """Charts of what the reward believes of what was driven, against the exact value, by metric."""
    for metric in ("epdms", *SUB_METRICS):
        name = "believed" if metric == "epdms" else f"believed_{metric}"
        columns = [(of[name], of[metric]) for of in scores.values() if name in of]
        if not columns:
            continue
        believed, exact = (np.concatenate(values) for values in zip(*columns, strict=True))
        known = ~np.isnan(believed) & ~np.isnan(exact)
        if known.any():
            points, error = reliability(believed[known], exact[known])
            lines = {"measured": points, "perfect": [(0.0, 0.0), (1.0, 1.0)]}
            chart = line_chart(lines, (0.0, 1.0, 0.0, 1.0), dots=True, square=True)
            yield f"{label(metric)}: calibration error {error:.3f}", chart


def reliability(believed: Array, exact: Array) -> tuple[list[tuple[float, float]], float]:
    """Of values that are believed alike, the mean belief and the mean truth; and how far they lie apart on average."""
    place = np.minimum((believed * BINS).astype(int), BINS - 1)
    bins = [place == number for number in range(BINS) if (place == number).any()]
    points = [(float(believed[of].mean()), float(exact[of].mean())) for of in bins]
    error = sum(of.mean() * abs(x - y) for of, (x, y) in zip(bins, points, strict=True))
    return points, float(error)


def _exhibits(
    directory: Path, scenes: Scenes, summary: Mapping[str, Any], settings: Mapping[str, Any], scores: Mapping[str, Any], count: int
) -> dict[str, list[Exhibit]]:
    """The gallery, by title."""
    subject, baseline = summary["subject"], summary["baseline"]
    chosen = {f"Failures of {subject}": (worst(scores[subject]["epdms"], count), [subject])}
    if subject != baseline:
        better = improvements(scores[subject]["epdms"], scores[baseline]["epdms"], count)
        worse = improvements(scores[baseline]["epdms"], scores[subject]["epdms"], count)
        both = [subject, baseline]
        chosen = {f"Where {subject} is better than {baseline}": (better, both), "Where it is worse": (worse, both), **chosen}
    plans = {name: Plan.load(directory / PLANS / f"{name}.safetensors") for name in {subject, baseline}}
    found: dict[str, list[Exhibit]] = {}
    with track(sum(len(rows) for rows, _ in chosen.values()), "report") as progress:
        for title, (rows, names) in chosen.items():
            found[title] = []
            for row in rows:
                found[title].append(exhibit(scenes[row], {name: plans[name][row : row + 1] for name in names}, settings["traffic"]))
                progress.advance()
    return found
