"""From scores of frames to the score of a benchmark: NAVSIM v2's one-stage and two-stage aggregation.

Pure functions of plain arrays (numpy, torch, lists), on the CPU, in float64 and in the order of operations of the official
scripts (navsim 0a380a9: run_pdm_score_one_stage.py, run_pdm_score.py, scene_aggregator.py), so that results agree to the last bit.

A frame is named by its token. A two-stage mapping says which synthetic follow-ups (at 4.0 and 3.5 s) continue which recorded
pair of frames (at 0 and -0.5 s): `{(now, previous): [(now_i, previous_i), ...]}`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from irlvla.errors import InputError
from irlvla.types import METRICS, STEP, STEPS, Epdms

COLUMNS = (*METRICS, "score")  #: columns of the aggregates
SIGMA_SQUARED = 0.1  #: of the Gaussian kernel over follow-ups [m^2]: a reach of about 0.3 m
LONGEST_GAP = 0.55  #: seconds; extended comfort compares frames that are less apart

Token = str
TwoStageMapping = Mapping[tuple[Token, Token], Sequence[tuple[Token, Token]]]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class OneStage:
    """Scores of N frames and their mean, NaN skipped (the official row `average_all_frames`)."""

    ec: Float[Tensor, " N"]  # extended comfort; NaN = no frame less than 0.55 s before
    score: Float[Tensor, " N"]
    mean: Float[Tensor, " 10"]  # COLUMNS


@dataclass(frozen=True)
class TwoStage:
    """Scores of N frames in G groups and their aggregates, for each of COLUMNS."""

    ec: Float[Tensor, " N"]  # extended comfort, of the pair that the frame is in
    weight: Float[Tensor, " N"]  # 1 for recorded frames, Gaussian for follow-ups; NaN = in no group
    score: Float[Tensor, " N"]
    group: Float[Tensor, "G 10"]  # mean over the two chains of stage one times stage two
    combined: Float[Tensor, " 10"]  # the official row `extended_pdm_score_combined` (column score)
    stage_one: Float[Tensor, " 10"]
    stage_two: Float[Tensor, " 10"]


def one_stage(
    values: Epdms | ArrayLike,
    *,
    states: ArrayLike | None = None,
    log: Sequence[str] | None = None,
    time_us: ArrayLike | None = None,
) -> OneStage:
    """The one-stage benchmark (navtest): final score of every frame and the mean over frames.

    Args:
        values: sub-metrics "N 9" in the order of METRICS.
        states: simulated states "N 41 11". With them extended comfort is computed between consecutive frames of a log and
            written to the later one; without them the column of `values` stands.
        log, time_us: the log and the time stamp of each frame, needed with `states`.
    """
    epdms = _epdms(values)
    if states is not None:
        if log is None or time_us is None:
            raise InputError("one_stage: states come with the log and the time stamp of each frame (log=, time_us=)")
        count = len(epdms.values)
        simulated, time = _shaped("states", states, (count, STEPS, 11)), _seconds(time_us, count)
        if len(log) != count:
            raise InputError(f"one_stage: log has {len(log)} entries for {count} frames")
        order = sorted(range(count), key=lambda i: (log[i], time[i]))
        pairs = [(b, a) for a, b in itertools.pairwise(order) if log[a] == log[b] and time[b] - time[a] < LONGEST_GAP]
        ec = np.full(count, np.nan)
        ec[[now for now, _ in pairs]] = comfort_of(pairs, simulated, time, [f"{log[i]} at {time[i]:.3f} s" for i in range(count)])
        epdms = _with_ec(epdms, ec)
    columns = np.concatenate([epdms.values.numpy(), epdms.score().numpy()[:, None]], 1)
    return OneStage(epdms.ec, epdms.score(), torch.from_numpy(_mean(columns)))


def two_stage(
    mapping: TwoStageMapping,
    tokens: Sequence[Token],
    values: Epdms | ArrayLike,
    *,
    start: ArrayLike,
    endpoint: ArrayLike,
    states: ArrayLike | None = None,
    time_us: ArrayLike | None = None,
) -> TwoStage:
    """The two-stage benchmark (navhard): final scores, weights of the follow-ups, and the aggregates.

    Args:
        mapping: which follow-ups continue which recorded pair.
        tokens: names of the N frames. Frames that the mapping does not name do not count.
        values: sub-metrics "N 9" in the order of METRICS.
        start: rear axle "N 2" at the frame's t = 0, map frame; read for follow-ups.
        endpoint: the plan's own pose at 4 s "N 2", in the map frame, not simulated (see `endpoints`); read for recorded frames.
        states: simulated states "N 41 11". With them extended comfort is computed for every pair and written to both of its
            frames (the last pair that names a frame wins); without them the column of `values` stands.
        time_us: the time stamp of each frame, needed with `states`.
    """
    epdms = _epdms(values)
    rows = _rows(tokens, len(epdms.values))
    groups = [_Group.find(key, followers, rows) for key, followers in mapping.items()]
    if not groups:
        raise InputError("two_stage: the mapping has no groups")
    if states is not None:
        if time_us is None:
            raise InputError("two_stage: states come with the time stamp of each frame (time_us=)")
        pairs = [pair for group in groups for pair in (group.recorded, *group.followers)]
        ec = np.full(len(rows), np.nan)
        comfort = comfort_of(
            pairs, _shaped("states", states, (len(rows), STEPS, 11)), _seconds(time_us, len(rows)), list(map(repr, tokens))
        )
        for pair, value in zip(pairs, comfort, strict=True):
            ec[list(pair)] = value
        epdms = _with_ec(epdms, ec)
    missing = [tokens[row] for group in groups for pair in (group.recorded, *group.followers) for row in pair if epdms.ec[row].isnan()]
    if missing:
        raise InputError(f"two_stage: extended comfort (EC) is NaN for {_some(missing)}; pass states= and time_us= to compute it")
    weight = _weights(groups, _shaped("start", start, (len(rows), 2)), _shaped("endpoint", endpoint, (len(rows), 2)))
    columns = np.concatenate([epdms.values.numpy(), epdms.score().numpy()[:, None]], 1)
    totals = (torch.from_numpy(total) for total in _aggregate(groups, columns, weight))
    return TwoStage(epdms.ec, torch.from_numpy(weight), epdms.score(), *totals)


def aggregate(
    mapping: TwoStageMapping, tokens: Sequence[Token], columns: ArrayLike, weight: ArrayLike
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any per-frame columns "N M" over the groups of a mapping, given each frame's weight "N".

    Returns per group "G M" (the mean of its two chains, each stage one times weighted mean of stage two), and the means over
    groups: combined, stage one and stage two, "M" each.
    """
    rows = _rows(tokens, len(tokens))
    table = np.asarray(columns, np.float64)
    if table.ndim != 2 or len(table) != len(rows):
        raise InputError(f"aggregate: columns must be {len(rows)} x M, one row for each token, not {table.shape}")
    groups = [_Group.find(key, followers, rows) for key, followers in mapping.items()]
    group, combined, one, two = _aggregate(groups, table, _shaped("weight", weight, (len(rows),)))
    return torch.from_numpy(group), torch.from_numpy(combined), torch.from_numpy(one), torch.from_numpy(two)


def weights(mapping: TwoStageMapping, tokens: Sequence[Token], start: ArrayLike, endpoint: ArrayLike) -> Float[Tensor, " N"]:
    """Weights of frames: 1 for recorded ones; of a group's follow-ups by how near they start to where the plan ended, summing to 1.

    exp(-d^2 / (2 * 0.1)), normalised. Where all follow-ups are so far away (about 1.9 m) that the sum is 0 within 1e-8: uniform.
    """
    rows = _rows(tokens, len(tokens))
    groups = [_Group.find(key, followers, rows) for key, followers in mapping.items()]
    return torch.from_numpy(_weights(groups, _shaped("start", start, (len(rows), 2)), _shaped("endpoint", endpoint, (len(rows), 2))))


def endpoints(poses: Float[Tensor, "N T 3"], ego: Float[Tensor, "N 11"]) -> Float[Tensor, "N 2"]:
    """The last pose of each plan (ego frame) in the map frame, given the initial ego states."""
    (x, y), heading = poses[..., -1, :2].double().unbind(-1), ego[..., 2].double()
    cos, sin = heading.cos(), heading.sin()
    return torch.stack([cos * x - sin * y + ego[..., 0], sin * x + cos * y + ego[..., 1]], -1)


# -- inside ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """One entry of a mapping as row numbers."""

    recorded: tuple[int, int]
    followers: list[tuple[int, int]]

    @classmethod
    def find(cls, key: tuple[Token, Token], followers: Sequence[tuple[Token, Token]], rows: Mapping[Token, int]) -> _Group:
        pairs = [tuple(pair) for pair in (key, *followers)]
        if bad := [pair for pair in pairs if len(pair) != 2]:
            raise InputError(f"two_stage: a pair of the mapping is (now, previous), not {bad[0]!r}")
        if not followers:
            raise InputError(f"two_stage: the pair {key!r} of the mapping has no follow-ups")
        if missing := sorted({token for pair in pairs for token in pair if token not in rows}):
            raise InputError(f"two_stage: the group of {key[0]!r} needs {_some(missing)}, not among the {len(rows)} scored frames")
        recorded, *rest = [(rows[now], rows[previous]) for now, previous in pairs]
        return cls(recorded, rest)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _rows(tokens: Sequence[Token], count: int) -> dict[Token, int]:
    rows = {token: row for row, token in enumerate(tokens)}
    if len(tokens) != count:
        raise InputError(f"two_stage: {len(tokens)} tokens for {count} rows of values")
    if len(rows) != len(tokens):
        raise InputError(f"two_stage: the token {next(t for i, t in enumerate(tokens) if rows[t] != i)!r} appears more than once")
    return rows


def _shaped(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, np.float64)
    if array.shape != shape:
        raise InputError(f"{name} must have the shape {shape}, not {array.shape}")
    return array


def _seconds(time_us: ArrayLike, count: int) -> Array:
    return _shaped("time_us", time_us, (count,)) * 1e-6


def _epdms(values: Any) -> Epdms:
    """Sub-metrics as `Epdms` of float64 on the CPU."""
    epdms = values if isinstance(values, Epdms) else Epdms(torch.as_tensor(values))
    epdms = dataclasses.replace(epdms, details=None, pdms=None).to("cpu", torch.float64)
    if epdms.values.ndim != 2 or epdms.values.shape[1] != len(METRICS):
        raise InputError(f"values must be N x {len(METRICS)} ({', '.join(METRICS)}), not {tuple(epdms.values.shape)}")
    return epdms


def _with_ec(epdms: Epdms, ec: Array) -> Epdms:
    def put(values: Tensor) -> Tensor:
        return torch.cat([values[:, :-1], torch.from_numpy(ec)[:, None]], 1)

    return dataclasses.replace(epdms, values=put(epdms.values), raw=None if epdms.raw is None else put(epdms.raw))


def comfort_of(pairs: Sequence[tuple[int, int]], states: Array, time: Array, names: Sequence[str]) -> Array:
    """Extended comfort of each (now, previous) pair of rows.

    Args:
        states: simulated states "N 41 11".
        time: of each row [s].
        names: of the rows, for messages.

    Raises:
        InputError: a pair is not 0.1 to 0.5 s apart.
    """
    from irlvla import ops

    now, previous = np.array(pairs, np.int64).reshape(-1, 2).T
    gap = time[now] - time[previous]
    shift = np.round(gap / STEP).astype(np.int64)
    if wrong := np.flatnonzero((shift < 1) | (gap >= LONGEST_GAP)).tolist():
        i, j = pairs[wrong[0]]
        raise InputError(f"extended comfort compares frames {STEP} to 0.5 s apart: {names[i]} is {gap[wrong[0]]:.3f} s after {names[j]}")
    passed, _ = ops.extended_comfort(torch.from_numpy(states[now]), torch.from_numpy(states[previous]), torch.from_numpy(shift))
    return passed.double().numpy()


def _weights(groups: Sequence[_Group], start: Array, endpoint: Array) -> Array:
    weight = np.full(len(start), np.nan)
    for group in groups:
        weight[list(group.recorded)] = 1.0
        for recorded, *chain in zip(group.recorded, *group.followers, strict=True):
            kernel = np.exp(-((endpoint[recorded] - start[chain]) ** 2).sum(1) / (2 * SIGMA_SQUARED))
            total = kernel.sum()
            uniform = np.isclose(total, 0.0) or np.isnan(total)
            weight[chain] = 1.0 / len(chain) if uniform else kernel / total
    return weight


def _aggregate(groups: Sequence[_Group], columns: Array, weight: Array) -> tuple[Array, Array, Array, Array]:
    """Per group, combined, stage one, stage two. The rows of a chain are summed in table order, each once, as pandas does."""
    by_chain: list[list[tuple[Array, Array]]] = []
    for group in groups:
        chains = [(np.array([recorded]), np.unique(chain)) for recorded, *chain in zip(group.recorded, *group.followers, strict=True)]
        by_chain.append([(_average(columns, weight, one), _average(columns, weight, two)) for one, two in chains])
    scores = np.array([sum(one * two for one, two in chains) / 2 for chains in by_chain])
    ones = np.array([one for chains in by_chain for one, _ in chains])
    twos = np.array([two for chains in by_chain for _, two in chains])
    return scores, _mean(scores), _mean(ones), _mean(twos)


def _average(columns: Array, weight: Array, rows: NDArray[np.int64]) -> Array:
    """Weighted mean of rows. Summed along contiguous memory: numpy's pairwise summation, as in a pandas block."""
    return (np.ascontiguousarray(columns[rows].T) * weight[rows]).sum(1) / weight[rows].sum()


def _mean(columns: Array) -> Array:
    """Column means, NaN skipped; NaN where a column has nothing else."""
    transposed = np.ascontiguousarray(columns.T)
    measured = ~np.isnan(transposed)
    with np.errstate(invalid="ignore"):
        return np.where(measured, transposed, 0.0).sum(1) / measured.sum(1)
