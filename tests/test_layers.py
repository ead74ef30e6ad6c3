"""The walls of the design: who may import whom, in Python and in C++."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "irlvla"
MODULES = sorted(PACKAGE.rglob("*.py"))
PARTS = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES} - {"__init__"}

# The picture of the design, by the parts of the package. A part may import those it points to, those they point to,
# and so on; nothing else. A new part needs a line here and in the picture.
ARROWS = {
    "errors": set(),
    "files": {"errors"},
    "types": {"files"},
    "ops": {"types"},
    "aggregation": {"ops"},
    "corridor": {"ops"},
    "pdm": {"corridor"},
    "scoring": {"pdm", "aggregation"},
    "golden": {"types"},
    "conformance": {"golden", "scoring"},
    "components": {"types"},
    "clusters": {"errors"},
    "candidates": {"clusters", "components"},
    "hooks": {"components"},
    "registry": {"hooks"},
    "benchmarks": {"registry"},
    "configuration": {"benchmarks"},
    "checkpoint": {"registry"},
    "run": {"checkpoint", "configuration"},
    "leaderboard": {"aggregation", "golden"},
    "stages": {"candidates", "leaderboard", "report", "run", "scoring", "shards"},
    "report": {"pictures", "plots", "run", "scoring"},
    "cli": {"conformance", "pictures", "report", "scaffold", "stages", "testing"},
    "__main__": {"cli"},
    "testing": {"checkpoint", "scoring"},
    "scaffold": {"files"},
    "templates": {"testing"},
    "images": {"errors"},
    "records": {"components", "images", "ops"},
    "shards": {"pdm", "records"},
    "pictures": {"types"},
    "plots": {"types"},
    "synthetic": {"records", "hooks", "scoring"},
    "zoo": {"checkpoint", "clusters", "hooks", "scoring", "shards", "synthetic"},
}

# Packages and names that one file alone may use, whatever the layer.
ONLY_IN = {
    "irlvla._C": {"ops/_native.py"},
    "accelerate": {"run/__init__.py"},
    "pytest": {"testing/__init__.py"},
    "pickle": {"testing/data.py"},
}


# What a part may name in annotations, and must not import: it lies above.
ANNOTATES = {"hooks": {"run"}, "zoo": {"run"}}

# What costs time to import, and what may be imported all the same by what everybody imports.
HEAVY = {
    *("torch", "numpy", "pydantic", "omegaconf", "yaml", "huggingface_hub", "accelerate", "transformers", "diffusers", "timm"),
    *("typer", "rich", "pluggy", "pytest"),
}
LIGHT = {
    "import irlvla": set(),
    "from irlvla import PluginError": set(),
    "from irlvla import hookimpl": {"pluggy"},
    "import irlvla.cli": {"typer", "rich"},
}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    package = ["irlvla", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module or ""]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def reachable(part: str) -> set[str]:
    found, ahead = {part}, [part]
    while ahead:
        new = ARROWS[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_arrows(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part not in PARTS:
        return  # the front door: it names everything and, as another test says, imports next to nothing
    assert part in ARROWS, f"{name(path)} is not in the picture of the design"
    for imported in imports(path):
        root, *rest = imported.split(".")
        if root == "irlvla" and rest and rest[0] in PARTS:
            assert rest[0] in reachable(part) | ANNOTATES.get(part, set()), f"{name(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_private_rooms(path: Path) -> None:
    for imported in imports(path):
        for what, allowed in ONLY_IN.items():
            if (imported + ".").startswith(what + "."):
                assert name(path) in allowed, f"{name(path)} imports {imported}"
    if name(path) != "ops/_native.py":
        assert ".data_ptr(" not in path.read_text(), f"{name(path)} takes a raw pointer"


@pytest.mark.parametrize(("statement", "allowed"), LIGHT.items())
def test_import_is_light(statement: str, allowed: set[str]) -> None:
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY & set(loaded) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_module_is_named_as_what_it_holds(path: Path) -> None:
    """Otherwise `irlvla.thing` is a function or a module, depending on what was imported before."""
    body = ast.parse(path.read_text()).body
    assert path.stem not in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*")), ids=lambda path: path.name)
def test_native_includes(path: Path) -> None:
    """The standard library and the CUDA runtime; one file alone knows Python."""
    for quoted, system in re.findall(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', path.read_text(), re.M):
        if quoted:
            assert (path.parent / quoted).is_file(), f"{path.name} includes {quoted}"
        elif path.name != "bindings.cpp":
            assert not re.match(r"pybind11|Python\.h|torch|ATen|c10|cub|thrust|omp\.h", system), f"{path.name} includes {system}"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_sets_share_no_code(isa: str) -> None:
    """An inline function that two instruction sets compile is one function to the linker, which keeps either. Every such
    function must carry the instruction set in its name, or a machine without it may meet it.
    """
    objects = list(ROOT.glob(f"build/cp*/CMakeFiles/kernels_{isa}.dir/csrc/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs nm and the objects of a build in this folder")
    symbols = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if re.search(r" W ", line) and f"irlvla::{isa}::" not in line]
    assert shared == []
