"""Golden files against this package, through the library and the command line; bad files; the doctor."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import irlvla
from irlvla import cli, golden
from irlvla.conformance import compare, self_check
from irlvla.errors import FileError
from irlvla.ops import reference
from irlvla.types import METRICS

GOLDEN = Path(__file__).parent / "golden"
PUBLIC = GOLDEN / "public.npz"


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: run("doctor") -> exit code, output, errors."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["irlvla", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        done = capsys.readouterr()
        assert "Traceback" not in done.out + done.err
        return end.value.code or 0, done.out, done.err

    return run


@pytest.fixture(scope="session")
def arrays():
    with np.load(PUBLIC, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture
def write(arrays, tmp_path):
    """A copy of a golden file with changes; None drops an array."""

    def write(**changes):
        path = tmp_path / "changed.npz"
        np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        return path

    return write


# -- agreement ---------------------------------------------------------------------------------------------------------


def test_the_small_set_agrees(device):
    report = compare([GOLDEN], device)
    assert report.mismatches == 0, [check for check in report.checks.values() if check.mismatches]
    assert report.scenes == len(golden.load(GOLDEN)) > 80
    assert report.candidates > 500
    assert {*METRICS, "score", "states", "pdms score", "human nc", "reference progress"} <= report.checks.keys()
    assert all(check.fragile < check.candidates / 5 for check in report.checks.values())
    assert report.rate > 0


@pytest.mark.parametrize("name", ["public", "adversarial", "reactive", "twostage"])
def test_full_sets_agree(shared_golden, device, name):
    report = compare([shared_golden / name], device)
    assert report.mismatches == 0, [check for check in report.checks.values() if check.mismatches]


def test_the_loader_reads_what_the_schema_says(arrays):
    scenes = golden.load(PUBLIC)
    assert [scene.name for scene in scenes] == arrays["scene_name"].tolist()
    np.testing.assert_array_equal(np.concatenate([scene.candidates for scene in scenes]), arrays["candidates"])
    np.testing.assert_array_equal(np.concatenate([scene.scene.points for scene in scenes]), arrays["poly_pts"])
    np.testing.assert_array_equal(np.concatenate([scene.scene.agent_state for scene in scenes]), arrays["agent_state"])
    np.testing.assert_array_equal(np.concatenate([scene.expected["epdms"].ravel() for scene in scenes]), arrays["out_epdms"])
    for scene in scenes:
        assert scene.scene.human.isnan().all() == (not scene.human_filter)
        assert scene.expected["extended_comfort"].shape == (len(scene.candidates), len(scene.previous_candidates))
        assert scene.scene.polygon_on_route[scene.scene.light_polygon].all()


def test_the_scene_by_hand_has_the_same_answers_in_plain_torch():
    """Three implementations: the numbers in golden.py are of a third, in numpy."""
    scene, plans = golden.handmade_scene(), torch.tensor(list(golden.HANDMADE_PLANS.values()), dtype=torch.float64)
    result = reference.score_scene(scene, plans, pdms=True)
    known = torch.tensor(golden.HANDMADE_VALUES, dtype=torch.float64)
    torch.testing.assert_close(result.values[:, :8], known[:, :8], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.pdms.score(), torch.tensor(golden.HANDMADE_PDMS, dtype=torch.float64), rtol=0, atol=1e-9)
    assert {tuple(column) for column in known.T.tolist()} >= {(1.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0)}


def test_self_check(device):
    assert self_check(device) == []


# -- disagreement ------------------------------------------------------------------------------------------------------


def test_a_mismatch_is_found_and_named(arrays, write, run):
    scene, candidate = 3, 1
    row = arrays["cand_off"][scene] + candidate
    changed = arrays["out_raw_lane_keeping"].copy()
    changed[row] = 1 - changed[row]
    code, out, _ = run("conformance", write(out_raw_lane_keeping=changed), "--json")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 1
    assert report["mismatches"] == 1
    assert checks["lk unfiltered"]["mismatches"] == 1
    assert checks["lk unfiltered"]["largest_error"] == 1
    assert checks["lk unfiltered"]["first"] == {"scene": arrays["scene_name"][scene], "candidate": candidate}
    assert checks["lk"]["mismatches"] == 0
    assert checks["lk"]["first"] is None


def test_fragile_candidates_are_counted_apart(arrays, write):
    changed, fragile = arrays["out_raw_no_at_fault_collisions"].copy(), arrays["out_fragile"].copy()
    changed[5], fragile[5, 0] = 0.25, True
    report = compare([write(out_raw_no_at_fault_collisions=changed, out_fragile=fragile)])
    check = report.checks["nc unfiltered"]
    assert report.mismatches == 0
    assert (check.fragile, check.fragile_mismatches, check.largest_error) == (1, 1, 0.0)
    assert compare([write(out_raw_no_at_fault_collisions=changed)]).mismatches == 1


@pytest.mark.parametrize(("error", "wrong"), [(1e-10, False), (1e-7, True), (np.nan, True)])
def test_tolerances(arrays, write, error, wrong):
    changed = arrays["out_sim_states"].copy()
    changed[0, 7, 3] += error
    check = compare([write(out_sim_states=changed)]).checks["states"]
    assert bool(check.mismatches) is wrong
    if wrong:
        assert check.first == (arrays["scene_name"][0], 0)


def test_whole_turns_of_a_heading_are_no_mismatch(arrays, write):
    changed = arrays["out_sim_states"].copy()
    changed[:, :, 2] += 2 * np.pi
    assert compare([write(out_sim_states=changed)]).mismatches == 0


def test_files_may_hold_fewer_outputs(arrays, write, run):
    for name in ("out_v1_score", "out_sim_states", "out_ec_rms"):
        assert compare([write(**{name: None})]).mismatches == 0
    inputs = {name: None for name in arrays if name.startswith("out_")}
    assert golden.load(write(**inputs))[0].expected == {}
    code, _, err = run("conformance", write(**inputs))
    assert code == 2
    assert "inputs only" in err


# -- bad files ---------------------------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path):
    whole, cut = PUBLIC.read_bytes(), tmp_path / "cut.npz"
    for length in [0, 1, 4, 100, *range(1000, len(whole), len(whole) // 20), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut\.npz"):
            golden.load(cut)


def test_damaged_bytes(tmp_path):
    """Every array carries a CRC-32; what still loads is the same."""
    whole, damaged, good = bytearray(PUBLIC.read_bytes()), tmp_path / "damaged.npz", golden.load(PUBLIC)
    for position in range(50, len(whole), len(whole) // 60):
        damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            read = golden.load(damaged)
        except FileError:
            continue
        assert all(np.array_equal(a.candidates, b.candidates) for a, b in zip(read, good, strict=True))


@pytest.mark.parametrize("command", [["conformance"]])
def test_foreign_files(run, tmp_path, command):
    for name, content in {"text.npz": b"x y heading", "empty.npz": b"", "zip.npz": b"PK\x05\x06" + bytes(18)}.items():
        (tmp_path / name).write_bytes(content)
        code, out, err = run(*command, tmp_path / name)
        assert (code, out) == (2, "")
        assert name in err
    np.savez(tmp_path / "objects.npz", scene_name=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npz").write_bytes((tmp_path / "array.npy").read_bytes())
    np.savez(tmp_path / "two.npz", pair_off=np.zeros(3))
    for name in ("objects.npz", "other.npz", "array.npz", "two.npz"):
        code, _, err = run(*command, tmp_path / name)
        assert code == 2
        assert name in err
    assert "no 'scene_name'" in run(*command, tmp_path / "other.npz")[2]
    assert run(*command, tmp_path / "nowhere")[0] == 2
    (tmp_path / "folder").mkdir()
    assert "holds no .npz file" in run(*command, tmp_path / "folder")[2]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("agent_state", lambda a: a[:, :, :4], "agent_state has float64"),
        ("agent_state", lambda a: a[:-1], "agent_state has float64"),
        ("agent_valid", lambda a: a[:, :41], "different numbers of steps"),
        ("candidates", lambda a: a.astype(int), "candidates has int64"),
        ("cand_off", lambda a: a + 1, "cand_off must be"),
        ("poly_off", lambda a: a[::-1], "poly_off must be"),
        ("ring_pt_off", lambda a: a[:-1], "ring_pt_off must be"),
        ("cand_off", lambda a: a * 2, "candidates has float32"),
        ("red_poly", lambda a: a + 1000, "red_poly points outside"),
        ("human_future", lambda a: None, "it has no 'human_future'"),
        ("out_fragile", lambda a: a[:-1], "out_fragile has"),
        ("out_epdms", lambda a: a[:-1], "out_epdms has"),
        ("out_human_fragile", lambda a: None, "it has no 'out_human_fragile'"),
    ],
)
def test_a_file_that_breaks_the_schema(arrays, write, name, change, reason):
    with pytest.raises(FileError, match=re.escape(reason)):
        golden.load(write(**{name: change(arrays[name])}))


def test_two_stage_files(shared_golden, tmp_path, run):
    with np.load(shared_golden / "twostage" / "twostage.npz", allow_pickle=False) as file:
        groups = dict(file)
    path = tmp_path / "groups.npz"
    changed = groups["out_score"].copy()
    changed[4] += 1e-6
    np.savez(path, **{**groups, "out_score": changed})
    code, out, _ = run("conformance", path)
    assert code == 1
    assert re.search(r"two-stage score +434 +1 .* groups #4", out)
    for name, array in {
        "pair_now": groups["pair_now"] + 10_000,
        "pair_off": groups["pair_off"][:-3],
        "start_time": groups["start_time"] * 2,
    }.items():
        np.savez(path, **{**groups, name: array})
        assert run("conformance", path)[0] == 2


# -- the command line --------------------------------------------------------------------------------------------------


def test_conformance_prints_a_table(run):
    code, out, err = run("conformance", PUBLIC)
    assert (code, err) == (0, "")
    header, *rows, summary = out.splitlines()
    assert header.split("  ")[0] == "metric"
    assert re.match(r"nc +\d+ +0 ", rows[0])
    assert re.fullmatch(r"\d+ scenes, \d+ candidates: no mismatches; [\d,]+ candidates/s on cpu", summary)


def test_conformance_prints_json(run):
    code, out, _ = run("conformance", GOLDEN, "--set", "public", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["files"] == [str(PUBLIC)]
    assert report["candidates_per_second"] > 0
    assert {"name", "candidates", "mismatches", "fragile", "fragile_mismatches", "largest_error", "first", "tolerance"} == report["checks"][
        0
    ].keys()


def test_conformance_finds_the_small_set(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(irlvla, "__file__", str(tmp_path / "a" / "b" / "__init__.py"))
    code, _, err = run("conformance")
    assert code == 2
    assert "no golden files given" in err
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    (tmp_path / "tests" / "golden" / "public.npz").symlink_to(PUBLIC)
    assert run("conformance")[0] == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["conformance", GOLDEN, "--set", "privat"], "no golden set named 'privat'; found adversarial, public"),
        (["conformance", GOLDEN, "--device", "tpu"], "'tpu' is not one of"),
        (["conform"], "No such command 'conform'"),
        (["conformance", "--jsn"], "No such option: --jsn"),
    ],
)
def test_mistakes_are_explained(run, args, reason):
    code, _, err = run(*args)
    assert code == 2
    assert reason in re.sub(r"\s*\n[│ ]*", " ", err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(run):
    code, _, err = run("conformance", PUBLIC, "--device", "cuda")
    assert code == 2
    assert "no CUDA device was found" in err


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "conformance" in out
    assert "doctor" in out
    assert "--set" in run("conformance", "--help")[1]
    assert run("--version")[1].split()[0] == "irlvla"


def test_python_dash_m_is_quick():
    """--help must not import torch."""
    script = """
import runpy, sys
sys.argv = ["irlvla", "--help"]
try:
    runpy.run_module("irlvla")
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Usage: " in done.stdout
    assert done.stdout.split()[-1] == "False"


# -- the doctor --------------------------------------------------------------------------------------------------------


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["checks"]["cpu"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert report["built"]["isa"] in report["built"]["isas"]
    assert report["found"]["torch threads"] == torch.get_num_threads()
    assert ("cuda" in report["checks"]) == (report["built"]["cuda"] and torch.cuda.is_available())
    code, out, _ = run("doctor")
    assert code == 0
    assert re.search(r"self-check +cpu +passed", out)


def test_doctor_reports_a_wrong_answer(run, monkeypatch):
    right = irlvla.epdms

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return dataclasses.replace(result, values=result.values * 0.5)

    monkeypatch.setattr("irlvla.scoring.epdms", wrong)
    code, out, _ = run("doctor")
    assert code == 1
    assert "brake: nc is 0.5, not 1.0" in out


def test_doctor_survives_what_is_broken(run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("irlvla.scoring.epdms", broken)
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert json.loads(out)["checks"]["cpu"] == ["RuntimeError: no kernel image is available"]
