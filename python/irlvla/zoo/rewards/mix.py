"""A mixture of two rewards: partly the exact score, partly what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from irlvla import components
from irlvla.components import Spec, pluggable
from irlvla.errors import ConfigError, InputError, did_you_mean
from irlvla.registry import build
from irlvla.types import METRICS, Epdms, Observation, Plan, Scene
from irlvla.zoo.rewards.ensemble import reward_of, spec_of


@dataclass(frozen=True)
class Mixture(Epdms):
    """Sub-metrics of two rewards together."""

    exact: Epdms | None = None
    learned: Epdms | None = None


class MixedReward(components.RewardModel):
    """`share` times one reward, usually the exact one, plus the rest of the other, for each sub-metric.

    A sub-metric that only one of them measures is that of this one. The exact reward gives no gradient with respect to plans.
    """

    class Config(components.Config):
        exact: Spec = pluggable("reward_model", "exact", description="the one, which does not learn")
        learned: Spec | None = pluggable("reward_model", None, description="the other; or `saved`")
        saved: str | None = Field(None, description="the other, as it was saved: its folder, or its name on the Hub (owner/name)")
        share: float = Field(0.5, ge=0.0, le=1.0, description="of the exact one")
        shares: dict[str, float] = Field({}, description="of the exact one for some sub-metrics, by name (dac: 1.0)")

    share: Tensor

    def __init__(self, config: Any) -> None:
        """Raises `ConfigError` unless there is exactly one other reward, and for shares that are not of sub-metrics, or not from 0 to 1."""
        super().__init__(config)
        if (config.learned is None) == (config.saved is None):
            raise ConfigError("a mix needs either `learned`, a reward by its name, or `saved`, the folder of one")
        for name, value in config.shares.items():
            if name not in METRICS:
                raise ConfigError(f"shares: no sub-metric {name!r}. {did_you_mean(name, METRICS)}There are {', '.join(METRICS)}")
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"shares: {name} must be from 0 to 1, got {value}")
        self.exact = build("reward_model", config.exact).requires_grad_(False)
        self.learned = build("reward_model", config.learned) if config.saved is None else reward_of(config.saved).requires_grad_(False)
        shares = torch.tensor([config.shares.get(name, config.share) for name in METRICS])
        self.register_buffer("share", shares, persistent=False)

    @property
    def saved_config(self) -> Any:
        """What rebuilds it from its own weights: with the saved reward as its own."""
        return self.config.model_copy(update={"exact": spec_of(self.exact), "learned": spec_of(self.learned), "saved": None})

    def forward(self, obs: Observation, scene: Scene, plan: Plan) -> Mixture:
        exact, learned = self.exact(obs, scene, plan), self.learned(obs, scene, plan)
        one, other = exact.values.to(plan.poses), learned.values.to(plan.poses)
        mixed = self.share * one + (1.0 - self.share) * other
        mixed = torch.where(one.isnan(), other, torch.where(other.isnan(), one, mixed))
        return Mixture(mixed, exact=exact, learned=learned)

    def loss(self, predicted: Epdms, measured: Epdms) -> dict[str, Float[Tensor, ""]]:
        """The losses of the learned reward. Raises `InputError` for what this model has not predicted."""
        if not isinstance(predicted, Mixture) or predicted.learned is None:
            raise InputError(f"{self}: loss() takes what forward() returned, got {type(predicted).__name__}")
        return self.learned.loss(predicted.learned, measured)

    def calibrate(self, predicted: Sequence[Mixture], measured: Sequence[Epdms]) -> dict[str, tuple[float, float]]:
        """What `calibrate` of the learned reward returns; nothing if it has none."""
        calibrate: Any = getattr(self.learned, "calibrate", None)
        return {} if calibrate is None else calibrate([part.learned for part in predicted], measured)

    def fit_support(self, plan: Plan, speed: Float[Tensor, " B"], quantile: float) -> None:
        """Tell the learned reward, if it wants to know, which plans are usual."""
        if (fit := getattr(self.learned, "fit_support", None)) is not None:
            fit(plan, speed, quantile)
