"""This plugin, as it is here, in the registry of every test, installed or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import irlvla_navsim
from irlvla.registry import Plugin, installed


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    installed.cache_clear()
    if "navtest" not in installed().names("benchmark"):
        installed().add(Plugin("irlvla-navsim", "0.1.0", "irlvla_navsim"), lambda: irlvla_navsim)
    yield
    installed.cache_clear()
