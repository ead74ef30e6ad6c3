"""The dataset `av2`: every half second of every log that has 1.5 s before and 5 s after it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from pydantic import Field

from irlvla import FileError, Scene
from irlvla.errors import did_you_mean
from irlvla.files import files_under
from irlvla.records import Agent, Polygon, Record, RecordDataset, pack, record
from irlvla.types import REAR_AXLE_TO_CENTRE
from irlvla_av2.logs import Log, read_log, sweep_times
from irlvla_av2.roads import Array, Roads
from irlvla_av2.routes import Route, centerline, follow

HISTORY: Array = np.array([-1.5, -1.0, -0.5, 0.0])  # [s]
HUMAN: Array = np.arange(1, 9) * np.float64(0.5)
AGENTS: Array = np.arange(51) * np.float64(0.1)
REACH = 100.0  # of the map and of agents around the car [m]


class Av2Dataset(RecordDataset):
    """Argoverse 2 sensor logs (CC BY-NC-SA 4.0): a folder of a log, or any folder above logs.

    The car is scored as the Pacifica of the metric, although a smaller Ford drove. The maps have no lights and no speed
    limits: TLC is always 1 and PDM-Closed takes 15 m/s. The route is the lanes that were driven, with those beside them.
    """

    class Config(RecordDataset.Config):
        path: Path = Field(description="a log, or a folder above logs (those with city_SE3_egovehicle.feather)")
        every: int = Field(5, ge=1, description="sweeps (0.1 s) from one scene to the next")

    def __init__(self, config: Any) -> None:
        """Raises `FileError` if there is no log under the path."""
        super().__init__(config)
        self._root = Path(config.path).expanduser()
        if not self._root.is_dir():
            near = did_you_mean(self._root.name, (folder.name for folder in self._root.parent.glob("*/")))
            raise FileError(f"{self._root} does not exist. {near}".rstrip())
        self.logs = [path.parent for path in files_under(self._root, "city_SE3_egovehicle.feather")]
        if not self.logs:
            raise FileError(f"{self._root} holds no Argoverse 2 log: no city_SE3_egovehicle.feather under it")
        self.windows = [(number, sweep) for number, folder in enumerate(self.logs) for sweep in _windows(folder, config.every)]

    @property
    def root(self) -> Path:
        return self._root

    def __len__(self) -> int:
        return len(self.windows)

    def record(self, index: int) -> Record:
        """One scene. Raises `FileError` if its log is damaged or its car on no lane, `IndexError` beyond the last."""
        number, sweep = self.windows[index]
        log, route = _opened(self.logs[number])
        now = float(log.sweeps[sweep])
        scene = _scene(log, route, now)
        images = {name: log.image_near(name, now) for name in log.cameras}
        if not images or None in images.values():
            return record(scene)
        cameras = list(log.cameras.values())
        return record(
            scene,
            cameras=list(images),
            images=[path.relative_to(self._root).as_posix() for path in images.values() if path is not None],
            intrinsics=[camera.intrinsics for camera in cameras],
            camera_to_ego=[camera.to_ego for camera in cameras],
            distortion=[camera.distortion for camera in cameras],
        )


@functools.lru_cache(maxsize=2)
def _opened(folder: Path) -> tuple[Log, Route]:
    log = read_log(folder)
    return log, follow(log.roads, log.drive)


# -- one scene ---------------------------------------------------------------------------------------------------------


def _windows(folder: Path, every: int) -> list[int]:
    """Sweeps of a log that have enough before and after them."""
    sweeps, first, last = sweep_times(folder)
    inside = (sweeps + HISTORY[0] >= first) & (sweeps + AGENTS[-1] <= last)
    return [sweep for sweep in range(0, len(sweeps), every) if inside[sweep]]


def _scene(log: Log, route: Route, now: float) -> Scene:
    previous, *history = log.drive.at(now + np.concatenate([[-0.5], HISTORY]))
    ego = history[-1]
    return pack(
        token=f"{log.folder.name}-{log.stamp(now)}",
        time_us=log.stamp(now),
        ego=ego,
        history_time_us=np.array([log.stamp(time) for time in now + HISTORY]),
        history=np.array(history)[:, :8],
        agents=_agents(log, now, ego),
        polygons=_polygons(log.roads, route, ego),
        centerline=centerline(log.roads, route, _centre(ego)),
        human=_relative(log.drive.at(now + HUMAN)[:, :3], ego),
        previous_time_us=log.stamp(now - 0.5),
        previous_ego=previous,
    )


def _agents(log: Log, now: float, ego: Array) -> list[Agent]:
    agents = []
    for track in log.tracks:
        state, valid = track.at(now + AGENTS)
        near = valid & (np.abs(state[:, :2] - ego[:2]).max(axis=1) <= REACH)
        if near.any():
            agents.append(Agent(track.name, track.kind, track.size, valid, np.where(valid[:, None], state, 0.0)))
    return agents


def _polygons(roads: Roads, route: Route, ego: Array) -> list[Polygon]:
    x, y = _centre(ego)[:2]
    around = shapely.box(x - REACH, y - REACH, x + REACH, y + REACH)
    return [
        Polygon(layer, [shapely.get_coordinates(ring) for ring in (shape.exterior, *shape.interiors)], number in route.lanes)
        for layer, shape, number in roads.polygons()
        if shape.intersects(around)
    ]


def _centre(ego: Array) -> Array:
    """Pose of the middle of the car."""
    x, y, heading = ego[:3]
    return np.array([x + REAR_AXLE_TO_CENTRE * np.cos(heading), y + REAR_AXLE_TO_CENTRE * np.sin(heading), heading])


def _relative(poses: Array, ego: Array) -> Array:
    """Poses "T 3" of the city frame in the frame of the car."""
    cos, sin = np.cos(ego[2]), np.sin(ego[2])
    x, y = (poses[:, :2] - ego[:2]).T
    return np.column_stack([cos * x + sin * y, cos * y - sin * x, np.angle(np.exp(1j * (poses[:, 2] - ego[2])))])
