"""The contracts that plugins fulfil, and `Config`, the one schema for YAML, command line, Python and checkpoint.

A component is a class with a nested `Config` and at most four methods. It is built as `Class(config, **runtime)`: config is data
that can be saved, runtime arguments are live objects, and they never share a name. All tensors have a leading axis B of
scenes; frames and units are those of `irlvla.types`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import pydantic
import torch
from jaxtyping import Float
from pydantic import BeforeValidator, ConfigDict, Field
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from irlvla.errors import ConfigError, ContractError, InputError
from irlvla.types import Epdms, Features, Observation, Plan, Rollout, Scene, Trajectory

# -- configuration -----------------------------------------------------------------------------------------------------


class Config(pydantic.BaseModel):
    """Settings of a component or a stage: frozen, validated, and an unknown field is an error.

    Give each field a type, a default and a description: they are its help text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), use_attribute_docstrings=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """YAML reads a bare yes as true, which pydantic would take for 1."""
        field = cls.model_fields[str(info.field_name)].annotation
        accepted = set(get_args(field)) or {field}
        flags = value if isinstance(value, list | tuple) else [value]
        if accepted & {int, float} and bool not in accepted and any(isinstance(one, bool) for one in flags):
            raise ValueError("must be a number")
        return value


def _as_spec(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return dict(value)
    raise ValueError("write the name of a component, or name: with its settings beside it")


Spec = Annotated[dict[str, Any], BeforeValidator(_as_spec)]
"""Which component, and its settings: "spline", or {"name": "spline", "knots": 4}."""


def pluggable(kind: str, default: Any = ..., description: str = "") -> Any:
    """A field of type `Spec`, `Spec | None` or `list[Spec]` that chooses a component of a kind; its settings are validated with it."""
    if kind not in KINDS:
        raise InputError(f"no kind {kind!r}; kinds are {', '.join(KINDS)}")
    return Field(default, description=description, json_schema_extra={"kind": kind})


UNSET = "???"  #: the mark of a field that must be set elsewhere


# -- contracts ---------------------------------------------------------------------------------------------------------

_Config = Config


class Component:
    """What every kind has: a nested `Config`, an instance of it, and a label for messages."""

    class Config(_Config):
        """No settings."""

    kind: ClassVar[str]
    label: str = ""  #: "planner 'spline' (irlvla-acme 0.3.1)": set by the registry that built it
    runtime: Mapping[str, Any] = {}  #: what it was built with beside its config, as the registry gave it

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config  #: what rebuilds it: a component that read pretrained weights puts one here that does not read them again
        self.built_with = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not (isinstance(cls.Config, type) and issubclass(cls.Config, _Config)):
            raise ContractError(f"{cls.__qualname__}.Config must derive from irlvla.Config: class Config(irlvla.Config): ...")

    def __str__(self) -> str:
        return self.label or type(self).__qualname__


class Backbone(Component, nn.Module, ABC):
    """Sees. Built as `Class(config)`; tells the width D of its tokens."""

    kind = "backbone"
    width: int

    @abstractmethod
    def forward(self, obs: Observation) -> Features:
        """The tokens that it makes, each of width `self.width`."""

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        """Auxiliary losses (detection, map, segmentation) by name, weighted; the stage minimises their sum. None by default."""
        return {}


class Reasoner(Component, nn.Module, ABC):
    """Thinks in words: semantic reasoning, by a VLM or otherwise. Built as `Class(config, width=D)`."""

    kind = "reasoner"

    @abstractmethod
    def forward(self, obs: Observation) -> Features:
        """Language tokens, of the width that it was built with."""

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        """Its own losses by name, weighted; the stage minimises their sum. None by default."""
        return {}


class Planner(Component, nn.Module, ABC):
    """Drives. Built as `Class(config, width=D)`: the width of the tokens that it gets."""

    kind = "planner"
    explore: bool = False  #: whether sample() draws from the density that log_prob() is of; set while it is reinforced

    @abstractmethod
    def loss(self, features: Features, human: Trajectory) -> dict[str, Float[Tensor, ""]]:
        """Imitation losses by name, weighted; the stage minimises their sum. Empty for a planner that does not learn."""

    @abstractmethod
    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        """K proposals per scene. The same generator state gives the same plan."""

    def fit(self, human: Trajectory) -> None:
        """Take from many human drives, "N T 3", what is not learnt by gradient (anchors, scales) and keep it in buffers.

        Called once, before imitation begins. Nothing by default.
        """

    log_prob: ClassVar[Callable[..., Tensor] | None] = None
    """`log_prob(features, plan) -> "B K D"`: differentiable log-probability of each sampling step. Without it the
    planner imitates but cannot be reinforced."""


class RewardModel(Component, nn.Module, ABC):
    """Judges plans: the exact score, or a network that learned it. Built as `Class(config)`."""

    kind = "reward_model"

    @abstractmethod
    def forward(self, obs: Observation, scene: Scene, plan: Plan) -> Epdms:
        """Sub-metrics "B K 9" in [0, 1], NaN = not measured. A learned reward ignores `scene`, the exact one `obs`."""

    def loss(self, predicted: Epdms, measured: Epdms) -> dict[str, Float[Tensor, ""]]:
        """Losses by name, weighted; the stage minimises their sum. None by default: nothing to learn."""
        return {}


class Algorithm(Component, nn.Module, ABC):
    """Improves a policy by its rewards. Built as `Class(config, width=D)`; it may own a critic, whose parameters the optimizer holds."""

    kind = "rl_algorithm"

    @abstractmethod
    def update(self, policy: Policy, optimizer: Optimizer, rollout: Rollout) -> dict[str, float]:
        """One improvement. Returns what to log, under CleanRL's names (`losses/approx_kl`, `losses/clipfrac`, ...)."""


class Dataset(Component, torch.utils.data.Dataset[tuple[Observation, Scene, Trajectory]], ABC):
    """Scenes. Built as `Class(config)`; must pickle, for workers. Each item is a batch of one, so that batches are made by `cat`."""

    kind = "dataset"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Observation, Scene, Trajectory]:
        """What the policy sees, the truth, and the human's drive."""

    def token(self, index: int) -> str:
        """The name of a scene without reading it, for when it cannot be read; "" = it is not known before."""
        return ""


class Metric(Component, ABC):
    """Measures plans. Built as `Class(config)`."""

    kind = "metric"

    @abstractmethod
    def __call__(self, scene: Scene, plan: Plan) -> dict[str, Float[Tensor, " B"]]:
        """Values per scene by name; NaN = not measured."""


class Benchmark(Component):
    """A published comparison. Built as `Class(config)`; it overrides one of its methods, and reads no file until that is called."""

    kind = "benchmark"

    def settings(self) -> Mapping[str, Any]:
        """What `evaluate` takes in it, as plain data: scenes, traffic, ...; what its user sets goes over these."""
        raise ConfigError(f"{self} is driven elsewhere; give its result files: irlvla evaluate --benchmark NAME RESULTS...")

    def summarise(self, results: Sequence[Path]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What result files of drives elsewhere come to: tables by title, of rows, each with its cells by column."""
        raise ConfigError(f"{self} is driven here and takes no result files; say who drives: policies='{{mine: FOLDER}}'")


KINDS: dict[str, type[Component]] = {
    contract.kind: contract for contract in (Backbone, Reasoner, Planner, RewardModel, Algorithm, Dataset, Metric, Benchmark)
}

# -- policy ------------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Backbone, reasoner (or None) and planner: what is trained, saved, loaded and shared."""

    def __init__(self, backbone: Backbone, planner: Planner, reasoner: Reasoner | None = None) -> None:
        super().__init__()
        self.backbone, self.reasoner, self.planner = backbone, reasoner, planner

    def forward(self, obs: Observation) -> Features:
        """Tokens of backbone and reasoner."""
        features = self.backbone(obs)
        return features if self.reasoner is None else features.merged(self.reasoner(obs))

    def sample(self, obs: Observation, k: int = 1, *, generator: Generator | None = None) -> Plan:
        """K proposals per scene. Raises `ContractError` if the planner returns another shape."""
        plan = self.planner.sample(self(obs), k, generator=generator)
        require_plan(plan, len(obs), k, self.planner)
        return plan

    def loss(self, obs: Observation, scene: Scene, human: Trajectory) -> dict[str, Tensor]:
        """Losses of all parts, as "planner/name"; their sum is what imitation minimises."""
        features = self(obs)
        losses = {"backbone": self.backbone.loss(features, scene), "planner": self.planner.loss(features, human)}
        if self.reasoner is not None:
            losses["reasoner"] = self.reasoner.loss(features, scene)
        return {f"{part}/{name}": value for part, values in losses.items() for name, value in values.items()}


def require_plan(plan: Plan, batch: int, k: int, planner: Planner) -> None:
    """Raise `ContractError` unless a planner returned K proposals for each of B scenes."""
    if not isinstance(plan, Plan):
        raise ContractError(f"{planner}: sample() must return an irlvla.Plan, not {type(plan).__name__}")
    shape = tuple(plan.poses.shape)
    if len(shape) != 4 or shape[:2] != (batch, k) or shape[3] != 3:
        raise ContractError(
            f"{planner}: sample(features, k={k}) for {batch} scenes must return poses of shape ({batch}, {k}, T, 3), got {shape}"
        )
    if plan.score is not None and (tuple(plan.score.shape) != (batch, k) or bool(plan.score.isnan().any())):
        given = "NaN" if tuple(plan.score.shape) == (batch, k) else f"shape {tuple(plan.score.shape)}"
        raise ContractError(f"{planner}: Plan.score must be of shape ({batch}, {k}) without NaN, got {given}")
