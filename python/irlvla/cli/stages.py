"""`irlvla STAGE [RECIPE] [FIELD=VALUE]...`: every stage is a function of one configuration, and its command is made here."""

from __future__ import annotations

import json
import pkgutil
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from irlvla.cli.tables import print_table
from irlvla.errors import ConfigError, did_you_mean

Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", help="A YAML file, or its section for this stage. Default: no file.")]
Fields = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Set a field: planner=NAME, planner.SETTING=VALUE. --print-config shows all."),
]
PluginFiles = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A Python file to take as a plugin. May be given several times.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the recipe that would run, with type, default and help of every field.")
]

UNKNOWN_OPTIONS = {"ignore_unknown_options": True}  #: of a command, so that `_split` can say what was meant


def add_stage(app: typer.Typer, name: str, target: str, help: str) -> None:
    """Add the command of a stage.

    Args:
        name: of the command, and of its section in a recipe of several stages.
        target: "module:function", imported when the command runs. The function has one argument, `config`, annotated with
            its schema, and returns the directory of the run.
    """

    @app.command(name, help=help, context_settings=UNKNOWN_OPTIONS)
    def command(recipe: Recipe = None, fields: Fields = None, plugin: PluginFiles = None, print_config: PrintConfig = False) -> None:
        run_stage(name, target, [*filter(None, [recipe]), *(fields or ())], plugin or (), print_config)


def run_stage(
    name: str, target: str, arguments: Iterable[str], plugins: Iterable[Path], print_config: bool, options: Iterable[str] = ()
) -> None:
    """Run a stage with the recipe and the overrides among the arguments, or print what would run.

    Args:
        options: that its command has beside those of all, for who misspells one.
    """
    from irlvla import configuration

    recipe, overrides = _split(arguments, options)
    add_plugins(plugins)
    stage = pkgutil.resolve_name(target)
    schema = typing.get_type_hints(stage)["config"]
    if print_config:
        typer.echo(configuration.describe(schema, configuration.merge(schema, recipe, overrides, name)), nl=False)
    else:
        directory = stage(configuration.read(schema, recipe, overrides, name))
        if _is_main():
            show_result(directory)


def _is_main() -> bool:
    """Whether this process is the one that speaks, of those that a launcher started."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def show_result(directory: Path) -> None:
    """Print what a run came to, if it says so in summary.json, and where its files are."""
    path = directory / "summary.json"
    if path.exists():
        summary = json.loads(path.read_text())
        if "policies" in summary:
            from irlvla.report import overview

            print_table(*overview(summary))
        rows = [(name, "-" if of["mean"] is None else f"{of['mean']:.4f}", of["count"]) for name, of in summary.get("metrics", {}).items()]
        if rows:
            print_table(("metric", "mean", "scenes"), rows)
        typer.echo(summary.get("result") or f"{summary['scenes']} scenes, {summary['scenes_per_second']:.1f} scenes/s")
    typer.echo(f"{directory}: {', '.join(sorted(file.name for file in directory.iterdir()))}")


def add_plugins(files: Iterable[Path]) -> None:
    """Register files as plugins. Raises `PluginError` for one that cannot be used."""
    from irlvla.registry import installed

    for file in files:
        installed().add_file(file)


def _split(arguments: Iterable[str], options: Iterable[str]) -> tuple[str | None, list[str]]:
    """The recipe and the overrides, FIELD=VALUE. A path may hold "=" after a folder: runs/lr=3/config.yaml."""
    recipe, overrides = None, []
    for argument in arguments:
        field, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            near = did_you_mean(field, [*options, "--plugin", "--print-config", "--help"])
            raise ConfigError(f"there is no option {field}. {near}A field is set without dashes: {field.lstrip('-')}=VALUE")
        if equals and "/" not in field:
            overrides.append(argument)
        elif recipe is None:
            recipe = argument
        else:
            raise ConfigError(f"{argument!r} is a second recipe after {recipe!r}; to set a field, write FIELD=VALUE")
    return recipe, overrides
