"""Devices, compiled backends and versions of this installation: the `vlmteacher env` command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

# Versions are read from the installed metadata: importing the large libraries would take seconds.
PACKAGES = (
    "vlmteacher", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow",
    "imageio", "imageio-ffmpeg", "triton", "xformers", "flash-attn",
    "bitsandbytes", "gradio", "ray",
)  # fmt: skip


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, Any]:
    """Describe this machine and installation in JSON-ready values; missing parts are reported, not raised.

    Returns:
        backends: {"cpu" | "triton" | "cuda": {"available": bool, "why": str}}; `cpu`: the compiled C++ operators,
            `cuda`: those for GPUs (both with "build": the compiler and torch that built them), `triton`: Triton's
            kernels. `why` is empty for an available backend, else one line that names what is missing.
        versions: package -> version, None when not installed.
        devices: torch devices, [{"name", "kind", "memory_bytes"}].
        attention: device -> the attentions that torch tries there by default, in their order (GPUs), and "fa3": what
            FlashAttention 3 lacks; empty without torch.
        cpu_features: instruction set -> bool; empty without the C++ library.
        gpu_policy: which backend serves which operator on a GPU, with the measurement that decided (`ops/gpus.py`).
        processor: its "name", the class that it and the build reach ("widest"), the one "in_use", the value of
            VLMTEACHER_CPU ("limited_by"), and for the class in use which backend serves which operator, with the
            measurement that decided ("policy", see `ops/processors.py`); empty without the C++ library.
    """
    backends: dict[str, dict[str, Any]] = {}
    features: dict[str, bool] = {}
    gpu_policy: list[dict[str, str]] = []
    devices: list[dict[str, Any]] = []
    attention: dict[str, str] = {}
    processor: dict[str, Any] = {}
    if importlib.util.find_spec("torch") is None:
        missing = "torch is not installed: pip install torch"
        backends = {name: {"available": False, "why": missing} for name in ("cpu", "triton", "cuda")}
    else:
        import torch

        from vlmteacher.ops import gpus, sdpa
        from vlmteacher.ops.backends import build_record, cpp_status, cuda_status, triton_status

        for name, status in {"cpu": cpp_status, "triton": triton_status, "cuda": cuda_status}.items():
            backends[name] = dict(zip(("available", "why"), status(), strict=True))
        if (build := build_record()["cuda"])["built"]:
            backends["cuda"]["build"] = {"compiler": build["compiler"], "torch": build["torch"]}
        if backends["cpu"]["available"]:
            from vlmteacher import _C
            from vlmteacher.ops import processors

            backends["cpu"]["build"] = _C.build_info()
            features = _C.cpu_features()
            processor = {
                "name": processors.processor_name(),
                "widest": _C.widest(),
                "in_use": processors.in_use(),
                "limited_by": os.environ.get(processors.VARIABLE) or None,
                "policy": processors.table(processors.in_use()),
            }
        gpu_policy = gpus.table()
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            devices.append({"name": f"cuda:{index}", "kind": card.name, "memory_bytes": card.total_memory})
            attention[f"cuda:{index}"] = ", ".join(sdpa.order("auto", torch.device("cuda", index)))
        hopper = any(torch.cuda.get_device_capability(i) == sdpa.HOPPER for i in range(torch.cuda.device_count()))
        attention["fa3"] = sdpa.fa3_missing(hopper) or "available: --attention fa3"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices.insert(0, {"name": "cpu", "kind": f"{platform.machine()}, {cores} cores", "memory_bytes": memory})
    return {
        "backends": backends,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "devices": devices,
        "attention": attention,
        "cpu_features": features,
        "gpu_policy": gpu_policy,
        "processor": processor,
        "platform": f"{platform.system()} {platform.release()}",
        "prefix": sys.prefix,
    }


def format_report(environment: dict[str, Any]) -> str:
    """Format the result of `report` as text for a terminal."""
    lines = ["devices"]
    for device in environment["devices"]:
        lines.append(f"  {device['name']:<14} {device['kind']}, {device['memory_bytes'] / 2**30:.1f} GiB")
    if present := [name for name, has in environment["cpu_features"].items() if has]:
        lines.append(f"  {'cpu features':<14} {' '.join(present)}")
    lines.append("backends (plain torch replaces a missing one)")
    for name, status in environment["backends"].items():
        build = status.get("build")
        made = f"built by {build['compiler']} against torch {build['torch']}" if build else ""
        lines.append(
            f"  {name:<14} {'available' if status['available'] else 'missing'}: {status['why'] or made}".rstrip(": ")
        )
    lines.append("attention on GPUs (--attention)")
    lines += [f"  {name:<14} {what}" for name, what in environment["attention"].items()]
    if environment["gpu_policy"]:
        lines.append("operators on a GPU, of these backends the first that is there")
    lines += _format_policy(environment["gpu_policy"])
    if processor := environment["processor"]:
        limited = f", by VLMTEACHER_CPU={processor['limited_by']}" if processor["limited_by"] else ""
        reach = "" if processor["widest"] == processor["in_use"] else f", reaches {processor['widest']}"
        lines.append(f"processor: {processor['name']}, used as {processor['in_use']}{limited}{reach}")
        lines += _format_policy(processor["policy"])
    lines.append("versions")
    for name, number in environment["versions"].items():
        lines.append(f"  {name:<14} {number or 'not installed'}")
    return "\n".join(lines)


def _format_policy(rules: list[dict[str, str]]) -> list[str]:
    """The lines of a table of backends, the measurement below each rule."""
    return [
        line
        for rule in rules
        for line in (
            f"  {rule['operator']}, {rule['dtypes']}, {rule['shapes']}: {rule['backend']}",
            f"    {rule['decided']}",
        )
    ]
