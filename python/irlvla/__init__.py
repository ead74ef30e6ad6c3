"""Train Vision-Language-Action driving policies with learned rewards; score trajectories exactly as NAVSIM v2 does.

The public names are resolved on first use, so `import irlvla` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irlvla import ops as ops
    from irlvla.aggregation import one_stage as one_stage
    from irlvla.aggregation import two_stage as two_stage
    from irlvla.checkpoint import from_pretrained as from_pretrained
    from irlvla.checkpoint import push_to_hub as push_to_hub
    from irlvla.checkpoint import save_pretrained as save_pretrained
    from irlvla.components import Algorithm as Algorithm
    from irlvla.components import Backbone as Backbone
    from irlvla.components import Benchmark as Benchmark
    from irlvla.components import Config as Config
    from irlvla.components import Dataset as Dataset
    from irlvla.components import Metric as Metric
    from irlvla.components import Planner as Planner
    from irlvla.components import Policy as Policy
    from irlvla.components import Reasoner as Reasoner
    from irlvla.components import RewardModel as RewardModel
    from irlvla.components import Spec as Spec
    from irlvla.components import pluggable as pluggable
    from irlvla.errors import BuildError as BuildError
    from irlvla.errors import ConfigError as ConfigError
    from irlvla.errors import ContractError as ContractError
    from irlvla.errors import FileError as FileError
    from irlvla.errors import InputError as InputError
    from irlvla.errors import IrlvlaError as IrlvlaError
    from irlvla.errors import PluginError as PluginError
    from irlvla.hooks import hookimpl as hookimpl
    from irlvla.pdm import pdm_closed as pdm_closed
    from irlvla.pictures import draw_scene as draw_scene
    from irlvla.records import Record as Record
    from irlvla.records import RecordDataset as RecordDataset
    from irlvla.registry import build as build
    from irlvla.run import Run as Run
    from irlvla.run import RunConfig as RunConfig
    from irlvla.run import TrainingConfig as TrainingConfig
    from irlvla.scoring import epdms as epdms
    from irlvla.types import METRICS as METRICS
    from irlvla.types import Batch as Batch
    from irlvla.types import Command as Command
    from irlvla.types import Details as Details
    from irlvla.types import Epdms as Epdms
    from irlvla.types import Features as Features
    from irlvla.types import Kind as Kind
    from irlvla.types import Layer as Layer
    from irlvla.types import Observation as Observation
    from irlvla.types import Pdms as Pdms
    from irlvla.types import Plan as Plan
    from irlvla.types import Rollout as Rollout
    from irlvla.types import Scene as Scene
    from irlvla.types import StateIndex as StateIndex
    from irlvla.types import Trajectory as Trajectory


_NAMES = {
    "aggregation": ("one_stage", "two_stage"),
    "checkpoint": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "components": (
        "Algorithm",
        "Backbone",
        "Benchmark",
        "Config",
        "Dataset",
        "Metric",
        "Planner",
        "Policy",
        "Reasoner",
        "RewardModel",
        "Spec",
        "pluggable",
    ),
    "errors": ("BuildError", "ConfigError", "ContractError", "FileError", "InputError", "IrlvlaError", "PluginError"),
    "hooks": ("hookimpl",),
    "pdm": ("pdm_closed",),
    "pictures": ("draw_scene",),
    "records": ("Record", "RecordDataset"),
    "registry": ("build",),
    "run": ("Run", "RunConfig", "TrainingConfig"),
    "scoring": ("epdms",),
    "types": (
        "METRICS",
        "Batch",
        "Command",
        "Details",
        "Epdms",
        "Features",
        "Kind",
        "Layer",
        "Observation",
        "Pdms",
        "Plan",
        "Rollout",
        "Scene",
        "StateIndex",
        "Trajectory",
    ),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}
__version__ = "0.1.0"
__all__ = ["__version__", "ops", *_WHERE]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("irlvla.ops")
    if name in _WHERE:
        return getattr(importlib.import_module(f"irlvla.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'irlvla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
