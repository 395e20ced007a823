"""Keep the libraries' messages off the terminal."""

from __future__ import annotations

import os
import warnings

from vlmteacher.errors import Notice


def quiet_warnings(notices: bool = True) -> None:
    """Ignore all warnings except, with `notices`, our own, which are printed in one line each."""
    warnings.filterwarnings("ignore")
    warnings.simplefilter("always" if notices else "ignore", Notice)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"


def quiet(notices: bool = True) -> None:
    """Hide the libraries' warnings and progress bars but for downloads; our own bars, notices and errors stay.

    notices: without them our notices and the bars of downloads are hidden too.
    """
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_warnings(notices)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # torchao makes the last one warn
        logging.getLogger(library).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # the hub's too
    from huggingface_hub.utils.tqdm import enable_progress_bars

    if notices:
        enable_progress_bars()  # on a terminal: models are tens of gigabytes
