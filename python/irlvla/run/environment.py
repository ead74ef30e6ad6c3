"""What a run ran on: versions, plugins, the state of the code, and the machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import irlvla
from irlvla.checkpoint.manifest import checksum_of
from irlvla.registry import Plugin, installed


def record() -> dict[str, Any]:
    """All that is known of this process and its surroundings, as JSON can hold it."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "git": _git(),
        "versions": {"python": platform.python_version(), "irlvla": irlvla.__version__, "torch": str(torch.__version__)},
        "plugins": [_plugin(plugin) for plugin in installed().plugins],
        "packages": _packages(),
        "machine": _machine(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the working folder, and whether files that git knows differ from it; None outside of a repository."""

    def ask(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": ask("status", "--porcelain", "--untracked-files=no") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def _packages() -> dict[str, str]:
    """Every installed package with its version, by name."""
    found = {str(distribution.name): distribution.version for distribution in metadata.distributions()}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _plugin(plugin: Plugin) -> dict[str, str]:
    facts = {"name": plugin.name, "version": plugin.version, "module": plugin.module, "problem": plugin.problem}
    if not plugin.version:
        facts["sha256"] = checksum_of(plugin)
    return {name: fact for name, fact in facts.items() if fact}


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else None,
        "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.total_memory)} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _cpu() -> str:
    try:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def _gib(size: int) -> float:
    return round(size / 2**30, 1)
