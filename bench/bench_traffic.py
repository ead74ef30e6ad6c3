"""Candidates per second and core in reactive traffic, beside log replay, verified before anything is timed.

    python bench/bench_traffic.py [--quick] [--json FILE]

The embedded world, every road family, one thread. Seconds are CPU time of this process; the two kinds of traffic take turns. Scenes are
prepared; what preparing them takes is told apart. The slow reference drives a few candidates, first to verify, then to compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import irlvla
from bench_epdms import environment, require
from irlvla import ops
from irlvla.ops import reference
from irlvla.synthetic import FAMILIES, make_worlds, to_scenes
from irlvla.types import Kind, Scene
from scenes import plans

SEED = 30_000
WANTED = 0.25  # of the throughput of log replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer scenes and repetitions: a smoke test, not a measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    about = environment()
    print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    torch.set_num_threads(1)
    ops.set_num_threads(1)
    count, candidates, times = (9, 64, 5) if options.quick else (72, 256, 15)
    scenes = Scene.cat(to_scenes(make_worlds(count, SEED, FAMILIES)))
    result = measure(scenes, candidates, times) | {"slow": verify(scenes, 2 if options.quick else 6)}
    report(result)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "result": result}, indent=1) + "\n")


def verify(scenes: Scene, count: int) -> float:
    """The kernel's agents are those of the reference. Returns the reference's seconds for a candidate."""
    clock = time.process_time()
    for i in range(count):
        one = scenes[i]
        states = ops.simulate(plans(one, 1)[0], one.ego, one.time_us)
        slow, there = reference.traffic.rollout(one, states[0])
        _, fast, present = ops.traffic(one, states, torch.tensor([0]))
        require(torch.equal(there, present), f"scene {i}: other agents are there")
        require(torch.allclose(slow[there], fast[there], rtol=0.0, atol=1e-8), f"scene {i}: agents are elsewhere")
    return (time.process_time() - clock) / count


def measure(scenes: Scene, candidates: int, times: int) -> dict[str, Any]:
    sampled = plans(scenes, candidates)
    run: dict[str, Callable[[], Any]] = {
        kind: lambda kind=kind: irlvla.epdms(scenes, sampled, traffic=kind) for kind in ("log", "reactive")
    }
    prepared = {kind: seconds(work) for kind, work in run.items()}
    taken: dict[str, list[float]] = {kind: [] for kind in run}
    for _ in range(times):
        for kind, work in run.items():
            taken[kind].append(seconds(work))
    n = len(scenes) * candidates
    vehicles = int(((scenes.agent_kind == Kind.VEHICLE) & scenes.agent_valid[:, 0]).sum()) / len(scenes)
    rates = {kind: n / statistics.median(all_of) for kind, all_of in taken.items()}
    ratio = statistics.median(log / reactive for log, reactive in zip(taken["log"], taken["reactive"], strict=True))
    first = {kind: (prepared[kind] - statistics.median(taken[kind])) / len(scenes) for kind in run}
    return {"scenes": len(scenes), "candidates": candidates, "vehicles": vehicles, "rates": rates, "ratio": ratio, "prepare": first}


def seconds(work: Callable[[], Any]) -> float:
    clock = time.process_time()
    work()
    return time.process_time() - clock


def report(result: dict[str, Any]) -> None:
    print(f"{result['scenes']} scenes of {result['vehicles']:.1f} vehicles, {result['candidates']} candidates each")
    for kind, rate in result["rates"].items():
        each, prepare = 1e6 / rate, 1e3 * result["prepare"][kind]
        print(f"{kind:9} {rate:10,.0f} candidates/s and core, {each:6.1f} us each; prepare {prepare:.2f} ms a scene")
    print(f"reactive keeps {result['ratio']:.3f} of the throughput of log replay (wanted {WANTED})")
    print(f"the slow reference takes {result['slow']:.2f} s for the traffic of a candidate")


if __name__ == "__main__":
    main()
