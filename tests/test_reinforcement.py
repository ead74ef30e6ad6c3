"""Stage 3, reinforcement: it improves, repeats and resumes bit for bit; what watches it; what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import irlvla
from irlvla import cli, configuration
from irlvla.checkpoint import from_pretrained, save_pretrained
from irlvla.components import Policy
from irlvla.errors import ConfigError, ContractError, FileError, InputError, IrlvlaError
from irlvla.plots import read_curves
from irlvla.registry import build, installed
from irlvla.stages import auditing, reinforcement
from irlvla.stages.auditing import AuditConfig, Patience
from irlvla.stages.batches import read
from irlvla.stages.floors import Floors, FloorsConfig
from irlvla.stages.measurement import Summary
from irlvla.stages.reinforcement import EXPLORATION, ReinforceConfig, reinforce
from irlvla.stages.rollouts import Clock, Difficulty, Judge, draw, rewards, rollout_of
from irlvla.types import METRICS, Epdms, Plan
from plugins_for_tests import Site, empty_site

PLUGIN = '''
"""Rewards that lie, or that learn."""
import irlvla
import torch
from torch import nn

class Rosy(irlvla.RewardModel):
    """Whoever drives fast is thought to do everything right."""

    def forward(self, obs, scene, plan):
        fast = (plan.poses[..., -1, 0] / 40.0).clamp(0.0, 1.0)
        return irlvla.Epdms((0.8 + 0.2 * fast)[..., None].repeat(1, 1, 9))

class Timid(irlvla.RewardModel):
    """Who drives slowly is safe, and gets nowhere; safety counts for more."""

    def forward(self, obs, scene, plan):
        far = (plan.poses[..., -1, 0] / 60.0).clamp(0.0, 1.0)
        values = torch.ones(*far.shape, 9)
        values[..., 0], values[..., 4] = 1.0 - far, far
        return irlvla.Epdms(values)

class Blank(irlvla.RewardModel):
    """Measures nothing."""

    def forward(self, obs, scene, plan):
        return irlvla.Epdms(torch.full((*plan.poses.shape[:2], 9), torch.nan))

class Learner(irlvla.RewardModel):
    """One number for each metric, by logistic regression."""

    def __init__(self, config):
        super().__init__(config)
        self.logit = nn.Parameter(torch.full((9,), 3.0))

    def forward(self, obs, scene, plan):
        return irlvla.Epdms(self.logit.sigmoid().expand(*plan.poses.shape[:2], 9))

    def loss(self, predicted, measured):
        known = ~measured.values.isnan()
        return {"square": ((predicted.values - measured.values.nan_to_num()).square() * known).mean().float()}

@irlvla.hookimpl
def irlvla_reward_models():
    return {"acme_rosy": Rosy, "acme_timid": Timid, "acme_blank": Blank, "acme_learner": Learner}

@irlvla.hookimpl
def irlvla_log(run, step):
    from pathlib import Path
    if Path("kill").exists() and step == int(Path("kill").read_text()):
        Path("kill").unlink()
        raise KeyboardInterrupt
'''

SCENES = {"name": "synthetic", "count": 24, "size": None, "privileged": True}
PLANNER = {"name": "diffusion", "anchors": 8, "heads": 2, "layers": 1, "tokens": ["status", "agents", "map"]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes of the embedded world, made once."""
    from irlvla.stages.conversion import ConvertConfig, convert

    out = tmp_path_factory.mktemp("shards") / "scenes"
    convert(configuration.read(ConvertConfig, {"data": SCENES, "out": str(out), "workers": 0}))
    return out


def save_policy(folder: Path, shards: Path, backbone: str = "status", planner: Any = PLANNER) -> Path:
    """A policy that has seen people drive, and learned nothing else."""
    torch.manual_seed(0)
    policy = installed().build_policy(
        {"name": backbone, "width": 16, **({"heads": 2, "layers": 1} if backbone == "vector" else {})}, planner
    )
    human = read(build("dataset", {"name": "cached", "path": str(shards), "size": None}), range(24)).human  # type: ignore[union-attr]
    policy.planner.fit(human)
    return save_pretrained(policy, folder)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for power cuts, and slow
    monkeypatch.setattr(auditing, "draw_learning_curve", lambda metrics, out, panels: out.touch())  # slow too
    with empty_site(tmp_path, monkeypatch) as made:
        made.add("irlvla-acme", PLUGIN)
        made.scan()
        yield made


Configure = Callable[..., ReinforceConfig]


@pytest.fixture
def config(site: Site, shards: Path, tmp_path: Path) -> Configure:
    """A configuration: config("seed=3", out="here")."""
    save_policy(tmp_path / "policy", shards)
    data = {"name": "cached", "path": str(shards), "size": None, "privileged": True}

    def config(*overrides: str, **settings: Any) -> ReinforceConfig:
        recipe: dict[str, Any] = {
            "data": {"train": data, "validation": data},
            "policy": str(tmp_path / "policy"),
            "reward": "exact",
            "steps": 4,
            "batch": 4,
            "candidates": 8,
            "device": "cpu",
            "optimizer": {"warmup": 1, "lr": 0.001},
            "validation": {"every": 2, "batch": 24, "metrics": ["epdms"]},
        }
        return configuration.read(ReinforceConfig, {**recipe, **settings}, overrides)

    return config


def logged(directory: Path) -> list[dict[str, Any]]:
    """What a run logged, but for what a clock says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clocked = ("time", "charts/time_", "charts/rollouts_per_second")
    return [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines]


def same(one: Path, other: Path) -> None:
    """To the last bit. Of the names that a tensor may have, the files keep any."""
    assert logged(one) == logged(other)
    for part in ("last/model", "last/state", "best/model"):
        found, others = (load_file(run / "checkpoints" / part / "model.safetensors") for run in (one, other))
        names = found.keys() & others.keys()
        assert names
        assert all(torch.equal(found[name].nan_to_num(-1.0), others[name].nan_to_num(-1.0)) for name in names), part


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())  # type: ignore[no-any-return]


# -- the run -----------------------------------------------------------------------------------------------------------


def test_improves_on_the_exact_reward(config: Configure) -> None:
    settings = config("steps=12", "batch=12", "validation.every=12", "optimizer.lr=0.003", "algorithm.imitation=0", "log_every=12")
    directory = reinforce(settings)
    curves = read_curves(directory / "metrics.jsonl")
    steps, scores = curves["validation/epdms"]
    assert steps == [0, 12]
    assert scores[1] > scores[0] + 0.03
    assert summary(directory)["metrics"]["epdms"]["mean"] == pytest.approx(scores[1])


def test_what_a_run_leaves(config: Configure) -> None:
    directory = reinforce(config(out="run"))
    assert {"config.yaml", "metrics.jsonl", "summary.json", "learning_curve.png", "checkpoints"} <= {
        file.name for file in directory.iterdir()
    }
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert {"human/epdms", "constant_velocity/epdms", "validation/epdms", "audit/gap"} <= lines[0].keys()
    expected = {"reward/believed", "reward/exact", "reward/gap", "reward/believed_nc", "reward/exact_ep", "reward/gap_ttc"}
    shares = {f"charts/time_{part}" for part in ("sampling", "reward", "floors", "update", "audit")}
    for line in lines[1:]:
        assert (expected | shares | {"losses/approx_kl", "losses/policy_loss", "charts/rollouts_per_second"}) <= line.keys()
        assert sum(line[name] for name in shares) == pytest.approx(1.0)
        assert line["reward/gap"] == 0.0  # the reward is the exact one
        assert "reward/believed_ec" not in line  # nobody measures it
    result = summary(directory)
    assert result["steps"] == 4
    assert "was the best" in result["result"]
    policy = from_pretrained(directory / "checkpoints" / "best" / "model")
    assert isinstance(policy, Policy)
    assert policy.planner.explore is False


def test_what_is_saved_is_the_moving_average(config: Configure) -> None:
    """Which begins with the first step."""
    one, two, averaged = (
        from_pretrained(reinforce(config(*settings, out=settings[0] + settings[1])) / "checkpoints" / "last" / "model").state_dict()  # type: ignore[union-attr]
        for settings in (("steps=1", "ema=0.9"), ("steps=2", "ema=0"), ("steps=2", "ema=0.9"))
    )
    learnt = [name for name in one if not torch.equal(one[name], two[name])]
    assert learnt
    for name in learnt:
        decay = 2.0 / 11.0  # of the first average: it reaches back a tenth of the steps made
        expected = decay * one[name] + (1.0 - decay) * two[name]
        assert torch.allclose(averaged[name], expected, rtol=1e-5, atol=1e-7), name


def test_only_the_planner_learns(config: Configure, shards: Path, tmp_path: Path) -> None:
    """Unless the backbone is to learn, too."""
    save_policy(tmp_path / "policy", shards, "vector")
    before = from_pretrained(tmp_path / "policy").state_dict()  # type: ignore[union-attr]
    for train in (False, True):
        directory = reinforce(config("steps=2", f"train_backbone={train}", out=f"run-{train}"))
        after = from_pretrained(directory / "checkpoints" / "last" / "model").state_dict()  # type: ignore[union-attr]
        changed = {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert changed == ({"planner", "backbone"} if train else {"planner"})


def test_features_that_are_kept_change_little(config: Configure, shards: Path, tmp_path: Path) -> None:
    """They are in half precision; and what is frozen sees each scene once."""
    save_policy(tmp_path / "policy", shards, "vector")
    found = [logged(reinforce(config("steps=1", f"cache_features={kept}", out=f"run-{kept}")))[1] for kept in (True, False)]
    assert found[0]["reward/believed"] == pytest.approx(found[1]["reward/believed"], abs=0.02)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "reinforce"])
@pytest.mark.parametrize("planner", ["flow", "gaussian", "vocabulary"])
def test_every_pair_runs(config: Configure, shards: Path, tmp_path: Path, algorithm: str, planner: str) -> None:
    save_policy(tmp_path / "policy", shards, planner={**PLANNER, "name": planner})
    directory = reinforce(config("steps=1", "validation.every=1", f"algorithm={algorithm}"))
    assert logged(directory)[1]["validation/epdms"] >= 0.0


# -- it repeats --------------------------------------------------------------------------------------------------------


def test_repeats(config: Configure) -> None:
    one, other = (reinforce(config(out=out)) for out in ("one", "other"))
    same(one, other)
    different = reinforce(config("seed=1", out="different"))
    assert logged(different) != logged(one)


@pytest.mark.parametrize("kill", [2, 3, 4])
def test_resumes(config: Configure, kill: int) -> None:
    """Two steps, an interruption, and the others are four steps: with a critic, the policy of the beginning, and a reward that learns."""
    settings = {"algorithm": {"name": "ppo", "kl": 0.1}, "reward": "acme_learner", "refit": {"every": 2, "steps": 2}, "accumulate": 2}
    unbroken = reinforce(config(out="unbroken", **settings))
    Path("kill").write_text(str(kill))
    with pytest.raises(KeyboardInterrupt):
        reinforce(config(out="broken", **settings))
    same(reinforce(config("resume=true", out="broken", **settings)), unbroken)


def test_accumulated_batches_are_one_rollout(config: Configure) -> None:
    """Of as many scenes; but for the random numbers of each part."""
    whole, parts = (logged(reinforce(config("steps=1", *sizes, out=sizes[0]))) for sizes in (("batch=8",), ("batch=4", "accumulate=2")))
    assert parts[1]["reward/believed"] == pytest.approx(whole[1]["reward/believed"], abs=0.2)


# -- the audit ---------------------------------------------------------------------------------------------------------


def test_the_audit_stops_a_reward_that_believes_too_much(config: Configure) -> None:
    directory = reinforce(config("steps=40", reward="acme_rosy", out="run"))
    lines = logged(directory)
    assert lines[-1]["step"] == 4  # the second validation
    assert lines[-1]["audit/gap"] > 0.1
    assert lines[-1]["reward/gap"] == pytest.approx(lines[-1]["reward/believed"] - lines[-1]["reward/exact"])
    told = summary(directory)["result"]
    assert told.startswith("stopped by the audit: in 2 validations running the reward believed more than 0.1 above the exact score")
    best = json.loads((directory / "checkpoints" / "best" / "score.json").read_text())
    assert best["metrics"]["epdms"]["mean"] == max(line["validation/epdms"] for line in lines if "validation/epdms" in line)
    assert told.endswith(f"4 steps, of which {best['step']} was the best: run/checkpoints/best/model")
    again = reinforce(config("steps=40", "resume=true", reward="acme_rosy", out="run"))
    assert logged(again) == lines
    unwatched = reinforce(config("audit.limit=null", "audit.growth=null", reward="acme_rosy", out="unwatched"))
    assert summary(unwatched)["result"].startswith("4 steps")


def test_patience_is_of_validations_running() -> None:
    patience = Patience(AuditConfig(limit=0.1, patience=2))
    for gap, lost in ((0.2, False), (0.05, False), (0.2, False), (0.11, True)):
        patience.see(gap)
        assert patience.lost == lost


def test_a_gap_that_grows_stops_a_run_too() -> None:
    """Also of a reward that believed too little at first, and so is still below the exact score."""
    patience = Patience(AuditConfig(growth=0.05, patience=2))
    patience.begin(-0.2)
    for gap, lost in ((-0.14, False), (-0.16, False), (-0.1, False), (-0.1, True)):
        patience.see(gap)
        assert patience.lost == lost
    assert patience.allowed == "more than 0.1 above the exact score or 0.05 more above the exact score than at the start"
    for growth in (None, 0.05):
        alone = Patience(AuditConfig(limit=None, growth=growth, patience=1))
        alone.begin(0.3)
        alone.see(0.4)
        assert alone.lost == (growth is not None)


def test_the_audit_costs_what_it_is_allowed(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    truth = Judge.truth

    def watch(self: Judge, obs: Any, scene: Any, plan: Plan, believed: Epdms) -> Epdms:
        seen.append(len(scene))
        return truth(self, obs, scene, plan, believed)

    monkeypatch.setattr(Judge, "truth", watch)
    settings = {"reward": "acme_learner", "audit": {"every": 2, "share": 0.5, "limit": None, "growth": None}}
    lines = logged(reinforce(config("data.validation=null", **settings)))
    assert seen == [2, 2]
    assert ["reward/exact" in line for line in lines] == [False, False, True, False, True]


def test_a_reward_can_be_refitted(config: Configure) -> None:
    """It comes to believe what is true; what it learns is part of the state."""
    refit = {"every": 1, "steps": 20, "lr": 0.1}
    lines = logged(reinforce(config("steps=6", reward="acme_learner", refit=refit, audit={"limit": None, "growth": None})))
    assert lines[1]["refit/after"] < lines[1]["refit/before"]
    assert abs(lines[-1]["reward/gap"]) < abs(lines[1]["reward/gap"]) / 2


def test_saved_rewards(config: Configure) -> None:
    save_pretrained(build("reward_model", "acme_learner"), "reward")
    lines = logged(reinforce(config("steps=1", "validation.every=1", reward=None, saved_reward="reward")))
    assert lines[1]["reward/believed_nc"] == pytest.approx(torch.tensor(3.0).sigmoid().item())
    mixed = {"name": "mix", "saved": "reward", "share": 0.5}
    lines = logged(reinforce(config("steps=1", "validation.every=1", reward=mixed, out="mixed")))
    assert 0.0 < lines[1]["reward/gap_nc"] < 0.5


@pytest.mark.parametrize("refit", [None, {"every": 1, "steps": 2}])
def test_the_reward_world_model(config: Configure, refit: Any) -> None:
    """It looks once, too; refitted, its heads learn and its backbone does not."""
    backbone = {"name": "vector", "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    reward: Any = build("reward_model", {"name": "world_model", "backbone": backbone, "width": 16, "heads": 2, "layers": 1})
    save_pretrained(reward, "reward")
    looks: list[int] = []
    forward = type(reward.backbone).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reward.backbone), "forward", lambda self, obs: looks.append(len(obs)) or forward(self, obs))
        lines = logged(reinforce(config(reward=None, saved_reward="reward", refit=refit, audit={"limit": None, "growth": None})))
    assert sum(looks) == 48  # the scenes of training and of validation
    assert "reward/gap_dac" in lines[-1]
    if refit:
        assert lines[-1]["refit/after"] < lines[1]["refit/before"]


# -- floors ------------------------------------------------------------------------------------------------------------


def test_floors_hold_what_the_reward_would_give_away(config: Configure) -> None:
    """Slower is better for the score; with a floor under progress the policy gives less of it away."""
    progress = {}
    for floors in (None, {"fall": 0.0, "rate": 10.0}):
        settings = {"reward": "acme_timid", "floors": floors, "audit": {"limit": None, "growth": None}, "out": f"run-{floors is None}"}
        lines = logged(reinforce(config("steps=20", "batch=12", "validation.every=20", "optimizer.lr=0.003", "hard=0", **settings)))
        progress[floors is None] = [line["audit/believed_ep"] for line in (lines[0], lines[-1])]
        assert ("floors/multiplier_ep" in lines[-1]) == (floors is not None)
    (start, held), (same_start, given) = progress[False], progress[True]
    assert start == same_start
    assert given < start - 0.02
    assert held > given + 0.01


def test_multipliers() -> None:
    """They grow while a sub-metric is below its floor, shrink to 0 above it, and what is not measured has none."""
    floors = Floors(FloorsConfig(fall=0.1, rate=1.0, memory=0.0), nn.Linear(1, 1), None)  # type: ignore[arg-type]
    values = torch.ones(2, 3, 9)
    values[..., METRICS.index("ec")] = torch.nan
    values[..., METRICS.index("ep")] = torch.tensor([0.2, 0.6, 1.0])
    believed = Epdms(values)
    assert torch.equal(floors.reward(believed), believed.score())
    driven = {0: values[:, 0], 1: values[:, 2]}  # now, and at the start
    floors._driven = lambda policy, *rest: driven[policy is floors.first]  # type: ignore[assignment, method-assign]
    told = floors.see(None, None, 1, 0)  # type: ignore[arg-type]
    assert told["floors/fall_ep"] == pytest.approx(0.8)
    assert told["floors/multiplier_ep"] == pytest.approx(0.7)
    assert told["floors/multiplier_nc"] == told["floors/multiplier_ec"] == 0.0
    expected = (believed.score() + 0.7 * values[..., METRICS.index("ep")]) / 1.7
    assert torch.allclose(floors.reward(believed), expected)
    assert floors.reward(believed).max() == 1.0
    driven[0] = values[:, 2]
    for _ in range(8):
        told = floors.see(None, None, 1, 0)  # type: ignore[arg-type]
    assert told["floors/multiplier_ep"] == 0.0


def test_a_policy_below_a_floor_is_not_the_best(config: Configure) -> None:
    """Its score rises, at the cost of progress; a floor that never binds in training does in held-out scenes."""
    best, lines = {}, []
    for held_out in (0.1, 1.0):
        floors, out = {"fall": 1.0, "held_out": held_out}, f"run-{held_out}"
        settings = {"reward": "acme_timid", "floors": floors, "audit": {"limit": None, "growth": None}, "out": out}
        run = reinforce(config("steps=20", "batch=12", "validation.every=20", "optimizer.lr=0.003", "hard=0", **settings))
        lines = logged(run)
        best[held_out] = json.loads((run / "checkpoints" / "best" / "score.json").read_text())["step"]
    assert lines[-1]["validation/epdms"] > lines[0]["validation/epdms"]
    assert lines[-1]["validation/ep"] < lines[0]["validation/ep"] - 0.1
    assert best == {0.1: 0, 1.0: 20}


def test_what_floors_hold() -> None:
    floors = Floors(FloorsConfig(held_out=0.1), nn.Linear(1, 1), None)  # type: ignore[arg-type]
    again = Floors(FloorsConfig(held_out=0.1), nn.Linear(1, 1), None)  # type: ignore[arg-type]

    def found(**means: float | None) -> Summary:
        return {name: {"mean": mean, "count": 1} for name, mean in means.items()}

    floors.begin(found(nc=0.9, ep=0.5, ec=None, epdms=0.6))
    again.load_state_dict(floors.state_dict())  # as a run that goes on does
    for one in (floors, again):
        assert one.hold(found(nc=0.81, ep=0.9, dac=0.0, epdms=0.1))
        assert not one.hold(found(nc=0.79, ep=0.9))
        assert one.hold(found(epdms=0.7))
    assert Floors(None, nn.Linear(1, 1), None).hold(found(nc=0.0))  # type: ignore[arg-type]


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_hard_scenes_come_more_often() -> None:
    difficulty = Difficulty(10, share=0.5)
    plan = Plan(torch.zeros(10, 2, 8, 3), score=torch.tensor([[0.0, 1.0]]).repeat(10, 1))
    favourite = torch.ones(10)
    favourite[3] = 0.0
    difficulty.see(torch.arange(10), plan, torch.stack([1.0 - favourite, favourite], 1))
    counts = torch.bincount(torch.tensor([row for number in range(2000) for row in difficulty.draw(1, 0, number)]), minlength=10) / 2000
    assert counts[3].item() == pytest.approx(0.5 + 0.05, abs=0.04)
    assert counts[0].item() == pytest.approx(0.05, abs=0.02)
    assert difficulty.draw(4, 0, 7) == difficulty.draw(4, 0, 7)
    assert len(set(difficulty.draw(10, 0, 7))) == 10
    assert len(difficulty.draw(15, 0, 7)) == 15


def test_even_draws_before_anything_is_known() -> None:
    counts = torch.bincount(torch.tensor([row for number in range(1000) for row in Difficulty(4, 1.0).draw(1, 0, number)])) / 1000
    assert (counts - 0.25).abs().max() < 0.05


def test_rewards_of_part_of_the_plans() -> None:
    """The gap is that of the plans whose exact reward is known."""
    believed = torch.full((4, 2, 9), 0.5)
    believed[2:] = 1.0
    believed[..., METRICS.index("ec")] = torch.nan
    found = rewards(Epdms(believed), Epdms(torch.full((2, 2, 9), 0.25)))
    assert found["believed_nc"] == pytest.approx(0.75)
    assert found["exact_nc"] == pytest.approx(0.25)
    assert found["gap_nc"] == pytest.approx(0.25)
    assert "gap_ec" not in found
    assert "gap" in found


def test_drawn_plans_are_those_of_log_prob(config: Configure, shards: Path, tmp_path: Path) -> None:
    policy: Any = from_pretrained(tmp_path / "policy")
    batch: Any = read(build("dataset", {"name": "cached", "path": str(shards), "size": None}), range(3))
    drawn = draw(policy, batch, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = policy.planner.log_prob(policy(batch.observation), drawn.plan)
    assert torch.equal(drawn.log_prob, expected)
    assert policy.planner.explore is False
    worth = irlvla.epdms(batch.scene, drawn.plan)
    rollout = rollout_of(drawn, worth, worth.score())
    assert rollout.reward.dtype == rollout.plan.poses.dtype == torch.float32


def test_clock() -> None:
    clock = Clock()
    for part in ("one", "other", "one"):
        with clock(part):
            sum(range(1000))
    assert sum(clock.shares().values()) == pytest.approx(1.0)
    assert clock.shares().keys() == {"time_one", "time_other"}


@pytest.mark.parametrize("preset", EXPLORATION)
def test_exploration_presets(config: Configure, preset: str) -> None:
    """Each is accepted by the chain planners, and kept with the policy; a setting beside it wins."""
    directory = reinforce(config("steps=1", "validation.every=1", f"exploration={preset}", "planner={min_sampling_std: 0.03}"))
    policy: Any = from_pretrained(directory / "checkpoints" / "last" / "model")
    settings = policy.planner.config.model_dump()
    assert settings["min_sampling_std"] == 0.03
    assert all(settings[name] == value for name, value in EXPLORATION[preset].items() if name != "min_sampling_std")


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_refusals(config: Configure, shards: Path, tmp_path: Path) -> None:
    def refused(kind: type[IrlvlaError], match: str, *overrides: str, **settings: Any) -> None:
        with pytest.raises(kind, match=match):
            reinforce(config(*overrides, **settings))

    refused(FileError, "nowhere", policy="nowhere")
    refused(ConfigError, "give a reward: `reward` by its name", reward=None)
    refused(ConfigError, "reward and saved_reward: give one of them", saved_reward="policy")
    refused(ConfigError, "saved_reward=.*policy holds no reward model but a policy", reward=None, saved_reward=str(tmp_path / "policy"))
    refused(ConfigError, "reward_model 'exact'.* has nothing to learn; set refit=null", refit={})
    refused(ConfigError, "min_sampling_stt", planner={"min_sampling_stt": 1})
    refused(ConfigError, "the saved weights do not fit a planner with these settings", planner={"layers": 2})
    refused(ContractError, "acme_blank.* does not measure nc, .*; only EC may be NaN", reward="acme_blank")
    refused(ConfigError, "fp16", precision="fp16")
    save_pretrained(build("reward_model", "acme_learner"), "reward")
    refused(ConfigError, "policy=reward holds no policy but reward_model 'acme_learner'", policy="reward")
    save_policy(tmp_path / "policy", shards, planner="constant_velocity")
    refused(InputError, "constant_velocity.* has no log_prob, so it imitates but cannot be reinforced")


def test_command_line(config: Configure, site: Site) -> None:
    recipe = configuration.to_yaml(config(out="run"))
    Path("recipe.yaml").write_text(recipe)
    done = CliRunner().invoke(cli.app, ["reinforce", "recipe.yaml", "steps=2"])
    assert done.exit_code == 0, done.output
    assert "epdms" in done.output
    assert "2 steps, of which" in done.output
    wrong = CliRunner().invoke(cli.app, ["reinforce", "recipe.yaml", "reward=exakt"])
    assert wrong.exit_code == 2
    assert "Did you mean 'exact'?" in wrong.output
    assert reinforcement.reinforce is reinforce
