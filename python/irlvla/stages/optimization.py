"""What stages that train by gradient share: the optimizer, its schedule, and the moving average of weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from irlvla.components import Config
from irlvla.errors import ConfigError, ContractError, IrlvlaError, did_you_mean
from irlvla.run import Run, TrainingConfig


class OptimizerConfig(Config):
    """AdamW, whose learning rate rises linearly, then falls as half a cosine."""

    lr: float = Field(3e-4, gt=0.0, description="highest learning rate")
    lr_scale: dict[str, float] = Field(
        {}, description="factors on it by the names of parts, with wildcards: {backbone.encoder: 0.1}; of several that fit, the last counts"
    )
    weight_decay: float = Field(0.01, ge=0.0, description="of weights; not of biases, scales and other vectors")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of the running means of the gradient and of its square")
    warmup: int = Field(100, ge=0, description="steps until the learning rate is highest")
    final: float = Field(0.0, ge=0.0, le=1.0, description="share of the learning rate that is left at the end")
    clip: float = Field(1.0, gt=0.0, description="greatest norm of the gradients; larger ones are scaled down to it")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """An optimizer of the parameters that require gradients.

    Raises:
        ConfigError: a name in `lr_scale` fits no parameter, or there is nothing to train.
    """
    groups = list(_groups(model, config))
    if not groups:
        raise ConfigError("there is nothing to train: no part of the model has parameters that require gradients")
    return AdamW(groups, lr=config.lr, betas=config.betas)


def make_schedule(optimizer: Optimizer, config: OptimizerConfig, steps: int) -> LambdaLR:
    """The learning rate over a number of steps."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / (config.warmup + 1)
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)


def count_steps(steps: int | None, epochs: float | None, scenes: int, per_step: int) -> int:
    """Of a training over so many scenes, of which `per_step` are seen in a step. Raises `ConfigError` unless either is given."""
    if steps is not None and epochs is None:
        return steps
    if epochs is not None and steps is None:
        return math.ceil(epochs * scenes / per_step)
    raise ConfigError("give steps or epochs" + ("" if steps is None else ", not both; steps=null drops one"))


def _groups(model: nn.Module, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    """Parameters of the same learning rate and weight decay."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = dict.fromkeys(trained, 1.0)
    for pattern, scale in config.lr_scale.items():
        fitting = [name for name in trained if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not fitting:
            parts = dict.fromkeys(part for name in trained for part in _parts(name))
            near = did_you_mean(pattern, parts)
            raise ConfigError(f"optimizer.lr_scale: {pattern!r} fits no parameter that is trained. {near}Parts: {', '.join(parts)[:500]}")
        scales.update(dict.fromkeys(fitting, scale))
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        members.setdefault((scales[name], decay), []).append(parameter)
    for (scale, decay), parameters in members.items():
        yield {"params": parameters, "lr": config.lr * scale, "weight_decay": decay}


def _parts(name: str) -> list[str]:
    """ "backbone.mlp.0.weight" as backbone, backbone.mlp, backbone.mlp.0."""
    steps = name.split(".")[:-1]
    return [".".join(steps[: i + 1]) for i in range(len(steps))]


# -- steps -------------------------------------------------------------------------------------------------------------


class DivergedError(IrlvlaError, ArithmeticError):
    """A training has lost its way: a loss or the gradient is not finite."""


def lost_at(step: int, error: DivergedError, saved: Path | None) -> DivergedError:
    """The same error, with the step, where the weights before it are, and what may help."""
    kept = f"The weights before it are saved; begin again from them: initial={saved / 'model'}. " if saved else ""
    help = "A lower optimizer.lr, a longer optimizer.warmup or a smaller optimizer.clip may help"
    return DivergedError(f"step {step}: {error}. {kept}{help}")


class Learner(nn.Module):
    """What is trained: a model, and beside it the moving average of its weights. Its kinds say in `forward` what is lost on a batch."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self.average = model, averaged(model, decay)

    @property
    def result(self) -> Any:
        """What is validated and saved."""
        return self.average.module

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.average.eval()
        return self


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model for the exponential moving average of its weights; buffers are those of the model.

    The average reaches back `1 / (1 - decay)` steps, at the beginning a tenth of the steps made (as in TensorFlow).
    """

    @torch.no_grad()
    def update(averages: Any, current: Any, count: Tensor | int) -> None:
        now = min(decay, (1.0 + int(count)) / (10.0 + int(count)))
        torch._foreach_lerp_(averages, current, 1.0 - now)

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False).eval()


def train(
    run: Run,
    learner: Learner,
    prepared: tuple[nn.Module, Optimizer, LambdaLR],
    batches: Iterator[Any],
    steps: range,
    clip: float,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Take steps. After each its number, and what to log of it.

    Args:
        prepared: what `Run.prepare` made of the learner, its optimizer and its schedule.
        clip: greatest norm of the gradient.

    Raises:
        ContractError, DivergedError: as `add_gradients`; the weights before the step are saved.
    """
    model, optimizer, schedule = prepared
    model.train()
    for step in steps:
        try:
            values = add_gradients(run, model, batches, clip)
        except DivergedError as error:
            saved = run.save(step - 1, learner.result) if step > steps.start else None
            raise lost_at(step, error, saved) from None
        values["charts/learning_rate"] = float(max(schedule.get_last_lr()))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        learner.average.update_parameters(learner.model)
        yield step, values


def add_gradients(run: Run, model: nn.Module, batches: Iterator[Any], clip: float) -> dict[str, float]:
    """Add up the gradients of the next batches, as many as the run accumulates, and clip them. The optimizer does not step yet.

    Args:
        model: what `Run.prepare` made of a module that returns losses by name for a batch; their sum is minimised.

    Returns:
        What to log: the losses and their sum, means over batches and processes, and the norm of the gradient before it was clipped.

    Raises:
        ContractError: a loss is not one number, or none depends on a parameter.
        DivergedError: a loss is not finite, or the gradient is not (with fp16 that is how its scale is found, and the step is skipped).
    """
    total = torch.zeros((), device=run.device)
    names: list[str] = []
    while True:
        with run.accumulating(model):
            losses = model(next(batches))
            names = list(losses)
            vector = _stacked(losses)
            run.backward(vector.sum())
            total = total + vector.detach()
            if run.steps_now:
                break
    norm = run.clip(model.parameters(), clip)
    assert norm is not None
    means = (run.gather(total[None]).mean(0) / cast(TrainingConfig, run.config).accumulate).tolist()
    values = {f"losses/{name}": value for name, value in zip(names, means, strict=True)}
    values |= {"losses/total": math.fsum(means), "charts/gradient_norm": norm.item()}
    allowed = {"charts/gradient_norm"} if run.config.precision == "fp16" else set()
    if lost := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value) and name not in allowed]:
        raise DivergedError(", ".join(lost))
    return values


def _stacked(losses: Mapping[str, Tensor]) -> Float[Tensor, " N"]:
    """The losses as one tensor."""
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.ndim:
            given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ContractError(f"the loss {name!r} must be a tensor of one number, not {given}")
    vector = torch.stack([value.float() for value in losses.values()]) if losses else torch.zeros(0)
    if not vector.requires_grad:
        raise ContractError(
            f"nothing can be learned: no loss depends on a parameter that is trained. Losses: {', '.join(losses) or 'none'}"
        )
    return vector


class Pace:
    """How many scenes a training goes through in a second, as seen since this was last asked."""

    def __init__(self, scenes_per_step: int) -> None:
        self.scenes_per_step, self.steps, self.since = scenes_per_step, 0, time.perf_counter()

    def rate(self) -> float:
        """Scenes per second since it was last asked, pauses aside."""
        steps, since = self.steps, self.since
        self.steps, self.since = 0, time.perf_counter()
        return steps * self.scenes_per_step / (self.since - since)

    def step(self) -> None:
        """Count a step."""
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began
