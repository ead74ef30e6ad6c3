"""`irlvla plugins`: which there are, whether they keep their contracts, and how to begin one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from irlvla.cli.checkup import Device, require
from irlvla.cli.program import FAILED
from irlvla.cli.stages import PluginFiles, add_plugins
from irlvla.cli.tables import print_table
from irlvla.errors import IrlvlaError

if TYPE_CHECKING:
    from irlvla.registry import Registry
    from irlvla.testing import Result

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _ListByDefault(TyperGroup):
    """`irlvla plugins` is `irlvla plugins list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asks_help = args and args[0] in ctx.help_option_names
        if not asks_help and (not args or args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_ListByDefault, help="List plugins (the default), check one, or begin a new one.")


# -- list --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """What a plugin provides."""

    kind: str
    name: str
    plugin: str
    version: str
    summary: str | None = None  # None = not asked for
    problem: str = ""


@app.command("list")
def list_plugins(
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Import every component, and say what it is.")] = False,
    plugin: PluginFiles = None,
) -> None:
    """List every component and tracker, the plugin that it comes from, and what cannot be used, and why.

    IRLVLA_PLUGINS=a,b loads only these plugins, IRLVLA_BLOCK=a,b all but these.

    Examples:

      irlvla plugins

      irlvla plugins --plugin my_planner.py --verbose
    """
    from irlvla.registry import installed

    add_plugins(plugin or ())
    registry = installed()
    rows = [*_components(registry, verbose), *_trackers(registry, verbose)]
    aside = [plugin for plugin in registry.plugins if plugin.problem]
    if as_json:
        provided = [{name: value for name, value in asdict(row).items() if value is not None} for row in rows]
        typer.echo(json.dumps({"provided": provided, "plugins": [asdict(plugin) for plugin in registry.plugins]}, indent=2))
        return
    header = ("kind", "name", "plugin", "version", *(["summary"] if verbose else []))
    cells = [(row.kind, row.name, row.plugin, row.version, *([row.summary] if verbose else [])) for row in rows]
    print_table(header, cells, bad=[i for i, row in enumerate(rows) if row.problem])
    for problem in dict.fromkeys([row.problem for row in rows if row.problem] + [f"{plugin}: {plugin.problem}" for plugin in aside]):
        typer.secho(f"Not usable: {problem}", fg=typer.colors.RED)


def _components(registry: Registry, verbose: bool) -> Iterator[_Row]:
    for entry in registry:
        summary, problem = None, ""
        try:
            registry.find(entry.kind, entry.name)
            summary = _first_line(entry.load()) if verbose else None
        except IrlvlaError as error:  # two plugins provide it, or it cannot be imported
            summary, problem = ("" if verbose else None), str(error)
        yield _Row(entry.kind, entry.name, entry.plugin.name, entry.plugin.version, summary, problem)


def _trackers(registry: Registry, verbose: bool) -> Iterator[_Row]:
    """Plugins that implement a hook about runs."""
    from irlvla.components import KINDS

    of_components = {f"irlvla_{kind}s" for kind in KINDS}
    for plugin in registry.plugins:
        module = registry.manager.get_plugin(f"{plugin.name}:{plugin.module}")
        hooks = {caller.name for caller in registry.manager.get_hookcallers(module) or ()} if module else set()
        if hooks - of_components:
            name = getattr(module, "__name__", plugin.name).rpartition(".")[2]
            yield _Row("tracker", name, plugin.name, plugin.version, _first_line(module) if verbose else None)


def _first_line(target: object) -> str:
    return (target.__doc__ or "").strip().split("\n")[0]


# -- check -------------------------------------------------------------------------------------------------------------


@app.command()
def check(
    package: Annotated[str, typer.Argument(help="The package, with or without irlvla-, or a Python file.")],
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.CPU,
    as_json: AsJson = False,
    plugin: PluginFiles = None,
) -> None:
    """Check that every component of a plugin keeps the contract of its kind. Exits with 1 if one does not.

    Examples:

      irlvla plugins check irlvla-acme

      irlvla plugins check my_planner.py
    """
    from irlvla.testing import check_plugin

    require(device)
    files = list(plugin or ())
    if package.endswith(".py"):
        files.append(Path(package))
        package = str(Path(package).expanduser().resolve())
    add_plugins(files)
    results = check_plugin(package, device.value)
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=2))
    else:
        _show(results)
    if any(result.problem for result in results):
        raise typer.Exit(FAILED)


def _show(results: list[Result]) -> None:
    """A table of what was checked, the problems in full, and their number."""
    outcomes = ["FAILED" if one.problem else f"skipped: {one.skipped}" if one.skipped else "passed" for one in results]
    failed = [i for i, one in enumerate(results) if one.problem]
    rows = [(one.kind, one.name, one.check, outcome) for one, outcome in zip(results, outcomes, strict=True)]
    print_table(("kind", "name", "check", "result"), rows, bad=failed)
    for i in failed:
        typer.secho(f"\n{results[i].check}: {results[i].problem}", fg=typer.colors.RED)
    passed = outcomes.count("passed")
    typer.echo(f"\n{passed} passed, {len(failed)} failed, {len(results) - passed - len(failed)} skipped")


# -- new ---------------------------------------------------------------------------------------------------------------


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the plugin: its package will be irlvla-NAME.")],
    folder: Annotated[Path, typer.Option(help="Where to put irlvla-NAME/.")] = Path(),
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND", help="What it provides: backbone, reasoner, planner, reward_model, rl_algorithm, dataset, metric or benchmark."
        ),
    ] = "planner",
) -> None:
    """Write a new plugin: a package that installs, works, and passes its checks.

    Examples:

      irlvla plugins new acme

      irlvla plugins new acme --kind metric --folder ~/plugins
    """
    from irlvla.scaffold import write_plugin

    package = write_plugin(name, folder, kind)
    typer.echo(
        f"{package} is written. Next:\n"
        f"  pip install -e {shlex.quote(str(package))}\n"
        f"  irlvla plugins check {package.name}\n"
        f"then change {package}/{package.name.replace('-', '_')}/{kind}.py into your own."
    )
