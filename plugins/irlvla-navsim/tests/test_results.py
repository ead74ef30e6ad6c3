"""Result tables and submissions in the official layout, against official files where they are at hand."""

from __future__ import annotations

import os
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch

from irlvla import Epdms, FileError, InputError
from irlvla_navsim.pickles import read_pickle
from irlvla_navsim.results import read_mapping, read_results, write_results, write_submission

REAL = Path(os.environ.get("IRLVLA_REAL_DATA", Path(__file__).resolve().parents[4] / "shared" / "real"))
official = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs {REAL} (set IRLVLA_REAL_DATA to another place)")


@official
@pytest.mark.parametrize("name", ["ltf_sim_navtest", "diffusiondrive_sim_navtest"])
def test_official_tables_go_in_and_out(name: str, tmp_path: Path) -> None:
    """Read and written again, the values are the same to the last bit."""
    tokens, values, _ = read_results(REAL / "navsim_v2_scores" / f"{name}.csv")
    assert len(tokens) == 12146
    again = read_results(write_results(tmp_path / "again.csv", tokens, Epdms(torch.from_numpy(values))))
    assert again[0] == tokens
    np.testing.assert_array_equal(again[1], values)


@official
def test_the_layout_is_the_official_one(tmp_path: Path) -> None:
    lines = (REAL / "navsim_v2_scores" / "ltf_sim_navtest.csv").read_text().splitlines()
    tokens, values, _ = read_results(REAL / "navsim_v2_scores" / "ltf_sim_navtest.csv")
    ours = write_results(tmp_path / "ours.csv", tokens, Epdms(torch.from_numpy(values))).read_text().splitlines()
    assert ours[0].replace('""', "") == lines[0]
    assert len(ours) == len(lines)
    assert [line.split(",")[:3] for line in ours[:-1]] == [line.split(",")[:3] for line in lines[:-1]]
    assert ours[-1].split(",")[1] == lines[-1].split(",")[1] == "average_all_frames"


def test_unmeasured_is_empty(tmp_path: Path) -> None:
    values = torch.ones(2, 9, dtype=torch.float64)
    values[0, 8] = torch.nan
    path = write_results(tmp_path / "r.csv", ["a", "b"], Epdms(values))
    rows = path.read_text().splitlines()
    assert rows[1].endswith(",,1.0")
    assert rows[-1].split(",")[-2] == "1.0"  # the mean of what was measured
    assert np.isnan(read_results(path)[1][0, 8])
    with pytest.raises(InputError, match="1 tokens for 2 results"):
        write_results(path, ["a"], Epdms(values))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_results(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileError, match=r"other\.csv is no result table"):
        read_results(tmp_path / "other.csv")


def test_a_submission_names_the_devkits_classes_alone(tmp_path: Path) -> None:
    plan = np.arange(24, dtype=np.float32).reshape(8, 3)
    about = {"team_name": "t", "authors": "a", "email": "e", "institution": "i", "country": "c"}
    path = write_submission(tmp_path / "submission.pkl", {"token": plan}, {"other": plan + 1}, **about)
    names = {argument for opcode, argument, _ in pickletools.genops(path.read_bytes()) if opcode.name == "GLOBAL"}
    assert names == {
        "navsim.common.dataclasses Trajectory",
        "nuplan.planning.simulation.trajectory.trajectory_sampling TrajectorySampling",
        "numpy.core.multiarray _reconstruct",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
    }
    read = read_pickle(path)
    assert list(read) == [*list(about)[:4], "country / region", "first_stage_predictions", "second_stage_predictions"]
    first = read["first_stage_predictions"][0]["token"]
    np.testing.assert_array_equal(first.poses, plan)
    assert vars(first.trajectory_sampling)["time_horizon"] == 4.0
    np.testing.assert_array_equal(read["second_stage_predictions"][0]["other"].poses, plan + 1)
    with pytest.raises(InputError, match=r"the plan of token must be finite poses \(T, 3\), got shape \(8, 2\)"):
        write_submission(path, {"token": plan[:, :2]}, **about)


@official
def test_the_official_mapping(tmp_path: Path) -> None:
    mapping = read_mapping(REAL / "navsim_v2_warmup_two_stage_cv" / "mapping_warmup_two_stage.yaml")
    assert len(mapping) == 8
    assert sum(2 * len(followers) for followers in mapping.values()) == 204
    (tmp_path / "bad.yaml").write_text("a: 1")
    with pytest.raises(FileError, match="holds no two-stage mapping"):
        read_mapping(tmp_path / "bad.yaml")
