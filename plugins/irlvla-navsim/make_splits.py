"""Writes irlvla_navsim/splits.npz and mappings/: facts of NAVSIM's configuration, from a checkout of the devkit. Run by hand.

    git clone https://github.com/autonomousvision/navsim
    python make_splits.py navsim

Facts are lists of tokens and of logs, the lengths of windows, and which synthetic scenes continue which recorded ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PACKAGE = Path(__file__).parent / "irlvla_navsim"
CONFIG = "navsim/planning/script/config"
SPLITS = ("navtrain", "navtest", "navmini", "navhard_two_stage", "warmup_two_stage")
LOG_SPLIT = f"{CONFIG}/training/default_train_val_test_log_split.yaml"
PARTS = {"navtrain_train": "train_logs", "navtrain_val": "val_logs"}  # of navtrain, which the devkit trains and validates on


def main(checkout: Path) -> None:
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    source = f"autonomousvision/navsim {commit}"
    facts: dict[str, Any] = {"source": np.array(source)}
    for name in SPLITS:
        split = _read(checkout / CONFIG / f"common/train_test_split/{name}.yaml")
        scenes = _read(checkout / CONFIG / f"common/train_test_split/scene_filter/{name}.yaml")
        facts[f"{name}_folder"] = np.array(split["data_split"])
        facts[f"{name}_windows"] = np.array([scenes["num_history_frames"], scenes["num_future_frames"], scenes["frame_interval"] or 0])
        facts[f"{name}_logs"] = np.array(sorted(scenes["log_names"]))
        facts[f"{name}_tokens"] = np.array(sorted(int(token, 16) for token in scenes["tokens"]), dtype=np.uint64)
        if mapping := split.get("reactive_all_mapping"):
            _write_mapping(name, source, mapping)
    logs = _read(checkout / LOG_SPLIT)
    for name, key in PARTS.items():
        facts[f"{name}_logs"] = np.array(sorted(set(logs[key]) & set(facts["navtrain_logs"].tolist())))
    np.savez_compressed(PACKAGE / "splits.npz", **facts)


def _write_mapping(name: str, source: str, mapping: list[Any]) -> None:
    path = PACKAGE / "mappings" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    groups = ",\n".join(json.dumps(group) for group in mapping)
    path.write_text(f'{{"source": {json.dumps(source)},\n"reactive_all_mapping": [\n{groups}\n]}}\n')


def _read(path: Path) -> Any:
    return yaml.load(path.read_text(), yaml.CSafeLoader)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
