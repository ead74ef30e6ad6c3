"""NAVSIM's benchmarks: the official splits, from the official folders, scored as the devkit's evaluation scripts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

import irlvla
from irlvla_navsim.splits import TWO_STAGES, folder_of, mapping_of, source


class Submission(irlvla.Config):
    """Who sends in a submission."""

    team_name: str
    authors: str
    email: str
    institution: str
    country: str = Field(description="country or region")


class NavsimBenchmark(irlvla.Benchmark):
    """Scenes of a split of NAVSIM, from a folder that is laid out as its documentation says."""

    split: ClassVar[str]

    class Config(irlvla.Config):
        root: Path = Field(description="the folder of the data (OPENSCENE_DATA_ROOT): it holds navsim_logs, sensor_blobs, ...")
        maps: Path | None = Field(None, description="nuPlan's maps (NUPLAN_MAPS_ROOT); null = maps in the root")
        size: tuple[int, int] | None = Field(None, description="height and width of the images; null = no images")
        cameras: tuple[str, ...] = Field((), description="which cameras, in this order; none named = all")
        partial: bool = Field(False, description="whether scenes may be missing: for a first look, not to be compared")
        submission: Submission | None = Field(None, description="write RUN/submission/NAME.pkl too, in this name; null = do not")

    def settings(self) -> dict[str, Any]:
        root, folder = Path(self.config.root), folder_of(self.split)
        about = {"split": self.split, "devkit": source(), "script": "run_pdm_score_one_stage.py"}
        data = self._data("navsim", root / "sensor_blobs" / folder) | {"logs": str(root / "navsim_logs" / folder)}
        if self.split not in TWO_STAGES:
            return {"data": data, "second_stage": None, "traffic": "log", "about": about}
        second = root / self.split
        scenes = self._data("navsim_synthetic", second / "sensor_blobs") | {"scenes": str(second / "synthetic_scene_pickles")}
        return {
            "data": data,
            "second_stage": {"data": scenes, "mapping": str(mapping_of(self.split))},
            "traffic": "reactive",
            "about": about | {"script": "run_pdm_score.py"},
        }

    def _data(self, name: str, sensors: Path) -> dict[str, Any]:
        config = self.config
        return {
            "name": name,
            "maps": str(config.maps or Path(config.root) / "maps"),
            "sensors": str(sensors),
            "split": self.split,
            "partial": config.partial,
            "size": config.size and list(config.size),
            "cameras": list(config.cameras),
        }


class Navtest(NavsimBenchmark):
    """NAVSIM's test split: 12,146 recorded scenes, one stage, log-replay traffic."""

    split = "navtest"


class Navhard(NavsimBenchmark):
    """NAVSIM's hard scenes in two stages: 450 recorded and 5,462 synthetic ones, reactive traffic."""

    split = "navhard_two_stage"


class Warmup(NavsimBenchmark):
    """NAVSIM's first steps in two stages: 16 recorded and 204 synthetic scenes, reactive traffic."""

    split = "warmup_two_stage"


class Navmini(NavsimBenchmark):
    """NAVSIM's small split for a trial: 396 recorded scenes, one stage, log-replay traffic."""

    split = "navmini"


class Navtrain(NavsimBenchmark):
    """NAVSIM's training split: 103,288 recorded scenes, one stage, log-replay traffic."""

    split = "navtrain"


class Navval(NavsimBenchmark):
    """The scenes of navtrain on whose logs the devkit validates while it trains, one stage, log-replay traffic."""

    split = "navtrain_val"
