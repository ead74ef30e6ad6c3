"""What drives where plans are measured: a saved policy, a planner by itself, or a file of plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from pydantic import Field

from irlvla.checkpoint import from_pretrained
from irlvla.components import Config, Policy, RewardModel, Spec, pluggable
from irlvla.errors import ConfigError, ContractError, InputError
from irlvla.registry import build, installed
from irlvla.stages.batches import SceneBatch, generator_of
from irlvla.types import Plan


class DriverConfig(Config):
    """Which driver."""

    policy: str | None = Field(None, description="a saved policy: its folder, or its name on the Hub (owner/name)")
    planner: Spec | None = pluggable("planner", None, description="instead of a policy: a planner by itself; one that learns is untrained")
    backbone: Spec | None = pluggable("backbone", None, description="what `planner` sees with; null = status")
    reasoner: Spec | None = pluggable("reasoner", None, description="what `planner` thinks with")
    plans: Path | None = Field(None, description="instead of a policy: a file of Plan.save, one row per scene, in the order of the dataset")
    candidates: int = Field(1, ge=1, description="plans per scene (K); the planner's favourite is driven")
    reward: Spec | None = pluggable(
        "reward_model", None, description="drive the candidate that this reward rates highest; null = the planner's favourite"
    )
    saved_reward: str | None = Field(None, description="a saved one instead: its folder, or its name on the Hub")


class Driver:
    """Plans in scenes. It draws its random numbers for each batch anew, from the seed and the place of the batch in the dataset.

    Attributes:
        source: the policy, or the plans of a file.
    """

    def __init__(self, config: DriverConfig, scenes: int, seed: int) -> None:
        """Raises `ConfigError` if not exactly one of policy, planner and plans is given, and `InputError` for plans of other scenes."""
        self.config, self.seed = config, seed
        self.source = _source(config, scenes, seed)
        self.reward = load_reward(config.reward, config.saved_reward)

    def to(self, device: torch.device) -> None:
        """Move what computes to a device, and make it ready."""
        for model in (self.source, self.reward):
            if isinstance(model, torch.nn.Module):
                model.to(device).eval()

    def __call__(self, batch: SceneBatch) -> Plan:
        """K plans for each scene of a batch, of which `best()` is driven."""
        if isinstance(self.source, Plan):
            plan = self.source[batch.rows.cpu()].to(batch.rows.device)
        else:
            plan = self.source.sample(batch.observation, self.config.candidates, generator=generator_of(batch, self.seed))
        if self.reward is None:
            return plan
        score = self.reward(batch.observation, batch.scene, plan).score()
        if bool(score.isnan().any()):
            raise ContractError(f"{self.reward} does not say which plan is best: the score of one is NaN")
        return dataclasses.replace(plan, score=score)


def load_reward(spec: Spec | None, saved: str | None) -> RewardModel | None:
    """The reward that `reward` or `saved_reward` names, or neither. Raises `ConfigError` for both, and for another saved model."""
    if spec is not None and saved is not None:
        raise ConfigError("reward and saved_reward: give one of them; reward=null drops one")
    if saved is None:
        return None if spec is None else build("reward_model", spec)
    reward = from_pretrained(saved)
    if not isinstance(reward, RewardModel):
        raise ConfigError(f"saved_reward={saved} holds no reward model but {'a policy' if isinstance(reward, Policy) else reward}")
    return reward


def _source(config: DriverConfig, scenes: int, seed: int) -> Policy | Plan:
    given = [name for name in ("policy", "planner", "plans") if getattr(config, name) is not None]
    if len(given) != 1:
        got = f"{' and '.join(given)}; FIELD=null drops one" if given else "none"
        raise ConfigError(f"give exactly one of policy, planner and plans, got {got}")
    if parts := [name for name in ("backbone", "reasoner") if getattr(config, name) is not None and config.planner is None]:
        raise ConfigError(f"{' and '.join(parts)}: it goes with planner, not with {given[0]}")
    if config.plans is not None:
        return _read_plans(config.plans, scenes, config.candidates)
    if config.policy is not None:
        policy = from_pretrained(config.policy)
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy={config.policy} holds {policy} alone; it must hold a whole policy")
        return policy
    torch.manual_seed(seed)  # an untrained planner is the same in every process
    return installed().build_policy(config.backbone or "status", config.planner, config.reasoner)


def _read_plans(path: Path, scenes: int, candidates: int) -> Plan:
    plan = Plan.load(path)
    if plan.poses.ndim != 4 or len(plan) != scenes:
        raise InputError(f"{path} holds poses of shape {tuple(plan.poses.shape)}; the {scenes} scenes need ({scenes}, K, T, 3)")
    if bad := (~plan.poses.isfinite()).flatten(2).any(-1).nonzero().tolist():
        raise InputError(f"{path}: plan {bad[0][1]} of scene {bad[0][0]} (both from 0) holds NaN or infinity")
    if plan.score is not None and (plan.score.shape != plan.poses.shape[:2] or bool(plan.score.isnan().any())):
        raise InputError(
            f"{path}: the scores must be of shape {tuple(plan.poses.shape[:2])}, without NaN; they are {tuple(plan.score.shape)}"
        )
    if candidates not in (1, plan.poses.shape[1]):
        raise ConfigError(f"candidates={candidates}: {path} holds {plan.poses.shape[1]} plans per scene, and all are taken")
    return plan
