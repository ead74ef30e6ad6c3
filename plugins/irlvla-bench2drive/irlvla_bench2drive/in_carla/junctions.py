"""Where the first junction of each route of Bench2Drive is: python junctions.py ROUTES.xml MAPS OUT.json

Run it once where CARLA's Python API is (its `carla` and `agents` packages), from no server:

    ROUTES.xml  leaderboard/data/bench2drive220.xml of Bench2Drive
    MAPS        the folder above CARLA's OpenDRIVE files (*.xodr): $CARLA_ROOT/CarlaUE4/Content/Carla/Maps
    OUT.json    for benchmark.junctions

The ability "traffic signs" of Bench2Drive compares how far a car came with it. What is computed here is what Bench2Drive's
tools/ability_benchmark.py does: the share of a route up to its first junction, plus eight waypoints.
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

HOP = 1.0  # between waypoints [m]
BEHIND = 8  # waypoints by which a car has passed the junction


def main(routes_file: str, maps: str, out: str) -> None:
    from agents.navigation.global_route_planner import GlobalRoutePlanner

    routes = ElementTree.parse(routes_file).getroot().findall("route")
    junctions = {}
    for town in sorted({route.attrib["town"] for route in routes}):
        planner = GlobalRoutePlanner(read_map(maps, town), HOP)
        for route in routes:
            if route.attrib["town"] == town:
                share = junction_of(route, planner)
                if share is not None:
                    junctions[route.attrib["id"]] = share
    with open(out, "w") as stream:
        json.dump({"junctions": junctions}, stream, indent=1)
    print(f"{out}: {len(junctions)} of {len(routes)} routes have a junction")


def read_map(folder: str, town: str) -> Any:
    import carla

    for above, _, names in os.walk(folder):
        if town + ".xodr" in names:
            with open(os.path.join(above, town + ".xodr"), encoding="utf-8") as stream:
                return carla.Map(town, stream.read())
    sys.exit(f"{folder} holds no {town}.xodr")


def junction_of(route: Any, planner: Any) -> float | None:
    """Share of a route up to behind its first junction; None if it has none."""
    import carla

    places = [carla.Location(*(float(place.get(axis)) for axis in "xyz")) for place in route.find("waypoints").findall("position")]
    waypoints = []
    for i in range(len(places) - 1):
        waypoints += [waypoint for waypoint, _ in planner.trace_route(places[i], places[i + 1])]
    for count, waypoint in enumerate(waypoints, start=1):
        if waypoint.is_junction:
            return float(count + BEHIND) / len(waypoints)
    return None


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
