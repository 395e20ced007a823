"""Which of torch's attentions runs on a GPU (`F.scaled_dot_product_attention` has several), chosen by device.

cuDNN's is the first choice on Hopper (sm_90) alone, and never under a mask: its backward gives NaN for numbers of keys
that are 64 modulo 128 (pytorch#196678). None of these orders has been timed here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmteacher.errors import InputError
from vlmteacher.settings import Attention

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MASKED = [BACKENDS[name] for name in ("flash", "efficient", "math")]
HOPPER = (9, 0)


def order(choice: Attention, device: torch.device) -> tuple[str, ...]:
    """The attentions that torch tries on a GPU, in this order; "fa3" is FlashAttention 3 in the place of "flash".

    Empty on other devices. Raises InputError where `choice` cannot run.
    """
    if device.type != "cuda":
        if choice != "auto":
            raise InputError(f"attention {choice} needs an NVIDIA GPU, the Reasoner is on {device}: take auto")
        return ()
    hopper = torch.cuda.get_device_capability(device) == HOPPER
    if choice == "fa3":
        if missing := fa3_missing(hopper):
            raise InputError(f"attention fa3 cannot run ({missing}): take auto")
        return "fa3", "efficient", "math"
    rest = ("flash", "efficient", "math")
    first = "cudnn" if choice == "auto" and hopper else choice
    return rest if first == "auto" else (first, *(name for name in rest if name != first))


def fa3_missing(hopper: bool) -> str:
    """What FlashAttention 3 lacks here; empty where it can run."""
    if not hasattr(torch_attention, "restore_flash_attention_impl"):
        return f"torch {torch.__version__} cannot take it up"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "the package flash_attn_interface is not installed"
    return "" if hopper else "it needs a Hopper GPU"


@contextmanager
def chosen(choice: Attention, device: torch.device) -> Iterator[None]:
    """Let torch take the attentions of `order` inside the block. Raises InputError as `order` does."""
    names = order(choice, device)
    with ExitStack() as undo:
        if "fa3" in names:
            before = torch_attention.current_flash_attention_impl()
            torch_attention.activate_flash_attention_impl("FA3")
            undo.callback(torch_attention.restore_flash_attention_impl)
            if before:
                undo.callback(torch_attention.activate_flash_attention_impl, before)
        if names:
            kernels = [BACKENDS["flash" if name == "fa3" else name] for name in names]
            undo.enter_context(sdpa_kernel(kernels, set_priority=True))
        yield
