"""The checks of reward models and of RL algorithms."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

import irlvla
from irlvla.components import Algorithm, Backbone, Planner, Policy, RewardModel
from irlvla.errors import InputError
from irlvla.testing.contract import BEHAVIOUR, SETTINGS, TRAINING, copies, keeps_scenes_apart, repeats, saves_and_loads
from irlvla.testing.examples import Example, example
from irlvla.testing.subject import (
    ROUNDING,
    WIDTH,
    Kit,
    Outputs,
    Skip,
    Subject,
    difference,
    listed,
    require,
    require_finite,
    require_same,
    require_tensor,
    seeded,
    total,
)
from irlvla.types import METRICS, Epdms, Features, Observation, Plan, Rollout, Trajectory

EC = METRICS.index("ec")

# -- reward models -----------------------------------------------------------------------------------------------------


def judge(component: RewardModel, given: Example) -> list[Outputs]:
    """The sub-metrics of each scene's plans."""
    return [{"values": values} for values in component(given.observation, given.scene, given.plan).values]


def learn_to_judge(component: RewardModel, given: Example) -> Tensor:
    """Its losses against the exact score, with EC in one scene and without in the others, as a dataset may have it."""
    measured = irlvla.epdms(given.scene.to("cpu"), given.plan.to("cpu"), previous=given.human.to("cpu"))
    measured.values[1:, :, EC] = math.nan
    return total(component.loss(component(given.observation, given.scene, given.plan), measured.to(given.device)), given.device)


def judgements_fit(subject: Subject) -> None:
    """Return irlvla.Epdms(values) with values "B K 9" in [0, 1] in the order of irlvla.METRICS; only EC may be NaN."""
    component, given = subject.build(), subject.example(k=4)
    found = component(given.observation, given.scene, given.plan)
    require(isinstance(found, Epdms), f"forward() returns {type(found).__name__}, expected irlvla.Epdms")
    require_tensor(found.values, "Epdms.values", (*given.plan.poses.shape[:2], len(METRICS)), given.device)
    for column, name in enumerate(METRICS):
        values = found.values[..., column]
        require(name == "ec" or not bool(values.isnan().any()), f"{name!r} is NaN; only EC needs a second frame and may be")
        beyond = values[(values < 0) | (values > 1)]
        require(beyond.numel() == 0, f"{name!r} is {beyond.flatten()[:1].tolist()}, expected values in [0, 1]")


def judges_plans_one_by_one(subject: Subject) -> None:
    """Judge each plan by itself: nothing may be relative to the other proposals, so that K plans together equal K alone."""
    component, given = subject.build(), subject.example()
    together = subject.outputs(component, given)
    for k in range(given.plan.poses.shape[1]):
        plan = Plan(given.plan.poses[:, k : k + 1], given.plan.dt)
        alone = subject.outputs(component, dataclasses.replace(given, plan=plan))
        one = [{"values": scene["values"][k : k + 1]} for scene in together]
        require_same(one, alone, "a plan is judged otherwise alone than among others", ROUNDING)


def looks_at_one_side_only(subject: Subject) -> None:
    """Judge by the observation if it learns, and by the scene if it does not: the truth is not there when a policy drives."""
    component, given = subject.build(), subject.example()
    stranger = example(len(given), seed=1).to(subject.device)
    if learned := any(True for _ in component.parameters()):
        other = dataclasses.replace(given, scene=dataclasses.replace(stranger.scene, token=given.scene.token))
    else:
        other = dataclasses.replace(given, observation=dataclasses.replace(stranger.observation, token=given.scene.token))
    what = "learned, and yet it reads the scene" if learned else "not learned, and yet it reads the observation"
    require_same(subject.outputs(component, given), subject.outputs(component, other), f"it is {what}")


def learns_without_ec(subject: Subject) -> None:
    """Take a loss against measured values, float64 as `irlvla.epdms` gives them, of which EC may be NaN everywhere: mask it."""
    component, given = subject.build().train(), subject.example()
    predicted = component(given.observation, given.scene, given.plan)
    measured = irlvla.epdms(given.scene.to("cpu"), given.plan.to("cpu")).to(given.device)
    total(component.loss(predicted, measured), given.device)


JUDGEMENT = Kit(
    judge,
    learn_to_judge,
    judgements_fit,
    (
        *SETTINGS,
        judgements_fit,
        judges_plans_one_by_one,
        looks_at_one_side_only,
        *BEHAVIOUR,
        keeps_scenes_apart,
        *TRAINING,
        learns_without_ec,
    ),
)

# -- RL algorithms -----------------------------------------------------------------------------------------------------


class _Status(Backbone):
    """The present state of the car as a token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = WIDTH
        self.linear = nn.Linear(8, WIDTH)

    def forward(self, obs: Observation) -> Features:
        return Features(obs, status=self.linear(obs.ego[:, -1] / 10.0))


class _Swerve(Planner):
    """Drives straight to a side of its choice, in two Gaussian steps: the smallest policy that can be reinforced."""

    NOISE, STEPS, POSES = 0.3, 2, 8

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.side = nn.Linear(width, 1)
        nn.init.zeros_(self.side.weight)
        nn.init.zeros_(self.side.bias)

    def mean(self, features: Features) -> Tensor:
        """The side "B" [m]."""
        assert features.status is not None
        return self.side(features.status)[:, 0]

    def poses(self, features: Features, side: Tensor) -> Tensor:
        """Poses "... T 3" of sides "B ..."."""
        t = torch.arange(1, self.POSES + 1, device=side.device) * (4.0 / self.POSES)
        speed = features.observation.ego[:, -1, 3].view(-1, *[1] * side.ndim)
        y = side[..., None] * t / 4.0
        return torch.stack([(speed * t).expand_as(y), y, torch.zeros_like(y)], -1)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        return {"imitation": (self.poses(features, self.mean(features)) - human.poses).square().mean()}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        mean = self.mean(features)
        noise = torch.randn(len(mean), k, self.STEPS, generator=generator, device=mean.device)
        steps = self.NOISE * noise + mean[:, None, None] / self.STEPS
        trace = nn.functional.pad(steps.cumsum(-1), (1, 0))
        return Plan(self.poses(features, trace[..., -1]), 4.0 / self.POSES, trace=trace)

    def log_prob(self, features: Features, plan: Plan) -> Tensor:
        assert plan.trace is not None
        step = self.mean(features)[:, None, None] / self.STEPS
        return torch.distributions.Normal(step, self.NOISE).log_prob(plan.trace.diff(dim=-1))


class Training:
    """A policy, its optimizer and an algorithm; a policy that swerves to the left is rewarded, or all are equally."""

    def __init__(self, algorithm: Algorithm, given: Example) -> None:
        self.algorithm, self.given = algorithm.train(), given
        with seeded(0):
            self.planner = _Swerve(_Swerve.Config(), width=WIDTH)
            self.policy = Policy(_Status(_Status.Config()), self.planner).to(given.device)
        self.optimizer = torch.optim.Adam([*self.policy.parameters(), *algorithm.parameters()], 0.002)
        self.generator = torch.Generator(given.device).manual_seed(0)

    def side(self) -> Tensor:
        """Where the policy drives on average, in each scene [m]."""
        with torch.no_grad():
            return self.planner.mean(self.policy(self.given.observation))

    def rollout(self, equal: bool = False) -> Rollout:
        """The human drives straight on, as the policy does at first: the imitation anchor pulls to no side."""
        obs = self.given.observation
        with torch.no_grad():
            features = self.policy(obs)
            plan = self.planner.sample(features, self.given.plan.poses.shape[1], generator=self.generator)
            log_prob = self.planner.log_prob(features, plan)
            human = Trajectory(self.planner.poses(features, torch.zeros(len(obs), device=self.given.device)))
        left = plan.poses[..., -1, 1]
        reward = torch.full_like(left, 0.5) if equal else (2.0 * left).sigmoid()
        values = reward[..., None].repeat(1, 1, len(METRICS))
        values[..., EC] = math.nan
        return Rollout(obs, human, plan, log_prob, reward, values)

    def update(self, rollout: Rollout) -> dict[str, float]:
        return self.algorithm.update(self.policy, self.optimizer, rollout)

    def parameters(self) -> Outputs:
        named = [*self.policy.named_parameters("policy"), *self.algorithm.named_parameters("algorithm")]
        return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}

    def require_sane(self, when: str) -> None:
        """Raise `Broken` if an update has spoilt a parameter."""
        bad = [name for name, value in self.parameters().items() if not bool(value.isfinite().all())]
        require(not bad, f"after an update {when} these hold NaN or infinity: {listed(bad)}")


def improve(component: Algorithm, given: Example) -> list[Outputs]:
    """The parameters after an update, of a copy."""
    with torch.enable_grad():
        training = Training(copy.deepcopy(component), given)
        training.update(training.rollout())
    return [training.parameters()]


def updates_report_numbers(subject: Subject) -> None:
    """Return a dict of names to finite floats from update(), such as {"losses/policy": loss.item()}."""
    training = Training(subject.build(), subject.example())
    for equal, when in ((False, "as usual"), (True, "in which all rewards are equal, so that their deviation is 0,")):
        logged = training.update(training.rollout(equal))
        require(isinstance(logged, dict), f"update() returns {type(logged).__name__}, expected a dict of names to floats")
        for name, value in logged.items():
            fits = isinstance(name, str) and isinstance(value, int | float)
            require(fits, f"update() returns {name!r}: {value!r}, expected a name and a float")
            require(math.isfinite(value), f"an update {when} returns {name!r}: {value}, expected a finite number")
        training.require_sane(when)


def updates_move_parameters(subject: Subject) -> None:
    """Call optimizer.zero_grad(), backward() and optimizer.step() in update(), so that policy and critic learn; freeze what shall not."""
    training = Training(subject.build(), subject.example())
    before = training.parameters()
    for _ in range(3):  # where one layer begins at zero, those before it wait an update
        training.update(training.rollout())
    still = [name for name, value in training.parameters().items() if torch.equal(value, before[name])]
    require(not still, f"three updates leave {listed(still)} as they were")


def leaves_rollout_alone(subject: Subject) -> None:
    """Change nothing of the rollout in place, such as rollout.reward -= mean: the stage logs it afterwards."""
    training = Training(subject.build(), subject.example())
    rollout = training.rollout()
    before = copy.deepcopy(rollout)
    training.update(rollout)
    pairs = zip(rollout.tensors(), before.tensors(), strict=True)
    changed = [name for (name, a), (_, b) in pairs if difference([{"": a}], [{"": b}], 0.0)]
    require(not changed, f"update() changes rollout.{', rollout.'.join(changed)}")


def does_without_humans(subject: Subject) -> None:
    """Leave scenes out of the imitation anchor where rollout.human.poses is NaN: none was recorded."""
    training = Training(subject.build(), subject.example())
    rollout = training.rollout()
    rollout.human.poses[0] = math.nan
    training.update(rollout)
    training.require_sane("with a scene without human drive")


def takes_one_plan(subject: Subject) -> None:
    """Work for one plan in one scene, or refuse it with irlvla.InputError: its deviation is NaN, so guard divisions by it."""
    try:
        require_finite(subject.outputs(subject.build(), subject.example(batch=1, k=1)))
    except InputError as error:
        raise Skip(f"it refuses a single plan: {error}") from None


def prefers_what_is_rewarded(subject: Subject) -> None:
    """Raise the log_prob of plans with more reward than others and lower that of those with less: mind the sign and the baseline."""
    side = {}
    for equal in (False, True):
        training = Training(subject.build(), subject.example(batch=8, k=16))
        for _ in range(25):
            training.update(training.rollout(equal))
        side[equal] = training.side().mean().item()
    gain, drift = side[False] - side[True], side[True]
    told = f"plans to the left were rewarded, and after 25 updates the policy drives {side[False]:+.2f} m to the left"
    require(gain > 0.05, f"{told}, expected at least 0.05 m more than the {drift:+.2f} m where all rewards were equal")
    require(abs(drift) < gain / 2, f"{told}, but {drift:+.2f} m also where all rewards were equal, expected 0 m")


IMPROVEMENT = Kit(
    improve,
    None,
    updates_report_numbers,
    (
        *SETTINGS,
        updates_report_numbers,
        updates_move_parameters,
        leaves_rollout_alone,
        does_without_humans,
        takes_one_plan,
        repeats,
        copies,
        saves_and_loads,
        prefers_what_is_rewarded,
    ),
)
