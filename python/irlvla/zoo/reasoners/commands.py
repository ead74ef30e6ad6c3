"""Commands that were found before, by whatever model, and are read from a file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from irlvla import components
from irlvla.errors import FileError, InputError, did_you_mean
from irlvla.types import Features, Observation
from irlvla.zoo.reasoners import tokens
from irlvla.zoo.reasoners.actions import PATHS, SPEEDS, UNKNOWN, parse
from irlvla.zoo.reasoners.tokens import CommandTokens, Unanswered, one_hot


class CommandReasoner(components.Reasoner):
    """Two language tokens, the speed command and the path command that a file has for the scene's token, and for no other.

    `unanswered.count` says how many times a scene had none so far.

    Raises:
        FileError: the file is missing, is no such file, or says two things of one scene.
    """

    class Config(tokens.Config):
        path: Path = Field(
            description="a JSON file, or a zip with one in it: a list of {token: ..., answer: '<speed>, <path>'}, or {token: answer, ...}"
        )
        missing: Literal["unknown", "error"] = Field("unknown", description="what happens to scenes that the file does not have")

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.answers = read_answers(Path(config.path).expanduser())
        remedy = (
            "Set missing=error to stop there" if config.missing == "unknown" else "Set missing=unknown to go on with the unknown tokens"
        )
        self.unanswered = Unanswered(str(config.path), config.missing, remedy)
        self.tokens = CommandTokens(config, width)

    def forward(self, obs: Observation) -> Features:
        """Raises `InputError` for a scene that the file does not have, where missing=error."""
        for token in obs.token:
            if token not in self.answers:
                self.unanswered.add(token)
        found = torch.tensor([self.answers.get(token, (UNKNOWN, UNKNOWN)) for token in obs.token], device=obs.ego.device)
        speed, path = found.unbind(1)
        language = self.tokens(one_hot(speed, len(SPEEDS)), one_hot(path, len(PATHS)), known=speed != UNKNOWN)
        return Features(obs, language=language)


def read_answers(path: Path) -> dict[str, tuple[int, int]]:
    """The numbers of the commands of each scene that a file has an answer for. A null answer is none.

    Raises:
        FileError: the file is missing, is no such file, or says two things of one scene.
    """
    content = _content(path)
    if isinstance(content, dict):
        content = [{"token": token, "answer": answer} for token, answer in content.items()]
    if not isinstance(content, list):
        raise FileError(f"{path} must hold a list of answers, or answers by token; it holds {content!r:.80}")
    parsed: dict[str, tuple[int, int]] = {}  # by answer: most are alike
    answers: dict[str, tuple[int, int]] = {}
    for place, entry in enumerate(content):
        token, answer = (entry.get("token"), entry.get("answer")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or not (answer is None or isinstance(answer, str)):
            raise FileError(f"{path}: entry {place} must hold a token and an answer, both as text; it is {entry!r:.80}")
        if answer is None:
            continue
        try:
            parsed[answer] = parsed.get(answer) or parse(answer)
        except InputError as error:
            raise FileError(f"{path}: entry {place}, of the scene {token!r}: {error}") from error
        if answers.setdefault(token, parsed[answer]) != parsed[answer]:
            raise FileError(f"{path} has two answers for the scene {token!r}")
    return answers


def _content(path: Path) -> Any:
    try:
        if not zipfile.is_zipfile(path):
            return json.loads(path.read_bytes(), object_pairs_hook=_unrepeated)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".json")]
            if len(names) != 1:
                raise FileError(f"{path} must hold one .json file; it holds {', '.join(names[:3]) or 'none'}")
            return json.loads(archive.read(names[0]), object_pairs_hook=_unrepeated)
    except FileNotFoundError as error:
        near = did_you_mean(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise FileError(f"the file of commands {path} does not exist. {near}".rstrip()) from error
    except FileError:
        raise
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise FileError(f"{path} is neither JSON nor a zip of it: {error}") from error


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which Python would keep the last of equal names."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a name occurs twice in {', '.join(name for name, _ in pairs):.80}")
    return found
