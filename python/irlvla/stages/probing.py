"""The reward-hacking probe: candidates that climb a reward by its gradient, while the exact score tells what they are really worth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from irlvla.checkpoint import from_pretrained
from irlvla.components import Dataset, RewardModel, Spec, pluggable
from irlvla.errors import ConfigError, InputError
from irlvla.files import write_whole
from irlvla.plots import draw_hacking
from irlvla.registry import build
from irlvla.run import Run, RunConfig
from irlvla.scoring import HumanFilter, epdms
from irlvla.stages.batches import SceneBatch, checked, in_order, open_scenes
from irlvla.stages.features import FeatureCache, backbones_of, digest_of
from irlvla.types import Epdms, Observation, Plan, Scene, StateIndex, Trajectory

INTERVAL, POSES = 0.5, 8  # of the candidates [s]
YAW = 0.1  # rad/s that one step of a yaw rate is, beside 1 m/s^2 of an acceleration


class ProbeConfig(RunConfig):
    """Settings of `probe`."""

    data: Spec = pluggable("dataset", "scenes", description="scenes to probe in")
    saved_reward: str | None = Field(None, description="a saved reward: its folder, or its name on the Hub (owner/name)")
    reward: Spec | None = pluggable("reward_model", None, description="instead of a saved one: a reward by its name and settings")
    scenes: int = Field(32, ge=1, description="how many, the first where a human's drive is known")
    steps: int = Field(2000, ge=1, description="of gradient ascent")
    every: int = Field(50, ge=1, description="steps between exact scores")
    lr: float = Field(0.02, gt=0.0, description="of Adam, on accelerations [m/s^2] and yaw rates [0.1 rad/s]")
    human_filter: HumanFilter = Field("fixed", description="what a metric that the human fails means for plans, as in irlvla.epdms")


def probe(config: ProbeConfig) -> Path:
    """Let one candidate in each scene climb the reward; return the directory of the run, with probe.json, report.md and hacking.png.

    Candidates begin as the car drives on straight at constant speed. Of an ensemble three climb: one by its first member, one by the mean
    of the members, and one by its pessimistic values.

    Raises:
        ConfigError: not exactly one reward is given, or it gives no gradient with respect to plans.
        FileError: there is no such data or checkpoint.
        InputError: no human's drive is known in any scene.
    """
    model = _reward(config)
    batch = _first(open_scenes(config.data), config.scenes)
    with Run.start("probe", config) as run, contextlib.ExitStack() as stack:
        model.to(run.device).eval().requires_grad_(False)
        obs = batch.observation.to(run.device)
        with torch.no_grad():
            found = {digest_of(backbone): backbone(obs) for backbone in backbones_of(model)}
        for digest, features in found.items():
            stack.enter_context(FeatureCache(digest, [features]).serving(model, pictured=True))
        courses = _climb(run, config, model, batch)
        if run.is_main:
            _write(run.directory, courses, len(batch.rows))
    return run.directory


@dataclass
class Course:
    """What became of the candidates, by step: means over scenes."""

    steps: list[int] = field(default_factory=list)
    believed: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    unlike: list[float] = field(default_factory=list)  # share of plans unlike those of the training; empty where the reward does not tell


class Drives(nn.Module):
    """K drives in each of B scenes by their accelerations and yaw rates: whatever these are, they are smooth, and head where they go."""

    speed: Tensor

    def __init__(self, speed: Float[Tensor, " B"], count: int) -> None:
        super().__init__()
        self.register_buffer("speed", speed)
        self.controls = nn.Parameter(speed.new_zeros(len(speed), count, POSES, 2))

    def forward(self) -> Plan:
        """Poses "B K T 3"."""
        gain, turn = (self.controls * INTERVAL).cumsum(2).unbind(-1)
        step = (self.speed[:, None, None] + gain).clamp(min=0.0) * INTERVAL
        heading = functional.pad(turn * YAW, (1, 0))
        middle = (heading[..., 1:] + heading[..., :-1]) / 2.0
        poses = [(step * middle.cos()).cumsum(2), (step * middle.sin()).cumsum(2), heading[..., 1:]]
        return Plan(torch.stack(poses, -1), INTERVAL)


def _climb(run: Run, config: ProbeConfig, model: RewardModel, batch: SceneBatch) -> dict[str, Course]:
    """The candidates of all opinions climb at once; they do not see each other."""
    obs, scene = batch.observation.to(run.device), batch.scene.to(run.device)
    speed = obs.ego[:, -1, StateIndex.VX]
    names = list(_opinions(model(obs, scene, Drives(speed, 1)())))
    courses, drives = {name: Course() for name in names}, Drives(speed, len(names))
    optimizer = torch.optim.Adam(drives.parameters(), config.lr)
    with run.progress(config.steps, "probe") as progress:
        for step in range(config.steps + 1):
            plan = drives()
            opinions = _opinions(model(obs, scene, plan))
            believed = torch.stack([opinions[name].score()[:, column] for column, name in enumerate(names)], 1)
            if not believed.requires_grad:
                raise ConfigError(f"{model} gives no gradient with respect to plans, so nothing can climb it")
            if step % config.every == 0 or step == config.steps:
                _record(courses, step, believed.detach(), _unlike(model, obs, plan), batch, plan, config)
                run.log(step, {f"{name}/{what}": getattr(of, what)[-1] for name, of in courses.items() for what in ("believed", "exact")})
            if step < config.steps:
                optimizer.zero_grad()
                (-believed.sum()).backward()
                optimizer.step()
                progress.advance(believed=believed.mean())
    return courses


def _opinions(found: Epdms) -> dict[str, Epdms]:
    """By what candidates climb: of an ensemble its first member, the mean, and what it says itself."""
    members, mean = getattr(found, "members", None), getattr(found, "mean", None)
    if not members or mean is None:
        return {"reward": found}
    return {"one": members[0], "mean": Epdms(mean), "pessimistic": found}


def _record(
    courses: dict[str, Course],
    step: int,
    believed: Float[Tensor, "B K"],
    unlike: Float[Tensor, " K"] | None,
    batch: SceneBatch,
    plan: Plan,
    config: ProbeConfig,
) -> None:
    exact = epdms(batch.scene, Plan(plan.poses.detach().cpu(), plan.dt), human_filter=config.human_filter).score().mean(0)
    for column, course in enumerate(courses.values()):
        course.steps.append(step)
        course.believed.append(float(believed[:, column].mean()))
        course.exact.append(float(exact[column]))
        if unlike is not None:
            course.unlike.append(float(unlike[column]))


def _unlike(model: RewardModel, obs: Observation, plan: Plan) -> Float[Tensor, " K"] | None:
    """The share of plans unlike those of the training, over scenes and the members of an ensemble; None if it does not tell."""
    tell = getattr(model, "unsupported", None)
    if tell is None:
        return None
    with torch.no_grad():
        return tell(obs, plan).float().flatten(0, -2).mean(0)


def _reward(config: ProbeConfig) -> RewardModel:
    if (config.reward is None) == (config.saved_reward is None):
        raise ConfigError("give exactly one of reward and saved_reward; FIELD=null drops one")
    model = build("reward_model", config.reward) if config.saved_reward is None else from_pretrained(config.saved_reward)
    if not isinstance(model, RewardModel):
        raise ConfigError(f"saved_reward={config.saved_reward}: it is no reward but {model}")
    return model


def _first(dataset: Dataset, count: int) -> SceneBatch:
    """The first scenes where a human's drive is known."""
    found: list[SceneBatch] = []
    for batch in checked(in_order(dataset, count, 0)):
        found.append(batch.chosen(batch.human.poses.isfinite().flatten(1).all(1)))
        if sum(len(part.rows) for part in found) >= count:
            break
    rows, observations, scenes, drives = zip(*found, strict=True)
    batch = SceneBatch(torch.cat(rows), Observation.cat(observations), Scene.cat(scenes), Trajectory.cat(drives))
    if not len(batch.rows):
        raise InputError(f"{dataset} holds no scenes with a human's drive")
    return batch.chosen(torch.arange(len(batch.rows)) < count)


def _write(folder: Path, courses: dict[str, Course], scenes: int) -> None:
    """probe.json, report.md, hacking.png and summary.json."""
    write_whole(folder / "probe.json", json.dumps({name: asdict(course) for name, course in courses.items()}, indent=2) + "\n")
    draw_hacking({name: (course.steps, course.believed, course.exact) for name, course in courses.items()}, folder / "hacking.png")
    rows = [row for name, course in courses.items() for row in _rows(name, course)]
    head = f"# A search for what the reward overrates, in {scenes} scenes\n\nOne candidate in each climbs the reward by its gradient.\n\n"
    table = "| reward | step | believed | exact | gap | unlike those of the training |\n| --- | --- | --- | --- | --- | --- |\n"
    write_whole(folder / "report.md", head + table + "\n".join(rows) + "\n")
    last = {f"{name}/{what}": getattr(of, what)[-1] for name, of in courses.items() for what in ("believed", "exact")}
    metrics = {name: {"mean": value, "count": scenes} for name, value in last.items()}
    told = f"{next(iter(courses.values())).steps[-1]} steps of gradient ascent on candidates: {folder / 'report.md'}"
    write_whole(folder / "summary.json", json.dumps({"result": told, "metrics": metrics}, indent=2) + "\n")


def _rows(name: str, course: Course) -> Iterator[str]:
    for row, (step, believed, exact) in enumerate(zip(course.steps, course.believed, course.exact, strict=True)):
        unlike = f"{course.unlike[row]:.2f}" if course.unlike else "-"
        yield f"| {name} | {step} | {believed:.3f} | {exact:.3f} | {believed - exact:.3f} | {unlike} |"
