"""A run: its directory, its numbers, its checkpoints, and the plugins that watch it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from torch import Tensor, nn

import irlvla
from irlvla import components, configuration
from irlvla.checkpoint import from_pretrained
from irlvla.components import Spec, pluggable
from irlvla.errors import ConfigError, ContractError, FileError, InputError
from irlvla.hooks import hookimpl
from irlvla.registry import Entry, Plugin, Registry, installed
from irlvla.registry.discovery import manager
from irlvla.run import Run, TrainingConfig, environment, journal, progress

# -- a stage -----------------------------------------------------------------------------------------------------------


class Judge(components.RewardModel):
    class Config(components.Config):
        width: int = 3

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.Linear(config.width, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(self.drop(x))


class TrainConfig(TrainingConfig):
    steps: int = 4
    batch: int = 4
    rate: float = 0.1
    stop: int = 100
    reward: Spec = pluggable("reward_model", "judge")

    may_change = TrainingConfig.may_change | {"stop"}


def train(config: TrainConfig, each: Callable[[Run, int], None] = lambda run, step: None) -> Path:
    """A stage as stages are: restore, loop, log, save."""
    with Run.start("train", config) as run:
        model = installed().build("reward_model", run.config.reward)  # type: ignore[attr-defined]
        optimizer = torch.optim.Adam(model.parameters(), config.rate)
        model, optimizer = run.prepare(model, optimizer)
        first = run.restore()
        with run.progress(config.steps, "train", first) as bar:
            for step in range(first + 1, config.steps + 1):
                for _ in range(config.accumulate):
                    with run.accumulating(model):
                        x = torch.randn(config.batch, 3, device=run.device)
                        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                        run.backward(loss)
                        norm = run.clip(model.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad()
                run.log(step, {"loss": loss, "norm": norm, "random": random.random(), "numpy": np.random.rand()})
                each(run, step)
                if step % 2 == 0:
                    run.save(step, model)
                bar.advance(loss=loss)
    return run.directory


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    """The registry of this process, with one component and no trackers. fsync is for power cuts, and slow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    registry, toy = installed(), Plugin("irlvla-toy", "1.2", "toy")
    monkeypatch.setattr(registry, "plugins", [Plugin("irlvla", irlvla.__version__, "irlvla.zoo"), toy])
    monkeypatch.setattr(registry, "manager", manager())
    monkeypatch.setattr(registry, "entries", {kind: {} for kind in components.KINDS})
    registry.entries["reward_model"]["judge"] = [Entry("reward_model", "judge", Judge, toy)]
    return registry


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_time(directory: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in metrics(directory)]


# -- the run directory -------------------------------------------------------------------------------------------------


def test_the_run_directory(known: Registry, tmp_path: Path):
    config = TrainConfig(out=tmp_path / "deep" / "run", device="cpu", steps=2)
    directory = train(config)
    assert directory == tmp_path / "deep" / "run"
    assert sorted(os.listdir(directory)) == ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl"]
    assert sorted(os.listdir(directory / "checkpoints")) == ["last", "step-2"]
    assert sorted(os.listdir(directory / "checkpoints" / "last")) == ["model", "state"]
    assert isinstance(from_pretrained(directory / "checkpoints" / "last" / "model"), Judge)
    again = configuration.read(TrainConfig, directory / "config.yaml")
    assert again == config.model_copy(update={"reward": {"name": "judge", "width": 3}})  # components filled in


def test_environment(known: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known.plugins += [Plugin("irlvla-broken", "3", "broken", "ImportError: no"), Plugin("mine.py", "", str(tmp_path / "mine.py"))]
    (tmp_path / "mine.py").write_text("# mine")
    for command in (["init", "-q"], ["add", "mine.py"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", *command], check=True)
    with Run.start("train", TrainingConfig(out=Path("run"), device="cpu")):
        pass
    facts = json.loads(Path("run/environment.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert facts["git"] == {"commit": head, "dirty": False}
    assert facts["stage"] == "train"
    assert facts["command"] == sys.orig_argv
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["started"])
    assert facts["versions"] == {"python": sys.version.split()[0], "irlvla": irlvla.__version__, "torch": torch.__version__}
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["plugins"] == [
        {"name": "irlvla", "version": irlvla.__version__, "module": "irlvla.zoo"},
        {"name": "irlvla-toy", "version": "1.2", "module": "toy"},
        {"name": "irlvla-broken", "version": "3", "module": "broken", "problem": "ImportError: no"},
        {"name": "mine.py", "module": str(tmp_path / "mine.py"), "sha256": hashlib.sha256(b"# mine").hexdigest()},
    ]
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["memory_gib"] > 0.1
    assert facts["machine"]["cpu"]
    assert len(facts["machine"]["gpus"]) == torch.cuda.device_count()
    assert facts["processes"] == 1
    assert facts["previous"] is None
    (tmp_path / "mine.py").write_text("# changed")
    assert environment.record()["git"]["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert environment.record()["git"] is None


def test_a_default_directory_is_new(monkeypatch: pytest.MonkeyPatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(journal, "datetime", Clock)
    for name in ("imitate-20260102-030405", "imitate-20260102-030405-2", "imitate-20260102-030405-3"):
        with Run.start("imitate", TrainingConfig(device="cpu")) as run:
            assert run.directory == Path("runs", name)


def test_a_directory_with_a_run_is_refused():
    train(TrainConfig(out=Path("run"), device="cpu", steps=2))
    before = Path("run/metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"run holds a run already. Choose another out=DIRECTORY, or continue that run with resume=true"):
        train(TrainConfig(out=Path("run"), device="cpu"))
    assert Path("run/metrics.jsonl").read_bytes() == before
    Path("file").write_text("")
    with pytest.raises(FileError, match="the run directory file cannot be made: File exists"):
        train(TrainConfig(out=Path("file"), device="cpu"))
    Path("mine").mkdir()
    Path("mine/notes").write_text("")
    train(TrainConfig(out=Path("mine"), device="cpu", steps=0))


# -- resuming ----------------------------------------------------------------------------------------------------------


class Kill(BaseException):
    pass


def kill_at(last: int) -> Callable[[Run, int], None]:
    def kill(run: Run, step: int) -> None:
        if step == last:
            with open(run.directory / "metrics.jsonl", "a") as stream:
                stream.write('{"step": 4, "lo')
            raise Kill

    return kill


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_that_was_killed_goes_on_as_if_it_were_not(accumulate: int, device: str):
    def config(out: str, **settings: Any) -> TrainConfig:
        return TrainConfig(out=Path(out), device=device, steps=6, accumulate=accumulate, **settings)  # type: ignore[arg-type]

    whole, parts = train(config("whole")), Path("parts")
    with pytest.raises(Kill):
        train(config("parts"), kill_at(3))  # after the checkpoint of step 2
    with pytest.raises(Kill):
        train(config("parts", resume=True), kill_at(5))
    train(config("parts", resume=True))
    assert [line["step"] for line in metrics(parts)] == [1, 2, 3, 4, 5, 6]
    assert without_time(parts) == without_time(whole)
    for part in ("model/model.safetensors", "state/model.safetensors"):
        assert Path("parts/checkpoints/last", part).read_bytes() == Path("whole/checkpoints/last", part).read_bytes()
    previous = json.loads(Path("parts/environment.json").read_text())["previous"]
    assert previous["previous"]["previous"] is None


def test_a_run_that_has_no_checkpoint_yet_begins():
    config = TrainConfig(out=Path("run"), device="cpu", resume=True)
    with pytest.raises(Kill):
        train(config, kill_at(1))
    train(config)
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2, 3, 4]
    train(config)  # complete: nothing is left to do
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2, 3, 4]
    assert configuration.read(TrainConfig, "run/config.yaml").resume is False


def test_resuming_with_another_configuration(known: Registry):
    config = TrainConfig(out=Path("run"), device="cpu", resume=True, steps=2)
    train(config)
    train(config.model_copy(update={"keep": 1, "device": "auto", "stop": 7}))  # these may change
    changed = config.model_copy(update={"rate": 0.2, "reward": {"name": "judge", "width": 4}})
    with pytest.raises(ConfigError, match=r"^run cannot be resumed with another configuration") as caught:
        train(changed)
    assert str(caught.value).split("\n")[1:] == ["  rate: 0.2, and it began with 0.1", "  reward.width: 4, and it began with 3"]
    with pytest.raises(ConfigError, match="run holds a run of train, which reward cannot resume"), Run.start("reward", config):
        pass
    with pytest.raises(ConfigError, match="resume=true needs out=DIRECTORY"), Run.start("train", TrainingConfig(resume=True)):
        pass
    Path("run/environment.json").write_text("{")
    with pytest.raises(FileError, match=r"environment\.json cannot be read"):
        train(config)


def test_a_state_that_does_not_fit(known: Registry):
    config = TrainConfig(out=Path("run"), device="cpu", resume=True)
    train(config)
    with Run.start("train", config) as run:
        run.prepare(nn.Linear(3, 1))
        with pytest.raises(FileError, match=r"step-4/state is corrupt, or does not fit what is resumed"):
            run.restore()
    state = Path("run/checkpoints/last/state")
    (state / "random_states_1.pkl").write_bytes((state / "random_states_0.pkl").read_bytes())
    with pytest.warns(UserWarning, match="is of 2 processes, and this run has 1"):
        train(config)


def test_a_state_is_read_without_running_what_it_holds():
    config = TrainConfig(out=Path("run"), device="cpu", resume=True)
    train(config)

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, ("exploded",)

    torch.save({"state": Bomb()}, Path("run/checkpoints/last/state/optimizer.bin"))
    with pytest.raises(FileError, match="is corrupt, or does not fit"):
        train(config)
    assert not Path("exploded").exists()


def test_what_cannot_be_saved_ends_the_run(known: Registry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Judge, "get_extra_state", lambda self: {"an": "object"}, raising=False)
    with pytest.raises(ContractError, match=r"reward_model 'judge' \(irlvla-toy 1.2\) cannot be saved"):
        train(TrainConfig(out=Path("run"), device="cpu"))
    assert os.listdir("run/checkpoints") == []


# -- devices, precision, seeds -----------------------------------------------------------------------------------------


def start(**settings: Any) -> Any:
    return Run.start("train", TrainingConfig(out=Path(f"run-{next(_count)}"), **{"device": "cpu", **settings}))


_count = itertools.count()


def test_no_silent_fallback():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"device=cuda: no CUDA device was found.*Accepted here: auto, cpu"), start(device="cuda"):
            pass
    with pytest.raises(ConfigError, match=r"precision=fp16 needs CUDA\. Accepted on the CPU: no, bf16"), start(precision="fp16"):
        pass
    assert os.listdir() == []


def test_a_launcher_that_asks_for_something_else(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        with pytest.raises(ConfigError, match="launched for FSDP; irlvla needs processes that each hold the whole model"), start():
            pass
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ConfigError, match="device=cpu, but this process was launched for meta"), start():
        pass


def test_yaml_reads_no_as_false():
    assert configuration.read(TrainingConfig, overrides=["precision=no"]).precision == "no"
    with pytest.raises(ConfigError, match="precision"):
        configuration.read(TrainingConfig, overrides=["precision=yes"])


def test_runs_with_different_precision_one_after_the_other(device: str):
    for precision, dtype in [("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)]:
        with start(precision=precision, device=device) as run:
            layer = nn.Linear(1, 1)
            model = run.prepare(layer)
            assert run.device.type == device
            assert model(torch.ones(1, 1, device=run.device)).dtype == torch.float32  # computed in dtype, and returned as float32
            with run.autocast():
                assert nn.functional.linear(torch.ones(1, 1, device=run.device), layer.weight).dtype == dtype
            assert run.unwrap(model) is layer
            assert run.unwrap(torch.compile(model)) is layer


def test_one_run_at_a_time():
    with start() as run, pytest.raises(InputError, match=r"another run, or another accelerate.Accelerator, is in progress"), start():
        pass
    with pytest.raises(KeyError), start():
        raise KeyError
    with start() as run:
        assert run.is_main


def test_seeds():
    def draw(run: Run, offset: int = 0) -> tuple[float, ...]:
        generated = torch.rand((), generator=run.generator(offset), device=run.device)
        return random.random(), float(np.random.rand()), torch.rand(()).item(), generated.item()

    with start(seed=1) as run:
        first = draw(run)
        assert draw(run)[3] == first[3]
        assert len({draw(run, offset)[3] for offset in range(100)}) == 100
    with start(seed=1) as run:
        assert draw(run) == first
    with start(seed=2) as run:
        assert all(a != b for a, b in zip(draw(run), first, strict=True))
        assert draw(run, 1)[3] != first[3]


# -- training ----------------------------------------------------------------------------------------------------------


def test_accumulated_batches_equal_one_large_batch():
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    results = []
    for accumulate in (1, 2, 4):
        with start(accumulate=accumulate) as run:
            model = nn.Linear(3, 1)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            model, optimizer = run.prepare(model, optimizer)
            stepped = []
            for part, target in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
                with run.accumulating(model):
                    run.backward((model(part) - target).square().mean())
                    stepped.append(run.steps_now)
                    assert (run.clip(model.parameters(), 0.1) is not None) == run.steps_now
                    optimizer.step()
                    optimizer.zero_grad()
            assert stepped == [False] * (accumulate - 1) + [True]
            results.append(model.weight.detach().clone())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_clip_limits_the_gradient():
    with start() as run:
        model = run.prepare(nn.Linear(1, 1, bias=False))
        run.backward(model(torch.full((1, 1), 30.0)).sum())
        assert run.clip(model.parameters(), 2.0).item() == pytest.approx(30)
        assert model.weight.grad.item() == pytest.approx(2, rel=1e-4)


def test_batches_accumulate_across_epochs():
    with start(accumulate=2) as run:
        model = nn.Linear(1, 1)
        model, loader = run.prepare(model, torch.utils.data.DataLoader(torch.ones(3, 1)))
        stepped = []
        for _ in range(2):
            for x in loader:
                with run.accumulating(model):
                    run.backward(model(x).sum())
                    stepped.append(run.steps_now)
    assert stepped == [False, True] * 3


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_log():
    values = {
        "a": 1,
        "b": 0.5,
        "c": torch.tensor(2.5, requires_grad=True),
        "d": np.float32(1.5),
        "e": float("nan"),
        "f": torch.tensor(-torch.inf),
    }
    with start() as run:
        run.log(3, values)
        run.log(4, {"a": torch.tensor([7])})
    first, second = metrics(run.directory)
    assert first.pop("time") == pytest.approx(second.pop("time"), abs=60)
    assert first == {"step": 3, "a": 1, "b": 0.5, "c": 2.5, "d": 1.5, "e": None, "f": None}
    assert second == {"step": 4, "a": 7}


@pytest.mark.parametrize("value", [torch.zeros(2), np.zeros(3), "text", None, [1]], ids=repr)
def test_what_cannot_be_logged(value: Any):
    with start() as run:
        with pytest.raises(InputError, match=r"a value to log is one number, .* got loss="):
            run.log(1, {"loss": value})
        with pytest.raises(InputError, match="got step=1"):
            run.log(1, {"step": 1})
        assert not (run.directory / "metrics.jsonl").exists()


# -- trackers ----------------------------------------------------------------------------------------------------------


class Tracker:
    """Notes what it is told, and fails where it is asked to."""

    def __init__(self, fails_in: str = "") -> None:
        self.told: list[Any] = []
        self.fails_in = fails_in

    def note(self, hook: str, *what: Any) -> None:
        self.told.append((hook, *what))
        if hook == self.fails_in:
            raise ValueError("no\nconnection")

    @hookimpl
    def irlvla_run_started(self, run: Run) -> None:
        assert (run.directory / "config.yaml").exists()
        self.note("started")

    @hookimpl
    def irlvla_log(self, values: Any, step: int) -> None:
        self.note("log", step, dict(values))

    @hookimpl
    def irlvla_run_finished(self, error: BaseException | None) -> None:
        self.note("finished", error)


def test_trackers_are_told(known: Registry):
    tracker = Tracker()
    assert known.add(Plugin("irlvla-tracker", "1", "tracker"), lambda: tracker).problem == ""
    with start() as run:
        run.log(5, {"loss": torch.tensor(0.5), "bad": float("inf")})
    error = Kill()
    with pytest.raises(Kill), start():
        raise error
    assert tracker.told == [
        ("started",),
        ("log", 5, {"loss": 0.5, "bad": float("inf")}),
        ("finished", None),
        ("started",),
        ("finished", error),
    ]


@pytest.mark.parametrize(("hook", "calls"), [("started", 1), ("log", 2), ("finished", 4)])
def test_a_tracker_that_fails_is_left_out(known: Registry, hook: str, calls: int):
    bad, good = Tracker(hook), Tracker()
    known.add(Plugin("irlvla-bad", "2.1", "bad"), lambda: bad)
    known.add(Plugin("irlvla-good", "1", "good"), lambda: good)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with start() as run:
            run.log(1, {})
            run.log(2, {})
    assert len(bad.told) == calls
    assert len(good.told) == 4
    (message,) = (str(warning.message) for warning in caught)
    told = {"started": "run_started", "log": "log", "finished": "run_finished"}[hook]
    assert message.startswith(f"irlvla-bad 2.1 fails in irlvla_{told} and is not called again in this run: ValueError: no; connection. ")
    assert message.endswith(". Without it: IRLVLA_BLOCK=irlvla-bad")
    assert [line["step"] for line in metrics(run.directory)] == [1, 2]


def test_a_tracker_that_ends_the_program_is_left_out_too(known: Registry, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("")

    class Quits:
        @hookimpl
        def irlvla_log(self) -> None:
            sys.exit(1)

    known.add(Plugin("mine.py", "", str(file)), Quits)
    with start() as run, pytest.warns(UserWarning, match=rf"^mine.py fails in irlvla_log .*: SystemExit: 1. Mend {file}$"):
        run.log(1, {})


def test_a_wrapper_is_a_tracker_too(known: Registry):
    seen = []

    class Wraps:
        @hookimpl(wrapper=True)
        def irlvla_log(self, step: int) -> Iterator[None]:
            seen.append(step)
            yield

    known.add(Plugin("irlvla-wraps", "1", "wraps"), Wraps)
    with start() as run:
        run.log(7, {})
    assert seen == [7]


# -- TensorBoard -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorboard(known: Registry) -> Any:
    from irlvla.zoo.trackers import tensorboard

    plugin = known.add(Plugin("irlvla", irlvla.__version__, "irlvla.zoo.trackers.tensorboard"), lambda: tensorboard)
    assert plugin.problem == ""
    return tensorboard


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tensorboard: Any):
    pytest.importorskip("tensorboard")
    directory = train(TrainConfig(out=Path("run"), device="cpu"))
    expected = [(line["step"], pytest.approx(line["loss"])) for line in metrics(directory)]
    assert scalars(directory)["loss"] == expected
    assert tensorboard._writers == {}


def test_tensorboard_forgets_what_a_resumed_run_does_again(tensorboard: Any):
    pytest.importorskip("tensorboard")
    config = TrainConfig(out=Path("run"), device="cpu", resume=True)
    with pytest.raises(Kill):
        train(config, kill_at(3))
    train(config)
    assert [step for step, _ in scalars(Path("run"))["loss"]] == [1, 2, 3, 4]


def test_without_tensorboard_nothing_happens(tensorboard: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(TrainConfig(out=Path("run"), device="cpu"))
    assert not Path("run/tensorboard").exists()


def test_a_tensorboard_that_is_broken(tensorboard: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match=r"irlvla_log .* Without it: IRLVLA_BLOCK=tensorboard$"):
        train(TrainConfig(out=Path("run"), device="cpu"))


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_lines(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with start() as run, run.progress(1000, "train", 100) as bar:
        for _ in range(30):
            clock[0] += 1.0
            bar.advance(10, loss=torch.tensor(0.123456), epoch=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: 200/1000, 10.0 it/s, 0:00:10 elapsed, 0:01:20 left, loss 0.1235  epoch 3",
        "train: 300/1000, 10.0 it/s, 0:00:20 elapsed, 0:01:10 left, loss 0.1235  epoch 3",
        "train: 400/1000, 10.0 it/s, 0:00:30 elapsed, 0:01:00 left, loss 0.1235  epoch 3",
    ]


def test_progress_of_what_is_slow_or_fails(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyError), start() as run, run.progress(5, "reward") as bar:  # noqa: PT012
        clock[0] += 4.0
        bar.advance()
        clock[0] += 4.0
        bar.advance()
        raise KeyError
    assert capsys.readouterr().err == "reward: 2/5, 4.0 s/it, 0:00:08 elapsed, 0:00:12 left\n"
    with start() as run, run.progress(5, "reward"):
        pass
    assert capsys.readouterr().err == "reward: 0/5, 0:00:00 elapsed, 0:00:00 left\n"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, force_interactive=True, width=150))
    with start() as run, run.progress(8, "train", 2) as bar:
        loss = torch.tensor(0.25, requires_grad=True)
        for _ in range(3):
            bar.advance(2, loss=loss * 1)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).split("\r")[-1]
    assert re.search(r"train .* 8/8 [\d.]+ (it/s|s/it) 0:00:0\d 0:00:00 loss 0.25", last)


def test_only_the_main_process_shows_progress(capsys: pytest.CaptureFixture[str]):
    with progress.track(5, "train", show=False) as bar:
        bar.advance(5, loss=1)
    assert capsys.readouterr().err == ""


# -- many processes ----------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path):
    """As torchrun starts them: each writes its state, the main one everything else, and a killed run goes on as if it were not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_run; test_run.one_of_two()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **launched, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "train: 4/4" in outputs[0]
    assert "train:" not in outputs[1]
    for name in ("whole", "parts"):
        assert [line["step"] for line in metrics(Path(name))] == [1, 2, 3, 4]
        assert sorted(path.name for path in Path(name, "checkpoints/last/state").glob("random*")) == [
            "random_states_0.pkl",
            "random_states_1.pkl",
        ]
        assert json.loads(Path(name, "environment.json").read_text())["processes"] == 2
    assert without_time(Path("parts")) == without_time(Path("whole"))
    assert len(list(Path("runs").iterdir())) == 1


def one_of_two() -> None:
    """What each of the two processes does."""
    toy = Plugin("irlvla-toy", "1.2", "toy")
    installed().plugins.append(toy)
    installed().entries["reward_model"]["judge"] = [Entry("reward_model", "judge", Judge, toy)]
    train(TrainConfig(out=Path("whole"), device="cpu"))
    try:
        train(TrainConfig(out=Path("parts"), device="cpu"), kill_at(3))
    except Kill:
        train(TrainConfig(out=Path("parts"), device="cpu", resume=True))
    with Run.start("train", TrainingConfig(device="cpu", precision="bf16")) as run:
        mine = torch.rand(1, generator=run.generator())
        both = run.gather(mine)
        assert len(both.unique()) == 2
        assert both[run._accelerator.process_index] == mine
        assert run.is_main == (os.environ["RANK"] == "0")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
        optimizer, scheduler = run.prepare(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [0.5]  # one step, not one for each process
        assert (run.directory / "config.yaml").exists()


def test_runs_that_start_together_have_their_own_directories():
    """A directory is made where it is chosen, so that the next one is another."""
    assert len({journal.choose_directory("sweep") for _ in range(5)}) == 5


def test_an_empty_directory_name_is_refused():
    with pytest.raises(ConfigError, match="out: must name a directory"), Run.start("train", TrainingConfig(out=Path(), device="cpu")):
        pass


def test_a_damaged_random_state_is_an_error():
    """accelerate alone would pass over it, and the resumed run would draw other numbers."""
    with contextlib.suppress(Kill):
        train(TrainConfig(out=Path("run"), device="cpu"), kill_at(3))
    state = next(Path("run/checkpoints/last/state").resolve().glob("random_states_0.pkl"))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(FileError, match="is corrupt, or does not fit"):
        train(TrainConfig(out=Path("run"), device="cpu", resume=True))
