"""The report: one file without references, which says what the tables say and shows scenes with their causes."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from irlvla import report
from irlvla.configuration import read
from irlvla.report import overview, reliability, run_of
from irlvla.report.charts import line_chart
from irlvla.report.gallery import improvements, worst
from irlvla.stages import EvaluateConfig, evaluate

COUNT = 8
HOSTILE = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images, a reward, and a policy from a run that logged."""
    folder = tmp_path_factory.mktemp("report")
    from irlvla.checkpoint import save_pretrained
    from irlvla.registry import installed

    model = folder / "training" / "checkpoints" / "best" / "model"
    save_pretrained(installed().build_policy("status", "gaussian"), model)
    (folder / "training" / "config.yaml").touch()
    logged = [{"step": step, "time": 0.0, "losses/total": 5.0 / step, "validation/epdms": 0.1 * step} for step in range(1, 6)]
    (folder / "training" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    policies = {"straight": "constant_velocity", "learned": str(model), "human": "human"}
    data = {"name": "synthetic", "split": "val", "count": COUNT, "size": [32, 88]}
    settings = {"data": data, "policies": policies, "subject": "learned", "baseline": "human", "reward": "exact", "gallery": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        return evaluate(read(EvaluateConfig, {**settings, "resamples": 200, "out": str(folder / "run")}))


@pytest.fixture(scope="module")
def text(made: Path) -> str:
    return (made / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_needs_no_network_and_no_script(page: Page, text: str) -> None:
    assert not page.open  # every tag is closed
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "href", "srcset", "data", "action"} or (value or "").startswith("data:image/")
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="data:[^"]*"', "", text))


def test_it_fits_narrow_and_wide_windows_light_and_dark(page: Page, text: str) -> None:
    metas = {attributes.get("name"): attributes.get("content") for tag, attributes in page.tags if tag == "meta"}
    assert "width=device-width" in (metas["viewport"] or "")
    assert metas["color-scheme"] == "light dark"
    assert text.count('<div class="wide"><table>') == text.count("<table>")  # tables scroll by themselves
    assert "max-width: 100%" in text


def test_it_says_what_the_tables_say(made: Path, page: Page) -> None:
    summary = json.loads((made / "summary.json").read_text())
    for name, of in summary["policies"].items():
        assert name in page.text
        for column in ("epdms", "epdms_legacy", "pdms", "nc", "ep", "ade"):
            assert f"{of['metrics'][column]['mean']:.4f}" in page.text
        assert f"{of['latency_ms']['median']:.1f}" in page.text
    assert f"{summary['differences']['learned']['epdms']['mean']:+.4f}" in page.text
    assert "Two stages" not in page.text
    assert "What failed" not in page.text
    assert "EC" not in page.text.replace("commit", "")  # measured nowhere


def test_it_is_stamped(made: Path, page: Page) -> None:
    environment = json.loads((made / "environment.json").read_text())
    git = environment["git"]
    expected = [environment["versions"]["torch"], git["commit"] if git else "outside of a repository", "name=synthetic", "split=val"]
    for fact in [*expected, "human filter", "fixed", "legacy", "seed", "200 resamples"]:
        assert fact in page.text


def test_it_shows_curves_and_reliability(made: Path, page: Page) -> None:
    assert "How the policies were trained" in page.text
    assert str(made.parent / "training") in page.text
    assert "EPDMS: calibration error 0.000" in page.text  # the exact reward is right
    lines = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert len(lines) >= 2 + 2 * 2


def test_the_gallery_names_causes_and_shows_both_views(made: Path, page: Page) -> None:
    rows = report.read_scores(made / "scores.csv")
    failing = worst(rows["learned"]["epdms"], 2)
    assert failing
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) % 2 == 0
    for attributes in pictures[:2]:
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))  # type: ignore[union-attr]
        assert picture.width >= 400
    assert [attributes["alt"].split(" ", 1)[1] for attributes in pictures[:2]] == ["from above", "through the cameras"]  # type: ignore[union-attr]
    assert "Failures of learned" in page.text
    assert re.search(r"(NC|DAC|TLC|DDC|TTC) at \d\.\d s: .* \(\d+ m (ahead|behind).* of the start\)", page.text)


def test_what_others_named_is_no_code(made: Path) -> None:
    class Other:
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("not to be read")

    summary = json.loads((made / "summary.json").read_text())
    summary["failures"] = [{"policy": "learned", "row": 1, "token": HOSTILE, "cause": HOSTILE}] * 60
    before = (made / "report.html").read_text()
    text = report.write_report(made, summary, Other(), 0).read_text()
    (made / "report.html").write_text(before)
    assert HOSTILE not in text
    assert "and 10 more" in text
    assert HOSTILE in Page(text).text


def test_the_shortest_table_has_a_row_for_each_policy(made: Path) -> None:
    header, rows = overview(json.loads((made / "summary.json").read_text()))
    assert [row[0] for row in rows] == ["straight", "learned", "human"]
    assert header[:2] == ["policy", "EPDMS"]
    assert all(len(row) == len(header) for row in rows)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_scenes_are_chosen_by_what_they_show() -> None:
    ours, theirs = np.array([0.2, 1.0, 0.9, np.nan, 0.0]), np.array([0.9, 0.0, 0.88, 0.5, np.nan])
    assert improvements(ours, theirs, 5) == [1]
    assert improvements(theirs, ours, 5) == [0]
    assert worst(ours, 2) == [4, 0]
    assert worst(ours, 9) == [4, 0, 2]


def test_reliability_is_by_what_is_believed() -> None:
    believed, exact = np.array([0.05, 0.05, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    points, error = reliability(believed, exact)
    assert points == [pytest.approx((0.05, 0.5)), pytest.approx((0.975, 1.0))]
    assert error == pytest.approx((0.45 + 0.025) / 2)


def test_the_run_of_a_policy_is_found(tmp_path: Path) -> None:
    model = tmp_path / "run" / "checkpoints" / "best" / "model"
    model.mkdir(parents=True)
    assert run_of(str(model)) is None
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).touch()
    assert run_of(str(model)) == (tmp_path / "run").resolve()
    assert run_of("owner/name") is None
    assert run_of(None) is None


def test_charts_draw_every_point_within_their_frame() -> None:
    chart = Page(str(line_chart({"a & b": [(0.0, 1.0), (10.0, 3.0)], "flat": [(0.0, 2.0), (10.0, 2.0)]})))
    assert "a & b" in chart.text
    first, second = [attributes["points"] for tag, attributes in chart.tags if tag == "polyline"]
    places = np.array([point.split(",") for line in (first, second) for point in (line or "").split()], float)
    assert (places[:, 0] >= 0).all()
    assert (places <= [320, 200]).all()
    assert places[0, 1] > places[1, 1]  # up is down in pixels
    one = Page(str(line_chart({"one": [(1.0, 1.0)]})))
    assert "nan" not in str(one.tags)
