"""Train Vision-Language-Action driving policies with learned rewards; score trajectories exactly as NAVSIM v2 does.

The public names are resolved on first use, so `import irlvla` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irlvla import ops as ops
    from irlvla.aggregation import one_stage as one_stage
    from irlvla.aggregation import two_stage as two_stage
    from irlvla.errors import BuildError as BuildError
    from irlvla.errors import FileError as FileError
    from irlvla.errors import InputError as InputError
    from irlvla.errors import IrlvlaError as IrlvlaError
    from irlvla.pdm import pdm_closed as pdm_closed
    from irlvla.scoring import epdms as epdms
    from irlvla.types import METRICS as METRICS
    from irlvla.types import Batch as Batch
    from irlvla.types import Details as Details
    from irlvla.types import Epdms as Epdms
    from irlvla.types import Kind as Kind
    from irlvla.types import Layer as Layer
    from irlvla.types import Pdms as Pdms
    from irlvla.types import Plan as Plan
    from irlvla.types import Scene as Scene
    from irlvla.types import StateIndex as StateIndex
    from irlvla.types import Trajectory as Trajectory

_NAMES = {
    "aggregation": ("one_stage", "two_stage"),
    "errors": ("BuildError", "FileError", "InputError", "IrlvlaError"),
    "pdm": ("pdm_closed",),
    "scoring": ("epdms",),
    "types": ("METRICS", "Batch", "Details", "Epdms", "Kind", "Layer", "Pdms", "Plan", "Scene", "StateIndex", "Trajectory"),
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
