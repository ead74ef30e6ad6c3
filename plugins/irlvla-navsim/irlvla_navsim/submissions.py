"""Submissions of an evaluation: what each policy drove, in the file that NAVSIM's leaderboards take."""

from __future__ import annotations

import json
from typing import Any

from irlvla import Plan
from irlvla.run import Run
from irlvla_navsim.results import write_submission


def write_submissions(run: Run) -> None:
    """Write RUN/submission/NAME.pkl of every policy, if the benchmark of a run asks for it.

    Raises `InputError` if a policy did not drive in all scenes.
    """
    config: Any = run.config
    who = (config.benchmark or {}).get("submission")
    if who is None:
        return
    records = [json.loads(line) for line in (run.directory / "scenes.jsonl").read_text().splitlines()]
    tokens = [record["token"] for record in sorted(records, key=lambda record: record["row"])]
    first = len(tokens) - sum(len(token) == 17 for token in tokens)  # a synthetic scene has a longer token
    folder = run.directory / "submission"
    folder.mkdir(exist_ok=True)
    for name in config.policies:
        plan = Plan.load(run.directory / "plans" / f"{name}.safetensors")
        poses = dict(zip(tokens, plan.poses[:, 0].numpy(), strict=True))
        stages = [{token: poses[token] for token in some} for some in (tokens[:first], tokens[first:])]
        write_submission(folder / f"{name}.pkl", *stages, dt=plan.dt, **who)
