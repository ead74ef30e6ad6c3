"""How far a loop is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text
from torch import Tensor

INTERVAL = 10.0  #: seconds between lines


class Progress:
    """Counts what a loop does. This one shows nothing."""

    def advance(self, n: int = 1, **values: Any) -> None:
        """Count n more, and show these values from now on. Tensors are read only when they are shown."""


@contextmanager
def track(total: int, description: str, start: int = 0, show: bool = True) -> Iterator[Progress]:
    """Show the progress of a block on stderr: how much is done, the rate, time elapsed and left, the last values.

    Args:
        total: at which count the loop ends.
        start: at which count it begins.
    """
    console = Console(stderr=True)
    if not show:
        yield Progress()
    elif console.is_interactive:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn()
        with RichProgress(*columns, _Values(), console=console) as bars:
            yield _Bar(bars, description, total, start)
    else:
        lines = _Lines(description, total, start)
        try:
            yield lines
        finally:
            if lines.done != lines.last:
                lines.show()


class _Bar(Progress):
    def __init__(self, bars: RichProgress, description: str, total: int, start: int) -> None:
        self.bars = bars
        self.task = bars.add_task(description, total=total, completed=start, values={})

    def advance(self, n: int = 1, **values: Any) -> None:
        self.bars.update(self.task, advance=n, values=_detached(values))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed))


class _Values(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_text(task.fields["values"]))


class _Lines(Progress):
    def __init__(self, description: str, total: int, start: int) -> None:
        self.description, self.total, self.start = description, total, start
        self.done, self.values = start, dict[str, Any]()
        self.last: int | None = None  # what was done when it was last shown
        self.began = self.shown = time.monotonic()

    def advance(self, n: int = 1, **values: Any) -> None:
        self.done += n
        self.values = _detached(values)
        if time.monotonic() - self.shown >= INTERVAL and self.done < self.total:
            self.show()

    def show(self) -> None:
        self.shown, self.last = time.monotonic(), self.done
        elapsed, made = self.shown - self.began, self.done - self.start
        left = (self.total - self.done) * elapsed / made if made else 0.0
        rate = made / elapsed if elapsed else None
        parts = [f"{self.done}/{self.total}", _rate(rate), f"{_duration(elapsed)} elapsed", f"{_duration(left)} left", _text(self.values)]
        print(f"{self.description}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)


def _detached(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without what they were computed from, which would stay in memory with them."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f} it/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s/it"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _text(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value if isinstance(value, int | str) else format(float(value), '.4g')}" for name, value in values.items())
