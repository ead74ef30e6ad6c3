"""Stage 2: what a reward learns from, that it repeats and resumes, what its report says, and how it is probed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import irlvla
from irlvla import cli, configuration
from irlvla.candidates import Source, vocabulary_of
from irlvla.checkpoint import from_pretrained, save_pretrained
from irlvla.components import RewardModel
from irlvla.errors import ConfigError, InputError
from irlvla.registry import build, installed
from irlvla.run import Run, RunConfig
from irlvla.stages import ProbeConfig, RewardConfig, probe, probing, reward, reward_data, reward_report, reward_statistics
from irlvla.stages.batches import Weighted, read
from irlvla.stages.features import FeatureCache, backbones_of, digest_of, keep_features
from irlvla.stages.labelling import InOrder, LabelledBatch, LabelledBatches, Labeller, weigh
from irlvla.stages.reward_learning import RewardLearning, inverse_loss
from irlvla.testing import example_observation
from irlvla.types import METRICS, Epdms, Scene

ROOT = Path(__file__).parents[1]
RECIPES = ["av2", "demo", "navsim", "small"]
VECTOR = {
    "name": "world_model",
    "backbone": {"name": "vector", "width": 16, "layers": 1, "agents": 8, "elements": 8, "points": 4},
    "tokens": ["agents", "map", "status"],
    "width": 16,
    "heads": 2,
    "layers": 1,
    "meetings": 8,
    "moments": 4,
}
SEES = {  # as small as it can be
    "name": "bev",
    "width": 8,
    "encoder": {"model": "regnetx_002", "strides": [16], "channels": 8},
    "lift": {"x": [-8, 56, 8], "y": [-32, 32, 8], "depth": [1, 61, 10], "channels": 4, "widths": [8], "blocks": 1, "joined": 8},
    "detection": {"queries": 2, "layers": 1, "heads": 2},
    "map": None,
    "segmentation": None,
}
LOOKING = {**VECTOR, "backbone": SEES, "tokens": ["bev", "agents", "status"], "bev_tokens": 2, "channels": 4}
DIFFUSION = {"name": "diffusion", "heads": 2, "anchors": 4, "layers": 1}
FEW = dict.fromkeys(("vocabulary", "lateral", "speed", "heading", "stop", "swerve", "mixed", "constant_velocity"), 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with images, shared by the tests of this file."""
    return tmp_path_factory.mktemp("scenes")


def scenes_of(shards: Path, count: int = 12, split: str = "train", size: list[int] | None = None) -> dict[str, Any]:
    from irlvla.stages.caching import cached

    return cached({"name": "synthetic", "split": split, "count": count, "size": size or [32, 64]}, shards)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for power cuts, and slow
    monkeypatch.setattr(reward_data, "draw_learning_curve", lambda metrics, out, panels: out.touch())  # slow too
    for name in ("draw_reliability", "draw_scores"):
        monkeypatch.setattr(reward_report, name, lambda *given: given[-1].touch())
    return tmp_path


@pytest.fixture
def config(shards: Path, place: Path) -> Callable[..., RewardConfig]:
    """A configuration: config("seed=3", out="here")."""

    def config(*overrides: str, **settings: Any) -> RewardConfig:
        recipe: dict[str, Any] = {
            "data": {"train": scenes_of(shards), "validation": scenes_of(shards, 6, "val")},
            "reward": VECTOR,
            "candidates": FEW,
            "keep_candidates": 12,
            "vocabulary": 6,
            "steps": 4,
            "batch": 4,
            "log_every": 1,
            "device": "cpu",
            "optimizer": {"warmup": 1, "lr": 0.01},
            "validation": {"every": 2, "scenes": 3},
            "report": {"candidates": FEW},
        }
        return configuration.read(RewardConfig, {**recipe, **settings}, overrides)

    return config


Configure = Callable[..., RewardConfig]
TIMES = ("time", "charts/samples_per_second", "charts/label_share")


def logged(directory: Path) -> list[dict[str, Any]]:
    """What a run logged, but for what a clock says."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def same(one: Path, other: Path) -> None:
    """To the last bit."""
    assert logged(one) == logged(other)
    for part in ("checkpoints/last/model", "checkpoints/last/state", "checkpoints/best/model", "model"):
        found, others = (load_file(run / part / "model.safetensors") for run in (one, other))
        assert found.keys() == others.keys()
        assert all(torch.equal(found[name], others[name]) for name in found), part


# -- a run -------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(config: Configure, shards: Path) -> None:
    data = {"train": scenes_of(shards), "validation": scenes_of(shards, 6, "val"), "unseen": scenes_of(shards, 2, "unseen")}
    directory = reward(config(out="here", data=data, report={"candidates": FEW, "blind": 0}))
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "checkpoints",
        "config.yaml",
        "learning_curve.png",
        "metrics.jsonl",
        "model",
        "report.json",
        "report.md",
        "summary.json",
    }
    assert names >= {f"{picture}-{part}.png" for picture in ("reliability", "scores") for part in ("validation", "unseen")}
    assert sorted(os.listdir("here/checkpoints")) == ["best", "last", "step-2", "step-4"]
    lines = logged(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {f"losses/{name}" for name in ("nc", "dac", "ep", "reference", "inverse", "total")} <= lines[0].keys()
    raw = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.0 < raw["charts/label_share"] < 1.0
    assert raw["charts/samples_per_second"] > 0.0
    assert ["validation/spearman" in line for line in lines] == [False, True, False, True]
    best = json.loads(Path("here/checkpoints/best/score.json").read_text())
    assert best["metrics"]["spearman"]["mean"] == max(line["validation/spearman"] for line in lines if "validation/spearman" in line)
    report = json.loads((directory / "report.json").read_text())
    assert {name: section["scenes"] for name, section in report["sections"].items()} == {"validation": 3, "unseen": 2}
    assert report["sections"]["validation"]["candidates"] == 17
    assert set(report["sections"]["validation"]["sources"]) == {kind.name.lower() for kind in Source} - {"policy"}
    assert set(report["throughput"]) == {"whole model", "heads alone", "exact score"}
    assert all(after <= before for before, after in report["calibration"].values())
    assert "hc" not in report["calibration"]
    text = (directory / "report.md").read_text()
    assert "## unseen: 2 scenes, 17 candidates in each" in text
    assert json.loads((directory / "summary.json").read_text())["metrics"]["spearman"]["count"] == 3
    model: Any = from_pretrained(directory / "model")
    assert model.support.threshold.isfinite()


def test_without_held_out_scenes(config: Configure, shards: Path) -> None:
    directory = reward(config(out="here", data={"train": scenes_of(shards)}, steps=1))
    assert not any(name.startswith("validation/") for line in logged(directory) for name in line)
    assert not (directory / "report.json").exists()
    assert json.loads((directory / "summary.json").read_text())["metrics"] == {}
    assert isinstance(from_pretrained(directory / "model"), RewardModel)


def test_it_learns(config: Configure, shards: Path) -> None:
    directory = reward(
        config("inverse.weight=0", steps=60, batch=6, log_every=1, ema=0.9, keep_candidates=16, validation={"every": 60, "scenes": 3})
    )
    totals = [line["losses/total"] for line in logged(directory)]
    assert sum(totals[-10:]) < 0.8 * sum(totals[:10])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_as_if_it_had_not_stopped(config: Configure, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"workers": workers, "accumulate": 2, "batch": 2, "seed": 5}
    whole = reward(config(out="whole", **settings))
    begun = config(out="parts", **settings)
    validate = reward_data.RewardData.validate

    def stop(self: reward_data.RewardData, step: int, model: RewardModel) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return validate(self, step, model)

    monkeypatch.setattr(reward_data.RewardData, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        reward(begun)
    assert sorted(os.listdir("parts/checkpoints")) == ["best", "last", "step-2"]
    monkeypatch.setattr(reward_data.RewardData, "validate", validate)
    same(whole, reward(begun.model_copy(update={"resume": True})))


def test_seeds(config: Configure) -> None:
    one, again, other = (reward(config(out=name, seed=seed, steps=2)) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    same(one, again)
    assert logged(one)[0]["losses/total"] != logged(other)[0]["losses/total"]


def test_accumulated_gradients_are_those_of_the_whole(config: Configure) -> None:
    settings = config()
    torch.manual_seed(0)
    learner = RewardLearning(build("reward_model", VECTOR), settings).train()
    batch = batches_of(settings)(0)
    halves = [part_of(batch, rows) for rows in (slice(0, 2), slice(2, 4))]

    def gradient(parts: list[LabelledBatch]) -> list[Tensor]:
        learner.zero_grad()
        for part in parts:
            (torch.stack(list(learner(part).values())).sum() / len(parts)).backward()
        return [parameter.grad.clone() for parameter in learner.model.parameters() if parameter.grad is not None]

    for one, other in zip(gradient([batch]), gradient(halves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def batches_of(settings: RewardConfig) -> Callable[[int], Any]:
    dataset = build("dataset", settings.data.train)
    vocabulary = vocabulary_of(torch.cat([dataset[i][2].poses for i in range(len(dataset))]), 6)
    return LabelledBatches(InOrder(dataset, range(len(dataset)), 4), Labeller(settings.candidates, vocabulary=vocabulary, keep=12), 0)


def part_of(batch: LabelledBatch, rows: slice) -> LabelledBatch:
    mask = torch.zeros(len(batch.scenes.rows), dtype=torch.bool)
    mask[rows] = True
    return LabelledBatch(batch.scenes.chosen(mask), batch.plan[rows], batch.source[rows], batch.labels[rows], batch.seconds)


def test_an_ensemble_learns_calibrates_and_is_saved(config: Configure) -> None:
    directory = reward(config(reward={"name": "ensemble", "members": [VECTOR, VECTOR]}, steps=2))
    one, other = (from_pretrained(directory / "model")).members  # type: ignore[union-attr]
    assert not torch.equal(one.network.norm.weight, other.network.norm.weight)
    assert one.support.threshold.isfinite()
    assert one.temperatures["dac"].sharpness != 1.0
    assert other.temperatures["dac"].sharpness != 1.0


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_are_of_what_is_seen(config: Configure) -> None:
    batch = batches_of(config())(1)
    assert batch.plan.poses.shape == (4, 12, 8, 3)
    assert torch.equal(batch.plan.poses[:, 0], batch.scenes.human.poses)
    assert (batch.source[:, 0] == Source.HUMAN).all()
    exact = irlvla.epdms(batch.scenes.scene, batch.plan, details=True)
    assert torch.equal(batch.labels.values.nan_to_num(-1.0), exact.values.nan_to_num(-1.0))
    assert torch.equal(batch.labels.details.collision_step, exact.details.collision_step)
    labels, all_in_all = batch.seconds.tolist()
    assert 0.0 < labels < all_in_all
    again = batches_of(config())(1)
    assert torch.equal(batch.plan.poses, again.plan.poses)


def test_a_policy_gives_candidates(config: Configure, place: Path) -> None:
    policy = installed().build_policy({"name": "status", "width": 8}, DIFFUSION)
    save_pretrained(policy, place / "policy")
    settings = config(policy=str(place / "policy"), proposals=2, proposal_share=0.34, keep_candidates=16, steps=1)
    directory = reward(settings)
    report = json.loads((directory / "report.json").read_text())["sections"]["validation"]
    assert report["sources"]["policy"]["dac"]["count"] == 3 * 2 * 3  # scenes, proposals, and states of a chain of two steps
    dataset = build("dataset", settings.data.train)
    proposals = torch.rand(len(dataset), 6, 8, 3)
    batches: Any = batches_of(settings)
    batch = dataclasses.replace(batches, labeller=dataclasses.replace(batches.labeller, proposals=proposals, share=0.34, keep=16))(0)
    proposed = batch.source == Source.POLICY
    assert proposed.sum(1).tolist() == [5] * 4
    for row, scene in enumerate(batch.scenes.rows.tolist()):
        for poses in batch.plan.poses[row][proposed[row]]:
            assert (proposals[scene] == poses).all((1, 2)).any()
    with pytest.raises(ConfigError, match=r"keep_candidates=12, of which proposal_share=0.34 are the policy's: .* more than the 9 metrics"):
        reward(config(policy=str(place / "policy"), proposals=2, proposal_share=0.34))
    save_pretrained(build("reward_model", VECTOR), place / "reward")
    with pytest.raises(ConfigError, match=r"policy=.*reward: it is no policy"):
        reward(config(policy=str(place / "reward")))


def test_chains_end_in_plans() -> None:
    obs = example_observation(2)
    policy = installed().build_policy({"name": "status", "width": 8}, DIFFUSION)
    with torch.no_grad():
        plan = policy.sample(obs, 3, generator=torch.Generator().manual_seed(0))
        chain = policy.planner.chain(plan)  # type: ignore[operator]
    assert chain.shape == (2, 3, 3, 8, 3)
    torch.testing.assert_close(chain[:, :, -1], plan.poses)


def test_hard_scenes_come_more_often() -> None:
    class Rows(list[int]):
        """Stands in for a dataset."""

    weights = torch.tensor([0.0, 0.5, 1.0, 2.5])
    order = Weighted(Rows(range(4)), 4, 1, weights)  # type: ignore[arg-type]
    epochs = [order._epoch(number) for number in range(200)]
    counts = torch.stack([torch.bincount(torch.tensor(epoch), minlength=4) for epoch in epochs]).float()
    assert (counts.sum(1) == 4).all()
    torch.testing.assert_close(counts.mean(0), weights, atol=0.12, rtol=0.0)
    assert ((counts - weights).abs() < 1.0).all()
    assert order._epoch(3) == Weighted(Rows(range(4)), 4, 1, weights)._epoch(3)  # type: ignore[arg-type]


class NoRun:
    """Stands in for a run that shows nothing."""

    def progress(self, *given: Any) -> Any:
        from irlvla.run.progress import track

        return track(1, "", show=False)


def test_scenes_are_weighed(config: Configure) -> None:
    batches = [batches_of(config())(number) for number in range(2)]  # eight scenes of twelve: of the others no drive is known
    dataset = build("dataset", config().data.train)
    weights = weigh(dataset, batches, 0.5, NoRun())  # type: ignore[arg-type]
    assert weights.mean() == pytest.approx(1.0)
    assert (weights[8:] == 0.0).all()
    spread = torch.cat([batch.labels.score().var(1, correction=0) for batch in batches])
    assert torch.equal(weights[:8].argsort(stable=True), spread.argsort(stable=True))
    assert weights[:8].min() >= 0.5
    with pytest.raises(InputError, match="holds no drives of people to learn from"):
        weigh(dataset, [], 0.5, NoRun())  # type: ignore[arg-type]


def test_nobody_to_learn_from(config: Configure, shards: Path, place: Path) -> None:
    dataset = build("dataset", scenes_of(shards))
    scene = Scene.cat(dataset[i][1] for i in range(3))
    dataclasses.replace(scene, human=torch.full_like(scene.human, math.nan)).save(place / "nobody.safetensors")
    with pytest.raises(InputError, match="holds no drives of people to learn from"):
        reward(config(data={"train": {"name": "scenes", "path": str(place / "nobody.safetensors")}}))


def test_nothing_to_learn(config: Configure) -> None:
    with pytest.raises(ConfigError, match="there is nothing to train"):
        reward(config(reward="exact"))
    with pytest.raises(ConfigError, match="give steps or epochs"):
        reward(config(epochs=1.0))
    with pytest.raises(ConfigError, match=r"validation\.best: there is no 'spearmint'. Did you mean 'spearman'"):
        reward(config("validation.best=spearmint"))


# -- the inverse-RL term -----------------------------------------------------------------------------------------------


def test_the_human_is_put_above_the_others() -> None:
    score = torch.tensor([[0.2, 0.5, 0.1], [0.9, 0.3, 0.3]], dtype=torch.double, requires_grad=True)
    entropy = inverse_loss(score, "maximum_entropy", 0.1)
    expected = -sum(math.log(math.exp(row[0] / 0.1) / sum(math.exp(v / 0.1) for v in row)) for row in score.tolist()) / 2
    assert entropy.item() == pytest.approx(expected)
    ranking = inverse_loss(score, "ranking", 0.1)
    pairs = [math.log(1 + math.exp((v - row[0]) / 0.1)) for row in score.tolist() for v in row[1:]]
    assert ranking.item() == pytest.approx(sum(pairs) / 4)
    for loss in (entropy, ranking):
        (gradient,) = torch.autograd.grad(loss, score)
        assert (gradient[:, 0] < 0.0).all()
        assert (gradient[:, 1:] > 0.0).all()
    assert inverse_loss(score[:, :1], "ranking", 0.1) == 0.0


def test_the_inverse_term_is_one_more_loss(config: Configure) -> None:
    settings = config("inverse.weight=0.5")
    batch = batches_of(settings)(0)
    torch.manual_seed(0)
    model = build("reward_model", VECTOR)
    losses = RewardLearning(model, settings)(batch)
    score = model(batch.scenes.observation, batch.scenes.scene, batch.plan).score()
    torch.testing.assert_close(losses["inverse"], 0.5 * inverse_loss(score, "maximum_entropy", 0.1))
    assert "inverse" not in RewardLearning(model, config("inverse.weight=0"))(batch)


# -- flipped labels ----------------------------------------------------------------------------------------------------


def test_flipped_labels_of_a_metric_change_that_metric_alone(config: Configure) -> None:
    """The same training, but with NC the other way around: of NC it says the opposite, and of the others about the same."""
    settings = config("inverse.weight=0")
    batch = batches_of(settings)(0)
    column = METRICS.index("nc")
    flipped = batch.labels.values.clone()
    flipped[..., column] = 1.0 - flipped[..., column]
    told = {"as it is": batch.labels, "flipped": Epdms(flipped)}
    found = {}
    for name, labels in told.items():
        torch.manual_seed(0)
        learner = RewardLearning(build("reward_model", VECTOR), settings)
        optimizer = torch.optim.Adam(learner.model.parameters(), 1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            torch.stack(list(learner(batch._replace(labels=dataclasses.replace(labels, details=None))).values())).sum().backward()
            optimizer.step()
        with torch.no_grad():
            found[name] = learner.model(batch.scenes.observation, batch.scenes.scene, batch.plan).values
    exact = batch.labels.values[..., column] > 0.75
    aucs = {name: reward_statistics.auc(values[..., column].flatten().numpy(), exact.flatten().numpy()) for name, values in found.items()}
    assert aucs["as it is"] > 0.9  # type: ignore[operator]
    assert aucs["flipped"] < 0.1  # type: ignore[operator]
    change = (found["as it is"] - found["flipped"]).abs().mean((0, 1))
    others = [METRICS.index(name) for name in ("dac", "ddc", "tlc", "ep", "lk", "hc")]
    assert (change[others] < 0.3 * change[column]).all()


# -- features that are kept --------------------------------------------------------------------------------------------


def test_a_frozen_backbone_looks_once(config: Configure, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    backbone = type(build("backbone", SEES))
    see = backbone.see
    monkeypatch.setattr(backbone, "see", lambda self, images, *rest: looked.append(len(images)) or see(self, images, *rest))
    settings = {"reward": {**LOOKING, "frozen": True}, "cache": shards / "kept", "report": {"candidates": FEW, "blind": 2}, "steps": 2}
    one = reward(config(out="one", **settings))
    timed, shown = 4 * 3, 3 * 3  # scenes of the report: to time how quickly it sees, and with eyes open, black and shuffled images
    assert sum(looked) == 12 + 6 + timed + shown
    looked.clear()
    other = reward(config(out="other", **settings))
    assert sum(looked) == timed + shown
    same(one, other)
    report = json.loads((one / "report.json").read_text())
    assert set(report["blind"]) == {"seeing", "blanked", "shuffled"}
    assert report["blind"]["seeing"] != report["blind"]["blanked"]
    weights = load_file(one / "model" / "model.safetensors")
    begin = load_file(one / "checkpoints" / "step-2" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], begin[name]) for name in weights if name.startswith("backbone."))


def test_kept_features_are_what_is_seen(shards: Path, place: Path) -> None:
    spec = scenes_of(shards, 6, "val")
    model = build("reward_model", {**LOOKING, "frozen": True}).eval()
    batch: Any = read(build("dataset", spec), [4, 0, 2])
    with torch.no_grad():
        seen = model.see(batch.observation)
    blind = dataclasses.replace(batch.observation, images=None)
    with Run.start("reward", RunConfig(device="cpu", out=place / "run")) as run:  # type: ignore[call-arg]
        caches = [keep_features(model.backbone, [spec], folder, run) for folder in (None, place / "kept", place / "kept")]
    for cache in caches:
        assert len(cache) == 6
        assert batch.observation.token[0] in cache
        with cache.serving(model), torch.no_grad():
            kept = model.see(blind)
        assert kept.observation is blind
        assert kept.bev.dtype == torch.float32
        torch.testing.assert_close(kept.bev, seen.bev, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kept.agents, seen.agents, rtol=1e-3, atol=1e-3)
        assert torch.equal(kept.bev_range, seen.bev_range)
        with pytest.raises(InputError, match="no images"):
            model.see(blind)  # out of the block it looks itself
    assert caches[0].nbytes == caches[2].nbytes > 6 * 2 * seen.bev[0].numel()
    black = dataclasses.replace(batch.observation, images=torch.zeros_like(batch.observation.images))
    for pictured in (False, True):
        with caches[0].serving(model, pictured=pictured), torch.no_grad():
            assert torch.equal(model.see(black).bev, caches[0](black).bev) == pictured
    stranger = dataclasses.replace(batch.observation, token=("a", "b", "c"))
    with caches[0].serving(model), torch.no_grad():
        torch.testing.assert_close(model.see(stranger).bev, seen.bev)
    with pytest.raises(InputError, match="no features are kept of the scene 'a'"):
        caches[0](stranger)


def test_what_cannot_be_kept(shards: Path, place: Path) -> None:
    model, frozen = (build("reward_model", {**LOOKING, "frozen": value}) for value in (False, True))
    with Run.start("reward", RunConfig(device="cpu", out=place / "run")) as run:  # type: ignore[call-arg]
        with pytest.raises(InputError, match="learns: what it sees changes"):
            keep_features(model.backbone, [], None, run)
        with pytest.raises(InputError, match="none of these models has the frozen backbone"), FeatureCache("other", []).serving(frozen):
            pass
    assert digest_of(frozen.backbone) != digest_of(model.backbone)
    assert backbones_of(frozen) == [frozen.backbone]


# -- statistics against slow and obvious ones --------------------------------------------------------------------------


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_auc_is_that_of_all_pairs(random: np.random.Generator) -> None:
    predicted, kept = random.integers(0, 6, 60) / 5.0, random.random(60) < 0.3
    pairs = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good in predicted[kept] for bad in predicted[~kept]]
    assert reward_statistics.auc(predicted, kept) == pytest.approx(sum(pairs) / len(pairs))
    assert reward_statistics.auc(predicted, np.ones(60, dtype=bool)) is None


def test_spearman_is_scipys(random: np.random.Generator) -> None:
    from scipy.stats import spearmanr

    one, other = random.integers(0, 5, (7, 9)) / 4.0, random.random((7, 9))
    expected = np.mean([spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)])
    assert reward_statistics.spearman(one, other) == pytest.approx(expected)
    one[0] = 1.0  # nothing to rank there
    expected = np.mean([spearmanr(a, b).statistic for a, b in zip(one[1:], other[1:], strict=True)])
    assert reward_statistics.spearman(one, other) == pytest.approx(expected)
    assert reward_statistics.spearman(np.ones((2, 3)), other[:2, :3]) is None


def test_best_of_by_hand() -> None:
    predicted = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.1]])
    exact = np.array([[1.0, 0.5, 0.0], [0.6, 0.3, 0.3]])
    found = reward_statistics.best_of(predicted, exact)
    assert found == pytest.approx({"chance": 0.45, "chosen": 0.55, "best": 0.8, "regret": 0.25, "gain": 0.1 / 0.35})
    assert reward_statistics.best_of(predicted, np.ones((2, 3)))["gain"] is None


def test_calibration_error_by_hand() -> None:
    predicted, exact = np.array([0.05, 0.05, 0.95, 0.95]), np.array([0.0, 1.0, 1.0, 1.0])
    assert reward_statistics.calibration_error(predicted, exact) == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert reward_statistics.reliability(predicted, exact).tolist() == [[2.0, pytest.approx(0.05), 0.5], [2.0, pytest.approx(0.95), 1.0]]
    assert reward_statistics.calibration_error(np.array([1.0]), np.array([1.0])) == 0.0
    assert reward_statistics.brier(predicted, exact) == pytest.approx((2 * 0.05**2 + 0.05**2 + 0.95**2) / 4)


def test_confusion_and_r2_by_hand() -> None:
    predicted, exact = np.array([0.1, 0.6, 0.9, 0.4]), np.array([0.0, 0.5, 0.5, 1.0])
    assert reward_statistics.confusion(predicted, exact, (0.0, 0.5, 1.0)) == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert reward_statistics.r2(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 1.0
    assert reward_statistics.r2(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == 0.0
    assert reward_statistics.r2(np.array([0.5, 0.5]), np.array([1.0, 1.0])) is None
    assert reward_statistics.human_above(np.array([[0.5, 0.2, 0.5, 0.9]])) == pytest.approx(1.5 / 3)


def test_the_exact_reward_is_perfect(config: Configure) -> None:
    batches = [batches_of(config())(number) for number in range(3)]
    found = reward_report.predict(build("reward_model", "exact"), batches, FakeRun()).comparison  # type: ignore[arg-type]
    summary = found.summary()
    assert summary["spearman"] == pytest.approx(1.0)
    assert summary["best_of"]["regret"] == pytest.approx(0.0, abs=1e-6)
    for name, of in summary["metrics"].items():
        assert (of["r2"] if name == "ep" else of["auc"] or 1.0) == pytest.approx(1.0)
        assert of["ece"] < 1e-6
    assert "ec" not in summary["metrics"]
    values = reward_report.values_of(found)
    assert values["auc_dac"] == 1.0
    assert values["r2_ep"] == pytest.approx(1.0)


class FakeRun(NoRun):
    """Stands in for a run on the CPU."""

    device = torch.device("cpu")

    def autocast(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures(tmp_path: Path, random: np.random.Generator) -> None:
    from PIL import Image

    from irlvla import plots

    predicted, exact = random.random((4, 30)), random.random((4, 30))
    drawn = [
        plots.draw_reliability({name: (predicted.ravel(), exact.ravel()) for name in METRICS}, tmp_path / "reliability.png"),
        plots.draw_scores(predicted, exact, tmp_path / "scores.png"),
        plots.draw_hacking({"one": ([0, 5], [0.5, 0.9], [0.5, 0.4])}, tmp_path / "hacking.png"),
    ]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.size[0] > 600
            assert len(picture.convert("RGB").getcolors(10**6)) > 10


# -- the probe ---------------------------------------------------------------------------------------------------------


def test_candidates_climb_what_they_believe(shards: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "draw_hacking", lambda courses, out: out.touch())
    torch.manual_seed(0)
    save_pretrained(build("reward_model", {"name": "ensemble", "members": [VECTOR, {**VECTOR, "meetings": 0}]}), place / "reward")
    recipe = {"data": scenes_of(shards, 6, "val"), "scenes": 4, "steps": 12, "every": 5, "lr": 0.1, "device": "cpu", "out": "here"}
    directory = probe(configuration.read(ProbeConfig, {**recipe, "saved_reward": str(place / "reward")}))
    courses = json.loads((directory / "probe.json").read_text())
    assert set(courses) == {"one", "mean", "pessimistic"}
    for course in courses.values():
        assert course["steps"] == [0, 5, 10, 12]
        assert course["believed"][-1] > course["believed"][0]
        assert len(course["exact"]) == len(course["unlike"]) == 4
    assert len({course["exact"][0] for course in courses.values()}) == 1  # all begin alike
    assert "| pessimistic | 12 |" in (directory / "report.md").read_text()
    assert (directory / "hacking.png").exists()
    with pytest.raises(ConfigError, match="gives no gradient with respect to plans"):
        probe(configuration.read(ProbeConfig, {**recipe, "reward": "exact", "out": "exact"}))
    with pytest.raises(ConfigError, match="give exactly one of reward and saved_reward"):
        probe(configuration.read(ProbeConfig, recipe))


def test_drives_begin_straight_and_head_where_they_go() -> None:
    drives = probing.Drives(torch.tensor([0.0, 8.0]), 3)
    plan = drives()
    assert plan.poses.shape == (2, 3, 8, 3)
    torch.testing.assert_close(plan.poses[1, 0, :, 0], 8.0 * 0.5 * torch.arange(1.0, 9.0))
    assert plan.poses[..., 1:].abs().max() == 0.0
    with torch.no_grad():
        drives.controls.copy_(torch.randn(2, 3, 8, 2, generator=torch.Generator().manual_seed(0)))
    poses = nn.functional.pad(drives().poses, (0, 0, 1, 0))
    step, middle = poses[..., :2].diff(dim=2), (poses[..., 1:, 2] + poses[..., :-1, 2]) / 2.0
    aside = step[..., 1] * middle.cos() - step[..., 0] * middle.sin()
    ahead = step[..., 0] * middle.cos() + step[..., 1] * middle.sin()
    assert aside.abs().max() < 1e-4
    assert ahead.min() > -1e-6


# -- recipes and commands ----------------------------------------------------------------------------------------------


def irlvla_command(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, arguments, prog_name="irlvla")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid(recipe: str) -> None:
    config = configuration.read(RewardConfig, ROOT / "recipes" / f"{recipe}.yaml", (), "reward")
    assert config.data.validation is not None


def test_the_demo_runs(place: Path) -> None:
    tiny = ["images=[32,64]", "scenes.train.count=12", "scenes.validation.count=4", "data.unseen=null", "steps=1", "batch=2", "workers=0"]
    tiny += [
        "reward.policy=null",
        f"reward.backbone={json.dumps(SEES)}",
        "policy=null",
        "vocabulary=12",
        "device=cpu",
        "out=here",
        "report.blind=2",
    ]
    printed = irlvla_command("reward", str(ROOT / "recipes" / "demo.yaml"), *tiny)
    assert "spearman" in printed
    assert "here/model" in printed
