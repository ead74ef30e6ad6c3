"""What all tests share: devices, deterministic property tests, and data that only some machines have."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]

# Times vary with the machine; in CI, so must nothing else.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that there is: the test runs once on each."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def _shared(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not here (set {variable} to another place)")
    return folder


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Scenes scored by the official devkit: the full set, of which tests/golden holds a part."""
    return _shared("IRLVLA_GOLDEN_DATA", "golden")


@pytest.fixture(scope="session")
def shared_real() -> Path:
    """Small recorded samples and official result files."""
    return _shared("IRLVLA_REAL_DATA", "real")
