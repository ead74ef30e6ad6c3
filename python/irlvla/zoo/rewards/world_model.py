"""The reward world model: the sub-metrics of any plan, from what sensors see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.checkpoint import from_pretrained
from irlvla.components import Config, Policy, Spec, pluggable
from irlvla.errors import ConfigError, InputError
from irlvla.registry import build, installed
from irlvla.types import HORIZON, METRICS, STEP, Details, Epdms, Features, Observation, Plan, Scene, StateIndex
from irlvla.zoo.rewards.calibration import Support, Temperature
from irlvla.zoo.rewards.driving import comfortable, driven, planned, simulated
from irlvla.zoo.rewards.heads import EventHead, ProgressHead, ReferenceHead, likelihood, outcome
from irlvla.zoo.rewards.network import DriveNetwork

CLASSES = {"nc": 3, "dac": 2, "ddc": 3, "tlc": 2, "ttc": 2, "lk": 2, "hc": 2, "ec": 2}  #: values of the metrics that are events
KINEMATIC = ("hc", "ec")  #: need no sensors
LIGHT = {
    "name": "bev",
    "width": 64,
    "encoder": {"model": "regnetx_002", "strides": [16], "channels": 64},
    "lift": {"x": [-8, 56, 1], "y": [-32, 32, 1], "depth": [1, 61, 2], "channels": 32, "widths": [32, 64], "blocks": 1, "joined": 64},
    "detection": {"queries": 16, "layers": 1, "heads": 4},
    "map": {"queries": 16, "layers": 1, "heads": 4},
}


class Weights(Config):
    """Weights of the losses, by metric."""

    nc: float = Field(1.0, ge=0.0)
    dac: float = Field(1.0, ge=0.0)
    ddc: float = Field(1.0, ge=0.0)
    tlc: float = Field(1.0, ge=0.0)
    ep: float = Field(5.0, ge=0.0)
    ttc: float = Field(1.0, ge=0.0)
    lk: float = Field(1.0, ge=0.0)
    hc: float = Field(1.0, ge=0.0)
    ec: float = Field(1.0, ge=0.0)
    reference: float = Field(0.2, ge=0.0, description="of how far the reference of EP gets, where labels tell it")
    perception: float = Field(1.0, ge=0.0, description="of the losses of the backbone")


@dataclass(frozen=True)
class Judgement(Epdms):
    """What a `WorldModel` thinks of plans. `values` are expectations."""

    logits: dict[str, Tensor] = field(default_factory=dict)  # "B K C" by metric: log-probabilities of its classes, before calibration
    moments: dict[str, Tensor] = field(default_factory=dict)  # "B K S+1 C" by metric: the same of each moment; see `heads`
    reference: Tensor | None = None  # "B N": log-probabilities of how far the reference gets
    perception: dict[str, Tensor] = field(default_factory=dict)  # "B" by name: losses of the backbone, in training

    def horizons(self) -> dict[str, Float[Tensor, "B K S"]]:
        """By metric: probabilities that it is kept until each moment, before calibration. Of NC, DAC, TLC and TTC labels tell when
        they fail; of the others it is what the network made up to know whether they do."""
        return {name: moments[..., :-1, -1].cumsum(-1).exp() for name, moments in self.moments.items()}


class WorldModel(components.RewardModel):
    """A light network that judges plans by sensors alone.

    A plan is driven first, by the tracker and the vehicle model of the score: they need the present state of the car alone, so what
    is judged is where the car will be, to the millimetre. Then `DriveNetwork` looks at the drive and each metric has a head.

    HC needs no sensors either: it is computed, or learned like the others. EC, for which a reward lacks the plan of the
    previous frame, is NaN, unless HC and EC are learned and the labels have had it.
    """

    class Config(DriveNetwork.Config):
        backbone: Spec = pluggable("backbone", LIGHT, description="sees; it learns with the rest")
        policy: str | None = Field(
            None, description="a saved policy, whose backbone sees instead: its folder, or its name on the Hub (owner/name)"
        )
        frozen: bool | None = Field(
            None, description="leave the weights of the backbone as they are; null = those of a policy, so that it can be shared"
        )
        moments: Literal[4, 5, 8, 10, 20, 40] = Field(10, description="how many moments of a drive are looked at, evenly spread over 4 s")
        dynamics: Literal["simulated", "plan"] = Field(
            "simulated", description="judge where the car goes that follows a plan, as the score does, or the plan itself"
        )
        kinematic: Literal["computed", "learned"] = Field(
            "computed", description="HC, exactly from the simulated drive, or HC and EC learned"
        )
        weights: Weights = Weights.model_validate({})

    times: Tensor
    measured: Tensor

    def __init__(self, config: Any) -> None:
        """Raises `ConfigError` for a saved model that is no policy, and if the heads do not divide the width."""
        super().__init__(config)
        self.frozen: bool = config.policy is not None if config.frozen is None else config.frozen
        self.backbone = build("backbone", config.backbone) if config.policy is None else _backbone_of(config.policy)
        if self.frozen:
            self.backbone.requires_grad_(False)
        self.network = DriveNetwork(config, self.backbone.width)
        learned = [name for name in CLASSES if config.kinematic == "learned" or name not in KINEMATIC]
        self.events = nn.ModuleDict({name: EventHead(config.width, CLASSES[name]) for name in learned})
        self.reference, self.progress = ReferenceHead(config), ProgressHead(config.width)
        self.temperatures = nn.ModuleDict({name: Temperature(CLASSES[name]) for name in learned})
        self.support = Support(8)
        self.register_buffer("times", torch.arange(1, config.moments + 1) * (HORIZON / config.moments), persistent=False)
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))  # whether labels have had EC

    @property
    def saved_config(self) -> Any:
        """What rebuilds it from its own weights: with the backbone of a policy as its own."""
        name = installed().entry_of(self.backbone).name
        settings = getattr(self.backbone, "saved_config", self.backbone.config)
        backbone = {"name": name, **settings.model_dump(mode="json")}
        return self.config.model_copy(update={"backbone": backbone, "policy": None, "frozen": self.frozen})

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    # -- judging -----------------------------------------------------------------------------------------------------
    def forward(self, obs: Observation, scene: Scene, plan: Plan) -> Judgement:
        """What is judged depends on the observation alone. In training the scene tells the backbone what is to be seen."""
        features = self.see(obs)
        judgement = self.judge(features, plan)
        if not self.training or self.frozen or not self.config.weights.perception:
            return judgement
        losses = self.backbone.loss(features, scene)
        return dataclasses.replace(judgement, perception={name: value.expand(len(obs)) for name, value in losses.items()})

    def see(self, obs: Observation) -> Features:
        """What is seen: once for any number of plans."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(obs)

    def judge(self, features: Features, plan: Plan) -> Judgement:
        """Plans, by what was seen. Differentiable with respect to their poses, as if the car followed them."""
        obs = features.observation
        states = simulated(obs, plan)
        poses = driven(plan, states, self.times) if self.config.dynamics == "simulated" else planned(plan, self.times).float()
        speed = obs.ego[:, -1, StateIndex.VX].float()
        around = self.network.surroundings(features)
        tokens = self.network(around, poses, self.times, speed)
        whole = torch.cat([tokens.mean(-2), tokens.amax(-2)], -1)
        moments = {name: head(tokens, whole) for name, head in self.events.items()}
        length = nn.functional.pad(poses[..., :2], (0, 0, 1, 0)).diff(dim=-2).norm(dim=-1).sum(-1)
        reference = self.reference(around, speed)
        progress = self.progress(whole, length, reference)
        logits = {name: outcome(value) for name, value in moments.items()}
        values = {"ep": progress} | {name: self._expected(name, value) for name, value in logits.items()}
        if "hc" not in values:
            values["hc"] = comfortable(obs, states).to(progress)
        if "ec" not in values or not bool(self.measured):
            values["ec"] = torch.full_like(progress, torch.nan)
        return Judgement(torch.stack([values[name] for name in METRICS], -1), logits=logits, moments=moments, reference=reference)

    def _expected(self, name: str, logits: Float[Tensor, "B K C"]) -> Float[Tensor, "B K"]:
        worth = torch.linspace(0.0, 1.0, CLASSES[name], device=logits.device)
        calibrated: Tensor = self.temperatures[name](logits)
        return (calibrated.exp() * worth).sum(-1)

    # -- learning ----------------------------------------------------------------------------------------------------
    def loss(self, predicted: Epdms, measured: Epdms) -> dict[str, Float[Tensor, ""]]:
        """By metric; means over scenes of means over candidates. What was not measured (NaN) does not count.

        Labels with details also teach when NC, DAC, TLC and TTC fail first, and how far the reference of EP gets.

        Raises `InputError` for what this model has not predicted.
        """
        if not isinstance(predicted, Judgement):
            raise InputError(f"{self}: loss() takes what forward() returned, got {type(predicted).__name__}")
        weights, labels, when = self.config.weights, measured.values, _moments_of(measured.details, self.config.moments)
        losses = {}
        for name, moments in predicted.moments.items():
            label = labels[..., METRICS.index(name)]
            value = -likelihood(moments, _kind(label.nan_to_num(1.0), CLASSES[name]), when.get(name))
            losses[name] = getattr(weights, name) * _mean(value, ~label.isnan())
        label = labels[..., METRICS.index("ep")]
        error = predicted.values[..., METRICS.index("ep")] - label.nan_to_num().to(predicted.values)
        losses["ep"] = weights.ep * _mean(error.square(), ~label.isnan())
        if measured.details is not None and predicted.reference is not None:
            wanted = self.progress.place(measured.details.reference_progress[:, 0].float())
            losses["reference"] = weights.reference * -(wanted * predicted.reference).sum(-1).mean()
        if self.training and "ec" in predicted.moments:
            self.measured |= ~labels[..., METRICS.index("ec")].isnan().all().to(self.measured.device)
        return losses | {f"perception/{name}": weights.perception * value.mean() for name, value in predicted.perception.items()}

    # -- calibration -------------------------------------------------------------------------------------------------
    def calibrate(self, predicted: Sequence[Judgement], measured: Sequence[Epdms]) -> dict[str, tuple[float, float]]:
        """Temperatures and offsets from batches of held-out scenes, which it has not learned from. Returns by metric the negative
        log-likelihood per candidate before any calibration and after this one; metrics that were not measured stay as they are."""
        found = {}
        for name in predicted[0].logits:
            label = torch.cat([part.values[..., METRICS.index(name)].flatten() for part in measured])
            logits = torch.cat([part.logits[name].flatten(0, -2) for part in predicted])
            known = ~label.isnan()
            if bool(known.any()):
                temperature: Any = self.temperatures[name]
                found[name] = temperature.fit(logits[known], _kind(label[known], CLASSES[name]))
        return found

    def fit_support(self, plan: Plan, speed: Float[Tensor, " B"], quantile: float) -> None:
        """Take from plans of the training, and the speed of the car in their scenes, what is usual; see `Support.fit`."""
        self.support.fit(plan, speed, quantile)

    def unsupported(self, obs: Observation, plan: Plan) -> Bool[Tensor, "B K"]:
        """Whether plans are unlike those of the training; none is before `fit_support`."""
        return self.support(plan, obs.ego[:, -1, StateIndex.VX]) > 1.0


def _backbone_of(source: str) -> components.Backbone:
    policy = from_pretrained(source)
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy={source}: it is no policy but {policy}")
    return policy.backbone


def _kind(label: Float[Tensor, "*n"], classes: int) -> Int[Tensor, "*n"]:
    return (label * (classes - 1)).round().long()


def _mean(values: Float[Tensor, "B K"], known: Bool[Tensor, "B K"]) -> Float[Tensor, ""]:
    """The mean over scenes of the mean of each over what is known; 0 where nothing is."""
    return (torch.where(known, values, 0.0).sum(1) / known.sum(1).clamp(min=1)).mean()


def _moments_of(details: Details | None, moments: int) -> dict[str, Int[Tensor, "B K"]]:
    """The moment at which metrics fail first, of those of which the labels tell; -1 = never."""
    if details is None:
        return {}

    def first(failing: Bool[Tensor, "B K 41"]) -> Int[Tensor, "B K"]:
        return torch.where(failing.any(-1), failing.int().argmax(-1), -1)

    steps = {"nc": details.collision_step, "dac": first(details.off_road), "tlc": first(details.red_light), "ttc": details.ttc_step}
    length = HORIZON / STEP / moments
    return {name: torch.where(step < 0, -1, ((step / length).ceil().long() - 1).clamp(0, moments - 1)) for name, step in steps.items()}
