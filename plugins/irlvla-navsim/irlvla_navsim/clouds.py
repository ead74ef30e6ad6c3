"""Lidar point clouds: binary PCD files, as nuPlan's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from irlvla import FileError

FIELDS = ("x", "y", "z", "intensity", "ring", "lidar_info")


def read_cloud(path: Path) -> Any:
    """Points "6 N" float32: x y z intensity ring lidar_info. Raises `FileError` if it is missing, damaged, or not binary."""
    try:
        head, mark, body = path.read_bytes().partition(b"DATA binary\n")
        lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
        facts = {line[0]: line[1:] for line in lines if line and line[0] != "#"}
        counts = facts.get("COUNT", ["1"] * len(facts["FIELDS"]))
        columns = zip(facts["FIELDS"], facts["TYPE"], facts["SIZE"], counts, strict=True)
        kinds = {"F": "f", "I": "i", "U": "u"}
        dtype = np.dtype([(f"{name}{row}" if name == "_" else name, f"<{kinds[kind]}{size}", int(count))
                          for row, (name, kind, size, count) in enumerate(columns)])  # fmt: skip
        if not mark:
            raise ValueError("it has no line DATA binary")
        points = np.frombuffer(body, dtype, count=int(facts["POINTS"][0]))
        return np.stack([points[name].reshape(len(points)).astype(np.float32) for name in FIELDS])
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise FileError(f"{path} is no binary point cloud (PCD): {type(error).__name__}: {error}") from error
