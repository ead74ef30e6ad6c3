"""From a seed to a `World`: a road, who is about, now and then a hard case, and seven seconds of it all."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from irlvla.errors import InputError, did_you_mean
from irlvla.synthetic.angles import angle_of, between, cosine_sine
from irlvla.synthetic.avoidance import Way, plan_way
from irlvla.synthetic.cases import CASES as SCRIPTS
from irlvla.synthetic.cases import SUITABLE
from irlvla.synthetic.collisions import contacts
from irlvla.synthetic.families import FAMILIES as BUILDERS
from irlvla.synthetic.human import Driver
from irlvla.synthetic.population import populate
from irlvla.synthetic.stage import ALWAYS, HEIGHT, Random, Stage, with_velocity
from irlvla.synthetic.traffic import Mover, Traffic, simulate
from irlvla.synthetic.world import PAST, STEPS, Actor, World
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, WIDTH, Command, Kind, StateIndex

FAMILIES = tuple(BUILDERS)  #: road families
CASES = tuple(SCRIPTS)  #: scripted hard cases
UNSEEN = ("roundabout", "car_park")  #: families that the splits for training leave out
SPLITS = ("train", "val", "test", "unseen")
SEEDS = 1_000_000_000  #: in each split
HARD_CASES = 0.4  #: share of hard cases, where none are asked for

STAGES = 20  # set on one road, before another road is drawn
EASTING, NORTHING = (3e5, 7e5), (3e6, 5e6)  # of a world's origin, as UTM has them [m]
COMMANDED = (-60.0, 25.0)  # a turn is commanded between these distances from the junction's begin [m]


@dataclass(frozen=True)
class Split:
    """Worlds for one purpose, by seed and by road family."""

    first: int  # seed
    families: tuple[str, ...]

    def worlds(self, count: int, start: int = 0) -> Iterator[World]:
        """The worlds from `start` on."""
        return make_worlds(count, self.first + start, self.families)


def split(name: str, unseen: Sequence[str] = UNSEEN) -> Split:
    """One of `SPLITS`: no seed is in two of them. "unseen" has the families that the others do not have.

    Raises:
        InputError: there is no such split or family.
    """
    _require("split", name, SPLITS)
    for family in unseen:
        _require("family", family, FAMILIES)
    families = tuple(family for family in FAMILIES if (family in unseen) == (name == "unseen"))
    if not families:
        raise InputError(f"split {name!r} has no road family left; unseen={list(unseen)} of {', '.join(FAMILIES)}")
    return Split(SPLITS.index(name) * SEEDS, families)


def make_worlds(count: int, seed: int = 0, families: Sequence[str] | None = None, cases: Sequence[str] | None = None) -> Iterator[World]:
    """Worlds from consecutive seeds; families and cases are drawn from those given (see `make_world`)."""
    return (make_world(number, *_draw(number, families, cases)) for number in range(seed, seed + count))


def make_world(seed: int, family: str | None = None, case: str | None = None) -> World:
    """One world. The same arguments make the same world on every machine.

    Args:
        seed: an integer from 0 on.
        family: one of `FAMILIES`; None draws one.
        case: one of `CASES` that can happen there, or "" for ordinary traffic; None draws one, often "".

    Raises:
        InputError: there is no such family or case, or it cannot happen there, or the seed is negative.
    """
    family, case = _draw(seed, None if family is None else (family,), None if case is None else (case,))
    attempts = (_attempt(seed, family, case, number) for number in itertools.count())  # about one in ten does not come off
    return next(world for world in attempts if world is not None)


def _draw(seed: int, families: Sequence[str] | None, cases: Sequence[str] | None) -> tuple[str, str]:
    """A family and a case that can happen in it."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"a seed is an integer from 0 on, not {seed!r}")
    families = FAMILIES if families is None else tuple(families)
    for family in families:
        _require("family", family, FAMILIES)
    for case in cases or ():
        _require("case", case, ("", *CASES))
    possible = {family: [case for case in ("", *SUITABLE[family]) if cases is None or case in cases] for family in families}
    able = [family for family in families if possible[family]]
    if not able:
        known = "; ".join(f"{family}: {', '.join(SUITABLE[family])}" for family in families)
        raise InputError(f"{' or '.join(map(repr, cases or ()))} cannot happen in {' or '.join(families)}. What can: {known}")
    rng = np.random.default_rng([seed, zlib.crc32(b"family and case")])
    family = able[int(rng.integers(len(able)))]
    if cases is None and rng.random() >= HARD_CASES:
        return family, ""
    drawn = [case for case in possible[family] if case or cases is not None]
    return family, drawn[int(rng.integers(len(drawn)))]


def _require(what: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise InputError(f"there is no {what} {given!r}. {did_you_mean(given, accepted)}Accepted: {', '.join(map(repr, accepted))}")


# -- a world -----------------------------------------------------------------------------------------------------------


def _attempt(seed: int, family: str, case: str, number: int) -> World | None:
    token = f"{family}-{case or 'plain'}-{seed}"
    stage = _set_stage(np.random.default_rng([seed, zlib.crc32(token.encode()), number]), family, case)
    return None if stage is None else _play(stage, token, family, case, seed)


def _set_stage(rng: Random, family: str, case: str) -> Stage | None:
    """A road somewhere on the map with everybody on it; None if the case does not fit on it."""
    layout = BUILDERS[family](rng, case).moved(between(rng, *EASTING), between(rng, *NORTHING), between(rng, -3.14, 3.14))
    for _ in range(STAGES):
        stage = Stage.on(rng, layout)
        if not stage.starts_at_red and (not case or SCRIPTS[case](stage)):
            populate(stage)
            return stage
    return None


def _play(stage: Stage, token: str, family: str, case: str, seed: int) -> World | None:
    """What happens on a stage; None if anybody touches anybody."""
    way = plan_way(stage)
    for obstacle in stage.obstacles:
        obstacle.passed = obstacle.stands and way.passes
    stage.movers[0].pace = way.pace
    driver = _driver(stage, way)
    places = simulate(Traffic(stage.layout, stage.movers, stage.obstacles), driver)
    actors = (*_actors(stage.movers[1:], places.T[1:]), *stage.things, *stage.bystanders)
    ego = driver.states()
    if _collides((ego_actor(ego), *actors)):
        return None
    distance = float(places[PAST, 0]) - stage.route.junction
    command = stage.route.command if COMMANDED[0] < distance < COMMANDED[1] else Command.STRAIGHT
    return World(token, family, case, seed, stage.layout.roads, actors, ego, stage.route.lanes, int(command))


def _driver(stage: Stage, way: Way) -> Driver:
    narrowest = min(stage.layout.roads.lanes[lane].width for lane in stage.route.lanes)
    return Driver(stage.rng, stage.character, stage.path, way.aside, 0.5 * (narrowest - WIDTH))


def _actors(movers: Sequence[Mover], places: Float[np.ndarray, "V STEPS"]) -> list[Actor]:
    """Vehicles that followed their paths; they are gone once they reach the end."""
    poses = np.array([mover.path.poses(place) for mover, place in zip(movers, places, strict=True)]).reshape(-1, STEPS, 3)
    left = np.array([np.full(STEPS, mover.left) for mover in movers]).reshape(-1, STEPS)
    slope = np.zeros_like(left)
    for i, mover in enumerate(movers):
        if mover.change:
            left[i], slope[i] = mover.change.at(places[i])
    cosine, sine = cosine_sine(poses[..., 2])
    poses[..., 0] -= left * sine
    poses[..., 1] += left * cosine
    poses[..., 2] += angle_of(1.0, slope)
    there = [place < mover.path.length - 1.0 for mover, place in zip(movers, places, strict=True)]
    parts = zip(movers, with_velocity(poses), there, strict=True)
    return [
        Actor(f"{mover.kind.name.lower()}-{number}", mover.kind, mover.size, state, valid, mover.role)
        for number, (mover, state, valid) in enumerate(parts)
    ]


def ego_actor(ego: Float[np.ndarray, "STEPS 11"]) -> Actor:
    """The person's car, as others meet it."""
    cosine, sine = cosine_sine(ego[:, StateIndex.HEADING])
    centre = ego[:, :3] + REAR_AXLE_TO_CENTRE * np.stack([cosine, sine, np.zeros(STEPS)], axis=1)
    return Actor("car", Kind.VEHICLE, (LENGTH, WIDTH, HEIGHT), with_velocity(centre), ALWAYS)


def _collides(actors: Sequence[Actor]) -> bool:
    """Whether a vehicle touches anybody; people on foot or on bicycles may brush past each other."""
    vehicle = np.array([actor.kind == Kind.VEHICLE for actor in actors])
    touching = contacts(actors)
    return bool((vehicle[touching[:, 0]] | vehicle[touching[:, 1]]).any())
