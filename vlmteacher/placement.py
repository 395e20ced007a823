"""The device of each part of a pipeline, and its dtype."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil

from vlmteacher.arguments import show
from vlmteacher.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

PARTS = ("reasoner", "teacher")  # the surrogate decoder, small as it is, goes with the Reasoner
EXAMPLE = "reasoner=cuda:0,teacher=cuda:1"

QUANTIZATIONS = ("4bit", "8bit", "int8", "fp8", "keep")  # of a Reasoner: see `reasoners/quantization.py`

DeviceMap: TypeAlias = "Mapping[str, str | torch.device]"


def parse_device_map(text: str) -> dict[str, str]:
    """The dictionary of "reasoner=cuda:0,teacher=cuda:1". Raises InputError for a text of another form."""
    devices: dict[str, str] = {}
    for entry in text.split(","):
        part, equals, device = (piece.strip() for piece in entry.partition("="))
        if not (part and equals and device) or part in devices:
            raise InputError(f"--device-map {text!r} is not of the form {EXAMPLE}")
        devices[part] = device
    return devices


def find_devices(
    where: str | torch.device | DeviceMap | None, label: str = "device", map_label: str = "device_map"
) -> dict[str, torch.device]:
    """The device of each of `PARTS`, from one device for all or a map; None is the GPU where there is one.

    label, map_label: names of the argument, for messages. Raises InputError for an unknown or missing part and for a
    device that cannot be used.
    """
    where = default_device() if where is None else where
    if not isinstance(where, Mapping):
        return dict.fromkeys(PARTS, find_device(where, label))
    for part in where:
        if part not in PARTS:
            raise InputError(
                f"{map_label}: unknown part {part!r}: the parts are {' and '.join(PARTS)}, as in {EXAMPLE}"
            )
    if missing := [part for part in PARTS if where.get(part) is None]:
        raise InputError(f"{map_label}: no device for the {missing[0]}: name both, as in {EXAMPLE}")
    return {part: find_device(where[part], f"{map_label}: {part}=") for part in PARTS}


def default_device() -> str:
    """The name of the GPU where there is one, else "cpu"."""
    import torch  # here, because `vlmteacher --help` must not wait for it

    return "cuda" if torch.cuda.is_available() else "cpu"


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as entries of CUDA_VISIBLE_DEVICES; none of them is used by this."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def find_dtype(devices: Mapping[str, torch.device]) -> torch.dtype:
    """The default dtype of the models: bfloat16 where all parts are on GPUs, else float32."""
    import torch

    return torch.bfloat16 if all(device.type == "cuda" for device in devices.values()) else torch.float32


def describe(devices: Mapping[str, torch.device], dtype: torch.dtype) -> str:
    """Devices and dtype in a line: "cpu (AMD EPYC 9R14), float32"."""
    names = {part: f"{device} ({_processor(device)})" for part, device in devices.items()}
    where = [f"{part} {name}" for part, name in names.items()] if len({*names.values()}) > 1 else [names["reasoner"]]
    return ", ".join([*where, str(dtype).removeprefix("torch.")])


def _processor(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


DTYPES = {
    name: kind
    for kind, names in {
        "float32": ("float32", "fp32", "float"),
        "bfloat16": ("bfloat16", "bf16"),
        "float16": ("float16", "fp16", "half"),
        "float64": ("float64", "fp64", "double"),
    }.items()
    for name in names
}


def parse_dtype(dtype: object, label: str = "dtype") -> torch.dtype:
    """A dtype of `DTYPES` from torch's or from a name ("bfloat16", "bf16"). Raises InputError for another."""
    import torch

    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
    if name not in DTYPES:
        known = ", ".join(dict.fromkeys(DTYPES.values()))
        raise InputError(f"{label} must be one of {known}, of torch or as a string, not {show(dtype)}")
    result: torch.dtype = getattr(torch, DTYPES[name])
    return result


def device_memory(device: torch.device) -> int | None:
    """Total bytes of memory of a device; None where that is unknown."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None


class Allocator:
    """The room in the memory of a GPU. cuda: the functions of `torch.cuda` that tell it; tests have their own."""

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        import torch

        self.device, self.cuda = device, cuda or torch.cuda
        self._earlier = 0  # the peak before the last `start`

    def available(self) -> int:
        """Bytes that new tensors can take: free ones, and those that the allocator holds though no tensor uses them."""
        free, _ = self.cuda.mem_get_info(self.device)
        return int(free + self.cuda.memory_reserved(self.device) - self.cuda.memory_allocated(self.device))

    def start(self) -> None:
        """Measure `unused` from now on."""
        self._earlier = self.peak()
        self.cuda.reset_peak_memory_stats(self.device)

    def unused(self) -> int:
        """Bytes that were available at the peak since `start`."""
        grown = self.cuda.max_memory_allocated(self.device) - self.cuda.memory_allocated(self.device)
        return self.available() - int(grown)

    def peak(self) -> int:
        """The most bytes of tensors so far."""
        return max(self._earlier, int(self.cuda.max_memory_allocated(self.device)))


@cache
def allocator(device: torch.device) -> Allocator | None:
    """The allocator of a GPU; None for another device."""
    return Allocator(device) if device.type == "cuda" else None


def peak_memory(*devices: torch.device) -> int:
    """Peak of the allocated bytes so far, of these GPUs together, or, where none is a GPU, of this process."""
    if gpus := {gpu for device in devices if (gpu := allocator(device))}:
        return sum(gpu.peak() for gpu in gpus)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def used_memory(*devices: torch.device, children: bool = False) -> int:
    """The bytes that are allocated now on these GPUs together, or, where none is a GPU, that this process holds.

    children: with the processes that it has started.
    """
    import torch

    if gpus := {device for device in devices if device.type == "cuda"}:
        return sum(torch.cuda.memory_allocated(device) for device in gpus)
    total, process = 0, psutil.Process()
    for each in (process, *(process.children(recursive=True) if children else ())):
        with suppress(psutil.Error):  # it has ended
            total += each.memory_info().rss
    return total


def check_memory(device: torch.device, needed: int, what: str, remedy: str) -> None:
    """Raise InputError where `what` needs more bytes than the device has in total."""
    total = device_memory(device)
    if total is not None and needed > total:
        raise InputError(
            f"{what} needs at least {needed / 1e9:.3g} GB, {device} has {total / 1e9:.3g} GB in all: {remedy}"
        )


def find_device(device: str | torch.device, label: str = "device") -> torch.device:
    """The device of a tensor made on `device`: "cuda" becomes "cuda:0". Raises InputError where that fails."""
    import torch

    if not isinstance(device, (str, torch.device)) and not (type(device) is int and device >= 0):
        raise InputError(f"{label} {show(device)} is no device: give cpu, cuda or the like")
    try:
        probe = torch.empty(1, device=device)
        probe.item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = first_line(error)
        name = f"{label}{'' if label.endswith('=') else ' '}{device if isinstance(device, str) else show(device)}"
        raise InputError(f"{name} cannot be used here ({reason}): see `vlmteacher env`") from error
    return probe.device
