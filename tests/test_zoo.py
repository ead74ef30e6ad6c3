"""The built-in components: backbone, planners, reward, metrics and dataset."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import irlvla
from irlvla import build, golden
from irlvla.components import Policy
from irlvla.errors import ConfigError, FileError, InputError
from irlvla.records import command_of
from irlvla.shards import ShardWriter
from irlvla.testing import backbone_checks, check, dataset_checks, metric_checks, planner_checks, reward_model_checks
from irlvla.types import METRICS, Batch, Command, Epdms, Features, Observation, Plan, Scene, Trajectory

GOLDEN = Path(__file__).parent / "golden"
HANDMADE = torch.tensor(list(golden.HANDMADE_PLANS.values()), dtype=torch.float64)[None]  # "1 4 8 3"


@pytest.fixture(scope="module")
def items() -> list[golden.GoldenScene]:
    """Scenes of 10 road families, and what the official devkit says of them."""
    return golden.load(GOLDEN / "public.npz")


@pytest.fixture(scope="module")
def scenes(items) -> Scene:
    return Scene.cat([item.scene for item in items])


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def observe(ego: torch.Tensor, command: Command = Command.STRAIGHT) -> Observation:
    """Observations of cars with the histories "B H 8"."""
    return Observation(tuple(map(str, range(len(ego)))), ego, torch.full((len(ego),), command))


def seeing(scene: Scene) -> Features:
    """What a backbone makes of privileged observations; the planners here read no tokens."""
    return Features(Observation(scene.token, torch.zeros(len(scene), 4, 8), torch.zeros(len(scene)).long(), scene=scene))


def moved(scene: Scene, x: float = 3e5, y: float = 4e6, turn: float = 2.5) -> Scene:
    """The same scenes in a map that is turned and shifted."""
    rotation = doubles([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])

    def change(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[..., :2] = values[..., :2] @ rotation.T + doubles([x, y])
        values[..., 2:3] += turn
        return values

    names = ("ego", "history", "reference", "previous_ego", "points", "centerline", "agent_state")
    changed = {name: change(getattr(scene, name)) for name in names}
    changed["agent_state"][..., 3:5] = changed["agent_state"][..., 3:5] @ rotation.T
    return dataclasses.replace(scene, **changed)


def without_reference(scene: Scene) -> Scene:
    return dataclasses.replace(scene, reference=torch.full_like(scene.reference, math.nan))


def with_centerline(scene: Scene, points) -> Scene:
    """One scene with another centreline of points x, y, heading."""
    points = doubles(points).reshape(-1, 3)
    return dataclasses.replace(scene, centerline=points, centerline_offsets=torch.tensor([0, len(points)]))


# -- the contracts of their kinds --------------------------------------------------------------------------------------

test_status = backbone_checks("status")
test_status_of_one_frame = backbone_checks("status", width=512, frames=1)
test_constant_velocity = planner_checks("constant_velocity")
test_pdm_closed = planner_checks("pdm_closed")
test_exact = reward_model_checks("exact")
test_epdms = metric_checks("epdms", pdms=True)
test_displacement = metric_checks("displacement")


def test_scenes_behind_a_link(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    assert len(irlvla.build("dataset", {"name": "scenes", "path": tmp_path})) == len(
        irlvla.build("dataset", {"name": "scenes", "path": folder})
    )


def test_scenes(folder):
    results = check("dataset", "scenes", {"path": str(folder)})
    assert len(results) > 5
    assert [result.problem or result.skipped for result in results if result.problem or result.skipped] == []


# -- planners ----------------------------------------------------------------------------------------------------------


def test_constant_velocity_by_hand():
    ego = torch.zeros(2, 4, 8)
    ego[0, -1, 3:5] = torch.tensor([3.0, -4.0])  # 5 m/s; the plan goes straight ahead all the same
    ego[0, :-1, 3] = 99.0  # the past does not count
    planner = irlvla.build("planner", "constant_velocity", width=8)
    plan = planner.sample(Features(observe(ego)), 3)
    assert plan.dt == 0.5
    assert plan.poses.shape == (2, 3, 8, 3)
    for proposal in plan.poses[0]:
        assert proposal[:, 0].tolist() == [2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5, 20.0]
    assert not plan.poses[..., 1:].any()
    assert not plan.poses[1].any()
    assert planner.loss(Features(observe(ego)), Trajectory(torch.zeros(2, 8, 3))) == {}


@pytest.mark.parametrize("family", ["public", "adversarial"])
def test_pdm_closed_scores_as_the_official_reference(family):
    """It makes all of its own progress, and as a plan it fails where the devkit says that PDM-Closed fails."""
    items = [item for item in golden.load(GOLDEN / f"{family}.npz") if item.remove_touching]
    scenes = Scene.cat([item.scene for item in items])
    plan = irlvla.build("planner", "pdm_closed", width=8).sample(seeing(scenes), 1)
    assert plan.poses.shape == (len(scenes), 1, 40, 3)
    assert plan.dt == 0.1
    values = irlvla.epdms(scenes, plan, human_filter="none").values[:, 0]
    torch.testing.assert_close(values[:, METRICS.index("ep")], torch.ones(len(scenes)).double(), rtol=0, atol=1e-6)
    columns = [0, 1, 2, 3, 5, 6, 7]
    official = np.stack([[item.expected[f"pdm_{golden.OFFICIAL[column]}"] for column in columns] for item in items])
    sure = ~np.stack([item.expected["pdm_fragile"][columns] for item in items])
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(values[:, columns].numpy()[sure], official[sure])


def test_pdm_closed_computes_what_scenes_do_not_carry(scenes):
    bare = without_reference(scenes[:3])
    mixed = Scene.cat([scenes[0], bare[1], scenes[2]])
    planner = irlvla.build("planner", "pdm_closed", width=8)
    poses = planner.sample(seeing(mixed), 2).poses
    assert torch.equal(poses[:, 0], poses[:, 1])
    expected = torch.stack([scenes.reference[0], irlvla.pdm_closed(bare)[1], scenes.reference[2]])
    torch.testing.assert_close(poses[:, 0], mixed.in_ego_frame(expected)[:, 1:], rtol=0, atol=0)
    ep = irlvla.epdms(bare, planner.sample(seeing(bare), 1)).ep
    assert ep.min() > 0.99


def test_pdm_closed_does_not_depend_on_the_map_frame(scenes):
    planner = irlvla.build("planner", "pdm_closed", width=8)
    for scene in (scenes[:4], without_reference(scenes[:4])):
        expected = planner.sample(seeing(scene), 1).poses
        torch.testing.assert_close(planner.sample(seeing(moved(scene)), 1).poses, expected, rtol=0, atol=1e-6)


def test_pdm_closed_says_what_it_misses(scenes):
    planner = irlvla.build("planner", "pdm_closed", width=8)
    with pytest.raises(InputError, match=r"planner 'pdm_closed' \(irlvla .*observations have no scene: take a dataset .*privileged: true"):
        planner.sample(Features(observe(torch.zeros(1, 4, 8))), 1)
    lost = with_centerline(without_reference(scenes[1]), [])
    with pytest.raises(InputError, match=f"no plan where there is no centreline: '{scenes.token[1]}'$"):
        planner.sample(seeing(Scene.cat([scenes[0], lost])), 1)


# -- backbone ----------------------------------------------------------------------------------------------------------


def test_status_backbone_sees_each_part_of_the_status():
    torch.manual_seed(0)
    backbone = irlvla.build("backbone", {"name": "status", "width": 32})
    assert backbone.width == 32
    ego = torch.randn(1, 4, 8)
    status = backbone(observe(ego)).status
    assert status.shape == (1, 32)
    for frame in range(4):
        for column in range(8):
            other = ego.clone()
            other[0, frame, column] += 0.5
            assert not torch.equal(backbone(observe(other)).status, status), (frame, column)
    commands = {tuple(backbone(observe(ego, command)).status[0].tolist()) for command in Command}
    assert len(commands) == 4
    longer = torch.cat([torch.full((1, 3, 8), 9.0), ego], 1)
    assert torch.equal(backbone(observe(longer)).status, status)  # only the last 4 frames count


def test_status_backbone_by_hand():
    """Identity weights: the token shows the inputs, in their usual magnitudes."""
    backbone = irlvla.build("backbone", {"name": "status", "width": 12, "frames": 1})
    with torch.no_grad():
        for layer in backbone.mlp[::2]:
            layer.weight.copy_(torch.eye(12))
            layer.bias.zero_()
    ego = torch.zeros(1, 4, 8)
    ego[0, -1] = torch.tensor([5.0, 2.0, 0.05, 12.0, 0.1, 1.5, 3.0, 0.3])
    status = backbone(observe(ego, Command.RIGHT)).status
    torch.testing.assert_close(status, torch.tensor([[0.5, 2.0, 0.5, 1.2, 1.0, 1.5, 3.0, 3.0, 0.0, 0.0, 1.0, 0.0]]))


def test_status_backbone_learns():
    """Twenty steps to tell left from right."""
    torch.manual_seed(0)
    backbone = irlvla.build("backbone", "status")
    obs = Observation.cat([observe(torch.randn(8, 4, 8), Command.LEFT), observe(torch.randn(8, 4, 8), Command.RIGHT)])
    target = torch.tensor([1.0] * 8 + [-1.0] * 8)
    optimizer = torch.optim.Adam(backbone.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        losses.append((backbone(obs).status.mean(1) - target.clamp(min=0.0)).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_status_backbone_keeps_its_scale_with_its_weights():
    torch.manual_seed(0)
    backbone = irlvla.build("backbone", "status")
    with torch.no_grad():
        backbone.scale.mul_(3.0)  # as if a later version had other magnitudes
    fresh = irlvla.build("backbone", "status")
    fresh.load_state_dict(backbone.state_dict())
    obs = observe(torch.randn(2, 4, 8))
    assert torch.equal(fresh(obs).status, backbone(obs).status)


def test_status_backbone_says_what_it_misses():
    backbone = irlvla.build("backbone", "status")
    with pytest.raises(InputError, match=r"backbone 'status' \(irlvla .*reads 4 frames of history, the observation has 2; set frames to"):
        backbone(observe(torch.zeros(1, 2, 8)))
    with pytest.raises(ConfigError, match=r"backbone.frames: .*greater than or equal to 1, got 0"):
        irlvla.build("backbone", {"name": "status", "frames": 0})


# -- reward ------------------------------------------------------------------------------------------------------------


def drifting(scenes: Scene) -> Plan:
    """Three plans for each scene: on at the present speed, straight or to a side."""
    times = torch.arange(1, 9) * 0.5
    speed = scenes.ego[:, 3, None, None].float() * times
    drift = torch.tensor([0.0, 0.15, -0.3])[:, None] * times**2
    x, y = torch.broadcast_tensors(speed, drift)
    return Plan(torch.stack([x, y, torch.zeros_like(x)], -1))


@pytest.mark.parametrize(
    "options",
    [{}, {"human_filter": "none"}, {"human_filter": "legacy"}, {"traffic": "constant_velocity"}, {"traffic": "replay_all"}],
    ids=str,
)
def test_exact_reward_is_the_score(scenes, options):
    plan = drifting(scenes)
    measured = irlvla.build("reward_model", {"name": "exact", **options})(None, scenes, plan)
    expected = irlvla.epdms(scenes, plan, **options)
    assert isinstance(measured, Epdms)
    assert measured.values.shape == (len(scenes), 3, 9)
    torch.testing.assert_close(measured.values, expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(measured.score(), expected.score())
    assert measured.ec.isnan().all()
    assert measured.score().std(1).max() > 0.1  # the plans differ


def test_exact_reward_by_hand():
    measured = irlvla.build("reward_model", "exact")(None, golden.handmade_scene(), Plan(HANDMADE))
    torch.testing.assert_close(measured.values[0, :, :8], doubles(golden.HANDMADE_VALUES)[:, :8], rtol=0, atol=1e-9)


def test_exact_reward_rejects_settings():
    with pytest.raises(ConfigError, match=r"reward_model.traffic: .*'log', 'replay_all', 'constant_velocity' or 'reactive', got 'logs'"):
        irlvla.build("reward_model", {"name": "exact", "traffic": "logs"})


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_epdms_metric_by_hand():
    """Of the four plans the third is driven (off the road), and the last is the best."""
    plan = Plan(HANDMADE, score=doubles([[0.0, 1.0, 2.0, 0.5]]))
    values = irlvla.build("metric", {"name": "epdms", "pdms": True})(golden.handmade_scene(), plan)
    assert list(values) == ["epdms", *METRICS, "pdms", "max_epdms"]
    assert all(value.shape == (1,) for value in values.values())
    assert values["epdms"].item() == values["pdms"].item() == 0.0
    for name, expected in zip(METRICS[:8], golden.HANDMADE_VALUES[2][:8], strict=True):
        assert values[name].item() == expected, name
    assert values["ec"].isnan().all()
    brake = golden.HANDMADE_VALUES[0]
    assert values["max_epdms"].item() == pytest.approx((5 * brake[4] + 9) / 14, abs=1e-9)  # to brake; passing leaves the lane: 12 / 14
    only = irlvla.build("metric", "epdms")(golden.handmade_scene(), Plan(HANDMADE[:, :1]))
    assert list(only) == ["epdms", *METRICS]
    assert only["epdms"].item() == values["max_epdms"].item()


def test_epdms_metric_is_the_official_score(items):
    """Without EC, which a metric does not see."""
    metric, compared = irlvla.build("metric", "epdms"), 0
    for item in items:
        sure = ~(item.fragile[:, :8] | item.human_fragile[:8]).any(1)
        if item.remove_touching and sure.any():
            rows = sure.nonzero()[0]
            values = metric(item.scene[[0] * len(rows)], Plan(torch.from_numpy(item.candidates[rows, None])))
            np.testing.assert_allclose(values["epdms"].numpy(), item.expected["epdms_without_ec"][rows], rtol=0, atol=1e-6)
            compared += len(rows)
    assert compared > 150


def test_epdms_metric_passes_its_settings_on(scenes):
    plan = drifting(scenes)
    for options in ({"human_filter": "none"}, {"traffic": "constant_velocity"}):
        values = irlvla.build("metric", {"name": "epdms", **options})(scenes, plan)
        expected = irlvla.epdms(scenes, plan, **options).score()
        assert torch.equal(values["epdms"], expected[:, 0])
        assert torch.equal(values["max_epdms"], expected.amax(1))
    short = dataclasses.replace(scenes, agent_state=scenes.agent_state[:, :41], agent_valid=scenes.agent_valid[:, :41])
    with pytest.raises(InputError, match="need 51 steps"):
        irlvla.build("metric", {"name": "epdms", "pdms": True})(short, plan)


def drives(*speeds: float, y: float = 0.0, dt: float = 0.5, seconds: float = 4.0) -> torch.Tensor:
    """Drives "K T 3" straight on at these speeds, at a distance to the left that begins with the first pose."""
    times = torch.arange(1, round(seconds / dt) + 1).double() * dt
    return torch.stack([torch.stack([speed * times, torch.full_like(times, y), torch.zeros_like(times)], -1) for speed in speeds])


def driven_by(human: torch.Tensor, dt: float = 0.5) -> Scene:
    """A scene whose human drove "T 3"."""
    return dataclasses.replace(golden.handmade_scene(), human=human[None], human_dt=dt)


def test_displacement_by_hand():
    scene, metric = driven_by(drives(10.0)[0]), irlvla.build("metric", "displacement")
    values = metric(scene, Plan(drives(9.0)[None]))  # 0.5, 1, ... 4 m behind
    assert {name: value.tolist() for name, value in values.items()} == {
        "ade": [2.25], "fde": [4.0], "ahe": [0.0], "fhe": [0.0], "miss_rate": [1.0],
    }  # fmt: skip
    beside = metric(scene, Plan(drives(10.0, y=2.0)[None]))
    assert [beside[name].item() for name in ("ade", "fde", "miss_rate")] == [2.0, 2.0, 0.0]  # 2 m is not yet a miss
    assert metric(scene, Plan(drives(10.0, y=2.001)[None]))["miss_rate"].item() == 1.0
    strict = irlvla.build("metric", {"name": "displacement", "miss_distance": 1.0})
    assert strict(scene, Plan(drives(10.0, y=2.0)[None]))["miss_rate"].item() == 1.0
    assert torch.equal(metric(scene, Plan(drives(10.0)[None].float()))["fde"], doubles([0.0]))


def test_displacement_of_headings_takes_the_short_way_round():
    human, plan = drives(10.0)[0], drives(10.0)
    human[:, 2], plan[..., 2] = 3.1, -3.1
    plan[0, -1, 2] = 3.0
    values = irlvla.build("metric", "displacement")(driven_by(human), Plan(plan[None]))
    short = 2 * math.pi - 6.2
    assert values["ahe"].item() == pytest.approx((7 * short + 0.1) / 8)
    assert values["fhe"].item() == pytest.approx(0.1)
    assert values["ade"].item() == 0.0


def test_displacement_of_the_proposal_that_is_driven_and_of_the_best():
    first, second, third = drives(9.0), drives(10.0, y=3.0), drives(10.0)
    third[..., -1, 1] = 3.5  # best on average, not at the end
    proposals = torch.cat([first, second, third])[None]
    scene, metric = driven_by(drives(10.0)[0]), irlvla.build("metric", "displacement")
    values = metric(scene, Plan(proposals, score=doubles([[0.0, 7.0, 1.0]])))
    assert [values[name].item() for name in ("ade", "fde", "min_ade", "min_fde")] == [3.0, 3.0, 3.5 / 8, 3.0]
    assert metric(scene, Plan(proposals))["ade"].item() == 2.25
    assert "min_ade" not in metric(scene, Plan(first[None]))


@pytest.mark.parametrize("dt", [0.1, 0.2, 0.4, 0.8, 1.0, 4.0])
def test_displacement_at_the_times_of_the_human(dt):
    """A plan at constant speed is the same at any interval, also between its poses; and what one reaches alone does not count."""
    metric = irlvla.build("metric", "displacement")
    for human in (drives(10.0), drives(10.0, dt=0.1), drives(10.0, seconds=8.0)):
        values = metric(driven_by(human[0], 0.1 if human.shape[1] == 40 else 0.5), Plan(drives(9.0, dt=dt)[None], dt))
        assert values["ade"].item() == pytest.approx(2.05 if human.shape[1] == 40 else 2.25, abs=1e-12)
        assert values["fde"].item() == pytest.approx(4.0, abs=1e-12)
    short = metric(driven_by(drives(10.0, seconds=2.0)[0]), Plan(drives(9.0, dt=dt)[None], dt))
    assert short["fde"].item() == pytest.approx(2.0, abs=1e-12)
    assert short["ade"].item() == pytest.approx(1.25, abs=1e-12)


def test_displacement_between_poses_turns_the_short_way():
    plan = torch.zeros(1, 1, 4, 3)
    plan[..., 2] = torch.tensor([3.0, -3.0, -3.0, -3.0])
    human = torch.zeros(8, 3).double()
    values = irlvla.build("metric", "displacement")(driven_by(human), Plan(plan, 1.0))
    between = math.pi  # half way from 3 to -3
    assert values["ahe"].item() == pytest.approx((1.5 + 3.0 + between + 5 * 3.0) / 8, abs=1e-6)


def test_displacement_where_no_human_was_recorded(scenes):
    nobody = scenes.human.isnan().flatten(1).any(1)
    assert 0 < nobody.sum() < len(scenes)
    plan = Plan(torch.zeros(len(scenes), 2, 8, 3))
    for name, value in irlvla.build("metric", "displacement")(scenes, plan).items():
        assert torch.equal(value.isnan(), nobody), name


def test_displacement_explains_what_does_not_fit():
    metric, scene = irlvla.build("metric", "displacement"), golden.handmade_scene()
    with pytest.raises(InputError, match=r"1 scenes need plans of shape \(1, K, T, 3\), got \(2, 1, 8, 3\)"):
        metric(scene, Plan(torch.zeros(2, 1, 8, 3)))
    with pytest.raises(InputError, match="NaN or infinity"):
        metric(scene, Plan(torch.full((1, 1, 8, 3), math.nan)))
    with pytest.raises(InputError, match=r"end after 0.4 s, before the human's first pose at 0.5 s"):
        metric(scene, Plan(torch.zeros(1, 1, 4, 3), 0.1))


# -- dataset -----------------------------------------------------------------------------------------------------------


def dataset(path, **settings):
    return irlvla.build("dataset", {"name": "scenes", "path": str(path), **settings})


@pytest.fixture
def folder(tmp_path, scenes) -> Path:
    """Ten scenes in files of 3, 1, 0 and 6, one of them in a folder of its own."""
    (tmp_path / "b").mkdir()
    for name, rows in {"a": slice(0, 3), "b/a": slice(3, 4), "c": slice(0, 0), "d": slice(4, 10)}.items():
        scenes[rows].save(tmp_path / f"{name}.safetensors")
    (tmp_path / "notes.txt").write_text("not a scene")
    return tmp_path


def assert_same(a: Batch, b: Batch) -> None:
    one, other = dict(a.tensors()), dict(b.tensors())
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True)


def test_scenes_come_in_order_of_their_files(folder, scenes):
    data = dataset(folder)
    assert len(data) == 10
    for row, (obs, scene, human) in enumerate(data):
        assert obs.token == scene.token == scenes[row].token
        assert_same(scene, scenes[row])
        assert_same(obs.scene, scenes[row])
        assert human.poses.dtype == torch.float32
        torch.testing.assert_close(human.poses, scenes[row].human.float(), equal_nan=True)
        assert human.dt == scenes.human_dt
        assert len(obs) == len(scene) == len(human) == 1
    assert row == 9
    assert_same(dataset(folder / "d.safetensors")[2][1], scenes[6])


def test_rows_of_a_dataset(folder):
    data = dataset(folder)
    for row in (0, 2, 3, 4, 9):
        assert data[row - 10][1].token == data[row][1].token == data[np.int64(row)][1].token
    for row in (10, -11):
        with pytest.raises(IndexError, match=r"dataset 'scenes' \(irlvla .*has 10 scenes, there is none at"):
            data[row]
    with pytest.raises(TypeError):
        data[1.0]


def test_what_a_policy_sees_by_hand(tmp_path):
    """The car is at (100, 200), heading along +y; half a second ago it was 5 m behind and 1 m to the right, turned by 0.1."""
    scene = golden.handmade_scene()
    past, now = [101.0, 195.0, math.pi / 2 - 0.1, 9.0, 0.1, 0.5, -0.2, 0.05], [100.0, 200.0, math.pi / 2, 10.0, 0.0, 1.0, 0.0, 0.0]
    scene = dataclasses.replace(
        scene, ego=doubles([[*now, 0.0, 0.0, 0.0]]), history=doubles([[past, now]]), history_time_us=scene.history_time_us[:, -2:]
    )
    scene.save(tmp_path / "x.safetensors")
    obs, _, human = dataset(tmp_path)[0]
    assert obs.ego.dtype == torch.float32
    # Velocity and acceleration are the car's own of that time: they do not turn with the map.
    expected = torch.tensor([[[-5.0, -1.0, -0.1, 9.0, 0.1, 0.5, -0.2, 0.05], [0.0, 0.0, 0.0, 10.0, 0.0, 1.0, 0.0, 0.0]]])
    torch.testing.assert_close(obs.ego, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(human.poses.double(), scene.human, rtol=0, atol=1e-5)
    assert obs.images is obs.prompt is obs.intrinsics is None


def test_what_a_policy_sees_does_not_depend_on_the_map_frame(tmp_path, scenes):
    scenes.save(tmp_path / "here.safetensors")
    moved(scenes).save(tmp_path / "there.safetensors")
    for (here, _, human), (there, _, same) in zip(
        dataset(tmp_path / "here.safetensors"), dataset(tmp_path / "there.safetensors"), strict=True
    ):
        torch.testing.assert_close(there.ego, here.ego, rtol=0, atol=1e-4)
        assert torch.equal(there.command, here.command)
        torch.testing.assert_close(same.poses, human.poses, equal_nan=True)
        assert not here.ego[:, -1, :3].any()  # the last frame is the ego frame itself


def test_the_truth_can_be_withheld(folder):
    obs, scene, _ = dataset(folder, privileged=False)[5]
    assert obs.scene is None
    assert scene.token == obs.token


def arc(curvature: float, before: float = 10.0, length: float = 100.0, offset: float = 0.0) -> list[tuple[float, float, float]]:
    """A centreline that bends from (0, offset) on, with a point every metre."""
    points = []
    for s in np.arange(-before, length + 0.5):
        bent = max(s, 0.0)
        x, y = (bent, 0.0) if curvature == 0.0 else (math.sin(curvature * bent) / curvature, (1 - math.cos(curvature * bent)) / curvature)
        points.append((x + min(s, 0.0), y + offset, curvature * bent))
    return points


def test_commands_follow_the_route():
    scene = golden.handmade_scene()
    assert command_of(with_centerline(scene, arc(0.0))) is Command.STRAIGHT
    for side, command in ((1.0, Command.LEFT), (-1.0, Command.RIGHT)):
        for curvature, expected in ((0.05, command), (0.0102, command), (0.0098, Command.STRAIGHT)):  # 2 m at 20 m: 1 / 100 m
            bend = with_centerline(scene, arc(side * curvature))
            assert command_of(bend) is expected
            for there in (moved(bend), moved(bend, turn=-3.0)):
                assert command_of(there) is expected
    assert command_of(with_centerline(scene, [(0.0, 0.0, 0.0), (20.0, 2.0, 0.0), (40.0, 4.0, 0.0)])) is Command.STRAIGHT  # 1.99 m at 20 m
    assert command_of(with_centerline(scene, [(0.0, 0.0, 0.0), (10.0, 0.0, 0.0), (10.0, 2.0, 0.0), (30.0, 2.0, 0.0)])) is Command.LEFT


def test_commands_where_headings_jump():
    """The headings of a road to the west are pi or -pi; halfway between two points it still leads west, and bends to the north."""
    west = [(5.0, 0.0, math.pi), (-5.0, 0.0, -math.pi), (-15.0, 0.0, math.pi), (-25.0, 6.0, 2.6)]
    assert command_of(with_centerline(golden.handmade_scene(), west)) is Command.RIGHT


def test_commands_are_relative_to_the_route_not_to_the_car():
    """Neither a car at the edge of its lane nor one that points aside is told to turn."""
    scene = golden.handmade_scene()
    assert command_of(with_centerline(scene, arc(0.0, offset=3.0))) is Command.STRAIGHT
    askew = dataclasses.replace(scene, ego=scene.ego + doubles([0.0, 0.0, 0.5, *[0.0] * 8]))
    assert command_of(with_centerline(askew, arc(0.0))) is Command.STRAIGHT


def test_commands_at_the_ends_of_a_route():
    scene = golden.handmade_scene()
    assert command_of(with_centerline(scene, [])) is Command.UNKNOWN
    assert command_of(with_centerline(scene, [(0.0, 0.0, 0.0)])) is Command.UNKNOWN
    assert command_of(with_centerline(scene, [(0.0, 0.0, 0.0)] * 2)) is Command.UNKNOWN
    assert command_of(with_centerline(scene, arc(0.05, length=5.0))) is Command.STRAIGHT  # it ends 0.6 m to the left
    assert command_of(with_centerline(scene, arc(0.05, length=12.0))) is Command.LEFT
    beyond = dataclasses.replace(scene, ego=scene.ego + doubles([500.0, *[0.0] * 10]))
    assert command_of(with_centerline(scene, arc(0.05))) is Command.LEFT
    assert command_of(with_centerline(beyond, arc(0.01))) is Command.STRAIGHT  # the nearest point is the last


def test_golden_roads_have_the_commands_of_their_shape(items):
    commands = {item.name: command_of(item.scene) for item in items}
    assert {command for name, command in commands.items() if name.startswith(("straight", "highspeed"))} == {Command.STRAIGHT}
    assert set(commands.values()) == {Command.LEFT, Command.STRAIGHT, Command.RIGHT}


def test_files_are_read_when_needed_and_one_is_kept(folder, monkeypatch):
    read, held, load = [], [], Scene.load

    def watched(path):
        assert not any(scenes() for scenes in held), "two files in memory"
        read.append(path.name)
        scenes = load(path)
        held.append(weakref.ref(scenes))
        return scenes

    data = dataset(folder)
    monkeypatch.setattr(Scene, "load", watched)
    assert read == []
    items = list(data)  # what was taken out does not hold its file
    assert read == ["a.safetensors", "a.safetensors", "d.safetensors"]
    for row in (9, 0, 5):
        data[row]
    assert read[3:] == ["a.safetensors", "d.safetensors"]
    assert len(items) == 10


def test_a_dataset_pickles_without_what_it_has_read(folder):
    data = dataset(folder)
    before = len(pickle.dumps(data))
    token = data[7][1].token
    assert len(pickle.dumps(data)) == before
    again = pickle.loads(pickle.dumps(data))
    assert again[7][1].token == token
    assert len(again) == 10


def joined(items) -> tuple[Batch, ...]:
    return tuple(type(parts[0]).cat(parts) for parts in zip(*items, strict=True))


def test_workers_read_the_same(folder):
    def batches(workers: int) -> list[tuple[Batch, ...]]:
        return list(DataLoader(dataset(folder), 4, num_workers=workers, collate_fn=joined))

    alone, helped = batches(0), batches(2)
    assert [len(batch[0]) for batch in alone] == [4, 4, 2]
    for one, other in zip(alone, helped, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


def test_paths_that_hold_no_scenes(folder, tmp_path, scenes):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"d.safetensor does not exist. Did you mean 'd.safetensors'\?"):
        dataset(folder / "d.safetensor")
    with pytest.raises(FileError, match=r"bb does not exist. Did you mean 'b'\?"):
        dataset(folder / "bb" / "a.safetensors")
    with pytest.raises(FileError, match=r"more does not exist\."):
        dataset(folder / "notes.txt" / "more")
    with pytest.raises(FileError, match=r"empty holds no .safetensors file; write one with Scene.save"):
        dataset(tmp_path / "empty")
    with pytest.raises(FileError, match="holds no scenes"):
        dataset(folder / "c.safetensors")
    with pytest.raises(ConfigError, match=r"dataset.path: needs a value.*a file that Scene.save wrote"):
        irlvla.build("dataset", "scenes")


def test_files_of_something_else(folder):
    with pytest.raises(FileError, match=r"notes.txt is not a whole file of scenes"):
        dataset(folder / "notes.txt")
    Plan(torch.zeros(1, 1, 8, 3)).save(folder / "plan.safetensors")
    with pytest.raises(FileError, match=r"plan.safetensors holds 'Plan', not 'Scene'"):
        dataset(folder)
    (folder / "plan.safetensors").unlink()
    os.truncate(folder / "a.safetensors", 1000)
    with pytest.raises(FileError, match=r"a.safetensors is not a whole file of scenes"):
        dataset(folder)


def test_files_that_change_under_a_dataset(folder, scenes):
    data = dataset(folder)
    scenes[:2].save(folder / "d.safetensors")
    with pytest.raises(FileError, match=r"d.safetensors has changed: it holds 2 scenes now"):
        data[4]
    whole = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(FileError, match=r"a.safetensors is corrupt"):
        data[0]
    (folder / "a.safetensors").unlink()
    with pytest.raises(FileError, match=r"a.safetensors does not exist"):
        data[0]


def test_from_files_to_a_score(folder):
    """What an evaluation does, with the built-in parts alone."""
    obs, scene, _ = joined(dataset(folder))
    metric, scores = irlvla.build("metric", "epdms"), {}
    for name in ("constant_velocity", "pdm_closed"):
        policy = Policy(irlvla.build("backbone", "status"), irlvla.build("planner", name, width=64))
        scores[name] = metric(scene, policy.sample(obs))["epdms"].mean().item()
    assert scores["pdm_closed"] > scores["constant_velocity"]


def test_results_are_the_same_on_every_device(folder, device):
    obs, scene, _ = joined(dataset(folder))
    obs, scene = (dataclasses.replace(obs, scene=without_reference(scene)), without_reference(scene))

    def run(device: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        results = {}
        for name in ("constant_velocity", "pdm_closed"):
            policy = Policy(irlvla.build("backbone", "status"), irlvla.build("planner", name, width=64)).to(device)
            seen, there = obs.to(device), scene.to(device)
            plan = policy.sample(seen, 2)
            results |= {f"{name} status": policy(seen).status, f"{name} poses": plan.poses}
            results |= {f"{name} reward": irlvla.build("reward_model", "exact")(seen, there, plan).score()}
            for metric in ("epdms", "displacement"):
                results |= {f"{name} {key}": value for key, value in irlvla.build("metric", metric)(there, plan).items()}
        assert {value.device.type for value in results.values()} == {device}
        return {name: value.detach().cpu() for name, value in results.items()}

    expected = run("cpu")
    assert len(expected) == 2 * (3 + 11 + 7)
    for name, value in run(device).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


# -- datasets that make records ----------------------------------------------------------------------------------------

test_synthetic = dataset_checks("synthetic", count=4, size=[32, 64])
test_synthetic_unseen = dataset_checks("synthetic", count=3, split="unseen", privileged=False)


def test_synthetic_items_are_those_of_its_records(tmp_path: Path) -> None:
    """What is rendered and what is converted are the same scenes; the images differ by what JPEG loses."""
    dataset = build("dataset", {"name": "synthetic", "count": 3, "size": [64, 96]})
    writer = ShardWriter(tmp_path, {"name": "synthetic"})
    for index in range(3):
        writer.add(dataset.record(index))
    writer.close()
    cached = build("dataset", {"name": "cached", "path": str(tmp_path), "size": [64, 96]})
    for index in range(3):
        (obs, scene, human), (again, other, _) = dataset[index], cached[index]
        assert scene.token == other.token == obs.token
        assert torch.equal(obs.command, again.command)
        assert torch.equal(obs.ego, again.ego)
        assert torch.allclose(obs.intrinsics, again.intrinsics)
        assert (obs.images.float() - again.images.float()).abs().mean() < 6
        assert human.poses.shape == (1, 8, 3)
