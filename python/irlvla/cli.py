"""The command line: `irlvla COMMAND`, `irlvla --help`.

Commands import what they need when they run, so that `irlvla --help` is quick. A user's mistake ends with a message and exit
code 2, a check that fails with exit code 1, and neither with a traceback.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from irlvla.errors import IrlvlaError

FAILED, WRONG_USE = 1, 2  #: exit codes

app = typer.Typer(
    help="Train Vision-Language-Action driving policies with learned rewards, and score trajectories exactly as NAVSIM v2.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Device(StrEnum):
    """Where to compute."""

    CPU = "cpu"
    CUDA = "cuda"


def main() -> None:
    """Run the command line."""
    try:
        app()
    except IrlvlaError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(WRONG_USE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"irlvla {_version('irlvla')}")
        raise typer.Exit


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


# -- conformance -------------------------------------------------------------------------------------------------------


@app.command()
def conformance(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Golden files (.npz), or folders with them. Default: the set of the source tree.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to score.")] = Device.CPU,
    only: Annotated[
        str | None, typer.Option("--set", metavar="NAME", help="Only the set of this name (a folder, or files NAME_00.npz).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score the candidates of golden files and compare every value with that of the official NAVSIM v2 code.

    Exits with 1 if anything differs. Candidates that the files mark as fragile (a change of a micrometre flips a decision) are
    counted apart: there the last bit of a double decides.
    """
    from irlvla.conformance import compare

    _require(device)
    report = compare(paths or [_default_golden()], device.value, only)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        rows = [
            (
                c.name,
                c.candidates,
                c.mismatches,
                f"{c.fragile_mismatches} of {c.fragile}" if c.fragile else "",
                f"{c.largest_error:.1e}",
                _place(c.first),
            )
            for c in report.checks.values()
        ]
        _table(
            ("metric", "candidates", "mismatches", "fragile", "largest error", "first mismatch"),
            rows,
            bad=[c.mismatches > 0 for c in report.checks.values()],
        )
        typer.echo(
            (f"{report.scenes} scenes, {report.candidates} candidates: " if report.scenes else "")
            + f"{report.mismatches or 'no'} mismatches"
            + (f"; {report.rate:,.0f} candidates/s on {report.device}" if report.seconds else "")
            + (f"; skipped (inputs only): {', '.join(report.skipped)}" if report.skipped else "")
        )
    if report.mismatches:
        raise typer.Exit(FAILED)


def _default_golden() -> Path:
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "tests" / "golden").is_dir():
            return root / "tests" / "golden"
    raise typer.BadParameter(
        "no golden files given, and no tests/golden here; clone the source for the small set, or name a file or folder"
    )


def _place(first: tuple[str, int] | None) -> str:
    if first is None:
        return ""
    scene, candidate = first
    return scene if candidate < 0 else f"{scene} #{candidate}"


# -- doctor ------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what was built, what was found on this machine, and whether the scorer gives known answers. Exits with 1 if not."""
    facts = {"versions": _versions(), "built": _built(), "found": _found()}
    checks = {
        device: _self_check(device) for device in ["cpu", *(["cuda"] if facts["built"].get("cuda") and facts["found"]["gpus"] else [])]
    }
    if as_json:
        typer.echo(json.dumps({**facts, "checks": checks}, indent=2))
    else:
        rows = [(section, name, _plain(value)) for section, values in facts.items() for name, value in values.items()]
        rows += [("self-check", device, "; ".join(problems) or "passed") for device, problems in checks.items()]
        _table(("", "", ""), rows, bad=[row[0] == "self-check" and row[2] != "passed" for row in rows])
    if any(checks.values()):
        raise typer.Exit(FAILED)


def _versions() -> dict[str, Any]:
    import platform

    packages = {name: _version(name) for name in ("irlvla", "torch", "numpy", "pluggy", "pydantic", "safetensors")}
    return {**packages, "python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}


def _built() -> dict[str, Any]:
    try:
        from irlvla.ops import _native
    except ImportError as error:
        return {"core": f"missing: {error}"}
    core = vars(_native)["_C"]
    return {"core": core.__file__, **core.build_info(), "isa": core.isa()}


def _found() -> dict[str, Any]:
    import os

    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus],
        "driver": _driver(),
        "torch CUDA": torch.version.cuda,
        "torch threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver; None = none found."""
    import subprocess

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0] or None
    except (OSError, subprocess.SubprocessError):
        return None


def _self_check(device: str) -> list[str]:
    """Problems, one line each."""
    try:
        from irlvla.conformance import self_check

        return self_check(device)
    except Exception as error:  # whatever is broken is what the doctor is asked to report
        return [f"{type(error).__name__}: {error}"]


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- shared ------------------------------------------------------------------------------------------------------------


def _require(device: Device) -> None:
    import torch

    if device is Device.CUDA and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device was found; `irlvla doctor` says what was", param_hint="--device")


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]], bad: list[bool]) -> None:
    """A table: coloured on a terminal, columns of plain text elsewhere. `bad` rows stand out."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, show_header=any(header), box=None, pad_edge=False)
        for row, wrong in zip(rows, bad, strict=True):
            table.add_row(*(str(cell) for cell in row), style="red" if wrong else None)
        Console().print(table)
        return
    lines = [tuple(map(str, row)) for row in ([header] if any(header) else []) + rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
