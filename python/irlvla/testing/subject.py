"""The component under test, how a check is made of it, and what a check can require."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from irlvla.components import Config
from irlvla.errors import BuildError, ContractError, IrlvlaError
from irlvla.registry import Entry, Registry
from irlvla.testing.examples import Example, example

WIDTH = 64  #: of the tokens that components get
BATCH = 3  #: scenes
RUNTIME = {kind: {"width": WIDTH} for kind in ("reasoner", "planner", "rl_algorithm")}
EXACT, ROUNDING = 1e-5, 1e-3  #: relative tolerances: of the same computation, and of one in another order

Outputs: TypeAlias = dict[str, Tensor]  # of one scene, by name
Check: TypeAlias = Callable[["Subject"], None]


class Broken(Exception):
    """What a check found, and what it expected."""


class Skip(Exception):
    """Why a check does not apply."""


class Unusable(Exception):
    """Why hardly any check can be made, and the name of the check that reports it."""

    def __init__(self, why: str, reporter: str) -> None:
        super().__init__(why)
        self.reporter = reporter


@dataclass(frozen=True)
class Kit:
    """How components of a kind are checked."""

    act: Callable[[Any, Example], list[Outputs]]  # what one makes of B examples, per scene
    learn: Callable[[Any, Example], Tensor] | None  # the sum of its losses; None = the kind has none
    fits: Check  # whether it returns what it must: until then, what others raise says little
    checks: tuple[Check, ...]  # with that one


@dataclass(frozen=True)
class Subject:
    """A component under test."""

    registry: Registry
    entry: Entry
    settings: Mapping[str, Any]
    device: str
    kit: Kit

    @property
    def runtime(self) -> dict[str, Any]:
        """What it is built with beside its config."""
        return RUNTIME.get(self.entry.kind, {})

    def schema(self) -> type[Config]:
        try:
            return self.entry.load().Config
        except IrlvlaError as error:
            raise Unusable("it cannot be imported", "imports") from error

    def config(self) -> Config:
        return self.registry.validate(self.schema(), self.settings, self.entry.kind, str(self.entry))

    def build(self, seed: int = 0) -> Any:
        """A new component in eval mode, its weights drawn from the seed."""
        self.schema()
        try:
            with seeded(seed):
                component = self.registry.build(self.entry.kind, {**self.settings, "name": self.entry.name}, **self.runtime)
        except Exception as error:
            raise Unusable("it cannot be built", "builds") from error
        return component.to(self.device).eval() if isinstance(component, nn.Module) else component

    def example(self, batch: int = BATCH, k: int = 3) -> Example:
        return example(batch, WIDTH, k).to(self.device)

    def outputs(self, component: Any, example: Example) -> list[Outputs]:
        """What a component makes of examples, per scene, drawing the same random numbers every time."""
        with seeded(0), torch.no_grad():
            return self.kit.act(component, example)

    def learn(self, component: Any, example: Example) -> Tensor:
        """The sum of a component's losses."""
        assert self.kit.learn is not None
        return self.kit.learn(component, example)


def make(check: Check, subject: Subject) -> None:
    """Make one check.

    Raises:
        ContractError: it failed: the component and its package, what is wrong, and what to do.
        Skip: it does not apply.
    """
    remedy = " ".join((check.__doc__ or "").split())
    try:
        with seeded(0):
            check(subject)
    except Skip:
        raise
    except BuildError as error:  # no fault of the component: irlvla was built without CUDA
        raise Skip(str(error)) from None
    except Broken as error:
        raise ContractError(f"{subject.entry}: {error}. {remedy}") from None
    except Unusable as error:
        if check.__name__ != error.reporter:
            raise Skip(str(error)) from None
        cause = error.__cause__ or error
        raise ContractError(_blame(subject, cause, remedy)) from cause
    except Exception as error:
        if check is not subject.kit.fits and _fails(subject.kit.fits, subject):
            raise Skip(f"{subject.kit.fits.__name__} fails") from None
        raise ContractError(_blame(subject, error, remedy)) from error


def _fails(check: Check, subject: Subject) -> bool:
    try:
        make(check, subject)
    except ContractError:
        return True
    except Skip:
        pass
    return False


def _blame(subject: Subject, error: BaseException, remedy: str) -> str:
    """What went wrong inside a component, where, and what to do."""
    text = str(error).strip() if isinstance(error, IrlvlaError) else f"{type(error).__name__}: {str(error).strip()}"
    text = text if text.startswith(str(subject.entry)) else f"{subject.entry}: {text}"
    target = subject.entry.target
    home = sys.modules.get(target.__module__ if isinstance(target, type) else target.partition(":")[0])
    folder = os.path.dirname(getattr(home, "__file__", None) or "")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if folder and frame.filename.startswith(folder + os.sep)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{text.rstrip('.')}{place}. {remedy}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block with torch's global generators at a seed, and afterwards as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


# -- what a check can require ------------------------------------------------------------------------------------------


def difference(one: Sequence[Outputs], other: Sequence[Outputs], tolerance: float = EXACT) -> str:
    """Where the outputs of scenes differ by more than a tolerance relative to the largest value: "'poses' by 0.3"; "" = nowhere."""
    for a, b in zip(one, other, strict=True):
        if a.keys() != b.keys():
            return f"the names {sorted(a)} and {sorted(b)}"
        for name, x in a.items():
            y = b[name]
            if x.shape != y.shape or x.dtype != y.dtype:
                return f"{name!r} of {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
            x, y = x.double(), y.double()
            gap = _largest(torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, x - y).nan_to_num(math.inf))
            if gap > tolerance * max(_largest(x.nan_to_num(0.0, 0.0, 0.0)), 1e-3):
                return f"{name!r} by {gap:.3g}"
    return ""


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def require(condition: bool, message: str) -> None:
    """Raise `Broken` unless a condition holds."""
    if not condition:
        raise Broken(message)


def require_same(one: Sequence[Outputs], other: Sequence[Outputs], when: str, tolerance: float = EXACT) -> None:
    if found := difference(one, other, tolerance):
        raise Broken(f"{when}: {found}")


def require_tensor(value: Any, name: str, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Floating-point, of a shape (None = any size), and on the device of the input."""
    require(isinstance(value, Tensor), f"{name} is {type(value).__name__}, expected a tensor")
    fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, f"{name} has shape {tuple(value.shape)}, expected ({wanted})")
    require(value.is_floating_point(), f"{name} is of {value.dtype}, expected floating-point numbers")
    require(value.device == device, f"{name} is on {value.device}, the input on {device}")


def require_finite(outputs: Sequence[Outputs]) -> None:
    for scene in outputs:
        for name, value in scene.items():
            require(bool(value.isfinite().all()), f"{name!r} holds NaN or infinity")


def total(losses: Any, device: torch.device) -> Tensor:
    """The sum of losses. Raises `Broken` unless each is a finite scalar with a name."""
    require(isinstance(losses, dict), f"loss() returns {type(losses).__name__}, expected a dict of names to scalar tensors")
    for name, value in losses.items():
        require(isinstance(name, str), f"loss() has the name {name!r}, expected a string")
        require_tensor(value, f"loss {name!r}", (), device)
        require(bool(value.isfinite()), f"loss {name!r} is {value.item()}, expected a finite number")
    return sum(losses.values(), torch.zeros((), device=device))


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
