"""How likely a vision-language model finds each of several answers to a question about images."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from irlvla.errors import ConfigError, FileError, InputError
from irlvla.zoo.libraries import library

Format = Literal["chat", "plain"]

_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]  # of a model: all that is read, and no pickle
_WHOLE, _BLOCK, _BLOCKS = 1 << 24, 1 << 16, 64  # what is hashed of a file: all up to 16 MiB; of larger ones blocks


@dataclass(frozen=True)
class Likelihoods:
    """Of the answers of one group, given a prompt."""

    log: Float[Tensor, " N"]  # log-likelihood of the tokens in which the answers differ
    tokens: Int[Tensor, " N"]  # how many these are


class VisionLanguageModel:
    """Any image-text-to-text model of transformers, frozen, loaded when it is first asked.

    It is no `nn.Module`, so that a component that holds it neither saves, nor trains, nor moves its parameters; its copies share them.

    Args:
        source: a folder, or "owner/name" of a model on the Hub, which is downloaded.
        revision: branch, tag or commit, for a model on the Hub.
        dtype: "auto" = as its config says.
        batch: how many answers are read at a time.
    """

    def __init__(self, source: str, revision: str | None = None, dtype: str = "auto", batch: int = 22) -> None:
        self.source, self.revision, self.dtype, self.batch = source, revision, dtype, batch
        self._loaded: tuple[Any, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionLanguageModel:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    # -- files -------------------------------------------------------------------------------------------------------
    def folder(self, download: bool) -> Path | None:
        """Where its files are; None if it is not on this machine, and may not be downloaded.

        Raises:
            FileError: there is no such model, or it cannot be downloaded.
            InputError: it is a folder, of which there are no revisions.
        """
        import huggingface_hub

        if (path := Path(self.source).expanduser()).is_dir():
            if self.revision is not None:
                raise InputError(f"revision={self.revision!r} is for a model on the Hub (owner/name), and {self.source} is a folder here")
            return path
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.source):
            if not download:
                return None
            raise FileError(f"the model {self.source} is neither a folder here nor a name on the Hub (owner/name)")
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.source, revision=self.revision, allow_patterns=_FILES, local_files_only=not download, library_name="irlvla"
                )
            )
        except Exception as error:  # whichever network library is below, it has its own
            if not download:
                return None
            raise FileError(f"the model {self.source} is no folder here, and cannot be downloaded from the Hub: {_line(error)}") from error

    def load(self, device: torch.device | str) -> tuple[Any, Any]:
        """Model and processor.

        Args:
            device: where the model is put, if it is not loaded yet; "auto" = spread over all devices, by accelerate.

        Raises:
            FileError: there is no such model, or it is not whole.
            IrlvlaError: transformers cannot be used.
        """
        if self._loaded is None:
            folder = str(self.folder(download=True))
            transformers = library("transformers")
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            spread = {"device_map": "auto"} if device == "auto" else {}
            try:
                processor = transformers.AutoProcessor.from_pretrained(folder, **local)
                model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                    folder, dtype=self.dtype, use_safetensors=True, **spread, **local
                )
            except Exception as error:
                raise FileError(f"{self.source} is no image-text-to-text model that transformers can load: {_line(error)}") from error
            model = model if spread else model.to(device)
            self._loaded = model.eval().requires_grad_(False), processor
        return self._loaded

    def fingerprint(self) -> str | None:
        """Of its files: of small ones all, of large ones 64 blocks of 64 KiB, which any training changes. None if it is not here."""
        folder = self.folder(download=False)
        if folder is None:
            return None
        digest = hashlib.sha256()
        for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as stream:
                if size <= _WHOLE:
                    digest.update(stream.read())
                else:
                    for block in range(_BLOCKS):
                        stream.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                        digest.update(stream.read(_BLOCK))
        return digest.hexdigest()

    # -- likelihoods -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def judge(
        self, parts: Sequence[str | Image], groups: Sequence[Sequence[str]], layout: Format, device: torch.device | str
    ) -> tuple[list[Likelihoods], Float[Tensor, " H"]]:
        """Likelihoods of the answers of each group, and the last hidden state at the end of the prompt.

        The prompt is read once: its keys and values serve all answers. It is never padded, so a result does not depend on what
        else is asked, nor on autocast. Random numbers of torch are left as they were.

        Args:
            parts: the prompt, of texts and images in order.
            groups: answers that exclude each other. Two of them must not be alike, nor one the beginning of another.
            layout: "chat" = in the model's chat template; "plain" = as they stand.
            device: as in `load`.
        """
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            model, processor = self.load(device)
        with torch.autocast(model.device.type, enabled=False):
            prompt = _encode(processor, parts, layout).to(model.device, model.dtype)
            read = model(**prompt, use_cache=True, logits_to_keep=1, output_hidden_states=True)
            answers = [_tokens(processor.tokenizer, group) for group in groups]
            rows = [row for group in answers for row in group]
            logs = [log for at in range(0, len(rows), self.batch) for log in self._read(model, read, rows[at : at + self.batch])]
        found, first = [], 0
        for group in answers:
            shared = _shared(group)
            kept = [log[shared:] for log in logs[first : first + len(group)]]
            found.append(Likelihoods(torch.stack([log.sum() for log in kept]), torch.tensor([len(log) for log in kept])))
            first += len(group)
        return found, read.hidden_states[-1][0, -1].float().cpu()

    @staticmethod
    def _read(model: Any, prompt: Any, rows: Sequence[list[int]]) -> list[Float[Tensor, " n"]]:
        """Log-likelihoods of each token of some answers."""
        longest = max(map(len, rows))
        # Padded at the end, where no token of theirs looks, with a token of their own: another might stand for an image.
        ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=model.device)
        cache = copy.deepcopy(prompt.past_key_values)
        cache.batch_repeat_interleave(len(rows))
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        before = torch.cat([prompt.logits[:, -1:].expand(len(rows), -1, -1), logits[:, :-1]], 1)
        logs = before.float().log_softmax(-1).gather(-1, ids[..., None].to(before.device))[..., 0].cpu()
        return [log[: len(row)] for log, row in zip(logs, rows, strict=True)]


def _encode(processor: Any, parts: Sequence[str | Image], layout: Format) -> Any:
    """A prompt as the model takes it. Raises `ConfigError` if it cannot be laid out so."""
    if layout == "plain":
        mark = getattr(processor, "image_token", None)
        if mark is None:
            raise ConfigError(f"{type(processor).__name__} does not say what stands for an image in a text; set format=chat")
        text = "".join(part if isinstance(part, str) else mark for part in parts)
        return processor(text=[text], images=[[part for part in parts if not isinstance(part, str)]], return_tensors="pt")
    if not processor.chat_template:
        raise ConfigError(f"{type(processor).__name__} has no chat template; set format=plain")
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    message = [{"role": "user", "content": content}]
    return processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


def _tokens(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """The tokens of each answer of a group. Raises `InputError` if they do not exclude each other."""
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    for (one, row), (other, longer) in itertools.permutations(zip(answers, rows, strict=True), 2):
        if row == longer[: len(row)]:
            raise InputError(f"the answers {one!r} and {other!r} do not exclude each other: {row} begins {longer}; end them with a mark")
    return rows


def _shared(rows: Sequence[list[int]]) -> int:
    """With how many tokens all rows begin: these say nothing about which is likelier."""
    return next(place for place, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
