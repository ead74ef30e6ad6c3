"""Anchors: few drives that stand for many. K-means of human drives, or those of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla.clusters import kmeans
from irlvla.errors import FileError
from irlvla.zoo.planners.curves import fan


def choose(drives: Float[Tensor, "N T 2"], count: int, interval: float) -> Float[Tensor, "count T 2"]:
    """Centres of human drives by K-means; where there are fewer different drives than centres, these and arcs of `fan`."""
    different = torch.unique(drives.cpu(), dim=0)
    found = kmeans(different.flatten(1), min(count, len(different))).unflatten(1, drives.shape[1:])
    return torch.cat([found, fan(count - len(found), drives.shape[1], interval)])


def nearest(drives: Float[Tensor, "*lead T 2"], anchors: Float[Tensor, "M T 2"]) -> Int[Tensor, "*lead"]:
    """The anchor with the least mean distance to each drive."""
    return distances(drives, anchors).argmin(-1)


def distances(drives: Float[Tensor, "*lead T 2"], anchors: Float[Tensor, "M T 2"]) -> Float[Tensor, "*lead M"]:
    """Mean distances [m] between drives and anchors."""
    return (drives[..., None, :, :] - anchors).norm(dim=-1).mean(-1)


def read_trajectories(path: Path, poses: int) -> Float[Tensor, "K T columns"]:
    """Trajectories of a .npy file (K, T, 2 or 3): x, y [m] and perhaps heading [rad] in the ego frame, over the horizon of a plan.

    A file of more poses is thinned: of 40 every fifth where 8 are wanted.

    Raises:
        FileError: it is missing or not such a file; one that holds Python objects is not read.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise FileError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 3 or found.shape[2] not in (2, 3) or found.dtype.kind != "f":
        given = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise FileError(f"{path} holds {given}, expected trajectories (K, T, 2 or 3): x, y and perhaps heading")
    if found.shape[1] == 0 or found.shape[1] % poses:
        raise FileError(f"{path} holds trajectories of {found.shape[1]} poses, expected {poses} or a multiple of it")
    if not np.isfinite(found).all():
        raise FileError(f"{path} holds NaN or infinity")
    stride = found.shape[1] // poses
    return torch.from_numpy(found[:, stride - 1 :: stride].astype(np.float32))
