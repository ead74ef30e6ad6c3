"""The 220 routes of Bench2Drive, and which ability each needs.

`routes.json` holds facts of the benchmark's repository, at the commit that it names; `make_routes.py` writes it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

COUNT = 220  #: by which scores are divided, however many routes were driven
TRAFFIC_SIGNS = "Traffic_Signs"  #: the ability with a second chance


@dataclass(frozen=True)
class Route:
    """One route: its scenario type and its town in CARLA."""

    id: str
    town: str
    scenario: str


@functools.cache
def routes() -> Mapping[str, Route]:
    """The routes by id, in order of their numbers."""
    return {id: Route(id, town, scenario) for id, town, scenario in _facts()["routes"]}


@functools.cache
def abilities() -> Mapping[str, frozenset[str]]:
    """The scenario types that need an ability, by its official name. A type may need several."""
    return {name: frozenset(scenarios) for name, scenarios in _facts()["abilities"].items()}


def _facts() -> dict:
    return json.loads(resources.files(__package__).joinpath("routes.json").read_text())
