"""How much better a plan was than was to be expected: advantages, their baselines and their scale.

Letters: B scenes, K plans of each, M columns: the reward, or some sub-metrics of it. What was not measured is NaN, and counts as
neither better nor worse.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla.errors import ConfigError, did_you_mean
from irlvla.types import METRICS, Rollout

TINY = 1e-4  #: least standard deviation that is divided by (DiffusionDriveV2)


def columns(rollout: Rollout, weights: Mapping[str, float]) -> tuple[Float[Tensor, "B K M"], Float[Tensor, " M"]]:
    """What is to be raised, and the weight of each: some sub-metrics by name, or where none is named the reward alone."""
    if not weights:
        return rollout.reward[..., None], rollout.reward.new_ones(1)
    chosen = rollout.values[..., [METRICS.index(name) for name in weights]]
    return chosen.to(rollout.reward), rollout.reward.new_tensor(list(weights.values()))


def require_metrics(weights: Mapping[str, float]) -> None:
    """Raise `ConfigError` for weights of what is no sub-metric."""
    for name in weights:
        if name not in METRICS:
            raise ConfigError(f"metrics: no sub-metric {name!r}. {did_you_mean(name, METRICS)}There are {', '.join(METRICS)}")


def standardised(values: Float[Tensor, "B K M"], dims: tuple[int, ...] = (0, 1)) -> Float[Tensor, "B K M"]:
    """Of mean 0 and standard deviation 1 over some axes, by default over all plans; 0 where all are equal."""
    mean = values.nanmean(dims, keepdim=True)
    spread = (values - mean).square().nanmean(dims, keepdim=True).sqrt()
    return (values - mean) / (spread + TINY)


def within_groups(values: Float[Tensor, "B K M"], group: Int[Tensor, "B K"]) -> Float[Tensor, "B K M"]:
    """Each value less the mean of its group, over the standard deviation of the group: GRPO (Shao et al. 2024).

    Args:
        group: of each plan, a number within its scene. A plan alone in its group has the advantage 0.
    """
    same = (group[:, :, None] == group[:, None]).to(values)
    known = ~values.isnan()
    filled = torch.where(known, values, 0.0)
    count = (same @ known.to(values)).clamp(min=1.0)
    mean = same @ filled / count
    variance = same @ filled.square() / count - mean.square()
    return (values - mean) / (variance.clamp(min=0.0).sqrt() + TINY)


def leave_one_out(values: Float[Tensor, "B K M"]) -> Float[Tensor, "B K M"]:
    """Each value less the mean of the others of its scene: RLOO (Ahmadian et al. 2024)."""
    known = ~values.isnan()
    others = known.sum(1, keepdim=True) - known.to(values)
    return values - (values.nansum(1, keepdim=True) - values.nan_to_num()) / others.clamp(min=1.0)


def weighted(advantages: Float[Tensor, "B K M"], weights: Float[Tensor, " M"]) -> Float[Tensor, "B K"]:
    """One advantage per plan: the weighted sum of those of the columns."""
    return (advantages.nan_to_num() * weights).sum(-1)


def explained_variance(predicted: Tensor, measured: Tensor) -> float:
    """The share of the variance of what was measured that a prediction explains: 1 = all, 0 = none, also where nothing varies."""
    known = ~measured.isnan()
    predicted, measured = predicted[known], measured[known]
    if not len(measured) or (variance := measured.var(correction=0).item()) < TINY**2:
        return 0.0
    return 1.0 - (measured - predicted).var(correction=0).item() / variance
