"""Stage 1: the policy learns to drive as people do, while its drives in held-out scenes are scored exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from irlvla.checkpoint import from_pretrained
from irlvla.components import Config, Dataset, Metric, Policy, Spec, pluggable
from irlvla.errors import ConfigError
from irlvla.files import write_whole
from irlvla.plots import draw_learning_curve
from irlvla.registry import build, installed
from irlvla.run import Run, TrainingConfig
from irlvla.run.journal import METRICS
from irlvla.stages.batches import SceneBatch, Shuffled, checked, generator_of, human_drives, in_order, loader, open_scenes, without_images
from irlvla.stages.caching import cached
from irlvla.stages.features import remembering
from irlvla.stages.measurement import Best, Summary, means_of, measure_all
from irlvla.stages.optimization import Learner, OptimizerConfig, Pace, count_steps, make_optimizer, make_schedule, train
from irlvla.types import Observation, Plan


class DataConfig(Config):
    """Which scenes."""

    train: Spec = pluggable("dataset", description="scenes to learn from")
    validation: Spec | None = pluggable("dataset", None, description="held-out scenes to drive in; null = none")


class ValidationConfig(Config):
    """How the policy is watched while it learns."""

    every: int = Field(500, ge=1, description="steps between validations; a checkpoint follows each")
    batch: int = Field(64, ge=1, description="scenes at once")
    candidates: int = Field(1, ge=1, description="plans per scene (K); the planner's favourite is driven")
    metrics: list[Spec] = pluggable("metric", ["epdms", "displacement"], description="what is measured")
    best: str = Field("epdms", description="the value that is highest for the best checkpoint")
    blanked: bool = Field(False, description="measure it with black images too: what the policy knows without looking")


class ImitateConfig(TrainingConfig):
    """Settings of `imitate`."""

    data: DataConfig
    cache: Path | None = Field(
        None, description="folder where scenes are kept as shards, made once; null = made or read anew in every epoch"
    )
    backbone: Spec | None = pluggable("backbone", None, description="sees")
    reasoner: Spec | None = pluggable("reasoner", None, description="thinks in words")
    perception: str | None = Field(
        None,
        description="a saved policy (folder, or name on the Hub) that lends its backbone and reasoner instead: frozen, they look at each "
        "scene once, and the planner alone learns, from what they saw",
    )
    planner: Spec = pluggable("planner", description="drives")
    initial: str | None = Field(None, description="a saved policy whose weights to begin with: its folder, or its name on the Hub")
    fit: int = Field(4096, ge=0, description="human drives that show the planner what it does not learn by gradient (anchors, scales)")
    steps: int | None = Field(None, ge=1, description="of the optimizer; or give epochs")
    epochs: float | None = Field(None, gt=0.0, description="how often each scene is seen; instead of steps")
    batch: int = Field(16, ge=1, description="scenes at once, in each process")
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({})
    ema: float = Field(
        0.999, ge=0.0, lt=1.0, description="decay of the moving average of the weights, which is what is validated and saved"
    )
    validation: ValidationConfig = ValidationConfig.model_validate({})
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    workers: int = Field(0, ge=0, description="processes that read the scenes; 0 = the main one")
    compile: bool = Field(False, description="compile the backbone with torch.compile")

    may_change = TrainingConfig.may_change | {"workers", "cache"}


def imitate(config: ImitateConfig) -> Path:
    """Train a policy on human drives; return the directory of the run.

    It holds the newest checkpoints, the best (checkpoints/best/model), metrics.jsonl, learning_curve.png and summary.json. What is
    minimised is the sum of all losses, over `accumulate` batches in each process; what is validated and saved is the moving average.

    Raises:
        ConfigError: the settings do not fit together, or name what is not there.
        ContractError: a component returns what it must not.
        DivergedError: a loss or the gradient is not finite. The weights before that step are saved.
        FileError: there is no such data or checkpoint.
        InputError: a dataset holds no scenes, or no drives of people.
    """
    specs = {name: cached(spec, config.cache) for name, spec in config.data if spec is not None}
    torch.manual_seed(config.seed)
    frozen = config.perception is not None
    learner = Imitation(_make_policy(config), config.ema, frozen)
    optimizer = make_optimizer(learner.model, config.optimizer)
    with Run.start("imitate", config) as run, _looking_once(run, config, learner, list(specs.values())):
        datasets = {name: open_scenes(without_images(spec) if frozen else spec) for name, spec in specs.items()}
        per_step = config.accumulate * len(run.gather(torch.zeros(1, device=run.device)))  # batches, of all processes
        steps = count_steps(config.steps, config.epochs, len(datasets["train"]), per_step * config.batch)
        schedule = make_schedule(optimizer, config.optimizer, steps)
        prepared = run.prepare(learner, optimizer, schedule)
        pictured = open_scenes(specs["validation"]) if frozen and config.validation.blanked and "validation" in specs else None
        validation = Validation(run, config, datasets.get("validation"), pictured)
        first = run.restore()
        if first == 0:
            if config.fit and config.initial is None:
                learner.model.planner.fit(human_drives(specs["train"], config.fit, config.seed).to(run.device))
            run.log(0, validation.references())
        shuffled = Shuffled(datasets["train"], config.batch, config.seed)
        batches = checked(run.prepare(loader(range(first * per_step, steps * per_step), shuffled, config.workers)))
        pace = Pace(per_step * config.batch)
        with run.progress(steps, "imitate", first) as progress:
            for step, values in train(run, learner, prepared, batches, range(first + 1, steps + 1), config.optimizer.clip):
                pace.step()
                ends = step == steps or step % config.validation.every == 0
                if ends:
                    with pace.paused():
                        values |= validation.measure(step, learner.result)
                if ends or step % config.log_every == 0:
                    run.log(step, values | {"charts/samples_per_second": pace.rate()})
                if ends:
                    with pace.paused():
                        run.save(step, learner.result)
                        validation.draw()
                progress.advance(loss=values["losses/total"], **validation.shown)
        validation.summarise(steps)
    return run.directory


# -- the policy --------------------------------------------------------------------------------------------------------


class Imitation(Learner):
    """A policy that learns from people."""

    model: Policy

    def __init__(self, policy: Policy, decay: float, frozen: bool) -> None:
        """`frozen`: its planner alone learns."""
        super().__init__(policy, decay)
        self.frozen = frozen

    def forward(self, batch: SceneBatch) -> dict[str, Tensor]:
        """The losses of the policy, or of its planner."""
        if not self.frozen:
            return self.model.loss(batch.observation, batch.scene, batch.human)
        losses = self.model.planner.loss(self.model(batch.observation), batch.human)
        return {f"planner/{name}": value for name, value in losses.items()}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.model.eval().planner.train(mode)
        return self


def _looking_once(run: Run, config: ImitateConfig, learner: Imitation, specs: list[Spec]) -> AbstractContextManager[None]:
    """A block in which eyes that are lent have looked at all scenes already."""
    return remembering([learner], specs, config.cache, run, config.workers) if learner.frozen else nullcontext()


def _make_policy(config: ImitateConfig) -> Policy:
    """The policy of a configuration, with the weights that it begins with."""
    if (config.backbone is None) == (config.perception is None):
        raise ConfigError("give either backbone, which learns to see, or perception, a saved policy that has learnt it")
    if config.backbone is None:
        policy = _with_perception(config)
    else:
        policy = installed().build_policy(config.backbone, config.planner, config.reasoner)
    if config.initial is not None:
        initial = from_pretrained(config.initial)
        try:
            policy.load_state_dict(initial.state_dict())  # type: ignore[union-attr]
        except RuntimeError as error:
            raise ConfigError(f"initial={config.initial}: its weights do not fit this policy. {error}") from error
    if config.compile:
        policy.backbone.compile()
    return policy


def _with_perception(config: ImitateConfig) -> Policy:
    """A new planner behind the eyes of a saved policy."""
    if config.reasoner is not None:
        raise ConfigError("reasoner: perception has a reasoner of its own, or none; set reasoner=null")
    saved = from_pretrained(str(config.perception))
    if not isinstance(saved, Policy):
        raise ConfigError(f"perception={config.perception}: it is no policy but {saved}")
    saved.requires_grad_(False)
    return Policy(saved.backbone, build("planner", config.planner, width=saved.backbone.width), saved.reasoner)


# -- validation --------------------------------------------------------------------------------------------------------


class Validation:
    """Held-out scenes, how the policy drives there, and the best that it was."""

    def __init__(self, run: Run, config: ImitateConfig, dataset: Dataset | None, pictured: Dataset | None = None) -> None:
        """`pictured`: the same scenes with their images, where `dataset` has none."""
        self.run, self.seed, self.config = run, config.seed, config.validation
        self.metrics: list[Metric] = [build("metric", spec) for spec in self.config.metrics]

        def batches(dataset: Dataset | None) -> Any:
            return [] if dataset is None else run.prepare(in_order(dataset, self.config.batch, config.workers))

        self.batches = batches(dataset)
        self.pictured = self.batches if pictured is None else batches(pictured)
        self.best = Best(run, self.config.best)
        self.shown: dict[str, Any] = {}

    def references(self) -> dict[str, float]:
        """What is reached without learning: by the people who drove there, and straight on at constant speed."""
        straight = installed().build_policy("status", "constant_velocity")
        known = (batch.chosen(batch.human.poses.isfinite().flatten(1).all(1)) for batch in checked(self.batches))
        people = self._measure(known, lambda batch: Plan(batch.human.poses[:, None], batch.human.dt))
        baseline = self._measure(checked(self.batches), lambda batch: straight.sample(batch.observation))
        return _named("human", people) | _named("constant_velocity", baseline)

    def measure(self, step: int, policy: Policy) -> dict[str, float]:
        """What to log of a policy; it is kept if it is the best so far."""
        if not self.batches:
            return {}
        found = self._measure(checked(self.batches), lambda batch: self._drive(policy, batch, batch.observation))
        if self.may_be_best(step, found):
            self.best.keep(step, policy, found)
        values = _named("validation", found)
        if self.config.blanked:
            blind = self._measure(checked(self.pictured), lambda batch: self._drive(policy, batch, blanked(batch.observation)))
            values |= _named("blanked", blind)
        self.shown = {self.config.best: found[self.config.best]["mean"]}
        return values

    def may_be_best(self, step: int, found: Summary) -> bool:
        """Whether a policy that reaches this is kept if none was better."""
        return True

    def _measure(self, batches: Iterable[SceneBatch], drive: Callable[[SceneBatch], Plan]) -> Summary:
        return measure_all(self.run, batches, self.metrics, drive)

    def _drive(self, policy: Policy, batch: SceneBatch, obs: Observation) -> Plan:
        return policy.sample(obs, self.config.candidates, generator=generator_of(batch, self.seed))

    def draw(self) -> None:
        """The learning curve so far."""
        if self.run.is_main:
            draw_learning_curve(self.run.directory / METRICS, self.run.directory / "learning_curve.png")

    def summarise(self, steps: int, ended: str | None = None) -> None:
        """Write summary.json: what was measured of the best policy, and how the run ended if not after all steps."""
        best = self.best.read()
        told = (ended or f"{steps} steps") + (f", of which {best['step']} was the best: {self.best.folder / 'model'}" if best else "")
        if self.run.is_main:
            summary = {"result": told, "steps": steps, "metrics": best["metrics"] if best else {}}
            write_whole(self.run.directory / "summary.json", json.dumps(summary, indent=2) + "\n")


def blanked(obs: Observation) -> Observation:
    """What is seen when all images are black. Raises `ConfigError` where there are none."""
    if obs.images is None:
        raise ConfigError("validation.blanked: these scenes have no images")
    return dataclasses.replace(obs, images=torch.zeros_like(obs.images))


def _named(what: str, summary: Summary) -> dict[str, float]:
    return {f"{what}/{name}": value for name, value in means_of(summary).items()}
