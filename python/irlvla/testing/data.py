"""The checks of datasets and of metrics."""

from __future__ import annotations

import pickle
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader

import irlvla
from irlvla.components import Dataset, Metric
from irlvla.testing.contract import BEHAVIOUR, SETTINGS, copies, keeps_scenes_apart, repeats
from irlvla.testing.examples import Example
from irlvla.testing.subject import (
    Broken,
    Kit,
    Outputs,
    Subject,
    require,
    require_same,
    require_tensor,
)
from irlvla.types import METRICS, Batch, Command, Observation, Scene, Trajectory

Item: TypeAlias = tuple[Observation, Scene, Trajectory]
ITEMS = 4  #: of a dataset are looked at
PARTS: dict[str, type[Batch]] = {"observation": Observation, "scene": Scene, "human": Trajectory}

# -- datasets ----------------------------------------------------------------------------------------------------------


def read(component: Dataset, given: Example) -> list[Outputs]:
    """All tensors of the first items; of the example it takes nothing."""
    return [_tensors(component[i]) for i in range(min(ITEMS, len(component)))]


def _tensors(item: Item) -> Outputs:
    return {f"{part}.{name}": value for part, batch in zip(PARTS, item, strict=True) for name, value in batch.tensors()}


def items_fit(subject: Subject) -> None:
    """Return (Observation, Scene, Trajectory) for each index, each a batch of one, with the same token in observation and scene."""
    component = subject.build()
    require(len(component) > 0, "it has no items")
    tokens = []
    for index in range(min(ITEMS, len(component))):
        item, where = component[index], f"item {index}"
        require(isinstance(item, tuple) and len(item) == 3, f"{where} is {type(item).__name__}, expected a tuple of three")
        for (name, kind), part in zip(PARTS.items(), item, strict=True):
            require(isinstance(part, kind), f"{name} of {where} is {type(part).__name__}, expected irlvla.{kind.__name__}")
            require(len(part) == 1, f"{name} of {where} has {len(part)} rows, expected a batch of one")
        obs, scene, human = item
        require(obs.token == scene.token, f"{where} is {obs.token} in the observation and {scene.token} in the scene")
        require_tensor(obs.ego, f"Observation.ego of {where}", (1, None, 8), obs.device)
        require_tensor(human.poses, f"the human's poses of {where}", (1, None, 3), human.device)
        require(obs.command.tolist() in [[command] for command in Command], f"the command of {where} is {obs.command.tolist()}")
        _require_cameras(obs, where)
        tokens += obs.token
    require(len(set(tokens)) == len(tokens), f"two items have the same token: {tokens}")


def _require_cameras(obs: Observation, where: str) -> None:
    if obs.images is None:
        return
    shape, dtype = tuple(obs.images.shape), obs.images.dtype
    require(len(shape) == 5 and shape[2] == 3, f"images of {where} have shape {shape}, expected (1, C, 3, H, W)")
    require(dtype == torch.uint8 or dtype.is_floating_point, f"images of {where} are of {dtype}, expected uint8 or floats in [0, 1]")
    if obs.intrinsics is not None:
        require_tensor(obs.intrinsics, f"intrinsics of {where}", (1, shape[1], 3, 3), obs.device)
    if obs.camera_to_ego is not None:
        require_tensor(obs.camera_to_ego, f"camera_to_ego of {where}", (1, shape[1], 4, 4), obs.device)


def index_has_bounds(subject: Subject) -> None:
    """Raise IndexError for an index that is out of range; a negative one counts from the end, as in a list, or is out of range too."""
    component = subject.build()
    count = len(component)
    for index in (count, -count - 1):
        try:
            component[index]
        except IndexError:
            continue
        raise Broken(f"index {index} of {count} items gives an item, expected IndexError")
    try:
        last = component[-1]
    except IndexError:
        return
    require_same([_tensors(last)], [_tensors(component[count - 1])], "index -1 is not the last item")


def scenes_can_be_scored(subject: Subject) -> None:
    """Fill the scene so that irlvla.epdms scores a plan in it; compare with irlvla.testing.example_scene()."""
    component = subject.build()
    for index in range(min(ITEMS, len(component))):
        _, scene, human = component[index]
        plan = Trajectory(human.poses.nan_to_num(0.0), human.dt)
        values = irlvla.epdms(scene, plan).values[0, : METRICS.index("ec")]
        fits = bool(((values >= 0) & (values <= 1)).all())
        require(fits, f"the human drive of item {index} scores {values.tolist()}, expected values in [0, 1]")


def pickles(subject: Subject) -> None:
    """Let it pickle, for workers: open files when they are read, and drop them in __getstate__; no lambdas, no locks."""
    component = subject.build()
    again = pickle.loads(pickle.dumps(component))
    require_same(subject.outputs(again, subject.example()), subject.outputs(component, subject.example()), "its pickle gives other items")


def works_in_workers(subject: Subject) -> None:
    """Give the same items in DataLoader workers as outside, of the same shapes and with the same fields, so that `cat` makes batches."""
    component = subject.build()
    count = min(ITEMS, len(component))
    loader = DataLoader(_Attempts(component), batch_size=None, sampler=range(count), num_workers=2, collate_fn=_as_it_is, timeout=120)
    items = list(loader)
    failed = [item for item in items if isinstance(item, str)]
    require(not failed, f"in a worker it raises {', '.join(failed[:1])}")
    require_same([_tensors(item) for item in items], subject.outputs(component, subject.example()), "workers give other items")
    for part, rows in zip(PARTS.values(), zip(*items, strict=True), strict=True):
        part.cat(rows)


class _Attempts(torch.utils.data.Dataset[Item | str]):
    """The items of a dataset, or what it raises: a worker that raises would keep others waiting."""

    def __init__(self, component: Dataset) -> None:
        self.component = component

    def __getitem__(self, index: int) -> Item | str:
        try:
            return self.component[index]
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _as_it_is(item: Any) -> Any:
    return item


DATA = Kit(
    read, None, items_fit, (*SETTINGS, items_fit, index_has_bounds, repeats, copies, pickles, works_in_workers, scenes_can_be_scored)
)

# -- metrics -----------------------------------------------------------------------------------------------------------


def measure(component: Metric, given: Example) -> list[Outputs]:
    """The values of each scene."""
    values = component(given.scene, given.plan)
    return [{name: value[i] for name, value in values.items()} for i in range(len(given))]


def values_fit(subject: Subject) -> None:
    """Return a dict of names to floating-point tensors "B", one value per scene; NaN = not measured, never infinity."""
    component, given = subject.build(), subject.example(k=4)
    values: Any = component(given.scene, given.plan)
    require(isinstance(values, dict), f"it returns {type(values).__name__}, expected a dict")
    require(bool(values), "it returns no values")
    for name, value in values.items():
        require(isinstance(name, str), f"it returns the name {name!r}, expected a string")
        require_tensor(value, f"value {name!r}", (len(given),), given.device)
        require(not bool(value.isinf().any()), f"value {name!r} is infinite")


MEASUREMENT = Kit(measure, None, values_fit, (*SETTINGS, values_fit, *BEHAVIOUR, keeps_scenes_apart))
