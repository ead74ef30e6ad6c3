"""What becomes of an error: a user's mistake ends with a message and exit code 2, a plugin's with its name and a traceback."""

from __future__ import annotations

import re
import sys
import traceback
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from irlvla.errors import IrlvlaError

if TYPE_CHECKING:
    from types import FrameType

    from irlvla.registry import Plugin

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130  #: exit codes


class Program(TyperGroup):
    """All commands."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except IrlvlaError as error:
            typer.secho("\n  ".join([f"error: {error}", *_origin(error)]), err=True, fg=typer.colors.RED)
            raise typer.Exit(WRONG_USE) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            for line in _origin(error):
                typer.secho(f"error {line}", err=True, fg=typer.colors.RED)
            raise


def _origin(error: Exception) -> list[str]:
    """In which plugin an error arose, and where; nothing if it did not pass through one."""
    registry = sys.modules.get("irlvla.registry")
    if registry is None or not registry.installed.cache_info().currsize:
        return []  # no plugin has been loaded
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for plugin in registry.installed().plugins:
            if _is_of(frame, plugin):
                return [f"in the plugin {plugin}: {frame.f_code.co_filename}, line {line}"]
    return []


def _is_of(frame: FrameType, plugin: Plugin) -> bool:
    if not plugin.version:
        return frame.f_code.co_filename == plugin.module
    package = re.split("[.:]", plugin.module)[0]
    return package not in ("", "irlvla") and frame.f_globals.get("__name__", "").partition(".")[0] == package


def version_of(package: str) -> str:
    """The version of a distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
