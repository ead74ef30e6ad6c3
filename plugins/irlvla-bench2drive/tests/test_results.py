"""The metrics, from recorded and from made result files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

import irlvla
from irlvla import FileError
from irlvla.cli import app
from irlvla.testing import benchmark_checks
from irlvla_bench2drive.in_carla import junctions
from irlvla_bench2drive.metrics import ability_of, efficiency, mean
from irlvla_bench2drive.records import read_records
from irlvla_bench2drive.routes import COUNT, abilities, routes

test_benchmark = benchmark_checks("bench2drive")

DATA = Path(os.environ.get("IRLVLA_REAL_DATA", Path(__file__).resolve().parents[4] / "shared" / "real")) / "bench2drive_results"
recorded = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA} (set IRLVLA_REAL_DATA to another place)")
KINDS = ("collisions_vehicle", "red_light", "stop_infraction", "min_speed_infractions", "vehicle_blocked", "route_timeout")


def record(
    route: str = "1711", status: str = "Completed", score: float = 100.0, completion: float = 100.0, **infractions: list[str]
) -> Any:
    return {
        "index": 0,
        "route_id": f"RouteScenario_{route}_rep0",
        "save_name": f"RouteScenario_{route}_rep0_drive",
        "status": status,
        "infractions": {kind: infractions.get(kind, []) for kind in KINDS},
        "scores": {"score_route": completion, "score_penalty": 1.0, "score_composed": score},
    }


def write(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps({"_checkpoint": {"records": records}}))
    return path


def tables(*files: Path, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    return irlvla.build("benchmark", {"name": "bench2drive", **settings}).summarise(files)


def values(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {row["metric"].split(" [")[0]: row["value"] for row in found["Bench2Drive"]}


def first_of(scenario: str) -> str:
    return next(route.id for route in routes().values() if route.scenario == scenario)


# -- recorded ----------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize(
    ("name", "score", "success", "speed", "driven"),
    [("UniAD-Base", 45.81316410000001, 36 / 220, 129.208, 218), ("VAD", 42.35073638636364, 33 / 220, 157.950, 213)],
)
def test_the_recorded_files_come_to_what_was_published(name: str, score: float, success: float, speed: float, driven: int) -> None:
    """The scores that stand in the files. Their last bit depends on the order in which they were added."""
    file = DATA / f"{name}.json"
    found = tables(file)
    assert values(found)["driving score"] == pytest.approx(score, rel=1e-15)
    assert values(found)["success rate"] == success == json.loads(file.read_text())["success rate"]
    assert round(values(found)["efficiency"], 3) == speed
    assert values(found)["comfort"] is None
    without = found["Routes without success"]
    assert len(without) == COUNT - round(success * COUNT)
    assert sum(row["status"] == "missing" for row in without) == COUNT - driven


@recorded
def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--benchmark", "bench2drive", str(DATA / "VAD.json"), f"out={tmp_path / 'out'}"])
    assert result.exit_code == 0, result.output
    assert "driving score [0, 100]" in result.output
    assert "42.3507" in result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["tables"]["Bench2Drive"][1]["value"] == 0.15


@recorded
def test_files_are_put_together_in_any_order(tmp_path: Path) -> None:
    records = json.loads((DATA / "UniAD-Base.json").read_text())["_checkpoint"]["records"]
    parts = [write(tmp_path / f"{i}.json", *records[i::3]) for i in range(3)]
    assert tables(*parts) == tables(*reversed(parts)) == tables(DATA / "UniAD-Base.json")


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_of_all_routes(tmp_path: Path) -> None:
    blocked = record("1790", "Failed - Agent got blocked", score=12.5, completion=25.0, vehicle_blocked=["blocked"])
    crashed = record("1792", "Failed - Agent crashed", score=0.0, completion=0.0)
    slow = record("1825", min_speed_infractions=["Average speed is 50.0% of the surrounding traffic's one"])
    hit = record("1833", score=60.0, collisions_vehicle=["Agent collided"])
    found = tables(write(tmp_path / "r.json", blocked, crashed, slow, hit, record("1711", "Perfect")))
    assert values(found)["driving score"] == (12.5 + 0.0 + 100.0 + 60.0 + 100.0) / COUNT
    assert values(found)["success rate"] == 2 / COUNT  # a low speed is no infraction
    assert values(found)["efficiency"] == 50.0
    assert found["Bench2Drive"][0]["of"] == "220 routes, 215 missing routes count as 0"
    rows = {row["route"]: row for row in found["Routes without success"]}
    assert "1711" not in rows
    assert "1825" not in rows
    assert len(rows) == COUNT - 2
    assert rows["1790"]["status"] == "Failed - Agent got blocked"
    assert rows["1790"]["infractions"] == "1 vehicle_blocked"
    assert rows["1792"]["status"] == "Failed - Agent crashed"
    assert rows["1833"]["infractions"] == "1 collisions_vehicle"
    assert rows["1852"] == {
        "route": "1852",
        "town": "Town12",
        "scenario": "AccidentTwoWays",
        "status": "missing",
        "score": 0.0,
        "efficiency": None,
        "comfort": None,
        "infractions": "",
    }


def test_efficiency_is_a_mean_of_means_without_wild_speeds(tmp_path: Path) -> None:
    def at(route: str, *speeds: str) -> Any:
        return record(route, min_speed_infractions=[f"Average speed is {speed}% of the surrounding traffic's one" for speed in speeds])

    file = write(tmp_path / "r.json", at("1711", "100", "300.5", "1000.01"), at("1790", "80.0"), at("1792"), at("1825", "3306.64"))
    by_route = {found.route.id: efficiency(found) for found in read_records([file])}
    assert by_route == {"1711": 200.25, "1790": 80.0, "1792": None, "1825": None}
    assert values(tables(file))["efficiency"] == (200.25 + 80.0) / 2
    with pytest.raises(FileError, match=r"r\.json: route 1711: .*names no speed in per cent"):
        tables(write(tmp_path / "r.json", at("1711", "inf")))
    assert values(tables(write(tmp_path / "r.json")))["efficiency"] is mean([]) is None


def test_abilities_by_hand(tmp_path: Path) -> None:
    merging, sign, both = (first_of(name) for name in ("ParkingExit", "T_Junction", "EnterActorFlow"))
    file = write(
        tmp_path / "r.json",
        record(merging),
        record(sign, "Failed", completion=30.0, score=30.0),
        record(both, collisions_vehicle=["Agent collided"], score=60.0),
    )
    (tmp_path / "j.json").write_text(json.dumps({"junctions": {sign: 0.3, both: 0.99}}))
    found = {row["ability"]: row for row in tables(file, junctions=str(tmp_path / "j.json"))["Abilities"]}
    assert found["Merging"]["value"] == 1 / 2
    assert found["Traffic_Signs"]["value"] == 1 / 2  # the first came no further than its junction, the second past it
    assert found["Overtaking"]["value"] is None
    assert found["mean"]["value"] is None
    undecided = {row["ability"]: row for row in tables(file)["Abilities"]}
    assert (undecided["Traffic_Signs"]["at least"], undecided["Traffic_Signs"]["at most"]) == (0.0, 1.0)
    assert undecided["Traffic_Signs"]["of"] == "2 driven routes (set benchmark.junctions)"
    assert undecided["Merging"] == found["Merging"]


def test_a_second_chance_needs_the_signs_obeyed(tmp_path: Path) -> None:
    sign = first_of("T_Junction")
    for kind in ("red_light", "stop_infraction"):
        records = read_records([write(tmp_path / "r.json", record(sign, "Failed", completion=90.0, **{kind: ["ran"]}))])
        assert ability_of(records, None)[-1].value == ability_of(records, {})[-1].value == 0.0  # the junction does not matter
    (tmp_path / "j.json").write_text('{"junctions": {}}')
    file = write(tmp_path / "r.json", record(sign, "Failed", completion=90.0))
    with pytest.raises(FileError, match=rf"j\.json does not hold route '{sign}'"):
        tables(file, junctions=str(tmp_path / "j.json"))


def test_the_mean_is_of_the_five_abilities(tmp_path: Path) -> None:
    scenarios = {name: min(needed) for name, needed in abilities().items()}
    file = write(tmp_path / "r.json", *(record(route) for route in {first_of(scenario) for scenario in scenarios.values()}))
    rows = tables(file)["Abilities"]
    assert [row["ability"] for row in rows] == ["Overtaking", "Merging", "Emergency_Brake", "Give_Way", "Traffic_Signs", "mean"]
    assert all(row["value"] == 1.0 for row in rows)


def test_the_routes_are_those_of_the_benchmark() -> None:
    assert len(routes()) == COUNT
    assert set().union(*abilities().values()) >= {route.scenario for route in routes().values()}
    counts = {name: sum(route.scenario in needed for route in routes().values()) for name, needed in abilities().items()}
    assert counts == {"Overtaking": 45, "Merging": 80, "Emergency_Brake": 60, "Give_Way": 10, "Traffic_Signs": 95}


def test_junctions_are_found_on_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of one straight road, with a junction from x = 5 on, and a planner that puts a waypoint at every metre."""
    monkeypatch.setitem(sys.modules, "carla", SimpleNamespace(Location=lambda x, y, z: x, Map=lambda town, text: (town, text)))

    class Planner:
        def __init__(self, town: tuple[str, str], hop: float) -> None:
            assert (town, hop) == (("Town12", "<OpenDRIVE/>"), 1.0)

        def trace_route(self, start: float, end: float) -> list[tuple[Any, None]]:
            return [(SimpleNamespace(is_junction=x >= 5), None) for x in range(int(start), int(end))]

    monkeypatch.setitem(sys.modules, "agents.navigation.global_route_planner", SimpleNamespace(GlobalRoutePlanner=Planner))
    (tmp_path / "maps" / "Town12").mkdir(parents=True)
    (tmp_path / "maps" / "Town12" / "Town12.xodr").write_text("<OpenDRIVE/>")
    tree = ElementTree.fromstring("<routes/>")
    for id, places in (("1711", (0, 3, 20)), ("1773", (0, 4))):
        waypoints = ElementTree.SubElement(ElementTree.SubElement(tree, "route", id=id, town="Town12"), "waypoints")
        for x in places:
            ElementTree.SubElement(waypoints, "position", x=str(x), y="0", z="0")
    ElementTree.ElementTree(tree).write(tmp_path / "routes.xml")
    junctions.main(str(tmp_path / "routes.xml"), str(tmp_path / "maps"), str(tmp_path / "j.json"))
    assert json.loads((tmp_path / "j.json").read_text()) == {"junctions": {"1711": (6 + 8) / 20}}


# -- comfort -----------------------------------------------------------------------------------------------------------


def drive(folder: Path, acceleration: np.ndarray, turning: float = 0.0, name: str = "RouteScenario_1711_rep0_drive") -> None:
    steps = {
        str(i): {
            "acceleration": [a, 0.0, 9.81],
            "angular_velocity": [0.0, 0.0, turning],
            "forward_vector": [1.0, 0.0, 0.0],
            "right_vector": [0.0, 1.0, 0.0],
        }
        for i, a in enumerate(acceleration.tolist())
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "metric_info.json").write_text(json.dumps(steps))


@pytest.mark.parametrize(
    ("acceleration", "turning", "expected"),
    [
        (np.zeros(60), 0.0, 1.0),
        (np.repeat([0.0, -5.0, 0.0], 20), 0.0, 2 / 3),  # the middle part brakes too hard
        (np.concatenate([np.zeros(40), np.full(19, -5.0)]), 0.0, 1.0),  # of a part that is not whole nothing counts
        (np.full(10, -5.0), 0.0, 0.0),
        (np.zeros(10), 0.0, 1.0),
        (np.zeros(40), 0.96, 0.0),
        (np.zeros(40), 0.94, 1.0),
        (np.tile([2.0, -2.0], 20), 0.0, 0.0),  # within the bounds, but jerking
        (np.zeros(2), 0.0, None),
    ],
)
def test_comfort_by_hand(tmp_path: Path, acceleration: np.ndarray, turning: float, expected: float | None) -> None:
    drive(tmp_path / "drives", acceleration, turning)
    found = tables(write(tmp_path / "r.json", record()), drives=str(tmp_path / "drives"))
    assert values(found)["comfort"] == (None if expected is None else pytest.approx(expected))


def test_comfort_is_a_mean_of_the_drives_that_are_there(tmp_path: Path) -> None:
    drive(tmp_path / "d", np.zeros(40))
    drive(tmp_path / "d", np.full(40, -5.0), name="bench2drive220_0_RouteScenario_1790_rep0_drive")  # as the public agents name it
    file = write(tmp_path / "r.json", record(), record("1790"), record("1792"))
    found = tables(file, drives=str(tmp_path / "d"))
    assert values(found)["comfort"] == 0.5
    assert found["Bench2Drive"][3]["of"] == "2 of 3 drives"
    drive(tmp_path / "d", np.zeros(40), name="bench2drive220_1_RouteScenario_1790_rep0_drive")
    with pytest.raises(FileError, match="several drives RouteScenario_1790"):
        tables(file, drives=str(tmp_path / "d"))


@pytest.mark.parametrize("content", ["{", "[]", '{"0": {"acceleration": [1, 2]}}', '{"0": 3}', "\xff"])
def test_damaged_drives_are_named(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "drives" / "RouteScenario_1711_rep0_drive"
    folder.mkdir(parents=True)
    (folder / "metric_info.json").write_text(content, encoding="latin-1")
    with pytest.raises(FileError, match=r"metric_info\.json is no whole metric_info\.json"):
        tables(write(tmp_path / "r.json", record()), drives=str(tmp_path / "drives"))


# -- files -------------------------------------------------------------------------------------------------------------

SPOILED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no record": (lambda it: 3, "record 0 (from 0) is not as the leaderboard writes them"),
    "no scores": (lambda it: {**it, "scores": {}}, "it has no 'score_composed'"),
    "no status": (lambda it: {key: value for key, value in it.items() if key != "status"}, "it has no 'status'"),
    "a score that is none": (
        lambda it: {**it, "scores": {**it["scores"], "score_composed": math.nan}},
        "the score nan is not between 0 and 100",
    ),
    "infractions": (lambda it: {**it, "infractions": {"red_light": 2}}, "the infractions 'red_light' are no list"),
    "an unknown route": (
        lambda it: {**it, "route_id": "RouteScenario_1771_rep0"},
        "route 1771 is none of the 220 of Bench2Drive. Did you mean '17",
    ),
    "no route": (lambda it: {**it, "route_id": "Route 7"}, "'Route 7' is not how the leaderboard names a route"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_records_are_named(tmp_path: Path, name: str) -> None:
    spoil, expected = SPOILED[name]
    with pytest.raises(FileError) as caught:
        tables(write(tmp_path / "r.json", spoil(record())))
    assert expected in str(caught.value)
    assert "r.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"_checkpoint": {"rec', "is no JSON, or cut off"),
        ("", "is no JSON, or cut off"),
        ("[" * 100_000, "is no JSON, or cut off"),
        ("[1]", "is no result file of the leaderboard: it has no _checkpoint"),
        ('{"_checkpoint": {}}', "is no result file of the leaderboard: it has no _checkpoint"),
        ('{"_checkpoint": {"records": {}}}', "its records are no list"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(FileError, match=r"r\.json") as caught:
        tables(tmp_path / "r.json")
    assert expected in str(caught.value)


def test_a_route_counts_once(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.json", record()), write(tmp_path / "two.json", record("1790"), record())
    with pytest.raises(FileError, match=r"route 1711 is in .*one\.json and again in .*two\.json; give each route once"):
        tables(one, two)


@pytest.mark.parametrize(("field", "value"), [("junctions", "nowhere.json"), ("drives", "nowhere")])
def test_settings_that_lead_nowhere(tmp_path: Path, field: str, value: str) -> None:
    with pytest.raises(FileError, match=rf"benchmark\.{field}: .*{value}"):
        tables(write(tmp_path / "r.json", record()), **{field: str(tmp_path / value)})


@pytest.mark.parametrize("content", ["{", "{}", '{"junctions": [1]}', '{"junctions": {"1711": "x"}}', '{"junctions": {"1711": NaN}}'])
def test_junctions_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "j.json").write_text(content)
    with pytest.raises(FileError, match=r"benchmark\.junctions: .*j\.json is no file of junctions\.py"):
        tables(write(tmp_path / "r.json", record()), junctions=str(tmp_path / "j.json"))
