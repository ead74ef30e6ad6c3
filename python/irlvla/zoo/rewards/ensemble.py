"""An ensemble of rewards: what they agree on, less a penalty for what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.checkpoint import from_pretrained
from irlvla.components import Spec, pluggable
from irlvla.errors import ConfigError, InputError
from irlvla.registry import installed
from irlvla.types import Epdms, Observation, Plan, Scene
from irlvla.zoo.rewards.world_model import WorldModel


@dataclass(frozen=True)
class Agreement(Epdms):
    """What an ensemble thinks of plans: `values` are pessimistic."""

    mean: Tensor | None = None  # "B K 9": over the members
    spread: Tensor | None = None  # "B K 9": their standard deviation
    disagreement: Tensor | None = None  # "B K": the standard deviation of their scores
    unsupported: Tensor | None = None  # "B K": to how many of the members, as a share, the plan is unlike what they learned from
    members: list[Epdms] = field(default_factory=list)  # what each member thinks, which it learns by


class EnsembleReward(components.RewardModel):
    """Several rewards, and each sub-metric as the mean of theirs minus `beta` times its spread, in [0, 1].

    Where networks that learned from the same scenes disagree, none of them knows: a policy that looks for what they overrate finds
    less there (Coste et al., ICLR 2024; Kumar et al., NeurIPS 2019). A sub-metric that a member does not measure (NaN) is that of
    the others. Members that are given by their settings learn together; saved ones are left as they are.
    """

    class Config(components.Config):
        members: list[Spec] = pluggable("reward_model", [], description="rewards by name and settings, each with its own weights")
        saved: list[str] = Field([], description="saved rewards: folders, or names on the Hub (owner/name)")
        beta: float = Field(1.0, ge=0.0, description="how many standard deviations are taken off; 0 = the mean")
        unsupported_penalty: float = Field(
            0.0,
            ge=0.0,
            le=1.0,
            description="what is taken off every sub-metric of a plan that is unlike those that the members learned from",
        )

    shared: bool  # whether members see with the same frozen backbone, so that it looks once for all of them

    def __init__(self, config: Any) -> None:
        """Raises `ConfigError` for no members, and for a saved model that is no reward."""
        super().__init__(config)
        learning = [installed().build("reward_model", spec) for spec in config.members]
        saved = [reward_of(source).requires_grad_(False) for source in config.saved]
        if not learning + saved:
            raise ConfigError("an ensemble needs members: name rewards in `members`, or folders of saved ones in `saved`")
        self.members = nn.ModuleList(learning + saved)
        _compare(self)
        self.register_load_state_dict_post_hook(_compare)

    @property
    def saved_config(self) -> Any:
        """What rebuilds it from its own weights: with the saved members as its own."""
        members: Any = self.members
        return self.config.model_copy(update={"members": [spec_of(member) for member in members], "saved": []})

    def forward(self, obs: Observation, scene: Scene, plan: Plan) -> Agreement:
        found = self._opinions(obs, scene, plan)
        values = torch.stack([one.values.to(plan.poses) for one in found])
        mean, spread = _moments(values)
        _, disagreement = _moments(torch.stack([one.score().to(plan.poses) for one in found]))
        outside = self.unsupported(obs, plan).to(mean).mean(0)
        pessimistic = mean - self.config.beta * spread - self.config.unsupported_penalty * outside[..., None]
        return Agreement(
            pessimistic.clamp(0.0, 1.0),
            mean=mean,
            spread=spread,
            disagreement=disagreement,
            unsupported=outside,
            members=found,
        )

    def _opinions(self, obs: Observation, scene: Scene, plan: Plan) -> list[Epdms]:
        members: Any = self.members
        if not self.shared:
            return [member(obs, scene, plan) for member in members]
        features = members[0].see(obs)
        return [member.judge(features, plan) for member in members]

    def unsupported(self, obs: Observation, plan: Plan) -> Bool[Tensor, "M B K"]:
        """Whether plans are unlike those that each member learned from; none is to members that do not tell."""
        none = torch.zeros(plan.poses.shape[:2], dtype=torch.bool, device=plan.poses.device)
        tells = [getattr(member, "unsupported", None) for member in self.members]
        return torch.stack([none if tell is None else tell(obs, plan) for tell in tells])

    def calibrate(self, predicted: Sequence[Agreement], measured: Sequence[Epdms]) -> dict[str, tuple[float, float]]:
        """Calibrate each member that can be, on batches of held-out scenes. Returns by metric the means over them of the negative
        log-likelihood per candidate, before and after."""
        found: dict[str, list[tuple[float, float]]] = {}
        for index, member in enumerate(self.members):
            if (calibrate := getattr(member, "calibrate", None)) is not None:
                for name, value in calibrate([part.members[index] for part in predicted], measured).items():
                    found.setdefault(name, []).append(value)
        return {name: (fmean(before), fmean(after)) for name, values in found.items() for before, after in [zip(*values, strict=True)]}

    def fit_support(self, plan: Plan, speed: Float[Tensor, " B"], quantile: float) -> None:
        """Tell each member that wants to know which plans are usual."""
        for member in self.members:
            if (fit := getattr(member, "fit_support", None)) is not None:
                fit(plan, speed, quantile)

    def loss(self, predicted: Epdms, measured: Epdms) -> dict[str, Float[Tensor, ""]]:
        """The mean of the members' losses, by name. Raises `InputError` for what this model has not predicted."""
        if not isinstance(predicted, Agreement) or len(predicted.members) != len(self.members):
            raise InputError(f"{self}: loss() takes what forward() returned, got {type(predicted).__name__}")
        losses: dict[str, Tensor] = {}
        for member, found in zip(self.members, predicted.members, strict=True):
            for name, value in member.loss(found, measured).items():  # type: ignore[operator]
                losses[name] = losses.get(name, 0.0) + value / len(self.members)
        return losses


def reward_of(source: str) -> components.RewardModel:
    """A saved reward. Raises `ConfigError` for another model."""
    model = from_pretrained(source)
    if not isinstance(model, components.RewardModel):
        raise ConfigError(f"{source} holds no reward_model but {model if isinstance(model, components.Component) else 'a policy'}")
    return model


def spec_of(component: components.Component) -> dict[str, Any]:
    """Name and settings that rebuild a component from its own weights."""
    settings = getattr(component, "saved_config", component.config)
    return {"name": installed().entry_of(component).name, **settings.model_dump(mode="json")}


def _compare(ensemble: Any, keys: Any = None) -> None:
    """Find out whether all members see with the same frozen backbone, which then looks once for all of them. The weights tell; they are
    looked at whenever they were loaded."""
    first, *others = ensemble.members
    frozen = all(isinstance(member, WorldModel) and member.frozen for member in ensemble.members)
    ensemble.shared = frozen and all(_equal(first.backbone, other.backbone) for other in others)


def _equal(one: components.Backbone, other: components.Backbone) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    same = type(one) is type(other) and one.config == other.config and mine.keys() == theirs.keys()
    return same and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def _moments(values: Float[Tensor, "M ..."]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over members, of what is not NaN; NaN where all are."""
    mean = values.nanmean(0)
    variance = (values - mean).square().nanmean(0)
    differ = variance > 0.0  # the root has no gradient at 0
    return mean, torch.where(differ, variance.where(differ, 1.0).sqrt(), variance)
