"""Calibration on held-out scenes: probabilities that are as often right as they say; and which plans are like those of the training."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from irlvla.errors import InputError
from irlvla.types import HORIZON, Plan
from irlvla.zoo.planners.curves import Curves
from irlvla.zoo.rewards.driving import planned


class Temperature(nn.Module):
    """Classes, made less or more certain, and each more or less likely: softmax(log p / temperature + offset).

    Temperature scaling (Guo et al., ICML 2017) with offsets (Alexandari et al., ICML 2020): those make up for failures that are more
    frequent among the candidates of the training than elsewhere. Of two classes the order of drives stays the same.
    """

    sharpness: Tensor
    offset: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("sharpness", torch.ones(()))  # 1 / temperature
        self.register_buffer("offset", torch.zeros(classes))

    def forward(self, logits: Float[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
        """Calibrated log-probabilities."""
        return functional.log_softmax(logits * self.sharpness + self.offset, -1)

    def fit(self, logits: Float[Tensor, "N C"], kind: Int[Tensor, " N"]) -> tuple[float, float]:
        """Take both from held-out drives, by their likelihood; return its negative logarithm before and after, per drive.

        A weak prior (standard normal) keeps them near where they are while there is little to learn from.
        """
        logits, kind = logits.detach().double().cpu(), kind.cpu()
        sharpness, offset = torch.zeros((), dtype=torch.double), torch.zeros(logits.shape[-1], dtype=torch.double)
        before = functional.cross_entropy(logits, kind).item()
        with torch.enable_grad():
            unknown = [sharpness.requires_grad_(), offset.requires_grad_()]
            optimizer = torch.optim.LBFGS(unknown, max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()
                prior = (sharpness.square() + offset.square().sum()) / (2.0 * len(kind))
                objective = functional.cross_entropy(logits * sharpness.exp() + offset, kind) + prior
                objective.backward()
                return objective

            optimizer.step(closure)
        self.sharpness.copy_(sharpness.detach().exp())
        self.offset.copy_(offset.detach() - offset.detach().mean())
        with torch.no_grad():
            return before, functional.cross_entropy(logits * sharpness.exp() + offset, kind).item()


class Support(nn.Module):
    """Which plans are like those that a reward was learned from: by their distance (Mahalanobis) in the coordinates of `Curves`, together
    with the present speed, as a share of the distance that all but few of those have. Before `fit`, all are."""

    mean: Tensor
    whitening: Tensor
    threshold: Tensor

    def __init__(self, poses: int) -> None:
        super().__init__()
        self.curves = Curves(poses, HORIZON / poses)
        numbers = 2 * poses + 1
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("whitening", torch.eye(numbers))
        self.register_buffer("threshold", torch.tensor(torch.inf))

    def fit(self, plan: Plan, speed: Float[Tensor, " B"], quantile: float) -> None:
        """Take what is usual from plans of the training, "B K T 3"; a share of 1 - quantile of them is as far out as not to be.

        Raises `InputError` for fewer plans than there are numbers to learn.
        """
        numbers = self._numbers(plan, speed).flatten(0, 1).double()
        if len(numbers) <= numbers.shape[1]:
            raise InputError(f"the support of a reward is learned from more than {numbers.shape[1]} plans, got {len(numbers)}")
        spread = torch.cov(numbers.T) + 1e-4 * torch.eye(numbers.shape[1], dtype=torch.double, device=numbers.device)
        self.mean.copy_(numbers.mean(0))
        self.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(spread)))
        self.threshold.fill_(1.0)
        self.threshold.copy_(self(plan, speed).flatten().double().quantile(quantile))

    def forward(self, plan: Plan, speed: Float[Tensor, " B"]) -> Float[Tensor, "B K"]:
        """How far out plans are: 1 at the edge, 0 in the middle, and before `fit`."""
        with torch.autocast(plan.poses.device.type, enabled=False):
            return torch.linalg.vector_norm((self._numbers(plan, speed) - self.mean) @ self.whitening.T, dim=-1) / self.threshold

    def _numbers(self, plan: Plan, speed: Float[Tensor, " B"]) -> Float[Tensor, "B K N"]:
        times = torch.arange(1, self.curves.count + 1, device=plan.poses.device) * self.curves.interval
        coordinates = self.curves.coordinates(planned(plan, times)[..., :2]).flatten(-2)
        return torch.cat([coordinates, (speed / 10.0).to(coordinates)[:, None, None].expand(*coordinates.shape[:2], 1)], -1)
