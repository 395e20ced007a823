"""Keep the libraries' messages off the terminal."""

from __future__ import annotations

import os
import warnings

from vlmteacher.errors import Notice


def quiet_warnings() -> None:
    """Ignore all warnings except notices, which are printed in one line each."""
    warnings.filterwarnings("ignore")
    warnings.simplefilter("always", Notice)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"


def quiet() -> None:
    """Hide the libraries' warnings and progress bars but for downloads; our own bars, notices and errors stay."""
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_warnings()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # the hub's too
    from huggingface_hub.utils.tqdm import enable_progress_bars

    enable_progress_bars()  # on a terminal: models are tens of gigabytes
