"""The conformance kit: what keeps its contract passes, and each way to break it has a message of its own."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import nn
from torch.distributions import Normal

import irlvla
from irlvla import testing
from irlvla.components import Component
from irlvla.errors import ContractError, InputError, PluginError
from irlvla.registry import Plugin, Registry, installed
from irlvla.types import METRICS

# -- components that keep their contract -------------------------------------------------------------------------------


class Eyes(irlvla.Backbone):
    class Config(irlvla.Config):
        width: int = 8

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = config.width
        self.linear = nn.Linear(8, config.width)

    def forward(self, obs: Any) -> Any:
        tokens = self.linear(obs.ego / 10)  # one agent less in every scene: ragged, and padded to the longest
        present = torch.arange(tokens.shape[1], device=tokens.device) < 1 + obs.command[:, None] % 4
        longest = int(present.sum(1).max())
        return irlvla.Features(obs, status=tokens[:, -1], agents=tokens[:, :longest], agents_valid=present[:, :longest])


class Words(irlvla.Reasoner):
    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.words = nn.Embedding(4, width)

    def forward(self, obs: Any) -> Any:
        return irlvla.Features(obs, language=self.words(obs.command)[:, None])

    def loss(self, features: Any, scene: Any) -> Any:
        return {"small": self.words.weight.square().mean()}


class Wheel(irlvla.Planner):
    class Config(irlvla.Config):
        noise: float = Field(0.2, gt=0)

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.linear = nn.Linear(width, 24)

    def mean(self, features: Any) -> Any:
        return self.linear(features.status).unflatten(1, (1, 8, 3))

    def loss(self, features: Any, human: Any) -> Any:
        errors = self.mean(features)[:, 0] - human.poses.nan_to_num()
        return {"distance": errors.square().where(~human.poses.isnan(), 0.0).mean()}

    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        mean = self.mean(features).expand(-1, k, -1, -1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return irlvla.Plan(mean + self.config.noise * noise, score=noise.mean((-1, -2)))

    def log_prob(self, features: Any, plan: Any) -> Any:
        return Normal(self.mean(features), self.config.noise).log_prob(plan.poses).sum((-1, -2))[..., None]


class Straight(irlvla.Planner):
    """Without noise, parameters or log_prob."""

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)

    def loss(self, features: Any, human: Any) -> Any:
        return {}

    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        poses = torch.zeros(len(features), k, 8, 3, device=features.device)
        poses[..., 0] = torch.arange(1, 9, device=features.device) * features.observation.ego[:, None, -1:, 3] / 2
        return irlvla.Plan(poses)


class Judge(irlvla.RewardModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.linear = nn.Linear(3, 9)

    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        return irlvla.Epdms(self.linear(plan.poses[:, :, -1].to(self.linear.weight) / 50).sigmoid())

    def loss(self, predicted: Any, measured: Any) -> Any:
        errors = predicted.values - measured.values.to(predicted.values)
        return {"error": torch.where(measured.values.isnan(), 0.0, errors).square().mean()}


class Ruler(irlvla.RewardModel):
    """Measures: no parameters, and no look at the observation."""

    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        return irlvla.epdms(scene, plan)


class Climb(irlvla.Algorithm):
    """Policy gradient with a critic."""

    class Config(irlvla.Config):
        anchor: float = 0.01

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.critic = nn.Linear(width, 1)

    def advantage(self, reward: Any, value: Any) -> Any:
        return reward - reward.mean(1, keepdim=True)

    def update(self, policy: Any, optimizer: Any, rollout: Any) -> Any:
        features = policy(rollout.observation)
        value = self.critic(features.status.detach())
        known = ~rollout.human.poses.isnan().flatten(1).any(1)
        anchor = sum(policy.planner.loss(features[known], rollout.human[known]).values()) if known.any() else 0.0
        gain = self.advantage(rollout.reward, value) * policy.planner.log_prob(features, rollout.plan).sum(-1)
        loss = -gain.mean() + (value - rollout.reward).square().mean() + self.config.anchor * anchor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"losses/total": loss.item()}


class Roads(irlvla.Dataset):
    class Config(irlvla.Config):
        scenes: int = 5

    def __len__(self) -> int:
        return self.config.scenes

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        obs = testing.example_observation(1, cameras=1, seed=index)
        return obs, obs.scene, irlvla.Trajectory(obs.scene.human.float())


class Reach(irlvla.Metric):
    def __call__(self, scene: Any, plan: Any) -> Any:
        return {"reach": plan.best().poses[:, -1, 0]}


class Course(irlvla.Benchmark):
    class Config(irlvla.Config):
        scenes: int = 5

    def settings(self) -> Any:
        return {"data": {"name": "Roads", "scenes": self.config.scenes}, "traffic": "log"}


class Simulator(irlvla.Benchmark):
    def summarise(self, results: Any) -> Any:
        try:
            return {"routes": [{"file": str(path), "score": json.loads(path.read_text())["score"]} for path in results]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise irlvla.FileError(f"{results[0]} holds no results: {error}") from error


GOOD: dict[str, list[type[Component]]] = {
    "backbone": [Eyes],
    "reasoner": [Words],
    "planner": [Wheel, Straight],
    "reward_model": [Judge, Ruler],
    "rl_algorithm": [Climb],
    "dataset": [Roads],
    "metric": [Reach],
    "benchmark": [Course, Simulator],
}

# -- and components that break it: each names the check that must find it, and a part of its message -------------------

BROKEN: dict[str, tuple[type[Component], str, str]] = {}


def breaks(check: str, because: str) -> Any:
    """Register a broken component: the check that must find it, and a part of what it must say."""

    def register(target: type[Component]) -> type[Component]:
        BROKEN[target.__name__] = (target, check, because)
        return target

    return register


# Settings, and being built.


@breaks("config_leaves_runtime_names", because="a field 'width', which every planner is given at run time")
class WheelShadowsWidth(Wheel):
    class Config(irlvla.Config):
        width: int = 3
        noise: float = 0.2


@breaks("imports", because="must not have a field 'name'")
class WheelTakesName(Wheel):
    class Config(Wheel.Config):
        name: str = "mine"


@breaks("config_is_strict", because="accepts the unknown field 'no_such_field'")
class WheelAcceptsAnything(Wheel):
    class Config(Wheel.Config):
        model_config = ConfigDict(extra="ignore")


@breaks("config_is_strict", because="can be changed after it was checked")
class WheelThaws(Wheel):
    class Config(Wheel.Config):
        model_config = ConfigDict(frozen=False)


@breaks("config_is_data", because="cannot be written as JSON")
class WheelHoldsObject(Wheel):
    class Config(Wheel.Config):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        layer: nn.Module = nn.Linear(1, 1)


@breaks("builds", because="RuntimeError: no weights here")
class WheelWillNotTurn(Wheel):
    def __init__(self, config: Any, *, width: int) -> None:
        raise RuntimeError("no weights here")


@breaks("builds", because="does not keep its config")
class WheelForgets(Wheel):
    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(Wheel.Config(), width=width)


@breaks("builds", because="depth")
class WheelWantsMore(Wheel):
    def __init__(self, config: Any, *, width: int, depth: int) -> None:
        super().__init__(config, width=width)


# Planners.


@breaks("plans_fit", because="poses of shape (3, 4, T, 3), got (3, 4, 24)")
class WheelFlattens(Wheel):
    log_prob = None

    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        return irlvla.Plan(super().sample(features, k, generator=generator).poses.flatten(2))


@breaks("plans_fit", because="must cover 4.0 s")
class WheelStopsEarly(Straight):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        return irlvla.Plan(super().sample(features, k).poses[:, :, :6])


@breaks("plans_fit", because="'poses' holds NaN or infinity")
class WheelDividesByZero(Straight):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        plan = super().sample(features, k)
        return irlvla.Plan(plan.poses / plan.poses[..., 1:2])


@breaks("plans_fit", because="too coarse for metres")
class WheelRounds(Straight):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        return irlvla.Plan(super().sample(features, k).poses.half())


@breaks("draws_from_its_generator", because="draws from torch's global generator")
class WheelUsesGlobal(Wheel):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        return super().sample(features, k)


@breaks("draws_from_its_generator", because="the same state of the generator gives another plan")
class WheelRollsDice(Wheel):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        plan = super().sample(features, k, generator=generator)
        return irlvla.Plan(plan.poses + random.random())


@breaks("draws_from_its_generator", because="needs a generator")
class WheelInsistsOnGenerator(Wheel):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        if generator is None:
            raise ValueError("it needs a generator")
        return super().sample(features, k, generator=generator)


@breaks("leaves_input_alone", because="changes its input: observation.ego, features.observation.ego, features.status, human.poses")
class WheelNormalises(Wheel):
    def mean(self, features: Any) -> Any:
        features.status.div_(10)
        return super().mean(features)

    def loss(self, features: Any, human: Any) -> Any:
        features.observation.ego.zero_()
        human.poses.sub_(1)
        return super().loss(features, human)


@breaks("losses_are_finite", because="loss 'distance' is nan, expected a finite number")
class WheelLosesNumbers(Wheel):
    def loss(self, features: Any, human: Any) -> Any:
        return {"distance": super().loss(features, human)["distance"] * float("nan")}


@breaks("losses_are_finite", because="loss 'distance' has shape (3,), expected ()")
class WheelLosesPerScene(Wheel):
    def loss(self, features: Any, human: Any) -> Any:
        return {"distance": self.mean(features).flatten(1).mean(1)}


@breaks("losses_are_finite", because="loss() returns Tensor, expected a dict")
class WheelLosesNames(Wheel):
    def loss(self, features: Any, human: Any) -> Any:
        return self.mean(features).mean()


@breaks("gradients_arrive", because="no gradient reaches spare.weight, spare.bias")
class WheelHasSpare(Wheel):
    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width)
        self.spare = nn.Linear(2, 2)


@breaks("gradients_arrive", because="cut off from its parameters")
class WheelDetaches(Wheel):
    def loss(self, features: Any, human: Any) -> Any:
        return {name: value.detach() for name, value in super().loss(features, human).items()}


@breaks("gradients_arrive", because="gradient of linear.weight, linear.bias is NaN")
class WheelHasNoSlope(Wheel):
    def loss(self, features: Any, human: Any) -> Any:
        return {"distance": (self.mean(features) * 0).sum().sqrt()}


@breaks("keeps_plans_apart", because="otherwise likely alone than in a batch")
class WheelLeaks(Wheel):
    def mean(self, features: Any) -> Any:
        return self.linear(features.status - features.status.mean(0) / 2).unflatten(1, (1, 8, 3))


@breaks("keeps_plans_apart", because="'poses' by")
class WheelFollowsOthers(Straight):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        return irlvla.Plan(super().sample(features, k).poses.mean(0, keepdim=True).expand(len(features), -1, -1, -1))


@breaks("takes_one_scene", because="IndexError")
class WheelSqueezes(Wheel):
    def mean(self, features: Any) -> Any:
        return self.linear(features.status.squeeze()).unflatten(1, (1, 8, 3))


@breaks("log_prob_fits_the_sample", because="log_prob() has shape (3, 3), expected (3, 3, any)")
class WheelSumsSteps(Wheel):
    def log_prob(self, features: Any, plan: Any) -> Any:
        return super().log_prob(features, plan)[..., 0]


@breaks("log_prob_fits_the_sample", because="exp(new - old) is not 1 before an update")
class WheelRemembers(Wheel):
    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any:
        self.last = super().sample(features, k, generator=generator)
        return self.last

    def log_prob(self, features: Any, plan: Any) -> Any:
        return super().log_prob(features, self.last if self.last.poses.shape == plan.poses.shape else plan)


@breaks("log_prob_can_be_trained", because="log_prob() has no gradient")
class WheelForgetsGradient(Wheel):
    @torch.no_grad()
    def log_prob(self, features: Any, plan: Any) -> Any:
        return super().log_prob(features, plan)


@breaks("log_prob_prefers_own_samples", because="less likely by its own log_prob()")
class WheelTurnsSign(Wheel):
    def log_prob(self, features: Any, plan: Any) -> Any:
        return -super().log_prob(features, plan)


@breaks("copies", because="cannot pickle '_thread.lock' object")
class WheelLocks(Wheel):
    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width)
        self.lock = threading.Lock()


@breaks("saves_and_loads", because="other output after saving and loading")
class WheelHidesWeights(Wheel):
    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width)
        self.secret = torch.randn(3)

    def mean(self, features: Any) -> Any:
        return super().mean(features) + self.secret.to(features.device)


@breaks("saves_and_loads", because="these weights are mine")
class WheelRefusesToSave(Wheel):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError("these weights are mine")


# Backbones and reasoners.


@breaks("makes_tokens", because="its width is None")
class EyesWithoutWidth(Eyes):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = None  # type: ignore[assignment]


@breaks("makes_tokens", because="Features.agents has shape (3, 3, 8), expected (3, any, 9)")
class EyesMisjudge(Eyes):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = 9


@breaks("makes_tokens", because="Features.agents_valid does not say of each of (3, 3) tokens")
class EyesMask(Eyes):
    def forward(self, obs: Any) -> Any:
        features = super().forward(obs)
        return irlvla.Features(obs, agents=features.agents, agents_valid=features.agents_valid.float())


@breaks("makes_tokens", because="it makes no tokens, expected bev or agents")
class EyesShut(Eyes):
    def forward(self, obs: Any) -> Any:
        return irlvla.Features(obs)


@breaks("keeps_scenes_apart", because="'status' by")
class EyesCompare(Eyes):
    def forward(self, obs: Any) -> Any:
        return irlvla.Features(obs, status=self.linear(obs.ego[:, -1] - obs.ego[:, -1].mean(0)))


@breaks("repeats", because="the same input gives other output the second time: 'status' by")
class EyesTire(Eyes):
    calls = 0

    def forward(self, obs: Any) -> Any:
        EyesTire.calls += 1
        return irlvla.Features(obs, status=self.linear(obs.ego[:, -1]) / EyesTire.calls)


@breaks("makes_tokens", because="it makes no tokens, expected language")
class WordsUnsaid(Words):
    def forward(self, obs: Any) -> Any:
        return irlvla.Features(obs, status=self.words(obs.command))


# Reward models.


@breaks("judgements_fit", because="Epdms.values has shape (3, 4, 8), expected (3, 4, 9)")
class JudgeMissesOne(Judge):
    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        return irlvla.Epdms(super().forward(obs, scene, plan).values[..., :8])

    def loss(self, predicted: Any, measured: Any) -> Any:
        return {"error": predicted.values.mean() + 0 * self.linear.weight.sum()}


@breaks("judgements_fit", because="'nc' is [1.")
class JudgeExaggerates(Judge):
    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        return irlvla.Epdms(1 + super().forward(obs, scene, plan).values)


@breaks("judgements_fit", because="'lk' is NaN; only EC")
class JudgeAbstains(Judge):
    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        values = super().forward(obs, scene, plan).values.clone()
        values[..., METRICS.index("lk")] = float("nan")
        return irlvla.Epdms(values)


@breaks("judges_plans_one_by_one", because="judged otherwise alone than among others")
class JudgeRanks(Judge):
    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        values = super().forward(obs, scene, plan).values
        return irlvla.Epdms(values / values.amax(1, keepdim=True))


@breaks("looks_at_one_side_only", because="learned, and yet it reads the scene")
class JudgeCheats(Judge):
    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        return irlvla.Epdms(super().forward(obs, scene, plan).values * (scene.ego[:, 3] / 20).float()[:, None, None])


@breaks("looks_at_one_side_only", because="not learned, and yet it reads the observation")
class RulerPeeks(Ruler):
    def forward(self, obs: Any, scene: Any, plan: Any) -> Any:
        return irlvla.Epdms(super().forward(obs, scene, plan).values * obs.ego[:, -1, 3].double()[:, None, None] / 20)


@breaks("losses_are_finite", because="loss 'error' is nan")
class JudgeBelievesNaN(Judge):
    def loss(self, predicted: Any, measured: Any) -> Any:
        return {"error": (predicted.values - measured.values).square().mean().float()}


@breaks("learns_without_ec", because="loss 'ec' is nan")
class JudgeNeedsEc(Judge):
    def loss(self, predicted: Any, measured: Any) -> Any:
        return super().loss(predicted, measured) | {"ec": (predicted.ec - measured.ec)[~measured.ec.isnan()].square().mean().float()}


# RL algorithms.


@breaks("prefers_what_is_rewarded", because="m more than the +0.00 m where all rewards were equal")
class ClimbDown(Climb):
    def advantage(self, reward: Any, value: Any) -> Any:
        return reward.mean(1, keepdim=True) - reward


@breaks("prefers_what_is_rewarded", because="also where all rewards were equal, expected 0 m")
class ClimbUnmoored(Climb):
    def update(self, policy: Any, optimizer: Any, rollout: Any) -> Any:
        policy.planner.side.bias.data.add_(0.2)
        return super().update(policy, optimizer, rollout)


@breaks("updates_move_parameters", because="three updates leave policy.backbone.linear.weight")
class ClimbInThought(Climb):
    def update(self, policy: Any, optimizer: Any, rollout: Any) -> Any:
        return super().update(copy.deepcopy(policy), torch.optim.SGD(self.parameters(), 0.1), rollout)


@breaks("updates_move_parameters", because="leave algorithm.spare.weight, algorithm.spare.bias as they were")
class ClimbWithSpare(Climb):
    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width)
        self.spare = nn.Linear(1, 1)


@breaks("updates_report_numbers", because="in which all rewards are equal, so that their deviation is 0, these hold NaN")
class ClimbDividesByZero(Climb):
    def advantage(self, reward: Any, value: Any) -> Any:
        return (reward - reward.mean()) / reward.std()

    def update(self, policy: Any, optimizer: Any, rollout: Any) -> Any:
        super().update(policy, optimizer, rollout)
        return {}


@breaks("takes_one_plan", because="NaN or infinity")
class ClimbDividesByOne(Climb):
    def advantage(self, reward: Any, value: Any) -> Any:
        return (reward - reward.mean(1, keepdim=True)) * (reward.shape[1] / (reward.shape[1] - torch.ones(())))


@breaks("updates_report_numbers", because="expected a name and a float")
class ClimbReportsTensors(Climb):
    def update(self, policy: Any, optimizer: Any, rollout: Any) -> Any:
        return {name: torch.tensor(value) for name, value in super().update(policy, optimizer, rollout).items()}


@breaks("leaves_rollout_alone", because="update() changes rollout.reward")
class ClimbCentres(Climb):
    def advantage(self, reward: Any, value: Any) -> Any:
        return reward.sub_(reward.mean(1, keepdim=True))


@breaks("does_without_humans", because="a scene without human drive")
class ClimbNeedsHumans(Climb):
    def update(self, policy: Any, optimizer: Any, rollout: Any) -> Any:
        optimizer.zero_grad()
        sum(policy.planner.loss(policy(rollout.observation), rollout.human).values()).backward()
        optimizer.step()
        return {}


# Datasets.


@breaks("items_fit", because="observation of item 0 has 2 rows, expected a batch of one")
class RoadsInPairs(Roads):
    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        obs = testing.example_observation(2, cameras=0, seed=index)
        return obs, obs.scene, irlvla.Trajectory(obs.scene.human.float())


@breaks("items_fit", because="in the observation and ('other',) in the scene")
class RoadsMislabelled(Roads):
    def __getitem__(self, index: int) -> Any:
        obs, scene, human = super().__getitem__(index)
        return obs, dataclasses.replace(scene, token=("other",)), human


@breaks("items_fit", because="two items have the same token")
class RoadsTwice(Roads):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index // 2 if index < len(self) else index)


@breaks("index_has_bounds", because="index 5 of 5 items gives an item, expected IndexError")
class RoadsWithoutEnd(Roads):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index % len(self))


@breaks("index_has_bounds", because="index -1 is not the last item")
class RoadsBackwards(Roads):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(abs(index))


@breaks("repeats", because="the same input gives other output the second time")
class RoadsAtRandom(Roads):
    def __getitem__(self, index: int) -> Any:
        obs, scene, human = super().__getitem__(index)
        return obs, scene, irlvla.Trajectory(human.poses + random.random())


@breaks("pickles", because="cannot pickle")
class RoadsLocked(Roads):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lock = threading.Lock()


@breaks("works_in_workers", because="workers give other items: 'human.poses' by 1")
class RoadsOfWorkers(Roads):
    def __getitem__(self, index: int) -> Any:
        obs, scene, human = super().__getitem__(index)
        return obs, scene, irlvla.Trajectory(human.poses + (torch.utils.data.get_worker_info() is not None))


@breaks("works_in_workers", because="in a worker it raises OSError: not here")
class RoadsAtHome(Roads):
    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            raise OSError("not here")
        return super().__getitem__(index)


@breaks("works_in_workers", because="'images' does not fit together")
class RoadsOfSizes(Roads):
    def __getitem__(self, index: int) -> Any:
        obs, scene, human = super().__getitem__(index)
        return dataclasses.replace(obs, images=obs.images[..., index:]), scene, human


@breaks("scenes_can_be_scored", because="scenes.reference")
class RoadsWithoutReference(Roads):
    def __getitem__(self, index: int) -> Any:
        obs, scene, human = super().__getitem__(index)
        return obs, dataclasses.replace(scene, reference=scene.reference[:, :40]), human


# Metrics.


@breaks("values_fit", because="value 'reach' has shape (), expected (3)")
class ReachOnAverage(Reach):
    def __call__(self, scene: Any, plan: Any) -> Any:
        return {"reach": super().__call__(scene, plan)["reach"].mean()}


@breaks("values_fit", because="value 'reach' is infinite")
class ReachForever(Reach):
    def __call__(self, scene: Any, plan: Any) -> Any:
        return {"reach": super().__call__(scene, plan)["reach"] / 0.0}


@breaks("values_fit", because="value 'reach' is of torch.int64")
class ReachCounted(Reach):
    def __call__(self, scene: Any, plan: Any) -> Any:
        return {"reach": super().__call__(scene, plan)["reach"].long()}


@breaks("keeps_scenes_apart", because="a scene comes out otherwise alone than in a batch: 'reach' by")
class ReachOfAll(Reach):
    def __call__(self, scene: Any, plan: Any) -> Any:
        return {"reach": super().__call__(scene, plan)["reach"].cumsum(0)}


@breaks("leaves_input_alone", because="it changes its input: plan.poses")
class ReachOver(Reach):
    def __call__(self, scene: Any, plan: Any) -> Any:
        plan.poses[..., 1] = 0
        return super().__call__(scene, plan)


# Benchmarks.


@breaks("overrides_one_method", because="it overrides neither settings() nor summarise()")
class CourseOfNothing(irlvla.Benchmark):
    pass


@breaks("overrides_one_method", because="it overrides both settings() and summarise()")
class CourseOfBoth(Course):
    def summarise(self, results: Any) -> Any:
        return {}


@breaks("settings_are_data", because="what JSON cannot hold")
class CourseOfPaths(Course):
    def settings(self) -> Any:
        return {**super().settings(), "cache": Path("here")}


@breaks("settings_are_data", because="settings() brings policies")
class CourseWithDriver(Course):
    def settings(self) -> Any:
        return {**super().settings(), "policies": {"straight": "constant_velocity"}}


@breaks("settings_repeat", because="returns something else the second time")
class CourseAtRandom(Course):
    def settings(self) -> Any:
        return {**super().settings(), "seed": random.getrandbits(31)}


@breaks("settings_choose_scenes", because="brings traffic and no data")
class CourseNowhere(Course):
    def settings(self) -> Any:
        return {"traffic": "log"}


@breaks("settings_choose_scenes", because="has no such field. Did you mean 'scenes'")
class CourseMisspelt(Course):
    def settings(self) -> Any:
        return {"data": {"name": "Roads", "scenez": 3}}


@breaks("tells_of_missing_results", because="which does not name the file")
class SimulatorTerse(Simulator):
    def summarise(self, results: Any) -> Any:
        raise irlvla.FileError("no")


@breaks("tells_of_missing_results", because="summarise() takes missing.json, expected an error")
class SimulatorCareless(Simulator):
    def summarise(self, results: Any) -> Any:
        return {}


# -- the kit -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    """The plugins of this process, with irlvla-odd among them, for one test."""
    installed.cache_clear()
    provide("irlvla-odd", {kind: {target.__name__: target for target in targets} for kind, targets in GOOD.items()})
    yield installed()
    installed.cache_clear()


def provide(name: str, components: dict[str, dict[str, type | str]]) -> Plugin:
    """Add a plugin, as if it were installed."""
    module = ModuleType(name.replace("-", "_"))
    for kind, targets in components.items():
        setattr(module, f"irlvla_{kind}s", irlvla.hookimpl(lambda targets=targets: targets))
    return installed().add(Plugin(name, "1.2", module.__name__), lambda: module)


test_backbone = testing.backbone_checks("Eyes", width=16)
test_reasoner = testing.reasoner_checks("Words")
test_planner = testing.planner_checks("Wheel", noise=0.5)
test_planner_without_noise = testing.planner_checks("Straight")
test_learned_reward = testing.reward_model_checks("Judge")
test_measured_reward = testing.reward_model_checks("Ruler")
test_benchmark = testing.benchmark_checks("Course", scenes=3)
test_benchmark_elsewhere = testing.benchmark_checks("Simulator")
test_algorithm = testing.rl_algorithm_checks("Climb", anchor=0.0)
test_dataset = testing.dataset_checks("Roads", scenes=3)
test_metric = testing.metric_checks("Reach")


def problems(results: list[testing.Result]) -> dict[str, str]:
    return {result.check: result.problem for result in results if result.problem}


def run(test: Any, check: str) -> None:
    """One case of a test function that the kit wrote."""
    cases = {case.id: case.values for case in test.pytestmark[0].args[1]}
    test(*cases[f"{check}-cpu"])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_contract_has_its_message(name: str) -> None:
    target, check, because = BROKEN[name]
    provide("irlvla-broken", {target.kind: {name: target}})
    with pytest.raises((pytest.fail.Exception, ContractError)) as caught:
        run(getattr(testing, f"{target.kind}_checks")(name), check)
    assert str(caught.value).startswith(f"{target.kind} {name!r} (irlvla-broken 1.2)")
    assert because in str(caught.value)


def test_failing_check_does_not_stop_the_others() -> None:
    provide("irlvla-broken", {"planner": {"spare": WheelHasSpare}})
    results = testing.check("planner", "spare", {"noise": 0.5})
    assert problems(results).keys() == {"gradients_arrive"}
    assert len(results) == len({result.check for result in results}) == len(testing.check("planner", "Wheel"))
    assert {(result.kind, result.name) for result in results} == {("planner", "spare")}


def test_consequences_are_not_reported() -> None:
    """A shape that is wrong makes other checks raise too, with messages that would lead astray."""
    provide("irlvla-broken", {"metric": {"average": ReachOnAverage}})
    results = testing.check("metric", "average")
    assert problems(results).keys() == {"values_fit"}
    assert {result.check for result in results if result.skipped == "values_fit fails"} >= {"repeats", "copies", "takes_one_scene"}


def test_what_cannot_be_built_is_checked_no_further() -> None:
    provide("irlvla-broken", {"planner": {"stuck": WheelWillNotTurn}})
    results = testing.check("planner", "stuck")
    assert problems(results).keys() == {"builds"}
    assert {result.skipped for result in results if not result.check.startswith(("imports", "config", "builds"))} == {"it cannot be built"}
    assert "RuntimeError: no weights here (test_testing.py:" in problems(results)["builds"]
    with pytest.raises(pytest.skip.Exception, match="it cannot be built"):
        run(testing.planner_checks("stuck"), "plans_fit")


def test_wrong_settings_are_the_authors_mistake() -> None:
    found = problems(testing.check("planner", "Wheel", {"noisy": 1}))
    assert found["builds"].startswith("planner 'Wheel' (irlvla-odd 1.2)")
    assert "Did you mean 'noise'?" in found["builds"]


def test_errors_of_a_component_say_where() -> None:
    provide("irlvla-broken", {"planner": {"squeezes": WheelSqueezes}})
    assert "(test_testing.py:" in problems(testing.check("planner", "squeezes"))["takes_one_scene"]


def test_unknown_names() -> None:
    with pytest.raises(PluginError, match="Did you mean 'Wheel'"):
        testing.check("planner", "Weel")
    with pytest.raises(PluginError, match="no kind 'planer'"):
        testing.check("planer", "Wheel")
    with pytest.raises(PluginError, match=r"no plugin 'irlvla-od'. Did you mean 'irlvla-odd'\? Installed: .*irlvla-odd"):
        testing.check_plugin("irlvla-od")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device() -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        testing.check("metric", "Reach", device="cuda")


class WheelNeedsSize(Wheel):
    class Config(Wheel.Config):
        size: int


def test_a_plugin_is_checked_whole() -> None:
    provide(
        "irlvla-mixed",
        {
            "metric": {"mixed_bad": ReachForever, "mixed_good": Reach, "mixed_gone": "not_there_at_all:Metric", "Reach": Reach},
            "planner": {"mixed_sized": WheelNeedsSize},
        },
    )
    by_name = {name: testing.check_plugin(name) for name in ("irlvla-mixed", "mixed", "irlvla_mixed")}
    assert by_name["mixed"] == by_name["irlvla-mixed"] == by_name["irlvla_mixed"]
    results = by_name["mixed"]
    assert results[0] == testing.Result("plugin", "irlvla-mixed", "loads")
    found = {(result.name, result.check): result.problem for result in results if result.problem}
    assert found.keys() == {("mixed_bad", "values_fit"), ("mixed_gone", "imports"), ("Reach", "imports")}
    assert "No module named 'not_there_at_all'" in found["mixed_gone", "imports"]
    assert "is provided by both irlvla-mixed 1.2 and irlvla-odd 1.2" in found["Reach", "imports"]
    (sized,) = [result for result in results if result.name == "mixed_sized"]
    assert sized.skipped == "needs settings: give them in your tests: planner_checks('mixed_sized', size=...)"
    assert any(result.name == "mixed_good" for result in results)


def test_a_plugin_that_is_set_aside() -> None:
    aside = installed().add(Plugin("irlvla-aside", "3", "irlvla_aside"), lambda: __import__("not_there_at_all"))
    (result,) = testing.check_plugin("aside")
    assert (result.kind, result.name, result.check) == ("plugin", "irlvla-aside", "loads")
    assert result.problem == f"irlvla-aside 3: {aside.problem}"


def test_a_file_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    lines = "import irlvla\n@irlvla.hookimpl\ndef irlvla_metrics():\n    return {'mine': 'test_testing:Reach'}\n"
    good, bad = tmp_path / "my_good_plugin.py", tmp_path / "my_bad_plugin.py"
    good.write_text(lines)
    bad.write_text(lines.replace("metrics", "metricks"))
    assert not problems(testing.check_plugin(str(good)))
    (result,) = testing.check_plugin(str(bad))
    assert result.name == "my_bad_plugin.py"
    assert "there is no hook irlvla_metricks" in result.problem
    with pytest.raises(PluginError, match="no plugin"):
        testing.check_plugin(str(tmp_path / "my_lost_plugin.py"))


def test_checks_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    testing.check("planner", "Wheel")
    assert torch.equal(torch.get_rng_state(), before)


def test_checks_need_no_pytest() -> None:
    script = (
        "import sys; sys.modules['pytest'] = None\n"
        "from irlvla import testing\n"
        "results = testing.check('metric', 'displacement')\n"
        "assert len(results) > 10 and not any(result.problem for result in results), results\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- example data ------------------------------------------------------------------------------------------------------


def test_example_scenes_are_valid_and_varied() -> None:
    scene = testing.example_scene(6)
    human = irlvla.epdms(scene, irlvla.Trajectory(scene.human, scene.human_dt), pdms=True)
    assert bool((human.score() > 0.9).all())
    assert human.score().unique().numel() > 1
    assert scene.agent_offsets.diff().tolist() == [1, 2, 3, 4, 1, 2]
    scores = irlvla.epdms(scene, testing.example_plan(6, 8), previous=testing.example_plan(6, 1).best())
    assert not bool(scores.values.isnan().any())
    assert scores.score().min() < 0.5 < scores.score().max()


def test_example_data_belong_together() -> None:
    scene, obs = testing.example_scene(3, seed=7), testing.example_observation(3, seed=7)
    features, plan = testing.example_features(3, 16, seed=7), testing.example_plan(3, 2, seed=7)
    assert scene.token == obs.token == features.observation.token
    assert obs.scene is not None
    assert torch.equal(obs.scene.points, scene.points)
    assert obs.images is not None
    assert obs.images.shape == (3, 2, 3, 64, 96)
    assert features.bev is not None
    assert features.bev.shape[:2] == (3, 16)
    assert plan.poses.shape == (3, 2, 8, 3)
    assert testing.example_observation(1, cameras=0).images is None
    assert len(irlvla.Observation.cat([obs, obs])) == 6


def test_example_history_ends_where_the_scene_begins() -> None:
    scene, obs = testing.example_scene(4), testing.example_observation(4)
    assert torch.allclose(obs.ego[:, -1, :3], torch.zeros(4, 3), atol=1e-4)
    assert torch.allclose(obs.ego[:, -1, 3].double(), scene.ego[:, 3], atol=1e-4)
    step = scene.in_ego_frame(scene.previous_ego[:, None, :3])[:, 0, 0]
    assert torch.allclose(step, -0.5 * scene.ego[:, 3])


def test_example_data_are_the_same_every_time() -> None:
    for make in (testing.example_scene, testing.example_observation, testing.example_features, testing.example_plan):
        for (name, a), (_, b) in zip(make(2, seed=3).tensors(), make(2, seed=3).tensors(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    assert not torch.equal(testing.example_scene(2, seed=3).points, testing.example_scene(2, seed=4).points)


def test_camera_looks_ahead() -> None:
    obs = testing.example_observation(1, cameras=4)
    assert obs.camera_to_ego is not None
    ahead, left = torch.tensor([0.0, 0.0, 1.0]), obs.camera_to_ego[0, 1, :3, :3] @ torch.tensor([0.0, 0.0, 1.0])
    assert torch.allclose(obs.camera_to_ego[0, 0, :3, :3] @ ahead, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(left, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)
    assert torch.allclose(torch.linalg.det(obs.camera_to_ego[0, :, :3, :3]), torch.ones(4))
