"""Find the files of a model: in a local directory, or in a hub repository or its cached copy.

A model's name is the path of a directory, a hub id (OWNER/MODEL), or a hub id with a branch, tag or commit
(OWNER/MODEL@REVISION).
"""

from __future__ import annotations

import os
from pathlib import Path

from vlmteacher.errors import InputError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configs, tokenizers, chat templates


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a name into the hub id and the revision, or None. Raises InputError for an empty revision."""
    model, at, revision = name.partition("@")
    if at and not (model and revision):
        raise InputError(f"{name} names no revision: give OWNER/MODEL@REVISION, with a branch, a tag or a commit")
    return model, revision or None


def only_local(path_or_id: str) -> bool:
    """Whether only local files can be used: a local directory, or a hub id while the hub cannot be reached.

    One short request decides. Without it huggingface_hub tries six times within half a minute, with a warning each.
    """
    if os.path.isdir(path_or_id):
        return True
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the hub library's own in offline mode, or those of its HTTP client
        return True
    return False


def find_file(name: str, file: str, local_files_only: bool) -> Path | None:
    """The local path of `file` in a model; None where the model has no such file. Raises InputError."""
    directory = Path(name)
    if directory.is_dir():
        return directory / file if (directory / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    model, revision = split_revision(name)
    try:
        return Path(hf_hub_download(model, file, revision=revision, local_files_only=local_files_only))
    except LocalEntryNotFoundError as error:
        if file != "model_index.json":  # optional, and the pipeline itself is in the cache
            return None
        raise unknown_model(name) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        raise unknown_model(name) from error


def fetch(name: str, subfolder: str, local_files_only: bool) -> Path:
    """The local directory `subfolder` of a model, with its configs and tokenizer files. Raises InputError.

    Weights of hub models are not fetched here but by `find_file`.
    """
    if os.path.isdir(name):
        return Path(name) / subfolder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    model, revision = split_revision(name)
    files = [os.path.join(subfolder, pattern) for pattern in SMALL_FILES]
    try:
        root = snapshot_download(model, revision=revision, allow_patterns=files, local_files_only=local_files_only)
    except (HFValidationError, OSError) as error:
        raise unknown_model(name) from error
    return Path(root) / subfolder


def pinned(name: str, root: Path, local_files_only: bool) -> str:
    """The name of one commit of a model whose files are in `root`, so that all further files are of that commit.

    For local files it is the directory `root`.
    """
    if local_files_only or os.path.isdir(name):
        return str(root)
    return f"{split_revision(name)[0]}@{root.name}"


def unknown_model(name: str) -> InputError:
    """The error of a name that is neither a directory nor a model on the hub."""
    check = "the name, the revision after @ and the network" if "@" in name else "the name and the network"
    return InputError(
        f"{name} is neither a directory nor a model that can be reached on the hub: check {check}, or"
        " give a local directory (`hf download OWNER/MODEL --local-dir DIR`)"
    )


def find_weights(name: str, label: str) -> Path:
    """Fetch the file ``OWNER/REPO/FILE[@REVISION]``; ``OWNER/REPO`` means its only .safetensors or only .pth file.

    label: the role of the file, for messages. Raises InputError, with the address, for a file that is neither cached
    nor can be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    path, _, revision = name.partition("@")
    owner, repository, *rest = path.split("/")
    repo, file = f"{owner}/{repository}", "/".join(rest)
    local = only_local(repo)
    try:
        if not file:
            if local:
                folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
                names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            else:
                names = HfApi().list_repo_files(repo, revision=revision or None)
            file = only_weights(names, repo)
        return Path(hf_hub_download(repo, file, revision=revision or None, local_files_only=local))
    except InputError:
        raise
    except Exception as error:  # missing, forbidden, or an error of the hub library's HTTP client
        where = f"huggingface.co/{repo}/blob/{revision or 'main'}/{file}" if file else f"huggingface.co/{repo}"
        raise InputError(
            f"{label} {name} is no file here{' and the hub is out of reach' if local else ', nor one on the hub'}:"
            f" check the name, or download {where} and give its path"
        ) from error


def only_weights(names: list[str], where: str) -> str:
    """The only .safetensors file among `names`, or else the only .pth file. Raises InputError."""
    for ending in (".safetensors", ".pth"):
        files = sorted(name for name in names if name.endswith(ending))
        if len(files) > 1:
            listed = ", ".join(files[:12]) + (", ..." if len(files) > 12 else "")
            raise InputError(
                f"{where} has {len(files)} files of weights: name one, as in {where}/{files[0]} ({listed})"
            )
        if files:
            return files[0]
    raise InputError(f"{where} has no .safetensors or .pth file: name a file of weights")
