"""Errors written for the person who made them: what was given, what is accepted, what to do."""


class IrlvlaError(Exception):
    """Root of every error that irlvla raises on purpose."""


class InputError(IrlvlaError, ValueError):
    """An argument or a value in the data is not acceptable."""


class FileError(IrlvlaError, OSError):
    """A file is missing, truncated, corrupt, or not of the expected kind."""


class BuildError(IrlvlaError, RuntimeError):
    """The compiled core lacks what was asked for (for example CUDA)."""
