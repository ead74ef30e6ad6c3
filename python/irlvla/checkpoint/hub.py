"""Files on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

import irlvla
from irlvla.errors import FileError

_LOGIN = "hf auth login"


def download(repo_id: str, revision: str | None, names: Iterable[str]) -> Path:
    """A folder with the named files of a repository, as far as it has them, from the cache if they are there.

    Raises:
        FileError: there is no such repository or revision, it is not open to the user, or the Hub cannot be reached.
    """
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=list(names), library_name="irlvla", library_version=irlvla.__version__
            )
        )
    except GatedRepoError as error:
        raise FileError(f"{repo_id} is gated: ask for access at https://huggingface.co/{repo_id}, then: {_LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise FileError(f"{repo_id} is neither a folder here nor a model on the Hub. If it is a private one: {_LOGIN}") from error
    except RevisionNotFoundError as error:
        raise FileError(f"{repo_id} on the Hub has no revision {revision!r}") from error
    except HFValidationError as error:
        raise FileError(f"{repo_id} is neither a folder here nor a name for a model on the Hub: {_line(error)}") from error
    except Exception as error:  # whichever network library is below, it has its own
        raise FileError(f"{repo_id} is no folder here, and cannot be downloaded from the Hub: {_line(error)}") from error


def upload(repo_id: str, files: Mapping[str, bytes | Path], *, keep: Iterable[str], private: bool, message: str, token: str | None) -> str:
    """Put files into a repository, which is made if there is none, in one commit. Returns its address.

    Args:
        keep: files that are left as they are if the repository has them.

    Raises:
        FileError: it cannot be written to: no such owner, not logged in, no network.
    """
    api = huggingface_hub.HfApi(token=token, library_name="irlvla", library_version=irlvla.__version__)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        present = {name for name in keep if api.file_exists(repository.repo_id, name)}
        operations = [
            huggingface_hub.CommitOperationAdd(name, content if isinstance(content, bytes) else os.fspath(content))
            for name, content in files.items()
            if name not in present
        ]
        api.create_commit(repository.repo_id, operations, commit_message=message)
    except HfHubHTTPError as error:
        raise FileError(f"{repo_id} cannot be written on the Hub: {_line(error)}. To log in: {_LOGIN}") from error
    except Exception as error:
        raise FileError(f"{repo_id} cannot be written on the Hub: {_line(error)}") from error
    return str(repository)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
