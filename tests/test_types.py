"""Batches: selection, concatenation, devices and dtypes, files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlvla.errors import FileError, InputError
from irlvla.types import Batch, Command, Details, Epdms, Features, Observation, Pdms, Plan, Rollout, Scene, Trajectory

# -- building blocks ---------------------------------------------------------------------------------------------------


def make_scene(seed: int, agents: int = 3, polygons: int = 2, rings: int = 2, lights: int = 1, points: int = 5, steps: int = 41) -> Scene:
    """One scene of random content; counts may be 0."""
    g = torch.Generator().manual_seed(seed)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def integer(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g)

    ring_counts = 1 + integer(rings, polygons)
    point_counts = 3 + integer(4, int(ring_counts.sum()))
    return Scene(
        token=(f"scene-{seed}-ü",),
        time_us=integer(10**15, 1),
        ego=real(1, 11),
        history_time_us=integer(10**15, 1, 4),
        history=real(1, 4, 8),
        human=real(1, 8, 3),
        human_dt=0.5,
        human_values=None,
        reference=real(1, 41, 3),
        previous_time_us=integer(10**15, 1),
        previous_ego=real(1, 11),
        speed_limit=torch.full((1,), math.nan, dtype=torch.float64),
        agent_offsets=torch.tensor([0, agents]),
        agent_token=tuple(f"{seed}:{i}" for i in range(agents)),
        agent_kind=integer(7, agents),
        agent_size=real(agents, 2),
        agent_valid=integer(2, agents, steps).bool(),
        agent_state=real(agents, steps, 5),
        polygon_offsets=torch.tensor([0, polygons]),
        polygon_layer=integer(18, polygons),
        polygon_on_route=integer(2, polygons).bool(),
        ring_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), ring_counts.cumsum(0)]),
        point_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), point_counts.cumsum(0)]),
        points=real(int(point_counts.sum()), 2),
        light_offsets=torch.tensor([0, lights]),
        light_polygon=integer(max(polygons, 1), lights),
        light_red=integer(2, lights, 41).bool(),
        centerline_offsets=torch.tensor([0, points]),
        centerline=real(points, 3),
    )


def make_epdms(b: int = 2, k: int = 3) -> Epdms:
    """Scores of B x K candidates, with everything nested."""
    g = torch.Generator().manual_seed(b * 100 + k)

    def real(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    def steps() -> torch.Tensor:
        return torch.randint(-1, 41, (b, k), generator=g)

    def bits(n: int) -> torch.Tensor:
        return torch.rand((b, k, n), generator=g) < 0.5

    details = Details(
        states=real(b, k, 41, 11), progress=real(b, k), reference_progress=real(b, k), collision_step=steps(), collision_agent=steps(),
        ttc_step=steps(), ttc_agent=steps(), multiple_lanes=bits(41), off_road=bits(41), off_route=bits(41), in_intersection=bits(41),
        red_light=bits(41), oncoming_metres=real(b, k), off_centre_steps=steps(), comfort=bits(6),
    )  # fmt: skip
    return Epdms(real(b, k, 9), raw=real(b, k, 9), human_filter="fixed", details=details, pdms=Pdms(real(b, k, 6)))


def make_observation(b: int = 3, privileged: bool = True) -> Observation:
    """B observations of random content, of scenes of different sizes."""
    g = torch.Generator().manual_seed(b)
    scenes = Scene.cat([make_scene(i, agents=i, points=i) for i in range(b)])
    return Observation(
        token=scenes.token,
        ego=torch.randn(b, 4, 8, generator=g),
        command=torch.arange(b) % len(Command),
        images=torch.randint(256, (b, 2, 3, 4, 5), generator=g, dtype=torch.uint8),
        prompt=tuple(f"go {i}" for i in range(b)),
        scene=scenes if privileged else None,
    )


def make_features(b: int = 3) -> Features:
    """Tokens of B observations, with predictions whose names have dots."""
    g = torch.Generator().manual_seed(b)
    predictions = {"boxes": torch.randn(b, 5, 7, generator=g), "head.logits": torch.randn(b, 5, generator=g)}
    bev, status = torch.randn(b, 6, 2, 2, generator=g), torch.randn(b, 6, generator=g)
    return Features(make_observation(b), bev=bev, status=status, predictions=predictions)


def make_rollout(b: int = 3, k: int = 2, steps: int = 4) -> Rollout:
    """B scenes with K plans each, sampled in some steps."""
    g = torch.Generator().manual_seed(b)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    plan = Plan(real(b, k, 8, 3), trace=real(b, k, steps + 1, 8, 3))
    return Rollout(make_observation(b), Trajectory(real(b, 8, 3)), plan, real(b, k, steps), real(b, k), real(b, k, 9))


def assert_same(a: Batch, b: Batch) -> None:
    assert type(a) is type(b)
    for f in dataclasses.fields(a):
        assert_same_value(f.name, getattr(a, f.name), getattr(b, f.name))


def assert_same_value(name: str, x: object, y: object) -> None:
    if isinstance(x, torch.Tensor):
        assert x.dtype == y.dtype, name
        assert x.shape == y.shape, name
        assert torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0)), name
    elif isinstance(x, Batch):
        assert_same(x, y)
    elif isinstance(x, dict):
        assert list(x) == list(y), name
        for key, value in x.items():
            assert_same_value(f"{name}.{key}", value, y[key])
    else:
        assert x == y, name


SIZES = st.fixed_dictionaries({name: st.integers(0, 3) for name in ("agents", "polygons", "lights", "points")})
SCENES = st.lists(st.tuples(st.integers(0, 9), SIZES), min_size=1, max_size=5).map(
    lambda items: [make_scene(seed, **sizes) for seed, sizes in items]
)

# -- selection ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(SCENES)
def test_ragged_cat_then_select_returns_the_scenes(scenes):
    batch = Scene.cat(scenes)
    assert len(batch) == len(scenes)
    for i, scene in enumerate(scenes):
        assert_same(batch[i], scene)
        assert_same(batch[i - len(scenes)], scene)


@settings(max_examples=50, deadline=None)
@given(SCENES, st.data())
def test_ragged_selection_by_any_index_is_cat_of_the_chosen(scenes, data):
    batch, n = Scene.cat(scenes), len(scenes)
    rows = data.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=6))
    expected = Scene.cat([scenes[i] for i in rows])
    for index in (rows, torch.tensor(rows), np.array(rows), torch.tensor(rows, dtype=torch.int32)):
        assert_same(batch[index], expected)
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    assert_same(batch[mask], Scene.cat([s for s, keep in zip(scenes, mask, strict=True) if keep]))
    assert_same(batch[torch.tensor(mask)], batch[np.array(mask)])
    cut = slice(data.draw(st.integers(-n, n)), data.draw(st.integers(-n, n)), data.draw(st.sampled_from([None, 1, 2, -1])))
    if scenes[cut]:
        assert_same(batch[cut], Scene.cat(scenes[cut]))


@pytest.mark.parametrize("index", [[], slice(0, 0), torch.tensor([], dtype=torch.int64), torch.zeros(2, dtype=torch.bool)], ids=repr)
def test_empty_selection(index):
    batch = Scene.cat([make_scene(0), make_scene(1)])
    empty = batch[index]
    assert len(empty) == 0
    assert empty.agent_offsets.tolist() == [0]
    assert empty.ring_offsets.tolist() == [0]
    assert empty.points.shape == (0, 2)
    assert empty.agent_token == ()
    assert_same(Scene.cat([empty, batch]), batch)
    assert len(make_epdms()[index]) == 0


def test_iteration_ends():
    scenes = [make_scene(i) for i in range(3)]
    assert [scene.token for scene in Scene.cat(scenes)] == [scene.token for scene in scenes]
    assert len(list(make_epdms(b=4))) == 4


def test_dense_selection_reaches_nested_batches():
    epdms = make_epdms(3, 4)
    assert len(epdms) == 3
    first = epdms[0]
    assert first.values.shape == (4, 9)
    assert first.details.states.shape == (4, 41, 11)
    assert first.pdms.values.shape == (4, 6)
    assert first.human_filter == "fixed"
    assert_same(epdms[-1], epdms[2])
    assert_same(epdms[1:], epdms[[1, 2]])
    assert_same(epdms[::-1], epdms[torch.tensor([2, 1, 0])])
    assert_same(epdms[np.int64(1)], epdms[torch.tensor(1)])
    assert_same(epdms[[True, False, True]], epdms[::2])
    assert epdms[1:].values.data_ptr() == epdms.values[1].data_ptr()  # a slice is a view
    assert first[2].details.progress.item() == epdms.details.progress[0, 2].item()


def test_dense_batches_keep_strings_as_tuples():
    @dataclasses.dataclass(frozen=True)
    class Prompted(Batch):
        prompt: tuple[str, ...]
        speed: torch.Tensor

    batch = Prompted(("go", "stop", "turn"), torch.arange(3.0))
    assert batch[1].prompt == ("stop",)
    assert batch[::2].prompt == ("go", "turn")
    assert_same(Prompted.stack([batch[0], batch[1], batch[2]]), batch)


@pytest.mark.parametrize("make", [make_observation, make_features, make_rollout])
def test_items_with_names_or_ragged_rows_are_batches_of_one(make):
    """An axis that strings and ragged rows do not have cannot be dropped from the tensors beside them."""
    batch = make(3)
    items = list(batch)
    assert [len(item) for item in items] == [1, 1, 1]
    assert [item.device for item in items] == [torch.device("cpu")] * 3
    assert_same(items[1], batch[1:2])
    assert_same(batch[-1], batch[[2]])
    assert_same(type(batch).stack(items), batch)
    assert_same(type(batch).cat(items[:1] + items[1:]), batch)


def test_an_item_of_an_observation_has_its_own_scene():
    obs = make_observation(3)
    assert obs[2].token == obs[2].scene.token == ("scene-2-ü",)
    assert obs[2].ego.shape == (1, 4, 8)
    assert obs[2].images.shape == (1, 2, 3, 4, 5)
    assert obs[2].prompt == ("go 2",)
    assert_same(obs[2].scene, make_scene(2, agents=2, points=2))
    assert_same(obs[[False, True, True]].scene, obs.scene[1:])
    assert make_observation(3, privileged=False)[0].scene is None
    rollout = make_rollout(3)[1]
    assert rollout.plan.poses.shape == (1, 2, 8, 3)
    assert rollout.observation.scene.token == rollout.observation.token


def test_selection_reaches_dictionaries():
    features = make_features(3)
    picked = features[[2, 0]]
    assert torch.equal(picked.predictions["head.logits"], features.predictions["head.logits"][[2, 0]])
    assert features[1:].predictions["boxes"].shape == (2, 5, 7)
    assert dict(features.tensors())["predictions.boxes"] is features.predictions["boxes"]

    @dataclasses.dataclass(frozen=True)
    class Losses(Batch):
        parts: dict[str, torch.Tensor]

    losses = Losses({"a": torch.arange(3.0), "b": torch.arange(6.0).reshape(3, 2)})
    assert len(losses) == 3
    assert losses[2].parts["b"].tolist() == [4.0, 5.0]
    assert_same(Losses.stack(list(losses)), losses)
    with pytest.raises(InputError, match="no leading axis"):
        len(losses[0])
    with pytest.raises(InputError, match="no data"):
        len(Losses({}))


@pytest.mark.parametrize("index", [3, -4, [0, 3], torch.tensor([-4]), [True, False]], ids=repr)
@pytest.mark.parametrize("make", [lambda: Scene.cat([make_scene(i) for i in range(3)]), lambda: make_epdms(3), make_features])
def test_out_of_range_is_an_index_error(make, index):
    with pytest.raises(IndexError):
        make()[index]


@pytest.mark.parametrize("index", [None, ..., 1.0, [0.5], "0", True, (0, 1), [[0]], torch.ones(1, 1, dtype=torch.bool), {0}], ids=repr)
@pytest.mark.parametrize("make", [lambda: make_scene(0), lambda: make_epdms(1), lambda: make_features(1)])
def test_index_of_a_wrong_kind(make, index):
    with pytest.raises(InputError, match="leading axis"):
        make()[index]


def test_no_axis_left():
    score = Pdms(torch.tensor(1.0))
    with pytest.raises(InputError, match="no leading axis"):
        len(score)
    with pytest.raises(InputError, match="no leading axis"):
        make_epdms()[0][0][0]


# -- concatenation -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_dense_cat_and_select(sizes, data):
    parts = [make_epdms(b) for b in sizes]
    whole = Epdms.cat(parts)
    assert len(whole) == sum(sizes)
    i = data.draw(st.integers(0, len(parts) - 1))
    start = sum(sizes[:i])
    assert_same(whole[start : start + sizes[i]], parts[i])
    assert_same(Epdms.stack(list(whole)), whole)


def test_stack_adds_an_axis():
    plans = [Plan(torch.full((2, 8, 3), float(i)), score=torch.full((2,), float(i))) for i in range(3)]
    stacked = Plan.stack(plans)
    assert stacked.poses.shape == (3, 2, 8, 3)
    assert stacked.score.shape == (3, 2)
    assert stacked.trace is None
    assert_same(stacked[1], plans[1])
    assert_same(Scene.stack([make_scene(0), make_scene(1)]), Scene.cat([make_scene(0), make_scene(1)]))
    assert_same(Plan.stack(iter(plans)), stacked)  # any iterable


def test_cat_explains_what_does_not_fit():
    poses = torch.zeros(1, 2, 8, 3)
    with pytest.raises(InputError, match="at least one"):
        Plan.cat([])
    with pytest.raises(InputError, match="'score' is present in some items and missing in others"):
        Plan.cat([Plan(poses), Plan(poses, score=torch.zeros(1, 2))])
    with pytest.raises(InputError, match="'dt' differs"):
        Plan.cat([Plan(poses), Plan(poses, dt=0.1)])
    with pytest.raises(InputError, match=r"'poses' does not fit together: \(1, 2, 8, 3\), \(1, 3, 8, 3\)"):
        Plan.cat([Plan(poses), Plan(torch.zeros(1, 3, 8, 3))])
    with pytest.raises(InputError, match="Trajectory"):
        Plan.cat([Plan(poses), Trajectory(poses)])
    with pytest.raises(InputError, match="'agent_valid'"):
        Scene.cat([make_scene(0, steps=41), make_scene(1, steps=51)])
    with pytest.raises(InputError, match="'scene' is present in some items and missing in others"):
        Observation.cat([make_observation(1), make_observation(1, privileged=False)])


def test_cat_of_dictionaries_explains_what_does_not_fit():
    whole = make_features(2)
    with pytest.raises(InputError, match=r"'predictions' has other keys in other items: \['boxes', 'head.logits'\], \['boxes'\]"):
        Features.cat([whole, dataclasses.replace(whole, predictions={"boxes": torch.zeros(2, 5, 7)})])
    with pytest.raises(InputError, match="'predictions' has other keys"):
        Features.cat([whole, dataclasses.replace(whole, predictions={})])
    with pytest.raises(InputError, match=r"'predictions.boxes' does not fit together: \(2, 5, 7\), \(2, 4, 7\)"):
        Features.cat([whole, dataclasses.replace(whole, predictions={**whole.predictions, "boxes": torch.zeros(2, 4, 7)})])
    bare = dataclasses.replace(whole, predictions={})
    assert_same(Features.cat([bare, bare])[2:], bare)


# -- devices and dtypes ------------------------------------------------------------------------------------------------


def test_to_changes_floating_point_only_and_reaches_nested_batches():
    epdms = make_epdms().to(torch.float32)
    assert epdms.values.dtype == epdms.details.states.dtype == epdms.pdms.values.dtype == torch.float32
    assert epdms.details.collision_step.dtype == torch.int64
    assert epdms.details.off_road.dtype == torch.bool
    assert make_epdms().to("cpu", torch.float16, non_blocking=True).values.dtype == torch.float16
    assert make_epdms().to(device=torch.device("meta")).details.states.is_meta
    assert make_epdms().to("meta").device.type == "meta"
    assert_same(make_epdms().to("cpu"), make_epdms())
    with pytest.raises(InputError, match="floating-point"):
        make_epdms().to(torch.int32)


def test_a_dtype_spares_the_scene_that_is_part_of_another_batch():
    """Map coordinates of 4e6 m have steps of half a metre in float32, and of 32 km in bfloat16."""
    for batch in (make_features(2), make_rollout(2)):
        small = batch.to(torch.bfloat16)
        assert small.observation.ego.dtype == torch.bfloat16
        assert small.observation.images.dtype == torch.uint8
        assert_same(small.observation.scene, batch.observation.scene)
    assert make_features(2).to(torch.bfloat16).predictions["boxes"].dtype == torch.bfloat16
    assert make_features(2).to("meta", torch.float16).observation.scene.points.is_meta
    assert make_scene(0).to(torch.float32).points.dtype == torch.float32  # on its own it does as it is told


@pytest.mark.parametrize("make", [make_epdms, make_features, make_rollout])
def test_pin_memory_reaches_nested_batches(monkeypatch, make):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.data_ptr()) or t)
    batch = make()
    assert_same(batch.pin_memory(), batch)
    assert sorted(pinned) == sorted(t.data_ptr() for _, t in batch.tensors())


@pytest.mark.parametrize("make", [make_epdms, make_features, make_rollout])
def test_pickled_for_workers(make):
    assert_same(pickle.loads(pickle.dumps(make())), make())


def test_names_of_nested_tensors():
    assert {name for name, _ in make_epdms().tensors()} >= {"values", "details.states", "pdms.values"}
    assert {name for name, _ in make_features().tensors()} >= {"bev", "observation.scene.points", "predictions.head.logits"}


def test_device():
    assert make_scene(0).device == torch.device("cpu")
    with pytest.raises(InputError, match="no data"):
        Epdms(None).device  # noqa: B018
    with pytest.raises(InputError, match="no data"):
        len(Epdms(None))


# -- files -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SCENES)
def test_ragged_round_trip(tmp_path_factory, scenes):
    path = tmp_path_factory.mktemp("scenes") / "scenes.safetensors"
    batch = Scene.cat(scenes)
    assert batch.save(path) == path
    assert_same(Scene.load(path), batch)


@pytest.mark.parametrize(
    "batch",
    [
        make_epdms(),
        make_epdms(0, 0),
        Epdms(torch.rand(9)),
        Plan(torch.rand(1, 2, 8, 3), dt=0.1),
        Trajectory(torch.rand(8, 3)),
        make_scene(1, 0, 0, 1, 0, 0),
        make_observation(),
        make_observation(privileged=False),
        make_features(),
        dataclasses.replace(make_features(), predictions={}),
        make_rollout(),
    ],
    ids=["nested", "empty", "optional", "plan", "trajectory", "bare scene", "observation", "blind", "features", "no dictionary", "rollout"],
)
def test_round_trip(tmp_path, batch):
    path = batch.save(tmp_path / "x.safetensors")
    assert_same(type(batch).load(path), batch)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_file_is_plain_safetensors(tmp_path):
    path = make_epdms().save(str(tmp_path / "x.safetensors"))
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["details.states"], make_epdms().details.states)
    with safetensors.safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    assert metadata["irlvla"].startswith("Epdms ")
    assert json.loads(metadata["irlvla"].split(" ", 2)[2]) == {"human_filter": "fixed", "details": {}, "pdms": {}}
    assert "predictions.head.logits" in safetensors.torch.load_file(make_features().save(tmp_path / "y"))


@pytest.mark.parametrize("token", ["Zürich", "上海", 'naïve\n"quoted"', "\ud800", "", "\0", "🚗"])
def test_unicode_strings(tmp_path, token):
    scene = dataclasses.replace(make_scene(0), token=(token,))
    assert Scene.load(scene.save(tmp_path / f"x{len(token)}.st")).token == (token,)


def test_views_and_shared_storage(tmp_path):
    base = torch.rand(3, 4, 9, dtype=torch.float64)
    epdms = Epdms(base.transpose(0, 1)[:2], raw=base.transpose(0, 1)[:2], human_filter="legacy")
    assert not epdms.values.is_contiguous()
    assert_same(Epdms.load(epdms.save(tmp_path / "x")), epdms)
    grad = Plan(torch.rand(1, 1, 8, 3, requires_grad=True)[:, :, ::2])
    assert torch.equal(Plan.load(grad.save(tmp_path / "y")).poses, grad.poses)
    expanded = Plan(torch.rand(1, 1, 8, 3).expand(4, 5, 8, 3), dt=0.5)
    assert_same(Plan.load(expanded.save(tmp_path / "z")), expanded)


def test_truncated_at_any_length(tmp_path):
    whole = make_scene(3, agents=1, polygons=1).save(tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for length in sorted({*range(64), *range(64, len(whole), max(1, len(whole) // 200)), len(whole) - 1}):
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match="cut"):
            Scene.load(cut)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(FileError):
        Scene.load(cut)


def test_any_damaged_byte_is_found(tmp_path):
    whole = bytearray(make_scene(3, agents=1, polygons=1).save(tmp_path / "whole").read_bytes())
    original, damaged = Scene.load(tmp_path / "whole"), tmp_path / "damaged"
    for position in range(0, len(whole), max(1, len(whole) // 400)):
        for flip in (0x01, 0x80):
            damaged.write_bytes(whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :])
            try:
                read = Scene.load(damaged)
            except FileError:
                continue
            assert_same(read, original)  # padding and white space of the header


def test_foreign_files(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    foreign = {
        "pickle": pickle.dumps(Trap()),
        "text": b"x y heading",
        "zip": b"PK\x03\x04" + bytes(99),
        "empty": b"",
        "huge header": b"\xff" * 16,
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match=f"{name} is not a whole Scene file"):
            Scene.load(tmp_path / name)
    torch.save({"values": Trap()}, tmp_path / "torch")
    with pytest.raises(FileError):
        Epdms.load(tmp_path / "torch")
    assert not (tmp_path / "sprung").exists()
    safetensors.torch.save_file({"poses": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="holds 'something else', not 'Plan'"):
        Plan.load(tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="does not exist"):
        Plan.load(tmp_path / "nowhere")
    with pytest.raises(FileError):
        Plan.load(tmp_path)


def test_file_of_another_type_or_version(tmp_path, monkeypatch):
    path = make_epdms().save(tmp_path / "x")
    with pytest.raises(FileError, match="holds 'Epdms', not 'Scene'"):
        Scene.load(path)

    @dataclasses.dataclass(frozen=True)
    class Later(Batch):
        values: torch.Tensor
        more: torch.Tensor | None = None

    Later.__name__ = "Pdms"
    with pytest.raises(FileError, match=r"another version of Pdms: it has the fields \['values'\], Pdms needs \['more', 'values'\]"):
        Later.load(make_epdms().pdms.save(tmp_path / "y"))
    with pytest.raises(FileError, match=r"another version of Pdms: it has the fields \['more', 'values'\], Pdms needs \['values'\]"):
        Pdms.load(Later(torch.zeros(1), more=torch.zeros(1)).save(tmp_path / "z"))


@pytest.mark.parametrize("failing", ["replace", "fsync", "open"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), SystemExit], ids=["interrupt", "full", "exit"]
)
def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch, failing, error):
    path = make_epdms(2).save(tmp_path / "x")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises((FileError, KeyboardInterrupt, SystemExit)) as caught:
        make_epdms(3).save(path)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert_same(Epdms.load(path), make_epdms(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_killed_save_keeps_the_old_file(tmp_path):
    path = make_epdms(2).save(tmp_path / "x")
    child = os.fork()
    if child == 0:  # dies between writing and renaming
        os.replace = lambda *args: os._exit(9)
        make_epdms(3).save(path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert_same(Epdms.load(path), make_epdms(2))
    make_epdms(3).save(path)
    assert_same(Epdms.load(path), make_epdms(3))


def test_what_was_loaded_no_longer_depends_on_the_file(tmp_path):
    path = make_epdms(40, 40).save(tmp_path / "x")
    loaded = Epdms.load(path)
    os.truncate(path, 10)  # a mapped file would now end the process with SIGBUS
    assert_same(loaded, make_epdms(40, 40))


def test_save_errors(tmp_path):
    with pytest.raises(FileError, match="cannot be written"):
        make_epdms().save(tmp_path / "no" / "folder" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        make_epdms().save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = make_epdms().save(tmp_path / "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


# -- what the types say of themselves ----------------------------------------------------------------------------------


def test_the_proposal_that_is_driven():
    poses = torch.arange(2 * 3 * 8 * 3.0).reshape(2, 3, 8, 3)
    assert_same(Plan(poses, dt=0.4).best(), Trajectory(poses[:, 0], 0.4))
    scored = Plan(poses, score=torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]]))
    assert_same(scored.best(), Trajectory(torch.stack([poses[0, 1], poses[1, 0]])))  # of equals the first
    assert_same(scored[0].best(), Trajectory(poses[0, 1]))
    assert_same(Plan(poses)[1].best(), Trajectory(poses[1, 0]))


def test_merged_features():
    obs = make_observation(2)
    seen = Features(obs, bev=torch.zeros(2, 6, 2, 2), predictions={"boxes": torch.zeros(2, 1)})
    said = Features(obs, language=torch.ones(2, 3, 6), predictions={"words": torch.ones(2, 1)})
    both = seen.merged(said)
    assert both.bev is seen.bev
    assert both.language is said.language
    assert both.observation is obs
    assert list(both.predictions) == ["boxes", "words"]
    assert list(seen.predictions) == ["boxes"]
    assert_same(seen.merged(Features(obs)), seen)
    with pytest.raises(InputError, match="both the backbone and the reasoner make bev, boxes;"):
        seen.merged(seen)


@pytest.mark.parametrize("turn", [0.0, 2.0, -math.pi])
def test_poses_in_the_ego_frame(turn):
    """By hand: the car at (100, 200) heading along +y. Turning the whole map changes nothing."""
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)

    def turned(poses):
        poses = torch.tensor(poses, dtype=torch.float64)
        return torch.cat([poses[..., :2] @ rotation.T, poses[..., 2:3] + turn, poses[..., 3:]], -1)

    scene = dataclasses.replace(make_scene(0), ego=turned([[100.0, 200.0, math.pi / 2, *[0.0] * 8]]))
    poses = turned([[[100.0, 200.0, math.pi / 2], [100.0, 210.0, math.pi], [97.0, 200.0, 0.0]]])
    expected = torch.tensor([[[0.0, 0.0, 0.0], [10.0, 0.0, math.pi / 2], [0.0, 3.0, -math.pi / 2]]], dtype=torch.float64)
    torch.testing.assert_close(scene.in_ego_frame(poses), expected, rtol=0, atol=1e-12)
