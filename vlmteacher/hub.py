"""Whether a model is to be asked for on the hub or only on this machine."""

from __future__ import annotations

import os


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
