"""Stage 1, imitation: what is trained, validated and kept; that it repeats and resumes bit for bit; the recipes; the picture; the costs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import irlvla
from golden_scenes import load
from irlvla import cli, configuration
from irlvla.checkpoint import from_pretrained, save_pretrained
from irlvla.components import Policy
from irlvla.errors import ConfigError, ContractError, FileError, InputError
from irlvla.plots import draw_learning_curve, read_curves
from irlvla.registry import build, installed
from irlvla.stages import ImitateConfig, caching, imitate, imitation
from irlvla.stages.batches import Shuffled, human_drives
from irlvla.stages.caching import cached
from irlvla.stages.costs import measure
from irlvla.stages.optimization import DivergedError, OptimizerConfig, averaged, make_optimizer, make_schedule
from irlvla.types import METRICS, Scene
from plugins_for_tests import Site, empty_site

ROOT = Path(__file__).parents[1]
RECIPES = ["av2", "demo", "navsim", "small"]
SCENES = 10

PLUGIN = '''
"""A planner that learns in seconds, a backbone that looks at nothing but brightness, metrics by script, and a killer."""
import irlvla
import torch
from pathlib import Path
from pydantic import Field
from torch import nn

class Tiny(irlvla.Planner):
    """Constant velocity, corrected by a linear map of the status token."""

    class Config(irlvla.Config):
        breaks: int = Field(0, description="from which call on the loss is NaN; 0 = never")
        flaw: str = Field("", description="what is wrong with the losses")
        dropout: float = 0.0

    def __init__(self, config, *, width):
        super().__init__(config)
        self.head = nn.Linear(width, 24)
        self.drop = nn.Dropout(config.dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("drives", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8, 3))

    def fit(self, human):
        assert bool(human.poses.isfinite().all())
        self.drives += len(human)
        self.mean.copy_(human.poses.mean(0))

    def poses(self, features):
        return self.mean + self.head(self.drop(features.status)).unflatten(1, (8, 3))

    def loss(self, features, human):
        self.calls += 1
        known = human.poses.isfinite().flatten(1).all(1)
        error = ((self.poses(features) - human.poses.nan_to_num()) ** 2).flatten(1).mean(1) * known
        loss = error.mean() * (torch.nan if self.config.breaks and self.calls >= self.config.breaks else 1.0)
        return {
            "": {"square": loss, "half": 0.5 * loss},
            "vector": {"square": error},
            "number": {"square": 1.0},
            "none": {},
            "constant": {"square": loss.detach()},
        }[self.config.flaw]

    def sample(self, features, k, *, generator=None):
        poses = self.poses(features)[:, None].repeat(1, k, 1, 1)
        return irlvla.Plan(poses + 0.01 * torch.randn(poses.shape, generator=generator, device=poses.device))

class Bright(irlvla.Backbone):
    """Nothing but the mean of the images."""

    def __init__(self, config):
        super().__init__(config)
        self.width = 4
        self.layer = nn.Linear(1, 4)

    def forward(self, obs):
        return irlvla.Features(obs, status=self.layer(obs.images.float().flatten(1).mean(1, keepdim=True)))

class Scripted(irlvla.Metric):
    """Values that rise, then fall."""

    calls = 0

    def __call__(self, scene, plan):
        Scripted.calls += 1
        return {"luck": torch.full((len(scene),), [0.0, 0.0, 1.0, 3.0, 2.0, 2.5][Scripted.calls - 1])}

@irlvla.hookimpl
def irlvla_backbones():
    return {"acme_bright": Bright}

@irlvla.hookimpl
def irlvla_planners():
    return {"acme_tiny": Tiny}

@irlvla.hookimpl
def irlvla_metrics():
    return {"acme_scripted": Scripted}

@irlvla.hookimpl
def irlvla_log(run, step):
    if Path("kill").exists() and step == int(Path("kill").read_text()):
        Path("kill").unlink()
        raise KeyboardInterrupt
'''


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some of them no human drive is known."""
    golden = load(Path(__file__).parent / "golden" / "public.npz")
    one = Scene.cat([golden[i].scene for i in range(0, 40, 40 // SCENES)][:SCENES])
    return one.save(tmp_path_factory.mktemp("scenes") / "scenes.safetensors")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of scenes with images, shared by the tests of this file."""
    return tmp_path_factory.mktemp("cache")


SEEN = {"name": "synthetic", "count": 6, "size": [32, 64]}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for power cuts, and slow
    monkeypatch.setattr(imitation, "draw_learning_curve", lambda metrics, out: out.touch())  # slow too
    with empty_site(tmp_path, monkeypatch) as made:
        made.add("irlvla-acme", PLUGIN)
        made.scan()
        yield made


@pytest.fixture
def config(scenes: Path, site: Site) -> Callable[..., ImitateConfig]:
    """A configuration: config("seed=3", out="here")."""

    def config(*overrides: str, **settings: Any) -> ImitateConfig:
        data = {"name": "scenes", "path": str(scenes)}
        recipe: dict[str, Any] = {
            "data": {"train": data, "validation": data},
            "backbone": {"name": "status", "width": 8},
            "planner": "acme_tiny",
            "steps": 4,
            "batch": 4,
            "log_every": 1,
            "device": "cpu",
            "optimizer": {"warmup": 1, "lr": 0.01},
            "validation": {"every": 2, "metrics": ["displacement"], "best": "miss_rate"},
        }
        return configuration.read(ImitateConfig, {**recipe, **settings}, overrides)

    return config


Configure = Callable[..., ImitateConfig]


def logged(directory: Path) -> list[dict[str, Any]]:
    """What a run logged, but for what a clock says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time", "charts/samples_per_second")} for line in lines]


def weights(directory: Path, of: str = "last") -> dict[str, Tensor]:
    return from_pretrained(directory / "checkpoints" / of / "model").state_dict()  # type: ignore[union-attr]


def same(one: Path, other: Path) -> None:
    """To the last bit. Of the names that a tensor may have, the files keep any."""
    assert logged(one) == logged(other)
    for part in ("last/model", "last/state", "best/model"):
        found, others = (load_file(run / "checkpoints" / part / "model.safetensors") for run in (one, other))
        names = found.keys() & others.keys()
        assert len(names) > 4
        assert all(torch.equal(found[name], others[name]) for name in names)
    assert (one / "checkpoints/best/score.json").read_text() == (other / "checkpoints/best/score.json").read_text()


# -- a run -------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(config: Configure) -> None:
    directory = imitate(config("validation.metrics=[epdms,displacement]", "validation.best=epdms", out="here"))
    assert directory == Path("here")
    names = {path.name for path in directory.iterdir()}
    assert names >= {"checkpoints", "config.yaml", "environment.json", "learning_curve.png", "metrics.jsonl", "summary.json"}
    assert sorted(os.listdir("here/checkpoints")) == ["best", "last", "step-2", "step-4"]
    start, *steps = logged(directory)
    assert start["step"] == 0
    assert start["human/epdms"] > start["constant_velocity/epdms"] > 0
    assert start["human/ade"] == pytest.approx(0, abs=1e-4)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    losses = {"losses/planner/square", "losses/planner/half", "losses/total"}
    charts = {"charts/gradient_norm", "charts/learning_rate"}
    assert steps[0].keys() - {"step"} == losses | charts
    for name in ("epdms", "ade", *(metric for metric in METRICS if metric != "ec")):
        assert [f"validation/{name}" in line for line in steps] == [False, True, False, True]
    assert steps[0]["losses/total"] == pytest.approx(1.5 * steps[0]["losses/planner/square"])
    best = json.loads(Path("here/checkpoints/best/score.json").read_text())
    highest = max(steps[1], steps[3], key=lambda line: line["validation/epdms"])
    assert (best["step"], best["metrics"]["epdms"]["mean"]) == (highest["step"], highest["validation/epdms"])
    summary = json.loads(Path("here/summary.json").read_text())
    assert summary["metrics"] == best["metrics"]
    assert f"4 steps, of which {best['step']} was the best" in summary["result"]


def test_what_is_validated_is_what_is_saved(config: Configure, scenes: Path) -> None:
    """The model of a checkpoint, measured by `irlvla score`, gives what was logged."""
    from irlvla.stages import ScoreConfig, score

    directory = imitate(config(out="here", seed=3))
    data = {"name": "scenes", "path": str(scenes)}
    scored = score(
        ScoreConfig(data=data, policy="here/checkpoints/last/model", metrics=["displacement"], seed=3, device="cpu", out=Path("s"))  # type: ignore[call-arg]
    )
    summary = json.loads((scored / "summary.json").read_text())["metrics"]
    assert logged(directory)[-1]["validation/ade"] == summary["ade"]["mean"]


def test_it_learns(config: Configure) -> None:
    directory = imitate(config(steps=150, batch=10, log_every=150, ema=0.9))
    first, last = (logged(directory)[i] for i in (1, -1))
    assert last["validation/ade"] < 0.5 * first["validation/ade"]
    untrained = logged(imitate(config("optimizer.lr=1e-9", steps=2)))[-1]
    assert last["losses/total"] < 0.2 * untrained["losses/total"]


def test_without_validation(config: Configure) -> None:
    directory = imitate(config("data.validation=null"))
    assert not any(name.startswith("validation/") for line in logged(directory) for name in line)
    assert sorted(os.listdir(directory / "checkpoints")) == ["last", "step-2", "step-4"]
    assert json.loads((directory / "summary.json").read_text())["metrics"] == {}


def test_the_planner_sees_human_drives_once(config: Configure, scenes: Path) -> None:
    truth = Scene.load(scenes)
    known = truth.human[~truth.human.isnan().flatten(1).any(1)]
    assert 0 < len(known) < SCENES
    found = weights(imitate(config(out="all")), "best")
    assert found["planner.drives"] == len(known)
    torch.testing.assert_close(found["planner.mean"], known.mean(0).float())
    assert weights(imitate(config(out="none", fit=0)))["planner.drives"] == 0
    assert 0 < weights(imitate(config(out="few", fit=6)))["planner.drives"] < len(known)
    imitate(config(out="all", resume=True))
    initial = "all/checkpoints/last/model"
    assert weights(imitate(config(out="from", initial=initial)))["planner.drives"] == len(known)


def test_to_begin_with_a_saved_policy(config: Configure) -> None:
    imitate(config(out="first"))
    before = weights(Path("first"))
    after = weights(imitate(config("optimizer.lr=1e-9", out="second", initial="first/checkpoints/last/model", ema=0)))
    torch.testing.assert_close(after["planner.head.weight"], before["planner.head.weight"], rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"initial=first.*: its weights do not fit this policy(.|\n)*planner.head.weight"):
        imitate(config("backbone.width=4", initial="first/checkpoints/last/model"))
    with pytest.raises(FileError, match="nowhere"):
        imitate(config(initial="nowhere"))


@pytest.mark.parametrize("reasoner", [None, {"name": "driver", "cameras": "none", "hidden": 8, "layers": 1}])
def test_a_planner_that_learns_behind_eyes_that_have_learnt(config: Configure, pictures: Path, reasoner: Any) -> None:
    """They see each scene once, and stay as they are; what they lend is in the new policy, which needs nothing of the old one."""
    data = {"train": SEEN, "validation": {**SEEN, "split": "val"}}
    settings = {
        "data": data,
        "cache": pictures,
        "steps": 3,
        "validation": {"every": 3, "metrics": ["displacement"], "best": "miss_rate", "blanked": True},
    }
    eyes = imitate(config(out="eyes", backbone="acme_bright", reasoner=reasoner, **settings)) / "checkpoints/last/model"
    lent = {"backbone": None, "perception": str(eyes), **settings}
    run = imitate(config(out="planner", seed=3, **lent))
    before, after = from_pretrained(eyes).state_dict(), weights(run)  # type: ignore[union-attr]
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"planner"}
    line = logged(run)[-1]
    assert set(line) >= {"losses/planner/square", "blanked/ade"}
    assert not any(name.startswith("losses/reasoner") for name in line)
    assert line["blanked/ade"] != line["validation/ade"]  # black images are not what was seen

    policy, (obs, *_) = from_pretrained(run / "checkpoints/best/model"), build("dataset", {**SEEN, "split": "val"})[0]
    assert isinstance(policy, Policy)
    looks = policy.eval().sample(obs, generator=torch.Generator().manual_seed(0))
    assert looks.poses.isfinite().all()

    imitate(config(out="parts", seed=3, **{**lent, "steps": 3}))
    same(run, Path("parts"))


def test_whose_eyes(config: Configure) -> None:
    imitate(config(out="first"))
    with pytest.raises(ConfigError, match="give either backbone, which learns to see, or perception"):
        imitate(config(perception="first/checkpoints/last/model"))
    with pytest.raises(ConfigError, match="give either backbone"):
        imitate(config(backbone=None))
    with pytest.raises(ConfigError, match=r"reasoner: perception has a reasoner of its own, or none; set reasoner=null"):
        imitate(config(backbone=None, reasoner="driver", perception="first/checkpoints/last/model"))


def test_steps_or_epochs(config: Configure) -> None:
    directory = imitate(config(steps=None, epochs=1.5, accumulate=2, batch=2))
    assert logged(directory)[-1]["step"] == 4  # 15 scenes by fours
    with pytest.raises(ConfigError, match="give steps or epochs, not both; steps=null drops one"):
        imitate(config(epochs=1))
    with pytest.raises(ConfigError, match=r"give steps or epochs$"):
        imitate(config(steps=None))


def test_images_that_are_black(config: Configure, pictures: Path) -> None:
    data = {"train": SEEN, "validation": {**SEEN, "split": "val"}}
    settings = {"data": data, "cache": pictures, "backbone": "acme_bright", "steps": 2}
    line = logged(imitate(config("validation.blanked=true", **settings)))[-1]
    assert line["blanked/ade"] != line["validation/ade"]
    assert not any(name.startswith("blanked/") for name in logged(imitate(config(**settings)))[-1])
    with pytest.raises(ConfigError, match=r"validation\.blanked: these scenes have no images"):
        imitate(config("validation.blanked=true"))


# -- the best, and what stays ------------------------------------------------------------------------------------------


def test_the_best_stays_when_its_checkpoint_goes(config: Configure) -> None:
    settings = {"steps": 8, "keep": 1, "validation": {"every": 2, "metrics": ["acme_scripted"], "best": "luck"}}
    directory = imitate(config(**settings))
    assert [line["validation/luck"] for line in logged(directory) if "validation/luck" in line] == [1.0, 3.0, 2.0, 2.5]
    assert sorted(os.listdir(directory / "checkpoints")) == ["best", "last", "step-8"]
    assert json.loads((directory / "checkpoints/best/score.json").read_text())["step"] == 4
    assert weights(directory, "best")["planner.calls"] == 4
    assert weights(directory)["planner.calls"] == 8


def test_what_is_best_must_be_measured(config: Configure) -> None:
    with pytest.raises(ConfigError, match=r"validation\.best: there is no 'adde'. Did you mean 'ade'\? Measured: ade, fde"):
        imitate(config("validation.best=adde"))


# -- bit for bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_killed_goes_on_as_if_it_were_not(config: Configure, workers: int, accumulate: int) -> None:
    settings = {"steps": 6, "accumulate": accumulate, "planner": {"name": "acme_tiny", "dropout": 0.5}, "seed": 5}
    imitate(config(out="whole", **settings))
    for step in (3, 5):
        Path("kill").write_text(str(step))
        with pytest.raises(KeyboardInterrupt):
            imitate(config(out="parts", resume=True, workers=workers, **settings))
    imitate(config(out="parts", resume=True, **settings))
    same(Path("whole"), Path("parts"))
    imitate(config(out="parts", resume=True, **settings))  # complete: nothing is left to do
    same(Path("whole"), Path("parts"))


@pytest.mark.parametrize("planner", ["gaussian", "diffusion"])
def test_policies_of_the_zoo_go_on_too(config: Configure, planner: str) -> None:
    settings = {"planner": {"name": planner, "heads": 2, "anchors": 4}, "validation": {"every": 2, "metrics": ["epdms"]}}
    imitate(config(out="whole", **settings))
    Path("kill").write_text("3")
    with pytest.raises(KeyboardInterrupt):
        imitate(config(out="parts", resume=True, **settings))
    imitate(config(out="parts", resume=True, **settings))
    same(Path("whole"), Path("parts"))


def test_only_the_seed_decides(config: Configure) -> None:
    settings = {"planner": {"name": "acme_tiny", "dropout": 0.5}}
    imitate(config(out="one", seed=3, **settings))
    torch.rand(7)
    imitate(config(out="same", seed=3, workers=2, **settings))
    imitate(config(out="other", seed=4, **settings))
    same(Path("one"), Path("same"))
    assert logged(Path("one"))[1]["losses/total"] != logged(Path("other"))[1]["losses/total"]


def test_accumulated_batches_are_a_larger_batch(config: Configure) -> None:
    whole = imitate(config(out="whole", batch=8, steps=6))
    parts = imitate(config(out="parts", batch=4, accumulate=2, steps=6))
    for one, other in zip(logged(whole), logged(parts), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, value in weights(whole).items():
        if name != "planner.calls":
            torch.testing.assert_close(value, weights(parts)[name], rtol=1e-4, atol=1e-6)


def test_two_processes_are_a_larger_batch(config: Configure, site: Site) -> None:
    whole = imitate(config(out="whole", batch=4, steps=3))
    recipe = config(out="two", batch=2, steps=3)
    Path("recipe.yaml").write_text(configuration.to_yaml(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    search = os.pathsep.join([str(site.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "irlvla", "imitate", "recipe.yaml"],
            env={**os.environ, **launched, "PYTHONPATH": search, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        (main, errors), (other, more_errors) = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors + more_errors
    assert "3 steps, of which" in main
    assert other == ""
    for one, both in zip(logged(whole), logged(Path("two")), strict=True):
        assert one == pytest.approx(both, rel=1e-4)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_loses_nothing(config: Configure) -> None:
    with pytest.raises(DivergedError) as caught:
        imitate(config(out="here", steps=9, planner={"name": "acme_tiny", "breaks": 4}))
    assert str(caught.value).startswith("step 4: losses/planner/square is nan, losses/planner/half is nan, losses/total is nan")
    assert "initial=here/checkpoints/step-3/model" in str(caught.value)
    assert [line["step"] for line in logged(Path("here"))] == [0, 1, 2, 3]
    for value in from_pretrained("here/checkpoints/step-3/model").state_dict().values():  # type: ignore[union-attr]
        assert bool(value.isfinite().all())
    imitate(config(out="again", initial="here/checkpoints/step-3/model"))
    with pytest.raises(DivergedError, match=r"^step 1: (?!.*initial=)"):
        imitate(config(planner={"name": "acme_tiny", "breaks": 1}))


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("vector", r"the loss 'planner/square' must be a tensor of one number, not a tensor of shape \(4,\)"),
        ("number", "the loss 'planner/square' must be a tensor of one number, not float"),
        ("none", "nothing can be learned: no loss depends on a parameter that is trained. Losses: none"),
        ("constant", "nothing can be learned: .* Losses: planner/square"),
    ],
)
def test_losses_that_are_none(config: Configure, flaw: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        imitate(config(planner={"name": "acme_tiny", "flaw": flaw}))


def test_mistakes_leave_nothing_behind(config: Configure) -> None:
    with pytest.raises(
        ConfigError, match=r"lr_scale: 'bakbone' fits no parameter that is trained. Did you mean 'backbone'\? Parts: backbone"
    ):
        imitate(config("optimizer.lr_scale={bakbone: 0.1}"))
    assert not Path("runs").exists()


def test_nobody_to_imitate(config: Configure, scenes: Path, tmp_path: Path) -> None:
    truth = Scene.load(scenes)
    path = dataclasses.replace(truth, human=torch.full_like(truth.human, torch.nan)).save(tmp_path / "nobody.safetensors")
    with pytest.raises(InputError, match="holds no drives of people to learn from"):
        human_drives({"name": "scenes", "path": str(path)}, 100, 0)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def optimizer_config(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate(settings)


def test_factors_on_the_learning_rate_work(config: Configure) -> None:
    settings = {"ema": 0, "steps": 3, "fit": 0}
    frozen = weights(imitate(config("optimizer.lr_scale={backbone: 0, backbone.mlp.0.bias: 1}", out="a", **settings)))
    begin = weights(imitate(config("optimizer.lr=1e-12", out="b", **settings)))
    moved = {name for name in frozen if not torch.allclose(frozen[name], begin[name], rtol=0, atol=1e-9)}
    assert moved == {"backbone.mlp.0.bias", "planner.head.weight", "planner.head.bias"}


def test_groups_and_schedule() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].bias.requires_grad_(False)
    settings = optimizer_config(lr=0.1, lr_scale={"0": 0.5, "*.weight": 2.0, "2": 0.1}, weight_decay=0.3, warmup=3, final=0.1)
    optimizer = make_optimizer(model, settings)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {
        id(model[0].weight): (0.2, 0.3),
        id(model[0].bias): (0.05, 0.0),
        id(model[1].weight): (0.2, 0.0),
        id(model[1].bias): (0.1, 0.0),
        id(model[2].weight): (pytest.approx(0.01), 0.3),
    }
    schedule = make_schedule(optimizer, settings, steps=13)
    rates = []
    for _ in range(14):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    factors = [rate[0] / rates[3][0] for rate in rates]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[8] == pytest.approx(0.55)  # half way down, to a tenth
    assert factors[13] == pytest.approx(0.1)
    assert all(rate[1] / rate[0] == pytest.approx(rates[0][1] / rates[0][0]) for rate in rates)


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="there is nothing to train"):
        make_optimizer(nn.ReLU(), optimizer_config())


def test_the_moving_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("count", torch.zeros((), dtype=torch.long))
    average = averaged(model, 0.3)
    expected = None
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(float(step * step))
        model.count += 1
        average.update_parameters(model)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = float(step * step) if expected is None else decay * expected + (1 - decay) * step * step
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.count == 6
    assert not any(parameter.requires_grad for parameter in average.parameters())


# -- the order of scenes -----------------------------------------------------------------------------------------------


class Rows(list[int]):
    """Stands in for a dataset."""


@pytest.mark.parametrize("batch", [1, 4, 7, 25])
def test_every_epoch_is_another_order_of_all_scenes(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from irlvla.stages import batches

    monkeypatch.setattr(batches, "read", lambda dataset, rows: rows)
    shuffled = Shuffled(Rows(range(10)), batch, seed=3)  # type: ignore[arg-type]
    rows = [row for number in range(30 // batch + 1) for row in shuffled(number)][:30]  # type: ignore[union-attr]
    epochs = [rows[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    one_by_one = Shuffled(Rows(range(10)), 1, seed=3)  # type: ignore[arg-type]
    assert rows == [one_by_one(number)[0] for number in range(30)]  # type: ignore[index]
    other = Shuffled(Rows(range(10)), 30, seed=4)(0)  # type: ignore[arg-type]
    assert rows != other


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_scenes_are_made_once(site: Site, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = cached(SEEN, pictures)
    assert spec["name"] == "cached"
    made, kept = build("dataset", SEEN), build("dataset", spec)
    assert len(kept) == len(made) == 6
    (obs, scene, human), (obs_kept, scene_kept, human_kept) = made[4], kept[4]
    assert torch.equal(human_kept.poses, human.poses)
    assert torch.equal(scene_kept.points, scene.points)
    assert obs_kept.images.dtype == torch.uint8
    assert (obs_kept.images.float() - obs.images.float()).abs().mean() < 8  # they went through JPEG
    torch.testing.assert_close(obs_kept.intrinsics, obs.intrinsics)
    monkeypatch.setattr(caching, "convert", lambda config: pytest.fail("they are made again"))
    assert cached(SEEN, pictures) == spec
    hidden = cached({**SEEN, "privileged": False}, pictures)
    assert hidden["path"] == spec["path"]
    assert build("dataset", hidden)[0][0].scene is None
    assert cached(spec, pictures) == build_spec(spec)
    assert cached("synthetic", None)["name"] == "synthetic"


def build_spec(spec: dict[str, Any]) -> dict[str, Any]:
    return installed().configure("dataset", spec)


def test_other_scenes_are_others(site: Site, tmp_path: Path) -> None:
    one = cached({"name": "synthetic", "count": 2}, tmp_path)
    other = cached({"name": "synthetic", "count": 2, "start": 1}, tmp_path)
    assert one["path"] != other["path"]
    assert build("dataset", one)[1][1].token == build("dataset", other)[0][1].token


def test_a_cache_that_was_begun_is_finished(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from irlvla.shards import ShardWriter

    monkeypatch.setattr(caching, "PER_SHARD", 1)
    write = ShardWriter._write

    def stop(self: ShardWriter) -> None:
        write(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "_write", stop)
    spec = {"name": "synthetic", "count": 3}
    with pytest.raises(KeyboardInterrupt):
        cached(spec, tmp_path)
    monkeypatch.setattr(ShardWriter, "_write", write)
    assert len(build("dataset", cached(spec, tmp_path))) == 3


def test_what_cannot_be_kept(site: Site, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache=.*: dataset 'scenes' .* makes no records .*; set cache=null"):
        cached({"name": "scenes", "path": str(scenes)}, tmp_path)


# -- the picture -------------------------------------------------------------------------------------------------------


def test_curves_of_a_run_in_progress(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "time": 0, "human/epdms": 0.9},
        {"step": 5, "time": 1, "losses/total": 2.0, "validation/epdms": 0.5},
        {"step": 10, "time": 2, "losses/total": None, "validation/epdms": 0.6, "blanked/epdms": 0.4},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 15, "lo')
    assert read_curves(path) == {
        "human/epdms": ([0], [0.9]),
        "losses/total": ([5], [2.0]),
        "validation/epdms": ([5, 10], [0.5, 0.6]),
        "blanked/epdms": ([10], [0.4]),
    }
    with Image.open(draw_learning_curve(path, tmp_path / "curve.png")) as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
    with pytest.raises(FileError, match="cannot be read"):
        read_curves(tmp_path / "nothing.jsonl")
    assert irlvla_command("show", str(tmp_path)).strip() == str(tmp_path / "learning_curve.png")
    assert (tmp_path / "learning_curve.png").read_bytes() == (tmp_path / "curve.png").read_bytes()
    path.write_text("")
    with pytest.raises(FileError, match="holds no losses to draw"):
        draw_learning_curve(path, tmp_path / "curve.png")


# -- costs -------------------------------------------------------------------------------------------------------------


def test_costs_are_counted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(5, 7, bias=False), nn.Tanh()])
            self.last = nn.Linear(7, 1)

    model, given = Model(), torch.rand(3, 5)
    costs, backward = measure(model, lambda: model.last(model.parts[1](model.parts[0](given))).sum())
    found = {of.name: of[1:] for of in costs}
    first, last = 2 * 3 * 5 * 7, 2 * 3 * 7
    assert found["parts.0"] == (35, first, given.nbytes)
    assert found["parts.1"] == (0, 0, 3 * 7 * 4)
    assert found["parts"] == (35, first, given.nbytes + 3 * 7 * 4)  # never called itself
    assert found["last"] == (8, last, 0)  # what tanh keeps already
    assert found[""] == (43, first + last, given.nbytes + 3 * 7 * 4)
    assert backward == first + 2 * last  # the given numbers need no gradient


# -- recipes and commands ----------------------------------------------------------------------------------------------


def irlvla_command(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, arguments, prog_name="irlvla")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid(recipe: str) -> None:
    config = configuration.read(ImitateConfig, ROOT / "recipes" / f"{recipe}.yaml", (), "imitate")
    assert config.data.validation is not None
    printed = irlvla_command("imitate", str(ROOT / "recipes" / f"{recipe}.yaml"), "--print-config")
    assert "planner:" in printed


def test_every_recipe_is_tested() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")) == sorted([*RECIPES, "score"])


@pytest.mark.parametrize("recipe", ["demo", "small"])
def test_recipes_of_the_embedded_world_run(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ["images=[32,64]", "scenes.train.count=4", "scenes.validation.count=2", "steps=2", "batch=2", "workers=0"]
    tiny += ["backbone.lift.depth=[1,61,10]", "device=cpu", "out=here"]
    printed = irlvla_command("imitate", str(ROOT / "recipes" / f"{recipe}.yaml"), *tiny)
    assert "epdms" in printed
    assert "2 steps, of which 2 was the best: here/checkpoints/best/model" in printed
    policy = from_pretrained("here/checkpoints/best/model")
    assert isinstance(policy, Policy)
    assert save_pretrained(policy, tmp_path / "copy").is_dir()


def test_the_cost_of_a_recipe() -> None:
    printed = irlvla_command("cost", str(ROOT / "recipes" / "demo.yaml"), "images=[32,64]", "batch=1", "reasoner=null", "--depth", "1")
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:-1]}
    assert rows.keys() == {"policy", "backbone", "planner"}
    assert all(float(number) > 0 for row in rows.values() for number in row)
    assert float(rows["policy"][0]) == pytest.approx(float(rows["backbone"][0]) + float(rows["planner"][0]), abs=0.002)


def test_sections_of_a_recipe(site: Site) -> None:
    recipe = {
        "size": [32, 64],
        "train": {"name": "synthetic", "count": 8, "size": "${size}"},
        "imitate": {"data": {"train": "${train}"}, "backbone": "status", "planner": "acme_tiny", "steps": "${other.steps}"},
        "other": {"steps": 7, "needs": "${oc.env:NOT_THERE}"},
    }

    def read(*overrides: str) -> ImitateConfig:
        return configuration.read(ImitateConfig, json.loads(json.dumps(recipe)), overrides, "imitate")

    assert (read().data.train["count"], read().data.train["size"], read().steps) == (8, [32, 64], 7)
    assert read("size=[8,16]").data.train["size"] == [8, 16]
    changed = read("data.train.count=3", "size=[8,16]", "train.split=val")
    assert (changed.data.train["count"], changed.data.train["size"], changed.data.train["split"]) == (3, [8, 16], "train")
    assert read("imitate.steps=5", "seed=3").steps == 5
    assert read("other.steps=6").steps == 6
    assert read("data.train=synthetic").data.train["count"] == 1000
    with pytest.raises(ConfigError, match=r"tran: there is no such field"):
        read("tran.count=3")
    with pytest.raises(ConfigError, match="imitate: must hold the fields of this stage, each as name: value; got 3"):
        read("imitate=3")
    with pytest.raises(ConfigError, match="the recipe does not set nothing"):
        read("data.train=${nothing}")
    plain = {"data": {"train": "synthetic"}, "backbone": "status", "planner": {"name": "acme_tiny"}, "steps": 3, "batch": "${steps}"}
    assert configuration.read(ImitateConfig, plain, ["steps=5"], "imitate").batch == 5


def test_stages_are_listed() -> None:
    stages = importlib.import_module("irlvla.stages")
    assert all(callable(getattr(stages, name)) for name in stages.__all__)
    assert irlvla.__version__
