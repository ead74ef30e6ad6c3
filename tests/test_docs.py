"""The pages of documentation are true: hooks and contracts stand there as they are, and who follows a page gets there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import irlvla
from irlvla import hooks, registry, testing
from irlvla.cli import app
from irlvla.components import KINDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
HOOKS = [hook for hook in vars(hooks).values() if hasattr(hook, "irlvla_spec")]


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)


def signature(function: Any) -> str:
    """As it is written: "sample(features: Features, k: int, *, generator: Generator | None = None) -> Plan"."""
    written = re.search(r"^\s*def (.*?):( \.\.\.)?\n", inspect.getsource(function), re.M | re.S)
    assert written
    return re.sub(r"\s+", " ", written[1]).replace("(self, ", "(").replace("(self)", "()")


# -- reference ---------------------------------------------------------------------------------------------------------


def test_every_hook_stands_there_with_its_exact_signature() -> None:
    assert len(HOOKS) > len(KINDS)
    assert re.findall(r"^def (irlvla_.*): \.\.\.$", PAGE, re.M) == [signature(hook) for hook in HOOKS]


def contracts() -> dict[str, tuple[str, list[str]]]:
    """Of each class in the table of contracts: how it is built, and its methods."""
    found: dict[str, tuple[str, list[str]]] = {}
    for row in re.findall(r"^\|(.*)\|$", PAGE, re.M):
        cells = [cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]
        if cells[0].startswith("irlvla."):
            methods = found.setdefault(cells[0], (cells[1], []))[1]
        if len(cells) == 4 and "->" in cells[2]:
            methods.append(cells[2])
    return found


def test_every_contract_stands_there_with_its_exact_methods() -> None:
    expected = {}
    for contract in KINDS.values():
        built = re.search(r"[Bb]uilt as\s+`(.*?)`", contract.__doc__ or "")
        assert built, f"{contract} does not say how it is built"
        methods = [signature(member) for member in vars(contract).values() if inspect.isfunction(member)]
        optional = re.findall(r'^    """`(\w+\(.*?)`', inspect.getsource(contract), re.M)  # declared, and described in a docstring
        expected[f"irlvla.{contract.__name__}"] = (built[1], methods + optional)
    assert contracts() == expected


def test_the_page_names_what_there_is() -> None:
    words = set(re.findall(r"\birlvla_\w+", PAGE)) - {hook.__name__ for hook in HOOKS}
    assert words == {"irlvla_acme"}
    for name in re.findall(r"\birlvla\.(\w+)", PAGE):
        assert name in irlvla.__all__ or importlib.util.find_spec(f"irlvla.{name}"), f"there is no irlvla.{name}"
    for name in testing.__all__:
        assert f"`{name}`" in PAGE or not re.search("_checks$|^example_", name), f"irlvla.testing.{name} is not on the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


# -- commands ----------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Lines of code and code in the text that call irlvla, of all pages."""
    texts = [page.read_text() for page in PAGES]
    lines = [line for text in texts for language, code in blocks(text) if language == "bash" for line in code.splitlines()]
    inline = [code for text in texts for code in re.findall(r"`(irlvla [^`\n]+)`", text)]
    return sorted({line for line in lines + inline if re.match(r"([A-Z_]+=\S+ )*irlvla ", line)})


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[words.index("irlvla") + 1 :]
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", ()):
        command = command.commands[words.pop(0)]
    assert command.name, f"irlvla has no command {words[0]!r}"
    assert not words or not hasattr(command, "commands"), f"irlvla {command.name} has no command {words[0]!r}"
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options


# -- following the page ------------------------------------------------------------------------------------------------


class Reader:
    """A stranger who does what the page says, from top to bottom."""

    modules = ("irlvla_acme", "test_acme", "brake", "csvlog")  # that the page writes

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.monkeypatch = folder / "site", monkeypatch
        self.printed: dict[str, str] = {}  # by command
        self.names: dict[str, Any] = {}  # that blocks without a file define
        self.site.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(self.site)
        monkeypatch.delenv("IRLVLA_PLUGINS", raising=False)
        monkeypatch.delenv("IRLVLA_BLOCK", raising=False)

    def follow(self, page: str) -> None:
        for language, code in blocks(page):
            if path := re.match(r"# (\S+\.(py|yaml))\n", code):
                with Path(path[1]).open("a") as stream:
                    stream.write(f"\n\n{code}")
            elif language == "bash":
                for line in code.splitlines():
                    self.run(line)
            else:
                assert language == "python", f"a block of {language} has no name of a file"
                exec(compile(code, "docs", "exec", dont_inherit=True), self.names)

    def run(self, line: str) -> None:
        words, variables = shlex.split(line), {}
        while match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0]):
            variables[match[1]] = match[2]
            words.pop(0)
        match words:
            case ["cd", folder]:
                self.monkeypatch.chdir(folder)
            case ["pip", "install", "-e", "." | ".[test]"]:
                self.install(Path.cwd())
            case ["python", "-c", code]:
                exec(code, {})
            case ["pytest"]:
                self.forget()
                assert pytest.main(["-q", "-p", "no:cacheprovider", "."]) == 0
            case ["irlvla", *arguments]:
                self.forget()
                done = CliRunner().invoke(app, arguments, env=variables, catch_exceptions=False)
                assert done.exit_code == 0, f"{line}\n{done.output}"
                self.printed[line] = done.output
            case _:
                pytest.fail(f"this test does not know how to follow {line!r}")

    def install(self, folder: Path) -> None:
        """What pip does with an editable package, without a network."""
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        info = self.site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(exist_ok=True)
        needs = "".join(f"Requires-Dist: {need}\n" for need in project["dependencies"])
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{needs}")
        points = "".join(f"{name} = {target}\n" for name, target in project["entry-points"]["irlvla"].items())
        (info / "entry_points.txt").write_text(f"[irlvla]\n{points}")
        self.monkeypatch.syspath_prepend(folder)

    def forget(self) -> None:
        """What a new process would not know."""
        for name in [name for name in sys.modules if name.partition(".")[0] in self.modules]:
            del sys.modules[name]
        importlib.invalidate_caches()
        registry.installed.cache_clear()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    reader = Reader(tmp_path, monkeypatch)
    yield reader
    reader.forget()


def test_a_stranger_can_follow_the_page(reader: Reader) -> None:
    reader.follow(PAGE)
    assert "acme_gaussian" in reader.printed["irlvla plugins"]
    assert "acme_top_speed" in reader.printed["IRLVLA_PLUGINS=acme irlvla plugins"]
    assert "blocked by IRLVLA_BLOCK" in reader.printed["IRLVLA_BLOCK=acme irlvla plugins"]
    assert "hidden: 64" in reader.printed["irlvla score recipe.yaml planner.hidden=64 --print-config"]
    (log,) = Path.cwd().rglob("log.csv")
    assert "top_speed" in log.read_text()
    mean, given = reader.names["Mean"], (testing.example_observation(), testing.example_scene(), testing.example_plan())
    assert torch.equal(mean(mean.Config(models=["exact", "exact"]))(*given).nc, irlvla.epdms(*given[1:]).nc)
