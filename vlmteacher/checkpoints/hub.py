"""Files of models: in a local directory, or in a hub repository at a revision, of which the cache keeps a copy.

A model is named by the path of a directory, by a hub id (OWNER/MODEL), or by a hub id and a branch, tag or commit
(OWNER/MODEL@REVISION).
"""

from __future__ import annotations

import os
from pathlib import Path

from vlmteacher.errors import InputError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configs, tokenizers, chat templates


def split_revision(name: str) -> tuple[str, str | None]:
    """The hub id of `name`, and its revision or None. Raises InputError for an empty one."""
    model, at, revision = name.partition("@")
    if at and not (model and revision):
        raise InputError(f"{name} names no revision: it is OWNER/MODEL@REVISION, of a branch, a tag or a commit")
    return model, revision or None


def only_local(path_or_id: str) -> bool:
    """True for a local directory, and for a hub id while the hub is out of reach: then only its cached copy can serve.

    One short request decides. Without it huggingface_hub tries six times within half a minute, a warning each.
    """
    if os.path.isdir(path_or_id):
        return True
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the errors are those of whichever HTTP client the hub library uses, or its own offline mode
        return True
    return False


def find_file(name: str, file: str, local_files_only: bool) -> Path | None:
    """`file` of a local pipeline directory or hub repository; None where that has none."""
    directory = Path(name)
    if directory.is_dir():
        return directory / file if (directory / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    model, revision = split_revision(name)
    try:
        return Path(hf_hub_download(model, file, revision=revision, local_files_only=local_files_only))
    except LocalEntryNotFoundError as error:
        if file != "model_index.json":  # optional, and the pipeline itself was found in the cache
            return None
        raise unknown_model(name) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        raise unknown_model(name) from error


def fetch(name: str, subfolder: str, local_files_only: bool) -> Path:
    """The directory `subfolder` of a model, with its configs and tokenizer files; weights are left to `find_file`."""
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
    """`name`, one of whose files was found in `root`, for what is read of it from now on: one commit, whatever comes.

    A cached model that the hub is not asked about is the directory that it is.
    """
    if local_files_only or os.path.isdir(name):
        return str(root)
    return f"{split_revision(name)[0]}@{root.name}"


def unknown_model(name: str) -> InputError:
    check = "the name, the revision after @ and the network" if "@" in name else "the name and the network"
    return InputError(
        f"{name} is neither a directory nor a model that can be reached on the hub: check {check}, or"
        " give a local directory (`hf download OWNER/MODEL --local-dir DIR`)"
    )


def find_weights(name: str, label: str) -> Path:
    """The file that `OWNER/REPO/FILE[@REVISION]` means; `OWNER/REPO` is its only .safetensors file, or only .pth file.

    label: what the file is, for messages. Raises InputError, with where to get it, when it is neither cached nor within
    reach.
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
                names = [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]
            else:
                names = HfApi().list_repo_files(repo, revision=revision or None)
            file = only_weights(names, repo)
        return Path(hf_hub_download(repo, file, revision=revision or None, local_files_only=local))
    except InputError:
        raise
    except Exception as error:  # not there, not allowed, or the errors of whichever HTTP client the hub library uses
        where = f"huggingface.co/{repo}/blob/{revision or 'main'}/{file}" if file else f"huggingface.co/{repo}"
        raise InputError(
            f"{label} {name} is no file here{' and the hub is out of reach' if local else ', nor one on the hub'}:"
            f" check the name, or download {where} and give its path"
        ) from error


def only_weights(names: list[str], where: str) -> str:
    """The .safetensors file among `names`, or else the .pth file. Raises InputError where it is not one."""
    for ending in (".safetensors", ".pth"):
        found = sorted(each for each in names if each.endswith(ending))
        if len(found) > 1:
            listed = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
            raise InputError(
                f"{where} has {len(found)} files of weights: name one, as in {where}/{found[0]} ({listed})"
            )
        if found:
            return found[0]
    raise InputError(f"{where} has no .safetensors or .pth file: name a file of weights")
