"""NAVSIM and OpenScene data with nuPlan maps as irlvla scenes; official result and submission files. No devkit is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import irlvla

if TYPE_CHECKING:
    from irlvla.run import Run


@irlvla.hookimpl
def irlvla_datasets() -> dict[str, str]:
    return {
        "navsim": "irlvla_navsim.dataset:NavsimDataset",
        "navsim_synthetic": "irlvla_navsim.dataset:SyntheticStageDataset",
        "navsim_cache": "irlvla_navsim.dataset:MetricCacheDataset",
    }


@irlvla.hookimpl
def irlvla_planners() -> dict[str, str]:
    return {"navsim_agent": "irlvla_navsim.agents:NavsimAgentPlanner"}


@irlvla.hookimpl
def irlvla_benchmarks() -> dict[str, str]:
    return {
        "navtest": "irlvla_navsim.benchmarks:Navtest",
        "navhard": "irlvla_navsim.benchmarks:Navhard",
        "warmup": "irlvla_navsim.benchmarks:Warmup",
        "navmini": "irlvla_navsim.benchmarks:Navmini",
        "navtrain": "irlvla_navsim.benchmarks:Navtrain",
        "navval": "irlvla_navsim.benchmarks:Navval",
    }


@irlvla.hookimpl
def irlvla_run_finished(run: Run, error: BaseException | None) -> None:
    if error is None and run.stage == "evaluate":
        from irlvla_navsim.submissions import write_submissions

        write_submissions(run)
