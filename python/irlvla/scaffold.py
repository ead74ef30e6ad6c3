"""A new plugin: a small package that installs, works and passes its checks, to be changed into something else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from packaging.version import Version

import irlvla
from irlvla.errors import FileError, InputError, did_you_mean
from irlvla.files import whole_folder

TEMPLATES = Path(__file__).parent / "templates"
FOR_A_PLANNER = ("pyproject.toml", "README.md", "irlvla_acme/__init__.py", "tests/test_acme.py")  #: and changed for other kinds
NOUNS = {  #: kinds, and what their templates are
    "backbone": "cnn",
    "reasoner": "command",
    "planner": "gaussian",
    "reward_model": "mlp",
    "rl_algorithm": "reinforce",
    "dataset": "road",
    "metric": "cornering",
    "benchmark": "crossroads",
}


def write_plugin(name: str, folder: str | os.PathLike[str] | None = None, kind: str = "planner") -> Path:
    """Write the package irlvla-NAME with one component, as templates/ has it for the name "acme".

    Args:
        name: of the plugin, with or without "irlvla-": letters, digits, - and _.
        folder: where irlvla-NAME/ is put; default: the current directory.
        kind: of the component.

    Returns the folder of the package.

    Raises:
        InputError: the name or the kind cannot be.
        FileError: irlvla-NAME/ is there already, or cannot be written.
    """
    if kind not in NOUNS:
        raise InputError(f"no kind {kind!r}. {did_you_mean(kind, NOUNS)}Kinds: {', '.join(NOUNS)}")
    words = _words(name)
    package = Path(folder or "") / f"irlvla-{'-'.join(words)}"
    if package.exists():
        raise FileError(f"{package} is there already; choose another name or another folder")
    plugin, component = _replacements(words, kind)
    with whole_folder(package) as new:
        for template in (f"irlvla_acme/{kind}.py", *FOR_A_PLANNER):
            replacements = plugin | component if template in FOR_A_PLANNER else plugin
            path = new / _filled(template, plugin)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_filled((TEMPLATES / template).read_text(encoding="utf-8"), replacements), encoding="utf-8")
    return package


def _words(name: str) -> list[str]:
    """The words of a plugin's name: ["acme", "cars"] of "irlvla-Acme_cars"."""
    bare = re.sub(r"^irlvla[-_]", "", name, flags=re.IGNORECASE)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", bare):
        fit = re.sub(r"[^A-Za-z0-9]+", "-", bare).strip("-0123456789").lower()
        raise InputError(
            f"{name!r} cannot be the name of a plugin: it must begin with a letter and be of letters, digits and single - or _"
            + (f"; for example {fit!r}" if fit else "")
        )
    return re.split("[-_]", bare.lower())


def _replacements(words: list[str], kind: str) -> tuple[dict[str, str], dict[str, str]]:
    """What stands for the name of the plugin in every template, and for the component in those that are written for a planner."""
    noun = NOUNS[kind]
    dashed = "irlvla-" + "-".join(words)
    return (
        {"irlvla-acme": dashed, "acme": "_".join(words), "Acme": "".join(map(str.capitalize, words)), ">=0.1,<0.2": _range()},
        {"planner": kind, "gaussian": noun, "Gaussian": noun.capitalize()},
    )


def _filled(text: str, replacements: dict[str, str]) -> str:
    """A template, with all replacements made at once."""
    return re.sub("|".join(replacements), lambda found: replacements[found[0]], text)


def _range() -> str:
    """The versions of irlvla that a plugin written for this one works with: those of the same minor release."""
    version = Version(irlvla.__version__)
    first = str(version) if version.is_prerelease else f"{version.major}.{version.minor}"
    return f">={first},<{version.major}.{version.minor + 1}"
