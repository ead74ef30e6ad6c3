"""The stage: roads, the car on its route, and everything that a scene starts from, as it is being set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from irlvla.synthetic.angles import Array, between, cosine_sine_of
from irlvla.synthetic.human import Character
from irlvla.synthetic.layouts import Layout, Route
from irlvla.synthetic.paths import GRID, Path
from irlvla.synthetic.roads import placed
from irlvla.synthetic.traffic import Mover, Obstacle
from irlvla.synthetic.world import PAST, STEP, STEPS, Actor
from irlvla.types import LENGTH, WIDTH, Kind

Random = np.random.Generator
Size = tuple[float, float, float]

HEIGHT = 1.777  # of the car [m]
SIZES: dict[Kind, Size] = {
    Kind.PEDESTRIAN: (0.6, 0.6, 1.75),
    Kind.BICYCLE: (1.8, 0.6, 1.75),
    Kind.TRAFFIC_CONE: (0.4, 0.4, 0.75),
    Kind.BARRIER: (2.0, 0.5, 1.0),
    Kind.CONSTRUCTION_SIGN: (0.3, 0.8, 1.8),
    Kind.GENERIC: (0.7, 0.7, 1.1),
}
ALWAYS = np.ones(STEPS, dtype=bool)
TIME = (np.arange(STEPS) - PAST) * STEP  # of each step [s]


@dataclass
class Stage:
    """The car on a route, and who and what is about at the first step."""

    rng: Random
    layout: Layout
    route: Route
    path: Path
    character: Character
    now: float  # place of the car at t = 0, if nothing keeps it up [m]
    speed: float  # then
    movers: list[Mover] = field(default_factory=list)  # the first one is the car
    obstacles: list[Obstacle] = field(default_factory=list)
    bystanders: list[Actor] = field(default_factory=list)  # people, and what moves by script
    things: list[Actor] = field(default_factory=list)  # what stands
    paths: dict[tuple[int, ...], Path] = field(default_factory=dict)  # that have been laid
    taken: dict[int, list[tuple[float, float]]] = field(default_factory=dict)  # stretches of lanes that are not for other vehicles
    may_cross: bool = False  # the car may use the oncoming lane

    @classmethod
    def on(cls, rng: Random, layout: Layout) -> Stage:
        """The car on one of the routes."""
        route = layout.routes[int(rng.integers(len(layout.routes)))]
        path, character = Path.of(layout, route.lanes), Character.drawn(rng)
        now = between(rng, route.earliest, route.latest)
        speeds = path.speeds(layout, character.factor, character.comfort)
        speed = 0.95 * float(speeds[int(now / GRID)])
        stage = cls(rng, layout, route, path, character, now, speed)
        person = Mover(
            path, stage.first, (LENGTH, WIDTH, HEIGHT), factor=character.factor, comfort=character.comfort, headway=character.headway,
            min_gap=character.min_gap, delay=character.delay * STEP + 0.2,
        )  # fmt: skip
        stage.movers.append(person)
        stage.take_path(stage.first - 10.0 - speed, stage.first + 6.0 + 0.8 * speed)
        return stage

    @property
    def first(self) -> float:
        """Place of the car at the first step."""
        return self.now - self.speed * PAST * STEP

    def path_through(self, lanes: tuple[int, ...]) -> Path:
        if lanes not in self.paths:
            self.paths[lanes] = Path.of(self.layout, lanes)
        return self.paths[lanes]

    def pose(self, place: float, left: float = 0.0) -> Float[np.ndarray, "3"]:
        """A pose beside the route."""
        return np.array(placed(self.path.poses(np.array([place]))[0], 0.0, left))

    @property
    def starts_at_red(self) -> bool:
        """Whether the car would be at the first step where it must not be: beyond a stop line at red."""
        lanes, signals = self.layout.roads.lanes, self.layout.roads.signals
        red = any(signals[light].red[0] for lane in self.path.lanes if (light := lanes[lane].signal) is not None)
        return red and self.first + 0.5 * LENGTH > self.route.junction - 1.0

    def take(self, lane: int, first: float, last: float) -> None:
        """Keep other vehicles off a stretch of a lane."""
        self.taken.setdefault(lane, []).append((first, last))

    def take_path(self, first: float, last: float, side: int = 0) -> None:
        """Keep them off a stretch of the route, or of the lanes to its left (1) or right (-1)."""
        for lane, begin in zip(self.path.lanes, self.path.begins.tolist(), strict=True):
            record = self.layout.roads.lanes[lane]
            other = (lane, record.left, record.right)[side]
            if other is not None:
                self.take(other, first - begin, last - begin)

    def is_free(self, lane: int, along: float, half: float) -> bool:
        return all(along + half < first or along - half > last for first, last in self.taken.get(lane, ()))

    def put(self, kind: Kind, pose: Array, size: Size | None = None, role: str = "") -> None:
        """Something that stands."""
        state = np.zeros((STEPS, 5))
        state[:, :3] = pose
        self.things.append(Actor(f"{kind.name.lower()}-standing-{len(self.things)}", kind, size or SIZES[kind], state, ALWAYS, role))

    def let_move(self, kind: Kind, poses: Float[np.ndarray, "STEPS 3"], size: Size | None = None, role: str = "") -> None:
        """Something that moves through these poses, come what may."""
        name = f"{kind.name.lower()}-{role or 'passing'}-{len(self.bystanders)}"
        self.bystanders.append(Actor(name, kind, size or SIZES[kind], with_velocity(poses), ALWAYS, role))

    def starts(self) -> Float[np.ndarray, "N 2"]:
        """Where everybody and everything is at the first step."""
        movers = [mover.path.poses(np.array([mover.place]))[0, :2] for mover in self.movers]
        return np.array([*movers, *(actor.state[0, :2] for actor in (*self.things, *self.bystanders))])


def with_velocity(poses: Float[np.ndarray, "*n STEPS 3"]) -> Float[np.ndarray, "*n STEPS 5"]:
    """Poses and their velocities, by central differences."""
    xy = poses[..., :2]
    velocity = np.empty_like(xy)
    velocity[..., 1:-1, :] = (xy[..., 2:, :] - xy[..., :-2, :]) / (2.0 * STEP)
    velocity[..., 0, :], velocity[..., -1, :] = (xy[..., 1, :] - xy[..., 0, :]) / STEP, (xy[..., -1, :] - xy[..., -2, :]) / STEP
    return np.concatenate([poses, velocity], axis=-1)


def straight_on(start: Array, walked: Array, turned: float = 0.0) -> Float[np.ndarray, "STEPS 3"]:
    """Poses so many metres straight on from a pose; who is there has turned so far from where he goes."""
    cosine, sine = cosine_sine_of(float(start[2]))
    return np.stack([start[0] + walked * cosine, start[1] + walked * sine, np.full(len(walked), start[2] + turned)], axis=1)


def car_size(rng: Random, *, trucks: bool = False) -> Size:
    """Of a car, a van, and now and then a lorry."""
    kind = rng.random()
    if kind < 0.08 and trucks:
        return between(rng, 7.5, 10.0), between(rng, 2.4, 2.5), between(rng, 3.0, 3.6)
    if kind < 0.2:
        return between(rng, 5.0, 5.8), between(rng, 1.95, 2.05), between(rng, 2.0, 2.4)
    return between(rng, 4.0, 5.0), between(rng, 1.75, 1.95), between(rng, 1.45, 1.75)
