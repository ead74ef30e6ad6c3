"""Scene shards: a folder of safetensors files and an index. Random access, images by reference or embedded, no pickle.

    OUT/index.json                  what is there, in order
    OUT/shard-00000.safetensors     a `Record` of up to `per_shard` scenes

A shard is mapped, not read: an item touches only its own rows, and memory does not grow with the folder. Shards are written
whole and in order, so a conversion that was killed goes on after its last shard and ends with the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from irlvla.errors import InputError
from irlvla.types import Batch, Scene, offsets_of, rows_of

FORMAT = 1
INDEX = "index.json"
OPEN_SHARDS = 32  # mapped at a time by one process


@dataclass(frozen=True)
class Record(Batch):
    """B scenes as files hold them: the truth, and the cameras' images by path or as JPEG bytes."""

    scene: Scene
    cameras: str  # names of the C cameras, joined by commas; "" = no cameras
    intrinsics: Float[Tensor, "B C 3 3"] | None  # of the image as stored [pixels]
    distortion: Float[Tensor, "B C 5"] | None  # k1 k2 p1 p2 k3, as OpenCV has them; None = pinhole
    camera_to_ego: Float[Tensor, "B C 4 4"] | None
    image_offsets: Int[Tensor, " B+1"] = offsets_of("image")  # C images per scene, or none where cameras is ""
    image_path: tuple[str, ...] = rows_of("image")  # relative to the root of the images; "" = embedded
    jpeg_offsets: Int[Tensor, " I+1"] = offsets_of("byte", "image")
    jpeg: UInt8[Tensor, " N"] = rows_of("byte")  # no bytes where an image has a path


def record(
    scene: Scene,
    cameras: Iterable[str] = (),
    images: Iterable[str | bytes] = (),
    intrinsics: Any = None,
    camera_to_ego: Any = None,
    distortion: Any = None,
) -> Record:
    """A record of one scene; each image is a path relative to the images' root, or the bytes of a JPEG file.

    Raises:
        InputError: the numbers of cameras, images and calibrations differ.
    """
    names, images = list(cameras), list(images)
    arrays = {"intrinsics": (intrinsics, (3, 3)), "camera_to_ego": (camera_to_ego, (4, 4)), "distortion": (distortion, (5,))}
    tensors: dict[str, Tensor | None] = {}
    for name, (value, shape) in arrays.items():
        tensors[name] = None if value is None else torch.as_tensor(np.asarray(value, dtype=np.float64))[None]
        if value is not None and tuple(tensors[name].shape) != (1, len(names), *shape):  # type: ignore[union-attr]
            raise InputError(f"{name} of {len(names)} cameras must have shape {(len(names), *shape)}, got {np.shape(value)}")
    if len(images) not in (0, len(names)):
        raise InputError(f"{len(names)} cameras ({', '.join(names)}) need as many images, got {len(images)}")
    jpegs = [image if isinstance(image, bytes) else b"" for image in images]
    return Record(
        scene=scene,
        cameras=",".join(names),
        image_offsets=torch.tensor([0, len(images)]),
        image_path=tuple(image if isinstance(image, str) else "" for image in images),
        jpeg_offsets=torch.tensor(list(itertools.accumulate(map(len, jpegs), initial=0))),
        jpeg=torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8) if any(jpegs) else torch.empty(0, dtype=torch.uint8),
        **tensors,
    )
