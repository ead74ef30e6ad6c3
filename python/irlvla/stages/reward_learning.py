"""Stage 2: a reward world model learns what plans are worth, from exact labels and from the fact that people drive as they do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from irlvla.candidates import CandidateConfig
from irlvla.checkpoint import from_pretrained, save_pretrained
from irlvla.components import Config, Policy, RewardModel, Spec, pluggable
from irlvla.errors import ConfigError
from irlvla.files import write_whole
from irlvla.registry import installed
from irlvla.run import Run, TrainingConfig
from irlvla.scoring import HumanFilter
from irlvla.stages.batches import checked, loader, open_scenes
from irlvla.stages.caching import cached
from irlvla.stages.labelling import Clock, LabelledBatch
from irlvla.stages.optimization import Learner, OptimizerConfig, Pace, count_steps, make_optimizer, make_schedule, train
from irlvla.stages.reward_data import TUNING, RewardData, remembered
from irlvla.stages.reward_report import ReportConfig, blinded, predict, throughput, values_of, write_report
from irlvla.stages.reward_statistics import Comparison
from irlvla.types import Epdms, Plan, StateIndex

Calibration = dict[str, tuple[float, float]]  #: by metric: negative log-likelihood per candidate before and after

SUPPORT_BATCHES = 64  # of the training, at most, that show which plans are usual


class RewardDataConfig(Config):
    """Which scenes."""

    train: Spec = pluggable("dataset", description="scenes to learn from")
    validation: Spec | None = pluggable("dataset", None, description="held-out scenes to watch, to calibrate and to report on; null = none")
    unseen: Spec | None = pluggable("dataset", None, description="scenes on roads of other kinds, for the report alone")


class InverseConfig(Config):
    """The inverse-RL term: the human's drive is worth more than the other candidates."""

    kind: Literal["maximum_entropy", "ranking"] = Field(
        "maximum_entropy", description="the human's is drawn by a softmax over the scores; or it is above each other one (logistic)"
    )
    weight: float = Field(0.05, ge=0.0, description="of the term; 0 = labels alone")
    temperature: float = Field(0.1, gt=0.0, description="difference of scores that makes e times as likely")


class RewardValidationConfig(Config):
    """How the reward is watched while it learns."""

    every: int = Field(500, ge=1, description="steps between validations; a checkpoint follows each")
    batch: int = Field(16, ge=1, description="scenes at once")
    scenes: int = Field(100, ge=1, description="the first of the held-out scenes, at most half of them: the report is of the others")
    best: str = Field("spearman", description="the value that is highest for the best checkpoint")


class RewardConfig(TrainingConfig):
    """Settings of `reward`."""

    data: RewardDataConfig
    cache: Path | None = Field(None, description="folder where scenes, and what a frozen backbone sees of them, are kept, for all runs")
    reward: Spec = pluggable("reward_model", description="what learns")
    remember: bool = Field(True, description="let a frozen backbone look at each scene once, and keep what it saw, in `cache` or in memory")
    policy: str | None = Field(None, description="a saved policy, whose plans and steps to them become candidates: folder, or owner/name")
    proposals: int = Field(6, ge=1, description="plans of the policy in each scene")
    proposal_share: float = Field(0.25, ge=0.0, le=1.0, description="of the candidates that are learned from, those of the policy")
    candidates: CandidateConfig = CandidateConfig.model_validate({})
    keep_candidates: int = Field(24, ge=10, description="of those made in a scene so many are learned from, rare failures among them")
    vocabulary: int = Field(1024, ge=1, description="drives of people that candidates are taken from, the centres of a K-means")
    drives: int = Field(4096, ge=1, description="drives of people that they are the centres of")
    human_filter: HumanFilter = Field("fixed", description="what a metric that the human fails means for plans, as in irlvla.epdms")
    hard: float = Field(0.5, ge=0.0, le=1.0, description="share of scenes drawn by how much it matters there what one does; else all alike")
    inverse: InverseConfig = InverseConfig.model_validate({})
    steps: int | None = Field(None, ge=1, description="of the optimizer; or give epochs")
    epochs: float | None = Field(None, gt=0.0, description="how often each scene is seen on average; instead of steps")
    batch: int = Field(16, ge=1, description="scenes at once, in each process")
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({})
    ema: float = Field(
        0.999, ge=0.0, lt=1.0, description="decay of the moving average of the weights, which is what is validated and saved"
    )
    validation: RewardValidationConfig = RewardValidationConfig.model_validate({})
    support: float = Field(0.99, gt=0.0, lt=1.0, description="share of the plans of the training that count as usual")
    report: ReportConfig = ReportConfig.model_validate({})
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    workers: int = Field(0, ge=0, description="processes that read, make and label; 0 = the main one")

    may_change = TrainingConfig.may_change | {"workers", "cache"}


def reward(config: RewardConfig) -> Path:
    """Train a reward on labelled candidates; return the directory of the run.

    In the end the best of its moving averages is calibrated on scenes that it has not learned from, learns which plans are usual, is
    saved to `model`, and is evaluated on scenes that nothing was chosen by: report.md, report.json and pictures. Beside them are the
    newest checkpoints, the best (checkpoints/best/model), metrics.jsonl, learning_curve.png and summary.json.

    A reward model learns if it has a `loss`. If it has `calibrate(predicted, measured)` and `fit_support(plan, speed, quantile)`, these
    are called too; see `irlvla.zoo.rewards.world_model`. Every process evaluates all scenes, so that none waits for another.

    Raises:
        ConfigError: the settings do not fit together, or name what is not there.
        ContractError: a component returns what it must not.
        DivergedError: a loss or the gradient is not finite. The weights before that step are saved.
        FileError: there is no such data or checkpoint.
        InputError: a dataset holds no scenes, or no drives of people.
    """
    specs = {name: cached(spec, config.cache) for name, spec in config.data if spec is not None}
    torch.manual_seed(config.seed)
    learner = RewardLearning(installed().build("reward_model", config.reward), config)
    optimizer = make_optimizer(learner.model, config.optimizer)
    policies = [None if source is None else _policy(source) for source in (config.policy, config.report.policy or config.policy)]
    with Run.start("reward", config) as run:
        with remembered(run, config, specs, learner, policies) as images:
            data = RewardData(run, config, specs, policies, images)
            steps = _learn(run, config, learner, optimizer, data)
            finished, calibration = _finish(run, config, learner, data)
            names = sorted(data.held_out.keys() - {TUNING})
            sections = {name: predict(finished, data.evaluation(name), run).comparison for name in names}
        more = {"calibration": calibration} | _looked_at(run, config, specs, finished, data)
        if run.is_main:
            if sections:
                write_report(run.directory, sections, more)
            _summarise(run, data, steps, sections.get("validation"))
    return run.directory


def _learn(run: Run, config: RewardConfig, learner: RewardLearning, optimizer: Optimizer, data: RewardData) -> int:
    """Train; return how many steps that took."""
    per_step = config.accumulate * len(run.gather(torch.zeros(1, device=run.device)))  # batches, of all processes
    steps = count_steps(config.steps, config.epochs, len(data.train), per_step * config.batch)
    schedule = make_schedule(optimizer, config.optimizer, steps)
    prepared = run.prepare(learner, optimizer, schedule)
    first = run.restore()
    pace, clock = Pace(per_step * config.batch), Clock(apart=config.workers > 0)
    labelled = loader(range(first * per_step, steps * per_step), data.batches, config.workers)
    batches = clock.watched(checked(run.prepare(labelled)))
    with run.progress(steps, "reward", first) as progress:
        for step, values in train(run, learner, prepared, batches, range(first + 1, steps + 1), config.optimizer.clip):
            pace.step()
            ends = step == steps or step % config.validation.every == 0
            if ends or step % config.log_every == 0:
                values |= {"charts/label_share": clock.share(), "charts/samples_per_second": pace.rate()}
                with pace.paused():
                    run.log(step, values | (data.validate(step, learner.result) if ends else {}))
                    if ends:
                        run.save(step, learner.result)
                        data.draw()
                clock.restart()
            progress.advance(loss=values["losses/total"], **data.shown)
    return steps


def _finish(
    run: Run, config: RewardConfig, learner: RewardLearning, data: RewardData
) -> tuple[RewardModel, dict[str, tuple[float, float]]]:
    """The best model, calibrated, which knows its support; it is saved. And how likely held-out labels are before and after."""
    model = learner.result
    if TUNING in data.held_out:
        model.load_state_dict(cast(nn.Module, from_pretrained(data.best.folder / "model")).state_dict())
    calibration: Calibration = {}
    if TUNING in data.held_out and (calibrate := getattr(model, "calibrate", None)) is not None:
        found = predict(model, data.evaluation(TUNING), run)
        calibration = calibrate(found.predicted, found.measured)
    if (fit_support := getattr(model, "fit_support", None)) is not None:
        count = min(SUPPORT_BATCHES, -(-len(data.train) // config.batch))
        seen = list(checked(loader(range(count), data.batches, config.workers)))
        poses = torch.cat([batch.plan.poses for batch in seen]).to(run.device)
        speed = torch.cat([batch.scenes.observation.ego[:, -1, StateIndex.VX] for batch in seen]).to(run.device)
        fit_support(Plan(poses, seen[0].plan.dt), speed, config.support)
    if run.is_main:
        save_pretrained(model, run.directory / "model")
    return model, calibration


def _looked_at(run: Run, config: RewardConfig, specs: dict[str, Spec], model: RewardModel, data: RewardData) -> dict[str, Any]:
    """What is reported with images: what the reward knows by looking, and how quick it is."""
    if "validation" not in data.held_out:
        return {}
    batches = data.held_out["validation"]
    scenes: Any = dataclasses.replace(batches.scenes, dataset=open_scenes(specs["validation"]))  # type: ignore[type-var]
    count = -(-min(config.report.blind, len(scenes.rows)) // scenes.batch)
    shown = list(checked(loader(range(max(1, count)), dataclasses.replace(batches, scenes=scenes), config.workers)))
    found: dict[str, Any] = {"throughput": throughput(model, shown[0], run)}
    if config.report.blind and (blind := blinded(model, shown, run)):
        found["blind"] = blind
    return found


def _summarise(run: Run, data: RewardData, steps: int, found: Comparison | None) -> None:
    """Write summary.json: what the report says of held-out scenes."""
    best, values = data.best.read(), {} if found is None else values_of(found)
    told = f"{steps} steps" + (f", of which {best['step']} was the best" if best else "") + f": {run.directory / 'model'}"
    metrics = {name: {"mean": value, "count": 0 if found is None else len(found)} for name, value in values.items()}
    write_whole(run.directory / "summary.json", json.dumps({"result": told, "steps": steps, "metrics": metrics}, indent=2) + "\n")


# -- what learns -------------------------------------------------------------------------------------------------------


class RewardLearning(Learner):
    """A reward that learns from labels, and from people."""

    model: RewardModel

    def __init__(self, model: RewardModel, config: RewardConfig) -> None:
        super().__init__(model, config.ema)
        self.inverse = config.inverse

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """The losses of the reward against labels, and the inverse-RL term."""
        predicted = self.model(batch.scenes.observation, batch.scenes.scene, batch.plan)
        losses = dict(self.model.loss(predicted, batch.labels))
        if self.inverse.weight:
            opinions: Sequence[Epdms] = getattr(predicted, "members", None) or [predicted]  # of an ensemble each member's
            terms = [inverse_loss(opinion.score(), self.inverse.kind, self.inverse.temperature) for opinion in opinions]
            losses["inverse"] = self.inverse.weight * torch.stack(terms).mean()
        return losses


def inverse_loss(score: Float[Tensor, "B K"], kind: str, temperature: float) -> Float[Tensor, ""]:
    """How unlikely it is that people drive as they do, candidate 0, if they drive by this score; mean over scenes.

    Maximum entropy (Ziebart et al., AAAI 2008): the human's drive is drawn among the candidates by a softmax. Ranking: it is
    preferred to each other one (Bradley and Terry, 1952), mean over these.
    """
    if score.shape[1] < 2:
        return 0.0 * score.sum()
    score = score / temperature
    if kind == "maximum_entropy":
        return -functional.log_softmax(score, 1)[:, 0].mean()
    return functional.softplus(score[:, 1:] - score[:, :1]).mean()


def _policy(source: str) -> Policy:
    policy = from_pretrained(source)
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy={source}: it is no policy but {policy}")
    return policy.requires_grad_(False)
