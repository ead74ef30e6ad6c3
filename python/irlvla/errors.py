"""Errors written for the person who made them: what was given, what is accepted, what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class IrlvlaError(Exception):
    """Root of every error that irlvla raises on purpose."""


class InputError(IrlvlaError, ValueError):
    """An argument or a value in the data is not acceptable."""


class ConfigError(InputError):
    """A configuration has a wrong name, field, type or value."""


class MissingError(ConfigError):
    """A field of a configuration has no value, and needs one."""


class Mistakes(ConfigError):
    """Several mistakes in a configuration, reported at once."""

    def __init__(self, errors: Iterable[IrlvlaError]) -> None:
        self.errors = tuple(errors)
        super().__init__(self.errors)

    def __str__(self) -> str:
        lines = [str(error).replace("\n", "\n    ") for error in self.errors]
        return "\n  ".join([f"{len(lines)} mistakes in the configuration:", *lines])


class ContractError(IrlvlaError, TypeError):
    """A component breaks the contract of its kind: a wrong shape, no gradient, a missing method. Its author must mend it."""


class PluginError(IrlvlaError, LookupError):
    """A plugin is missing, broken, outdated, or provides a name that another one provides too."""


class FileError(IrlvlaError, OSError):
    """A file is missing, truncated, corrupt, or not of the expected kind."""


class BuildError(IrlvlaError, RuntimeError):
    """The compiled core lacks what was asked for (for example CUDA)."""


@contextmanager
def collecting(errors: list[IrlvlaError]) -> Iterator[None]:
    """Add the mistakes of a block to a list instead of raising them."""
    try:
        yield
    except Mistakes as error:
        errors += error.errors
    except IrlvlaError as error:
        errors.append(error)


def raise_all(errors: list[IrlvlaError]) -> None:
    """Raise what was collected: the error itself if it is one, `Mistakes` if there are several, nothing if there are none."""
    if errors:
        raise errors[0] if len(errors) == 1 else Mistakes(errors)


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """The accepted name nearest to what was given, as "Did you mean 'spline'? "; "" if none is near."""
    names = {name.lower(): name for name in accepted}
    near = difflib.get_close_matches(str(given).lower(), names, 1, 0.5)
    return f"Did you mean {names[near[0]]!r}? " if near else ""
