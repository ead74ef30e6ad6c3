"""The command line: `irlvla COMMAND`, `irlvla --help`.

Commands import what they need when they run, so that `irlvla --help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from irlvla.cli import checkup, data, evaluation, plugins, training
from irlvla.cli.program import Program, version_of
from irlvla.cli.stages import UNKNOWN_OPTIONS, add_stage

app = typer.Typer(
    cls=Program,
    help="Train Vision-Language-Action driving policies with learned rewards, and score trajectories exactly as NAVSIM v2.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"irlvla {version_of('irlvla')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


add_stage(
    app,
    "imitate",
    "irlvla.stages.imitation:imitate",
    """Train a policy on human drives, and score it exactly in held-out scenes while it learns.

    Writes RUN/checkpoints (the newest, and best/model), RUN/learning_curve.png and RUN/summary.json (the best policy's scores).

    Examples:

      irlvla imitate recipes/demo.yaml

      irlvla imitate recipes/small.yaml seed=1 reasoner=null out=runs/without-language

      irlvla imitate recipes/small.yaml out=runs/small resume=true
    """,
)
add_stage(
    app,
    "reward",
    "irlvla.stages.reward_learning:reward",
    """Train a reward world model on candidates that are made and scored exactly as it learns, and evaluate it in held-out scenes.

    Writes RUN/model (calibrated), RUN/report.md, report.json and pictures, RUN/checkpoints and RUN/learning_curve.png.

    Examples:

      irlvla reward recipes/demo.yaml

      irlvla reward recipes/small.yaml seed=1 inverse.weight=0 out=runs/labels-alone

      irlvla reward recipes/small.yaml out=runs/small-reward resume=true
    """,
)
add_stage(
    app,
    "probe",
    "irlvla.stages.probing:probe",
    """Let candidates climb a learned reward by its gradient, and score them exactly: what it can be made to believe.

    Writes RUN/report.md, RUN/probe.json and RUN/hacking.png.

    Examples:

      irlvla probe recipes/small.yaml saved_reward=runs/small-reward/model

      irlvla probe recipes/small.yaml 'reward={name: ensemble, saved: [runs/a/model, runs/b/model, runs/c/model]}'
    """,
)
add_stage(
    app,
    "reinforce",
    "irlvla.stages.reinforcement:reinforce",
    """Improve a saved policy by a reward, learned or exact, while the exact score watches.

    Writes RUN/checkpoints (the newest, and best/model), RUN/learning_curve.png and RUN/summary.json (the best policy's scores, and why it
    stopped if the reward believed too much).

    Examples:

      irlvla reinforce recipes/small.yaml

      irlvla reinforce recipes/small.yaml saved_reward=null reward=exact algorithm=grpo out=runs/exact

      irlvla reinforce recipes/small.yaml out=runs/small-rl resume=true
    """,
)
app.command(context_settings=UNKNOWN_OPTIONS)(evaluation.evaluate)
add_stage(
    app,
    "score",
    "irlvla.stages.scoring:score",
    """Measure the plans of a policy, of a planner or of a file in every scene of a dataset.

    Writes RUN/scores.csv (every value of every scene) and RUN/summary.json (means).

    Examples:

      irlvla score data.path=scenes/ planner=constant_velocity

      irlvla score data.path=scenes/ policy=runs/imitate/checkpoints/last/model candidates=16

      irlvla score data.path=scenes/ plans=plans.safetensors metrics='[epdms]'
    """,
)
app.command()(training.train)
app.command()(training.demo)
app.command()(data.convert)
app.command()(data.show)
app.add_typer(plugins.app, name="plugins")
app.command()(checkup.conformance)
app.command()(checkup.doctor)
app.command()(checkup.cost)
