"""Errors written for the person who made them: what was given, what is accepted, what to do."""

import difflib
from collections.abc import Iterable


class IrlvlaError(Exception):
    """Root of every error that irlvla raises on purpose."""


class InputError(IrlvlaError, ValueError):
    """An argument or a value in the data is not acceptable."""


class ConfigError(InputError):
    """A configuration has a wrong name, field, type or value."""


class ContractError(IrlvlaError, TypeError):
    """A component breaks the contract of its kind: a wrong shape, no gradient, a missing method. Its author must mend it."""


class PluginError(IrlvlaError, LookupError):
    """A plugin is missing, broken, outdated, or provides a name that another one provides too."""

    def __str__(self) -> str:
        return str(self.args[0])


class FileError(IrlvlaError, OSError):
    """A file is missing, truncated, corrupt, or not of the expected kind."""


class BuildError(IrlvlaError, RuntimeError):
    """The compiled core lacks what was asked for (for example CUDA)."""


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """ "Did you mean 'spline'? " for the accepted name nearest to what was given; nothing if none is near."""
    near = difflib.get_close_matches(str(given), list(accepted), 1, 0.5)
    return f"Did you mean {near[0]!r}? " if near else ""
