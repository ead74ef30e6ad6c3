"""An RL algorithm: REINFORCE."""

from typing import Any

import irlvla
import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer


class AcmeReinforce(irlvla.Algorithm):
    """REINFORCE: the baseline is the mean reward of a scene's plans, and an anchor holds the policy near the human's drive."""

    class Config(irlvla.Config):
        anchor: float = Field(0.1, ge=0, description="weight of the imitation loss")
        max_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)

    def update(self, policy: irlvla.Policy, optimizer: Optimizer, rollout: irlvla.Rollout) -> dict[str, float]:
        if policy.planner.log_prob is None:
            raise irlvla.InputError(f"{policy.planner} has no log_prob, so it cannot be reinforced; take another planner")
        features = policy(rollout.observation)
        advantage = rollout.reward - rollout.reward.mean(1, keepdim=True)
        loss = -(advantage * policy.planner.log_prob(features, rollout.plan).sum(-1)).mean()
        anchor = torch.zeros_like(loss)
        if bool((known := ~rollout.human.poses.isnan().flatten(1).any(1)).any()):
            anchor = sum(policy.planner.loss(features[known], rollout.human[known]).values(), anchor)
        optimizer.zero_grad()
        (loss + self.config.anchor * anchor).backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), self.config.max_norm)
        optimizer.step()
        return {"losses/policy": loss.item(), "losses/anchor": anchor.item(), "losses/gradient": norm.item()}
