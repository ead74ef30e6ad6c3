"""One-stage and two-stage aggregation: official results to the last bit, and what surprises in the rules."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlvla.aggregation import COLUMNS, aggregate, endpoints, one_stage, two_stage, weights
from irlvla.errors import InputError
from irlvla.types import Epdms

OFFICIAL = [
    *("no_at_fault_collisions", "drivable_area_compliance", "driving_direction_compliance", "traffic_light_compliance", "ego_progress"),
    *("time_to_collision_within_bound", "lane_keeping", "history_comfort", "two_frame_extended_comfort"),
]

# -- golden/twostage ---------------------------------------------------------------------------------------------------


def test_golden_groups_to_the_last_bit(shared_golden):
    with np.load(shared_golden / "twostage" / "twostage.npz", allow_pickle=False) as file:
        z = dict(file)
    tokens = [f"t{i}" for i in range(len(z["metrics"]))]
    pairs = [(tokens[a], tokens[b]) for a, b in zip(z["pair_now"], z["pair_prev"], strict=True)]
    bounds = itertools.pairwise(z["pair_off"])
    mapping = {(tokens[a], tokens[b]): pairs[i:j] for a, b, (i, j) in zip(z["group_now"], z["group_prev"], bounds, strict=True)}
    unmeasured = np.concatenate([z["metrics"], np.full((len(tokens), 1), np.nan)], 1)
    result = two_stage(
        mapping,
        tokens,
        torch.from_numpy(unmeasured),
        start=z["start_point"],
        endpoint=torch.from_numpy(z["endpoint"]),
        states=z["ego_simulated_states"],
        time_us=np.rint(z["start_time"] * 1e6),
    )
    for name, value in {
        "two_frame_extended_comfort": result.ec,
        "weight": result.weight,
        "score": result.score,
        "group_score": result.group[:, -1],
        "combined": result.combined,
        "stage1": result.stage_one,
        "stage2": result.stage_two,
    }.items():
        np.testing.assert_array_equal(value.numpy(), z[f"out_{name}"], err_msg=name)


# -- official results --------------------------------------------------------------------------------------------------


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(rows, columns):
    return np.array([[float(row[column] or "nan") for column in columns] for row in rows])


def test_warmup_two_stage_of_the_constant_velocity_agent(shared_real):
    folder = shared_real / "navsim_v2_warmup_two_stage_cv"
    one, two = read(folder / "stage_one.csv"), read(folder / "stage_two.csv")
    tokens = [row["token"] for row in one + two]
    endpoint = np.concatenate([table(one, ["endpoint_x", "endpoint_y"]), np.full((len(two), 2), np.nan)])
    mapping, official = read_mapping(folder / "mapping_warmup_two_stage.yaml"), json.loads((folder / "official_summary.json").read_text())
    assert (len(mapping), sum(map(len, mapping.values()))) == (8, 102)

    weight = weights(mapping, tokens, table(one + two, ["start_x", "start_y"]), endpoint)
    np.testing.assert_allclose(weight[len(one) :].numpy(), table(two, ["official_weight"])[:, 0], rtol=0, atol=1e-19)
    assert (weight[: len(one)] == 1).all()
    _, combined, stage_one, stage_two = aggregate(mapping, tokens, table(one + two, ["score"]), weight)
    assert stage_one.item() == official["extended_pdm_score_stage_one"] == 0.46028921296917297
    assert stage_two.item() == official["extended_pdm_score_stage_two"] == 0.3341286472565139
    assert combined.item() == official["extended_pdm_score_combined"] == 0.1853562745165113


def read_mapping(path):
    """The devkit's YAML: [now, previous, [[now_i, previous_i], ...]] per group; tokens of groups are indented less."""
    mapping, pair = {}, []
    for indent, token in re.findall(r"^([ -]+)'([0-9a-f]+)'$", path.read_text(), re.MULTILINE):
        pair.append(token)
        if len(pair) == 2 and len(indent) == 4:
            group = mapping.setdefault(tuple(pair), [])
        elif len(pair) == 2:
            group.append(tuple(pair))
        pair = [] if len(pair) == 2 else pair
    return mapping


@pytest.mark.parametrize(
    "agent",
    [
        "diffvla/navhard_two_stage",
        *(f"navsim_v2_scores/{a}_navhard" for a in ("diffusiondrive_sim", "gtrs_dense_vov_sim_reward", "ltf_sim")),
    ],
)
def test_navhard_results(shared_real, agent):
    """Scores of 450 recorded and 5,462 synthetic frames, and the stage-one row. Synthetic frames have no human filter."""
    rows = read(shared_real / f"{agent}.csv")
    frames, summary = [row for row in rows if "extended" not in row["token"]], {row["token"]: row for row in rows}
    suffixed = {suffix: [f"{name}_{suffix}" for name in OFFICIAL] for suffix in ("stage_one", "stage_two")}
    one, two = ([row for row in frames if row[columns[0]]] for columns in suffixed.values())
    assert (len(one), len(two)) == (450, 5462)

    follow_ups = one_stage(table(two, suffixed["stage_two"]))
    np.testing.assert_array_equal(follow_ups.score.numpy(), table(two, ["score"])[:, 0])

    recorded = table(one, suffixed["stage_one"])
    expected = table([summary["extended_pdm_score_stage_one"]], [*suffixed["stage_one"], "score"])[0]
    if agent.startswith("diffvla"):  # made with the filter as it is now
        result = one_stage(recorded)
        np.testing.assert_array_equal(result.score.numpy(), table(one, ["score"])[:, 0])
        assert result.mean[-1].item() == expected[-1] == 0.6776147376061762
        np.testing.assert_allclose(result.mean.numpy(), expected, rtol=2e-16)  # one row is summed in another order there
    else:
        assert_legacy(recorded, table(one, ["score"])[:, 0], expected)


@pytest.mark.parametrize("agent", ["diffusiondrive_sim", "ltf_sim"])
def test_navtest_results(shared_real, agent):
    """12,146 frames, 2,106 of them without a predecessor (EC is NaN, the weights sum to 14), made with the legacy filter."""
    *frames, average = read(shared_real / f"navsim_v2_scores/{agent}_navtest.csv")
    values, score = table(frames, OFFICIAL), table(frames, ["score"])[:, 0]
    assert len(values) == 12146
    assert np.isnan(values[:, -1]).sum() == 2106
    assert_legacy(values, score, table([average], [*OFFICIAL, "score"])[0])


def assert_legacy(values, score, mean):
    """Columns after the filter, scores before it: every score is, bit for bit, that of columns which the filter could have raised."""
    values, score = torch.from_numpy(values), torch.from_numpy(score)
    fixed = one_stage(values).score
    assert (score <= fixed).all()
    assert 0.1 < (score != fixed).double().mean() < 0.2
    explained = score == fixed
    # What the candidate itself may have had where the columns say 1: NC, DAC, DDC, TLC, TTC, LK (HC and EP are never filtered).
    for own in itertools.product([1.0, 0.0, 0.5], [1.0, 0.0], [1.0, 0.0, 0.5], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]):
        rows = torch.nonzero(~explained).squeeze(1)
        raw = values[rows].clone()
        for column, value in zip((0, 1, 2, 3, 5, 6), own, strict=True):
            raw[:, column] = torch.where(raw[:, column] == 1, value, raw[:, column])
        result = one_stage(Epdms(values[rows], raw=raw, human_filter="legacy"))
        explained[rows] = result.score == score[rows]
    assert explained.all()
    columns = one_stage(values).mean[:-1]
    np.testing.assert_array_equal([*columns.tolist(), float(np.mean(score.numpy()))], mean)


# -- rules -------------------------------------------------------------------------------------------------------------

PERFECT = [1.0] * 9


def small(follow_ups=2, distance=0.0):
    """One recorded pair (a at 0, b at -0.5 s) with follow-ups c0, c1, ... and d0, d1, ...; follow-up i starts i * distance away."""
    tokens = ["a", "b", *(f"c{i}" for i in range(follow_ups)), *(f"d{i}" for i in range(follow_ups))]
    start = np.zeros((len(tokens), 2))
    start[2:, 0] = distance * np.tile(np.arange(follow_ups), 2)
    mapping = {("a", "b"): [(f"c{i}", f"d{i}") for i in range(follow_ups)]}
    return {
        "mapping": mapping,
        "tokens": tokens,
        "values": np.tile(PERFECT, (len(tokens), 1)),
        "start": start,
        "endpoint": np.zeros_like(start),
    }


def test_weights_fall_with_distance_and_sum_to_one():
    weight = two_stage(**small(3, 0.3)).weight
    kernel = np.exp(-((0.3 * np.arange(3)) ** 2) / 0.2)
    np.testing.assert_allclose(weight[2:5], kernel / kernel.sum(), rtol=1e-15)
    np.testing.assert_array_equal(weight[2:5], weight[5:8])
    assert weight[:2].tolist() == [1, 1]


@pytest.mark.parametrize(("distance", "uniform"), [(1.8, False), (2.0, True), (1e6, True), (math.nan, True)])
def test_weights_are_uniform_where_all_follow_ups_are_far(distance, uniform):
    case = small(2, 0.1)
    case["start"][2:, 1] = distance
    weight = two_stage(**case).weight[2:4].tolist()
    assert (weight == [0.5, 0.5]) is uniform


def test_a_group_is_the_mean_of_two_products():
    case = small(2)
    case["values"][0, 4] = 0.5  # recorded "a": EP 0.5
    case["values"][2, 0] = 0.0  # its follow-up "c0" hits something
    result = two_stage(**case)
    score_a, chain_a = 13.5 / 16, 0.5
    assert result.score.tolist() == [score_a, 1, 0, 1, 1, 1]
    assert result.group[0, -1].item() == (score_a * chain_a + 1.0) / 2
    assert result.stage_one[-1].item() == (score_a + 1) / 2
    assert result.stage_two[-1].item() == 0.75
    assert result.combined[COLUMNS.index("nc")].item() == 0.75
    assert result.combined[COLUMNS.index("ep")].item() == 0.75


def test_a_follow_up_named_twice_counts_once():
    case = small(2)
    case["mapping"] = {("a", "b"): [("c0", "d0"), ("c1", "d1"), ("c1", "d1")]}
    case["values"][2, 0] = 0.0
    result = two_stage(**case)
    assert result.weight[2:4].tolist() == [1 / 3, 1 / 3]
    assert result.stage_two[-1].item() == 0.75


def test_the_last_mapping_wins(states):
    """A frame in two groups has the weight and the extended comfort of the later one."""
    case = small(2, 0.3)
    case["mapping"] = {("a", "b"): [("c0", "d0"), ("c1", "d1")], ("b", "a2"): [("c1", "d0")]}
    case = {**case, "tokens": [*case["tokens"], "a2"]}
    for name in ("values", "start", "endpoint"):
        case[name] = np.concatenate([case[name], case[name][:1]])
    time = {"a": 10.0, "b": 9.5, "a2": 9.0, "c0": 14.0, "c1": 14.0, "d0": 13.5, "d1": 13.5}
    shaky = states.clone()
    shaky[:, 5] = 3.0 * (-1.0) ** torch.arange(41)  # accelerates and brakes
    simulated = torch.stack([shaky if token in ("a", "c1") else states for token in case["tokens"]])
    result = two_stage(**case, states=simulated, time_us=[time[token] * 1e6 for token in case["tokens"]])
    tokens = case["tokens"]
    assert result.weight[tokens.index("c1")] == 1
    assert result.weight[tokens.index("d0")] == 1
    ec = dict(zip(tokens, result.ec.tolist(), strict=True))
    assert ec == {"a": 0, "b": 1, "a2": 1, "c0": 1, "c1": 0, "d0": 0, "d1": 0}


@pytest.fixture
def states():
    """A car at 10 m/s."""
    states = torch.zeros(41, 11, dtype=torch.float64)
    states[:, 0], states[:, 3] = torch.arange(41), 10.0
    return states


def test_frames_outside_the_mapping_do_not_count():
    case = small(1)
    before = two_stage(**case)
    case["tokens"] = [*case["tokens"], "stranger"]
    for name, row in (("values", [[0.0] * 8 + [math.nan]]), ("start", [[math.nan] * 2]), ("endpoint", [[math.nan] * 2])):
        case[name] = np.concatenate([case[name], row])
    after = two_stage(**case)
    assert torch.equal(after.combined, before.combined)
    assert after.weight[-1].isnan()


def test_two_stage_explains_what_is_wrong(states):
    case = small(1)

    def refuse(match, **change):
        with pytest.raises(InputError, match=match):
            two_stage(**{**case, **change})

    refuse("no groups", mapping={})
    refuse(r"group of 'a' needs 'x', 'y', not among the 4 scored frames", mapping={("a", "b"): [("x", "y")]})
    refuse("has no follow-ups", mapping={("a", "b"): []})
    refuse(r"is \(now, previous\)", mapping={("a", "b"): [("c0",)]})
    refuse("3 tokens for 4 rows", tokens=["a", "b", "c0"])
    refuse("'b' appears more than once", tokens=["a", "b", "b", "d0"])
    refuse("values must be N x 9", values=np.ones((4, 8)))
    refuse(r"start must have the shape \(4, 2\)", start=np.zeros((4, 3)))
    refuse(r"EC\) is NaN for 'a', 'b', 'c0', 'd0'; pass states=", values=[[1.0] * 8 + [math.nan]] * 4)
    refuse("time_us=", states=states.expand(4, 41, 11))
    refuse(r"states must have the shape \(4, 41, 11\)", states=states.expand(3, 41, 11), time_us=[0] * 4)
    seconds = np.array([10.0, 9.0, 14.0, 13.5])
    refuse("'a' is 1.000 s after 'b'", states=states.expand(4, 41, 11), time_us=seconds * 1e6)
    refuse("'a' is -0.500 s after 'b'", states=states.expand(4, 41, 11), time_us=(seconds[[1, 0, 2, 3]] + [0.5, 0, 0, 0]) * 1e6)


def test_one_stage_pairs_consecutive_frames_of_a_log(states):
    time = np.array([2.0, 1.0, 1.5, 2.6, 1.5, 1.2])
    log = ["x", "x", "x", "x", "y", "z"]
    values = np.tile([1.0] * 8 + [math.nan], (6, 1))
    result = one_stage(values, states=states.expand(6, 41, 11), log=log, time_us=time * 1e6)
    assert result.ec.isnan().tolist() == [False, True, False, True, True, True]  # 2.6 s is 0.6 s after 2.0 s
    assert result.score.tolist() == [1.0] * 6
    assert result.mean.tolist() == [1.0] * 10

    shaky = states.clone()
    shaky[:, 5] = 3.0 * (-1.0) ** torch.arange(41)
    shaky[20:, 5] *= 0.1
    simulated = torch.stack([shaky, states, states, states, states, states])
    result = one_stage(values, states=simulated, log=log, time_us=time * 1e6)
    assert result.ec.tolist()[0] == 0
    assert result.score[0].item() == 14 / 16
    assert result.mean[COLUMNS.index("ec")].item() == 0.5


def test_one_stage_explains_what_is_wrong(states):
    values, simulated = np.ones((2, 9)), states.expand(2, 41, 11)
    with pytest.raises(InputError, match="log="):
        one_stage(values, states=simulated)
    with pytest.raises(InputError, match="log has 1 entries for 2"):
        one_stage(values, states=simulated, log=["x"], time_us=[0, 1])
    with pytest.raises(InputError, match=r"0\.000 s after"):
        one_stage(values, states=simulated, log=["x", "x"], time_us=[5, 5])
    with pytest.raises(InputError, match="N x 9"):
        one_stage(np.ones(9))


def test_means_skip_what_is_not_measured():
    values = np.ones((3, 9))
    values[:, 8] = [math.nan, 0.0, 1.0]
    result = one_stage(values)
    assert result.score.tolist() == [1.0, 14 / 16, 1.0]
    assert result.mean[8].item() == 0.5
    values[:, 8] = math.nan
    assert one_stage(values).mean[8].isnan()
    assert one_stage(np.ones((0, 9))).mean.isnan().all()


def test_the_legacy_filter_scores_the_unfiltered_columns():
    values, raw = torch.ones(1, 9), torch.ones(1, 9)
    raw[0, 5] = 0.0
    assert one_stage(Epdms(values, raw=raw, human_filter="legacy")).score.item() == 11 / 16
    assert one_stage(Epdms(values, raw=raw, human_filter="fixed")).score.item() == 1
    case = {**small(1), "values": Epdms(values.expand(4, 9), raw=raw.expand(4, 9), human_filter="legacy")}
    result = two_stage(**case)
    assert result.combined[COLUMNS.index("ttc")].item() == 1
    assert result.combined[-1].item() == (11 / 16) ** 2


def test_inputs_are_left_alone(states):
    epdms = Epdms(torch.full((4, 9), math.nan).index_fill(1, torch.arange(8), 1.0))
    case = {**small(1), "values": epdms}
    result = two_stage(**case, states=states.expand(4, 41, 11), time_us=[10_000_000, 9_500_000, 14_000_000, 13_500_000])
    assert result.combined[-1].item() == 1
    assert epdms.values[:, 8].isnan().all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.score = None


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 4))
def test_the_order_of_frames_does_not_matter(random, groups, follow_ups):
    """Up to rounding; and every aggregate lies between the smallest and the largest value."""
    rng = np.random.default_rng(random.randrange(2**32))
    tokens = [f"{g}{kind}{i}" for g in range(groups) for kind in "ab" for i in range(follow_ups + 1)]
    mapping = {(f"{g}a0", f"{g}b0"): [(f"{g}a{i}", f"{g}b{i}") for i in range(1, follow_ups + 1)] for g in range(groups)}
    values, start, endpoint = rng.random((len(tokens), 9)), rng.random((len(tokens), 2)), rng.random((len(tokens), 2))
    result = two_stage(mapping, tokens, values, start=start, endpoint=endpoint)
    order = rng.permutation(len(tokens))
    shuffled = two_stage(mapping, [tokens[i] for i in order], values[order], start=start[order], endpoint=endpoint[order])
    torch.testing.assert_close(shuffled.combined, result.combined, rtol=1e-14, atol=0)
    torch.testing.assert_close(shuffled.weight, result.weight[order], rtol=1e-14, atol=0)
    for total in (result.stage_one, result.stage_two):
        assert (total[:9] >= values.min()).all()
        assert (total[:9] <= values.max()).all()
    np.testing.assert_allclose(np.bincount(np.arange(len(tokens)) // (follow_ups + 1), result.weight), 2, rtol=1e-14)


def test_endpoints_are_plans_in_the_map_frame():
    ego = torch.zeros(2, 11, dtype=torch.float64)
    ego[:, :3] = torch.tensor([[100.0, 200.0, math.pi / 2], [0.0, 0.0, 0.0]])
    poses = torch.zeros(2, 8, 3)
    poses[:, -1, :2] = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(endpoints(poses, ego), torch.tensor([[99.0, 203.0], [3.0, 1.0]], dtype=torch.float64))
