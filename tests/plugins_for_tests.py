"""Plugins as pip would install them, written into a folder: for the tests of discovery, configuration and the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

from irlvla import registry

PLANNER = '''
class Planner(irlvla.Planner):
    """Cubic splines."""

    class Config(irlvla.Config):
        knots: int = Field(4, ge=2, description="control points per trajectory")
        spread: float = Field(0.5, description="standard deviation of a knot [m]")

    def __init__(self, config, *, width):
        super().__init__(config)
        self.width = width

    def loss(self, features, human):
        return {}

    def sample(self, features, k, *, generator=None):
        raise NotImplementedError
'''
HEAD = "import irlvla\nfrom pydantic import Field\n"


def planners(**names: str) -> str:
    """Source of a hook that provides planners."""
    return f"import irlvla\n\n@irlvla.hookimpl\ndef irlvla_planners():\n    return {names!r}\n"


class Site:
    """A folder of installed packages, first on `sys.path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        name: str,
        source: str | None = None,
        *,
        version: str = "0.3.1",
        requires: tuple[str, ...] = (),
        points: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """Install a distribution: `source` is its package, `modules` are further files of it.

        By default it provides one planner, named after it: "acme_spline" for "irlvla-acme".
        """
        package = name.replace("-", "_")
        source = planners(**{f"{name.removeprefix('irlvla-')}_spline": f"{package}.spline:Planner"}) if source is None else source
        files = {"__init__": source, "spline": HEAD + PLANNER, **(modules or {})}
        for file, text in files.items():
            path = self.folder / package / f"{file}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        points = {name.removeprefix("irlvla-"): package} if points is None else points
        info = self.folder / f"{package}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        (info / "entry_points.txt").write_text("[irlvla]\n" + "".join(f"{key} = {value}\n" for key, value in points.items()))

    def scan(self) -> registry.Registry:
        """What a new process would find."""
        registry.installed.cache_clear()
        return registry.installed()


@contextmanager
def empty_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A new one, beside which nothing but irlvla is installed; what was imported from the folder is forgotten in the end."""
    site = Site(folder / "site")
    site.folder.mkdir()
    host, all_distributions = metadata.distribution("irlvla"), metadata.distributions

    def distributions() -> Iterator[metadata.Distribution]:
        yield from all_distributions(path=[path for path in sys.path if path.startswith(str(folder))])
        if str(host.locate_file("")) in sys.path:
            yield host

    monkeypatch.setattr(metadata, "distributions", distributions)
    monkeypatch.delenv("IRLVLA_PLUGINS", raising=False)
    monkeypatch.delenv("IRLVLA_BLOCK", raising=False)
    monkeypatch.setattr(sys, "path", [str(site.folder), *sys.path])
    importlib.invalidate_caches()
    registry.installed.cache_clear()
    before = set(sys.modules)
    yield site
    registry.installed.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
