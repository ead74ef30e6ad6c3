"""Files and folders are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from irlvla import files
from irlvla.errors import FileError
from irlvla.files import link, remove_leftovers, remove_whole, whole_folder, write_whole

KILLED = 99
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree", "ctypes.dlsym"}  # sys.audit's events


def killed_at_each_step(action: Callable[[], object]) -> Iterator[None]:
    """Run an action in one child after the other: each ends, as if killed, one change of the file system later than the one before.

    Yields after each, and ends when the action was complete.
    """
    for steps in itertools.count():
        child = os.fork()
        if child == 0:
            _end_after(steps, action)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED)
        yield
        if code == 0:
            return


def _end_after(steps: int, action: Callable[[], object]) -> None:
    left = itertools.count(steps, -1)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            next(left) or os._exit(KILLED)

    try:
        sys.addaudithook(count)
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as new:
        (new / "a").write_text(text)
        (new / "deep" / "er").mkdir(parents=True)
        (new / "deep" / "er" / "b").write_text(text)


def filled(text: str) -> dict[str, str]:
    return {"a": text, "deep/er/b": text}


@pytest.fixture(params=["at once", "in two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Systems that can swap two folders, and those that cannot."""
    if request.param == "in two steps":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    elif sys.platform != "linux":
        pytest.skip("only Linux can")
    return request.param


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["text é", b"bytes \x00\xff"])
def test_a_file_is_written_and_replaced(tmp_path: Path, given: str | bytes):
    path = tmp_path / "file"
    assert write_whole(path, "old") == path
    write_whole(str(path), given)
    assert path.read_bytes() == (given.encode() if isinstance(given, str) else given)
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path):
    path = write_whole(tmp_path / "file", "old")
    seen = []
    for _ in killed_at_each_step(lambda: write_whole(path, "new")):
        seen.append(path.read_text())
    assert seen == sorted(seen, reverse=True)  # old ... old, new ... new
    assert set(seen) == {"old", "new"}
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(FileError, match=r"no/file cannot be written: No such file"):
        write_whole(tmp_path / "no" / "file", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder cannot be written: Is a directory"):
        write_whole(tmp_path / "folder", "")
    assert os.listdir(tmp_path) == ["folder"]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_and_replaced(tmp_path: Path, exchange: str):
    folder = tmp_path / "some" / "folder"
    for text in ("old", "new"):
        fill(folder, text)
        assert content(folder) == filled(text)
    with whole_folder(folder):
        pass
    assert content(folder) == {}
    assert os.listdir(folder.parent) == ["folder"]


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for text in ("old", "new"):
        fill(Path("folder"), text)
    assert content(tmp_path) == {f"folder/{name}": text for name, text in filled("new").items()}


def test_an_error_leaves_the_old_folder(tmp_path: Path, exchange: str):
    fill(tmp_path / "folder", "old")
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder") as new:  # noqa: PT012
        (new / "a").write_text("new")
        raise KeyError
    with pytest.raises(FileError, match="folder cannot be written: No such file"), whole_folder(tmp_path / "folder") as new:
        (new / "no" / "a").write_text("new")
    assert content(tmp_path / "folder") == filled("old")
    assert os.listdir(tmp_path) == ["folder"]


def test_an_error_of_the_exchange_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "folder", "old")
    replace, calls = os.replace, itertools.count()

    def fail_once(source: Path, target: Path) -> None:
        if next(calls) == 1:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(FileError, match="Input/output error"):
        fill(tmp_path / "folder", "new")
    assert content(tmp_path / "folder") == filled("old")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_in_the_way_stays(tmp_path: Path):
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(FileError, match="folder cannot be a folder: it is a file"):
        fill(tmp_path / "folder", "new")
    assert (tmp_path / "folder").read_text() == "mine"


def test_of_a_link_what_it_points_to_is_replaced(tmp_path: Path):
    fill(tmp_path / "far" / "folder", "old")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "far" / "folder") == filled("new")


def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path):
    if sys.platform != "linux":
        pytest.skip("only Linux can swap two folders at once")
    folder = tmp_path / "folder"
    fill(folder, "old")
    seen = []
    for _ in killed_at_each_step(lambda: fill(folder, "new")):
        assert content(folder) in (filled("old"), filled("new"))
        seen.append(content(folder)["a"])
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert seen == sorted(seen, reverse=True)
    assert os.listdir(tmp_path) == ["folder"]  # the last one removed what the killed ones had left


def test_a_kill_between_the_two_steps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    folder = tmp_path / "folder"
    fill(folder, "old")
    for _ in killed_at_each_step(lambda: fill(folder, "new")):
        if not folder.exists():  # killed between the steps: it is whole, under another name
            (aside,) = tmp_path.glob(".irlvla-folder-*.old")
            remove_leftovers(tmp_path)
            os.replace(aside, folder)
        assert content(folder) in (filled("old"), filled("new"))
        fill(folder, "old")


def test_a_folder_is_removed_whole(tmp_path: Path):
    folder = tmp_path / "folder"
    fill(folder, "old")
    for _ in killed_at_each_step(lambda: remove_whole(folder)):
        assert not folder.exists() or content(folder) == filled("old")
        if not folder.exists():
            fill(folder, "old")
    with pytest.raises(FileError, match="gone cannot be removed: No such file"):
        remove_whole(tmp_path / "gone")


def test_leftovers(tmp_path: Path):
    (tmp_path / ".irlvla-a-0123456789abcdef.tmp" / "deep").mkdir(parents=True)
    (tmp_path / ".irlvla-a-b-0123456789abcdef.tmp").write_text("")
    (tmp_path / ".irlvla-c-0123456789abcdef.tmp").symlink_to(tmp_path)
    (tmp_path / "mine.tmp").write_text("")
    remove_leftovers(tmp_path, "a")
    assert {path.name for path in tmp_path.iterdir()} == {
        ".irlvla-a-b-0123456789abcdef.tmp",
        ".irlvla-c-0123456789abcdef.tmp",
        "mine.tmp",
    }
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["mine.tmp"]
    remove_leftovers(tmp_path / "gone")


# -- links -------------------------------------------------------------------------------------------------------------


def test_a_kill_leaves_the_old_link_or_the_new_one(tmp_path: Path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    last = tmp_path / "last"
    link(last, "old")
    for _ in killed_at_each_step(lambda: link(last, "new")):
        assert os.readlink(last) in ("old", "new")
    assert os.readlink(last) == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder cannot be linked to new"):
        link(tmp_path / "folder", "new")
