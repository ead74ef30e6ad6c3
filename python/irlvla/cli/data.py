"""`irlvla convert` and `irlvla show`: scenes as files, and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irlvla.cli.stages import PluginFiles, add_plugins

if TYPE_CHECKING:
    from irlvla.components import Dataset

Settings = Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Settings of the dataset.")]


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The name of a dataset: irlvla plugins lists them.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the shards. One that was begun is finished.")],
    fields: Settings = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out what is missing or damaged, and list it in the index.")] = False,
    embed: Annotated[bool, typer.Option("--embed", help="Put the images into the shards, instead of their paths.")] = False,
    per_shard: Annotated[int, typer.Option(min=1, help="Scenes in a shard.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read; 0 = the main one.")] = 0,
    plugin: PluginFiles = None,
) -> None:
    """Convert a dataset to scene shards: safetensors with an index, mapped when they are read.

    A conversion that was stopped goes on after its last shard, and ends with the same bytes.

    Examples:

      irlvla convert av2 shards/ path=/data/av2/val

      irlvla convert navsim shards/ logs=navsim_logs/test maps=maps sensors=sensor_blobs/test split=navtest --workers 8
    """
    from irlvla import configuration
    from irlvla.stages import ConvertConfig
    from irlvla.stages import convert as run

    add_plugins(plugin or ())
    settings = {"data": source, "out": str(out), "skip": skip, "embed": embed, "per_shard": per_shard, "workers": workers}
    folder = run(configuration.read(ConvertConfig, settings, _of_data(fields)))
    from irlvla.shards import Shards

    shards = Shards(folder)
    skipped = f"; left out: {len(shards.index['skipped'])}, see {folder / 'index.json'}" if shards.index["skipped"] else ""
    typer.echo(f"{len(shards)} scenes in {len(shards.index['shards'])} shards: {folder}{skipped}")


def show(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A folder of shards, a file of Scene.save, or the name of a dataset; or a run."),
    ],
    fields: Settings = None,
    index: Annotated[int, typer.Option(help="Which scene; negative counts from the end.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The picture. Default: DATA-INDEX.png here.")] = None,
    planner: Annotated[str | None, typer.Option(metavar="NAME", help="Draw the plans of this planner too.")] = None,
    candidates: Annotated[int, typer.Option(min=1, help="How many plans.")] = 1,
    width: Annotated[int, typer.Option(min=200, help="Of the picture [pixels].")] = 1400,
    plugin: PluginFiles = None,
) -> None:
    """Draw a scene from above and through its cameras, with plans coloured by their score and what the worst of them does wrong.

    Of the directory of a training, finished or not, draw its learning curve.

    Examples:

      irlvla show shards/ --index 3

      irlvla show av2 path=/data/av2/val size=[256,704] --planner constant_velocity

      irlvla show runs/small
    """
    if (metrics := Path(data) / "metrics.jsonl").exists():
        from irlvla.plots import draw_learning_curve

        typer.echo(draw_learning_curve(metrics, out or Path(data) / "learning_curve.png"))
        return
    import irlvla
    from irlvla.pictures import draw_scene
    from irlvla.registry import installed

    add_plugins(plugin or ())
    dataset = _open(data, fields)
    if not -len(dataset) <= index < len(dataset):
        raise irlvla.InputError(f"--index {index}: {data} has {len(dataset)} scenes, counted from 0")
    obs, scene, human = dataset[index]
    plan = irlvla.Plan(human.poses[:, None].double(), human.dt)
    if planner is not None:
        plan = installed().build_policy("status", planner).eval().sample(obs, candidates)
    known = not bool(plan.poses.isnan().any())
    result = irlvla.epdms(scene, plan, human_filter="none", details=True) if known else None
    path = out or Path(f"{Path(data).stem}-{index}.png")
    draw_scene(scene, plan if planner is not None else None, result, obs, width).save(path)
    typer.echo(path)


def _of_data(fields: list[str] | None) -> list[str]:
    """Settings of the dataset as overrides of a recipe."""
    return [f"data.{field}" for field in fields or ()]


def _open(data: str, fields: list[str] | None) -> Dataset:
    from irlvla import Config, Spec, build, configuration, pluggable

    class Data(Config):
        data: Spec = pluggable("dataset")

    path = Path(data)
    spec = {"name": "cached" if path.is_dir() and (path / "index.json").exists() else "scenes", "path": data} if path.exists() else data
    return build("dataset", configuration.read(Data, {"data": spec}, _of_data(fields)).data)
