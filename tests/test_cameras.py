"""The cameras of the embedded world, against rays cast one by one and against a slow painter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int

from irlvla import ops
from irlvla.errors import InputError
from irlvla.ops.painting import paint
from irlvla.ops.reference import painting as reference
from irlvla.synthetic import ground
from irlvla.synthetic.appearance import Daylight
from irlvla.synthetic.cameras import FRONT_RIG, NAVSIM_RIG, Rig, mounted, render
from irlvla.synthetic.solids import painting_order
from irlvla.synthetic.world import PAST, STEPS, Actor, Lane, Paint, Roads, Signal, World
from irlvla.types import Kind, Layer

SMALL = (128, 352)
LARGE = (256, 704)
GREY = torch.tensor([0.299, 0.587, 0.114])

# -- worlds ------------------------------------------------------------------------------------------------------------


def box(
    x: float, y: float, heading: float = 0.0, size=(1.5, 1.2, 1.4), kind: Kind = Kind.GENERIC, name: str = "box", speed: float = 0.0
) -> Actor:
    state = np.tile([x, y, heading, speed * np.cos(heading), speed * np.sin(heading)], (STEPS, 1))
    return Actor(name, kind, size, state, np.ones(STEPS, dtype=bool))


def rectangle(x0: float, x1: float, y0: float, y1: float) -> Float[np.ndarray, "4 2"]:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


ROAD = rectangle(-60.0, 60.0, -5.0, 5.0)


def world(*actors: Actor, paint=(), signals=(), blocks=(ROAD,), seed: int = 0, ego=(0.0, 0.0, 0.0)) -> World:
    drive = np.zeros((STEPS, 11))
    drive[:, :3] = ego
    return World("token", "straight", "", seed, Roads((), tuple(blocks), (), (), tuple(paint), tuple(signals)), actors, drive, (), 1)


@pytest.fixture
def no_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground, "SHADOW", 0.0)


# -- rays --------------------------------------------------------------------------------------------------------------


def rays(rig: Rig, camera: int) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "H W 3"]]:
    """The eye, and the direction in which every pixel looks (ego frame)."""
    v, u = np.mgrid[: rig.height, : rig.width]
    directions = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(rig.intrinsics[camera]).T
    return rig.camera_to_ego[camera, :3, 3], directions @ rig.camera_to_ego[camera, :3, :3].T


def on_ground(rig: Rig, camera: int) -> Float[np.ndarray, "H W 2"]:
    """Where on the ground every pixel looks; NaN above the horizon."""
    eye, directions = rays(rig, camera)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(directions[..., 2] < 0.0, -eye[2] / directions[..., 2], np.nan)
    return eye[:2] + reach[..., None] * directions[..., :2]


def hit(actor: Actor, eye: Float[np.ndarray, "3"], directions: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W"]:
    """How far along each ray it enters a box; infinite where it does not."""
    x, y, heading = actor.state[PAST, :3]
    turn = np.array([[np.cos(heading), np.sin(heading), 0.0], [-np.sin(heading), np.cos(heading), 0.0], [0.0, 0.0, 1.0]])
    half = 0.5 * np.array(actor.size)
    start, along = turn @ (eye - [x, y, half[2]]), directions @ turn.T
    with np.errstate(divide="ignore"):
        low, high = (-half - start) / along, (half - start) / along
    enters, leaves = np.minimum(low, high).max(-1), np.maximum(low, high).min(-1)
    return np.where((enters < leaves) & (enters > 0.0), enters, np.inf)


def first_hit(actors: tuple[Actor, ...], rig: Rig, camera: int) -> Int[np.ndarray, "H W"]:
    """The actor that every pixel shows, -1 = none."""
    eye, directions = rays(rig, camera)
    reach = np.stack([hit(actor, eye, directions) for actor in actors])
    return np.where(np.isfinite(reach.min(0)), reach.argmin(0), -1)


def uniform(labels: np.ndarray, reach: int = 1) -> Bool[np.ndarray, "H W"]:
    """Pixels with the same label as all others within reach; not at the border of the image."""
    windows = np.lib.stride_tricks.sliding_window_view(labels, (2 * reach + 1, 2 * reach + 1))
    return np.pad((windows == windows[..., reach : reach + 1, reach : reach + 1]).all((2, 3)), reach)


# -- calibration ---------------------------------------------------------------------------------------------------------


def test_navsim_rig_looks_where_navsim_looks() -> None:
    axes = NAVSIM_RIG.camera_to_ego[:, :3, 2]
    yaw = dict(zip(NAVSIM_RIG.names, np.degrees(np.arctan2(axes[:, 1], axes[:, 0])), strict=True))
    want = {"F0": -0.4, "L0": 54.9, "L1": 111.4, "L2": 140.6, "R0": -55.5, "R1": -112.0, "R2": -141.4, "B0": 179.5}
    assert yaw == pytest.approx({f"CAM_{name}": angle for name, angle in want.items()}, abs=0.06)
    turns = NAVSIM_RIG.camera_to_ego[:, :3, :3]
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1.0)
    assert (axes[:, 2] < 0.0).all(), "all look slightly down"
    assert (NAVSIM_RIG.height, NAVSIM_RIG.width, len(NAVSIM_RIG)) == (1080, 1920, 8)
    assert FRONT_RIG.names == ("CAM_L0", "CAM_F0", "CAM_R0")


def test_camera_axes() -> None:
    """A camera that looks ahead: x is to the right of the car, y down, z forward."""
    np.testing.assert_allclose(mounted(0, 0, 0, 1, 2, 3), [[0, 0, 1, 1], [-1, 0, 0, 2], [0, -1, 0, 3], [0, 0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(mounted(90, 0, 0, 0, 0, 0)[:3, 2], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(mounted(0, 30, 0, 0, 0, 0)[:3, 2], [np.sqrt(0.75), 0, -0.5], atol=1e-12)


def test_resized_scales_and_crops_the_sky() -> None:
    rig = NAVSIM_RIG.resized(*LARGE)
    scale = 704 / 1920
    for k in rig.intrinsics:
        np.testing.assert_allclose(k[0, 0], 1545 * scale)
        np.testing.assert_allclose(k[1, 1], 1545 * scale)
        np.testing.assert_allclose(k[0, 2], (960 + 0.5) * scale - 0.5)
        np.testing.assert_allclose(k[1, 2], (560 + 0.5) * scale - 0.5 - (1080 * scale - 256))
    same = NAVSIM_RIG.resized(1080, 1920)
    np.testing.assert_allclose(same.intrinsics, NAVSIM_RIG.intrinsics, atol=1e-9)


def test_project() -> None:
    rig = NAVSIM_RIG.resized(*LARGE)
    points = np.random.default_rng(0).uniform(-20, 20, (50, 3))
    pixels, ahead = rig.project(points)
    assert pixels.shape == (8, 50, 2)
    assert ahead.shape == (8, 50)
    for camera in range(8):
        inverse = np.linalg.inv(rig.camera_to_ego[camera])
        x, y, z = rig.intrinsics[camera] @ (inverse[:3, :3] @ points.T + inverse[:3, 3:])
        np.testing.assert_allclose(ahead[camera], z, atol=1e-9)
        np.testing.assert_allclose(pixels[camera], np.stack([x / z, y / z], -1), rtol=1e-6, atol=1e-6)


def test_rigs_are_checked() -> None:
    with pytest.raises(InputError, match="Did you mean 'CAM_F0'"):
        NAVSIM_RIG.only("CAM_FO")
    with pytest.raises(InputError, match=r"2 cameras needs intrinsics of shape \(2, 3, 3\), got \(3, 3\)"):
        Rig(("a", "b"), np.eye(3), np.stack([np.eye(4)] * 2), 10, 10)
    with pytest.raises(InputError, match="height 0"):
        NAVSIM_RIG.resized(0, 10)
    with pytest.raises(InputError, match=r"-20 \.\.\. 50"):
        render(world(), step=51)


# -- what stands where -------------------------------------------------------------------------------------------------


def ahead_of(camera: int, distance: float, left: float = 0.0) -> tuple[float, float]:
    pose = NAVSIM_RIG.camera_to_ego[camera]
    along = pose[:2, 2] / np.linalg.norm(pose[:2, 2])
    x, y = pose[:2, 3] + distance * along + left * np.array([-along[1], along[0]])
    return float(x), float(y)


def hull_distance(corners: Float[np.ndarray, "N 2"], points: Float[np.ndarray, "M 2"]) -> Float[np.ndarray, " M"]:
    """How far points lie outside of the convex hull of some corners [pixels]; negative within."""
    found = np.full(len(points), -np.inf)
    for i, a in enumerate(corners):
        for j, b in enumerate(corners):
            length = np.hypot(*(b - a))
            if i == j or length < 1e-9:
                continue
            normal = np.array([b[1] - a[1], a[0] - b[0]]) / length
            if ((corners - a) @ normal <= 1e-9).all():  # a side of the hull
                found = np.maximum(found, (points - a) @ normal)
    return found


def changed(one: World, other: World, camera: int) -> Float[np.ndarray, "M 2"]:
    """Pixels (u, v) in which two worlds differ."""
    rig = NAVSIM_RIG.only(NAVSIM_RIG.names[camera])
    v, u = np.nonzero((render(one, rig) != render(other, rig))[0].any(0).numpy())
    return np.stack([u, v], -1).astype(float)


@pytest.mark.usefixtures("no_shadows")
@pytest.mark.parametrize("camera", range(8), ids=NAVSIM_RIG.names)
@pytest.mark.parametrize("heading", [0.3, 1.9])
def test_corners_of_boxes_land_on_their_edges(camera: int, heading: float) -> None:
    x, y = ahead_of(camera, 9.0)
    actor = box(x, y, heading)
    seen = changed(world(actor), world(), camera)
    signs = np.array([(a, b, c) for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (0.0, 1.0)])
    local = signs * actor.size
    cosine, sine = np.cos(heading), np.sin(heading)
    corners = np.stack([x + cosine * local[:, 0] - sine * local[:, 1], y + sine * local[:, 0] + cosine * local[:, 1], local[:, 2]], -1)
    pixels = NAVSIM_RIG.resized(*LARGE).project(corners)[0][camera]
    assert hull_distance(pixels, seen).max() <= 1.0
    outer = pixels[[hull_distance(np.delete(pixels, i, 0), pixels[i : i + 1])[0] > 0.5 for i in range(8)]]
    assert len(outer) >= 4
    assert np.hypot(*(outer[:, None] - seen[None]).transpose(2, 0, 1)).min(1).max() <= 1.0


@pytest.mark.parametrize("camera", range(8), ids=NAVSIM_RIG.names)
def test_corners_of_markings_land_on_their_edges(camera: int) -> None:
    outline = np.array([ahead_of(camera, *where) for where in ((7.0, 0.8), (7.5, -1.0), (10.0, -0.7), (9.5, 1.2))])
    asphalt = (rectangle(-40, 40, -40, 40),)
    seen = changed(world(blocks=asphalt, paint=[(Paint.ARROW, outline)]), world(blocks=asphalt), camera)
    pixels = NAVSIM_RIG.resized(*LARGE).project(np.concatenate([outline, np.zeros((4, 1))], 1))[0][camera]
    assert hull_distance(pixels, seen).max() <= 1.0
    assert np.hypot(*(pixels[:, None] - seen[None]).transpose(2, 0, 1)).min(1).max() <= 1.0


@pytest.mark.usefixtures("no_shadows")
@pytest.mark.parametrize("seed", range(2))
def test_every_pixel_shows_what_its_ray_hits_first(seed: int) -> None:
    """All around the car, near and far, beside it and cut by the edges of images: as if what is hit stood there alone."""
    rng = np.random.default_rng(seed)
    actors: list[Actor] = []
    while len(actors) < 14:
        kind, size = ((Kind.GENERIC, (1.0, 1.2, 1.4)), (Kind.BARRIER, (2.5, 0.5, 1.0)), (Kind.VEHICLE, (9.0, 2.5, 3.0)))[len(actors) % 3]
        x, y = rng.uniform(-16, 18), rng.uniform(-12, 12)
        candidate = box(x, y, rng.uniform(-3, 3), size, kind, f"box-{len(actors)}")
        if all(apart(candidate, other) for other in actors) and apart(candidate, box(1.4, 0.0, 0.0, (5.2, 2.3, 1.8))):
            actors.append(candidate)
    rig = NAVSIM_RIG.resized(*SMALL)
    together, empty = render(world(*actors), size=SMALL), render(world(), size=SMALL)
    alone = [render(world(actor), size=SMALL) for actor in actors]
    checked = 0
    for camera in range(8):
        labels = first_hit(tuple(actors), rig, camera)
        sure = uniform(labels)
        for label in np.unique(labels[sure]):
            want = empty if label < 0 else alone[label]
            at = torch.from_numpy(sure & (labels == label))
            assert torch.equal(together[camera][:, at], want[camera][:, at]), f"{NAVSIM_RIG.names[camera]}, {label}"
            checked += int(at.sum()) * (label >= 0)
    assert checked > 20_000


def corners_of(actor: Actor) -> Float[np.ndarray, "4 2"]:
    x, y, heading = actor.state[PAST, :3]
    local = np.array([(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)]) * actor.size[:2]
    turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
    return local @ turn.T + (x, y)


def apart(one: Actor, other: Actor) -> bool:
    pairs = ((corners_of(one), corners_of(other)), (corners_of(other), corners_of(one)))
    return any(
        (((q - p[i]) @ np.array([p[(i + 1) % 4, 1] - p[i, 1], p[i, 0] - p[(i + 1) % 4, 0]])) > 0.05).all()
        for p, q in pairs
        for i in range(4)
    )


@pytest.mark.usefixtures("no_shadows")
def test_a_camera_within_a_box_sees_through_it() -> None:
    """Cars may collide: what the camera is inside of has no inner faces."""
    around = world(box(1.6, 0.0, 0.0, (1.0, 1.0, 3.0)))
    assert torch.equal(render(around, FRONT_RIG.only("CAM_F0"), SMALL), render(world(), FRONT_RIG.only("CAM_F0"), SMALL))


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_painting_order(seed: int) -> None:
    """Along every ray, what is farther is painted before what is nearer."""
    rng = np.random.default_rng(seed)
    actors: list[Actor] = []
    for _ in range(60):
        candidate = box(*rng.uniform((3, -12), (25, 12)), rng.uniform(-3, 3), (rng.choice([0.3, 2.0, 9.0]), rng.choice([0.3, 1.5]), 1.0))
        if all(apart(candidate, other) for other in actors) and apart(candidate, box(0, 0, 0, (1, 1, 1))):
            actors.append(candidate)
    rank = np.argsort(painting_order(np.stack([corners_of(actor) for actor in actors]), np.zeros(2)))
    angle = np.linspace(-1.3, 1.3, 400)
    directions = np.stack([np.cos(angle), np.sin(angle), np.zeros(400)], -1)[None]
    reach = np.stack([hit(actor, np.array([0.0, 0.0, 0.5]), directions)[0] for actor in actors])
    for column in reach.T:
        along = np.flatnonzero(np.isfinite(column))
        assert (np.diff(rank[along[np.argsort(column[along])]]) < 0).all()


# -- the ground --------------------------------------------------------------------------------------------------------


def shown(image: torch.Tensor, colour: tuple[int, int, int]) -> Bool[np.ndarray, "H W"]:
    return (image == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).numpy()


# Wide, tilted and rolled, with pixels that are not square: down at the road, and back over the roof.
ODD_RIG = Rig(
    ("down", "back"),
    np.stack([[[60.0, 4.0, 90.0], [0.0, 80.0, 40.0], [0.0, 0.0, 1.0]], [[90.0, 0.0, 176.0], [0.0, 90.0, 64.0], [0.0, 0.0, 1.0]]]),
    np.stack([mounted(20.0, 50.0, 35.0, 2.0, 0.5, 1.2), mounted(170.0, 10.0, -160.0, 0.0, 0.0, 3.0)]),
    *SMALL,
)


@pytest.mark.parametrize("rig", [NAVSIM_RIG, ODD_RIG], ids=["navsim", "odd"])
@pytest.mark.parametrize("ego", [(0.0, 0.0, 0.0), (30.0, -2.0, 2.5)])
def test_surfaces_lie_where_rays_meet_them(rig: Rig, ego: tuple[float, float, float]) -> None:
    """Before, beside and behind the car: asphalt, kerb, pavement, grass."""
    rig, images = rig.resized(*SMALL), render(world(ego=ego), rig, SMALL)
    checked = np.zeros(4)
    for camera in range(len(rig)):
        x, y = np.moveaxis(on_ground(rig, camera), -1, 0)
        near = np.hypot(x, y) < 19.0  # no haze
        cosine, sine = np.cos(ego[2]), np.sin(ego[2])
        x, y = ego[0] + cosine * x - sine * y, ego[1] + sine * x + cosine * y
        away = np.maximum(np.abs(x) - 60.0, np.abs(y) - 5.0)
        labels = np.where(near, np.searchsorted([0.0, 0.2, 2.5], np.nan_to_num(away)), -1)
        sure = uniform(labels) & near
        for label, colour in enumerate((ground.ASPHALT, ground.KERB, ground.PAVEMENT, ground.GRASS)):
            assert shown(images[camera], colour)[sure & (labels == label)].all()
            checked[label] += (sure & (labels == label)).sum()
    assert (checked > (10_000, 30, 1_000, 1_000)).all()


PAINTED = {  # x and y -> where there is paint
    Paint.EDGE: lambda x, y: (np.abs(y + 1) < 0.075) & (x > 6) & (x < 18),
    Paint.SOLID: lambda x, y: (np.abs(y + 1) < 0.075) & (x > 6) & (x < 18),
    Paint.BAY: lambda x, y: (np.abs(y + 1) < 0.075) & (x > 6) & (x < 18),
    Paint.STOP: lambda x, y: (np.abs(y + 1) < 0.2) & (x > 6) & (x < 18),
    Paint.DASHED: lambda x, y: (np.abs(y + 1) < 0.075) & (x > 9) & (x < 12),
    Paint.CENTRE: lambda x, y: (np.abs(np.abs(y + 1) - 0.135) < 0.075) & (x > 6) & (x < 18),
    Paint.CROSSING: lambda x, y: (x > 8) & (x < 11) & (np.abs(y) < 4) & (np.abs((y + 4) % 1 - 0.5) < 0.25),
    Paint.ARROW: lambda x, y: (x > 8) & (x < 10) & (x + 4 * np.abs(y) < 12),
}
LINE = np.stack([np.linspace(6.0, 18.0, 13), np.full(13, -1.0)], -1)
OUTLINES = {
    Paint.CROSSING: np.array([(8.0, -4.0), (11.0, -4.0), (11.0, 4.0), (8.0, 4.0)]),
    Paint.ARROW: np.array([(8.0, 1.0), (8.0, -1.0), (10.0, -0.5), (10.0, 0.5)]),
}


@pytest.mark.parametrize("kind", Paint, ids=lambda kind: kind.value)
def test_paint(kind: Paint) -> None:
    rig = NAVSIM_RIG.only("CAM_F0")
    image = render(world(paint=[(kind, OUTLINES.get(kind, LINE))]), rig)[0]
    x, y = np.moveaxis(on_ground(rig.resized(*LARGE), 0), -1, 0)
    near = (np.hypot(x, y) < 19.0) & (np.abs(y) < 4.8)
    labels = np.where(near, PAINTED[kind](x, y), -1)
    colour = ground.YELLOW if kind is Paint.CENTRE else ground.WHITE
    assert shown(image, colour)[uniform(labels) & (labels == 1)].all()
    assert shown(image, ground.ASPHALT)[uniform(labels, 2) & (labels == 0)].all()
    assert (uniform(labels) & (labels == 1)).sum() > 50


def test_paint_bends_with_the_road() -> None:
    """Strips keep their width around curves and corners, and where they close there is no gap."""
    angle = np.linspace(0.0, 2.0 * np.pi, 80)
    circle = np.stack([10.0 + 3.0 * np.cos(angle), 3.0 * np.sin(angle)], -1)
    rig = NAVSIM_RIG.only("CAM_F0")
    image = render(world(paint=[(Paint.STOP, circle)]), rig)[0]
    x, y = np.moveaxis(on_ground(rig.resized(*LARGE), 0), -1, 0)
    labels = np.abs(np.hypot(x - 10.0, y) - 3.0) < 0.2
    sure = uniform(np.where(np.hypot(x, y) < 19.0, labels, -1))
    assert shown(image, ground.WHITE)[sure & labels].mean() > 0.995
    assert not shown(image, ground.WHITE)[sure & ~labels].any()


def test_connectors_alone_are_no_drivable_area() -> None:
    """Where the score says off-road, the picture shows no asphalt."""

    def lane(layer: Layer, block: int) -> Lane:
        return Lane(np.zeros((2, 3)), ROAD, layer, 3.5, 10.0, block)

    base = world(blocks=(rectangle(-60, 60, -5, 0), rectangle(-60, 60, 0, 5)))
    roads = dataclasses.replace(base.roads, lanes=(lane(Layer.LANE, 0), lane(Layer.LANE_CONNECTOR, 1)))
    want = world(blocks=(rectangle(-60, 60, -5, 0),))
    assert torch.equal(render(dataclasses.replace(base, roads=roads), size=SMALL), render(want, size=SMALL))


def test_roads_join_without_a_seam() -> None:
    whole, halves = world(), world(blocks=(rectangle(-60, 8.03, -5, 5), rectangle(8.03, 60, 5, -5)))
    one, two = render(whole, size=SMALL), render(halves, size=SMALL)
    for camera in range(8):
        asphalt = shown(one[camera], ground.ASPHALT)
        assert (asphalt == shown(two[camera], ground.ASPHALT)).all()


def test_far_lines_do_not_flicker() -> None:
    """A line far away, thinner than a pixel, is as bright wherever it falls between the pixels."""
    rig = NAVSIM_RIG.only("CAM_F0")
    empty = render(world(), rig)[0].float()
    total = []
    for aside in np.linspace(0.0, 0.12, 7):
        line = np.array([(40.0, 0.5 + aside), (58.0, 0.5 + aside)])
        total.append((render(world(paint=[(Paint.EDGE, line)]), rig)[0].float() - empty).sum().item())
    assert min(total) > 1000
    assert (max(total) - min(total)) / max(total) < 0.1


# -- state -------------------------------------------------------------------------------------------------------------


def lamps(red: bool, amber: bool, heading: float) -> Float[np.ndarray, "3 3"]:
    """Colours at the middles of the red, amber and green lamp of a traffic light 25 m ahead."""
    steps = np.ones(STEPS, dtype=bool)
    signal = Signal(np.array([25.0, -3.0, 3.0]), heading, steps & red, steps & amber)
    rig = NAVSIM_RIG.only("CAM_F0")
    image = render(world(signals=[signal]), rig)[0].numpy()
    pixels = rig.resized(*LARGE).project(np.array([(25.0, -3.0, 3.0 + up) for up in (0.48, 0.0, -0.48)]))[0][0]
    return np.stack([image[:, round(v), round(u)] for u, v in pixels]).astype(float)


@pytest.mark.parametrize(("red", "amber", "lit"), [(True, False, 0), (False, True, 1), (False, False, 2)])
def test_traffic_lights_show_their_state(red: bool, amber: bool, lit: int) -> None:
    seen = lamps(red, amber, 0.0)
    grey = seen @ GREY.numpy()
    assert grey.argmax() == lit, "legible in grey: which lamp is bright"
    assert grey[lit] > np.delete(grey, lit).max() + 60
    brightest = seen[lit].argmax()
    assert brightest == (1 if lit == 2 else 0)


def test_traffic_lights_are_dark_from_behind() -> None:
    assert np.ptp(lamps(True, False, np.pi), axis=0).max() < 20
    assert lamps(True, False, np.pi).max() < 90


def test_brake_lights() -> None:
    rig = NAVSIM_RIG.only("CAM_F0")
    leader = box(15.0, 0.0, 0.0, (4.5, 1.9, 1.5), Kind.VEHICLE, speed=10.0)
    slowing = leader.state.copy()
    slowing[:, 3] = 10.0 - 3.0 * np.clip(np.arange(STEPS) - PAST + 3, 0, None) * 0.1
    braking = dataclasses.replace(leader, state=slowing)
    calm, bright = (render(world(actor), rig)[0].float() for actor in (leader, braking))
    more = (bright - calm).clamp(min=0)
    assert (more[0] > 60).sum() > 20
    assert ((more * GREY[:, None, None]).sum(0) > 50).sum() > 20, "legible in grey"


def test_actors_come_and_go() -> None:
    actor = box(12.0, 0.0)
    valid = actor.valid.copy()
    valid[PAST:] = False
    leaving = world(dataclasses.replace(actor, valid=valid))
    assert torch.equal(render(leaving, size=SMALL), render(world(), size=SMALL))
    assert torch.equal(render(leaving, size=SMALL, step=-1), render(world(actor), size=SMALL, step=-1))


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_every_kind_is_seen_and_stays_in_its_box(kind: Kind) -> None:
    size = {Kind.VEHICLE: (4.5, 1.9, 1.5), Kind.PEDESTRIAN: (0.7, 0.7, 1.8), Kind.BICYCLE: (1.8, 0.7, 1.7)}.get(kind, (1.0, 0.6, 1.0))
    rig = NAVSIM_RIG.only("CAM_F0")
    actor = box(14.0, 1.0, 0.7, size, kind)
    image, empty = render(world(actor), rig)[0], render(world(), rig)[0]
    inside = first_hit((actor,), rig.resized(*LARGE), 0) == 0
    differs = (image != empty).any(0).numpy()
    assert differs[inside].mean() > 0.4
    flat = ground.shadows(corners_of(actor)[None], np.array([[0.0, size[2]]]), Daylight.of(0, 0.0)).points
    corners = np.concatenate([flat, np.concatenate([corners_of(actor), np.full((4, 1), size[2])], 1)])
    v, u = np.nonzero(differs)
    assert hull_distance(rig.resized(*LARGE).project(corners)[0][0], np.stack([u, v], -1)).max() <= 1.0


# -- pictures ----------------------------------------------------------------------------------------------------------


def scene() -> World:
    cars = [box(8.0 + 6 * k, 2.5 * (-1) ** k, 0.1 * k, (4.5, 1.9, 1.5), Kind.VEHICLE, f"car-{k}", 5.0) for k in range(6)]
    line = np.stack([np.linspace(-60, 60, 121), np.zeros(121)], -1)
    return world(
        *cars,
        box(6.0, -3.0, kind=Kind.TRAFFIC_CONE, size=(0.4, 0.4, 0.8)),
        paint=[(Paint.CENTRE, line), (Paint.DASHED, line + np.array([0.0, 3.0]))],
    )


def test_pictures_are_the_same_each_time() -> None:
    first = render(scene())
    assert first.shape == (8, 3, 256, 704)
    assert first.dtype == torch.uint8
    assert torch.equal(first, render(scene()))
    before = ops.get_num_threads()
    try:
        for threads in (1, 3):
            ops.set_num_threads(threads)
            assert torch.equal(first, render(scene()))
    finally:
        ops.set_num_threads(before)


def test_fewer_cameras_see_the_same() -> None:
    everything, front = render(scene(), size=SMALL), render(scene(), FRONT_RIG, SMALL)
    assert torch.equal(front, everything[[NAVSIM_RIG.names.index(name) for name in FRONT_RIG.names]])
    assert not torch.equal(front[0], front[1])


def test_seeds_differ_in_light_and_colours_only() -> None:
    one, two = (render(dataclasses.replace(scene(), seed=seed), FRONT_RIG, SMALL).float() for seed in (1, 2))
    assert 0.5 < (one - two).abs().mean() < 40
    clear = first_hit(scene().actors, FRONT_RIG.resized(*SMALL), 1) < 0
    assert (one - two)[1].abs().amax(0)[torch.from_numpy(clear)].median() < 10


def test_the_car_moves_through_the_world() -> None:
    """Standing 5 m farther on is the same as everything 5 m nearer."""
    actor = box(20.0, 1.0, 0.4)
    moved = render(world(actor, ego=(5.0, 0.0, 0.0)), FRONT_RIG, SMALL)
    nearer = render(world(box(15.0, 1.0, 0.4), blocks=(ROAD - (5.0, 0.0),)), FRONT_RIG, SMALL)
    assert (moved.int() - nearer.int()).abs().max() <= 1


def test_haze_grows_with_distance() -> None:
    light = Daylight.of(0, 0.0)
    haze = light.haze(np.array([0.0, 20.0, 60.0, 150.0, 1000.0]))
    assert haze[0] == 0.0
    assert (np.diff(haze) > 0.0).all()
    assert haze[2] < 0.15
    rig = NAVSIM_RIG.only("CAM_F0")
    long = world(blocks=(rectangle(-200, 1500, -5, 5),), seed=3)
    horizon = Daylight.of(3, 0.0).horizon
    image = render(long, rig)[0].numpy()
    pixels = rig.resized(*LARGE).project(np.array([(x, 0.0, 0.0) for x in (15, 50, 120, 400)]))[0][0]
    away = [np.abs(image[:, round(v), round(u)] - horizon).mean() for u, v in pixels]
    assert (np.diff(away) < -2.0).all()


def test_an_empty_world_is_grass_and_sky() -> None:
    rig = NAVSIM_RIG.only("CAM_F0")
    image = render(world(blocks=()), rig, SMALL)[0]
    assert shown(image, ground.GRASS)[-1].all()
    assert image[2, 0].float().mean() > image[0, 0].float().mean() - 1, "a sky is not red"


# -- painting ----------------------------------------------------------------------------------------------------------

coordinates = st.one_of(st.integers(-4, 24).map(lambda i: i / 2), st.floats(-2000.0, 2000.0), st.floats(-1.0, 13.0))
rings = st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=6)
shapes = st.lists(st.tuples(st.lists(rings, max_size=3), st.tuples(*[st.integers(0, 255)] * 3, st.floats(0.0, 1.0))), max_size=4)


def packed(drawing: list) -> list[torch.Tensor]:
    """Points, offsets of rings and shapes, and colours."""
    outlines = [outline for outlines, _ in drawing for outline in outlines]
    points = torch.tensor([point for outline in outlines for point in outline], dtype=torch.float64).reshape(-1, 2)
    counts = [[len(outline) for outline in outlines], [len(outlines) for outlines, _ in drawing]]
    offsets = [torch.tensor([0, *count]).cumsum(0) for count in counts]
    return [points, *offsets, torch.tensor([colour for _, colour in drawing], dtype=torch.float64).reshape(-1, 4)]


@settings(max_examples=80)
@given(shapes, shapes, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_paint_matches_reference(first: list, second: list, height: int, width: int, seed: int) -> None:
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    points, ring_offsets, shape_offsets, colours = packed(first + second)
    image_offsets = torch.tensor([0, len(first), len(first) + len(second)])
    got = paint(images, points, ring_offsets, shape_offsets, image_offsets, colours)
    want = reference.paint(images, points, ring_offsets, shape_offsets, image_offsets, colours)
    assert (got.int() - want.int()).abs().max() <= 1


def filled(*drawing) -> Float[np.ndarray, "H W"]:
    """What white shapes leave on a black image of 8 x 12."""
    points, ring_offsets, shape_offsets, colours = packed([(outlines, (255, 255, 255, 1.0)) for outlines in drawing])
    black = torch.zeros((1, 3, 8, 12), dtype=torch.uint8)
    return paint(black, points, ring_offsets, shape_offsets, [0, len(drawing)], colours)[0, 0].numpy()


def test_pixels_are_centred_on_integers() -> None:
    square = [(2.5, 1.5), (4.5, 1.5), (4.5, 3.5), (2.5, 3.5)]
    want = np.zeros((8, 12))
    want[2:4, 3:5] = 255
    np.testing.assert_array_equal(filled([square]), want)


def test_shapes_of_rings() -> None:
    left, right = [(0, 0), (5.3, 0), (5.3, 6), (0, 6)], [(5.3, 0), (9, 0), (9, 6), (5.3, 6)]
    whole = [(0, 0), (9, 0), (9, 6), (0, 6)]
    np.testing.assert_array_equal(filled([left, right]), filled([whole]))
    assert (filled([left], [right]) != filled([whole])).any(), "shapes are painted one over the other, with a seam"
    np.testing.assert_array_equal(filled([whole, whole])[1:6, 1:9], 255)
    hole = [(2, 2), (2, 4), (4, 4), (4, 2)]
    assert filled([whole, hole])[3, 3] == 0
    np.testing.assert_array_equal(filled([whole[::-1]]), filled([whole]))


def test_paint_checks_its_input() -> None:
    images = torch.zeros((1, 3, 4, 4), dtype=torch.uint8)
    points, offsets, colours = torch.zeros((3, 2)), torch.tensor([0, 3]), torch.ones((1, 4))
    one = torch.tensor([0, 1])
    paint(images, points, offsets, one, one, colours)
    with pytest.raises(InputError, match="uint8"):
        paint(images.float(), points, offsets, one, one, colours)
    with pytest.raises(InputError, match="ring_offsets"):
        paint(images, points, torch.tensor([0, 2]), one, one, colours)
    with pytest.raises(InputError, match="colours"):
        paint(images, points, offsets, one, one, torch.ones((2, 4)))
    with pytest.raises(InputError, match=r"points\[1\]"):
        paint(images, torch.tensor([[0.0, 0.0], [float("nan"), 0.0], [1.0, 1.0]]), offsets, one, one, colours)
    assert torch.equal(images, torch.zeros_like(images)), "what is given stays as it is"
