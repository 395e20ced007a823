"""What this machine and this installation offer: the `vlmteacher env` command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

# Versions are read from the installed metadata: importing the big libraries takes longer than the whole report may.
PACKAGES = (
    "vlmteacher", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow",
    "imageio", "imageio-ffmpeg", "triton", "xformers", "flash-attn",
    "bitsandbytes", "gradio", "ray",
)  # fmt: skip


def version(package: str) -> str | None:
    """The installed version, None when the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict[str, Any]:
    """Everything that `vlmteacher env` shows, as JSON-ready values; it never raises for what is missing.

    Returns:
        backends: {"cpu" | "triton" | "cuda": {"available": bool, "why": str}}; `cpu` are the compiled C++ operators,
            `cuda` those for GPUs (both with "build": compiler and torch that made them), `triton` the GPU kernels.
            `why` is empty for what is available, else one line that says what is missing.
        versions: package -> version, None when not installed.
        devices: torch devices, [{"name", "kind", "memory_bytes"}].
        cpu_features: instruction set -> bool; empty without the C++ library.
    """
    backends: dict[str, dict[str, Any]] = {}
    features: dict[str, bool] = {}
    devices: list[dict[str, Any]] = []
    if importlib.util.find_spec("torch") is None:
        missing = "torch is not installed: pip install torch"
        backends = {name: {"available": False, "why": missing} for name in ("cpu", "triton", "cuda")}
    else:
        import torch

        from vlmteacher.ops.backends import build_record, cpp_status, cuda_status, triton_status

        for name, status in {"cpu": cpp_status, "triton": triton_status, "cuda": cuda_status}.items():
            backends[name] = dict(zip(("available", "why"), status(), strict=True))
        if (facts := build_record()["cuda"])["built"]:
            backends["cuda"]["build"] = {"compiler": facts["compiler"], "torch": facts["torch"]}
        if backends["cpu"]["available"]:
            from vlmteacher import _C

            backends["cpu"]["build"] = _C.build_info()
            features = _C.cpu_features()
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            devices.append({"name": f"cuda:{index}", "kind": card.name, "memory_bytes": card.total_memory})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices.insert(0, {"name": "cpu", "kind": f"{platform.machine()}, {cores} cores", "memory_bytes": memory})
    return {
        "backends": backends,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "devices": devices,
        "cpu_features": features,
        "platform": f"{platform.system()} {platform.release()}",
        "prefix": sys.prefix,
    }


def format_report(facts: dict[str, Any]) -> str:
    """`report()` as text for a terminal."""
    lines = ["devices"]
    for device in facts["devices"]:
        lines.append(f"  {device['name']:<14} {device['kind']}, {device['memory_bytes'] / 2**30:.1f} GiB")
    if present := [name for name, has in facts["cpu_features"].items() if has]:
        lines.append(f"  {'cpu features':<14} {' '.join(present)}")
    lines.append("backends (what is missing runs on plain torch)")
    for name, status in facts["backends"].items():
        build = status.get("build")
        made = f"built by {build['compiler']} against torch {build['torch']}" if build else ""
        lines.append(
            f"  {name:<14} {'available' if status['available'] else 'missing'}: {status['why'] or made}".rstrip(": ")
        )
    lines.append("versions")
    for name, number in facts["versions"].items():
        lines.append(f"  {name:<14} {number or 'not installed'}")
    return "\n".join(lines)
