"""`irlvla evaluate`: policies in scenes, or, with --benchmark, a published comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, cast

import typer

from irlvla.cli.stages import Fields, PluginFiles, PrintConfig, Recipe, add_plugins, run_stage
from irlvla.cli.tables import print_table


def evaluate(
    recipe: Recipe = None,
    fields: Fields = None,
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A published comparison; `irlvla plugins` lists them. Its settings are benchmark.SETTING=VALUE."),
    ] = None,
    plugin: PluginFiles = None,
    print_config: PrintConfig = False,
) -> None:
    """Let several policies drive in the same scenes, score them exactly, and report what is certain of the differences.

    Writes RUN/report.html (one file, no network needed), RUN/summary.json, RUN/scores.csv (every value of every scene), RUN/official
    (tables in the layout of the devkit) and RUN/plans. With resume=true a run that was stopped goes on.

    A benchmark that is driven in a simulator elsewhere takes result files in the place of a recipe, and prints what they come to;
    out=FOLDER writes it too.

    Examples:

      irlvla evaluate data.path=scenes/ data.name=cached policies='{straight: constant_velocity, human: human}'

      irlvla evaluate recipes/small.yaml policies.mine.policy=runs/mine/checkpoints/best/model

      irlvla evaluate recipes/small.yaml out=runs/evaluation resume=true

      irlvla evaluate --benchmark navtest benchmark.root=openscene/ policies.mine.policy=runs/mine/checkpoints/best/model

      irlvla evaluate --benchmark bench2drive results.json
    """
    from irlvla.benchmarks import is_driven_elsewhere

    arguments = [*filter(None, [recipe]), *(fields or ())]
    add_plugins(plugin or ())
    if benchmark is not None and is_driven_elsewhere(benchmark) and not print_config:
        _show(_summary(benchmark, arguments))
        return
    chosen = [] if benchmark is None else [f"benchmark.name={benchmark}"]
    run_stage("evaluate", "irlvla.stages.evaluation:evaluate", [*chosen, *arguments], (), print_config, ["--benchmark"])


def _summary(benchmark: str, arguments: Iterable[str]) -> dict[str, Any]:
    """Of the result files among the arguments; the others set fields."""
    from irlvla import configuration
    from irlvla.benchmarks import SummariseConfig, summarise
    from irlvla.registry import installed

    given = list(arguments)
    fields = [argument for argument in given if "=" in argument.partition("/")[0]]
    recipe = {"benchmark": {"name": benchmark}, "results": [argument for argument in given if argument not in fields]}
    config = installed().validate(SummariseConfig, configuration.merge(SummariseConfig, recipe, fields))
    return summarise(cast(SummariseConfig, config))


def _show(summary: dict[str, Any]) -> None:
    for title, rows in summary["tables"].items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        typer.echo(f"{title}\n")
        print_table(columns, [[_cell(row.get(column)) for column in columns] for row in rows])
        typer.echo()
    typer.echo(f"{summary['plugin']}: {len(summary['results'])} result files")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
