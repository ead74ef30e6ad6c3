"""The data of a reward: labelled batches of the training, held-out ones, and the kept features of frozen backbones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from irlvla.candidates import vocabulary_of
from irlvla.components import Dataset, Policy, RewardModel, Spec
from irlvla.errors import ConfigError
from irlvla.plots import REWARD_PANELS, draw_learning_curve
from irlvla.run import Run
from irlvla.run.journal import METRICS as LOGGED
from irlvla.stages.batches import Weighted, checked, human_drives, in_order, loader, open_scenes, without_images
from irlvla.stages.features import backbones_of, is_frozen, remembering
from irlvla.stages.labelling import InOrder, LabelledBatch, LabelledBatches, Labeller, propose, weigh
from irlvla.stages.measurement import Best
from irlvla.stages.reward_report import predict, values_of
from irlvla.types import METRICS

if TYPE_CHECKING:
    from irlvla.stages.reward_learning import RewardConfig

TUNING = "tuning"  #: held-out scenes by which the best model is chosen and calibrated
HELD_OUT_SEED = 0  # whatever the seed of the run, the candidates of held-out scenes are the same
BATCH = 32  # scenes at once, where nothing is learned


class RewardData:
    """Labelled batches of the training, and held-out ones: some to tune by, the others for the report.

    Attributes:
        train: scenes to learn from.
        batches: of them, by number.
        held_out: batches by the name of their dataset, for the report; and `TUNING`, where there are any.
        best: the best model so far.
        shown: what to show of it.
    """

    def __init__(self, run: Run, config: RewardConfig, specs: dict[str, Spec], policies: Sequence[Policy | None], images: bool) -> None:
        self.run, self.config = run, config
        self.best, self.shown = Best(run, config.validation.best), dict[str, Any]()
        datasets = {name: open_scenes(spec if images else without_images(spec)) for name, spec in specs.items()}
        self.train, learned, reported = datasets["train"], *policies
        drives = human_drives(specs["train"], config.drives, config.seed)
        labeller = Labeller(config.candidates, config.human_filter, vocabulary_of(drives.poses, config.vocabulary))
        self.batches = self._training(dataclasses.replace(labeller, proposals=self._proposals(learned, self.train, drives.dt)))
        self.held_out: dict[str, LabelledBatches] = {}
        for name in datasets.keys() - {"train"}:
            proposals = self._proposals(reported, datasets[name], drives.dt)
            held_out = dataclasses.replace(labeller, candidates=config.report.candidates, proposals=proposals)
            for part, rows in self._parts(name, len(datasets[name])).items():
                self.held_out[part] = LabelledBatches(InOrder(datasets[name], rows, config.validation.batch), held_out, HELD_OUT_SEED)

    def _training(self, labeller: Labeller) -> LabelledBatches:
        """Of the training: of hard scenes more often."""
        config, survey = self.config, LabelledBatches(InOrder(self.train, range(len(self.train)), BATCH), labeller, self.config.seed)
        weights = weigh(self.train, self._in_order(survey), config.hard, self.run)
        labeller = dataclasses.replace(labeller, share=config.proposal_share, keep=config.keep_candidates)
        if config.keep_candidates - labeller.proposed <= len(METRICS):
            raise ConfigError(
                f"keep_candidates={config.keep_candidates}, of which proposal_share={config.proposal_share:g} are the policy's: "
                f"of the others there must be more than the {len(METRICS)} metrics, so that each can have its failure"
            )
        return LabelledBatches(Weighted(self.train, config.batch, config.seed, weights), labeller, config.seed)

    def _parts(self, name: str, count: int) -> dict[str, range]:
        if name != "validation":
            return {name: range(count)}
        watched = min(self.config.validation.scenes, count // 2)
        return {TUNING: range(watched), name: range(watched, count)} if watched else {name: range(count)}

    def _proposals(self, policy: Policy | None, dataset: Dataset, dt: float) -> Float[Tensor, "N S T 3"] | None:
        """What a policy proposes in the scenes of a dataset."""
        if policy is None:
            return None
        batches = checked(in_order(dataset, BATCH, self.config.workers))
        return propose(policy, batches, len(dataset), dt, self.config.proposals, self.run)

    def evaluation(self, name: str) -> Iterator[LabelledBatch]:
        """The held-out batches of a name."""
        return self._in_order(self.held_out[name])

    def _in_order(self, batches: LabelledBatches) -> Iterator[LabelledBatch]:
        scenes: Any = batches.scenes
        return checked(loader(range(len(scenes)), batches, self.config.workers))

    def validate(self, step: int, model: RewardModel) -> dict[str, float]:
        """What to log of a model; it is kept if it is the best so far."""
        if TUNING not in self.held_out:
            return {}
        values = values_of(predict(model, self.evaluation(TUNING), self.run).comparison)
        self.best.keep(step, model, {name: {"mean": value, "count": 1} for name, value in values.items()})
        self.shown = {self.best.name: values[self.best.name]}
        return {f"validation/{name}": value for name, value in values.items()}

    def draw(self) -> None:
        """The learning curve so far."""
        if self.run.is_main:
            draw_learning_curve(self.run.directory / LOGGED, self.run.directory / "learning_curve.png", REWARD_PANELS)


@contextlib.contextmanager
def remembered(
    run: Run, config: RewardConfig, specs: dict[str, Spec], learner: nn.Module, policies: Sequence[Policy | None]
) -> Iterator[bool]:
    """A block in which the backbones of a reward, if they are frozen, remember what they saw in all scenes, and so does all that sees in
    policies. Tells whether images are looked at all the same."""
    backbones = backbones_of(learner)
    if not (config.remember and backbones and all(map(is_frozen, backbones))):
        yield True
        return
    others = [policy for policy in policies if policy is not None]
    with remembering([learner, *others], list(specs.values()), config.cache, run, config.workers):
        yield False
