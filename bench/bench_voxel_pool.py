"""Milliseconds of BEV voxel pooling, forward and forward + backward, verified before anything is timed.

    python bench/bench_voxel_pool.py [--quick] [--json FILE] [--device cuda] [--bevdet FOLDER]

NAVSIM's eight cameras with features of 16 x 44 to 128 x 128 cells. Peers are torch's embedding_bag, gather + index_add_, and the
volume of Lift, Splat, Shoot with index_add_ and with QuickCumsum, all with planned indices, on the same cores (or the same GPU, in
CUDA graphs where they can be captured); on a GPU also BEVDet's bev_pool_v2, given the folder mmdet3d/ops/bev_pool_v2 of its source.
Methods take turns, so that a noisy moment hits all of them. The limit is the time of a copy that moves as many bytes as pooling has
to: inputs, runs and outputs once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_epdms import environment, require
from irlvla import ops
from irlvla.ops import Grid, VoxelPoolPlan, depth_bins, reference
from irlvla.synthetic.cameras import NAVSIM_RIG
from pool_peers import Points, bevdet

IMAGE, FEATURES, GRID = (256, 704), (16, 44), Grid()
BINS = (59, 118)
CHANNELS = (64, 80, 128, 256)
BATCHES = {"cpu": (1, 4), "cuda": (1, 32)}
THREADS = {"cpu": (1, 2), "cuda": (1,)}
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LEADING = {"cpu": "f32", "cuda": "f16"}  # the type that is compared with a copy
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SLOW = {"gather", "volume", "cumsum"}  # a row per point: one scene is enough to see how slow
# Times f32 that a peer takes at least, one scene, on the CPU.
LEAST = (("forward", ("bag", "bag of weights"), 2.5), ("both", ("bag", "bag of weights"), 13.0), ("forward", ("gather",), 150.0))
MOST = {("forward", 1): 5.0, ("forward", 32): 45.0, ("backward", 1): 8.0, ("backward", 32): 65.0}  # us of f16, D 59, C 80, on an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size, few repetitions: a smoke test, not a measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--device", choices=BATCHES, default="cpu", help="where to measure")
    parser.add_argument(
        "--bevdet", type=Path, help="folder mmdet3d/ops/bev_pool_v2 of BEVDet's source, to compile and measure beside (cuda)"
    )
    options = parser.parse_args()
    about = environment() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {})
    print("  ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    results = []
    for bins, channels in [(59, 80)] if options.quick else [(d, c) for d in BINS for c in CHANNELS]:
        verify(Case(bins, channels, 1, options.device), options.bevdet)
        for batch in BATCHES[options.device]:
            for threads in THREADS[options.device]:
                torch.set_num_threads(threads)
                ops.set_num_threads(threads)
                results += measure(Case(bins, channels, batch, options.device), threads, options)
    for phase in dict.fromkeys(r["phase"] for r in results):
        print_table(results, phase)
    (print_checks if options.device == "cpu" else print_gpu_checks)(results)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


# --- what is pooled ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One size of the problem, the same rig for all scenes."""

    bins: int
    channels: int
    batch: int
    device: str

    def arguments(self) -> tuple[Any, ...]:
        rig = NAVSIM_RIG.resized(*IMAGE)
        depths = depth_bins(1.0, 60.0, 59.0 / self.bins)
        return torch.from_numpy(rig.intrinsics), torch.from_numpy(rig.camera_to_ego), FEATURES, depths

    def plan(self) -> VoxelPoolPlan:
        return VoxelPoolPlan.build(*self.arguments(), GRID, image_size=IMAGE, device=self.device)

    def cells(self) -> Tensor:
        return reference.cells_of(reference.points_of(*self.arguments(), IMAGE), GRID)[None].expand(self.batch, -1, -1, -1, -1)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Features (channels last in memory), logits of depth, and a gradient from above, also channels last."""
        generator = torch.Generator().manual_seed(0)
        sizes = [(8, *FEATURES, self.channels), (8, self.bins, *FEATURES), (*GRID.shape, self.channels)]
        features, logits, grad = (torch.randn(self.batch, *size, generator=generator).to(self.device, dtype) for size in sizes)
        return features.movedim(-1, 2), logits, grad.permute(0, 3, 1, 2)

    def bytes(self, phase: str) -> int:
        """What has to be read and written at least, in the type of `LEADING`: by the forward pass, the backward pass, or both."""
        size = 4 if LEADING[self.device] == "f32" else 2
        cells, pixels = GRID.cells * self.channels, 8 * FEATURES[0] * FEATURES[1] * (self.channels + self.bins)
        moved = {"forward": cells + pixels, "backward": cells + 2 * pixels, "both": 2 * cells + 3 * pixels}[phase]
        return size * self.batch * moved + 8 * len(self.plan()) * (2 if phase == "both" else 1)


@dataclass(frozen=True)
class Method:
    """A way to pool, with inputs of its own."""

    name: str
    pool: Callable[[Tensor, Tensor], Tensor]
    inputs: tuple[Tensor, Tensor]
    grad: Tensor
    captured: tuple[str, ...] = ("forward", "backward", "both")  # phases that a CUDA graph can hold

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.pool(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.pool(*self.inputs), self.inputs, self.grad)

    def prepare(self, phase: str) -> Callable[[], Any]:
        """What is to be timed; before the backward pass alone, the forward pass."""
        if phase != "backward":
            return getattr(self, phase)
        bev = self.pool(*self.inputs)
        return lambda: torch.autograd.grad(bev, self.inputs, self.grad, retain_graph=True)


def methods(case: Case, source: Path | None = None) -> Iterator[Method]:
    """Ours in every type, with depth given and with its softmax on the way; then the peers, in float32."""
    plan = case.plan()
    for name, dtype in TYPES.items():
        features, logits, grad = case.inputs(dtype)
        given = (features.requires_grad_(), logits.float().softmax(2).to(dtype).requires_grad_())
        yield Method(name, lambda f, d: ops.voxel_pool(f, d, plan), given, grad)
        yield Method(f"{name} softmax", lambda f, d: ops.voxel_pool(f, d, plan, softmax=True), (features, logits.requires_grad_()), grad)
    features, logits, grad = case.inputs()
    depth = logits.softmax(2)
    points = Points.of(case.cells().to(case.device), GRID.shape)
    both = (features.requires_grad_(), depth.requires_grad_())
    sorted_weights = depth.detach().reshape(-1)[points.bags.weight].requires_grad_()
    yield Method("bag", points.bag, both, grad, ("forward",))
    yield Method("bag of weights", points.bag_of_weights, (features, sorted_weights), grad, ("forward",))
    if case.batch == 1:
        yield Method("gather", points.gather, both, grad)
        yield Method("volume", points.volume, both, grad)
        yield Method("cumsum", points.cumsum, both, grad, ())
    if source:
        yield Method("bevdet", bevdet(source, points, GRID.shape, case.batch), both, grad, ())


# --- verifying --------------------------------------------------------------------------------------------------------


def verify(case: Case, source: Path | None) -> None:
    """Stop unless every method agrees with float64 on its own inputs, ours as closely as its types allow."""
    known: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for method in methods(case, source):
        ours, softmax, dtype = method.name.split()[0] in TYPES, method.name.endswith("softmax"), method.inputs[0].dtype
        if method.name == "bag of weights":
            continue  # a part of `bag`
        if (dtype, softmax) not in known:
            known[dtype, softmax] = exact(case, *(a.detach().cpu().double() for a in (*method.inputs, method.grad)), softmax)
        bev, signless, *grads = known[dtype, softmax]
        rounding = ROUNDING[dtype] + (1e-6 if ours else 1e-5)
        error = (method.forward().cpu().double() - bev).abs() - rounding * (signless if ours else signless.amax())
        require(error.max().item() <= 1e-7, f"{method.name}, {case}: a sum is off by {error.max().item():.1e} more than it may")
        for got, want in zip(method.both(), grads, strict=True):
            error = (got.cpu().double() - want).abs().max() / want.abs().max()
            require(error.item() <= 2 * rounding + 1e-6, f"{method.name}, {case}: a gradient is off by {error.item():.1e}")
    print(
        f"D {case.bins}, C {case.channels}: {case.plan().points} points in {len(case.plan())} runs; all methods agree with float64",
        flush=True,
    )


def exact(case: Case, features: Tensor, depth: Tensor, grad: Tensor, softmax: bool) -> list[Tensor]:
    """Sums, sums without signs, and gradients in float64: by embedding_bag, whose sums are those of the plain reference."""
    cells = case.cells()
    bags = reference.bags_of(cells, GRID.cells)
    given = (features.requires_grad_(), depth.requires_grad_())
    bev = reference.voxel_pool_in_bags(*given, bags, GRID.shape, softmax=softmax)
    some = slice(0, 16)
    plain = reference.voxel_pool(features[:, :, some], depth, cells, GRID.shape, softmax=softmax)
    require(bool((plain - bev[:, some]).abs().max() < 1e-12), f"{case}: embedding_bag in float64 differs from the plain reference")
    with torch.no_grad():
        signless = reference.voxel_pool_in_bags(features.abs(), depth if softmax else depth.abs(), bags, GRID.shape, softmax=softmax)
    return [bev.detach(), signless, *torch.autograd.grad(bev, given, grad)]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(case: Case, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result per method and phase: milliseconds of single calls, methods in turn for some rounds."""
    rounds, span = (2, 0.0) if options.quick else (7, 0.02)
    results = []
    for phase in ("forward", "both") if case.device == "cpu" else ("forward", "backward", "both"):
        calls = {}
        for method in methods(case, options.bevdet):
            calls[method.name] = timer(functools.partial(method.prepare, phase), case.device, phase in method.captured)
        calls["copy"] = timer(functools.partial(copying, case.bytes(phase), case.device), case.device, True)
        spent: dict[str, list[float]] = {name: [] for name in calls}
        wall, cpu = time.perf_counter(), time.process_time()
        for turn in range(rounds):
            for name, call in calls.items():
                if name not in SLOW or turn % 3 == 0:
                    spent[name] += call(span)
        cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
        for name, seconds in spent.items():
            results.append(
                {
                    "bins": case.bins,
                    "channels": case.channels,
                    "batch": case.batch,
                    "threads": threads,
                    "device": case.device,
                    "phase": phase,
                    "method": name,
                    "ms": 1e3 * statistics.median(seconds),
                    "fastest_ms": 1e3 * min(seconds),
                    "slowest_ms": 1e3 * max(seconds),
                    "runs": len(seconds),
                    "bytes": case.bytes(phase),
                    "cores": cores,
                    "load": os.getloadavg()[0],
                }
            )
    return results


def copying(moved: int, device: str) -> Callable[[], Tensor]:
    """Reads one half of so many bytes, and writes the other."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def timer(prepare: Callable[[], Callable[[], Any]], device: str, capture: bool) -> Callable[[float], list[float]]:
    """A function that measures calls for so many seconds, at least one, and returns the seconds of each."""
    return _on_cpu(prepare()) if device == "cpu" else _on_gpu(prepare, capture)


def _on_cpu(call: Callable[[], Any]) -> Callable[[float], list[float]]:
    def measured(span: float) -> list[float]:
        call()  # what the method before left in the caches is not for this one
        seconds: list[float] = []
        while not seconds or sum(seconds) < span:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return measured


def _on_gpu(prepare: Callable[[], Callable[[], Any]], capture: bool, calls: int = 50) -> Callable[[float], list[float]]:
    """By events around many calls; in a graph, launching costs nothing."""
    if capture:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # gradients flow on the stream of the forward pass
            captured = prepare()
            for _ in range(3):
                captured()
        with torch.cuda.graph(graph, stream=stream):
            captured()
        call: Callable[[], Any] = graph.replay
    else:
        call = prepare()

    def measured(span: float) -> list[float]:
        seconds: list[float] = []
        while not seconds or calls * sum(seconds) < span:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            seconds.append(1e-3 * start.elapsed_time(end) / calls)
        return seconds

    return measured


# --- printing ---------------------------------------------------------------------------------------------------------

Key = tuple[int, int, int, int]  # bins, channels, batch, threads


def by_case(results: list[dict[str, Any]], phase: str) -> dict[Key, dict[str, dict[str, Any]]]:
    """Results of a phase by case and method."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    for r in results:
        if r["phase"] == phase:
            found.setdefault((r["bins"], r["channels"], r["batch"], r["threads"]), {})[r["method"]] = r
    return found


def print_table(results: list[dict[str, Any]], phase: str) -> None:
    cases = by_case(results, phase)
    ours = [name for name in next(iter(cases.values())) if name.split()[0] in TYPES]
    peers = list(dict.fromkeys(name for found in cases.values() for name in found if name not in (*ours, "copy")))
    rows = [["D", "C", "B", "threads", "f32", *ours[1:], "bag", *(f"x {peer}" for peer in peers), "copy", "share", "cores", "load"]]
    for key, found in cases.items():
        f32, copy = found["f32"], found["copy"]
        leading = found[LEADING[f32["device"]]]
        ratios = [f"{found[peer]['ms'] / f32['ms']:.1f}" if peer in found else "-" for peer in peers]
        rate = f"{copy['bytes'] / copy['ms'] * 1e-6:.0f} GB/s"
        state = [f"{copy['ms'] / leading['ms']:.0%}", f"{f32['cores']:.2f}", f"{f32['load']:.1f}"]
        rows.append(
            [*map(str, key), spread(f32), *(f"{found[name]['ms']:.3f}" for name in ours[1:]), spread(found["bag"]), *ratios, rate, *state]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{phase if phase != 'both' else 'forward + backward'}, ms")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def spread(result: dict[str, Any]) -> str:
    return f"{result['ms']:.3f} ({result['fastest_ms']:.3f} - {result['slowest_ms']:.3f})"


NOTES = """
Median (fastest - slowest) of single calls; x: median of a peer, in float32, over that of f32. softmax: of depth, on the way.
bag: embedding_bag and the gather that sorts its weights; "bag of weights": weights sorted before, for nothing. gather, volume,
cumsum: gather + index_add_; the volume of Lift, Splat, Shoot + index_add_; the same + QuickCumsum. copy: a copy that moves as many
bytes as f32 (on a GPU f16) has to, and its share of that time. cores: CPU time over wall time, which on one thread is 1 unless others
interfere; load: of the whole machine. On a GPU: means of 50 calls in CUDA graphs; cumsum, bevdet and the gradients of bags cannot be
captured and are launched one by one, which at this size is most of their time."""


def print_checks(results: list[dict[str, Any]]) -> None:
    """What is to be reached, and whether it is: one scene, float32, every size."""
    print(NOTES)
    for phase, peer, least in ((phase, peer, least) for phase, peers, least in LEAST for peer in peers):
        cases = by_case(results, phase)
        for threads in sorted({key[3] for key in cases}):
            some = {key: found for key, found in cases.items() if key[2:] == (1, threads)}
            typical, best = ({key: found[peer][of] / found["f32"][of] for key, found in some.items()} for of in ("ms", "fastest_ms"))
            worst = min(typical, key=typical.__getitem__)
            verdict = "reached" if typical[worst] >= least else "MISSED"
            where = f"D {worst[0]}, C {worst[1]}; {min(best.values()):.1f} by fastest runs"
            print(f"{verdict}: {phase}, {threads} threads: {peer} / f32 is {typical[worst]:.1f} ({where}), wanted {least:g}")


def print_gpu_checks(results: list[dict[str, Any]]) -> None:
    print(NOTES)
    for (phase, batch), most in MOST.items():
        took = 1e3 * by_case(results, phase)[59, 80, batch, 1]["f16"]["ms"]
        print(
            f"{'reached' if took <= most else 'MISSED'}: {phase}, batch {batch}, D 59, C 80, f16: {took:.1f} us, wanted {most:g} on an H200"
        )


if __name__ == "__main__":
    main()
