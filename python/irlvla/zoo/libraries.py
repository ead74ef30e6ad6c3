"""timm, transformers and diffusers, imported when something is built that needs them."""

from __future__ import annotations

import functools
import importlib
import re
import textwrap
from types import ModuleType

from torch.library import Library

from irlvla.errors import IrlvlaError


def library(name: str) -> ModuleType:
    """A library, imported. Raises `IrlvlaError` if it cannot be."""
    _make_torchvision_importable()
    try:
        return importlib.import_module(name)
    except Exception as error:
        why = textwrap.shorten(str(error), 300)
        remedy = f"Try: pip install {name}, with the torchvision that is made for your torch"
        raise IrlvlaError(f"{name} cannot be imported ({why}). {remedy}") from error


@functools.cache
def _make_torchvision_importable() -> Library:
    """Beside a torch that it was not built for (a CPU build, say) torchvision cannot load its compiled ops, and then cannot be
    imported either, for want of the declarations of a few. These libraries import it; nothing here needs its ops.
    """
    declared = Library("torchvision", "FRAGMENT")  # it declares as long as it lives, so it is kept
    missing = ""
    while True:
        try:
            importlib.import_module("torchvision")
            return declared
        except Exception as error:
            found = re.match(r"operator torchvision::(\w+) does not exist", str(error))
            if not found or found[1] == missing:
                return declared  # whoever imports it next says what is wrong
            missing = found[1]
            declared.define(f"{missing}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
