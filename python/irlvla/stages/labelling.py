"""Labelling: candidates for scenes, made and scored exactly as they are asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from irlvla.candidates import CandidateConfig, Candidates, Source, balanced, hardness, make_candidates
from irlvla.components import Dataset, Policy
from irlvla.errors import InputError, IrlvlaError
from irlvla.run import Run
from irlvla.scoring import HumanFilter, epdms
from irlvla.stages.batches import SceneBatch, generator_of, numbered, read
from irlvla.types import Batch, Epdms, Plan, StateIndex

Labels = TypeVar("Labels", bound=Batch)


class LabelledBatch(NamedTuple):
    """Scenes with candidates and what these are worth."""

    scenes: SceneBatch
    plan: Plan  # the human's drive first
    source: Int[Tensor, "B K"]  # Source
    labels: Epdms  # exact, with details
    seconds: Float[Tensor, " 2"]  # of the processor: to label, and all in all, of which labelling is a part


@dataclass(frozen=True)
class Labeller:
    """Makes candidates, chooses among them, and labels those that are chosen: exactly the plans that a network sees."""

    candidates: CandidateConfig
    human_filter: HumanFilter = "fixed"
    vocabulary: Float[Tensor, "M T 3"] | None = None
    proposals: Float[Tensor, "N S T 3"] | None = None  # of a policy, for each scene of the dataset
    share: float = 1.0  # of the candidates that are kept, to be proposals
    keep: int | None = None  # candidates of each scene, so chosen that rare failures are among them; None = all that are made

    def __call__(self, batch: SceneBatch, generator: Generator) -> LabelledBatch:
        """Raises `InputError` for a scene without a human's drive, and if it cannot make as many candidates as are to be kept."""
        began = time.process_time()
        made = self._with_proposals(self._made(batch, generator), batch, generator)
        asked = time.process_time()
        labels = epdms(batch.scene, made.plan, human_filter=self.human_filter, details=True)
        labelling = time.process_time() - asked
        if self.keep is not None:
            rows = self._kept(labels.values, self.keep - self.proposed, generator)
            made, labels = made.chosen(rows), _chosen(labels, rows)
        return LabelledBatch(batch, made.plan, made.source, labels, torch.tensor([labelling, time.process_time() - began]))

    @property
    def proposed(self) -> int:
        """How many proposals each scene gets."""
        if self.proposals is None:
            return 0
        there = self.proposals.shape[1]
        return there if self.keep is None else min(there, round(self.share * self.keep))

    def _kept(self, values: Float[Tensor, "B K 9"], count: int, generator: Generator) -> Int[Tensor, "B keep"]:
        """So many of the candidates that were made here, and all proposals, which stand behind them."""
        made = values.shape[1] - self.proposed
        proposed = torch.arange(made, values.shape[1], device=values.device).expand(len(values), -1)
        return torch.cat([balanced(values[:, :made], count, generator), proposed], 1)

    def _made(self, batch: SceneBatch, generator: Generator) -> Candidates:
        speed = batch.observation.ego[:, -1, StateIndex.VX]
        return make_candidates(batch.human, speed, self.candidates, generator, vocabulary=self.vocabulary)

    def _with_proposals(self, made: Candidates, batch: SceneBatch, generator: Generator) -> Candidates:
        count = self.proposed
        if self.proposals is None or not count:
            return made
        there = self.proposals[batch.rows].to(made.plan.poses)
        drawn = torch.rand(there.shape[:2], generator=generator).argsort(1)[:, :count]
        poses = torch.cat([made.plan.poses, there.take_along_dim(drawn[..., None, None], 1)], 1)
        source = torch.cat([made.source, made.source.new_full((len(there), count), Source.POLICY)], 1)
        return Candidates(Plan(poses, made.plan.dt), source)


def _chosen(labels: Labels, rows: Int[Tensor, "B N"]) -> Labels:
    """The labels of N of the candidates of each scene."""
    index = torch.arange(len(rows), device=rows.device)[:, None], rows
    chosen = {
        name: _chosen(value, rows) if isinstance(value, Batch) else value[index]
        for name, value in vars(labels).items()
        if isinstance(value, Batch | Tensor)
    }
    return dataclasses.replace(labels, **chosen)


@dataclass(frozen=True)
class LabelledBatches:
    """Labelled batches by their number, in this process or in workers: they depend on nothing but seed and number."""

    scenes: Callable[[int], SceneBatch | IrlvlaError]
    labeller: Labeller
    seed: int

    def __call__(self, number: int) -> LabelledBatch | IrlvlaError:
        began = time.process_time()
        batch = self.scenes(number)
        if isinstance(batch, IrlvlaError):
            return batch
        known = batch.human.poses.isfinite().flatten(1).all(1)
        try:
            labelled = self.labeller(batch if bool(known.all()) else batch.chosen(known), numbered(self.seed, number))
        except IrlvlaError as error:
            return error
        labelled.seconds[1] = time.process_time() - began
        return labelled


@dataclass(frozen=True)
class InOrder:
    """Batches of some rows of a dataset by their number."""

    dataset: Dataset
    rows: range
    batch: int

    def __call__(self, number: int) -> SceneBatch | IrlvlaError:
        return read(self.dataset, self.rows[number * self.batch :][: self.batch])

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)


def weigh(dataset: Dataset, batches: Iterable[LabelledBatch], share: float, run: Run) -> Float[Tensor, " N"]:
    """How often each scene is to be learned from, 1 on average: a share of the time by how much it matters there what one does, else
    all alike. Never those in which no human's drive is known.

    Raises:
        InputError: none is known in any scene.
    """
    hard, known = torch.zeros(2, len(dataset), dtype=torch.float64)
    with run.progress(len(dataset), "weigh scenes") as progress:
        for batch in batches:
            hard[batch.scenes.rows] = hardness(batch.labels.score()).double().cpu()
            known[batch.scenes.rows] = 1.0
            progress.advance(len(batch.scenes.rows))
    if not bool(known.any()):
        raise InputError(f"{dataset} holds no drives of people to learn from")
    alike, hard = known / known.mean(), hard / hard.mean() if bool(hard.any()) else known / known.mean()
    return (1.0 - share) * alike + share * hard


def propose(policy: Policy, batches: Iterable[SceneBatch], scenes: int, dt: float, count: int, run: Run) -> Float[Tensor, "N S T 3"]:
    """What a policy proposes in each scene, with a pose every `dt` seconds: `count` plans and, if it tells (`chain`), all steps to them.

    Raises:
        InputError: it plans no poses at these times.
    """
    found: list[Tensor] = []
    policy.to(run.device).eval()
    with run.progress(scenes, "propose") as progress, torch.no_grad():
        for batch in batches:
            with run.autocast():
                plan = policy.sample(batch.observation.to(run.device), count, generator=generator_of(batch, run.config.seed))
            chain = getattr(policy.planner, "chain", None)
            poses = (plan.poses[:, :, None] if chain is None else chain(plan)).flatten(1, 2).float().cpu()
            found.append(_at(poses, plan.dt, dt, policy))
            progress.advance(len(batch.rows))
    return torch.cat(found)


def _at(poses: Float[Tensor, "B S T 3"], dt: float, wanted: float, policy: Policy) -> Float[Tensor, "B S t 3"]:
    stride = round(wanted / dt)
    if stride < 1 or abs(stride * dt - wanted) > 1e-6:
        raise InputError(f"{policy.planner} plans a pose every {dt:g} s, and human drives have one every {wanted:g} s")
    return poses[:, :, stride - 1 :: stride]


class Clock:
    """What share of the work of a training it is to label: of the processor time of the main process and of those that label."""

    def __init__(self, *, apart: bool) -> None:
        """`apart`: other processes label."""
        self.apart = apart
        self.restart()

    def restart(self) -> None:
        """Forget what was before."""
        self.labels, self.batches, self.began = 0.0, 0.0, time.process_time()

    def watched(self, batches: Iterable[LabelledBatch]) -> Iterator[LabelledBatch]:
        """The same batches."""
        for batch in batches:
            labels, lasted = batch.seconds.tolist()
            self.labels, self.batches = self.labels + labels, self.batches + lasted
            yield batch

    def share(self) -> float:
        """Since the last restart."""
        return self.labels / (time.process_time() - self.began + self.apart * self.batches)
