"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import secrets
import shutil
import sys
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


def files_under(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder and its sub-folders whose names match, in order of path; unlike rglob, behind links to folders too."""
    return sorted(folder / path for path in glob.iglob(f"**/{pattern}", root_dir=folder, recursive=True, include_hidden=True))


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends without an error; an older `path` is replaced then.

    A kill leaves the old folder or the new one whole; what it leaves of an unfinished one, the next `whole_folder` removes.

    Raises:
        FileError: it cannot be written.
    """
    path = Path(path).resolve()  # of a link, what it points to is replaced
    temporary = _beside(path)
    try:
        if path.exists() and not path.is_dir():
            raise FileError(f"{path} cannot be a folder: it is a file")
        remove_leftovers(path.parent, path.name)
        temporary.mkdir(parents=True)
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder. A kill leaves it whole or gone, never a part under its name."""
    temporary = _beside(folder)
    try:
        os.replace(folder, temporary)
        shutil.rmtree(temporary)
    except OSError as error:
        raise FileError(f"{folder} cannot be removed: {error.strerror or error}") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what a kill left of unfinished writes in a folder: of `name` in it, or of all."""
    for leftover in folder.glob(".irlvla-*.tmp" if name is None else f"{glob.escape(_prefix(name))}{'[0-9a-f]' * 16}.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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


def _prefix(name: str) -> str:
    if len(name) > 32:  # not longer than a file system takes, and names that begin alike stay apart
        name = f"{name[:15]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".irlvla-{name}-"


def _beside(path: Path) -> Path:
    return path.parent / f"{_prefix(path.name)}{secrets.token_hex(8)}.tmp"


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the system can (Linux, on most file systems)."""
    if sys.platform == "linux":
        at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
        if renameat2 is not None and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
            return
    # In two steps, a kill between them leaves the old folder whole under a name that nothing removes.
    aside = old.with_name(f"{_prefix(old.name)}{secrets.token_hex(8)}.old")
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
