"""The metrics of Bench2Drive, as its own scripts compute them (tools/merge_route_json.py, ability_benchmark.py and
efficiency_smoothness_benchmark.py, at the commit of routes.json).

Sums are correctly rounded here: a value may differ from that of the scripts, which depends on the order of the files, in its last bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from irlvla_bench2drive.records import SLOW, Record
from irlvla_bench2drive.routes import COUNT, TRAFFIC_SIGNS, abilities

IMPLAUSIBLE = 1000.0  #: speeds beyond are not counted [% of the traffic's]


def mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    given = list(values)
    return math.fsum(given) / len(given) if given else None


def driving_score(records: Sequence[Record]) -> float:
    """Mean over all 220 routes [%]; one that is missing counts as 0."""
    return math.fsum(record.score for record in records) / COUNT


def success_rate(records: Sequence[Record]) -> float:
    """Share of all 220 routes that were finished without an infraction."""
    return sum(record.succeeded for record in records) / COUNT


def efficiency(record: Record) -> float | None:
    """Mean speed along a route [% of the traffic's around it], over its checkpoints; None where there is none that counts.

    Raises `ValueError` for a message that names no speed.
    """
    speeds = []
    for message in record.infractions.get(SLOW, ()):
        found = re.search(r"\b\d+\.?\d*%", message)
        if found is None:
            raise ValueError(f"route {record.route.id}: {message!r} names no speed in per cent")
        speeds.append(float(found[0].rstrip("%")))
    return mean(speed for speed in speeds if speed <= IMPLAUSIBLE)


@dataclass(frozen=True)
class Ability:
    """How often a car did what an ability asks, among the routes that were driven."""

    name: str
    successes: int
    undecided: int  #: failed routes that may have succeeded: whether they did says the place of their first junction
    driven: int

    @property
    def value(self) -> float | None:
        """Share of the driven routes; None without a route, or while one is undecided."""
        return self.successes / self.driven if self.driven and not self.undecided else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What the value is not below, and not above; None without a route."""
        return (self.successes / self.driven, (self.successes + self.undecided) / self.driven) if self.driven else None


def ability_of(records: Sequence[Record], junctions: Mapping[str, float] | None) -> list[Ability]:
    """The five abilities. Routes that are missing count in none.

    Traffic signs have a second chance: a failed route counts if the car came past its first junction and ran no red light and no
    stop sign.

    Args:
        junctions: share of a route up to behind its first junction, by route; None = not known (`in_carla/junctions.py` finds it).

    Raises:
        KeyError: a route that needs it is not in `junctions`.
    """
    found = []
    for name, scenarios in abilities().items():
        driven = [record for record in records if record.route.scenario in scenarios]
        second = [_second_chance(record, junctions) for record in driven if name == TRAFFIC_SIGNS and not record.succeeded]
        successes = sum(record.succeeded for record in driven) + second.count(True)
        found.append(Ability(name, successes, second.count(None), len(driven)))
    return found


def _second_chance(record: Record, junctions: Mapping[str, float] | None) -> bool | None:
    """Whether a car that failed obeyed the signs nevertheless; None = not known without the junctions."""
    if record.infractions.get("stop_infraction") or record.infractions.get("red_light") or record.completion == 0.0:
        return False
    return None if junctions is None else record.completion / 100.0 > junctions[record.route.id]
