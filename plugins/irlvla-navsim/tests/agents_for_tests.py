"""Agents in the manner of the devkit's, without it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class TrajectorySampling:
    """As nuPlan's."""

    time_horizon: float = 4.0
    interval_length: float = 0.5

    @property
    def num_poses(self) -> int:
        return round(self.time_horizon / self.interval_length)


@dataclass
class Trajectory:
    """As NAVSIM's."""

    poses: np.ndarray
    trajectory_sampling: TrajectorySampling


@dataclass
class SensorConfig:
    """As NAVSIM's."""

    cam_f0: bool | list[int] = False
    cam_l0: bool | list[int] = False
    cam_l1: bool | list[int] = False
    cam_l2: bool | list[int] = False
    cam_r0: bool | list[int] = False
    cam_r1: bool | list[int] = False
    cam_r2: bool | list[int] = False
    cam_b0: bool | list[int] = False
    lidar_pc: bool | list[int] = False


class AbstractAgent(torch.nn.Module):
    """As NAVSIM's."""

    def __init__(self, trajectory_sampling: TrajectorySampling, requires_scene: bool = False) -> None:
        super().__init__()
        self.requires_scene, self._trajectory_sampling = requires_scene, trajectory_sampling

    def get_sensor_config(self) -> Any:
        return SensorConfig()

    def compute_trajectory(self, agent_input: Any) -> Any:
        self.eval()
        features: dict[str, torch.Tensor] = {}
        for builder in self.get_feature_builders():
            features.update(builder.compute_features(agent_input))
        features = {k: v.unsqueeze(0) for k, v in features.items()}
        with torch.no_grad():
            poses = self.forward(features)["trajectory"].squeeze(0).numpy()
        return Trajectory(poses, self._trajectory_sampling)


class ConstantVelocityAgent(AbstractAgent):
    """The devkit's, as its code has it."""

    def __init__(self, trajectory_sampling: TrajectorySampling = TrajectorySampling()) -> None:  # noqa: B008
        super().__init__(trajectory_sampling)

    def initialize(self) -> None:
        pass

    def compute_trajectory(self, agent_input: Any) -> Any:
        ego_velocity_2d = agent_input.ego_statuses[-1].ego_velocity
        ego_speed = (ego_velocity_2d**2).sum(-1) ** 0.5
        num_poses, dt = self._trajectory_sampling.num_poses, self._trajectory_sampling.interval_length
        poses = np.array([[(time_idx + 1) * dt * ego_speed, 0.0, 0.0] for time_idx in range(num_poses)], dtype=np.float32)
        return Trajectory(poses, self._trajectory_sampling)


class SeeingFeatures:
    """The state as the devkit's EgoStatusFeatureBuilder has it, and the front image as Transfuser's cuts it."""

    def compute_features(self, agent_input: Any) -> dict[str, torch.Tensor]:
        status = agent_input.ego_statuses[-1]
        parts = [torch.tensor(status.ego_velocity), torch.tensor(status.ego_acceleration), torch.tensor(status.driving_command)]
        cameras = agent_input.cameras[-1]
        strip = np.concatenate([getattr(cameras, name).image[10:-10, 4:-4] for name in ("cam_l0", "cam_f0", "cam_r0")], axis=1)
        return {"status": torch.cat(parts, dim=-1).float(), "image": torch.tensor(strip).float() / 255}


class SeeingAgent(AbstractAgent):
    """A small network over state and images."""

    def __init__(self, width: int, trajectory_sampling: TrajectorySampling, checkpoint_path: str | None = None) -> None:
        super().__init__(trajectory_sampling)
        self.width, self.checkpoint_path = width, checkpoint_path
        self.net = torch.nn.Sequential(
            torch.nn.Linear(11, width), torch.nn.ReLU(), torch.nn.Linear(width, trajectory_sampling.num_poses * 3)
        )

    def initialize(self) -> None:
        if self.checkpoint_path is not None:
            self.load_state_dict(torch.load(self.checkpoint_path, weights_only=True))
            return
        torch.manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def get_sensor_config(self) -> Any:
        return SensorConfig(cam_f0=True, cam_l0=[3], cam_r0=[3])

    def get_feature_builders(self) -> list[Any]:
        return [SeeingFeatures()]

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen = torch.cat([features["status"], features["image"].mean((1, 2))], -1)
        return {"trajectory": self.net(seen).reshape(-1, self._trajectory_sampling.num_poses, 3)}


class RecordingAgent(ConstantVelocityAgent):
    """Keeps what it was given."""

    given: Any = None

    def __init__(self, sensors: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.sensors = sensors or {}

    def get_sensor_config(self) -> Any:
        return SensorConfig(**self.sensors)

    def compute_trajectory(self, agent_input: Any) -> Any:
        type(self).given = agent_input
        return super().compute_trajectory(agent_input)


class FailingAgent(ConstantVelocityAgent):
    """Fails as it is told."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.requires_scene = how == "scene"

    def initialize(self) -> None:
        if self.how == "initialize":
            raise FileNotFoundError("weights.ckpt")

    def compute_trajectory(self, agent_input: Any) -> Any:
        made = super().compute_trajectory(agent_input)
        if self.how == "raise":
            raise KeyError("bev")
        if self.how == "nan":
            made.poses[3] = np.nan
        if self.how == "shape":
            made.poses = made.poses[:, :2]
        return asdict(made) if self.how == "type" else made


class NotAnAgent:
    """Has nothing of one."""
