"""The audit of reinforcement: what a reward believes against what is true, in scenes that were not learned from, and what follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam

from irlvla.components import Config, Dataset, Policy
from irlvla.errors import ConfigError
from irlvla.plots import REINFORCEMENT_PANELS, draw_learning_curve
from irlvla.run import Run
from irlvla.run.journal import METRICS
from irlvla.stages.batches import SceneBatch
from irlvla.stages.floors import Floors
from irlvla.stages.imitation import Validation
from irlvla.stages.measurement import Summary
from irlvla.stages.rollouts import Drawn, Judge, rewards
from irlvla.types import Epdms, Observation, Plan

if TYPE_CHECKING:
    from irlvla.stages.reinforcement import ReinforceConfig


class AuditConfig(Config):
    """How the exact score watches."""

    every: int = Field(1, ge=1, description="steps between looks at the plans that are learned from")
    share: float = Field(1.0, gt=0.0, le=1.0, description="of the scenes of such a step")
    limit: float | None = Field(0.1, gt=0.0, description="largest gap, believed minus exact, in held-out scenes; null = any")
    growth: float | None = Field(0.05, gt=0.0, description="how much the gap may grow from what it is at the start; null = as it likes")
    patience: int = Field(2, ge=1, description="validations running with a larger gap, after which the run stops")


class Patience(nn.Module):
    """In how many validations running the gap was too large.

    A reward that is wrong by as much for every plan misleads nobody; one that is climbed where it is wrong shows in a gap that grows.
    """

    first: Tensor  # the gap at the start; NaN = not measured
    over: Tensor

    def __init__(self, config: AuditConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("first", torch.full((), torch.nan, dtype=torch.float64))
        self.register_buffer("over", torch.zeros((), dtype=torch.long))

    def begin(self, gap: float) -> None:
        """The gap before the first step."""
        self.first.fill_(gap)

    def see(self, gap: float) -> None:
        """The gap of a validation."""
        limit, growth = self.config.limit, self.config.growth
        large = limit is not None and gap > limit
        grown = growth is not None and gap - float(self.first) > growth
        self.over.copy_((self.over + 1) * (large or grown))

    @property
    def allowed(self) -> str:
        """What is too much."""
        limit, growth = self.config.limit, self.config.growth
        large = [] if limit is None else [f"more than {limit:g} above the exact score"]
        grown = [] if growth is None else [f"{growth:g} more above the exact score than at the start"]
        return " or ".join(large + grown)

    @property
    def lost(self) -> bool:
        """Whether the reward has believed too much for too long."""
        return int(self.over) >= self.config.patience


class Audit(Validation):
    """Held-out scenes, how the policy drives there, and what the reward believes of it."""

    def __init__(
        self, run: Run, config: ReinforceConfig, dataset: Dataset | None, judge: Judge, patience: Patience, floors: Floors
    ) -> None:
        super().__init__(run, cast(Any, config), dataset)
        self.judge, self.patience, self.floors = judge, patience, floors
        self.found: list[tuple[Epdms, Epdms]] = []

    def measure(self, step: int, policy: Policy) -> dict[str, float]:
        """As of imitation, with what the reward believes of the plans that are driven."""
        self.found = []
        values = super().measure(step, policy)
        if not self.found:
            return values
        believed, exact = (Epdms(torch.cat([one.values.double() for one in each])) for each in zip(*self.found, strict=True))
        audit = rewards(believed, exact)
        if step:
            self.patience.see(audit["gap"])
        else:
            self.patience.begin(audit["gap"])
        return values | {f"audit/{name}": value for name, value in audit.items()}

    def may_be_best(self, step: int, found: Summary) -> bool:
        """Not if a sub-metric has fallen through its floor."""
        if not step:
            self.floors.begin(found)
        return self.floors.hold(found)

    def _drive(self, policy: Policy, batch: SceneBatch, obs: Observation) -> Plan:
        plan = super()._drive(policy, batch, obs)
        if obs is batch.observation:
            driven = Plan(plan.best().poses[:, None], plan.dt)
            believed = self.judge.believe(obs, batch.scene, driven)
            self.found.append((believed, self.judge.truth(obs, batch.scene, driven, believed)))
        return plan

    def draw(self) -> None:
        """The course so far, with what was believed."""
        draw_learning_curve(self.run.directory / METRICS, self.run.directory / "learning_curve.png", REINFORCEMENT_PANELS)

    def summarise(self, steps: int, ended: str | None = None) -> None:
        """Write summary.json: what was measured of the best policy, and why the run stopped if it did."""
        if self.patience.lost:
            ended = (
                f"stopped by the audit: in {self.patience.config.patience} validations running the reward believed "
                f"{self.patience.allowed}, of the plans that are driven in held-out scenes. {steps} steps"
            )
        super().summarise(steps, ended)


class RefitConfig(Config):
    """How the reward model goes on learning, from the exact scores of the plans that the policy draws now."""

    every: int = Field(20, ge=1, description="steps between refits")
    steps: int = Field(10, ge=1, description="of the reward model's optimizer, each on all plans of the step")
    lr: float = Field(1e-4, gt=0.0, description="their learning rate")


class Refit:
    """Lets the reward model learn from the exact scores of new plans."""

    def __init__(self, run: Run, config: RefitConfig, judge: Judge) -> None:
        """Raises `ConfigError` for a reward that has nothing to learn."""
        self.config, self.judge = config, judge
        learning = [parameter for parameter in judge.reward.parameters() if parameter.requires_grad]
        if not learning:
            raise ConfigError(f"refit: {judge.reward} has nothing to learn; set refit=null")
        judge.reward, self.optimizer = run.prepare(judge.reward, Adam(learning, config.lr))

    def due(self, step: int) -> bool:
        """Whether a step is one of those."""
        return step % self.config.every == 0

    def learn(self, drawn: list[Drawn]) -> dict[str, float]:
        """Returns what to log: the sum of its losses before and after."""
        reward, course = self.judge.reward, []
        labels = [self.judge.exact(one.batch.observation, one.batch.scene, one.plan) for one in drawn]
        for _ in range(self.config.steps):
            self.optimizer.zero_grad()
            course.append(0.0)
            for one, measured in zip(drawn, labels, strict=True):
                losses = reward.loss(reward(one.batch.observation, one.batch.scene, one.plan), measured)
                loss = torch.stack([value.float() for value in losses.values()]).sum() / len(drawn)
                loss.backward()
                course[-1] += loss.item()
            self.optimizer.step()
        return {"refit/before": course[0], "refit/after": course[-1]}
