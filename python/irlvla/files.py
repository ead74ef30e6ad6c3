"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from irlvla.errors import FileError


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file so that a kill at any moment leaves the old one or the new one, never a part.

    Raises:
        FileError: it cannot be written.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends without an error; an older `path` is replaced then.

    A kill leaves the old folder or the new one whole; what it leaves of an unfinished one begins with ".irlvla-".
    """
    path = Path(path)
    temporary, old = _beside(path), _beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, in one step: readers see the old target or the new one."""
    temporary = _beside(path)
    try:
        os.symlink(target, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path} cannot be linked to {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.parent / f".irlvla-{secrets.token_hex(8)}.tmp"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
