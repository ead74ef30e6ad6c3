"""Images per second and core of the cameras of the embedded world, verified before anything is timed.

    python bench/bench_cameras.py [--quick] [--json FILE]

One thread; every road family; a new scene for each rig of cameras, as in training. Seconds are CPU time of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench_epdms import environment, require
from irlvla import ops
from irlvla.synthetic import cameras, ground, solids
from irlvla.synthetic.cameras import FRONT_RIG, NAVSIM_RIG, Rig, render
from irlvla.synthetic.scenarios import FAMILIES, make_world
from irlvla.synthetic.world import PAST, World

SIZE = (256, 704)
RIGS = {"8 cameras": NAVSIM_RIG, "3 cameras": FRONT_RIG}
PARTS = {  # what the time goes to: where it is called from, and its name
    "solids": (cameras, "solids_of"), "ground": (cameras, "surfaces"), "order": (solids.Solids, "seen_from"), "sky": (cameras, "_sky"),
    "projection": (cameras.View, "seen"), "painting": (cameras, "paint"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer scenes: a smoke test, not a measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    about = environment()
    print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    count = 1 if options.quick else 8
    worlds = {family: [make_world(seed, family) for seed in range(count)] for family in FAMILIES}
    verify([family[0] for family in worlds.values()])
    torch.set_num_threads(1)
    ops.set_num_threads(1)
    results = [measure(name, rig, family, worlds[family]) for name, rig in RIGS.items() for family in FAMILIES]
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


# --- verifying --------------------------------------------------------------------------------------------------------


def verify(worlds: list[World]) -> None:
    """Stop unless what looks like road is road, where the ray of each pixel meets the ground, and what looks like verge is not."""
    rig, checked = NAVSIM_RIG.resized(*SIZE), 0
    for world in worlds:
        images = render(world)
        require(torch.equal(images, render(world)), f"{world.token}: two renderings differ")
        for camera in range(len(rig)):
            pixels, points = ground_of(rig, camera, world)
            on_road = drivable(world, points)
            for colour, inside in ((ground.ASPHALT, True), (ground.CARPARK, True), (ground.PAVEMENT, False), (ground.GRASS, False)):
                same = (images[camera] == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0)[pixels]
                wrong = int((on_road[same] != inside).sum())
                require(wrong == 0, f"{world.token}, {rig.names[camera]}: {wrong} pixels of colour {colour} are at the wrong place")
                checked += int(same.sum())
    require(checked > 100_000 * len(worlds), f"only {checked} pixels could be checked")
    print(f"{checked} pixels of road and verge are where their rays meet the ground", flush=True)


def ground_of(rig: Rig, camera: int, world: World) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels that look at ground within 19 m, where there is no haze, and the points that they see (world frame)."""
    v, u = np.mgrid[: rig.height, : rig.width]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(rig.intrinsics[camera]).T @ rig.camera_to_ego[camera, :3, :3].T
    eye = rig.camera_to_ego[camera, :3, 3]
    points = eye[:2] + np.divide(-eye[2], rays[..., 2:], where=rays[..., 2:] < 0.0, out=np.full((*rays.shape[:2], 1), 1e3)) * rays[..., :2]
    near = np.hypot(points[..., 0], points[..., 1]) < 19.0
    x, y, heading = world.ego[PAST, :3]
    turn = np.array([[np.cos(heading), np.sin(heading)], [-np.sin(heading), np.cos(heading)]])
    return torch.from_numpy(near), points[near] @ turn + (x, y)


def drivable(world: World, points: np.ndarray) -> torch.Tensor:
    roads = world.roads
    blocks = {lane.roadblock for lane in roads.lanes if lane.layer.name == "LANE"}
    polygons = [*(roads.roadblocks[block] for block in blocks), *roads.intersections, *roads.carparks]
    offsets = np.cumsum([0, *map(len, polygons)])
    return ops.points_in_polygons(points, np.concatenate(polygons), offsets).any(1)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, rig: Rig, family: str, worlds: list[World]) -> dict[str, Any]:
    """Images per second, and the share of each part of the work."""
    render(worlds[0], rig)
    seconds = [clock(lambda world=world: render(world, rig)) for _ in range(3) for world in worlds]
    spent = dict.fromkeys(PARTS, 0.0)
    with contextlib.ExitStack() as stack:
        for part, (owner, function) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, function, timed(getattr(owner, function), part, spent)))
        total = sum(clock(lambda world=world: render(world, rig)) for world in worlds)
    rates = [len(rig) / s for s in seconds]
    return {
        "rig": name,
        "family": family,
        "per_second": len(rig) * len(seconds) / sum(seconds),
        "slowest": min(rates),
        "fastest": max(rates),
        "actors": sum(len(world.actors) for world in worlds) / len(worlds),
        "share": {part: used / total for part, used in spent.items()},
    }


def clock(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def timed(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The same function; what it takes is added to `spent`."""

    def call(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments)
        finally:
            spent[part] += time.process_time() - start

    return call


def print_table(results: list[dict[str, Any]]) -> None:
    rows = [["rig", "roads", "actors", "images/s", "(slowest - fastest)", *PARTS, "rest"]]
    for r in results:
        shares = [*r["share"].values(), 1.0 - sum(r["share"].values())]
        speeds = [f"{r['per_second']:,.0f}", f"({r['slowest']:,.0f} - {r['fastest']:,.0f})"]
        rows.append([r["rig"], r["family"], f"{r['actors']:.0f}", *speeds, *(f"{share:.0%}" for share in shares)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for rig in RIGS:
        mean = statistics.harmonic_mean([r["per_second"] for r in results if r["rig"] == rig])
        print(f"{rig}: {mean:,.0f} images of {SIZE[0]} x {SIZE[1]} per second and core over all families")


if __name__ == "__main__":
    main()
