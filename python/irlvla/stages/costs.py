"""What a training step costs, by module: parameters, floating-point operations, and memory for activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from irlvla.components import Dataset
from irlvla.errors import IrlvlaError
from irlvla.registry import build, installed
from irlvla.stages.batches import read
from irlvla.stages.imitation import ImitateConfig


class Cost(NamedTuple):
    """Of a module and all in it."""

    name: str  # "" = the whole
    parameters: int
    flops: int  # forward
    activations: int  # bytes kept from the forward for the backward pass


def cost(config: ImitateConfig, depth: int = 3) -> tuple[list[Cost], int]:
    """Of one batch of imitation on the CPU, with random weights: `measure`. The first scenes of the training data are read.

    Raises:
        ConfigError, FileError, PluginError: as `imitate`.
    """
    dataset: Dataset = build("dataset", config.data.train)
    batch = read(dataset, range(min(config.batch, len(dataset))))
    if isinstance(batch, IrlvlaError):
        raise batch
    torch.manual_seed(config.seed)
    policy = installed().build_policy(config.backbone, config.planner, config.reasoner).train()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            return torch.stack(list(policy.loss(batch.observation, batch.scene, batch.human).values())).sum()

    return measure(policy, loss, depth)


def measure(model: nn.Module, loss: Callable[[], Tensor], depth: int = 3) -> tuple[list[Cost], int]:
    """Go forward and backward once. Returns the costs of the modules down to a depth, and the operations of the backward pass.

    Floating-point operations are those of matrix products, convolutions and attention, for which `torch.utils.flop_counter` has
    formulas; all else (voxel pooling, normalisation, activations) counts nothing. Memory that several modules keep counts where
    it is kept first; weights do not count.

    Args:
        loss: computes one with the model.
    """
    step, keeper = _Step(model, loss), _Keeper(model)
    with FlopCounterMode(display=False) as forward, keeper:
        value = step()
    with FlopCounterMode(display=False) as backward:
        value.backward()
    flops = {_inner(name): sum(of.values()) for name, of in forward.get_flop_counts().items()}
    costs = []
    for name, module in model.named_modules():
        size = sum(parameter.numel() for parameter in module.parameters())
        of = Cost(name, size, _within(name, module, flops), _within(name, module, keeper.kept))
        if any(of[1:]) and name.count(".") < depth:
            costs.append(of)
    return costs, backward.get_total_flops()


def _within(name: str, module: nn.Module, counts: Mapping[str, int]) -> int:
    """What was counted in a module; of one that is never called itself (a list, a planner), in those that it holds."""
    if name in counts:
        return counts[name]
    return sum(_within(f"{name}.{child}".lstrip("."), part, counts) for child, part in module.named_children())


class _Step(nn.Module):
    """Is called, and so names the modules within for those who watch, whatever of the model is called in turn."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        return self.loss()


class _Keeper(saved_tensors_hooks):
    """Counts the bytes that each module keeps for the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        self.tracker, self.kept = ModuleTracker(), Counter[str]()
        self.seen: dict[StorageWeakRef, Tensor | None] = {StorageWeakRef(p.untyped_storage()): None for p in model.parameters()}

    def __enter__(self) -> None:
        self.tracker.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.tracker.__exit__(*error)
        self.seen.clear()

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if StorageWeakRef(storage) not in self.seen:
            self.seen[StorageWeakRef(storage)] = tensor  # held, so that no other takes its place
            for name in {_inner(parent) for parent in self.tracker.parents}:
                self.kept[name] += storage.nbytes()
        return tensor


def _inner(name: str) -> str:
    """The name of a module as `named_modules` of the model has it; "" for all that is around it."""
    return name.removeprefix("_Step.model").removeprefix(".") if name.startswith("_Step.model") else ""
