"""Scenes in batches: all of a dataset in order, or shuffled anew in every epoch of a training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from irlvla.components import Dataset, Spec
from irlvla.errors import InputError, IrlvlaError
from irlvla.registry import build
from irlvla.types import Observation, Scene, Trajectory

T = TypeVar("T")


class SceneBatch(NamedTuple):
    """Some scenes of a dataset."""

    rows: Tensor  # B: which ones
    observation: Observation
    scene: Scene
    human: Trajectory

    def chosen(self, mask: Bool[Tensor, " B"]) -> SceneBatch:
        """Some of these scenes."""
        return SceneBatch(self.rows[mask], self.observation[mask], self.scene[mask], self.human[mask])


def read(dataset: Dataset, rows: Iterable[int]) -> SceneBatch | IrlvlaError:
    """A batch of a dataset; or the mistake that keeps it from being read, which a worker would raise with a traceback."""
    rows = list(rows)
    try:
        observations, scenes, drives = zip(*(dataset[row] for row in rows), strict=True)
        return SceneBatch(torch.tensor(rows), *_joined(observations, scenes), Trajectory.cat(drives))
    except IrlvlaError as error:
        return error
    except Exception as error:
        error.add_note(f"while reading the scenes {rows[0]} to {rows[-1]} of {dataset}")
        raise


def _joined(observations: Sequence[Observation], scenes: Sequence[Scene]) -> tuple[Observation, Scene]:
    """Batches of both; where observations hold the very scenes, these are joined, and sent to another process or device, once."""
    scene = Scene.cat(scenes)
    if any(obs.scene is not its for obs, its in zip(observations, scenes, strict=True)):
        return Observation.cat(observations), scene
    obs = Observation.cat(dataclasses.replace(obs, scene=None) for obs in observations)
    return dataclasses.replace(obs, scene=scene), scene


def open_scenes(spec: Spec) -> Dataset:
    """A dataset. Raises `InputError` if there is nothing in it."""
    dataset: Dataset = build("dataset", spec)
    if not len(dataset):
        raise InputError(f"{dataset} holds no scenes")
    return dataset


def in_order(dataset: Dataset, batch: int, workers: int, rows: Sequence[int] | None = None) -> DataLoader[SceneBatch]:
    """All scenes of a dataset, from the first to the last; or those of some rows.

    Whole batches are dealt out, so that a scene has the same neighbours, and the same random numbers, in any number of processes.
    """
    rows = range(len(dataset)) if rows is None else rows
    batches = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    return loader(batches, functools.partial(read, dataset), workers)


def loader(places: Sequence[Any], read: Callable[[Any], Any], workers: int) -> DataLoader[Any]:
    """A batch for each place, made by `read` in this process or in workers. It leaves torch's random numbers as they are."""
    items: Any = places
    return DataLoader(items, batch_size=1, num_workers=workers, collate_fn=functools.partial(_read_one, read), generator=Generator())


def _read_one(read: Callable[[Any], Any], places: list[Any]) -> Any:
    (place,) = places
    return read(place)


@dataclass(frozen=True, eq=False)
class Shuffled:
    """The batches of a training by their number: every scene once in each epoch, in another order.

    They depend on nothing but seed and number, so a training that was stopped goes on with the batch that comes next.
    """

    dataset: Dataset
    batch: int
    seed: int

    def __call__(self, number: int) -> SceneBatch | IrlvlaError:
        places = range(number * self.batch, (number + 1) * self.batch)
        return read(self.dataset, [self._row(place) for place in places])

    def _row(self, place: int) -> int:
        epoch, rest = divmod(place, len(self.dataset))
        return self._epoch(epoch)[rest]

    def _epoch(self, number: int) -> list[int]:
        return _permutation(len(self.dataset), self.seed, number)


@dataclass(frozen=True, eq=False)
class Weighted(Shuffled):
    """The same, but in each epoch a scene comes as often as its weight says, relative to the mean weight: rounded down or up by chance."""

    weights: Float[Tensor, " N"]

    def _epoch(self, number: int) -> list[int]:
        return _drawn(self, number)


@functools.lru_cache(maxsize=2)
def _drawn(order: Weighted, number: int) -> list[int]:
    drawer, count = numbered(order.seed, number), len(order.weights)
    ends = order.weights.double().cumsum(0)
    places = (torch.arange(count) + torch.rand((), dtype=torch.float64, generator=drawer)) / count  # systematic sampling
    rows = torch.searchsorted(ends / ends[-1], places, right=True)
    return rows[torch.randperm(count, generator=drawer)].tolist()


@functools.lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _permutation(count: int, seed: int, number: int) -> list[int]:
    return torch.randperm(count, generator=numbered(seed, number)).tolist()


def without_images(spec: Spec) -> Spec:
    """The same scenes without their images, which are what takes time to read."""
    return {**spec, "size": None} if "size" in spec else spec


def human_drives(spec: Spec, count: int, seed: int) -> Trajectory:
    """How people drove in up to `count` scenes of a dataset, chosen at random, of those where it was recorded.

    Raises:
        InputError: it was recorded in none of them.
    """
    dataset: Dataset = build("dataset", without_images(spec))
    drives = Trajectory.cat(dataset[row][2] for row in _permutation(len(dataset), seed, 0)[:count])
    known = drives[drives.poses.isfinite().flatten(1).all(1)]
    if not len(known):
        raise InputError(f"{dataset} holds no drives of people to learn from")
    return known


def checked(batches: Iterable[T | IrlvlaError]) -> Iterator[T]:
    """The batches of a loader. Raises the mistake that kept one from being read."""
    for batch in batches:
        if isinstance(batch, IrlvlaError):
            raise batch
        yield batch


def generator_of(batch: SceneBatch, seed: int) -> Generator:
    """Random numbers that depend on nothing but a seed and the place of a batch in its dataset."""
    return numbered(seed, int(batch.rows[0]), batch.rows.device)


def numbered(seed: int, number: int, device: str | torch.device = "cpu") -> Generator:
    """Random numbers that depend on nothing but a seed and a number, of a batch for example."""
    entropy = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(entropy[0]))
