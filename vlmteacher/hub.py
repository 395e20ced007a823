"""Whether a model is to be asked for on the hub or only on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from vlmteacher.errors import InputError


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

    try:
        return Path(hf_hub_download(name, file, local_files_only=local_files_only))
    except LocalEntryNotFoundError as error:
        if file != "model_index.json":  # optional, and the pipeline itself was found in the cache
            return None
        raise unknown_model(name) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        raise unknown_model(name) from error


def unknown_model(name: str) -> InputError:
    return InputError(
        f"{name} is neither a directory nor a model that can be reached on the hub: check the name and the network, or"
        " give a local directory (`hf download OWNER/MODEL --local-dir DIR`)"
    )
