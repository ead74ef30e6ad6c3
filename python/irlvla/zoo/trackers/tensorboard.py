"""TensorBoard: what a run logs, in the folder `tensorboard` of the run directory, if tensorboard is installed.

pip install irlvla[tensorboard]; tensorboard --logdir runs
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlvla.hooks import hookimpl

if TYPE_CHECKING:
    from irlvla.run import Run

_writers: dict[Path, Any] = {}  # of the runs in progress, by directory


@hookimpl
def irlvla_log(run: Run, step: int, values: Mapping[str, float]) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        return
    writer = _writers.get(run.directory)
    if writer is None:
        from torch.utils.tensorboard import SummaryWriter

        # A run that is resumed logs again what it had logged after its checkpoint: TensorBoard drops the first.
        writer = _writers[run.directory] = SummaryWriter(run.directory / "tensorboard", purge_step=step)
        writer.add_text("config.yaml", f"```yaml\n{(run.directory / 'config.yaml').read_text()}```")
    for name, value in values.items():
        writer.add_scalar(name, value, step)


@hookimpl
def irlvla_run_finished(run: Run) -> None:
    if run.directory in _writers:
        _writers.pop(run.directory).close()
