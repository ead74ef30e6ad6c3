"""What a vision-language model said of scenes, kept in a folder, so that each is asked once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from irlvla.errors import FileError
from irlvla.files import write_whole
from irlvla.types import Batch
from irlvla.zoo.reasoners.likelihoods import VisionLanguageModel


@dataclass(frozen=True)
class Answers(Batch):
    """What a model finds likely in B scenes: of each command the log-likelihood of its words, and how many tokens they are."""

    token: tuple[str, ...]
    speed: Float[Tensor, "B 13"]
    path: Float[Tensor, "B 9"]
    speed_tokens: Int[Tensor, "B 13"]
    path_tokens: Int[Tensor, "B 9"]
    hidden: Float[Tensor, "B H"]  # the model's last hidden state at the end of the prompt


def key_of(token: str, question: str, views: Sequence[str], images: UInt8[Tensor, "C 3 H W"]) -> str:
    """Of a scene as the model is asked about it: another question, view or pixel gives another key."""
    digest = hashlib.sha256(json.dumps([token, question, *views, *images.shape]).encode())
    digest.update(images.contiguous().numpy().data)
    return digest.hexdigest()


class AnswerCache:
    """One file per scene, written whole, in a folder per model and settings; `model.json` there says which.

    Processes and runs may share it, and a kill leaves it readable. A damaged file counts as none, with a warning.

    Args:
        folder: of all caches.
        settings: what the answers depend on, beside the scene and the files of the model.
        vlm: the model; where its files are here, they must be those that the answers are of.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], vlm: VisionLanguageModel) -> None:
        self.settings, self.vlm = dict(settings), vlm
        self.folder = folder / hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self._checked = False

    def get(self, key: str) -> Answers | None:
        """Raises `FileError` if the cache is of another model."""
        self._check()
        path = self._path(key)
        if not path.exists():
            return None
        try:
            return Answers.load(path)
        except FileError as error:
            warnings.warn(f"{error}. The model is asked again", stacklevel=2)
            return None

    def put(self, key: str, answers: Answers) -> None:
        """Raises `FileError` if the cache is of another model, or cannot be written."""
        self._check()
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{path.parent} cannot be made: {error.strerror or error}") from error
        if not (manifest := self.folder / "model.json").exists():
            write_whole(manifest, json.dumps({**self.settings, "files": self.vlm.fingerprint()}, indent=2))
        answers.save(path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _check(self) -> None:
        """Once: that the model is the one that the cache is of, if its files are here."""
        manifest = self.folder / "model.json"
        if self._checked or not manifest.exists():
            return
        try:
            files = json.loads(manifest.read_bytes())["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{manifest} cannot be read: {error}. Remove {self.folder}, or name another cache") from error
        if self.vlm.fingerprint() not in (None, files):
            raise FileError(
                f"the answers in {self.folder} are of another {self.vlm.source} than there is now. Remove them, or name another cache"
            )
        self._checked = True
