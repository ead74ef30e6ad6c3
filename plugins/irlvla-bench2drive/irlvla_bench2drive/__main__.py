"""`python -m irlvla_bench2drive`: serve a policy to the CARLA leaderboard, and name the files that run there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from irlvla.cli.program import Program

IN_CARLA = Path(__file__).parent / "in_carla"

app = typer.Typer(
    cls=Program, help="Drive Bench2Drive with a saved policy.", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown"
)


@app.command()
def serve(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A saved policy: its folder, or its name on the Hub.")],
    fields: Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Set a field, as port=2711.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every field with type, default and help.")] = False,
) -> None:
    """Let a policy drive every car whose agent asks: the leaderboard's, with `irlvla_agent.py`.

    Examples:

      python -m irlvla_bench2drive serve runs/imitate/checkpoints/best/model size=[256,704] device=cuda

      python -m irlvla_bench2drive serve owner/name port=2711 cameras=[CAM_FRONT,CAM_FRONT_LEFT,CAM_FRONT_RIGHT]
    """
    from irlvla import configuration
    from irlvla_bench2drive.server import PolicyServer, ServeConfig, load_policy

    if print_config:
        typer.echo(configuration.describe(ServeConfig, configuration.merge(ServeConfig, {"policy": policy}, fields or ())), nl=False)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = configuration.read(ServeConfig, {"policy": policy}, fields or ())
    with PolicyServer(load_policy(config), config) as server:
        address = f"{config.host}:{server.server_address[1]}"
        typer.echo(f"serving {policy} on {address}\n  TEAM_AGENT={IN_CARLA / 'irlvla_agent.py'} TEAM_CONFIG={address}")
        server.serve_forever()


@app.command()
def files() -> None:
    """Print where the files are that run in CARLA's Python: the agent, and the script that finds junctions."""
    for name in ("irlvla_agent.py", "junctions.py"):
        typer.echo(IN_CARLA / name)


if __name__ == "__main__":
    app(prog_name="python -m irlvla_bench2drive")
