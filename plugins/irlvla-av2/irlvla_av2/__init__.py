"""Argoverse 2 sensor logs as irlvla scenes: open to anyone without registration."""

import irlvla


@irlvla.hookimpl
def irlvla_datasets() -> dict[str, str]:
    return {"av2": "irlvla_av2.dataset:Av2Dataset"}
