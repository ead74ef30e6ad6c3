"""The built-in planners that learn, and the human's drive: anchors, decoder, losses, sampling and its density."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import MultivariateNormal, Normal

import irlvla
from irlvla.clusters import kmeans
from irlvla.errors import ConfigError, FileError, InputError
from irlvla.synthetic import synthetic_scenes
from irlvla.testing import example_features, example_scene, planner_checks
from irlvla.types import Features, Observation, Plan, Trajectory
from irlvla.zoo.planners.anchors import choose, nearest, read_trajectories
from irlvla.zoo.planners.curves import Curves, fan

CHAINS = ("diffusion", "flow")
LEARNERS = (*CHAINS, "gaussian", "vocabulary")
TIMES = torch.arange(1, 9) * 0.5


def build(name: str, width: int = 32, **settings):
    """A planner in eval mode; the same every time."""
    torch.manual_seed(0)
    return irlvla.build("planner", {"name": name, "layers": 1, **settings}, width=width).eval()


def shaken(planner, by: float = 0.02):
    """A copy with other weights: one layer of a new planner is zero and shows nothing."""
    other = copy.deepcopy(planner)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return other


def drawn(planner, features: Features, k: int, seed: int = 0) -> Plan:
    with torch.no_grad():
        return planner.sample(features, k, generator=torch.Generator().manual_seed(seed))


def humans(count: int = 2) -> Trajectory:
    scene = example_scene(count)
    return Trajectory(scene.human.float(), scene.human_dt)


# -- the contract ------------------------------------------------------------------------------------------------------

test_diffusion = planner_checks("diffusion")
test_multiplicative_diffusion = planner_checks("diffusion", explore=True, noise="multiplicative", layers=1, anchors=4)
test_flow = planner_checks("flow", explore=True)
test_gaussian = planner_checks("gaussian")
test_single_gaussian = planner_checks("gaussian", explore=True, anchors=1, layers=1)
test_vocabulary = planner_checks("vocabulary", anchors=64)
test_vocabulary_in_parts = planner_checks("vocabulary", explore=True, anchors=20, chunk=6, layers=1, dropout=0.1)
test_human = planner_checks("human")


# -- curves ------------------------------------------------------------------------------------------------------------


def arc(speed: float, bend: float, times: torch.Tensor = TIMES) -> torch.Tensor:
    """Poses along a circle."""
    turn = speed * bend * times
    return torch.stack([turn.sin() / bend, (1.0 - turn.cos()) / bend, turn], -1)


def test_fan_is_what_a_car_can_drive():
    drives = fan(500, 8, 0.5)
    assert torch.equal(fan(500, 8, 0.5), drives)
    assert torch.equal(fan(20, 8, 0.5), drives[:20])
    velocity = torch.nn.functional.pad(drives, (0, 0, 1, 0)).diff(dim=1) / 0.5
    acceleration = velocity.diff(dim=1) / 0.5
    assert velocity.norm(dim=-1).max() < 28.1
    assert acceleration.norm(dim=-1).max() < 4.5
    assert drives[:, -1, 0].min() < 2.0
    assert drives[:, -1, 0].max() > 60.0
    assert drives[:, -1, 1].min() < -12.0
    assert drives[:, -1, 1].max() > 12.0
    assert (drives[:, :, 0] >= 0.0).all()


@pytest.mark.parametrize(("poses", "interval"), [(8, 0.5), (2, 2.0), (40, 0.1)])
def test_coordinates_are_those_of_any_drive(poses, interval):
    curves = Curves(poses, interval)
    positions = 20.0 * torch.randn(3, 5, poses, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(curves.positions(curves.coordinates(positions)), positions, rtol=1e-4, atol=1e-3)
    assert curves.poses(positions).shape == (3, 5, poses, 3)


def test_coordinates_are_of_order_one_and_treat_left_as_right():
    drives = fan(2000, 8, 0.5)
    curves = Curves(8, 0.5)
    curves.fit(drives)
    coordinates = curves.coordinates(drives)
    usual = coordinates.square().mean(0).sqrt()
    torch.testing.assert_close(usual[:2], torch.full((2, 2), 0.5), rtol=0.05, atol=0.0)
    assert (usual < 0.55).all()
    mirrored = curves.coordinates(drives * torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(mirrored, coordinates * torch.tensor([1.0, -1.0]))


def test_noise_in_coordinates_is_smooth():
    """Of noise that moves poses as much, that in coordinates has a tenth of the acceleration."""
    curves, generator = Curves(8, 0.5), torch.Generator().manual_seed(0)
    noise = torch.randn(1000, 8, 2, generator=generator)
    smooth = curves.positions(0.05 * noise) - curves.positions(torch.zeros(8, 2))
    white = noise * smooth.square().mean().sqrt()
    rough = [(change.diff(n=2, dim=1) / 0.25).square().mean().sqrt() for change in (smooth, white)]
    assert rough[0] < 0.1 * rough[1]


@pytest.mark.parametrize(("speed", "bend"), [(3.0, 0.15), (3.0, -0.001), (10.0, -0.04), (15.0, 0.02), (25.0, 0.005)])
def test_headings_are_those_of_the_way(speed, bend):
    poses = arc(speed, bend)
    error = Curves(8, 0.5).poses(poses[:, :2])[:, 2] - poses[:, 2]
    assert torch.atan2(error.sin(), error.cos()).abs().max() < 0.01


def test_headings_of_human_drives():
    drives = synthetic_scenes(20, seed=5).human.float()
    error = Curves(8, 0.5).poses(drives[..., :2])[..., 2] - drives[..., 2]
    assert error.abs().mean() < 0.003
    assert error.abs().max() < 0.05


def test_a_car_that_stops_keeps_its_heading_and_may_roll_back():
    curves = Curves(8, 0.5)
    assert not curves.poses(torch.zeros(8, 2))[:, 2].any()
    turn = arc(6.0, 0.05)
    stop = torch.cat([turn[:4], turn[3:4].expand(4, 3)])
    headings = curves.poses(stop[:, :2])[:, 2]
    assert (headings[4:] - turn[3, 2]).abs().max() < 0.1
    back = torch.stack([-TIMES, torch.zeros(8)], -1)
    assert not curves.poses(back)[:, 2].any()
    shaking = 0.02 * torch.randn(100, 8, 2, generator=torch.Generator().manual_seed(0))
    assert curves.poses(shaking)[..., 2].abs().max() < 0.05


def test_poses_can_be_differentiated_everywhere():
    for positions in (torch.zeros(8, 2), arc(5.0, 0.1)[:, :2]):
        positions.requires_grad_()
        Curves(8, 0.5).poses(positions).sum().backward()
        assert positions.grad.isfinite().all()


# -- anchors -----------------------------------------------------------------------------------------------------------


def test_kmeans_finds_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 100.0 * torch.randn(100, 4, generator=generator)
    points = (centres[:, None] + torch.randn(100, 50, 4, generator=generator)).flatten(0, 1)
    found = kmeans(points[torch.randperm(len(points), generator=generator)], 100)
    assert torch.cdist(found, centres).amin(0).max() < 1.0
    assert torch.equal(kmeans(points, 100), kmeans(points, 100))


def test_kmeans_is_as_good_as_scipy():
    from scipy.cluster.vq import kmeans2

    points = fan(1500, 8, 0.5).flatten(1)

    def error(centres) -> float:
        return torch.cdist(points, torch.as_tensor(centres).float()).amin(1).square().mean().item()

    theirs = min(error(kmeans2(points.double().numpy(), 20, minit="++", seed=seed)[0]) for seed in range(3))
    assert error(kmeans(points, 20)) < 1.1 * theirs


def test_kmeans_needs_different_points():
    with pytest.raises(InputError, match="3 centres need as many different points, there are 2"):
        kmeans(torch.tensor([[0.0], [1.0], [1.0], [0.0]]), 3)
    assert sorted(kmeans(torch.tensor([[0.0], [1.0], [1.0], [0.0]]), 2).flatten().tolist()) == [0.0, 1.0]


def test_few_drives_are_anchors_themselves():
    drives = fan(40, 8, 0.5)[30:35]
    anchors = choose(torch.cat([drives, drives]), 20, 0.5)
    assert anchors.shape == (20, 8, 2)
    assert all((anchors == drive).all((1, 2)).any() for drive in drives)
    assert torch.equal(anchors[5:], fan(15, 8, 0.5))


def test_nearest_by_hand():
    anchors = torch.stack([arc(5.0, 0.001)[:, :2], arc(10.0, 0.001)[:, :2], arc(10.0, 0.05)[:, :2]])
    drives = torch.stack([arc(7.0, 0.001)[:, :2], arc(9.0, 0.03)[:, :2]])
    assert nearest(drives, anchors).tolist() == [0, 2]


def test_published_vocabularies(shared_real):
    folder = shared_real / "trajectory_vocabularies"
    few = read_trajectories(folder / "kmeans_navsim_traj_20.npy", 8)
    assert (few.shape, few.dtype) == ((20, 8, 2), torch.float32)
    many = read_trajectories(folder / "gtrs_8192.npy", 8)
    whole = np.load(folder / "gtrs_8192.npy")
    assert many.shape == (8192, 8, 3)
    np.testing.assert_array_equal(many[:, -1], whole[:, -1])
    np.testing.assert_array_equal(many[:, 0], whole[:, 4])  # after 0.5 s
    assert len(read_trajectories(folder / "gtrs_8192.npy", 40)[0]) == 40
    derived = Curves(8, 0.5).poses(many[..., :2])[..., 2] - many[..., 2]
    assert torch.atan2(derived.sin(), derived.cos()).abs().mean() < 0.02
    planner = build("diffusion", anchors_file=str(folder / "kmeans_navsim_traj_20.npy"))
    planner.fit(humans())
    assert torch.equal(planner.anchors[..., :2], few)
    large = build("vocabulary", anchors=8192, anchors_file=str(folder / "gtrs_8192.npy"), footprint=False)
    large.fit(humans())
    assert torch.equal(large.anchors, many)
    plan = drawn(large, example_features(1, 32), 3)
    assert (many == plan.poses[0, 0]).all((1, 2)).any()


def test_files_that_hold_no_trajectories(tmp_path):
    def written(name: str, values) -> Path:
        np.save(tmp_path / name, values, allow_pickle=True)
        return tmp_path / name

    with pytest.raises(FileError, match="does not exist"):
        read_trajectories(tmp_path / "none.npy", 8)
    with pytest.raises(FileError, match=r"not a \.npy file of numbers"):
        read_trajectories(written("objects.npy", np.array([{}])), 8)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1.0]))
    with pytest.raises(FileError, match=r"not a \.npy file of numbers"):
        read_trajectories(tmp_path / "pickle.npy", 8)
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    with pytest.raises(FileError, match="several arrays"):
        read_trajectories(tmp_path / "several.npz", 8)
    with pytest.raises(FileError, match=r"float64 of shape \(20, 8\), expected trajectories"):
        read_trajectories(written("flat.npy", np.zeros((20, 8))), 8)
    with pytest.raises(FileError, match="of 12 poses, expected 8 or a multiple"):
        read_trajectories(written("poses.npy", np.zeros((20, 12, 2))), 8)
    with pytest.raises(FileError, match="NaN or infinity"):
        read_trajectories(written("nan.npy", np.full((20, 8, 2), np.nan)), 8)
    planner = build("diffusion", anchors_file=str(written("few.npy", np.zeros((3, 8, 2)))))
    with pytest.raises(ConfigError, match=r"planner 'diffusion' .*few.npy holds 3 trajectories, but anchors=20; set anchors=3"):
        planner.fit(humans())


def test_fit_leaves_out_what_was_not_recorded():
    human = humans(5)
    human.poses[2] = math.nan
    planner = build("diffusion", anchors=4)
    planner.fit(human)
    assert all((planner.anchors[:, :, :2] == human.poses[i, :, :2]).all((1, 2)).any() for i in (0, 1, 3, 4))
    with pytest.raises(InputError, match="1 drives to fit to, none of which was recorded"):
        planner.fit(human[[2]])


@pytest.mark.parametrize("name", LEARNERS)
def test_saving_keeps_what_was_fitted_without_the_file(name, tmp_path):
    np.save(tmp_path / "anchors.npy", fan(6, 8, 0.5).numpy())
    planner = build(name, anchors=6, anchors_file=str(tmp_path / "anchors.npy"))
    planner.fit(humans())
    irlvla.save_pretrained(planner, tmp_path / "model")
    (tmp_path / "anchors.npy").unlink()
    loaded = irlvla.from_pretrained(tmp_path / "model")
    features = example_features(2, 32)
    assert torch.equal(loaded.anchors, planner.anchors)
    assert torch.equal(drawn(loaded, features, 8).poses, drawn(planner, features, 8).poses)


# -- decoder -----------------------------------------------------------------------------------------------------------

GROUPS = ("bev", "agents", "map", "status", "language")


def scores_of(planner, features: Features) -> torch.Tensor:
    with torch.no_grad():
        decoded = planner.decoder(planner.decoder.memory(features), planner.starts(len(features)))
    return decoded.scores[-1]


@pytest.mark.parametrize("group", GROUPS)
def test_only_the_groups_of_the_configuration_are_read(group):
    features = example_features(2, 32)
    changed = dataclasses.replace(features, **{group: getattr(features, group) + torch.randn_like(getattr(features, group))})
    without = build("gaussian", tokens=[name for name in GROUPS if name != group])
    assert torch.equal(scores_of(without, features), scores_of(without, changed))
    alone = build("gaussian", tokens=[group])
    assert not torch.equal(scores_of(alone, features), scores_of(alone, changed))
    absent = dataclasses.replace(features, **{group: None})
    everything = build("gaussian")
    assert not torch.equal(scores_of(everything, features), scores_of(everything, absent))
    parameters = [sum(map(torch.numel, planner.parameters())) for planner in (without, everything)]
    assert parameters[0] < parameters[1]


def test_it_plans_without_any_token():
    features = example_features(2, 32)
    for planner in (build("diffusion"), build("gaussian", tokens=[])):
        plan = drawn(planner, Features(features.observation), 5)
        assert plan.poses.isfinite().all()


def test_tokens_that_are_not_valid_are_not_read():
    features, planner = example_features(2, 32), build("gaussian", tokens=["agents", "map", "language"])
    for group in ("agents", "map", "language"):
        tokens = getattr(features, group).clone()
        tokens[~getattr(features, f"{group}_valid")] = 1e3
        torch.testing.assert_close(scores_of(planner, dataclasses.replace(features, **{group: tokens})), scores_of(planner, features))


def test_proposals_look_along_their_own_way():
    """What lies 20 m ahead matters to whom drives there, and to nobody else."""
    features, planner = example_features(1, 32), shaken(build("gaussian", tokens=["bev"], bev_tokens=0, anchors=2, layers=2))
    straight, left = arc(8.0, 0.001), arc(8.0, 0.1)
    planner.anchors.copy_(torch.stack([straight, left]))
    with torch.no_grad():
        for parameter in planner.decoder.layers[0].change[-1].parameters():
            parameter.zero_()  # the second layer looks where the first does
    bev = torch.zeros(1, 32, 64, 64)  # a cell is a metre
    seen = scores_of(planner, dataclasses.replace(features, bev=bev))
    thing = torch.linspace(-10.0, 10.0, 32)
    bev[:, :, 52, 32] = thing  # x = 20.5, y = 0.5
    changed = scores_of(planner, dataclasses.replace(features, bev=bev)) != seen
    assert changed.tolist() == [[True, False]]
    bev.zero_()
    bev[:, :, 32 + 20, 32 + 1] = thing  # y = 1.5: under a side of the car only if it looks under its corners
    assert (scores_of(planner, dataclasses.replace(features, bev=bev)) != seen).tolist() == [[True, False]]
    narrow = shaken(build("gaussian", tokens=["bev"], bev_tokens=0, anchors=2, footprint=False))
    narrow.anchors.copy_(planner.anchors)
    bev.zero_()
    nothing = scores_of(narrow, dataclasses.replace(features, bev=bev))
    bev[:, :, 32:, 34:36] = thing[:, None, None]
    assert (scores_of(narrow, dataclasses.replace(features, bev=bev)) == nothing)[0, 0]


def test_proposals_do_not_see_each_other():
    features, planner = example_features(2, 32), shaken(build("gaussian", anchors=5))
    together = scores_of(planner, features)
    memory, starts = planner.decoder.memory(features), planner.starts(2)
    for i in range(5):
        with torch.no_grad():
            (alone,) = planner.decoder(memory, starts[:, i : i + 1]).scores
        torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_explained():
    with pytest.raises(ConfigError, match="heads=5 must divide the width of the tokens, 32"):
        build("diffusion", heads=5)
    with pytest.raises(ConfigError, match=r"9 poses, 0.5 s apart, do not cover 4 s; take 8 and 0.5, or 40 and 0.1"):
        build("gaussian", poses=9)
    with pytest.raises(ConfigError, match="expected steps <= start <= train_steps <= schedule_steps, got steps=9, start=8"):
        build("diffusion", steps=9)
    with pytest.raises(ConfigError, match="'agents', 'map', 'status' or 'language', got 'lidar'"):
        build("flow", tokens=["lidar"])
    features = dataclasses.replace(example_features(2, 32), bev_range=None)
    with pytest.raises(InputError, match="bev without bev_range"):
        drawn(build("diffusion"), features, 1)
    planner = build("diffusion")
    with pytest.raises(InputError, match=r"planner 'diffusion' .*a pose every 0.5 s for 4 s, got 4 poses, 1 s apart"):
        planner.loss(example_features(2, 32), Trajectory(torch.zeros(2, 4, 3), 1.0))
    with pytest.raises(InputError, match=r"needs the trace of its own sample\(\), of shape \(2, 3, 3, 2, 8, 2\); this plan has none"):
        planner.log_prob(example_features(2, 32), Plan(torch.zeros(2, 3, 8, 3)))


def test_drives_are_read_at_the_times_of_a_plan():
    fine = torch.randn(2, 50, 3)
    planner = build("gaussian")
    drives, known = planner.drives(Trajectory(fine, 0.1))
    assert torch.equal(drives, fine[:, 4:40:5, :2])
    assert known.tolist() == [True, True]


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("explore", [False, True])
def test_any_number_of_proposals_the_best_first(name, explore):
    features, planner = example_features(2, 32), shaken(build(name, anchors=5, explore=explore))
    for k in (1, 3, 5, 7, 64):
        plan = drawn(planner, features, k)
        assert plan.poses.shape == (2, k, 8, 3)
        assert plan.poses.isfinite().all()
        assert (plan.score.diff(dim=1) <= 0.0).all()
        assert torch.equal(plan.best().poses, plan.poses[:, 0])
        assert torch.equal(drawn(planner, features, k).poses, plan.poses)


@pytest.mark.parametrize("name", LEARNERS)
def test_driving_does_not_depend_on_how_many_proposals_are_asked_for(name):
    features, planner = example_features(2, 32), shaken(build(name, anchors=5))
    best = drawn(planner, features, 1).poses[:, 0]
    torch.testing.assert_close(drawn(planner, features, 5).poses[:, 0], best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_exploring_can_be_switched(name):
    features, planner = example_features(2, 32), shaken(build(name, anchors=5))
    calm = drawn(planner, features, 5)
    planner.explore = True
    wild = drawn(planner, features, 5)
    assert not torch.equal(wild.poses, calm.poses)
    planner.explore = False
    assert torch.equal(drawn(planner, features, 5).poses, calm.poses)
    assert build(name, explore=True).explore


@pytest.mark.parametrize("name", ["gaussian", "vocabulary"])
def test_driving_draws_nothing(name):
    features, planner = example_features(2, 32), shaken(build(name, anchors=5))
    plan = drawn(planner, features, 5, seed=1)
    assert torch.equal(plan.poses, drawn(planner, features, 5, seed=2).poses)
    torch.testing.assert_close(plan.score, scores_of(planner, features).log_softmax(-1).sort(1, descending=True).values)


@pytest.mark.parametrize("name", CHAINS)
def test_only_the_beginning_of_a_chain_is_drawn_when_driving(name):
    features, planner = example_features(2, 32), shaken(build(name, anchors=5))
    plan = drawn(planner, features, 5)
    states, anchors = planner.trace(plan)
    memory = planner.decoder.memory(features)
    with torch.no_grad():
        for step in range(planner.steps):
            mean, _, _ = planner._step(step, memory, states[:, :, step], anchors, False)
            torch.testing.assert_close(mean, states[:, :, step + 1], rtol=0, atol=1e-5)
    assert not torch.equal(states[:, :, 0], anchors)
    assert torch.equal(planner.starts(2).gather(1, planner.anchor_of(plan)[:, :, None, None].expand_as(anchors)), anchors)


def test_a_new_planner_drives_its_anchors():
    features = example_features(2, 32)
    for name in (*CHAINS, "gaussian"):
        planner = build(name, anchors=5)
        plan = drawn(planner, features, 5)
        torch.testing.assert_close(plan.poses, planner.anchors[planner.anchor_of(plan)], rtol=0, atol=0.02)


def test_diffusion_steps_are_those_of_diffusers():
    planner = build("diffusion", steps=2, start=8)
    assert planner.timesteps == [7, 3, -1]
    theirs = DDIMScheduler(1000, beta_schedule="scaled_linear", prediction_type="sample", clip_sample=False)
    theirs.set_timesteps(250)  # four apart
    state, end = torch.randn(2, 1, 3, 8, 2)
    for step, timestep in enumerate((7, 3)):
        for explore in (False, True):
            mean, std = planner.transition(step, state, end, state, explore)
            noise = {"eta": 1.0, "variance_noise": torch.zeros_like(state)} if explore else {}
            torch.testing.assert_close(mean, theirs.step(end, timestep, state, **noise).prev_sample, rtol=1e-3, atol=1e-4)
            one = {"eta": 1.0, "variance_noise": torch.ones_like(state)}
            expected = (theirs.step(end, timestep, state, **one).prev_sample - mean).mean().item() if explore else 0.0
            assert std == pytest.approx(expected, rel=1e-3)
    assert planner.transition(1, state, end, state, False)[0].equal(end)
    noise = planner.begin(torch.zeros(1000, 1, 8, 2), torch.ones(1000, 1, 8, 2)).mean().item()
    assert noise == pytest.approx((1.0 - theirs.alphas_cumprod[7].item()) ** 0.5)


def test_flow_is_straight_where_the_end_is_known():
    planner = build("flow", steps=4)
    anchor, end, noise = torch.randn(3, 1, 2, 8, 2)
    begin = state = planner.begin(anchor, noise)
    for step in range(4):
        state, std = planner.transition(step, state, end, anchor, False)
        torch.testing.assert_close(state, begin + (step + 1) / 4 * (end - begin), rtol=0, atol=1e-5)
        assert std == 0.0


def test_stochastic_flow_has_the_densities_of_the_flow():
    """With many steps, states at time t are (1 - t) end + t (anchor + spread noise), as without noise on the way."""
    planner = build("flow", steps=200, spread=0.3, noise_level=0.7)
    generator = torch.Generator().manual_seed(0)
    anchor, end = torch.full((1, 4000, 1, 1), 2.0), torch.full((1, 4000, 1, 1), -1.0)
    state = planner.begin(anchor, torch.randn(anchor.shape, generator=generator))
    for step in range(199):
        mean, std = planner.transition(step, state, end, anchor, True)
        state = mean + std * torch.randn(state.shape, generator=generator)
        if step in (99, 149):
            t = 1.0 - (step + 1) / 200
            assert state.mean().item() == pytest.approx(t * 2.0 - (1.0 - t), abs=0.02)
            assert state.std().item() == pytest.approx(0.3 * t, rel=0.06)
    assert state.mean().item() == pytest.approx(-1.0, abs=0.03)


def test_noise_can_be_clipped():
    features = example_features(2, 32)
    for noise in ("additive", "multiplicative"):
        planner = build("diffusion", explore=True, noise=noise, noise_clip=0.5, min_sampling_std=0.1, eta=0.0)
        states, anchors = planner.trace(drawn(planner, features, 20))
        with torch.no_grad():
            mean, std, _ = planner._step(1, planner.decoder.memory(features), states[:, :, 1], anchors, True)
        deviation = (states[:, :, 2] - mean) / std
        limit = 0.5 if noise == "additive" else 0.5 * (planner._along(states[:, :, 1]).abs() + 0.1)
        assert (deviation.abs() <= limit + 1e-4).all()
        assert (deviation.abs() > 0.49 * limit).any()


# -- log-probabilities -------------------------------------------------------------------------------------------------

EXPLORERS = {
    "diffusion": {"name": "diffusion"},
    "multiplicative": {"name": "diffusion", "noise": "multiplicative"},
    "three steps": {"name": "diffusion", "steps": 3, "start": 20, "min_sampling_std": 0.02},
    "flow": {"name": "flow"},
    "gaussian": {"name": "gaussian"},
    "mixture": {"name": "gaussian", "anchors": 7},
    "vocabulary": {"name": "vocabulary", "anchors": 50},
}


def explorer(spec: dict):
    return shaken(build(**{"anchors": 1, "explore": True, **spec}))


@pytest.mark.parametrize("spec", EXPLORERS.values(), ids=EXPLORERS)
def test_log_prob_is_the_density_that_was_drawn_from(spec):
    """By Monte Carlo: another density, divided by that of the samples, is 1 on average. Neither a wrong scale nor another noise is."""
    features, planner = example_features(1, 32), explorer(spec)
    other = shaken(planner, 0.0005 if spec["name"] != "vocabulary" else 0.02)
    plan = drawn(planner, features, 2000)
    with torch.no_grad():
        ratio = (other.log_prob(features, plan) - planner.log_prob(features, plan)).double().sum(-1).exp()
    assert ratio.std(1).min() > 0.02  # they differ
    assert ratio.std(1).max() < 3.0  # and the mean is known
    error = ratio.std(1) / ratio.shape[1] ** 0.5
    assert ((ratio.mean(1) - 1.0).abs() < 4.0 * error).all()


@pytest.mark.parametrize("spec", [spec for spec in EXPLORERS.values() if spec["name"] in CHAINS], ids=str)
def test_log_prob_of_a_step_by_hand(spec):
    features, planner = example_features(2, 32), explorer(spec)
    plan = drawn(planner, features, 6)
    states, anchors = planner.trace(plan)
    found, memory = planner.log_prob(features, plan), planner.decoder.memory(features)
    assert found.shape == (2, 6, planner.steps)
    for step in range(planner.steps):
        state, after = states[:, :, step].detach(), states[:, :, step + 1]
        with torch.no_grad():
            mean, std, _ = planner._step(step, memory, state, anchors, True)
        covariance = std**2 * torch.eye(8, dtype=torch.float64).expand(2, 6, 2, 8, 8)
        if spec.get("noise") == "multiplicative":
            positions = planner.curves.positions(state).double()
            along = torch.einsum("amt,bkta->bkam", planner.curves.inverse.double(), positions)
            covariance = std**2 * (0.01 * torch.eye(8) + along[..., :, None] * along[..., None, :])
        expected = MultivariateNormal(mean.double().mT, covariance).log_prob(after.double().mT).sum(-1)
        torch.testing.assert_close(found[..., step].double(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("spec", [spec for spec in EXPLORERS.values() if spec["name"] in CHAINS], ids=str)
def test_steps_are_drawn_as_wide_as_log_prob_says(spec):
    """How far draws of 16 numbers lie from their mean, in standard deviations: the mean of the squares is 16."""
    features, planner = example_features(1, 32), explorer(spec)
    plan = drawn(planner, features, 1000)
    states, anchors = planner.trace(plan)
    with torch.no_grad():
        log_prob, memory = planner.log_prob(features, plan), planner.decoder.memory(features)
        for step in range(planner.steps):
            state = states[:, :, step]
            _, std, _ = planner._step(step, memory, state, anchors, True)
            square = 2.0 * (planner._log_density(torch.zeros_like(state), state, std) - log_prob[..., step])
            assert square.mean().item() == pytest.approx(16.0, abs=4.0 * (2.0 * 16.0 / 1000) ** 0.5)


def test_log_prob_of_a_mixture_by_hand():
    features, planner = example_features(2, 32), explorer(EXPLORERS["mixture"])
    plan = drawn(planner, features, 6)
    gaussian, log_weight = planner.mixture(features)
    end = planner.curves.coordinates(plan.poses[..., :2])
    each = torch.stack([Normal(gaussian.mean[:, i, None], gaussian.stddev[:, i, None]).log_prob(end).sum((-2, -1)) for i in range(7)], -1)
    expected = (log_weight.exp()[:, None] * each.double().exp()).sum(-1).log()
    torch.testing.assert_close(planner.log_prob(features, plan)[..., 0].double(), expected, rtol=1e-3, atol=0.02)
    bare = dataclasses.replace(plan, trace=None)
    torch.testing.assert_close(planner.log_prob(features, bare), planner.log_prob(features, plan), rtol=1e-3, atol=0.02)


def test_draws_of_a_mixture_are_as_frequent_as_they_are_probable():
    features, planner = example_features(1, 32), explorer({"name": "gaussian", "anchors": 4})
    with torch.no_grad():
        planner.decoder.layers[0].score.weight.mul_(30.0)
        _, log_weight = planner.mixture(features)
    plan = drawn(planner, features, 4000)
    frequency = torch.bincount(planner.anchor_of(plan)[0], minlength=4) / 4000
    assert log_weight.exp().std() > 0.05
    torch.testing.assert_close(frequency, log_weight.exp()[0], rtol=0, atol=0.035)


def test_vocabulary_is_a_distribution():
    features, planner = example_features(2, 32), explorer(EXPLORERS["vocabulary"])
    entries = Plan(planner.anchors.expand(2, -1, -1, -1))
    log_prob = planner.log_prob(features, entries)[..., 0]
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(2))
    near = Plan(entries.poses + 0.01)
    assert torch.equal(planner.log_prob(features, near)[..., 0], log_prob)
    plan = drawn(planner, features, 20)
    torch.testing.assert_close(plan.score, planner.log_prob(features, plan)[..., 0].detach())


@pytest.mark.parametrize("spec", EXPLORERS.values(), ids=EXPLORERS)
def test_log_prob_survives_saving_the_plan(spec, tmp_path):
    features, planner = example_features(2, 32), explorer(spec)
    plan = drawn(planner, features, 5)
    plan.save(tmp_path / "plan.safetensors")
    with torch.no_grad():
        before, after = planner.log_prob(features, plan), planner.log_prob(features, Plan.load(tmp_path / "plan.safetensors"))
    assert torch.equal(before, after)


def test_a_floor_of_log_prob_widens_it_and_nothing_else():
    features = example_features(2, 32)
    exact, wide = (build("diffusion", explore=True, min_logprob_std=floor) for floor in (0.0, 0.1))
    plan = drawn(exact, features, 5)
    assert torch.equal(drawn(wide, features, 5).poses, plan.poses)
    with torch.no_grad():
        peak = [planner._log_density(torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2), 0.04).item() for planner in (exact, wide)]
        narrow, broad = exact.log_prob(features, plan), wide.log_prob(features, plan)
    assert peak[0] == peak[1]
    expected = Normal(0.0, 0.1).log_prob(torch.zeros(16)).sum()
    assert (broad <= expected + 1e-4).all()
    assert (narrow > broad).any()


# -- losses ------------------------------------------------------------------------------------------------------------


def losses(planner, features: Features, human: Trajectory, noise: torch.Tensor, time: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of a planner, with given noise where it has any."""
    if planner.config.__class__.__qualname__.startswith("Diffusion"):
        return planner.denoising_loss(features, human, noise, (50 * time).long())
    if planner.config.__class__.__qualname__.startswith("Flow"):
        return planner.flow_loss(features, human, noise, time)
    return planner.loss(features, human)


@pytest.mark.parametrize("name", LEARNERS)
def test_losses_of_a_batch_are_the_mean_of_its_parts(name):
    features, human = example_features(4, 32), humans(4)
    human.poses[1] = math.nan
    planner, generator = shaken(build(name, anchors=5)), torch.Generator().manual_seed(0)
    noise, time = torch.randn(4, 5, 8, 2, generator=generator), torch.rand(4, generator=generator)
    whole = losses(planner, features, human, noise, time)
    parts = [losses(planner, features[rows], human[rows], noise[rows], time[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert whole.keys() == parts[0].keys()
    for key, value in whole.items():
        torch.testing.assert_close(value, (parts[0][key] + parts[1][key]) / 2.0, rtol=1e-4, atol=1e-5)


SCORE_LOSSES = {"cross_entropy": math.log(5.0), "bce": math.log(2.0), "focal": math.log(2.0) * 0.25 * (0.25 + 4 * 0.75) / 5}


@pytest.mark.parametrize("score_loss", SCORE_LOSSES)
@pytest.mark.parametrize("name", CHAINS)
def test_losses_of_chains_by_hand(name, score_loss):
    """A new planner drives its anchors and scores them all alike."""
    features, human = example_features(2, 32), humans(2)
    times = torch.randn(2, 5, 8, 2), torch.tensor([0.3, 0.9])
    for distance_loss in ("metres", "coordinates"):
        planner = build(
            name, anchors=5, layers=2, score_loss=score_loss, distance_loss=distance_loss, score_weight=3.0, distance_weight=8.0
        )
        with torch.no_grad():
            for layer in planner.decoder.layers:
                layer.score.weight.zero_()
                layer.score.bias.zero_()
        found = losses(planner, features, human, *times)
        row = nearest(human.poses[..., :2], planner.anchors[..., :2])
        anchors, drives = planner.anchors[row][..., :2], human.poses[..., :2]
        if distance_loss == "metres":
            distance = (anchors - drives).abs().sum(-1).mean()
        else:
            distance = (planner.curves.coordinates(anchors) - planner.curves.coordinates(drives)).abs().mean()
        assert found["distance"].item() == pytest.approx(8.0 * distance.item(), rel=1e-4)
        assert found["score"].item() == pytest.approx(3.0 * SCORE_LOSSES[score_loss], rel=1e-4)


def test_vocabulary_learns_the_softmax_of_squared_distances():
    features, human = example_features(2, 32), humans(2)
    planner = build("vocabulary", anchors=50, temperature=30.0)
    square = (planner.anchors[:, :, :2] - human.poses[:, None, :, :2]).square().sum((-2, -1))
    target = (-square / 30.0).softmax(-1)
    expected = -(target * scores_of(planner, features).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(planner.loss(features, human)["imitation"], expected)


def test_a_vocabulary_in_parts_is_the_same():
    features, human = example_features(2, 32), humans(2)
    whole, parts = build("vocabulary", anchors=50, chunk=50), build("vocabulary", anchors=50, chunk=7)
    gradients = []
    for planner in (whole, parts):
        planner.loss(features, human)["imitation"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in planner.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_in_bfloat16_geometry_stays_in_float32(name):
    features, human = example_features(2, 32), humans(2)
    planner = shaken(build(name, anchors=5, explore=name in CHAINS))
    plan = drawn(planner, features, 5)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = drawn(planner, features, 5)
        found = sum(planner.loss(features, human).values())
        found.backward()
        log_prob = planner.log_prob(features, coarse)
    assert coarse.poses.dtype == torch.float32
    assert log_prob.dtype == torch.float32
    assert found.isfinite()
    assert log_prob.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in planner.parameters())
    if name in CHAINS:
        moved = (coarse.poses.sort(1).values - plan.poses.sort(1).values)[..., :2].abs()
        assert moved.max() < 0.5
        states, _ = planner.trace(coarse)
        torch.testing.assert_close(planner.curves.positions(states[:, :, -1]), coarse.poses[..., :2], rtol=0, atol=1e-5)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson():
    """Scenes of the embedded world, each of which has a token of its own."""
    scene = synthetic_scenes(12, seed=0)
    return scene, Observation(scene.token, torch.zeros(12, 4, 8), torch.zeros(12).long())


@pytest.mark.parametrize(("name", "anchors"), [("diffusion", 6), ("flow", 6), ("gaussian", 6), ("vocabulary", 32)])
def test_it_learns_drives_by_heart(lesson, name, anchors):
    """Of half as many anchors as drives (but a vocabulary, which has no other), it drives as the human and scores as one."""
    scene, obs = lesson
    human = Trajectory(scene.human.float(), scene.human_dt)
    planner = build(name, anchors=anchors).train()
    planner.fit(human)
    token = torch.nn.Parameter(torch.randn(12, 32))
    optimizer = torch.optim.Adam([token, *planner.parameters()], 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        sum(planner.loss(Features(obs, status=token), human).values()).backward()
        optimizer.step()
        schedule.step()
    plan = drawn(planner.eval(), Features(obs, status=token), 1)
    distance = (plan.poses[:, 0] - human.poses)[..., :2].norm(dim=-1).mean(-1)
    assert distance.max() < 0.1
    gap = irlvla.epdms(scene, scene.human).score() - irlvla.epdms(scene, plan.best()).score()
    assert gap.mean() < 0.02


# -- the human ---------------------------------------------------------------------------------------------------------


def test_human_drives_as_recorded():
    scene = example_scene(3)
    planner = irlvla.build("planner", "human", width=8)
    obs = Observation(scene.token, torch.zeros(3, 4, 8), torch.zeros(3).long(), scene=scene)
    plan = planner.sample(Features(obs), 2)
    assert plan.dt == scene.human_dt
    for i in range(2):
        assert torch.equal(plan.poses[:, i], scene.human)
    assert torch.equal(irlvla.epdms(scene, plan).score()[:, 0], irlvla.epdms(scene, scene.human).score())
    with pytest.raises(InputError, match=r"planner 'human' .*these observations have no scene: take a dataset .*privileged: true"):
        planner.sample(Features(dataclasses.replace(obs, scene=None)), 1)
    scene.human[1] = math.nan
    with pytest.raises(InputError, match=f"no drive to repeat where none was recorded: '{scene.token[1]}'$"):
        planner.sample(Features(obs), 1)
