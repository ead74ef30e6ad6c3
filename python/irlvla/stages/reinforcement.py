"""Stage 3: the policy improves against a reward, learned or exact, while the exact score watches."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from irlvla.checkpoint import from_pretrained
from irlvla.components import Algorithm, Dataset, Policy, RewardModel, Spec, pluggable
from irlvla.errors import ConfigError, InputError, IrlvlaError
from irlvla.registry import build, installed
from irlvla.run import Run, TrainingConfig
from irlvla.stages.auditing import Audit, AuditConfig, Patience, Refit, RefitConfig
from irlvla.stages.batches import SceneBatch, open_scenes, read, without_images
from irlvla.stages.caching import cached
from irlvla.stages.driving import load_reward
from irlvla.stages.features import is_frozen, remembering, seeing
from irlvla.stages.floors import Floors, FloorsConfig
from irlvla.stages.imitation import DataConfig, ValidationConfig
from irlvla.stages.optimization import DivergedError, OptimizerConfig, averaged, lost_at, make_optimizer, make_schedule
from irlvla.stages.rollouts import Clock, Difficulty, Judge, draw, rewards, rollout_of
from irlvla.types import Epdms, Rollout

#: How the steps of a planner explore, by where it comes from: settings of the chain planners (diffusion, flow).
EXPLORATION: dict[str, dict[str, Any]] = {
    "planner": {},  # as it was saved
    "dppo": {"noise": "additive", "min_sampling_std": 0.1, "min_logprob_std": 0.1, "noise_clip": 3.0},
    "diffusiondrivev2": {"noise": "multiplicative", "min_sampling_std": 0.04, "min_logprob_std": 0.1, "noise_clip": None},
    "recogdrive": {"noise": "additive", "min_sampling_std": 0.04, "min_logprob_std": 0.1, "noise_clip": 3.0},
}


class ReinforceConfig(TrainingConfig):
    """Settings of `reinforce`."""

    data: DataConfig
    cache: Path | None = Field(None, description="folder where scenes and their features are kept, made once; null = features in memory")
    policy: str = Field(description="a saved policy to begin with: its folder, or its name on the Hub")
    reward: Spec | None = pluggable("reward_model", None, description="what is raised: exact, world_model, ensemble, mix; or saved_reward")
    saved_reward: str | None = Field(None, description="a saved reward model instead: its folder, or its name on the Hub")
    algorithm: Spec = pluggable("rl_algorithm", "ppo", description="how the policy improves")
    exploration: Literal["planner", "dppo", "diffusiondrivev2", "recogdrive"] = Field(
        "planner", description="noise and floors of the planner's steps: as it was saved, or of a publication"
    )
    planner: dict[str, Any] = Field({}, description="other settings of the planner that change: {min_sampling_std: 0.05}")
    train_backbone: bool = Field(False, description="improve what the policy sees, too; false = the planner alone")
    cache_features: bool = Field(True, description="let what is frozen look at each scene once, before the first step")
    steps: int = Field(300, ge=1, description="rollouts, each followed by an update")
    batch: int = Field(32, ge=1, description="scenes at once; a rollout has `accumulate` times as many")
    candidates: int = Field(20, ge=1, description="plans per scene (K)")
    hard: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="share of the scenes that are drawn by how badly the policy drives there; WorldEngine: hard ones help",
    )
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({"lr": 5e-4, "warmup": 10, "weight_decay": 0.0, "final": 0.1})
    ema: float = Field(
        0.0, ge=0.0, lt=1.0, description="decay of the moving average of the policy, which is what is validated and saved; 0 = the policy"
    )
    audit: AuditConfig = AuditConfig.model_validate({})
    floors: FloorsConfig | None = Field(
        None, description="no sub-metric falls far below what it is at the start: {fall: 0.01}; null = the score alone counts"
    )
    refit: RefitConfig | None = Field(None, description="let the reward model learn from the policy's plans: {every: 20}; null = no")
    validation: ValidationConfig = ValidationConfig.model_validate({"every": 50})
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    workers: int = Field(0, ge=0, description="processes that read the held-out scenes; 0 = the main one")

    may_change = TrainingConfig.may_change | {"workers", "cache"}


def reinforce(config: ReinforceConfig) -> Path:
    """Improve a saved policy by a reward; return the directory of the run.

    Each step draws plans in some scenes, rewards them, and updates the policy. What the reward believes is compared with the exact
    score all the time; where it believes too much of held-out scenes for too long, the run stops. The directory holds the newest
    checkpoints, the best by the exact score (checkpoints/best/model), metrics.jsonl, learning_curve.png and summary.json. What is
    validated and saved is the moving average of the policy, if there is one; the policy itself draws the plans.

    Raises:
        ConfigError: the settings do not fit together, or name what is not there.
        ContractError: a component returns what it must not.
        DivergedError: a loss is not finite. The weights before that step are those of the last checkpoint.
        FileError: there is no such data, policy, reward or checkpoint.
        InputError: a dataset holds no scenes, or the planner has no log_prob.
    """
    if config.precision == "fp16":
        raise ConfigError("precision=fp16: an algorithm makes its own steps, without the scaled gradients of fp16. Accepted here: no, bf16")
    torch.manual_seed(config.seed)
    policy, reward = _policy_of(config), _reward_of(config)
    algorithm: Algorithm = build("rl_algorithm", config.algorithm, width=policy.backbone.width)
    specs = {name: cached(spec, config.cache) for name, spec in config.data if spec is not None}
    blind = config.cache_features and all(is_frozen(module) for module in seeing(policy, reward))
    datasets = {name: open_scenes(without_images(spec) if blind else spec) for name, spec in specs.items()}
    judge = Judge(reward, config.audit.share)
    difficulty, floors = Difficulty(len(datasets["train"]), config.hard), Floors(config.floors, policy, judge)
    learner = Learner(policy, config.ema, algorithm, difficulty, floors, Patience(config.audit))
    optimizer = make_optimizer(learner, config.optimizer)
    with Run.start("reinforce", config) as run:
        _require_one_process(run)
        schedule = make_schedule(optimizer, config.optimizer, config.steps)
        learner, optimizer, schedule = run.prepare(learner, optimizer, schedule)
        reward.to(run.device)
        floors.first.to(run.device)
        refit = None if config.refit is None else Refit(run, config.refit, judge)
        audit = Audit(run, config, datasets.get("validation"), judge, learner.patience, learner.floors)
        first = run.restore()
        done = first
        models = [learner, floors.first, reward]
        with remembering(models, list(specs.values()), config.cache, run, config.workers) if blind else nullcontext():
            if first == 0:
                run.log(0, audit.references() | audit.measure(0, learner.result))
            with run.progress(config.steps, "reinforce", first) as progress:
                for step in range(first + 1, config.steps + 1):
                    if learner.patience.lost:
                        break
                    done = step
                    values = _iterate(run, config, step, learner, optimizer, datasets["train"], judge, refit)
                    values["charts/learning_rate"] = max(schedule.get_last_lr())
                    schedule.step()
                    ends = step == config.steps or step % config.validation.every == 0
                    if ends:
                        values |= audit.measure(step, learner.result)
                    if ends or step % config.log_every == 0:
                        run.log(step, values)
                    if ends:
                        run.save(step, learner.result)
                        audit.draw()
                    progress.advance(reward=values["reward/believed"], **audit.shown)
        audit.summarise(done)
    return run.directory


def _iterate(
    run: Run,
    config: ReinforceConfig,
    step: int,
    learner: Learner,
    optimizer: Any,
    dataset: Dataset,
    judge: Judge,
    refit: Refit | None,
) -> dict[str, float]:
    """One rollout and one update. Returns what to log."""
    clock, drawn, believed, exact = Clock(), [], [], []
    watched = step % config.audit.every == 0 or (refit is not None and refit.due(step))
    rows = learner.difficulty.draw(config.batch * config.accumulate, config.seed, step)
    for part in range(config.accumulate):
        with clock("sampling"):
            batch = _scenes(run, dataset, rows[part * config.batch :][: config.batch])
            with run.autocast():
                drawn.append(draw(learner.policy, batch, config.candidates, run.generator(step * config.accumulate + part)))
        _, obs, scene, _ = batch
        plan = drawn[-1].plan
        with clock("reward"), run.autocast():
            believed.append(judge.believe(obs, scene, plan))
        if watched:
            with clock("audit"):
                exact.append(judge.audit(obs, scene, plan, believed[-1]))
        learner.difficulty.see(batch.rows, plan, believed[-1].score())
    with clock("floors"), run.autocast():
        floors = learner.floors.see(learner.policy, drawn[-1].batch, config.candidates, config.seed)
    with clock("update"), run.autocast():
        rollouts = [rollout_of(one, worth, learner.floors.reward(worth)) for one, worth in zip(drawn, believed, strict=True)]
        rollout = rollouts[0] if len(rollouts) == 1 else Rollout.cat(rollouts)
        values = learner.algorithm.update(learner.policy, optimizer, rollout)
        learner.average.update_parameters(learner.policy)
    if lost := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise lost_at(step, DivergedError(", ".join(lost)), None)
    if refit is not None and refit.due(step):
        with clock("refit"), run.autocast():
            values |= refit.learn(drawn)
    found = {f"reward/{name}": value for name, value in _mean_rewards(believed, exact).items()}
    plans = rollout.reward.numel() / clock.spent.total()
    times = {f"charts/{name}": value for name, value in clock.shares().items()}
    return values | found | floors | times | {"charts/rollouts_per_second": plans}


def _scenes(run: Run, dataset: Dataset, rows: list[int]) -> SceneBatch:
    batch = read(dataset, rows)
    if isinstance(batch, IrlvlaError):
        raise batch
    numbers, obs, scene, human = batch
    return SceneBatch(numbers.to(run.device), obs.to(run.device), scene.to(run.device), human.to(run.device))


def _mean_rewards(believed: list[Epdms], exact: list[Epdms]) -> dict[str, float]:
    """`rewards` of all parts of a rollout, which are of the same size."""
    found = [rewards(one, exact[i] if exact else None) for i, one in enumerate(believed)]
    return {name: math.fsum(part[name] for part in found) / len(found) for name in found[0] if all(name in part for part in found)}


# -- who learns, and from whom -----------------------------------------------------------------------------------------


class Learner(nn.Module):
    """All that is saved to resume: the policy and its moving average, the algorithm with its critic, what is hard, what must not fall,
    and for how long the gap is too large."""

    def __init__(
        self, policy: Policy, decay: float, algorithm: Algorithm, difficulty: Difficulty, floors: Floors, patience: Patience
    ) -> None:
        super().__init__()
        self.policy, self.average = policy, averaged(policy, decay)
        self.algorithm, self.difficulty, self.floors, self.patience = algorithm, difficulty, floors, patience

    @property
    def result(self) -> Policy:
        """What is validated and saved."""
        return cast(Policy, self.average.module)


def _policy_of(config: ReinforceConfig) -> Policy:
    """The saved policy, with what changes of its planner; in eval mode, so that a step has one probability."""
    policy = from_pretrained(config.policy)
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy={config.policy} holds no policy but {policy}")
    if policy.planner.log_prob is None:
        raise InputError(f"policy={config.policy}: {policy.planner} has no log_prob, so it imitates but cannot be reinforced")
    if changed := EXPLORATION[config.exploration] | config.planner:
        spec = {"name": installed().entry_of(policy.planner).name, **policy.planner.config.model_dump(mode="json"), **changed}
        planner = build("planner", spec, width=policy.backbone.width)
        try:
            planner.load_state_dict(policy.planner.state_dict())
        except RuntimeError as error:
            raise ConfigError(f"planner={config.planner}: the saved weights do not fit a planner with these settings. {error}") from error
        policy.planner = planner
    for module in seeing(policy):
        module.requires_grad_(config.train_backbone)
    return policy.eval()


def _reward_of(config: ReinforceConfig) -> RewardModel:
    """The reward model of a configuration. What it learns when it is refitted are its heads: what it sees stays."""
    reward = load_reward(config.reward, config.saved_reward)
    if reward is None:
        raise ConfigError("give a reward: `reward` by its name (reward=exact), or `saved_reward`, the folder of a saved one")
    for parameter in reward.parameters():
        parameter.requires_grad_(config.refit is not None)
    for module in seeing(reward):
        module.requires_grad_(False)
    return reward.eval()


def _require_one_process(run: Run) -> None:
    if (count := len(run.gather(torch.zeros(1, device=run.device)))) > 1:
        raise ConfigError(f"launched as {count} processes; an algorithm makes its own steps, in one. Start it with `irlvla reinforce`")
