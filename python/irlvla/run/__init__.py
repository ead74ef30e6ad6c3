"""One run of a stage: its device, its directory, its checkpoints, and what it tells the plugins.

    with Run.start("imitate", config) as run:
        model, optimizer = run.prepare(model, optimizer)
        first = run.restore()
        with run.progress(config.steps, "imitate", first) as progress:
            for step in range(first + 1, config.steps + 1):
                ...
                run.log(step, {"loss": loss})
                run.save(step, model)
                progress.advance(loss=loss)

The directory holds `config.yaml` (a recipe of this run), `environment.json`, `metrics.jsonl` and `checkpoints`. The same
code runs under `python`, `torchrun` and `accelerate launch`, in one process or many, of which the main one alone writes.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin, broadcast_object_list, set_seed
from accelerate.utils.other import load
from pydantic import BeforeValidator, Field
from torch import Generator, Tensor, distributed, nn

from irlvla.checkpoint import last_checkpoint, save_checkpoint, step_of
from irlvla.components import Config, Policy
from irlvla.errors import ConfigError, FileError, InputError
from irlvla.registry import BUILT_IN, installed
from irlvla.run import journal
from irlvla.run.progress import Progress, track

# YAML reads a bare no as false.
_Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)]


class RunConfig(Config):
    """What the configurations of all stages have in common."""

    out: Path | None = Field(None, description="run directory; by default runs/STAGE-DATE-TIME")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute; auto is CUDA if there is one")
    seed: int = Field(0, ge=0, lt=2**31, description="of all random numbers")
    precision: _Precision = Field("no", description="mixed precision")
    resume: bool = Field(False, description="continue the run in `out` from its last checkpoint; begin it if there is none")

    may_change: ClassVar[frozenset[str]] = frozenset({"out", "device", "resume"})
    """Fields that may change when a run is resumed."""


class TrainingConfig(RunConfig):
    """What the configurations of stages that train have in common."""

    accumulate: int = Field(1, ge=1, description="batches whose gradients are added up for one step of the optimizer")
    keep: int = Field(3, ge=1, description="how many checkpoints stay, the newest")

    may_change = RunConfig.may_change | {"keep"}


class Run:
    """A run in progress; `Run.start` begins it.

    Attributes:
        config: with the settings of all components filled in.
        is_main: whether this process is the one that writes.
    """

    stage: str
    config: RunConfig
    directory: Path
    device: torch.device
    is_main: bool

    @classmethod
    @contextmanager
    def start(cls, stage: str, config: RunConfig) -> Iterator[Self]:
        """Begin a run, which ends with the block. Seeds Python, numpy and torch, differently in each process.

        Args:
            stage: its name: "imitate".

        Raises:
            ConfigError: the device or precision is not there, the directory is taken, or a run is resumed with another configuration.
            FileError: the directory cannot be written.
        """
        with _accelerator(config) as accelerator:
            run = cls(stage, config, accelerator)
            ended_by: BaseException | None = None
            try:
                run._tell("irlvla_run_started", run=run)
                yield run
            except BaseException as error:
                ended_by = error
                raise
            finally:
                run._tell("irlvla_run_finished", run=run, error=ended_by)

    def __init__(self, stage: str, config: RunConfig, accelerator: Accelerator) -> None:
        self.stage, self._accelerator = stage, accelerator
        self.config = cast(RunConfig, installed().validate(type(config), config.model_dump()))
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self._failed: set[str] = set()  # plugins that are not told any more
        self.directory = self._choose_directory()
        previous = journal.read_previous(self.directory, stage, self.config, config.may_change) if config.resume else None
        accelerator.wait_for_everyone()  # all have looked before one writes
        if self.is_main:
            recipe = self.config.model_copy(update={"resume": False})
            journal.write_start(self.directory, stage, recipe, accelerator.num_processes, previous)
        set_seed(config.seed, device_specific=True)

    def _choose_directory(self) -> Path:
        out = self.config.out
        if out is None and self.config.resume:
            raise ConfigError("resume=true needs out=DIRECTORY: the directory of the run to continue")
        if out is None:
            out = self._from_main(journal.choose_directory(self.stage) if self.is_main else None)
        out = out.expanduser()
        if out == Path():
            raise ConfigError("out: must name a directory, got nothing; leave it out for runs/STAGE-DATE-TIME")
        if (out / journal.CONFIG).exists() and not self.config.resume:
            raise ConfigError(f"{out} holds a run already. Choose another out=DIRECTORY, or continue that run with resume=true")
        return out

    def _from_main(self, value: Any) -> Any:
        """The main process's value, in every process."""
        values = [value]
        broadcast_object_list(values)
        return values[0]

    # -- training, over accelerate -----------------------------------------------------------------------------------
    def prepare(self, *objects: Any) -> Any:
        """Models, optimizers, schedulers and loaders, made for the device and the processes of this run, and part of its state.

        Call a model through its forward(): there gradients are shared among processes, and precision is set. A scheduler
        makes one step whenever it is told to.
        """
        return self._accelerator.prepare(*objects)

    def accumulating(self, model: nn.Module) -> AbstractContextManager[None]:
        """The block of one batch. Of `accumulate` such blocks, optimizers step in the last alone."""
        return self._accelerator.accumulate(model)

    @property
    def steps_now(self) -> bool:
        """Whether optimizers step in this block of `accumulating`."""
        return self._accelerator.sync_gradients

    def autocast(self) -> AbstractContextManager[None]:
        """A block in the run's precision, for what is computed outside of the forward() of a model that was prepared."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled for precision and accumulation."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor | None:
        """Limit the norm of the gradients. Returns what it was; None if optimizers do not step now."""
        return self._accelerator.clip_grad_norm_(parameters, norm) if self.steps_now else None

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other along the leading axis."""
        return self._accelerator.gather(tensor)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model itself, without what `prepare` and `torch.compile` put around it."""
        return self._accelerator.unwrap_model(model, keep_torch_compile=False)

    def generator(self, offset: int = 0) -> Generator:
        """A generator on the device, another for each seed, process and offset. With the step as offset it needs no state to resume."""
        entropy = (self.config.seed, self._accelerator.process_index, offset)
        return Generator(self.device).manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    # -- what others see ---------------------------------------------------------------------------------------------
    def progress(self, total: int, description: str, start: int = 0) -> AbstractContextManager[Progress]:
        """Show on stderr how far a block is: `progress.advance(loss=loss)` counts one more."""
        return track(total, description, start, show=self.is_main)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to metrics.jsonl, and tell them to trackers. Tensors of one number will do.

        Log a step before you save it: a run that is resumed logs the steps after its checkpoint again.

        Raises:
            InputError: a value is not one number.
        """
        if self.is_main:
            numbers = journal.numbers(values)
            journal.write_metrics(self.directory, step, numbers)
            self._tell("irlvla_log", run=self, step=step, values=numbers)

    def _tell(self, hook: str, **arguments: Any) -> None:
        """Call a hook of every plugin. One that fails is not called again: a tracker must not end a run of days."""
        manager = installed().manager
        for implementation in getattr(manager.hook, hook).get_hookimpls() if self.is_main else ():
            name = implementation.plugin_name
            if name not in self._failed:
                others = [plugin for plugin in manager.get_plugins() if plugin is not implementation.plugin]
                try:
                    manager.subset_hook_caller(hook, others)(**arguments)
                except (Exception, SystemExit) as error:
                    self._failed.add(name)
                    warnings.warn(_blame(name, hook, error), stacklevel=2)

    # -- checkpoints -------------------------------------------------------------------------------------------------
    @property
    def _checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def save(self, step: int, model: nn.Module) -> Path:
        """Write checkpoints/step-N with the model, and with the state of all that was prepared. Call it in every process.

        Raises:
            ContractError, PluginError, FileError: as `irlvla.save_pretrained`.
        """
        keep = self.config.keep if isinstance(self.config, TrainingConfig) else None
        if self.is_main:
            return save_checkpoint(self._checkpoints, step, cast(Policy, self.unwrap(model)), self._write_state, keep)
        self._write_state(None)
        return self._checkpoints / f"step-{step}"

    def _write_state(self, folder: Path | None) -> None:
        """Every process adds its state to the folder that the main one names."""
        self._accelerator.save_state(str(self._from_main(folder)))
        self._accelerator.wait_for_everyone()

    def restore(self) -> int:
        """Bring all that was prepared to the last checkpoint of a run that is resumed. Returns its step; 0 = from the beginning.

        Raises:
            FileError: the state does not fit what was prepared.
        """
        checkpoint = last_checkpoint(self._checkpoints) if self.config.resume else None
        step = 0 if checkpoint is None else step_of(checkpoint)
        if checkpoint is not None:
            self._read_state(checkpoint / "state")
        self._accelerator.wait_for_everyone()
        if self.is_main:
            journal.cut_metrics(self.directory, -1 if checkpoint is None else step)
        return step

    def _read_state(self, folder: Path) -> None:
        before, now = len(list(folder.glob("random_states_*"))), self._accelerator.num_processes
        if before != now:
            warnings.warn(f"{folder} is of {before} processes, and this run has {now}: it will differ from an unbroken one", stacklevel=3)
        try:
            if (random := folder / f"random_states_{self._accelerator.process_index}.pkl").exists():
                load(random)  # accelerate itself passes over one that it cannot read
            self._accelerator.load_state(str(folder))  # it unpickles tensors and plain data alone (weights_only)
        except Exception as error:
            raise FileError(f"{folder} is corrupt, or does not fit what is resumed: {error}") from error


@contextmanager
def _accelerator(config: RunConfig) -> Iterator[Accelerator]:
    """accelerate, set up for a run. It keeps its state in the process, where the next run must not find it."""
    if AcceleratorState._shared_state:
        raise InputError("another run, or another accelerate.Accelerator, is in progress in this process. End it first")
    _require_device(config)
    batches = config.accumulate if isinstance(config, TrainingConfig) else 1
    PartialState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision=config.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=batches, sync_with_dataloader=False),
            step_scheduler_with_optimizer=False,
            # What a step leaves out (a token that was dropped, a head without a target) gets no gradient in it.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if config.device not in ("auto", accelerator.device.type):
            raise ConfigError(f"device={config.device}, but this process was launched for {accelerator.device.type}")
        if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ConfigError(f"launched for {accelerator.distributed_type.value}; irlvla needs processes that each hold the whole model")
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)  # not earlier: the next run of this process talks to the same others
        yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _leave_group() -> None:
    """Take leave of the other processes, whose last words a process that merely ends may cut off."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _require_device(config: RunConfig) -> None:
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device=cuda: no CUDA device was found; `irlvla doctor` says what was. Accepted here: auto, cpu")
    if config.precision == "fp16" and not cuda:
        raise ConfigError("precision=fp16 needs CUDA. Accepted on the CPU: no, bf16")
    if config.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"precision=bf16: {torch.cuda.get_device_name()} cannot compute with it. Accepted here: no, fp16")


def _blame(registered: str, hook: str, error: BaseException) -> str:
    plugin = next((plugin for plugin in installed().plugins if f"{plugin.name}:{plugin.module}" == registered), None)
    if plugin is None:
        return f"{registered} fails in {hook} and is not called again in this run: {type(error).__name__}: {error}"
    # The built-in trackers are blocked one by one, by the names of their modules.
    block = plugin.name if plugin.name != BUILT_IN else plugin.module.rpartition(".")[2]
    without = f". Without it: IRLVLA_BLOCK={block}" if plugin.version else ""
    return f"{plugin} fails in {hook} and is not called again in this run: {plugin.blame(error)}{without}"
