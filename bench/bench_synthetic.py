"""Scenes per second and core of the embedded world, without images, verified before anything is timed.

    python bench/bench_synthetic.py [--quick] [--json FILE]

One thread; every road family, ordinary traffic and hard cases as they come. Seconds are CPU time of this process. The
PDM-Closed reference, which any scene needs before it is scored, is told apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import irlvla
from bench_epdms import environment, require
from irlvla import ops
from irlvla.synthetic import FAMILIES, World, make_world, make_worlds, to_scenes

SEED = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer scenes: a smoke test, not a measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    about = environment()
    print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    torch.set_num_threads(1)
    ops.set_num_threads(1)
    count = 4 if options.quick else 100
    results = [measure(family, count) for family in FAMILIES]
    results.append(total(results))
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


def measure(family: str, count: int) -> dict[str, Any]:
    """Seconds for worlds, scenes and references of one family; and what its human scores, which shows that they are sound."""
    make_world(SEED, family)
    clock = [time.process_time()]
    worlds = list(make_worlds(count, SEED, [family]))
    clock.append(time.process_time())
    scenes = to_scenes(worlds, reference=False)
    clock.append(time.process_time())
    scenes.reference.copy_(irlvla.pdm_closed(scenes))
    clock.append(time.process_time())
    verify(worlds, scenes)
    human = float(irlvla.epdms(scenes, scenes.human, human_filter="none").score().mean())
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    actors = sum(len(world.actors) for world in worlds) / count
    return {"family": family, "scenes": count, "seconds": seconds, "actors": actors, "human": human}


def verify(worlds: list[World], scenes: irlvla.Scene) -> None:
    """Stop unless a world made again is the same, all that moves does so smoothly, and the human drives well."""
    again = make_world(worlds[0].seed, worlds[0].family, worlds[0].case)
    require(np.array_equal(again.ego, worlds[0].ego), f"{again.token} is another one when it is made again")
    for world in worlds:
        for actor in world.actors:
            step = np.diff(actor.state[actor.valid, :2], axis=0)
            require(bool((np.abs(step) < 4.0).all()), f"{world.token}: {actor.name} jumps")
    score = irlvla.epdms(scenes, scenes.human, human_filter="none").score().mean()
    require(bool(score > 0.5), f"{worlds[0].family}: the human scores {score:.3f}")


def total(results: list[dict[str, Any]]) -> dict[str, Any]:
    count = sum(result["scenes"] for result in results)
    mean = {name: sum(result[name] for result in results) / len(results) for name in ("actors", "human")}
    seconds = np.sum([result["seconds"] for result in results], axis=0).tolist()
    return {"family": "all", "scenes": count, "seconds": seconds, **mean}


def print_table(results: list[dict[str, Any]]) -> None:
    columns = {"scenes": 7, "actors": 7, "world ms": 9, "scene ms": 9, "PDM-Closed ms": 14, "scenes/s": 9, "human": 7}
    print("\nfamily        ", *(f"{name:>{width}s}" for name, width in columns.items()))
    for result in results:
        world, scene, reference = (1e3 * part / result["scenes"] for part in result["seconds"])
        row = result["scenes"], result["actors"], world, scene, reference, 1e3 / (world + scene), result["human"]
        digits = (0, 1, 1, 2, 1, 1, 3)
        print(f"{result['family']:14s}", *(f"{v:{w}.{d}f}" for v, w, d in zip(row, columns.values(), digits, strict=True)))
    print("scenes/s: world and scene, without PDM-Closed")


if __name__ == "__main__":
    main()
