"""A new plugin, of every kind: it installs, keeps its contracts as written, and says what to do next."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

import irlvla
from irlvla import scaffold, testing
from irlvla.components import KINDS
from irlvla.errors import FileError, InputError
from irlvla.registry import Plugin, installed
from irlvla.scaffold import NOUNS, write_plugin


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    installed.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    yield
    torch.set_num_threads(threads)
    installed.cache_clear()


def python(*arguments: str | Path, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder in front of its path."""
    search = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": search}, cwd=cwd, capture_output=True, text=True
    )


def test_there_is_a_template_of_every_kind() -> None:
    assert NOUNS.keys() == KINDS.keys()
    assert {path.stem for path in (scaffold.TEMPLATES / "irlvla_acme").glob("*.py")} == {"__init__", *KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_contract(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, in a registry to which it was added as if it were installed."""
    package = write_plugin(f"new-{kind}", tmp_path, kind)
    module = f"irlvla_new_{kind}"
    monkeypatch.syspath_prepend(package)
    plugin = installed().add(Plugin(package.name, "0.1.0", module), lambda: importlib.import_module(module))
    assert not plugin.problem
    results = testing.check_plugin(package.name)
    assert [result for result in results if result.problem] == []
    assert {(result.kind, result.name) for result in results[1:]} == {(kind, f"new_{kind}_{NOUNS[kind]}")}
    assert len([result for result in results if not result.skipped]) >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_of_one_kind_and_name(kind: str, tmp_path: Path) -> None:
    package = write_plugin("Zeta_2-go", tmp_path, kind)
    assert package == tmp_path / "irlvla-zeta-2-go"
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file())
    module = "irlvla_zeta_2_go"
    assert files == sorted(["README.md", "pyproject.toml", "tests/test_zeta_2_go.py", f"{module}/__init__.py", f"{module}/{kind}.py"])
    texts = [(package / file).read_text() for file in files]
    assert not [text for text in texts if re.search("acme", text, re.IGNORECASE)]
    hook, component = (package / module / "__init__.py").read_text(), (package / module / f"{kind}.py").read_text()
    target = re.search(rf'def irlvla_{kind}s\(\).*\n.*"zeta_2_go_\w+": "{module}\.{kind}:(Zeta2Go\w+)"', hook)
    assert target is not None
    assert f"class {target[1]}(irlvla.{KINDS[kind].__name__}):" in component
    assert len(component.splitlines()) <= 50


def test_package_data(tmp_path: Path) -> None:
    project = tomllib.loads((write_plugin("acme", tmp_path) / "pyproject.toml").read_text())
    assert project["build-system"]["build-backend"] == "setuptools.build_meta"
    assert project["project"]["name"] == "irlvla-acme"
    assert project["project"]["entry-points"] == {"irlvla": {"acme": "irlvla_acme"}}
    (needs,) = project["project"]["dependencies"]
    major, minor, _ = irlvla.__version__.split(".")
    assert needs == f"irlvla>={major}.{minor},<{major}.{int(minor) + 1}"


@pytest.mark.parametrize(
    ("version", "expected", "works", "fails"),
    [
        ("0.1.0", ">=0.1,<0.2", ["0.1.0", "0.1.9"], ["0.2.0", "1.0"]),
        ("1.12.3", ">=1.12,<1.13", ["1.12.0", "1.12.7"], ["1.11.9", "1.13.0"]),
        ("0.4.0.dev2", ">=0.4.0.dev2,<0.5", ["0.4.0.dev2", "0.4.1"], ["0.5.0"]),
    ],
)
def test_range_of_versions(version: str, expected: str, works: list[str], fails: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(irlvla, "__version__", version)
    assert scaffold._range() == expected
    assert all(SpecifierSet(expected).contains(other, prereleases=True) for other in works)
    assert not any(SpecifierSet(expected).contains(other, prereleases=True) for other in fails)


def test_readme_names_what_there_is(tmp_path: Path) -> None:
    package = write_plugin("acme", tmp_path, "reward_model")
    readme = (package / "README.md").read_text()
    for file in re.findall(r"^\| `([\w./]+)`", readme, re.MULTILINE):
        assert (package / file).is_file()
    for said in ("pip install -e", "irlvla plugins check irlvla-acme", "name: acme_mlp", 'reward_model_checks("acme_mlp"'):
        assert said in readme


@pytest.mark.parametrize("prefix", ["irlvla-", "irlvla_", "IRLVLA-", ""])
def test_prefix_is_the_same_name(prefix: str, tmp_path: Path) -> None:
    assert write_plugin(f"{prefix}Acme", tmp_path).name == "irlvla-acme"


@pytest.mark.parametrize("name", ["", "irlvla-", "2go", "acme cars", "acme/cars", "../acme", "acmé", "acme-", "-acme", "a--b", "_", "a.b"])
def test_wrong_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must begin with a letter and be of letters, digits"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_name_comes_with_a_right_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for example 'acme-cars'"):
        write_plugin("3 Acme cars!", tmp_path)


def test_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no kind 'planer'. Did you mean 'planner'\? Kinds: backbone, reasoner"):
        write_plugin("acme", tmp_path, "planer")


def test_existing_folder_stays_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "irlvla-acme" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(FileError, match="irlvla-acme is there already"):
        write_plugin("acme", tmp_path)
    assert [*mine.parent.iterdir()] == [mine]


def test_folder_is_the_current_one_or_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_plugin("acme") == Path("irlvla-acme")
    assert (tmp_path / "irlvla-acme" / "pyproject.toml").is_file()
    assert write_plugin("acme", "deep/er").resolve() == tmp_path / "deep" / "er" / "irlvla-acme"


def test_written_code_is_clean(tmp_path: Path) -> None:
    ruff = shutil.which("ruff", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if ruff is None:
        pytest.skip("needs ruff")
    for kind in KINDS:
        write_plugin(f"new-{kind}", tmp_path, kind)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "--no-cache", tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_installed_by_pip_it_is_found_and_passes_its_own_tests(tmp_path: Path) -> None:
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    package, site = write_plugin("acme", tmp_path, "metric"), tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target", site]
    done = python("-m", "pip", "install", *options, package, path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tests = shutil.copytree(package / "tests", tmp_path / "tests")  # away from the source: what is installed is tested
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests, path=site, cwd=tests)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b1\d passed", done.stdout), done.stdout
