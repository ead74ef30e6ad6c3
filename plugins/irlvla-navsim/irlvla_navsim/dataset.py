"""The datasets `navsim` (windows of recorded logs), `navsim_synthetic` (the second stage) and `navsim_cache` (metric caches)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from irlvla import ConfigError, FileError
from irlvla.errors import did_you_mean
from irlvla.records import Record, RecordDataset, record
from irlvla_navsim.caches import find_caches, read_cache
from irlvla_navsim.frames import Frame, read_log, read_synthetic
from irlvla_navsim.maps import find_map, read_map
from irlvla_navsim.scenes import Window, make_scene
from irlvla_navsim.splits import PARTS, SceneFilter, SplitName, TwoStageName, read_filter, read_split, second_stage


class NavsimDataset(RecordDataset):
    """Windows of OpenScene logs, as NAVSIM cuts them. A scene's name is the token of its present frame."""

    class Config(RecordDataset.Config):
        logs: Path = Field(description="a folder of logs (navsim_logs/SPLIT), or one log (.pkl)")
        maps: Path = Field(description="the folder of nuPlan's maps (CITY/VERSION/map.gpkg)")
        sensors: Path | None = Field(None, description="the sensor blobs of the split; null = without images")
        split: SplitName | None = Field(None, description="an official split; of two-stage ones the first stage")
        partial: bool = Field(False, description="whether scenes of the split may be missing from the logs")
        filter: Path | None = Field(None, description="instead of a split: a scene filter of the devkit (YAML)")
        windows: SceneFilter = Field(default=SceneFilter(), description="which windows, where neither is given")

    def __init__(self, config: Any) -> None:
        """Raises `FileError` if a folder is missing, a log is damaged, no window is left, or the split is not whole."""
        super().__init__(config)
        if config.split is not None and config.filter is not None:
            raise ConfigError(f"split={config.split} and filter={config.filter}: give one of them")
        own = config.windows if config.filter is None else read_filter(Path(config.filter))
        self.filter = own if config.split is None else read_split(config.split)
        found = [(path, start, token) for path in _logs(Path(config.logs), self.filter) for start, token in _starts(path, self.filter)]
        self.index = found[: self.filter.max_scenes]
        if not self.index:
            raise FileError(f"no window of {config.logs} passes the filter: {self.filter.model_dump(exclude={'tokens'})}")
        if config.split is not None:
            parts = config.split in PARTS  # whose scenes are known by their logs alone
            wanted = frozenset(self.filter.log_names or ()) if parts else self.filter.tokens or frozenset()
            _require_whole(self, wanted, [path.stem if parts else token for path, _, token in self.index])

    @property
    def root(self) -> Path:
        return Path(self.config.sensors or ".")

    def __len__(self) -> int:
        return len(self.index)

    def token(self, index: int) -> str:
        return self.index[index][2]

    def record(self, index: int) -> Record:
        path, start, _ = self.index[index]
        frames = _frames(path)[start : start + self.filter.length]
        window = Window(frames, self.filter.num_history_frames - 1)
        return _record(window, Path(self.config.maps), with_images=self.config.sensors is not None)


class SyntheticStageDataset(RecordDataset):
    """NAVSIM's synthetic scenes of the second stage: other views of moments of recorded scenes. They have no human drive."""

    class Config(RecordDataset.Config):
        scenes: Path = Field(description="the folder synthetic_scene_pickles")
        maps: Path = Field(description="the folder of nuPlan's maps (CITY/VERSION/map.gpkg)")
        sensors: Path | None = Field(None, description="the sensor blobs of the synthetic scenes; null = without images")
        split: TwoStageName | None = Field(None, description="an official split; null = all scenes of the folder")
        partial: bool = Field(False, description="whether scenes of the split may be missing from the folder")
        originals: frozenset[str] | None = Field(
            None, description="only of these first-stage scenes (tokens of their last frames); null = all"
        )

    def __init__(self, config: Any) -> None:
        """Raises `FileError` if there is no scene, or the split is not whole."""
        super().__init__(config)
        folder = Path(config.scenes)
        self.files = sorted(folder.glob("*.pkl"))
        if config.split is not None:
            wanted = second_stage(config.split)
            self.files = [file for file in self.files if file.stem in wanted]
            _require_whole(self, wanted, [file.stem for file in self.files])
        if config.originals is not None:
            self.files = [file for file in self.files if read_synthetic(file).original in config.originals]
        if not self.files:
            raise FileError(f"{folder} holds no synthetic scenes (*.pkl)" + (" of these originals" if config.originals is not None else ""))

    @property
    def root(self) -> Path:
        return Path(self.config.sensors or ".")

    def __len__(self) -> int:
        return len(self.files)

    def token(self, index: int) -> str:
        return self.files[index].stem

    def record(self, index: int) -> Record:
        scene = read_synthetic(self.files[index])
        window = Window(scene.frames, scene.history - 1, scene.later_boxes, scene.later_lights, human=False)
        return _record(window, Path(self.config.maps), with_images=self.config.sensors is not None)


class MetricCacheDataset(RecordDataset):
    """Metric caches of the devkit: scenes to score, without sensors and without a previous frame."""

    class Config(RecordDataset.Config):
        path: Path = Field(description="the folder of the caches (LOG/TYPE/TOKEN/metric_cache.pkl)")
        maps: Path | None = Field(None, description="the folder of nuPlan's maps, which reactive traffic needs; null = without")

    def __init__(self, config: Any) -> None:
        """Raises `FileError` if there is none."""
        super().__init__(config)
        self.files = find_caches(Path(config.path))

    @property
    def root(self) -> Path:
        return Path(self.config.path)

    def __len__(self) -> int:
        return len(self.files)

    def token(self, index: int) -> str:
        return self.files[index].parent.name

    def record(self, index: int) -> Record:
        maps = self.config.maps
        return record(read_cache(self.files[index], None if maps is None else Path(maps)))


def _record(window: Window, maps: Path, with_images: bool) -> Record:
    scene = make_scene(window, read_map(find_map(maps, window.now.map_name)))
    cameras = window.now.cameras if with_images else {}
    return record(
        scene,
        cameras=list(cameras),
        images=[camera.path for camera in cameras.values()],
        intrinsics=np.array([camera.intrinsics for camera in cameras.values()]) if cameras else None,
        camera_to_ego=np.array([camera.to_ego for camera in cameras.values()]) if cameras else None,
        distortion=np.array([camera.distortion for camera in cameras.values()]) if cameras else None,
        command=window.now.command,
    )


def _logs(path: Path, wanted: SceneFilter) -> list[Path]:
    if not path.exists():
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise FileError(f"{path} does not exist. {near}".rstrip())
    files = sorted(path.glob("*.pkl")) if path.is_dir() else [path]
    if wanted.log_names is not None:
        files = [file for file in files if file.stem in wanted.log_names]
    if not files:
        raise ConfigError(f"{path} holds no log (*.pkl) that the filter names")
    return files


def _require_whole(dataset: NavsimDataset | SyntheticStageDataset, wanted: frozenset[str], found: list[str]) -> None:
    """Raise `FileError` if scenes (or logs) of a split are missing, unless that is wanted."""
    missing = sorted(wanted.difference(found))
    if missing and not dataset.config.partial:
        raise FileError(
            f"{dataset.config.split} has {len(wanted)} scenes or logs, of which {len(missing)} are missing here: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. partial=true takes those that are there"
        )


def _starts(path: Path, wanted: SceneFilter) -> list[tuple[int, str]]:
    """First frames of the windows of a log, and the token of each."""
    frames = _frames(path)
    step = wanted.frame_interval or wanted.length
    starts = []
    for start in range(0, len(frames) - wanted.length + 1, step):
        now = frames[start + wanted.num_history_frames - 1]
        if (now.route or not wanted.has_route) and (wanted.tokens is None or now.token in wanted.tokens):
            starts.append((start, now.token))
    return starts


@functools.lru_cache(maxsize=2)
def _frames(path: Path) -> list[Frame]:
    return read_log(path)
