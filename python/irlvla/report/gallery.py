"""Scenes worth looking at: where a policy drives better than another, and where it fails, with the causes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from irlvla.pictures import Failure, birds_eye, camera_views, failures
from irlvla.scoring import Traffic, epdms
from irlvla.types import Epdms, Observation, Plan, Scene

ABOVE, SEEN = 560, 720  # widths of the pictures [pixels]
WORTH = 0.05  # a difference of scores that is worth showing

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Exhibit:
    """One scene, with what was driven in it."""

    token: str
    scores: Mapping[str, float]  # EPDMS by policy
    causes: Mapping[str, Sequence[str]]  # what each does wrong: what, when, where, with whom
    pictures: Sequence[str] = field(default_factory=list)  # data URIs


def improvements(ours: Scores, theirs: Scores, count: int) -> list[int]:
    """The scenes where ours is most above theirs."""
    return _first(theirs - ours, ours > theirs + WORTH, count)


def worst(ours: Scores, count: int) -> list[int]:
    """The scenes where ours is worst."""
    return _first(ours, ours < 1.0 - WORTH, count)


def _first(key: Scores, wanted: NDArray[np.bool_], count: int) -> list[int]:
    rows = np.argsort(key, kind="stable")  # NaN is last
    return [row for row in rows.tolist() if wanted[row]][:count]


def exhibit(item: tuple[Observation, Scene, Any], drives: Mapping[str, Plan], traffic: Traffic) -> Exhibit:
    """Draw a scene from above and through its cameras, with what some policies drove; the first drive is drawn into the images.

    Args:
        item: of a dataset.
        drives: by policy, "1 1 T 3".
    """
    obs, scene, _ = item
    results = {name: epdms(scene, plan, traffic=traffic, details=True) for name, plan in drives.items()}
    plan, result = _together(list(drives.values())), Epdms.stack([Epdms.cat(one[0] for one in results.values())])
    pictures = [_uri(birds_eye(scene, plan, result, ABOVE))]
    if obs.images is not None:
        pictures.append(_uri(camera_views(obs, scene, plan.poses[0, 0].double().numpy(), SEEN)))
    scores = {name: float(one.score()) for name, one in results.items()}
    causes = {name: [_told(failure, scene, one) for failure in failures(scene, one, 0)] for name, one in results.items()}
    return Exhibit(scene.token[0], scores, causes, pictures)


def _together(plans: Sequence[Plan]) -> Plan:
    """Plans of one scene as its candidates, at the times that all of them have."""
    dt = max(plan.dt for plan in plans)
    steps = [round(dt / plan.dt) for plan in plans]
    return Plan(torch.cat([plan.poses[:, :, step - 1 :: step] for plan, step in zip(plans, steps, strict=True)], 1), dt)


def _told(failure: Failure, scene: Scene, result: Epdms) -> str:
    """What went wrong, when, with whom, and where the car is then."""
    if not failure.step or result.details is None:
        return str(failure)
    x, y, _ = scene.in_ego_frame(result.details.states[0, :, failure.step, :3])[0, 0].tolist()
    side = f", {abs(y):.0f} m to the {'left' if y > 0 else 'right'}" if abs(y) >= 0.5 else ""
    return f"{failure} ({abs(x):.0f} m {'ahead' if x >= 0 else 'behind'}{side} of the start)"


def _uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
