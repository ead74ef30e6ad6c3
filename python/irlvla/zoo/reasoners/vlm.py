"""Commands from a vision-language model: which ones it finds likely, after a look at all cameras."""

from __future__ import annotations

import dataclasses
import math
import string
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import torch
from jaxtyping import Float, Int
from PIL import Image
from pydantic import Field
from torch import Tensor

from irlvla import components
from irlvla.errors import InputError, did_you_mean
from irlvla.types import Command, Features, Observation, StateIndex
from irlvla.zoo.reasoners import tokens
from irlvla.zoo.reasoners.actions import PATHS, SPEEDS
from irlvla.zoo.reasoners.answers import AnswerCache, Answers, key_of
from irlvla.zoo.reasoners.likelihoods import Format, VisionLanguageModel
from irlvla.zoo.reasoners.tokens import CommandTokens, Unanswered, one_hot

#: Names of views by where a camera looks, every 45 degrees counter-clockwise from straight ahead.
VIEWS = ("FRONT", "FRONT LEFT", "LEFT", "BACK LEFT", "BACK", "BACK RIGHT", "RIGHT", "FRONT RIGHT")
View = Literal["FRONT", "FRONT LEFT", "LEFT", "BACK LEFT", "BACK", "BACK RIGHT", "RIGHT", "FRONT RIGHT"]

#: Senna's question (its README and conversion script), with the commands of IRL-VLA and our horizon.
PROMPT = (
    "Your current speed is {speed:.1f} m/s, the navigation command is '{command}'. Based on the understanding of the driving scene "
    "and the navigation information, what is your plan for the next four seconds? Answer with your SPEED plan and your PATH plan. "
    "SPEED is one of {speeds}. PATH is one of {paths}. {prompt}"
)
_ASKED = ("model", "revision", "dtype", "format", "prompt", "speed_lead", "path_lead", "end", "words")  # settings that answers depend on
NAVIGATION = {Command.LEFT: "turn left", Command.STRAIGHT: "go straight", Command.RIGHT: "turn right", Command.UNKNOWN: "unknown"}


class VlmReasoner(components.Reasoner):
    """Shows the views and a question to an image-text-to-text model of transformers, and asks how likely each command is as its answer.

    Nothing is generated and nothing parsed: the prompt is read once, and 13 speed and 9 path commands, each in words and with an
    end mark, are scored as its continuations; the two kinds independently. Language tokens are the expected embeddings of the
    commands by these likelihoods, and, with hidden_width, a projection of the model's last hidden state.

    The model is frozen. It is no part of the policy: its parameters are neither saved nor trained, and it is loaded when a scene
    has no answer in the cache. (To adapt it, train it on its own, with LoRA, say, on the commands of `actions.labels_of`, merge,
    and name its folder here.) With a cache each scene is asked once: what is kept is found by the scene's token, the prompt and
    the pixels, under the model and the settings that matter.
    """

    class Config(tokens.Config):
        model: str = Field(description="a folder, or owner/name of a model on the Hub, which is downloaded")
        revision: str | None = Field(None, description="branch, tag or commit, for a model on the Hub")
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the model; auto = as it was saved")
        device: str | None = Field(
            None, description="where the model is; null = where the first scenes are, auto = spread over all devices"
        )
        batch: int = Field(22, ge=1, description="how many commands are scored at a time; fewer take less memory")
        format: Format = Field("chat", description="chat = in the model's chat template; plain = the text as it stands")
        views: tuple[View, ...] = Field(
            (), description="which views it is shown, in this order; none named = all cameras, those ahead first"
        )
        prompt: str = Field(
            PROMPT,
            description="the question; {speed} m/s, {command}, {speeds}, {paths} and {prompt}, that of the observation, are filled in",
        )
        speed_lead: str = Field("SPEED plan: ", description="how the answer with the speed command begins")
        path_lead: str = Field("PATH plan: ", description="how the answer with the path command begins")
        end: str = Field(".", min_length=1, description="how an answer ends; without, Mild Decel would be likelier than Mild Decel Linear")
        words: dict[str, str] = Field({}, description="other words for commands, by name; by default the name with spaces")
        normalised: bool = Field(False, description="divide log-likelihoods by the number of tokens: long names are not at a disadvantage")
        expected: bool = Field(True, description="expected embeddings; false = those of the likeliest commands")
        hidden_width: int = Field(0, ge=0, description="width of the model's last hidden state, a third token; 0 = no such token")
        cache: Path | None = Field(None, description="folder for answers, which processes and runs may share; null = none are kept")
        uncached: Literal["ask", "unknown", "error"] = Field("ask", description="what happens to scenes without an answer in the cache")

        @pydantic.field_validator("prompt")
        @classmethod
        def _fields_are_known(cls, prompt: str) -> str:
            known = ("speed", "command", "speeds", "paths", "prompt")
            for field in [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]:
                if field not in known:
                    raise ValueError(f"has no field {{{field}}}. {did_you_mean(field, known)}Fields: {', '.join(known)}")
            prompt.format(speed=0.0, **dict.fromkeys(known[1:], ""))
            return prompt

        @pydantic.field_validator("device")
        @classmethod
        def _device_is_one(cls, device: str | None) -> str | None:
            try:
                torch.device("cpu" if device in (None, "auto") else device)
            except RuntimeError as error:
                raise ValueError(f"{device!r} is no device; write cuda, cuda:1, cpu, auto or null") from error
            return device

        @pydantic.field_validator("words")
        @classmethod
        def _commands_are_known(cls, words: dict[str, str]) -> dict[str, str]:
            for name in words:
                if name not in (*SPEEDS, *PATHS):
                    raise ValueError(f"there is no command {name!r}. {did_you_mean(name, (*SPEEDS, *PATHS))}")
            return words

        @pydantic.model_validator(mode="after")
        def _cache_is_there(self) -> Self:
            if self.cache is None and self.uncached != "ask":
                raise ValueError(f"uncached={self.uncached} needs a cache; write cache=FOLDER")
            return self

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.vlm = VisionLanguageModel(config.model, config.revision, config.dtype, config.batch)
        matters = config.model_dump(mode="json", include=set(_ASKED))
        self.cache = None if config.cache is None else AnswerCache(Path(config.cache).expanduser(), matters, self.vlm)
        remedy = "Set uncached=ask to ask the model"
        self.unanswered = Unanswered(str(config.cache), "error" if config.uncached == "error" else "unknown", remedy)
        self.speeds, self.paths = ([config.words.get(name, name.replace("_", " ")) for name in names] for names in (SPEEDS, PATHS))
        self.tokens = CommandTokens(config, width, config.hidden_width)

    def forward(self, obs: Observation) -> Features:
        """Raises as `_answer`, and `InputError` for a scene without an answer where uncached=error."""
        found = [self._answer(obs, row) for row in range(len(obs))]
        known = torch.tensor([answer is not None for answer in found])
        answers = Answers.cat(self._nothing() if answer is None else answer for answer in found).to(obs.ego.device)
        hidden = answers.hidden[:, None] if self.config.hidden_width else None
        speed = self._likely(answers.speed, answers.speed_tokens)
        path = self._likely(answers.path, answers.path_tokens)
        return Features(obs, language=self.tokens(speed, path, hidden, known.to(obs.ego.device)))

    def _answer(self, obs: Observation, row: int) -> Answers | None:
        """What the model says of a scene; None where it may not be asked.

        Raises:
            InputError: there are no images, or not these views; the model's hidden state is not as wide as configured.
            FileError: the model cannot be loaded; the cache was made with another one.
        """
        names, images = self._seen(obs, row)
        question = self._question(obs, row)
        key = "" if self.cache is None else key_of(obs.token[row], question, names, images)
        answer = None if self.cache is None else self.cache.get(key)
        if answer is None and self.config.uncached != "ask":
            self.unanswered.add(obs.token[row])
            return None
        if answer is None:
            answer = self._ask(obs.token[row], names, images, question, self.config.device or obs.ego.device)
            if self.cache is not None:
                self.cache.put(key, answer)
        if self.config.hidden_width not in (0, answer.hidden.shape[1]):
            raise InputError(
                f"{self}: the model's hidden state is {answer.hidden.shape[1]} wide; write hidden_width={answer.hidden.shape[1]}"
            )
        return answer if self.config.hidden_width else dataclasses.replace(answer, hidden=answer.hidden[:, :0])

    def _ask(self, token: str, names: list[str], images: Tensor, question: str, device: str | torch.device) -> Answers:
        parts: list[str | Image.Image] = []
        for name, image in zip(names, images, strict=True):
            parts += [f"<{name} VIEW>:\n", Image.fromarray(image.permute(1, 2, 0).numpy()), "\n"]
        config = self.config
        groups = [
            [f"{config.speed_lead}{words}{config.end}" for words in self.speeds],
            [f"{config.path_lead}{words}{config.end}" for words in self.paths],
        ]
        (speed, path), hidden = self.vlm.judge([*parts, question], groups, config.format, device)
        return Answers((token,), speed.log[None], path.log[None], speed.tokens[None], path.tokens[None], hidden[None])

    def _seen(self, obs: Observation, row: int) -> tuple[list[str], Tensor]:
        """Names and images "C 3 H W" (uint8) of the views that the model is shown."""
        if obs.images is None or obs.camera_to_ego is None:
            raise InputError(f"{self} needs images and camera_to_ego, and these observations have none; give the dataset a size")
        axes = obs.camera_to_ego[row, :, :2, 2].double().cpu()  # of the cameras, in the plane
        angles = torch.atan2(axes[:, 1], axes[:, 0]).tolist()
        there = [VIEWS[round(angle / (math.pi / 4)) % 8] for angle in angles]
        order = sorted(range(len(there)), key=lambda camera: (round(abs(angles[camera]), 3), -angles[camera]))
        if absent := [view for view in self.config.views if view not in there]:
            raise InputError(f"{self}: scene {obs.token[row]!r} has no view {absent[0]!r}; there are {', '.join(sorted(set(there)))}")
        if self.config.views:
            order = [camera for view in self.config.views for camera in order if there[camera] == view]
        images = obs.images[row, order].cpu()
        if images.is_floating_point():
            images = (images * 255.0).round().clamp(0, 255).to(torch.uint8)
        return [there[camera] for camera in order], images

    def _question(self, obs: Observation, row: int) -> str:
        speed = obs.ego[row, -1, [StateIndex.VX, StateIndex.VY]].norm().item()
        given = {"speeds": ", ".join(self.speeds), "paths": ", ".join(self.paths), "prompt": obs.prompt[row] if obs.prompt else ""}
        return str(self.config.prompt.format(speed=speed, command=NAVIGATION[Command(int(obs.command[row]))], **given)).strip()

    def _likely(self, log: Float[Tensor, "B N"], lengths: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """How likely each command is, one of them being the answer."""
        scores = log / lengths if self.config.normalised else log
        return scores.softmax(-1) if self.config.expected else one_hot(scores.argmax(-1), scores.shape[-1])

    def _nothing(self) -> Answers:
        """In the place of a missing answer; it is not looked at."""
        speed, path = torch.zeros(1, len(SPEEDS)), torch.zeros(1, len(PATHS))
        return Answers(("",), speed, path, speed.long() + 1, path.long() + 1, torch.zeros(1, self.config.hidden_width))
