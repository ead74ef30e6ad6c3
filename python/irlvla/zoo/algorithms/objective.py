"""What the algorithms share: the clipped objective over the steps of a chain, what anchors the policy, and how it learns to choose.

A plan is the end of a chain of D sampling steps, and a chain is a decision process: a state is the scene and the plan so far, an
action is a step, and the reward comes after the last (DPPO, Ren et al. 2024). An episode is one plan, so generalised advantage
estimation has nothing to look ahead to: the advantage of a plan is its reward less a baseline, for each of its steps.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from irlvla import components
from irlvla.components import Planner, Policy
from irlvla.errors import InputError
from irlvla.types import Features, Plan, Rollout
from irlvla.zoo.algorithms.advantages import require_metrics

FAR = 10.0  #: largest logarithm of a ratio that is exponentiated
SCORE = "score"  #: the imitation loss that tells the anchor nearest to the human's drive
Choice = Literal["reward", "policy", "cross_entropy", "ranking", "none"]


class Chains(NamedTuple):
    """What a planner makes now of chains that were drawn."""

    log_prob: Float[Tensor, "B K D"]
    score: Float[Tensor, "B K"] | None  # None where `log_prob` tells how a plan is chosen, too
    start: Float[Tensor, "B K T 2"] | None  # where chains begin [m], if that is not drawn


class PolicyGradient(components.Algorithm):
    """Makes steps more likely that led to better plans than was to be expected, and no more so than `clip` allows (PPO).

    Two anchors hold the policy where it came from. `imitation`, on by default, is the weight of the planner's own losses on the
    human's drive: behaviour cloning, as DiffusionDriveV2 (the L1 distance), ReCogDrive and PlannerRFT have it. `kl` is that of the
    divergence from the planner as it was at the first update, estimated at the drawn steps (k3 of Schulman; GRPO).

    A planner that draws a chain from each of its anchors drives the one that it scores best. Of that choice `log_prob` tells
    nothing; `score` says how it is learnt.
    """

    class Config(components.Config):
        epochs: int = Field(4, ge=1, description="passes over a rollout")
        minibatch: int | None = Field(None, ge=1, description="scenes of a step of the optimizer; null = all of a rollout")
        clip: float = Field(0.2, gt=0.0, description="how far from 1 the ratio of a step's probabilities may go (PPO; of joint densities)")
        denoising_discount: float = Field(
            0.8, gt=0.0, le=1.0, description="factor on the advantage for each step that follows; DPPO 0.99, ReCogDrive 0.6"
        )
        target_kl: float | None = Field(None, gt=0.0, description="end an update after an epoch in which approx_kl is larger; 1 in DPPO")
        max_norm: float = Field(1.0, gt=0.0, description="greatest norm of the gradient")
        imitation: float = Field(0.1, ge=0.0, description="of the imitation losses; DiffusionDriveV2, ReCogDrive 0.1, PlannerRFT 0.4")
        kl: float = Field(0.0, ge=0.0, description="weight of the divergence from the policy at the first update; AutoVLA 0.04")
        metrics: dict[str, float] = Field(
            {}, description="one advantage for each of these sub-metrics, and its weight (HAD); {} = one for the reward"
        )
        score: Choice = Field(
            "reward",
            description="how scores learn to choose: reward = each tells the reward of its plan (binary cross-entropy, as "
            "DiffusionDriveV2's selector); policy = their softmax gets the greatest expected reward; cross_entropy = it is that of the "
            "rewards; ranking = better plans above worse ones; none = as imitation had it",
        )
        score_weight: float = Field(10.0, ge=0.0, description="of that loss; as chain planners weigh it in imitation")
        score_temperature: float = Field(0.1, gt=0.0, description="of the rewards in cross_entropy")
        focus: float = Field(
            1.0,
            ge=0.0,
            description="plans that are likely to be driven count more: by the softmax of so many times their scores; 0 = no",
        )

    reference: Tensor

    def __init__(self, config: Any, *, width: int) -> None:
        """Raises `ConfigError` for weights of what is no sub-metric."""
        super().__init__(config)
        require_metrics(config.metrics)
        # The weights of the planner at the first update, in one row: an algorithm is made before it meets a planner.
        self.register_buffer("reference", torch.zeros(0), persistent=config.kl > 0.0)

    # -- what the algorithms differ in ---------------------------------------------------------------------------------
    @abstractmethod
    def goals(self, planner: Planner, features: Features, rollout: Rollout) -> dict[str, Tensor]:
        """What an update works towards, fixed from its beginning: at least `advantage` "B K"; all lead with B."""

    def losses(self, features: Features, chains: Chains, goals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further losses by name, weighted; their part in the gradient is that of the others."""
        return {}

    def told(self, goals: Mapping[str, Tensor]) -> dict[str, float]:
        """Further values to log of an update."""
        return {}

    # -- the contract --------------------------------------------------------------------------------------------------
    def update(self, policy: Policy, optimizer: Optimizer, rollout: Rollout) -> dict[str, float]:
        """Raises `InputError` for a planner that has no log_prob."""
        planner, frozen = require_log_prob(policy.planner), _is_frozen(policy)
        with torch.no_grad():
            features = policy(rollout.observation)
            goals = self.goals(planner, features, rollout) | {"log_prob": rollout.log_prob} | self._remembered(planner, features, rollout)
            goals["advantage"] = goals["advantage"] * self._emphasis(planner, rollout.plan)
        total, count = Counter[str](), 0
        for _ in range(self.config.epochs):
            kl, parts = 0.0, 0
            for rows in self._minibatches(len(rollout.observation), rollout.reward.device):
                part, goal = (rollout, goals) if rows is None else (rollout[rows], {name: value[rows] for name, value in goals.items()})
                seen = policy(part.observation) if not frozen else features if rows is None else features[rows]
                values = self._step(planner, optimizer, seen, part, goal)
                total.update(values)
                kl, parts, count = kl + values["losses/approx_kl"], parts + 1, count + 1
            if self.config.target_kl is not None and kl / parts > self.config.target_kl:
                break
        return {name: value / count for name, value in total.items()} | self.told(goals)

    def _minibatches(self, scenes: int, device: torch.device) -> Iterator[Tensor | None]:
        """The rows of each minibatch, in random order; None = all."""
        size = self.config.minibatch or scenes
        yield from torch.randperm(scenes).to(device).split(size) if size < scenes else [None]

    def _step(
        self, planner: Planner, optimizer: Optimizer, features: Features, rollout: Rollout, goals: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """One step of the optimizer. Returns what to log."""
        chains = chains_of(planner, features, rollout.plan)
        policy_loss, values = clipped(
            chains.log_prob, goals["log_prob"], goals["advantage"], self.config.clip, self.config.denoising_discount
        )
        losses = {"policy_loss": policy_loss} | self.losses(features, chains, goals)
        if self.config.imitation:
            without = {SCORE} if chains.score is not None and self.config.score != "none" else set()
            losses["imitation"] = self.config.imitation * imitation(planner, features, rollout, without)
        if "reference" in goals:
            losses["kl"] = self.config.kl * divergence(goals["reference"], chains.log_prob)
        if chains.score is not None and self.config.score != "none":
            choice = choice_loss(self.config.score, chains.score, rollout.reward, self.config.score_temperature)
            losses["score"] = self.config.score_weight * choice
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.config.max_norm)
        optimizer.step()
        values = values | {name: value.detach() for name, value in losses.items()}
        return {f"losses/{name}": value.item() for name, value in values.items()} | {"charts/gradient_norm": norm.item()}

    def _emphasis(self, planner: Planner, plan: Plan) -> Float[Tensor, "B K"] | float:
        """How much plans count, 1 on average; alike where `log_prob` tells how they are chosen."""
        if plan.score is None or not self.config.focus or not hasattr(planner, "retrace"):
            return 1.0
        return plan.score.shape[1] * (self.config.focus * plan.score).softmax(-1)

    # -- the policy that reinforcement began with ----------------------------------------------------------------------
    def _remembered(self, planner: Planner, features: Features, rollout: Rollout) -> dict[str, Tensor]:
        """What the planner of the first update makes of the chains, if that is asked for."""
        if not self.config.kl:
            return {}
        if not len(self.reference):
            self.reference = parameters_to_vector(planner.parameters()).detach().clone()
        before = copy.deepcopy(planner).requires_grad_(False)
        vector_to_parameters(self.reference, before.parameters())
        return {"reference": chains_of(before, features, rollout.plan).log_prob}

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if (saved := state.get(f"{prefix}reference")) is not None:
            self.reference = self.reference.new_zeros(saved.shape)
        super()._load_from_state_dict(state, prefix, *rest)


def require_log_prob(planner: Planner) -> Planner:
    """Raise `InputError` for a planner that cannot be reinforced."""
    if planner.log_prob is None:
        raise InputError(
            f"{planner} has no log_prob, so it imitates but cannot be reinforced. Take diffusion, flow, gaussian or vocabulary"
        )
    return planner


def chains_of(planner: Planner, features: Features, plan: Plan) -> Chains:
    """A planner that draws chains from all of its anchors tells by `retrace` more than their log-probabilities."""
    retrace = getattr(planner, "retrace", None)
    if retrace is None:
        assert planner.log_prob is not None
        return Chains(planner.log_prob(features, plan), None, None)
    found = retrace(features, plan)
    return Chains(found.log_prob, found.score, found.start)


# -- losses: means over scenes of a value for each ---------------------------------------------------------------------


def clipped(
    new: Float[Tensor, "B K D"], old: Float[Tensor, "B K D"], advantage: Float[Tensor, "B K"], clip: float, discount: float
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """PPO's objective, of each step: an earlier one counts `discount` times as much as that after it (DPPO). And what to log of it."""
    steps = new.shape[-1]
    logratio = (new - old).clamp(-FAR, FAR)
    ratio = logratio.exp()
    credit = advantage[..., None] * discount ** torch.arange(steps - 1, -1, -1, device=new.device)
    loss = -torch.minimum(credit * ratio, credit * ratio.clamp(1.0 - clip, 1.0 + clip))
    with torch.no_grad():
        values = {
            "entropy": -new.mean(),  # estimated at the drawn steps
            "old_approx_kl": -logratio.mean(),
            "approx_kl": (ratio - 1.0 - logratio).mean(),
            "clipfrac": ((ratio - 1.0).abs() > clip).float().mean(),
        }
    return loss.mean(), values


def divergence(reference: Float[Tensor, "B K D"], new: Float[Tensor, "B K D"]) -> Float[Tensor, ""]:
    """KL divergence of the policy from another, at steps that it drew: an estimate that is unbiased and never negative (k3)."""
    logratio = (reference - new).clamp(-FAR, FAR)
    return (logratio.exp() - 1.0 - logratio).mean()


def imitation(planner: Planner, features: Features, rollout: Rollout, without: set[str]) -> Float[Tensor, ""]:
    """The planner's losses on the human's drives; scenes without one count as 0."""
    known: Bool[Tensor, " B"] = rollout.human.poses.isfinite().flatten(1).all(1)
    if not bool(known.any()):
        return rollout.reward.new_zeros(())
    every = bool(known.all())
    losses = planner.loss(features if every else features[known], rollout.human if every else rollout.human[known])
    return sum((value for name, value in losses.items() if name not in without), rollout.reward.new_zeros(())) * known.float().mean()


def choice_loss(kind: Choice, score: Float[Tensor, "B K"], reward: Float[Tensor, "B K"], temperature: float = 0.1) -> Float[Tensor, ""]:
    """How well scores choose among the plans of a scene."""
    reward = reward.detach().to(score)
    if kind == "reward":  # the best guess of an expectation: where the same sight has several outcomes, their mean
        return binary_cross_entropy_with_logits(score, reward.clamp(0.0, 1.0))
    if kind == "policy":
        return -(score.softmax(-1) * (reward - reward.mean(-1, keepdim=True))).sum(-1).mean()
    if kind == "cross_entropy":
        return -((reward / temperature).softmax(-1) * score.log_softmax(-1)).sum(-1).mean()
    margin = reward[:, :, None] - reward[:, None]
    wrong = softplus(-(score[:, :, None] - score[:, None])) * margin.clamp(min=0.0)
    return (wrong.sum((1, 2)) / margin.clamp(min=0.0).sum((1, 2)).clamp(min=1e-6)).mean()


def _is_frozen(policy: Policy) -> bool:
    """Whether the planner alone learns: then what is seen is the same in all epochs."""
    seeing: list[nn.Module] = [policy.backbone] if policy.reasoner is None else [policy.backbone, policy.reasoner]
    return not any(parameter.requires_grad for part in seeing for parameter in part.parameters())
