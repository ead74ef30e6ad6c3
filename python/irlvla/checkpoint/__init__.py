"""Models and training states as files, and models on the Hugging Face Hub.

    checkpoints/
      last -> step-200
      step-200/model/   to share: config.json, model.safetensors
      step-200/state/   to resume one's own run: optimizers, random numbers

Loading a model reads plain data alone: no code of the file, no pickle.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from huggingface_hub import ModelCardData
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from irlvla.checkpoint import hub
from irlvla.checkpoint.manifest import CONFIG, WEIGHTS, Manifest, parts
from irlvla.components import Component, Policy
from irlvla.errors import ContractError, FileError, InputError
from irlvla.files import link, remove_leftovers, remove_whole, whole_folder

CARD = "README.md"  #: of a model on the Hub

# -- models ------------------------------------------------------------------------------------------------------------


def save_pretrained(model: Policy | Component, folder: str | os.PathLike[str]) -> Path:
    """Write a model for `from_pretrained`, whole or not at all; a model that is there is replaced.

    Raises:
        ContractError: a component holds what cannot be saved.
        PluginError: a component is provided by no plugin, so that it could not be found again.
        FileError: the folder cannot be written, or holds other things.
    """
    folder = Path(folder)
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, CARD})):
        raise FileError(f"{folder} holds other things ({', '.join(others[:3])}), which saving a model would remove. Name a new folder")
    for part in parts(model).values():
        _require_tensors(part)
    with whole_folder(folder) as new:
        if (card := folder / CARD).is_file():
            shutil.copy2(card, new / CARD)  # its author's
        _write_weights(model, new / WEIGHTS)
        Manifest.of(model, new / WEIGHTS).write(new)
    return folder


def from_pretrained(
    source: str | os.PathLike[str], *, revision: str | None = None, device: str | torch.device = "cpu"
) -> Policy | Component:
    """The model that `save_pretrained` wrote to a folder, or that was pushed to the Hub as "owner/name"; ready to use (eval mode).

    Args:
        revision: branch, tag or commit, for a model on the Hub.

    Raises:
        FileError: there is no saved model; it is truncated, corrupt, written by a later irlvla, or does not fit the plugins.
        PluginError: a plugin that it needs is missing.
        InputError: the device is not there.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={str(device)!r}: no CUDA device was found; `irlvla doctor` says what was")
    folder = _find(source, revision)
    manifest = Manifest.read(folder)
    model = manifest.build(str(source))
    _read_weights(cast(nn.Module, model), folder / WEIGHTS, manifest.remedy)
    return cast(Policy, cast(nn.Module, model).to(device).eval())


def push_to_hub(
    model: Policy | Component | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Put a model, or a folder that `save_pretrained` wrote, on the Hub. Returns its address.

    A new repository gets a model card that says how to use the model; a card that is there is left as it is.

    Args:
        repo_id: "owner/name"; made if it does not exist.
        token: to log in with; by default that of `hf auth login`.

    Raises:
        FileError: the folder holds no whole model, or the Hub does not take it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(model) if isinstance(model, str | os.PathLike) else save_pretrained(model, Path(temporary) / "model")
        card = _card(Manifest.read(folder), repo_id)
        files: dict[str, bytes | Path] = {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS, CARD: card.encode()}
        return hub.upload(repo_id, files, keep=[CARD], private=private, message=message or "Upload with irlvla", token=token)


def _find(source: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(source)
    if isinstance(source, str) and not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return hub.download(source, revision, [CONFIG, WEIGHTS])
    if revision is not None:
        raise InputError(f"revision={revision!r} is for a model on the Hub ('owner/name'), and {source} is none")
    return folder


def _require_tensors(part: Component) -> None:
    """Raise `ContractError` unless all that a component holds are tensors, which can be saved without pickle."""
    try:
        state = cast(nn.Module, part).state_dict()
    except Exception as error:
        raise ContractError(f"{part} cannot be saved: its state_dict() raises {type(error).__name__}: {error}") from error
    for name, value in state.items():
        if not isinstance(value, Tensor):
            found = f"a {type(value).__name__}, which only pickle could save. Keep it in the Config, or as a tensor"
        elif is_lazy(value):
            found = "not initialized. Give it its shape in __init__"
        elif value.is_meta or value.layout is not torch.strided:
            found = f"{value.layout} on the device {value.device}. Make it an ordinary tensor"
        else:
            continue
        raise ContractError(f"{part} cannot be saved: its {name} is {found}")


def _write_weights(model: Policy | Component, file: Path) -> None:
    try:
        safetensors.torch.save_model(cast(nn.Module, model), os.fspath(file))
    except safetensors.SafetensorError as error:
        raise FileError(f"{file} cannot be written: {error}") from error
    except (RuntimeError, ValueError) as error:
        names = " and ".join(map(str, parts(model).values()))
        raise ContractError(f"{names} cannot be saved: {error}") from error


def _read_weights(model: nn.Module, file: Path, remedy: str) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    try:
        with safetensors.safe_open(os.fspath(file), "pt") as stream:
            given = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise FileError(f"{file} holds no weights: {error}") from error
    # What is empty in a new model may take its shape from what was saved.
    wrong = [
        f"{name} has the shape {given[name]}, not {shape}"
        for name, shape in expected.items()
        if given.get(name, shape) != shape and 0 not in shape
    ]
    if wrong:
        missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
    else:  # it knows of weights that several names share
        try:
            missing, unexpected = map(set, safetensors.torch.load_model(model, os.fspath(file), strict=False))
        except RuntimeError as error:
            raise FileError(f"the weights of {file} do not fit the model: {error}\n{remedy}".rstrip()) from error
    wrong += [f"{name} is missing" for name in sorted(missing)] + [f"{name} is not expected" for name in sorted(unexpected)]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        lines = "\n  ".join([f"the weights of {file} do not fit the model:", *wrong[:10], *more])
        raise FileError(f"{lines}\n{remedy}".rstrip())


def _card(manifest: Manifest, repo_id: str) -> str:
    specs = manifest.spec if manifest.kind == "policy" else {manifest.kind: manifest.spec}
    packages = [f"{name}=={version}" for name, version in manifest.requires.items() if not version.startswith("sha256:")]
    one_file = [f"`{name}` ({version})" for name, version in manifest.requires.items() if version.startswith("sha256:")]
    kind = manifest.kind.replace("_", " ")
    return "\n".join(
        [
            "---",
            ModelCardData(library_name="irlvla", tags=["autonomous-driving", "irlvla", manifest.kind]).to_yaml(),
            "---",
            f"# {repo_id.rpartition('/')[2]}",
            "",
            f"A {kind} for irlvla, saved by version {manifest.irlvla}.",
            "",
            "```bash",
            f"pip install {' '.join(packages)}",
            "```",
            "```python",
            "import irlvla",
            "",
            f'{manifest.kind} = irlvla.from_pretrained("{repo_id}")',
            "```",
            *(["", f"It needs these one-file plugins too, each given with `--plugin FILE`: {', '.join(one_file)}."] if one_file else []),
            "",
            "| part | component | settings |",
            "|---|---|---|",
            *(_row(part, spec) for part, spec in specs.items()),
            "",
        ]
    )


def _row(part: str, spec: dict[str, object]) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in spec.items() if name != "name").replace("|", "\\|")
    return f"| {part} | {spec['name']} | {settings} |"


# -- checkpoints of a run ----------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    model: Policy | Component,
    write_state: Callable[[Path], None] | None = None,
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of a step, then let the link `last` point to it. A kill at any moment leaves `last` and what it points to whole.

    Args:
        directory: of all checkpoints.
        write_state: fills the folder `state`. It is for resuming one's own run only, never to be shared: unlike a model,
            it is not protected against a file that was made to do harm.
        keep: how many checkpoints stay, the newest; None = all.

    Raises:
        ContractError, PluginError, FileError: as `save_pretrained`.
    """
    directory = Path(directory)
    if step < 0 or (keep is not None and keep < 1):
        raise InputError(f"step={step}, keep={keep}: a step is at least 0, and at least 1 checkpoint is kept")
    remove_leftovers(directory)
    with whole_folder(directory / f"step-{step}") as folder:
        save_pretrained(model, folder / "model")
        if write_state is not None:
            (folder / "state").mkdir()
            write_state(folder / "state")
    link(directory / "last", f"step-{step}")
    if keep is not None:
        others = sorted((path for path in _checkpoints(directory) if step_of(path) != step), key=step_of)
        for path in others[: max(0, len(others) - keep + 1)]:
            remove_whole(path)
    return directory / f"step-{step}"


def last_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that `last` points to; without that link the one of the highest step; None if there is none."""
    directory = Path(directory)
    found = {path.name: path for path in _checkpoints(directory)}
    last = directory / "last"
    if last.is_symlink() and os.readlink(last) in found:
        return found[os.readlink(last)]
    return max(found.values(), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def _checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
