"""Pictures of scenes: bird's-eye view with agents over time, the human, candidates coloured by score and why they fail; camera views.

Everything stays legible in grey: what matters differs in lightness, width or pattern too, and is named in words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from irlvla.errors import InputError
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, STEP, WIDTH, Epdms, Kind, Layer, Observation, Plan, Scene

Array = NDArray[np.float64]
Colour = tuple[int, int, int]

SMOOTH = 2  # drawn so many times larger, then reduced: Pillow does not smooth edges
BEHIND, AHEAD, ASIDE = 20.0, 60.0, 32.0  # what the bird's-eye view shows around the car [m]

PAPER, INK, CAPTION = (250, 250, 248), (25, 25, 30), 15
GROUND: dict[int, Colour] = {
    Layer.ROADBLOCK: (222, 222, 220),
    Layer.DRIVABLE_AREA: (230, 230, 228),
    Layer.CARPARK: (214, 220, 226),
    Layer.INTERSECTION: (210, 210, 208),
}
LANE_EDGE, ROUTE, RED_LIGHT, CENTRELINE = (175, 175, 175), (232, 238, 222), (214, 84, 76), (150, 160, 120)
KIND_COLOURS: dict[int, Colour] = {Kind.VEHICLE: (70, 100, 150), Kind.PEDESTRIAN: (150, 60, 130), Kind.BICYCLE: (30, 130, 110)}
STATIC_COLOUR, EGO_COLOUR, HUMAN_COLOUR = (190, 130, 40), (25, 25, 30), (25, 25, 30)
HEIGHTS = {Kind.VEHICLE: 1.6, Kind.PEDESTRIAN: 1.75, Kind.BICYCLE: 1.7, Kind.TRAFFIC_CONE: 0.8, Kind.BARRIER: 1.0}  # a scene knows none [m]
BEST, WORST = np.array([253.0, 200.0, 40.0]), np.array([70.0, 10.0, 90.0])  # of candidates: light to dark as the score falls
EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
NEAR = 0.2  # what is nearer to a camera is cut off [m]


def draw_scene(
    scene: Scene, plan: Plan | None = None, result: Epdms | None = None, observation: Observation | None = None, width: int = 1400
) -> Image.Image:
    """One scene: bird's-eye view, with the cameras beside it where the observation has images.

    Args:
        scene: a batch of one.
        plan: its K candidates. Without one only the human's drive is shown.
        result: of these candidates; with `details`, the failing moment of the worst one is marked with its cause.
        observation: the same scene's, for its cameras.
        width: of the picture [pixels].

    Raises:
        InputError: more than one scene, or a result that does not fit the plan.
    """
    if len(scene) != 1:
        raise InputError(f"a picture shows one scene, not {len(scene)}: take scenes[i]")
    if plan is not None and result is not None and result.values.shape[:-1] != plan.poses.shape[:2]:
        raise InputError(f"the result of shape {tuple(result.values.shape)} is not that of a plan of shape {tuple(plan.poses.shape)}")
    with_cameras = observation is not None and observation.images is not None
    view_width = width * 2 // 5 if with_cameras else width
    view = birds_eye(scene, plan, result, view_width)
    if not with_cameras:
        return view
    assert observation is not None
    shown = None if plan is None else plan.best().poses[0].double().cpu().numpy()
    cameras = camera_views(observation, scene, shown, width - view_width)
    page = Image.new("RGB", (width, max(view.height, cameras.height)), PAPER)
    page.paste(view, (0, 0))
    page.paste(cameras, (view_width, 0))
    return page


# -- causes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """Which metric a candidate fails, when and why."""

    metric: str
    step: int  # of 0.1 s; 0 where it is not about a moment
    cause: str

    def __str__(self) -> str:
        when = f" at {self.step * STEP:.1f} s" if self.step else ""
        return f"{self.metric.upper()}{when}: {self.cause}"


def failures(scene: Scene, result: Epdms, candidate: int) -> list[Failure]:
    """What one candidate of a scene does wrong, the gravest first. Raises `InputError` for a result without details."""
    why = result.details
    if why is None:
        raise InputError("causes need details: irlvla.epdms(..., details=True)")
    values = (result.values if result.raw is None else result.raw)[0, candidate].tolist()
    fails = {name: value < 1.0 for name, value in zip(("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec"), values, strict=True)}

    def first(flags: Array) -> int:
        return int(np.argmax(flags))

    def row(name: str) -> Array:
        return getattr(why, name)[0, candidate].cpu().numpy()

    found = [
        ("nc", lambda: (int(row("collision_step")), f"hits {_name(scene, int(row('collision_agent')))}")),
        ("dac", lambda: (first(row("off_road")), "a corner leaves the drivable area")),
        ("tlc", lambda: (first(row("red_light")), "drives into a connector whose light is red")),
        ("ddc", lambda: (first(row("off_route")), f"{float(row('oncoming_metres')):.1f} m off the route within 1.1 s")),
        ("ttc", lambda: (int(row("ttc_step")), f"would soon hit {_name(scene, int(row('ttc_agent')))}")),
        ("lk", lambda: (0, f"{int(row('off_centre_steps')) * STEP:.1f} s more than 0.5 m off the middle of the lane")),
        ("hc", lambda: (0, "uncomfortable: " + ", ".join(itertools.compress(_COMFORT, np.logical_not(row("comfort")))))),
        ("ep", lambda: (0, f"{float(row('progress')):.0f} m where PDM-Closed makes {float(row('reference_progress')):.0f} m")),
    ]
    return [Failure(name, *describe()) for name, describe in found if fails[name]]


_COMFORT = ("braking or acceleration", "lateral acceleration", "jerk", "longitudinal jerk", "yaw acceleration", "yaw rate")


def _name(scene: Scene, agent: int) -> str:
    return f"a {Kind(int(scene.agent_kind[agent])).name.lower().replace('_', ' ')}" if agent >= 0 else "an object"


# -- bird's-eye view ---------------------------------------------------------------------------------------------------


class _View:
    """A drawing in metres of the ego frame, x up, y to the left."""

    def __init__(self, width: int) -> None:
        self.scale = width * SMOOTH / (2 * ASIDE)
        self.image = Image.new("RGB", (width * SMOOTH, round((AHEAD + BEHIND) * self.scale)), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def pixels(self, points: Array) -> list[tuple[float, float]]:
        return [((ASIDE - y) * self.scale, (AHEAD - x) * self.scale) for x, y in points[:, :2].tolist()]

    def area(self, ring: Array, fill: Colour | None, edge: Colour | None = None, width: int = 1) -> None:
        self.pen.polygon(self.pixels(ring), fill=fill)
        if edge is not None:
            self.line(np.concatenate([ring, ring[:1]]), edge, width)

    def line(self, points: Array, colour: Colour, width: float = 1) -> None:
        self.pen.line(self.pixels(points), fill=colour, width=round(width * SMOOTH), joint="curve")

    def dashes(self, points: Array, colour: Colour, width: float, length: float = 1.5) -> None:
        along = np.append(0.0, np.hypot(*np.diff(points[:, :2], axis=0).T).cumsum())
        for start in np.arange(0.0, along[-1], 2 * length):
            at = np.linspace(start, min(start + length, along[-1]), 4)
            self.line(np.column_stack([np.interp(at, along, points[:, axis]) for axis in (0, 1)]), colour, width)

    def note(self, lines: Sequence[str], bottom: bool) -> None:
        """Lines of text in the upper or lower left corner, as large as fits."""
        margin, room = 5 * SMOOTH, self.image.width - 20 * SMOOTH
        longest = max(ImageFont.load_default(CAPTION * SMOOTH).getlength(line) for line in lines)
        size = CAPTION * SMOOTH * min(1.0, room / longest)
        font, step = ImageFont.load_default(size), round(size * 1.35)
        top = self.image.height - margin - step * len(lines) if bottom else margin
        for row, line in enumerate(lines):
            x, y = margin, top + row * step
            box = self.pen.textbbox((x, y), line, font=font)
            self.pen.rectangle((x - margin / 2, y, box[2] + margin / 2, y + step), fill=PAPER)
            self.pen.text((x, y), line, fill=INK, font=font)

    def finish(self) -> Image.Image:
        return self.image.resize((self.image.width // SMOOTH, self.image.height // SMOOTH), Image.Resampling.BOX)


def birds_eye(scene: Scene, plan: Plan | None = None, result: Epdms | None = None, width: int = 600) -> Image.Image:
    """The scene from above, the car pointing up: see `draw_scene`."""
    view, ego = _View(width), scene.ego[0, :3].cpu().numpy()
    _draw_map(view, scene, ego)
    _draw_agents(view, scene, ego)
    human = scene.human[0].cpu().numpy()
    if not np.isnan(human).any():
        _draw_drive(view, human, HUMAN_COLOUR, dashed=True)
    if plan is not None:
        _draw_candidates(view, plan, result)
    view.area(_box(np.zeros(3), rear_axle=True), (255, 255, 255), EGO_COLOUR, 3)
    if result is not None and result.details is not None:
        _mark_failures(view, scene, result, ego)
    _write_notes(view, scene, plan, result)
    return view.finish()


def _draw_map(view: _View, scene: Scene, ego: Array) -> None:
    polygons = list(_polygons(scene, ego))
    red = {int(row) for row, lit in zip(scene.light_polygon.tolist(), scene.light_red[:, 0].tolist(), strict=True) if lit}
    for layer in GROUND:
        for _, kind, _, rings in polygons:
            if kind == layer:
                view.area(rings[0], GROUND[layer])
                for hole in rings[1:]:
                    view.area(hole, PAPER)
    lanes = [polygon for polygon in polygons if polygon[1] in (Layer.LANE, Layer.LANE_CONNECTOR)]
    for row, _, on_route, rings in lanes:
        if row in red:
            view.area(rings[0], RED_LIGHT)
        elif on_route:
            view.area(rings[0], ROUTE)
    for _, _, _, rings in lanes:
        view.line(np.concatenate([rings[0], rings[0][:1]]), LANE_EDGE, 1)
    if len(scene.centerline) > 1:
        view.dashes(_to_ego(scene.centerline.cpu().numpy(), ego), CENTRELINE, 1.5)


def _polygons(scene: Scene, ego: Array) -> Iterator[tuple[int, int, bool, list[Array]]]:
    """Row, layer, on route, rings in the ego frame."""
    points, bounds, rings = _to_ego(scene.points.cpu().numpy(), ego), scene.point_offsets.tolist(), scene.ring_offsets.tolist()
    for row, (layer, on_route) in enumerate(zip(scene.polygon_layer.tolist(), scene.polygon_on_route.tolist(), strict=True)):
        yield row, layer, on_route, [points[bounds[ring] : bounds[ring + 1]] for ring in range(rings[row], rings[row + 1])]


def _draw_agents(view: _View, scene: Scene, ego: Array) -> None:
    """Boxes at t = 0, and where they are every second after, in outline."""
    states, valid = scene.agent_state.cpu().numpy(), scene.agent_valid.cpu().numpy()
    for agent, kind in enumerate(scene.agent_kind.tolist()):
        colour, size = KIND_COLOURS.get(kind, STATIC_COLOUR), scene.agent_size[agent].tolist()
        for step in (40, 30, 20, 10, 0):
            if valid[agent, step]:
                box = _box(_to_ego(states[agent, step, :3], ego), size)
                fade = tuple(round(c + (p - c) * step / 60) for c, p in zip(colour, PAPER, strict=True))
                moved = step and np.hypot(*(states[agent, step, :2] - states[agent, 0, :2])) > 0.5
                if step == 0:
                    view.area(box, colour, INK)
                elif moved:
                    view.line(np.concatenate([box, box[:1]]), fade, 1)  # type: ignore[arg-type]


def _draw_candidates(view: _View, plan: Plan, result: Epdms | None) -> None:
    """The worst first, so that the best lie on top."""
    poses = plan.poses[0].double().cpu().numpy()
    scores = np.ones(len(poses)) if result is None else result.score()[0].cpu().numpy()
    for row in np.argsort(scores):
        _draw_drive(view, poses[row], score_colour(scores[row]), dashed=False)


def score_colour(score: float) -> Colour:
    """Dark at 0, light at 1."""
    r, g, b = (WORST + (BEST - WORST) * min(max(score, 0.0), 1.0)).round().astype(int).tolist()
    return r, g, b


def _draw_drive(view: _View, poses: Array, colour: Colour, dashed: bool) -> None:
    path = np.concatenate([np.zeros((1, 3)), poses])
    if dashed:
        view.dashes(path, colour, 3, 0.8)
        return
    view.line(path, INK, 4)
    view.line(path, colour, 2.5)


def _mark_failures(view: _View, scene: Scene, result: Epdms, ego: Array) -> None:
    """The first failing moment of the worst candidate: its box there, crossed out."""
    assert result.details is not None
    worst = int(result.score()[0].argmin())
    found = failures(scene, result, worst)
    if not found:
        return
    states = _to_ego(result.details.states[0, worst, :, :3].cpu().numpy(), ego)
    moments = [failure for failure in found if failure.step or failure.metric in ("nc", "dac", "tlc")]
    if moments:
        box = _box(states[moments[0].step], rear_axle=True)
        view.area(box, None, RED_LIGHT, 4)
        view.line(box[[0, 2]], RED_LIGHT, 3)
        view.line(box[[1, 3]], RED_LIGHT, 3)


def _write_notes(view: _View, scene: Scene, plan: Plan | None, result: Epdms | None) -> None:
    """Above: the scene and the scores. Below: what the worst candidate does wrong, and what is drawn how."""
    words, causes = scene.token[0], list[str]()
    if result is not None:
        scores = result.score()[0]
        low, high = f"{float(scores.min()):.2f}", f"{float(scores.max()):.2f}"
        words += f"   EPDMS {high}" if scores.numel() == 1 else f"   EPDMS {low} to {high}"
        if result.details is not None:
            causes = [str(failure) for failure in failures(scene, result, int(scores.argmin()))]
    view.note([words], bottom=False)
    drawn = "dashed: human; " + ("" if plan is None else "solid: candidates, light = good; ") + "outlines: agents after 1 to 4 s"
    view.note([*causes, drawn], bottom=True)


def _to_ego(poses: Array, ego: Array) -> Array:
    """Points "... 2" or poses "... 3" of the map frame in the ego frame."""
    cos, sin = math.cos(ego[2]), math.sin(ego[2])
    x, y = poses[..., 0] - ego[0], poses[..., 1] - ego[1]
    moved = [cos * x + sin * y, cos * y - sin * x, *([poses[..., 2] - ego[2]] if poses.shape[-1] > 2 else [])]
    return np.stack(moved, axis=-1)


def _box(pose: Array, size: Sequence[float] = (LENGTH, WIDTH), rear_axle: bool = False) -> Array:
    """Corners "4 2": front left, rear left, rear right, front right. The pose is of the centre, or of the rear axle of the car."""
    cos, sin = math.cos(pose[2]), math.sin(pose[2])
    x, y = pose[0] + rear_axle * REAR_AXLE_TO_CENTRE * cos, pose[1] + rear_axle * REAR_AXLE_TO_CENTRE * sin
    along, across = np.array([cos, sin]) * size[0] / 2, np.array([-sin, cos]) * size[1] / 2
    return np.array([x, y]) + np.array([along + across, across - along, -along - across, along - across])


# -- cameras -----------------------------------------------------------------------------------------------------------


def camera_views(observation: Observation, scene: Scene, drive: Array | None, width: int, ground: float = 0.0) -> Image.Image:
    """Every camera image with the boxes of the agents at t = 0, the lanes and a drive "T 3", two in a row.

    Args:
        ground: height of the road in the ego frame [m].
    """
    assert observation.images is not None
    count = observation.images.shape[1]
    tiles = [project_onto(observation, camera, scene, drive, ground) for camera in range(count)]
    columns = 1 if count == 1 else 2
    tile_width = width // columns
    tile_height = round(tile_width * tiles[0].height / tiles[0].width)
    page = Image.new("RGB", (width, tile_height * math.ceil(count / columns)), PAPER)
    for row, tile in enumerate(tiles):
        page.paste(tile.resize((tile_width, tile_height)), (row % columns * tile_width, row // columns * tile_height))
    return page


def project_onto(observation: Observation, camera: int, scene: Scene, drive: Array | None = None, ground: float = 0.0) -> Image.Image:
    """One camera image with what the scene holds drawn over it, by its calibration."""
    assert observation.images is not None
    pixels = observation.images[0, camera]
    pixels = pixels if not pixels.is_floating_point() else (pixels * 255).round()
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    pen, lens = ImageDraw.Draw(image), _Lens(observation, camera)
    ego = scene.ego[0, :3].cpu().numpy()
    for _, layer, on_route, rings in _polygons(scene, ego):
        if layer in (Layer.LANE, Layer.LANE_CONNECTOR):
            closed = np.concatenate([rings[0], rings[0][:1]])
            lens.line(pen, _raised(closed, ground), (90, 200, 90) if on_route else (150, 150, 150), 1)
    for corners, colour in _boxes_in_space(scene, ego, ground):
        for edge in EDGES:
            lens.line(pen, corners[list(edge)], colour, 2)
    if drive is not None:
        lens.line(pen, _raised(np.concatenate([np.zeros((1, 3)), drive]), ground), (253, 200, 40), 4)
    return image


class _Lens:
    """Projection of one camera, with what is behind it cut off."""

    def __init__(self, observation: Observation, camera: int) -> None:
        assert observation.intrinsics is not None
        assert observation.camera_to_ego is not None
        self.intrinsics = observation.intrinsics[0, camera].double().cpu().numpy()
        self.from_ego = np.linalg.inv(observation.camera_to_ego[0, camera].double().cpu().numpy())

    def line(self, pen: ImageDraw.ImageDraw, points: Array, colour: Colour, width: int) -> None:
        """Draw a line through points "N 3" of the ego frame."""
        seen = points @ self.from_ego[:3, :3].T + self.from_ego[:3, 3]
        for start, end in itertools.pairwise(seen):
            if start[2] < NEAR and end[2] < NEAR:
                continue
            if min(start[2], end[2]) < NEAR:
                cut = start + (end - start) * (NEAR - start[2]) / (end[2] - start[2])
                start, end = (cut, end) if start[2] < NEAR else (start, cut)
            pen.line([self._pixel(start), self._pixel(end)], fill=colour, width=width)

    def _pixel(self, point: Array) -> tuple[float, float]:
        u, v, _ = self.intrinsics @ (point / point[2])
        return float(u), float(v)


def _raised(points: Array, height: float) -> Array:
    return np.column_stack([points[:, :2], np.full(len(points), height)])


def _boxes_in_space(scene: Scene, ego: Array, ground: float) -> Iterator[tuple[Array, Colour]]:
    """Corners "8 3" of the agents that are there at t = 0, ego frame."""
    for agent, kind in enumerate(scene.agent_kind.tolist()):
        if scene.agent_valid[agent, 0]:
            base = _box(_to_ego(scene.agent_state[agent, 0, :3].cpu().numpy(), ego), scene.agent_size[agent].tolist())
            height = HEIGHTS.get(Kind(kind), 1.2)
            yield np.concatenate([_raised(base, ground), _raised(base, ground + height)]), KIND_COLOURS.get(kind, STATIC_COLOUR)
