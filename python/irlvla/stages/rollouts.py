"""Rollouts: which scenes are driven, the plans that a policy draws there, what they are believed to be worth, and what they are worth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from irlvla.components import Policy, RewardModel, require_plan
from irlvla.errors import ContractError
from irlvla.registry import build
from irlvla.stages.batches import SceneBatch, numbered
from irlvla.types import METRICS, Epdms, Observation, Plan, Rollout, Scene


class Difficulty(nn.Module):
    """How well the policy drove in each scene of a dataset when it was last there; where it drove badly it is sent more often."""

    score: Tensor

    def __init__(self, scenes: int, share: float) -> None:
        """`share`: of the draws, that go by difficulty; the others are even."""
        super().__init__()
        self.share = share
        self.register_buffer("score", torch.full((scenes,), torch.nan))  # of the favourite plan; NaN = never there

    def draw(self, count: int, seed: int, number: int) -> list[int]:
        """Different scenes, while there are as many. They depend on nothing but the scores, a seed and a number."""
        score = self.score.double().cpu()
        bad = 1.0 - torch.where(score.isnan(), score.nanmean(), score).nan_to_num(0.0).clamp(max=1.0) + 1e-3
        weights = (1.0 - self.share) / len(score) + self.share * bad / bad.sum()
        return torch.multinomial(weights, count, count > len(score), generator=numbered(seed, number)).tolist()

    def see(self, rows: Tensor, plan: Plan, reward: Float[Tensor, "B K"]) -> None:
        """Remember what the favourite plans were worth."""
        favourite = plan.score.argmax(1) if plan.score is not None else torch.zeros_like(rows).to(reward.device)
        self.score[rows.to(self.score.device)] = reward.gather(1, favourite[:, None])[:, 0].to(self.score)


class Judge:
    """The reward that a policy learns by, and the exact one that watches.

    Attributes:
        exact: EPDMS.
        truthful: whether the reward is that itself, so that it is computed once.
    """

    def __init__(self, reward: RewardModel, share: float) -> None:
        """`share`: of the scenes that the exact reward looks at, where it watches."""
        self.reward, self.share = reward, share
        self.exact: RewardModel = build("reward_model", "exact")
        self.truthful = type(reward) is type(self.exact) and reward.config == self.exact.config

    def believe(self, obs: Observation, scene: Scene, plan: Plan) -> Epdms:
        """What plans are believed to be worth. Raises `ContractError` for a score that is NaN."""
        with torch.no_grad():
            found = self.reward(obs, scene, plan)
        if bool(found.score().isnan().any()):
            lost = [
                name for name, values in zip(METRICS, found.values.unbind(-1), strict=True) if name != "ec" and bool(values.isnan().any())
            ]
            raise ContractError(f"{self.reward} does not measure {', '.join(lost)}, which a score needs; only EC may be NaN")
        return found

    def truth(self, obs: Observation, scene: Scene, plan: Plan, believed: Epdms) -> Epdms:
        """What plans are worth."""
        return believed if self.truthful else self.exact(obs, scene, plan)

    def audit(self, obs: Observation, scene: Scene, plan: Plan, believed: Epdms) -> Epdms:
        """The same, of as many of the first scenes as are watched."""
        watched = max(1, round(self.share * len(scene)))
        if watched < len(scene):
            obs, scene, plan, believed = obs[:watched], scene[:watched], plan[:watched], believed[:watched]
        return self.truth(obs, scene, plan, believed)


def rewards(believed: Epdms, exact: Epdms | None) -> dict[str, float]:
    """What to log of rewards, as one number and by metric: means over plans; the gap over those whose exact reward is known."""
    columns = {"": believed.score()} | {f"_{name}": values for name, values in zip(METRICS, believed.values.unbind(-1), strict=True)}
    known = {name: values for name, values in columns.items() if not bool(values.isnan().any())}
    found = {f"believed{name}": values.mean().item() for name, values in known.items()}
    if exact is not None:
        truths = {"": exact.score()} | {f"_{name}": values for name, values in zip(METRICS, exact.values.unbind(-1), strict=True)}
        for name, values in truths.items():
            if not bool(values.isnan().any()):
                found[f"exact{name}"] = values.mean().item()
                if name in known:
                    found[f"gap{name}"] = (known[name][: len(values)].double() - values.double()).mean().item()
    return found


class Drawn(NamedTuple):
    """Plans that a policy drew in some scenes."""

    batch: SceneBatch
    plan: Plan
    log_prob: Float[Tensor, "B K D"]


def draw(policy: Policy, batch: SceneBatch, k: int, generator: Generator) -> Drawn:
    """Let a policy explore. Raises `ContractError` if its planner returns other plans than it was asked for."""
    planner = policy.planner
    assert planner.log_prob is not None
    with torch.no_grad():
        features = policy(batch.observation)
        planner.explore = True
        try:
            plan = planner.sample(features, k, generator=generator)
        finally:
            planner.explore = False
        require_plan(plan, len(batch.rows), k, planner)
        return Drawn(batch, plan, planner.log_prob(features, plan))


def rollout_of(drawn: Drawn, believed: Epdms, reward: Float[Tensor, "B K"]) -> Rollout:
    """What an algorithm learns from: to raise `reward`."""
    poses = drawn.plan.poses
    return Rollout(drawn.batch.observation, drawn.batch.human, drawn.plan, drawn.log_prob, reward.to(poses), believed.values.to(poses))


class Clock:
    """How the time of an iteration is spent, by part."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """A block that belongs to a part."""
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.spent[part] += time.perf_counter() - began  # type: ignore[assignment]

    def shares(self) -> dict[str, float]:
        """Of the parts, in the whole."""
        return {f"time_{part}": spent / self.spent.total() for part, spent in self.spent.items()}
