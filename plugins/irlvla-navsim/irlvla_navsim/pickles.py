"""Pickles from strangers, read without running anything of theirs.

OpenScene's logs, NAVSIM's synthetic scenes and metric caches are pickles. A pickle names functions and calls them; here only
those that build numbers, strings and containers are called. Classes of nuPlan, NAVSIM and shapely become `Stub`s that keep what
they were built from; everything else is refused.
"""

from __future__ import annotations

import io
import lzma
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from irlvla import FileError

STUBBED = ("nuplan.", "navsim.", "shapely.", "pyquaternion.")  # modules whose classes are kept as data

ALLOWED = {
    ("builtins", name): getattr(__import__("builtins"), name)
    for name in (
        "bytearray",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
        "bool",
        "bytes",
    )
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    ALLOWED[_module, "_reconstruct"] = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    ALLOWED[_module, "scalar"] = np._core.multiarray.scalar  # type: ignore[attr-defined]
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    ALLOWED[_module, "_frombuffer"] = np._core.numeric._frombuffer  # type: ignore[attr-defined]
ALLOWED["numpy", "ndarray"] = np.ndarray
ALLOWED["numpy", "dtype"] = np.dtype
ALLOWED["collections", "OrderedDict"] = __import__("collections").OrderedDict
ALLOWED["collections", "defaultdict"] = lambda *_: {}
ALLOWED["_codecs", "encode"] = lambda text, encoding: text.encode("latin1") if encoding == "latin1" else _refuse("_codecs.encode", encoding)
for _name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
    ALLOWED["pathlib", _name] = lambda *parts: "/".join(map(str, parts))
    ALLOWED["pathlib._local", _name] = ALLOWED["pathlib", _name]
for _module in ("shapely.io", "shapely"):
    ALLOWED[_module, "from_wkb"] = shapely.from_wkb


class Stub:
    """What is left of an object whose class is not there: `_name`, `_arguments`, and its attributes."""

    _name = ""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __new__(cls, *arguments: Any) -> Stub:
        made = super().__new__(cls)
        made._arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # (attributes, slots) of classes with slots
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self._name} has no {name}")

    def __hash__(self) -> int:
        return hash((self._name, str(self._arguments)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stub) and (self._name, str(self._arguments)) == (other._name, str(other._arguments))

    def __repr__(self) -> str:
        return f"<{self._name}>"


def read_pickle(path: Path) -> Any:
    """What a pickle holds; one compressed by lzma too. Raises `FileError` if it is missing, damaged, or wants to run something."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\xfd7zXZ\x00"):
            content = lzma.decompress(content)
        return _Unpickler(io.BytesIO(content)).load()
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except _RefusedError as error:
        raise FileError(f"{path} was not read: it is a pickle that wants to call {error}, which data has no need of") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise FileError(f"{path} is damaged, or no pickle: {type(error).__name__}: {error}") from error


class _RefusedError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if f"{module}.".startswith(STUBBED) and name.isidentifier():
            return type(name, (Stub,), {"_name": f"{module}.{name}"})
        return _refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return _refuse("a persistent object")


def _refuse(name: str, *details: Any) -> Any:
    raise _RefusedError(" ".join(map(str, (name, *details))))
