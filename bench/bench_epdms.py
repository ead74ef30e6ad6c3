"""Trajectories per second of the whole score (simulation, nine sub-metrics, aggregation), verified before anything is timed.

    python bench/bench_epdms.py [--quick] [--json FILE]

Beside it, in the same run: the geometric queries alone in vectorised shapely, and the official devkit where it can be
imported, through its evaluation call (one candidate at a time) and through one batched call. Neither is multi-threaded.
Scenes are generated; those of the official timing are added where the golden data is (IRLVLA_GOLDEN_DATA or ../shared/golden).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import irlvla
import peers
import scenes as bench_scenes
from irlvla import _C, Epdms, Scene, golden, ops
from irlvla.types import METRICS

SHAPES = ((1, 64), (64, 64), (64, 1024))
AGENTS = (30, 100)
THREADS = (1, 2)
GEOMETRIC = ("nc", "dac", "ddc", "tlc", "ttc", "lk")
PEERS = {"shapely*": "shapely_per_second", "devkit": "devkit_evaluate_per_second", "batched devkit": "devkit_batch_per_second"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer scenes, candidates and repetitions: a smoke test, not a measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    about = environment()
    print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    cases = [generated(agents, *((4, 64) if options.quick else SHAPES[-1])) for agents in AGENTS] + recorded(options.quick)
    results = [result for case in cases for result in bench(case, 0.05 if options.quick else 1.0)]
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


def environment() -> dict[str, str]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpuinfo, model = Path("/proc/cpuinfo"), platform.processor()
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
    changed = " + changes" if git("status", "--porcelain") else ""
    return {
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "cpu": f"{model} ({os.cpu_count()} logical)",
        "instructions": _C.isa(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


# --- what is scored ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Scenes, K plans for each, and the plan of the frame before (for EC)."""

    name: str
    scenes: Scene
    plans: torch.Tensor
    previous: torch.Tensor

    def part(self, scenes: int, candidates: int) -> Case:
        """The first of them, as a batch of its own about which nothing is known yet."""
        return Case(self.name, self.scenes[:scenes], self.plans[:scenes, :candidates].contiguous(), self.previous[:scenes].contiguous())

    def score(self, **options: Any) -> Epdms:
        return irlvla.epdms(self.scenes, self.plans, previous=self.previous, **options)


def generated(agents: int, scenes: int, candidates: int) -> Case:
    built = bench_scenes.build(scenes, agents)
    return Case(f"{agents} agents", built, bench_scenes.plans(built, candidates), bench_scenes.plans(built, 1, seed=1)[:, 0])


def recorded(quick: bool) -> list[Case]:
    """The scenes on which the devkit was timed, as one batch: 30 agents, 6 to 66 polygons."""
    root = os.environ.get("IRLVLA_GOLDEN_DATA")
    folder = (Path(root) if root else Path(__file__).parents[2] / "shared" / "golden") / "bench"
    if not folder.is_dir():
        return []
    found = golden.load(folder)
    plans = torch.stack([torch.from_numpy(scene.candidates[: 64 if quick else None]) for scene in found])
    previous = torch.stack([torch.from_numpy(scene.previous_candidates[0]) for scene in found])
    return [Case("golden/bench", Scene.cat([scene.scene for scene in found]), plans, previous)]


# --- measuring --------------------------------------------------------------------------------------------------------


def bench(case: Case, least: float) -> list[dict[str, Any]]:
    """Verify, then time for at least `least` seconds each: one result per shape and number of threads."""
    verify(case.part(len(case.scenes), 64))
    rates = peer_rates(case, least)
    results = []
    shapes = sorted({(min(b, len(case.scenes)), min(k, case.plans.shape[1])) for b, k in SHAPES})
    before = ops.get_num_threads()
    for threads in THREADS:
        ops.set_num_threads(threads)
        alone = [case.scenes[i] for i in range(len(case.scenes))]
        prepare = [seconds for scene in alone for seconds in repeated(lambda scene=scene: ops.prepare(scene), least / len(alone))]
        for b, k in shapes:
            part = case.part(b, k)
            warm = repeated(part.score, least)
            cold = [clock(case.part(b, k).score) for _ in range(3)]  # new scenes: they are prepared on the way
            results.append(
                {
                    "scenes": case.name,
                    "shape": f"{b} x {k}",
                    "threads": threads,
                    "per_second": b * k / statistics.median(warm),
                    "slowest": b * k / max(warm),
                    "fastest": b * k / min(warm),
                    "runs": len(warm),
                    "cold_per_second": b * k / statistics.median(cold),
                    "prepare_ms": 1e3 * statistics.median(prepare),
                    **{f"{peer}_per_second": rate for peer, rate in rates.items()},
                }
            )
    ops.set_num_threads(before)
    return results


def verify(case: Case) -> None:
    """Stop unless every sub-metric equals that of the peers, and does not depend on how the batch is cut."""
    raw, filtered = case.score(human_filter="none", details=True), case.score()
    by_devkit = 0
    for i in range(len(case.scenes)):
        one, states, where = case.scenes[i], raw.details.states[i].numpy(), f"{case.name}, scene {i}"
        want = peers.shapely_score(one, states)
        for metric in GEOMETRIC:
            require(np.array_equal(want[metric], raw.values[i, :, METRICS.index(metric)]), f"{where}: {metric} differs from shapely's")
        require(np.allclose(want["progress"], raw.details.progress[i], rtol=0, atol=1e-9), f"{where}: progress differs from shapely's")
        alone = irlvla.epdms(one, case.plans[i : i + 1, -1:], previous=case.previous[i : i + 1])
        require(torch.equal(alone.values[0, 0], filtered.values[i, -1]), f"{where}: the result depends on the batch")
        if i % max(1, len(case.scenes) // 3) == 0 and peers.devkit_available():
            devkit, plans, ours = peers.Devkit(one), case.plans[i, :8].numpy(), filtered.values[i, :8, :8]
            require(np.allclose(devkit.evaluate(plans), ours, rtol=0, atol=1e-9), f"{where}: differs from the devkit's")
            require(np.allclose(devkit.batch(plans)[1], states[:8], rtol=0, atol=1e-8), f"{where}: states differ from the devkit's")
            by_devkit += len(plans)
    means = ", ".join(f"{metric} {mean:.2f}" for metric, mean in zip(METRICS, raw.values.mean((0, 1)).tolist(), strict=True))
    print(f"{case.name}: {raw.nc.numel()} candidates equal to shapely's, {by_devkit} to the devkit's; means: {means}", flush=True)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"not verified, nothing timed: {message}")


def peer_rates(case: Case, least: float) -> dict[str, float]:
    """Candidates per second of the peers on one thread, median over the first scenes. What a peer can prepare once is prepared."""
    case = case.part(3, 256)
    states = case.score(details=True).details.states.numpy()
    rates: dict[str, list[float]] = {"shapely": []}
    for i in range(len(case.scenes)):
        one = case.scenes[i]
        world = peers.ShapelyScene(one)
        seconds = repeated(lambda i=i, one=one, world=world: peers.shapely_score(one, states[i], world), least)
        rates["shapely"].append(len(states[i]) / statistics.median(seconds))
        if peers.devkit_available():
            devkit, plans = peers.Devkit(one), case.plans[i].numpy()
            for call, chosen in ((devkit.evaluate, plans[:8]), (devkit.batch, plans[:64])):
                seconds = repeated(lambda call=call, chosen=chosen: call(chosen), least, runs=2)
                rates.setdefault(f"devkit_{call.__name__}", []).append(len(chosen) / statistics.median(seconds))
    return {peer: statistics.median(values) for peer, values in rates.items()}


def clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeated(call: Callable[[], Any], least: float, runs: int = 5) -> list[float]:
    """Seconds of each run once warm: at least so many runs, and for `least` seconds."""
    call()
    seconds: list[float] = []
    while len(seconds) < runs or sum(seconds) < least:
        seconds.append(clock(call))
    return seconds


def print_table(results: list[dict[str, Any]]) -> None:
    rows = [["scenes", "B x K", "threads", "per second", "(slowest - fastest)", "cold", *(f"x {peer}" for peer in PEERS), "prepare/scene"]]
    for r in results:
        ratios = [f"{r['per_second'] / r[key]:,.0f}" if key in r else "-" for key in PEERS.values()]
        spread = f"({r['slowest']:,.0f} - {r['fastest']:,.0f})"
        speeds = [f"{r['per_second']:,.0f}", spread, f"{r['cold_per_second']:,.0f}"]
        rows.append([r["scenes"], r["shape"], str(r["threads"]), *speeds, *ratios, f"{r['prepare_ms']:.2f} ms"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("Trajectories per second, median of runs; scenes known (cold: new). The peers, single-threaded, in candidates per second:")
    for name in dict.fromkeys(r["scenes"] for r in results):
        r = next(r for r in results if r["scenes"] == name)
        shown = [f"{label} {r[key]:,.0f}" for label, key in PEERS.items() if key in r]
        print(f"  {name}: {', '.join(shown)}")
    print("* shapely answers the geometric queries of given states only: no simulation, no comfort")


if __name__ == "__main__":
    main()
