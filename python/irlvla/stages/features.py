"""What a frozen backbone sees of each scene, made once and kept: from then on an epoch costs no more than what is learned.

    cache = keep_features(policy.backbone, [train, validation], config.cache, run, workers)
    with cache.serving(policy, reward):
        ...  # policy(obs) and reward(obs, scene, plan) look at no image: obs needs none (`without_images`)

A frozen backbone is in eval mode, so it changes no image at random, and all that it ever says of a scene is one answer. Answers are
kept by the tokens of scenes, in half precision: of the 40 x 32 cells of 64 channels in recipes/small.yaml that is 0.164 MB a scene.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from irlvla.components import Backbone, Component, Dataset, Reasoner, Spec
from irlvla.errors import InputError
from irlvla.registry import build
from irlvla.run import Run
from irlvla.stages.batches import checked, in_order
from irlvla.types import Features, Observation

PER_FILE = 16  #: scenes in a file, which are also seen at once


class FeatureCache:
    """Features of scenes, by their tokens. In memory, or mapped from files, whose pages the system gives back when it needs them.

    Attributes:
        nbytes: what all of it takes.
    """

    def __init__(self, digest: str, parts: Iterable[Features]) -> None:
        self._digest, self._parts = digest, list(parts)
        self._places = {token: (part, row) for part, kept in enumerate(self._parts) for row, token in enumerate(kept.observation.token)}
        self.nbytes = sum(value.nbytes for kept in self._parts for _, value in kept.tensors())

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, token: str) -> bool:
        return token in self._places

    def __call__(self, obs: Observation) -> Features:
        """What the backbone sees of an observation, in float32 and on its device. Raises `InputError` for a scene that is not kept."""
        if unknown := [token for token in obs.token if token not in self]:
            raise InputError(f"no features are kept of the scene {unknown[0]!r}; there are those of {len(self)} others")
        places = (self._places[token] for token in obs.token)
        kept = Features.cat(self._parts[part][row : row + 1] for part, row in places)
        return dataclasses.replace(kept.to(obs.device, torch.float32), observation=obs)

    @contextmanager
    def serving(self, *models: nn.Module, pictured: bool = False) -> Iterator[None]:
        """A block in which the backbone, wherever it is in these models (several may have a copy of it), answers from here.

        It looks itself at scenes that are not kept, and at observations that have images, which may be others than those that were kept.

        Args:
            pictured: answer of those with images, too; they are the same.

        Raises:
            InputError: it is in none of them.
        """
        served = [module for model in models for module in model.modules() if self._fits(module)]
        if not served:
            raise InputError("none of these models has the frozen backbone whose features are kept")
        for module in served:
            module.forward = functools.partial(self._answer, module, pictured)
        try:
            yield
        finally:
            for module in served:
                module.__dict__.pop("forward", None)

    def _answer(self, backbone: nn.Module, pictured: bool, obs: Observation) -> Features:
        if (pictured or obs.images is None) and all(token in self for token in obs.token):
            return self(obs)
        return type(backbone).forward(backbone, obs)

    def _fits(self, module: nn.Module) -> bool:
        return isinstance(module, Backbone | Reasoner) and is_frozen(module) and digest_of(module) == self._digest


def keep_features(backbone: Backbone | Reasoner, specs: Sequence[Spec], folder: Path | None, run: Run, workers: int = 0) -> FeatureCache:
    """Let a frozen backbone (or reasoner) look at all scenes of datasets, once.

    With a folder, for all runs to come: of the same weights, settings and datasets, whose files are taken not to change. Of several
    processes one looks then, and the others read; without a folder each keeps all in its own memory.

    Raises:
        InputError: it is not frozen, or what it says does not fit into half precision.
        FileError: a scene is missing or damaged, or the folder cannot be written.
    """
    if not is_frozen(backbone):
        raise InputError(f"{backbone} learns: what it sees changes, and cannot be kept")
    backbone.to(run.device).eval()
    digest = digest_of(backbone)
    parts: list[Features] = []
    for spec in specs:
        key = hashlib.sha256(json.dumps([digest, spec], sort_keys=True).encode()).hexdigest()[:12]
        parts += _kept(backbone, spec, None if folder is None else folder.expanduser() / f"features-{key}", run, workers)
    return FeatureCache(digest, parts)


@contextmanager
def remembering(models: Sequence[nn.Module], specs: Sequence[Spec], folder: Path | None, run: Run, workers: int = 0) -> Iterator[None]:
    """A block in which all that is frozen in models, of backbones and reasoners, has looked at all scenes of datasets already.

    Raises as `keep_features`.
    """
    different = {digest_of(module): module for module in seeing(*models) if is_frozen(module)}
    with ExitStack() as stack:
        for module in different.values():
            stack.enter_context(keep_features(module, specs, folder, run, workers).serving(*models))
        yield


def seeing(*models: nn.Module) -> list[Backbone | Reasoner]:
    """The backbones and reasoners in models."""
    return [module for model in models for module in model.modules() if isinstance(module, Backbone | Reasoner)]


def backbones_of(model: nn.Module) -> list[Backbone]:
    """The backbones in a model; not the parts of one that are backbones themselves."""
    if isinstance(model, Backbone):
        return [model]
    return [found for child in model.children() for found in backbones_of(child)]


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing in it learns."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def digest_of(component: nn.Module) -> str:
    """Of what a component is, of its settings and of its weights: equal ones say the same of a scene."""
    assert isinstance(component, Component)
    found = hashlib.sha256(f"{component} {component.config.model_dump_json()}".encode())
    for name, value in component.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]


def _kept(backbone: Backbone | Reasoner, spec: Spec, folder: Path | None, run: Run, workers: int) -> Iterator[Features]:
    """The features of a dataset, from the files of a folder, of which those that are missing are made."""
    dataset: Dataset = build("dataset", spec)
    count = -(-len(dataset) // PER_FILE)
    if folder is None:
        yield from _seen(backbone, dataset, range(count), run, workers)
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:06d}.safetensors" for number in range(count)]
    with FileLock(f"{folder}.lock"):
        missing = [number for number, file in enumerate(files) if not file.exists()]
        for number, features in zip(missing, _seen(backbone, dataset, missing, run, workers), strict=True):
            features.save(files[number])
    yield from (Features.load(file, mapped=True) for file in files)


def _seen(backbone: Backbone | Reasoner, dataset: Dataset, numbers: Sequence[int], run: Run, workers: int) -> Iterator[Features]:
    """What is seen of the scenes of these files."""
    if not numbers:
        return
    rows = [row for number in numbers for row in range(len(dataset))[number * PER_FILE :][:PER_FILE]]
    with run.progress(len(rows), "see") as progress, torch.no_grad():
        for batch in checked(in_order(dataset, PER_FILE, workers, rows)):
            with run.autocast():
                features = backbone(batch.observation.to(run.device))
            yield _halved(features, backbone)
            progress.advance(len(batch.rows))


def _halved(features: Features, backbone: nn.Module) -> Features:
    """Its tokens in half precision; where they lie stays as exact as it is."""
    obs = features.observation
    named = Observation(obs.token, obs.ego, obs.command)
    half = dataclasses.replace(features, observation=named, predictions={}).to("cpu", torch.float16)
    if any(bool(value.isinf().any()) for name, value in half.tensors() if not name.startswith("observation.")):
        raise InputError(f"{backbone}: what it says of a scene is too large for half precision; do not keep its features")
    extent = None if features.bev_range is None else features.bev_range.cpu()
    return dataclasses.replace(half, observation=named.to("cpu"), bev_range=extent)
