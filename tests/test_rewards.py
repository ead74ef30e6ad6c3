"""Rewards that are learned, or made of others; and the candidates that they are learned from."""

from __future__ import annotations

import dataclasses
import json
import math
import operator

import pytest
import torch
from torch import Tensor

import irlvla
from irlvla.candidates import CandidateConfig, Candidates, Source, balanced, hardness, make_candidates, vocabulary_of
from irlvla.errors import ConfigError, InputError
from irlvla.synthetic import synthetic_scenes
from irlvla.testing import example_observation, example_plan, example_scene, reward_model_checks
from irlvla.types import METRICS, Command, Epdms, Observation, Plan, Scene, StateIndex, Trajectory
from irlvla.zoo.rewards.driving import comfortable, planned, simulated
from irlvla.zoo.rewards.heads import ProgressHead, likelihood, outcome

VECTOR = {"backbone": {"name": "vector", "width": 32, "layers": 1}, "tokens": ["agents", "map", "status"], "width": 32, "layers": 1}
SEES = {  # as small as the light one can be
    "name": "bev",
    "width": 16,
    "encoder": {"model": "regnetx_002", "strides": [16], "channels": 16},
    "lift": {"x": [-8, 56, 4], "y": [-32, 32, 4], "depth": [1, 61, 6], "channels": 8, "widths": [8], "blocks": 1, "joined": 8},
    "detection": {"queries": 4, "layers": 1, "heads": 2},
    "map": {"queries": 4, "layers": 1, "heads": 2},
    "segmentation": None,
}
SMALL = {"backbone": SEES, "width": 16, "layers": 1, "bev_tokens": 2}
LEARNED = [name for name in METRICS if name not in ("ep", "hc", "ec")]


def world_model(seed: int = 0, **settings):
    """One in eval mode; the same every time."""
    torch.manual_seed(seed)
    return irlvla.build("reward_model", {"name": "world_model", **VECTOR, **settings}).eval()


def observations(scene: Scene) -> Observation:
    """What a car without cameras knows of scenes, and the scenes."""
    ego = torch.cat([scene.in_ego_frame(scene.history[..., :3]), scene.history[..., 3:]], -1).float()
    return Observation(scene.token, ego, torch.full((len(scene),), Command.UNKNOWN), scene=scene)


def humans(scene: Scene) -> Trajectory:
    return Trajectory(scene.human.float(), scene.human_dt)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes() -> Scene:
    return synthetic_scenes(48)


@pytest.fixture(scope="module")
def vocabulary(scenes) -> Tensor:
    return vocabulary_of(scenes.human, 24)


def candidates_of(scenes: Scene, drives: Tensor | None, seed: int = 0, **settings) -> Candidates:
    return make_candidates(humans(scenes), scenes.ego[:, 3], CandidateConfig(**settings), generator(seed), vocabulary=drives)


# -- the contract ------------------------------------------------------------------------------------------------------

test_world_model = reward_model_checks("world_model", **SMALL)
test_world_model_of_tokens = reward_model_checks("world_model", **VECTOR, kinematic="learned", dynamics="plan", moments=8)
test_frozen_world_model = reward_model_checks("world_model", **VECTOR, frozen=True, meetings=0)
test_ensemble = reward_model_checks("ensemble", members=[{"name": "world_model", **VECTOR}] * 2)
test_ensemble_of_exact = reward_model_checks("ensemble", members=["exact", {"name": "exact", "traffic": "constant_velocity"}])
test_mix = reward_model_checks("mix", learned={"name": "world_model", **VECTOR}, share=0.0, exact={"name": "world_model", **VECTOR})
test_mix_of_exact = reward_model_checks("mix", learned={"name": "exact", "traffic": "constant_velocity"}, shares={"nc": 1.0})


# -- candidates --------------------------------------------------------------------------------------------------------


def test_candidates_are_of_every_source_and_begin_with_the_human(scenes, vocabulary):
    policy = torch.zeros(len(scenes), 2, 8, 3)
    made = make_candidates(humans(scenes), scenes.ego[:, 3], CandidateConfig(), generator(), vocabulary=vocabulary, policy=policy)
    config, (sources, counts) = CandidateConfig(), made.source[0].unique_consecutive(return_counts=True)
    assert sources.tolist() == sorted(Source)
    assert counts.tolist() == [1, *(getattr(config, kind.name.lower()) for kind in Source if 0 < kind < Source.POLICY), 2]
    assert (made.source == made.source[0]).all()
    assert torch.equal(made.plan.poses[:, 0], scenes.human.float())
    assert torch.equal(made.plan.poses[:, -2:], policy)
    assert made.plan.poses.isfinite().all()
    assert made.plan.dt == scenes.human_dt


def test_candidates_depend_on_the_generator_alone(scenes, vocabulary):
    one, same, other = (candidates_of(scenes, vocabulary, seed) for seed in (0, 0, 1))
    assert torch.equal(one.plan.poses, same.plan.poses)
    assert not torch.equal(one.plan.poses[:, 1:], other.plan.poses[:, 1:])
    for first, second in zip(one.plan.poses.unbind(0), one.plan.poses.roll(1, 0).unbind(0), strict=True):
        assert not torch.equal(first, second)


def test_sources_can_be_left_out(scenes):
    none = dict.fromkeys((kind.name.lower() for kind in Source if 0 < kind < Source.POLICY), 0)
    assert candidates_of(scenes, None, **none).plan.poses.shape == (48, 1, 8, 3)
    assert candidates_of(scenes, None, **none | {"stop": 2}).source.tolist() == [[Source.HUMAN, Source.STOP, Source.STOP]] * 48


def test_changes_are_smooth_and_head_where_they_go(scenes, vocabulary):
    """Nothing rolls back or jumps aside, not even what stands, and hardly anything is beyond what a car can do."""
    made = candidates_of(scenes, vocabulary)
    changed = made.source >= Source.LATERAL
    poses = torch.nn.functional.pad(made.plan.poses[changed], (0, 0, 1, 0))
    step = poses[..., :2].diff(dim=-2)
    middle = (poses[:, 1:, 2] + poses[:, :-1, 2]) / 2.0
    ahead = step[..., 0] * middle.cos() + step[..., 1] * middle.sin()
    aside = step[..., 1] * middle.cos() - step[..., 0] * middle.sin()
    assert (ahead > -0.01).all()
    assert (aside.abs() < 0.3 * ahead + 0.1).all()
    acceleration = step.diff(dim=-2).norm(dim=-1) / 0.25
    assert acceleration.max() < 14.0
    assert acceleration.quantile(0.99) < 8.0


def test_changes_are_what_they_are_called(scenes, vocabulary):
    made = candidates_of(scenes, vocabulary)
    human = made.plan.poses[:, :1]
    moving = scenes.human[:, -1, 0] > 15.0

    def of(kind: Source) -> Tensor:
        return made.plan.poses[moving][:, made.source[0] == kind]

    def length(poses: Tensor) -> Tensor:
        return torch.nn.functional.pad(poses[..., :2], (0, 0, 1, 0)).diff(dim=-2).norm(dim=-1).sum(-1)

    gap = (of(Source.LATERAL)[..., :2] - human[moving][..., :2]).norm(dim=-1)
    assert gap[..., -1].max() > 1.5
    assert (gap[..., 0] < 1.0).all()
    ratio = length(of(Source.SPEED)) / length(human[moving])
    assert ratio.min() < 0.75
    assert ratio.max() > 1.25
    assert (length(of(Source.STOP)) <= length(human[moving]) + 0.1).all()
    last = of(Source.STOP)[..., -2:, :2].diff(dim=-2).norm(dim=-1)
    assert (last == 0.0).any()
    there, back = ((of(Source.SWERVE)[..., t, :2] - human[moving][..., t, :2]).norm(dim=-1) for t in (slice(None), -1))
    assert (there.amax(-1) > back + 0.1).any()
    turned = (of(Source.HEADING)[..., -1, 2] - human[moving][..., -1, 2]).abs()
    assert 0.1 < turned.max() < 0.5


def test_steady_candidates_without_changes_are_straight():
    scene = example_scene(2)
    config = CandidateConfig(constant_velocity=3, offset=0.0, pace=1.0, acceleration=0.0, turn=0.0, vocabulary=0, braking=(0.0, 0.0))
    made = make_candidates(humans(scene), scene.ego[:, 3], config, generator())
    steady = made.plan.poses[:, made.source[0] == Source.CONSTANT_VELOCITY]
    expected = scene.ego[:, 3].float()[:, None] * torch.arange(1, 9) * 0.5
    torch.testing.assert_close(steady[..., 0], expected[:, None].expand(-1, 3, -1))
    assert steady[..., 1:].abs().max() < 1e-4


def test_the_vocabulary_holds_human_drives(scenes):
    chosen = vocabulary_of(scenes.human, 10)
    assert chosen.shape == (10, 8, 3)
    for drive in chosen:
        assert (scenes.human == drive).all((1, 2)).any()
    unknown = torch.full((1, 8, 3), math.nan)
    assert torch.equal(vocabulary_of(torch.cat([scenes.human, unknown]), 10), chosen)
    assert len(vocabulary_of(scenes.human[:3].repeat(2, 1, 1), 10)) <= 3


def test_the_vocabulary_is_near_and_far(scenes, vocabulary):
    made = candidates_of(scenes, vocabulary)
    chosen = made.plan.poses[:, made.source[0] == Source.VOCABULARY]
    gap = (chosen - made.plan.poses[:, :1])[..., :2].norm(dim=-1).mean(-1)
    assert gap[:, :3].mean() < 0.5 * gap[:, 3:].mean()
    assert (chosen.flatten(2)[:, :, None] == chosen.flatten(2)[:, None]).all(-1).sum((1, 2)).tolist() == [6] * 48  # none twice


def test_candidates_refuse(scenes, vocabulary):
    with pytest.raises(InputError, match=r"vocabulary=6 needs at least as many drives of shape \(8, 3\) to choose from, got None"):
        candidates_of(scenes, None)
    with pytest.raises(InputError, match=r"got \(4, 8, 3\)"):
        candidates_of(scenes, vocabulary[:4])
    unknown = dataclasses.replace(scenes, human=scenes.human.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(InputError, match="scenes 3 have no human drive"):
        candidates_of(unknown, vocabulary)


def test_balanced_keeps_a_failure_of_every_metric():
    values = torch.ones(4, 64, 9)
    for column in range(8):
        values[:, 10 + column, column] = 0.0
    values[..., 8] = math.nan
    values[1] = 1.0  # nothing fails
    rows = balanced(values, 12, generator())
    assert rows.shape == (4, 12)
    assert (rows[:, 0] == 0).all()
    assert all(len(set(row)) == 12 for row in rows.tolist())
    for scene in (0, 2, 3):
        assert set(range(10, 18)) <= set(rows[scene].tolist())
    with pytest.raises(InputError, match="keep=9 must be more than the 9 metrics and at most the 64 candidates"):
        balanced(values, 9, generator())


def test_balanced_prefers_what_is_rare():
    values = torch.ones(200, 64, 9)
    values[:, 1:8, 1] = 0.0
    picked = values.take_along_dim(balanced(values, 20, generator())[..., None], 1)
    failing = (picked[..., 1] == 0.0).float().mean()
    assert 0.25 < failing < 0.45  # of 7 in 64


def test_hardness_is_how_much_scores_differ():
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.9, 0.8, 0.9, 0.8]])
    assert hardness(score).argsort().tolist() == [0, 2, 1]
    torch.testing.assert_close(hardness(score)[1], torch.tensor(0.25))


def test_chosen_candidates_keep_their_source(scenes, vocabulary):
    made = candidates_of(scenes, vocabulary)
    rows = torch.tensor([[0, 9, 30]]).expand(48, -1)
    chosen = made.chosen(rows)
    assert torch.equal(chosen.plan.poses, made.plan.poses[:, [0, 9, 30]])
    assert torch.equal(chosen.source, made.source[:, [0, 9, 30]])


# -- driving -----------------------------------------------------------------------------------------------------------


def test_drives_are_those_of_the_score(scenes, vocabulary):
    """The observation says all that the tracker needs; HC is nearly always that of the score, whose history is exact."""
    made, obs = candidates_of(scenes, vocabulary), observations(scenes)
    states = simulated(obs, made.plan)
    exact = irlvla.epdms(scenes, made.plan, human_filter="none", details=True)
    there = scenes.in_ego_frame(exact.details.states[..., :3].flatten(1, 2)).view_as(states[..., :3])
    assert (states[..., :2] - there[..., :2]).abs().max() < 1e-5
    assert (comfortable(obs, states) == (exact.hc > 0.0)).float().mean() > 0.99


def test_plans_are_looked_at_between_their_poses():
    plan = Plan(torch.tensor([[[2.0, 0.0, 3.1], [4.0, 2.0, -3.1]]])[:, None], 2.0)
    found = planned(plan, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))[0, 0]
    torch.testing.assert_close(found[:, :2], torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 1.0], [4.0, 2.0]]))
    assert abs(abs(found[3, 2].item()) - math.pi) < 0.02


# -- heads -------------------------------------------------------------------------------------------------------------


def test_outcomes_are_distributions_and_moments_theirs():
    moments = torch.randn(5, 7, 3, generator=generator()).log_softmax(-1)
    torch.testing.assert_close(outcome(moments).exp().sum(-1), torch.ones(5))
    never = torch.full((5,), -1)
    kinds = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(likelihood(moments, kinds, never), outcome(moments).gather(-1, kinds[:, None])[:, 0])
    when = torch.stack([likelihood(moments, kinds, torch.full((5,), t)) for t in range(7)], -1)
    failed = kinds < 2
    torch.testing.assert_close(when.logsumexp(-1)[failed], likelihood(moments, kinds)[failed])  # it happens at some moment


def test_one_bad_moment_fails_a_drive():
    moments = torch.tensor([[0.0, 8.0]]).repeat(10, 1)
    good = outcome(moments.log_softmax(-1))[1]
    moments[4] = torch.tensor([8.0, 0.0])
    assert outcome(moments.log_softmax(-1))[1] < good - 5.0


def test_progress_is_that_of_the_reference():
    torch.manual_seed(0)
    head = ProgressHead(8)
    whole = torch.randn(4, 3, 16)
    reference = head.place(torch.tensor([0.0, 5.0, 40.0, 1000.0]))
    torch.testing.assert_close(reference.sum(-1), torch.ones(4))
    assert reference[:2, 0].tolist() == [1.0, 1.0]
    assert reference[3, -1] == 1.0
    found = torch.stack([head(whole, torch.full((4, 3), length), reference.log()) for length in (0.0, 20.0, 40.0, 200.0)])
    torch.testing.assert_close(found[:, :2], torch.ones(4, 2, 3))  # the reference makes next to nothing
    torch.testing.assert_close(found[:, 2, 0], torch.tensor([0.0, 0.5, 1.0, 1.0]), rtol=0.05, atol=0.0)
    torch.testing.assert_close(found[3, 3], torch.ones(3))


# -- judging -----------------------------------------------------------------------------------------------------------


def judged(model, k: int = 4, batch: int = 3):
    obs, scene, plan = example_observation(batch), example_scene(batch), example_plan(batch, k)
    return model(obs, scene, plan), (obs, scene, plan)


def test_values_are_expectations():
    model = world_model()
    with torch.no_grad():
        found, _ = judged(model)
    for name, logits in found.logits.items():
        likely, worth = logits.exp(), torch.linspace(0.0, 1.0, logits.shape[-1])
        torch.testing.assert_close(found.values[..., METRICS.index(name)], (likely * worth).sum(-1))
    assert {name: logits.shape[-1] for name, logits in found.logits.items()} == dict.fromkeys(LEARNED, 2) | {"nc": 3, "ddc": 3}
    assert list(found.horizons()) == LEARNED
    for name, kept in found.horizons().items():
        assert kept.shape == (3, 4, 10)
        assert (kept.diff(dim=2) <= 0.0).all()
        assert (found.logits[name][..., -1].exp() <= kept[..., -1]).all()


def test_a_sure_failure_scores_low():
    """The probability of the most likely class, which others take for the value, would be 1."""
    model = world_model()
    with torch.no_grad():
        for head in model.events.values():
            head.prior.copy_(torch.tensor([20.0] + [0.0] * (len(head.prior) - 1)))
        found, _ = judged(model)
    assert (found.nc < 0.01).all()
    assert (found.score() < 0.01).all()


def test_kinematics_are_computed_or_learned():
    found, (obs, scene, plan) = judged(world_model())
    assert torch.equal(found.hc, irlvla.epdms(scene, plan, human_filter="none").hc.float())
    assert found.ec.isnan().all()
    assert {"hc", "ec"}.isdisjoint(found.logits)
    model = world_model(kinematic="learned").train()
    found = model(obs, scene, plan)
    assert found.ec.isnan().all()
    assert set(found.logits) == {*LEARNED, "hc", "ec"}
    measured = irlvla.epdms(scene, plan, previous=humans(scene))
    model.loss(found, measured)
    assert not model(obs, scene, plan).ec.isnan().any()  # now it knows what it is


def test_sensors_are_read_once_and_each_plan_by_itself():
    model = world_model()
    obs, plan = example_observation(2), example_plan(2, 6)
    with torch.no_grad():
        features = model.see(obs)
        together = model.judge(features, plan).values
        for rows in ([3], [0, 5], [5, 4, 3, 2, 1, 0]):
            alone = model.judge(features, Plan(plan.poses[:, rows])).values
            torch.testing.assert_close(alone, together[:, rows], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_plans_may_have_any_poses():
    model = world_model()
    plan = example_plan(2, 3)
    fine = Plan(planned(plan, torch.arange(1, 41) * 0.1), 0.1)
    with torch.no_grad():
        features = model.see(example_observation(2))
        found = model.judge(features, fine).values - model.judge(features, plan).values
    assert found[..., :8].abs().max() < 0.02


@pytest.mark.parametrize("dynamics", ["simulated", "plan"])
def test_values_have_a_gradient_with_respect_to_poses(dynamics):
    model = world_model(dynamics=dynamics)
    plan = example_plan(2, 3)
    poses = plan.poses.clone().requires_grad_()
    obs = example_observation(2)
    model(obs, obs.scene, Plan(poses)).score().sum().backward()
    assert poses.grad.isfinite().all()
    assert (poses.grad[..., :2].abs().amax(-1) > 0.0).all()
    with torch.no_grad():
        step = poses + 0.02 * poses.grad / poses.grad.norm(dim=(-1, -2), keepdim=True)
        better = model(obs, obs.scene, Plan(step)).score() - model(obs, obs.scene, plan).score()
    assert (better > 0.0).float().mean() > 0.5


def test_the_scene_teaches_perception_in_training_only():
    torch.manual_seed(0)
    model = irlvla.build("reward_model", {"name": "world_model", **SMALL})
    found, (obs, scene, plan) = judged(model.train(), batch=2)
    losses = model.loss(found, irlvla.epdms(scene, plan))
    assert {name for name in losses if name.startswith("perception/")} == {
        f"perception/{name}" for name in model.backbone.loss(model.backbone(obs), scene)
    }
    assert not model.eval()(obs, scene, plan).perception
    assert len(found[:1].perception["agent_boxes"]) == 1


# -- learning ----------------------------------------------------------------------------------------------------------


def test_labels_that_were_not_measured_do_not_count():
    model = world_model(kinematic="learned").train()
    found, (_, scene, plan) = judged(model)
    measured = irlvla.epdms(scene, plan)
    whole = model.loss(found, measured)
    assert whole["ec"] == 0.0
    values = measured.values.clone()
    values[0, 1:, METRICS.index("dac")] = math.nan
    values[1, :, METRICS.index("ep")] = math.nan
    part = model.loss(found, dataclasses.replace(measured, values=values))
    assert all(value.isfinite() for value in part.values())
    changed = {name for name in whole if not torch.equal(whole[name], part[name])}
    assert changed == {"dac", "ep"}
    first = -found.logits["dac"][0, 0, values[0, 0, METRICS.index("dac")].long()]
    rest = model.loss(found[1:], measured[1:])["dac"]
    torch.testing.assert_close(part["dac"], first / 3.0 + rest * 2.0 / 3.0)


def test_losses_are_means_over_scenes():
    model = world_model().train()
    found, (_, scene, plan) = judged(model)
    measured = irlvla.epdms(scene, plan, details=True)
    measured.values[0, 2:, 0] = math.nan
    whole, parts = model.loss(found, measured), [model.loss(found[[i]], measured[[i]]) for i in range(3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts) / 3.0)


def test_labels_of_one_metric_teach_its_head_alone(scenes, vocabulary):
    """With the rest frozen, flipping the labels of DAC changes DAC and nothing else, bit for bit."""
    made, obs = candidates_of(scenes[:8], vocabulary), observations(scenes[:8])
    measured = irlvla.epdms(scenes[:8], made.plan)
    flipped = dataclasses.replace(measured, values=measured.values.clone())
    flipped.values[..., METRICS.index("dac")] = 1.0 - flipped.dac

    def trained(labels: Epdms) -> Epdms:
        model = world_model().train()
        for part in (model.backbone, model.network):
            part.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            sum(model.loss(model(obs, scenes[:8], made.plan), labels).values()).backward()
            optimizer.step()
        with torch.no_grad():
            return model.eval()(obs, scenes[:8], made.plan)

    right, wrong = trained(measured), trained(flipped)
    for name in METRICS:
        same = torch.equal(getattr(right, name).nan_to_num(), getattr(wrong, name).nan_to_num())
        assert same == (name != "dac"), name
    assert (wrong.dac < right.dac)[measured.dac == 1.0].float().mean() > 0.9


def test_labels_with_details_teach_when():
    model = world_model().train()
    found, (_, scene, plan) = judged(model)
    measured = irlvla.epdms(scene, plan, details=True)
    measured.values[..., METRICS.index("nc")] = 0.0
    measured.details.collision_step[:] = 21  # of the 4 s the second half has begun: moment 5 of 10
    loss = model.loss(found, measured)["nc"]
    moments = found.moments["nc"]
    expected = -(moments[..., :5, -1].sum(-1) + moments[..., 5, 0])
    torch.testing.assert_close(loss, expected.mean())
    assert "reference" not in model.loss(found, dataclasses.replace(measured, details=None))


def test_losses_are_of_what_was_judged():
    model = world_model()
    found, (_, scene, plan) = judged(model)
    measured = irlvla.epdms(scene, plan)
    with pytest.raises(InputError, match="takes what forward\\(\\) returned, got Epdms"):
        model.loss(Epdms(found.values), measured)


# -- calibration and support -------------------------------------------------------------------------------------------


def test_calibration_makes_the_sure_less_sure_and_keeps_their_order():
    """A model that is four times as sure as it should be, of failures three times as frequent as they are."""
    model = world_model()
    truth = 2.0 * torch.randn(1, 4000, generator=generator())
    values = torch.ones(1, 4000, 9)
    values[..., METRICS.index("dac")] = (torch.rand(1, 4000, generator=generator(1)) < truth.sigmoid()).float()
    values[..., METRICS.index("lk")] = math.nan
    claimed = 4.0 * truth - math.log(3.0)
    with torch.no_grad():
        found, _ = judged(model)
    logits = found.logits | {"dac": torch.stack([-claimed, claimed], -1).log_softmax(-1), "lk": torch.zeros(1, 4000, 2)}
    logits = {name: value if name in ("dac", "lk") else value[:1, :1].expand(-1, 4000, -1) for name, value in logits.items()}
    before = model.temperatures["dac"](logits["dac"])
    report = model.calibrate([dataclasses.replace(found, values=values, logits=logits)], [Epdms(values)])
    assert set(report) == set(LEARNED) - {"lk"}
    assert report["dac"][1] < report["dac"][0] - 0.5
    after = model.temperatures["dac"](logits["dac"])
    torch.testing.assert_close(after[..., 1].exp(), truth.sigmoid(), rtol=0.1, atol=0.02)
    margins = [(log[0, :, 1] - log[0, :, 0]) for log in (before, after)]
    assert torch.equal(margins[0].argsort(), margins[1].argsort())
    assert model.temperatures["lk"].sharpness == 1.0
    assert (model.temperatures["nc"](logits["nc"]).exp()[..., -1] > 0.99).all()  # of what never fails it is surer now
    again = model.calibrate([dataclasses.replace(found, values=values, logits=logits)], [Epdms(values)])
    assert again["dac"] == report["dac"]


def test_judgements_of_many_batches_are_calibrated_together(scenes, vocabulary):
    model, obs, made = world_model(), observations(scenes), candidates_of(scenes, vocabulary)
    with torch.no_grad():
        parts = [model(obs[rows], scenes[rows], made.plan[rows]) for rows in (slice(0, 20), slice(20, 48))]
    exact = irlvla.epdms(scenes, made.plan)
    report = model.calibrate(parts, [exact[:20], exact[20:]])
    assert set(report) == set(LEARNED)
    for name, (before, after) in report.items():
        assert after <= before, name


def test_calibration_changes_values_not_logits():
    model = world_model()
    before, (obs, scene, plan) = judged(model)
    model.temperatures["nc"].sharpness.fill_(0.5)
    model.temperatures["nc"].offset.copy_(torch.tensor([1.0, 0.0, -1.0]))
    after = model(obs, scene, plan)
    assert torch.equal(after.logits["nc"], before.logits["nc"])
    assert (after.nc < before.nc).all()
    assert torch.equal(after.dac, before.dac)


def test_plans_unlike_those_of_the_training_are_told(scenes, vocabulary):
    model, obs, made = world_model(), observations(scenes), candidates_of(scenes, vocabulary)
    assert not model.unsupported(obs, made.plan).any()
    model.fit_support(made.plan, obs.ego[:, -1, 3], 0.99)
    assert 0.005 < model.unsupported(obs, made.plan).float().mean() < 0.015
    other = candidates_of(scenes, vocabulary, seed=1)
    assert model.unsupported(obs, other.plan).float().mean() < 0.05
    zigzag = made.plan.poses + torch.tensor([0.0, 3.0, 0.0]) * torch.tensor([1.0, -1.0] * 4)[:, None]
    sideways = made.plan.poses.roll(1, -1) * torch.tensor([0.0, 1.0, 1.0])
    for strange in (zigzag, 4.0 * made.plan.poses + 40.0, sideways + torch.tensor([0.0, 30.0, 0.0])):
        assert model.unsupported(obs, Plan(strange)).float().mean() > 0.9
    with pytest.raises(InputError, match="learned from more than 17 plans, got 4"):
        model.fit_support(Plan(made.plan.poses[:1, :4]), obs.ego[:1, -1, 3], 0.99)


# -- made of others ----------------------------------------------------------------------------------------------------


def built(name: str, seed: int = 0, **settings):
    torch.manual_seed(seed)
    return irlvla.build("reward_model", {"name": name, **settings}).eval()


def test_an_ensemble_of_equals_is_each_of_them():
    ensemble = built("ensemble", members=[{"name": "world_model", **VECTOR}] * 3, beta=2.0)
    for member in ensemble.members[1:]:
        member.load_state_dict(ensemble.members[0].state_dict())
    found, (obs, scene, plan) = judged(ensemble)
    torch.testing.assert_close(found.values, ensemble.members[0](obs, scene, plan).values, equal_nan=True)
    assert found.disagreement.max() < 1e-6
    assert found.spread[..., :8].max() < 1e-6
    poses = plan.poses.clone().requires_grad_()
    ensemble(obs, scene, Plan(poses)).score().sum().backward()
    assert poses.grad.isfinite().all()


def test_an_ensemble_is_pessimistic_where_it_disagrees():
    members = [{"name": "world_model", **VECTOR}] * 3
    bold, careful = (built("ensemble", members=members, beta=beta) for beta in (0.0, 1.5))
    (free, (obs, scene, plan)), (found, _) = judged(bold), judged(careful)
    single = torch.stack([member(obs, scene, plan).values for member in bold.members])
    torch.testing.assert_close(free.values, single.mean(0), equal_nan=True)
    spread = single.std(0, correction=0)
    torch.testing.assert_close(found.values, (single.mean(0) - 1.5 * spread).clamp(0.0, 1.0), equal_nan=True)
    torch.testing.assert_close(found.spread, spread, equal_nan=True)
    assert torch.equal(free.mean.nan_to_num(), found.mean.nan_to_num())
    scores = torch.stack([Epdms(values).score() for values in single])
    torch.testing.assert_close(found.disagreement, scores.std(0, correction=0))
    assert (found.score() < free.score()).all()


def test_an_ensemble_is_pessimistic_outside_of_its_support(scenes, vocabulary):
    made, obs = candidates_of(scenes, vocabulary), observations(scenes)
    ensemble = built("ensemble", members=[{"name": "world_model", **VECTOR}] * 2 + ["exact"], unsupported_penalty=0.6)
    before = ensemble(obs, scenes, made.plan)
    assert not before.unsupported.any()
    ensemble.members[0].support.fit(made.plan, obs.ego[:, -1, 3], 0.9)
    after = ensemble(obs, scenes, made.plan)
    outside = after.unsupported > 0.0
    assert after.unsupported.unique().tolist() == pytest.approx([0.0, 1 / 3])
    torch.testing.assert_close(after.values[~outside], before.values[~outside], equal_nan=True)
    torch.testing.assert_close(after.values[outside], (before.values[outside] - 0.2).clamp(min=0.0), equal_nan=True)


def test_an_ensemble_learns_as_its_members_do():
    ensemble = built("ensemble", members=[{"name": "world_model", **VECTOR}] * 2).train()
    found, (obs, scene, plan) = judged(ensemble)
    measured = irlvla.epdms(scene, plan)
    single = [member.loss(member(obs, scene, plan), measured) for member in ensemble.members]
    for name, value in ensemble.loss(found, measured).items():
        torch.testing.assert_close(value, (single[0][name] + single[1][name]) / 2.0)
    with pytest.raises(InputError, match="takes what forward\\(\\) returned, got Epdms"):
        ensemble.loss(measured, measured)


def test_members_with_the_same_frozen_eyes_look_once(tmp_path, monkeypatch):
    policy = irlvla.registry.installed().build_policy(VECTOR["backbone"], "constant_velocity")
    irlvla.save_pretrained(policy, tmp_path / "policy")
    member = {"name": "world_model", **VECTOR, "policy": str(tmp_path / "policy")}
    ensemble = built("ensemble", members=[member, {**member, "layers": 2}])
    obs, scene, plan = example_observation(2), example_scene(2), example_plan(2, 3)
    obs = dataclasses.replace(obs, scene=scene)
    looked, see = [], type(ensemble.members[0]).see
    monkeypatch.setattr(type(ensemble.members[0]), "see", lambda self, obs: looked.append(self) or see(self, obs))
    irlvla.save_pretrained(ensemble, tmp_path / "ensemble")
    for judge in (ensemble, irlvla.from_pretrained(tmp_path / "ensemble")):
        looked.clear()
        found = judge(obs, scene, plan)
        assert len(looked) == 1
        for one, other in zip(found.members, judge.members, strict=True):
            torch.testing.assert_close(one.values, other(obs, scene, plan).values, equal_nan=True)
    looked.clear()
    built("ensemble", members=[{**member, "frozen": False}] * 2)(obs, scene, plan)
    assert len(looked) == 2


def test_a_mix_is_partly_exact():
    mix = built("mix", learned={"name": "world_model", **VECTOR}, share=0.25, shares={"dac": 1.0})
    found, (obs, scene, plan) = judged(mix)
    exact, learned = irlvla.epdms(scene, plan), mix.learned(obs, scene, plan)
    torch.testing.assert_close(found.nc, 0.25 * exact.nc.float() + 0.75 * learned.nc)
    torch.testing.assert_close(found.dac, exact.dac.float())
    assert found.ec.isnan().all()
    assert torch.equal(found.learned.values.nan_to_num(), learned.values.nan_to_num())


def test_a_mix_takes_what_only_one_measures():
    mix = built("mix", learned={"name": "world_model", **VECTOR, "kinematic": "learned"})
    mix.learned.measured.fill_(True)
    found, (obs, scene, plan) = judged(mix)
    torch.testing.assert_close(found.ec, mix.learned(obs, scene, plan).ec)


def test_rewards_of_nothing():
    with pytest.raises(ConfigError, match="an ensemble needs members"):
        built("ensemble")
    with pytest.raises(ConfigError, match="a mix needs either"):
        built("mix")
    with pytest.raises(ConfigError, match=r"shares: no sub-metric 'dacs'. Did you mean 'dac'\?"):
        built("mix", learned="exact", shares={"dacs": 0.5})
    with pytest.raises(ConfigError, match="shares: dac must be from 0 to 1, got 2"):
        built("mix", learned="exact", shares={"dac": 2.0})
    with pytest.raises(ConfigError, match="3 heads do not divide tokens of width 32"):
        world_model(heads=3)


# -- saved -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A calibrated world model with a support, and where it is."""
    model, (obs, plan) = world_model(seed=3), (example_observation(8), example_plan(8, 6))
    model.temperatures["dac"].sharpness.fill_(0.7)
    model.fit_support(plan, obs.ego[:, -1, 3], 0.9)
    return model, str(irlvla.save_pretrained(model, tmp_path / "reward"))


def test_a_saved_model_is_whole(saved):
    model, folder = saved
    again = irlvla.from_pretrained(folder)
    (found, (obs, _, plan)), (other, _) = judged(model), judged(again)
    assert torch.equal(found.values.nan_to_num(), other.values.nan_to_num())
    assert torch.equal(model.unsupported(obs, plan), again.unsupported(obs, plan))
    assert model.unsupported(obs, example_plan(3, 4, seed=5)).any() == again.unsupported(obs, example_plan(3, 4, seed=5)).any()


def test_saved_members_are_left_as_they_are(saved, tmp_path):
    model, folder = saved
    for reward in (built("ensemble", saved=[folder], beta=0.0), built("mix", saved=folder, share=0.0)):
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        found, _ = judged(reward)
        torch.testing.assert_close(found.values, judged(model)[0].values, equal_nan=True)
        again = irlvla.build("reward_model", reward_spec(reward))
        again.load_state_dict(reward.state_dict())
        torch.testing.assert_close(judged(again.eval())[0].values, found.values, equal_nan=True)
    with pytest.raises(ConfigError, match="holds no reward_model but backbone 'status'"):
        built("ensemble", saved=[str(irlvla.save_pretrained(irlvla.build("backbone", "status"), tmp_path / "other"))])


def reward_spec(reward) -> dict:
    """What rebuilds it where the folders that it came from are gone."""
    name = next(name for name in ("ensemble", "mix", "world_model") if f"'{name}'" in reward.label)
    spec = {"name": name, **reward.saved_config.model_dump(mode="json")}
    assert not spec.get("saved")
    assert not spec.get("policy")
    return spec


def test_the_backbone_of_a_policy(tmp_path):
    torch.manual_seed(0)
    policy = irlvla.registry.installed().build_policy(VECTOR["backbone"], "constant_velocity")
    folder = str(irlvla.save_pretrained(policy, tmp_path / "policy"))
    model = world_model(policy=folder).train()
    assert not model.backbone.training
    assert model.network.training
    seen = model.see(example_observation(2))
    assert torch.equal(seen.agents, policy.eval().backbone(example_observation(2)).agents)
    assert not seen.agents.requires_grad
    found, (_, scene, plan) = judged(model)
    sum(model.loss(found, irlvla.epdms(scene, plan)).values()).backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    again = irlvla.build("reward_model", reward_spec(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(judged(again.eval())[0].values.nan_to_num(), judged(model.eval())[0].values.nan_to_num())
    assert not any(parameter.requires_grad for parameter in again.backbone.parameters())
    with pytest.raises(ConfigError, match="it is no policy but backbone 'status'"):
        world_model(policy=str(irlvla.save_pretrained(irlvla.build("backbone", "status"), tmp_path / "other")))


def test_a_saved_model_names_the_plugins_of_its_parts(tmp_path):
    irlvla.save_pretrained(built("ensemble", members=[{"name": "world_model", **VECTOR}]), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["spec"]["members"][0]["backbone"]["name"] == "vector"
    assert "irlvla" in config["requires"]


# -- in a minute -------------------------------------------------------------------------------------------------------


def auc(value: Tensor, good: Tensor) -> float:
    """How often a good one is valued more than a bad one."""
    difference = value[good][:, None] - value[~good]
    return ((difference > 0.0).double() + 0.5 * (difference == 0.0).double()).mean().item()


def test_it_learns_to_judge_unseen_scenes():
    """A minute of learning: a tenth of what it takes to be good, and far from chance. Measured: see the bounds."""
    train, unseen = synthetic_scenes(240, seed=0), synthetic_scenes(60, seed=5000)
    vocabulary = vocabulary_of(train.human, 64)
    seen, held = candidates_of(train, vocabulary), candidates_of(unseen, vocabulary, seed=1)
    exact, truth = irlvla.epdms(train, seen.plan, details=True), irlvla.epdms(unseen, held.plan)
    model, order = world_model(width=48).train(), generator()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    obs, features = observations(train), observations(unseen)
    for step in range(260):
        rows = torch.randperm(len(train), generator=order)[:8]
        part = torch.randperm(seen.source.shape[1], generator=order)[:12]
        found = model(obs[rows], train[rows], Plan(seen.plan.poses[rows][:, part]))
        labels = exact[rows]
        details = labels.details._map(operator.itemgetter((slice(None), part)))
        labels = dataclasses.replace(labels, values=labels.values[:, part], details=details)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, (260 - step) / 100)
        optimizer.zero_grad()
        sum(model.loss(found, labels).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(features, unseen, held.plan)
    reached = {name: auc(getattr(found, name).flatten(), (getattr(truth, name) > 0.75).flatten()) for name in LEARNED}
    print(reached)
    assert reached["dac"] > 0.7
    assert reached["nc"] > 0.6


def test_a_mix_is_calibrated_as_what_it_learned():
    mix = built("mix", learned={"name": "world_model", **VECTOR}, share=0.5)
    predicted, (obs, scene, plan) = judged(mix)
    measured = irlvla.epdms(scene, plan)
    expected = mix.learned.calibrate([predicted.learned], [measured])
    assert expected
    assert mix.calibrate([predicted], [measured]).keys() == expected.keys()
    speed, many = obs.ego[:, -1, StateIndex.VX], Plan(plan.poses.repeat(1, 10, 1, 1), plan.dt)
    assert not mix.learned.unsupported(obs, plan).any()
    mix.fit_support(many, speed, 0.5)
    assert mix.learned.unsupported(obs, plan).any()
    ignorant = built("mix", learned="exact")
    assert ignorant.calibrate([], []) == {}
    ignorant.fit_support(many, speed, 0.5)
