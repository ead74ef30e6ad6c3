"""A fixed vocabulary of drives, scored."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from irlvla.types import Features, Plan, Trajectory
from irlvla.zoo.planners.anchored import AnchoredPlanner


class VocabularyPlanner(AnchoredPlanner):
    """Chooses among its anchors: a softmax over a fixed vocabulary, which learns to be that of minus the squared distances to the
    human's drive (VADv2, Hydra-MDP).

    With `explore`, `sample` draws from that distribution; without, it takes the K most probable entries. `log_prob` is its
    logarithm; of a plan that is no entry, that of the nearest.
    """

    class Config(AnchoredPlanner.Config):
        anchors: int = Field(256, ge=1, description="entries of the vocabulary; 4096 or 8192 in the literature")
        temperature: float = Field(
            1.0, gt=0.0, description="of the target: squared metres, summed over poses, that make an entry e times as rare"
        )
        chunk: int = Field(
            512, ge=1, description="entries decoded at once; fewer need less memory, and training decodes more of them twice"
        )

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width, refines=False)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        """Cross-entropy: mean over layers and scenes; scenes without a drive count as 0. Raises `InputError` as `drives` does."""
        drives, known = self.drives(human)
        target = (-self._distances(drives).square() / self.config.temperature).softmax(-1)
        entropy = -(target * self.scores(features).log_softmax(-1)).sum(-1).mean(0)
        return {"imitation": (known * entropy).mean()}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        """K entries, the most probable first; where K is more than there are, some of them twice and more."""
        log_prob = self.scores(features)[-1].log_softmax(-1)
        if self.explore:
            drawn = torch.multinomial(log_prob.exp(), k, replacement=True, generator=generator)
            rows = drawn.gather(1, log_prob.gather(1, drawn).argsort(dim=1, descending=True, stable=True))
        else:
            best = log_prob.argsort(dim=1, descending=True, stable=True)
            rows = best[:, (torch.arange(k, device=best.device) % best.shape[1]).sort().values]
        return Plan(self.anchors[rows], self.config.interval, score=log_prob.gather(1, rows))

    def log_prob(self, features: Features, plan: Plan) -> Float[Tensor, "B K 1"]:
        """Raises `InputError` for a plan that has no pose at one of the times of the vocabulary."""
        return self.scores(features)[-1].log_softmax(-1).gather(1, self.anchor_of(plan))[..., None]

    def anchor_of(self, plan: Plan) -> Int[Tensor, "B K"]:
        """The entry nearest to each proposal."""
        positions, _ = self.drives(Trajectory(plan.poses.flatten(0, 1), plan.dt))
        return self._distances(positions).argmin(-1).unflatten(0, plan.poses.shape[:2])

    def scores(self, features: Features) -> Float[Tensor, "layers B V"]:
        """Logits of all entries, by each layer of the decoder."""
        memory, entries = self.decoder.memory(features), self.starts(len(features))

        def decode(part: Tensor) -> Tensor:
            return torch.stack(self.decoder(memory, part).scores)

        parts = entries.split(self.config.chunk, 1)
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([decode(part) for part in parts], -1)
        return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in parts], -1)

    def _distances(self, drives: Float[Tensor, "B T 2"]) -> Float[Tensor, "B V"]:
        """Square root of the summed squares: exact also where entries lie close together, which by matrix products it is not."""
        entries = self.anchors[..., :2].flatten(1)
        return torch.cdist(drives.flatten(1), entries, compute_mode="donot_use_mm_for_euclid_dist")
