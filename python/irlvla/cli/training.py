"""`irlvla train` and `irlvla demo`: all stages of a recipe in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from irlvla.cli.stages import PluginFiles, add_plugins, show_result
from irlvla.errors import FileError

Fields = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="SECTION.FIELD=VALUE sets a field of one section, FIELD=VALUE of all that have it."),
]
Only = Annotated[str | None, typer.Option(metavar="SECTION", help="Run this section alone.")]


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file with a section for each stage.")],
    fields: Fields = None,
    only: Only = None,
    plugin: PluginFiles = None,
) -> None:
    """Run the stages of a recipe one after another: imitate, reward, reinforce, evaluate.

    What is finished is left alone, and what was stopped goes on: run the same command again. The run of a section is the folder of
    its name in the recipe's `runs`.

    Examples:

      irlvla train recipes/small.yaml

      irlvla train recipes/small.yaml runs=runs/second seed=1 reinforce.steps=100
    """
    from irlvla.stages import pipeline

    add_plugins(plugin or ())
    steps = pipeline.chosen(pipeline.read_steps(recipe, fields or ()), only)
    for number, step in enumerate(steps, 1):
        state = "is finished" if step.is_finished() else "begins" if step.began() is None else "goes on"
        typer.secho(f"[{number}/{len(steps)}] {step.name} {state}: {step.out}", err=True, bold=True)
        step.run()
    show_result(steps[-1].out)


def demo(fields: Fields = None, only: Only = None, plugin: PluginFiles = None) -> None:
    """Run everything in the embedded world, in minutes on two cores: the recipe demo.yaml.

    Ends with a table of what each policy is worth, and the path of the report. Run it again if it was stopped: it goes on.

    Examples:

      irlvla demo

      irlvla demo runs=runs/demo-1 seed=1
    """
    train(_demo_recipe(), fields, only, plugin)


def _demo_recipe() -> Path:
    """Where demo.yaml is: beside the package, or in the source tree."""
    package = Path(__file__).parents[1]
    places = [package / "recipes" / "demo.yaml", package.parents[1] / "recipes" / "demo.yaml"]
    for place in places:
        if place.is_file():
            return place
    raise FileError(f"demo.yaml is neither {places[0]} nor {places[1]}; give a recipe: irlvla train RECIPE")
