"""Bench2Drive: its metrics from the leaderboard's result files, and an agent that drives saved policies in CARLA."""

import irlvla


@irlvla.hookimpl
def irlvla_benchmarks() -> dict[str, str]:
    return {"bench2drive": "irlvla_bench2drive.benchmark:Bench2Drive"}
