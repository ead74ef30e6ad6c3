"""A benchmark: the same crossroads for everybody."""

from typing import Any

import irlvla
from pydantic import Field


class AcmeCrossroads(irlvla.Benchmark):
    """Generated scenes on roads of unseen kinds. Name your own here, and all else that must be the same for who compares."""

    class Config(irlvla.Config):
        scenes: int = Field(100, ge=1, description="how many; fewer for a first look")

    def settings(self) -> dict[str, Any]:
        return {"data": {"name": "synthetic", "split": "unseen", "count": self.config.scenes}, "traffic": "log"}
