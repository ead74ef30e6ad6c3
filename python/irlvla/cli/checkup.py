"""`irlvla conformance`, `irlvla doctor` and `irlvla cost`: is the score exact, is the installation sound, what does a step take?"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import irlvla
from irlvla.cli.program import FAILED, version_of
from irlvla.cli.stages import PluginFiles, add_plugins
from irlvla.cli.tables import print_table
from irlvla.errors import PluginError

if TYPE_CHECKING:
    from irlvla.conformance import Check

PACKAGES = ("irlvla", "torch", "numpy", "pluggy", "pydantic", "omegaconf", "accelerate", "safetensors", "huggingface-hub")


class Device(StrEnum):
    """Where to compute."""

    CPU = "cpu"
    CUDA = "cuda"


# -- conformance -------------------------------------------------------------------------------------------------------


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

    Examples:

      irlvla conformance

      irlvla conformance golden/ --set public --device cuda --json
    """
    from irlvla.conformance import compare

    require(device)
    report = compare(paths or [_default_golden()], device.value, only)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        checks = list(report.checks.values())
        print_table(
            ("metric", "candidates", "mismatches", "fragile", "largest error", "first mismatch"),
            [_row(check) for check in checks],
            bad=[i for i, check in enumerate(checks) if check.mismatches],
        )
        typer.echo(
            (f"{report.scenes} scenes, {report.candidates} candidates: " if report.scenes else "")
            + f"{report.mismatches or 'no'} mismatches"
            + (f"; {report.rate:,.0f} candidates/s on {report.device}" if report.seconds else "")
            + (f"; skipped (inputs only): {', '.join(report.skipped)}" if report.skipped else "")
        )
    if report.mismatches:
        raise typer.Exit(FAILED)


def _row(check: Check) -> tuple[Any, ...]:
    fragile = f"{check.fragile_mismatches} of {check.fragile}" if check.fragile else ""
    return check.name, check.candidates, check.mismatches, fragile, f"{check.largest_error:.1e}", _place(check.first)


def _default_golden() -> Path:
    for root in (Path(irlvla.__file__).resolve().parents[2], Path.cwd()):
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


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what was built, what was found on this machine, and whether the scorer gives known answers. Exits with 1 if not."""
    facts = {"versions": _versions(), "plugins": _plugins(), "built": _built(), "found": _found()}
    checks = {
        device: _self_check(device) for device in ["cpu", *(["cuda"] if facts["built"].get("cuda") and facts["found"]["gpus"] else [])]
    }
    if as_json:
        typer.echo(json.dumps({**facts, "checks": checks}, indent=2))
    else:
        rows = [(section, name, line) for section, values in facts.items() for name, value in values.items() for line in _lines(value)]
        rows += [("self-check", device, "; ".join(problems) or "passed") for device, problems in checks.items()]
        print_table(("", "", ""), rows, bad=[i for i, row in enumerate(rows) if row[0] == "self-check" and row[2] != "passed"])
    if any(checks.values()):
        raise typer.Exit(FAILED)


def _versions() -> dict[str, Any]:
    import platform

    packages = {name: version_of(name) for name in PACKAGES}
    return {**packages, "python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}


def _plugins() -> dict[str, Any]:
    """How many can be used, and why others cannot."""
    try:
        from irlvla.registry import installed

        plugins = installed().plugins
    except (ImportError, PluginError) as error:
        return {"usable": 0, "set aside": {"all": str(error)}}
    return {
        "usable": sum(not plugin.problem for plugin in plugins),
        "set aside": {str(plugin): plugin.problem for plugin in plugins if plugin.problem},
    }


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


def _lines(value: Any) -> list[str]:
    """A fact as lines of a table."""
    if value is None or value == [] or value == {}:
        return ["none"]
    if isinstance(value, dict):
        return [f"{name}: {reason}" for name, reason in value.items()]
    return [", ".join(map(str, value)) if isinstance(value, list) else str(value)]


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe of imitate.")],
    fields: Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="Set a field, as for imitate.")] = None,
    depth: Annotated[int, typer.Option(min=0, help="Show modules within modules so far down.")] = 2,
    plugin: PluginFiles = None,
) -> None:
    """Count what one batch of imitation costs, by module: parameters, operations, and memory for activations. It runs on the CPU.

    Operations are those of matrix products, convolutions and attention. Memory is what the forward keeps for the backward pass.

    Examples:

      irlvla cost recipes/small.yaml

      irlvla cost recipes/navsim.yaml batch=1 data.train='{name: synthetic, rig: navsim, size: [256, 704]}' backbone.encoder.pretrained=no
    """
    from irlvla import configuration
    from irlvla.stages.costs import cost as count
    from irlvla.stages.imitation import ImitateConfig

    add_plugins(plugin or ())
    config = configuration.read(ImitateConfig, recipe, fields or (), "imitate")
    costs, backward = count(config, depth)
    rows = [(of.name or "policy", f"{of.parameters / 1e6:.3f}", f"{of.flops / 1e9:.3f}", f"{of.activations / 2**20:.1f}") for of in costs]
    print_table(("module", "parameters [M]", "forward [GFLOP]", "activations [MiB]"), rows)
    typer.echo(f"{config.batch} scenes at once; backward {backward / 1e9:.3f} GFLOP; precision {config.precision}")


def require(device: Device) -> None:
    """Raise `typer.BadParameter` for a device that this machine lacks."""
    import torch

    if device is Device.CUDA and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device was found; `irlvla doctor` says what was", param_hint="--device")
