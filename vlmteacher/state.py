"""State files: what a run or a training resumes from, written durably and read without trust."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmteacher.errors import InputError, first_line
from vlmteacher.files import replacing
from vlmteacher.interruption import uninterrupted

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

SAMPLE = 64  # values of every tensor that `fingerprint` reads
FORMER_NAMES = {"SurrogateDecoder": "TinyVideoDecoder"}  # of classes, in fingerprints: run folders outlive a renaming


def write_state(path: Path, form: str, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file, whole or not at all; signals take effect afterwards.

    form: program, kind and version of the content ("vlmteacher run 1"). Raises OutputError.
    """
    import torch

    with uninterrupted(), replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"form": form, **content}, file)


def read_state(path: Path, form: str, limit: int) -> dict[str, Any]:
    """The content that `write_state` wrote, with tensors on the CPU; code in the file is not run.

    limit: bytes of the content at most. Raises InputError for a file that is damaged, longer, or of another form.
    """
    import torch

    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            if (size := sum(entry.file_size for entry in archive.infolist())) > limit:
                raise ValueError(f"it holds {size} bytes where at most {limit} are expected")
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise errors of many types for a foreign file
        reason = first_line(error)[:100]
        raise unusable(path, reason) from error
    written = content.get("form") if isinstance(content, dict) else None
    if written != form:
        what = written if isinstance(written, str) else "another program or an earlier version"
        raise unusable(path, f"it was written by {what[:60]}, not as {form}")
    return content


def unusable(path: Path, reason: str) -> InputError:
    """The InputError for a state that cannot be resumed."""
    return InputError(f"{path} cannot be used ({reason}): delete it to start again, or give another --out")


def check_like(given: Any, wanted: Tensor, name: str) -> None:
    """Raise InputError unless `given` is a tensor of the shape and dtype of `wanted`: copying would convert it."""
    if not hasattr(given, "shape") or (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
        what = f"{tuple(given.shape)} {given.dtype}" if hasattr(given, "shape") else type(given).__name__
        raise InputError(f"{name} is {what}, not {tuple(wanted.shape)} {wanted.dtype}")


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state as `Optimizer.load_state_dict` does, and raise InputError for tensors of another shape or dtype."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = state["state"]
    if kept and len(kept) != len(parameters):
        raise InputError(f"its optimizer has {len(kept)} parameters of {len(parameters)}")
    for place, entries in kept.items():
        for name, value in entries.items():
            if name != "step":
                check_like(value, parameters[place], f"its optimizer's {name}")
    optimizer.load_state_dict(dict(state))


def fingerprint(networks: Mapping[str, nn.Module], *settings: object) -> str:
    """A hash of models: their configurations, the names, shapes and dtypes of all tensors, a sample of their values.

    settings: dataclasses that are hashed too. A change of most values of a tensor changes the hash, that of a single
    value may not: hashing every byte of a large model takes minutes.
    """
    import torch

    digest = hashlib.sha256()
    for each in settings:
        values = asdict(each) if is_dataclass(each) and not isinstance(each, type) else each
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, network in sorted(networks.items()):
        kind = type(network).__name__
        digest.update(f"{name} {FORMER_NAMES.get(kind, kind)} {_configuration(network)}".encode())
        stored = [entry for key, tensor in network.state_dict().items() for entry in _plain(key, tensor)]
        for key, tensor in sorted(stored, key=lambda entry: entry[0]):
            flat = tensor.detach().reshape(-1)
            stride = max(1, len(flat) // SAMPLE) | 1  # odd: an even one would stay in a few columns of a matrix
            sample = flat[::stride][:SAMPLE].cpu().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(key: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that one of a state holds: itself, or the parts of one that a library keeps quantised."""
    import torch

    if not hasattr(tensor, "__tensor_flatten__"):
        yield key, tensor.as_subclass(torch.Tensor)
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{key}.{name}", getattr(tensor, name))


def _configuration(network: Any) -> str:
    """The configuration of a network of diffusers or transformers as JSON, without its path, dtype and version."""
    config = getattr(network, "config", None) or {}
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    left_out = ("transformers_version", "dtype", "torch_dtype")
    values = {name: value for name, value in values.items() if name[0] != "_" and name not in left_out}
    return json.dumps(values, sort_keys=True, default=str)
