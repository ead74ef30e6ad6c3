"""Evaluation: several drivers in the same scenes, scored exactly, with how sure the numbers are."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from irlvla.components import Config, Metric, Spec, pluggable
from irlvla.errors import ConfigError, ContractError, IrlvlaError, did_you_mean
from irlvla.files import write_whole
from irlvla.leaderboard import read_mapping
from irlvla.pictures import failures
from irlvla.registry import build
from irlvla.report import SUMMARY, write_report
from irlvla.run import Run, RunConfig
from irlvla.scoring import Traffic, epdms
from irlvla.stages.batches import SceneBatch, loader, open_scenes
from irlvla.stages.caching import cached
from irlvla.stages.driving import Driver, DriverConfig, load_reward
from irlvla.stages.evaluation_data import Measured, Reading, StagedScenes, cause_of, read_each
from irlvla.stages.measurement import Record, gather, means_of, measure
from irlvla.stages.provenance import write_provenance
from irlvla.stages.results import Facts, write_results
from irlvla.types import STEPS, Plan, Scene


def _as_driver(value: Any) -> Any:
    """ "human" and "runs/imitate/checkpoints/best/model" as settings."""
    if isinstance(value, str):
        return {"policy" if "/" in value else "planner": value}
    return value


def _named(drivers: dict[str, Any]) -> dict[str, Any]:
    if not drivers:
        raise ValueError("must name at least one")
    if bad := [name for name in drivers if not re.fullmatch(r"\w[\w .,+()-]*", name)]:
        raise ValueError(f"a name is also that of files, and {bad[0]!r} cannot be; take letters, digits, spaces and .,+-()_")
    return drivers


class SecondStageConfig(Config):
    """The second stage of a two-stage benchmark."""

    data: Spec = pluggable("dataset", description="its scenes")
    mapping: Path = Field(description="which of them continue which pair of the first stage: a split of the devkit (YAML, JSON)")


class EvaluateConfig(RunConfig):
    """Settings of `evaluate`."""

    benchmark: Spec | None = pluggable("benchmark", None, description="a published comparison, which sets what is not set here")
    data: Spec = pluggable("dataset", description="scenes to drive in")
    second_stage: SecondStageConfig | None = Field(None, description="scenes that continue those, for two-stage totals; null = one stage")
    cache: Path | None = Field(None, description="folder where scenes are kept as shards, made once; null = made or read anew")
    policies: Annotated[dict[str, Annotated[DriverConfig, BeforeValidator(_as_driver)]], AfterValidator(_named)] = Field(
        description="who drives, by name: {policy: FOLDER}, {planner: human}, ...; a text alone is a planner, one with a / a saved policy"
    )
    baseline: str | None = Field(None, description="the policy that the others are compared with; null = the first")
    subject: str | None = Field(None, description="the policy whose improvements and failures are shown; null = the last")
    reward: Spec | None = pluggable("reward_model", None, description="a reward whose belief is compared with the exact score")
    saved_reward: str | None = Field(None, description="a saved one instead: its folder, or its name on the Hub")
    metrics: list[Spec] = pluggable("metric", ["displacement"], description="what is measured beside EPDMS and PDMS")
    traffic: Traffic = Field("log", description="how the other agents move, as in irlvla.epdms")
    resamples: int = Field(10_000, ge=100, description="of the bootstrap, for confidence intervals and p-values")
    gallery: int = Field(6, ge=0, description="how many improvements, and how many failures, the report shows")
    batch: int = Field(32, ge=1, description="scenes at once; of so many the latency is told")
    workers: int = Field(0, ge=0, description="processes that read the scenes; 0 = the main one")

    about: dict[str, str] = Field({}, description="what a benchmark says of itself, for who reads the results")

    may_change = RunConfig.may_change | {"workers", "cache", "resamples", "gallery", "subject", "baseline"}


def evaluate(config: EvaluateConfig) -> Path:
    """Drive in every scene; return the directory of the run.

    It holds report.html; summary.json (means with intervals, differences, failures); scores.csv (every value of every scene);
    official/NAME.csv and official/legacy/NAME.csv (the tables of the devkit, with both human filters); official/provenance.json (of what
    they are: benchmark, settings, versions); plans/NAME.safetensors (what was driven). A scene that fails is listed with its
    cause, and the others count. A run that was stopped goes on with the scenes that come next.

    Raises:
        ConfigError: the settings do not fit together, or name what is not there.
        ContractError: a component returns what it must not.
        FileError: there is no such data, checkpoint or file of plans.
        InputError: there are no scenes, or all of the first ones fail.
    """
    _require_names(config)
    scenes = _open(config)
    measurement = Measurement(config, len(scenes))
    with Run.start("evaluate", config) as run, torch.no_grad():
        run.restore()
        measurement.to(run.device)
        done = Measured(run, scenes)
        reader: Any = functools.partial(read_each, scenes)
        batches = run.prepare(loader(done.batches(config.batch), reader, config.workers))
        with run.progress(len(scenes), "evaluate", len(done.records)) as progress:
            for reading in batches:
                with run.autocast():
                    records = measurement(reading)
                progress.advance(done.add(gather(run, records)), failed=done.failed)
                done.require_success(config.policies)
        if run.is_main:
            summary = write_results(run.directory, done.in_order(), _facts(config, scenes), config.resamples, config.seed)
            run.log(len(scenes), _logged(summary))
            summary["provenance"] = write_provenance(run.directory, config, summary)
            write_report(run.directory, summary, scenes, config.gallery)
            write_whole(run.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return run.directory


def _logged(summary: Mapping[str, Any]) -> dict[str, float]:
    return {f"{name}/{column}": value for name, of in summary["policies"].items() for column, value in means_of(of["metrics"]).items()}


def _require_names(config: EvaluateConfig) -> None:
    for field, name in (("baseline", config.baseline), ("subject", config.subject)):
        if name is not None and name not in config.policies:
            near = did_you_mean(name, config.policies)
            raise ConfigError(f"{field}: no policy is named {name!r}. {near}Named: {', '.join(config.policies)}")


def _open(config: EvaluateConfig) -> StagedScenes:
    second = config.second_stage
    stages = [open_scenes(cached(spec, config.cache)) for spec in (config.data, *([second.data] if second else []))]
    return StagedScenes(stages, read_mapping(second.mapping) if second else {})


def _facts(config: EvaluateConfig, scenes: StagedScenes) -> Facts:
    names = list(config.policies)
    sources = {name: settings.model_dump(mode="json", exclude_defaults=True) for name, settings in config.policies.items()}
    return Facts(sources, config.baseline or names[0], config.subject or names[-1], config.batch, scenes.mapping, scenes.first)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Measurement:
    """Everything that is measured of every driver in a batch of scenes."""

    def __init__(self, config: EvaluateConfig, scenes: int) -> None:
        self.config = config
        self.drivers = {name: _driver(name, settings, scenes, config.seed) for name, settings in config.policies.items()}
        self.metrics: list[Metric] = [build("metric", spec) for spec in config.metrics]
        self.reward = load_reward(config.reward, config.saved_reward)
        self.warm = set[str]()

    def to(self, device: torch.device) -> None:
        """Move what computes to a device, and make it ready."""
        for driver in self.drivers.values():
            driver.to(device)
        if self.reward is not None:
            self.reward.to(device).eval()

    def __call__(self, reading: Reading) -> list[Record]:
        """A record for each scene, with what each driver did there, or why it failed."""
        records, batch = list(reading.unread), reading.batch
        if batch is None:
            return records
        found = {name: self._attempt(name, batch) for name in self.drivers}
        for i, row in enumerate(batch.rows.tolist()):
            records.append({"row": row, **_facts_of(batch.scene[i]), "policies": {name: of[i] for name, of in found.items()}})
        return records

    def _attempt(self, name: str, batch: SceneBatch) -> list[Record]:
        """What a driver does in each scene; where it fails, the scenes are tried one by one."""
        try:
            return self._measure(name, batch)
        except ContractError as error:
            raise ContractError(f"policies.{name}: {error}") from error
        except Exception as error:
            if len(batch.rows) == 1:
                return [{"error": cause_of(error)}]
        alone = torch.eye(len(batch.rows), dtype=torch.bool, device=batch.rows.device)
        return [record for mask in alone for record in self._attempt(name, batch.chosen(mask))]

    def _measure(self, name: str, batch: SceneBatch) -> list[Record]:
        plan, seconds = self._drive(name, batch)
        best = plan.best()
        driven = Plan(best.poses[:, None], best.dt)
        far = batch.scene.agent_state.shape[1] > STEPS
        result = epdms(batch.scene, driven, traffic=self.config.traffic, human_filter="fixed", details=True, pdms=far)
        believed = None if self.reward is None else self.reward(batch.observation, batch.scene, driven).values
        others = measure(self.metrics, batch, plan)
        return [
            {
                "values": result.values[i, 0].tolist(),
                "raw": cast(Tensor, result.raw)[i, 0].tolist(),
                "pdms": None if result.pdms is None else result.pdms.values[i, 0].tolist(),
                "believed": None if believed is None else believed[i, 0].tolist(),
                "metrics": {metric: value for metric, value in others[i].items() if metric not in ("row", "token")},
                "causes": "; ".join(map(str, failures(batch.scene[i], result[i : i + 1], 0))),
                "poses": best.poses[i].double().tolist(),
                "dt": best.dt,
                "seconds": seconds / len(batch.rows),
            }
            for i in range(len(batch.rows))
        ]

    def _drive(self, name: str, batch: SceneBatch) -> tuple[Plan, float]:
        """Plans, and the seconds that they took. The first call prepares much, so it is made twice."""
        for _ in range(1 if name in self.warm else 2):
            _wait_for(batch.rows.device)
            began = time.perf_counter()
            plan = self.drivers[name](batch)
            _wait_for(batch.rows.device)
        self.warm.add(name)
        return plan, time.perf_counter() - began


def _driver(name: str, settings: DriverConfig, scenes: int, seed: int) -> Driver:
    try:
        return Driver(settings, scenes, seed)
    except IrlvlaError as error:
        raise type(error)(f"policies.{name}: {error}") from error


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _facts_of(scene: Scene) -> Record:
    """What the totals need of a scene."""
    names = ("time_us", "ego", "previous_time_us", "previous_ego")
    return {"token": scene.token[0], **{name: getattr(scene, name)[0].tolist() for name in names}}
