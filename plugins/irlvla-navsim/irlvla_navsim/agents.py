"""NAVSIM agents as planners: a published agent drives here, given what the devkit gives it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

import irlvla
from irlvla import ConfigError, ContractError, Features, InputError, Plan, Trajectory
from irlvla_navsim.inputs import RecordedInputs, input_of


class NavsimAgentPlanner(irlvla.Planner):
    """An agent of NAVSIM's devkit (a class with `initialize` and `compute_trajectory`), which drives here and is not trained.

    With the folders of the data it gets what the devkit gives it: the images as they were recorded, and the lidar. Without them it
    gets what a policy gets here: its own state, and the images of the present, undistorted and scaled.
    """

    class Config(irlvla.Config):
        agent: str = Field(description="its class: package.module:Class")
        settings: dict[str, Any] = Field({}, description="what it is built with; objects as the devkit writes them, with _target_")
        logs: Path | None = Field(None, description="navsim_logs/SPLIT, to read its input from; null = from what policies see here")
        sensors: Path | None = Field(None, description="sensor_blobs/SPLIT, of the logs")
        scenes: Path | None = Field(None, description="synthetic_scene_pickles, of a second stage")
        scene_sensors: Path | None = Field(None, description="sensor_blobs of the second stage")

    def __init__(self, config: Any, *, width: int) -> None:
        """Raises `ConfigError` if there is no such agent, or it rejects its settings, and `ContractError` if it is none."""
        super().__init__(config)
        agent = _built(config.agent, config.settings)
        for method in ("initialize", "get_sensor_config", "compute_trajectory"):
            if not callable(getattr(agent, method, None)):
                raise ContractError(f"agent {config.agent} has no method {method}(); an agent of NAVSIM has one")
        if getattr(agent, "requires_scene", False):
            raise ContractError(f"agent {config.agent} requires the truth of the scene (requires_scene), which no agent is given here")
        try:
            agent.initialize()
        except Exception as error:
            raise ConfigError(f"agent {config.agent}: initialize() fails: {type(error).__name__}: {error}") from error
        self.agents = (agent,)  # in a tuple: torch must not take it for a part of this module, to move or to save
        folders = (config.logs, config.sensors, config.scenes, config.scene_sensors)
        self.recorded = RecordedInputs(*folders) if config.logs or config.scenes else None

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        return {}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        obs = features.observation
        found = [self._drive(obs[i : i + 1]) for i in range(len(obs))]
        if len(shapes := {(poses.shape, dt) for poses, dt in found}) > 1:
            raise ContractError(f"agent {self.config.agent} returns trajectories of several samplings: {sorted(map(str, shapes))}")
        poses = torch.from_numpy(np.stack([poses for poses, _ in found])).to(obs.ego.device)
        return Plan(poses[:, None].expand(-1, k, -1, -1).contiguous(), dt=found[0][1])

    def _drive(self, obs: irlvla.Observation) -> tuple[np.ndarray, float]:
        """Poses "T 3" and the seconds between them, in one scene."""
        (agent,), name, token = self.agents, self.config.agent, obs.token[0]
        wanted = agent.get_sensor_config()
        given = input_of(obs, wanted) if self.recorded is None else self.recorded.read(token, wanted)
        try:
            trajectory = agent.compute_trajectory(given)
        except Exception as error:
            raise InputError(f"agent {name} fails in scene {token}: {type(error).__name__}: {error}") from error
        poses, dt = _poses(trajectory, name)
        if not np.isfinite(poses).all():
            raise InputError(f"agent {name} returns poses that are NaN or infinite in scene {token}")
        return poses, dt


def _poses(trajectory: Any, name: str) -> tuple[np.ndarray, float]:
    try:
        poses = np.asarray(trajectory.poses.detach().cpu() if isinstance(trajectory.poses, Tensor) else trajectory.poses, np.float32)
        dt = float(trajectory.trajectory_sampling.interval_length)
    except (AttributeError, TypeError, ValueError) as error:
        raise ContractError(
            f"agent {name} must return a Trajectory, with poses (T, 3) and trajectory_sampling.interval_length; it returns "
            f"{type(trajectory).__name__}: {error}"
        ) from error
    if poses.ndim != 2 or poses.shape[1] != 3:
        raise ContractError(f"agent {name} must return poses of shape (T, 3), got {poses.shape}")
    return poses, dt


def _built(target: str, settings: Mapping[str, Any]) -> Any:
    """An object of a class that is written as "package.module:Class" or "package.module.Class"."""
    module, _, name = target.replace(":", ".").rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None) or ""
        hint = ". It is written for the devkit, which is not installed here" if missing.partition(".")[0] in ("navsim", "nuplan") else ""
        raise ConfigError(f"agent {target} cannot be imported: {type(error).__name__}: {error}{hint}") from error
    try:
        return made(**{field: _value(value) for field, value in settings.items()})
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"agent {target} cannot be built from {dict(settings)!r:.200}: {type(error).__name__}: {error}") from error


def _value(value: Any) -> Any:
    """A setting; one with `_target_` is an object, as hydra has it."""
    if isinstance(value, Mapping):
        inner = {name: item for name, item in value.items() if name not in ("_target_", "_convert_")}
        return _built(value["_target_"], inner) if "_target_" in value else {name: _value(item) for name, item in inner.items()}
    return [_value(item) for item in value] if isinstance(value, list) else value
