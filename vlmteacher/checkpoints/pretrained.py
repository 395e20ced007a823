"""Load networks, tokenizers and processors of checkpoints, whole or not at all, without running their code.

Everything that transformers and diffusers load is loaded here. A checkpoint is a directory or a hub id (`hub.py`). Its
configs are checked before a library reads them. None of its code runs: ``trust_remote_code=False``, no pickles, no
kernels that a config names. A network with a missing, an unexpected or a mismatched tensor is refused, where the
libraries would draw random weights and continue.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmteacher.checkpoints.hub import fetch, find_file
from vlmteacher.checkpoints.quantized import dequantize_gguf, fill
from vlmteacher.checkpoints.weight_files import FLOATS, Stored, check_floats, network_weights, read_single_file
from vlmteacher.errors import InputError, MissingExtra, Notice
from vlmteacher.files import check_number, read_json

# attention implementation that a config may name -> the package that provides it
ATTENTION = {
    None: None,
    "eager": None,
    "sdpa": None,
    "flex_attention": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
ATTENTION_ENTRIES = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# quant_method of a quantization_config -> the packages that it needs; other methods need none
PACKAGES = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto-round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "eetq": ("kernels",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "modelopt": ("nvidia-modelopt",),
    "quanto": ("optimum-quanto",),
    "quark": ("amd-quark",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
MODULES = {"auto-round": "auto_round", "nvidia-modelopt": "modelopt", "optimum-quanto": "optimum.quanto"}
MODULES |= {"amd-quark": "quark", "compressed-tensors": "compressed_tensors"}
# entries of configs that are numbers of layers
LAYERS = re.compile(r"n(um)?_(\w+_)?(layers|blocks)|layers_per_block|depths?")
# entries of a VAE's config -> their exclusive lower bound
STATISTICS = {"latents_mean": -math.inf, "latents_std": 0, "scaling_factor": 0}
ALLOWANCE = 2**26  # values, such as computed tables, that a network may have beyond those in its files


def load_network(
    kind: Any,
    name: str | os.PathLike[str],
    subfolder: str = "",
    *,
    dtype: torch.dtype,
    local_files_only: bool = True,
    keep_quantized: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Load a network of a class of transformers or diffusers, in `dtype` except what its class keeps in float32.

    Files of a variant (``model.fp16.safetensors``) are used where there are no others. A quantised network is
    dequantised, unless its method is one of `keep_quantized`. options: for its `from_pretrained`.

    Raises InputError: no such network; a missing, unexpected or mismatched tensor; values that are not finite or of
    another dtype; a config that would run code or needs a package that is not installed.
    """
    name = os.fspath(name)
    label = f"{name} ({subfolder or kind.__name__})"
    with refusing(label):
        directory, config = read_config(name, subfolder, "config.json", local_files_only)
        ours = kind.__module__.startswith("diffusers.")
        stem = "diffusion_pytorch_model" if ours else "model"
        weights = network_weights(
            lambda file: find_file(name, str(Path(subfolder, file)), local_files_only), stem, label, sharded_first=ours
        )
        check_config(config, kind, weights.tensors, label)
        if not ours:
            _check_no_others(directory, label)
        method = quantization(config, label)
        if method is None:
            check_floats(weights.tensors, label)
            _check_size(kind, directory, config, weights.tensors, label)
        how: dict[str, Any] = {"torch_dtype": dtype} if ours else {"dtype": dtype, "trust_remote_code": False}
        if not ours:
            how["ignore_mismatched_sizes"] = True  # they are refused below, together with missing tensors
        network, info = kind.from_pretrained(
            directory,
            variant=weights.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **how,
            **options,
        )
        check_keys(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"], label)
        if method is not None and method not in keep_quantized:
            network = _plain(network, method, dtype, label, weights.tensors)
        check_finite(network, label)
    return network


def load_single_file(
    kind: Any,
    path: Path,
    name: str,
    subfolder: str,
    *,
    dtype: torch.dtype,
    local_files_only: bool = True,
    keep_quantized: Sequence[str] = (),
) -> Any:
    """Load a transformer of the diffusers class `kind` from one file, with the config in `subfolder` of `name`.

    The file has diffusers' names or the authors' (see `read_single_file`). keep_quantized: with "gguf", linear layers
    whose weights are quantised in a GGUF file keep them so. Raises InputError, MissingExtra.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    label = f"transformer {path}"
    convert = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__, {}).get("checkpoint_mapping_fn")
    if convert is None:
        raise InputError(f"{label}: diffusers reads no single file of a {kind.__name__}: give a directory")
    with refusing(label):
        state = read_single_file(path, "transformer", dtype, keep="gguf" in keep_quantized)
        _, config = read_config(name, subfolder, "config.json", local_files_only)
        config.pop("quantization_config", None)  # it describes the files that are replaced
        tensors = {key: Stored("F32", tuple(value.shape)) for key, value in state.items()}
        check_config(config, kind, tensors, f"{name} ({subfolder})")
        with init_empty_weights():
            network = kind.from_config(config)
        wanted = network.state_dict()
        if set(state) != set(wanted):  # take the names that fit better
            converted = convert(checkpoint=dict(state), config=config)
            state = min(state, converted, key=lambda names: len(set(names) ^ set(wanted)))
        kept = _kept_gguf(network, state, label)
        shapes = {key: getattr(value, "quant_shape", value.shape) for key, value in state.items()}
        mismatched = [
            (key, shape, wanted[key].shape)
            for key, shape in shapes.items()
            if key in wanted and shape != wanted[key].shape
        ]
        check_keys(set(wanted) - set(state), set(state) - set(wanted), mismatched, f"{label} as {kind.__name__}")
        keep = kind._keep_in_fp32_modules or ()
        for key in state.keys() - kept:
            full = any(part in keep for part in key.split("."))
            state[key] = state[key].to(torch.float32 if full else dtype).contiguous()
        if kept:
            from diffusers import GGUFQuantizationConfig

            fill(network, state, GGUFQuantizationConfig(compute_dtype=dtype), torch.device("cpu"))
        else:
            network.load_state_dict(state, assign=True)
        check_finite(network, label)
    return network.eval()


def _kept_gguf(network: nn.Module, state: dict[str, Any], label: str) -> set[str]:
    """The names of weights that are to stay as a GGUF file has them, those of linear layers; others are dequantised.

    Raises InputError for NaN or infinity.
    """
    from diffusers.utils import get_module_from_name

    kept = set()
    for key, value in state.items():
        if not hasattr(value, "quant_type"):
            continue
        plain = dequantize_gguf(value)
        if not plain.isfinite().all():
            raise InputError(f"{label}: {key} holds NaN or infinity: the file is damaged, fetch it again")
        if key.endswith(".weight") and isinstance(get_module_from_name(network, key)[0], nn.Linear):
            kept.add(key)
        else:
            state[key] = plain
    return kept


def cast(network: Any, dtype: torch.dtype) -> Any:
    """Convert a network of diffusers to `dtype` in place, except what its class keeps in float32."""
    keep = network._keep_in_fp32_modules or ()
    for name, parameter in network.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return network


def load_tokenizer(name: str | os.PathLike[str], subfolder: str = "", local_files_only: bool = True) -> Any:
    """Load the tokenizer of a checkpoint, by a class of transformers. Raises InputError."""
    from transformers import AutoTokenizer

    name = os.fspath(name)
    with refusing(f"{name} ({subfolder or 'tokenizer'})"):
        directory = fetch(name, subfolder, local_files_only)
        if not directory.is_dir():
            raise InputError(f"{name} has no {subfolder}: is the copy complete?")
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_processor(kind: Any, name: str, subfolder: str = "", local_files_only: bool = True) -> Any:
    """Load an image processor of the class `kind` of transformers. Raises InputError."""
    with refusing(f"{name} ({subfolder or kind.__name__})"):
        directory, config = read_config(name, subfolder, "preprocessor_config.json", local_files_only)
        check_processor(config, str(directory / "preprocessor_config.json"))
        return kind.from_pretrained(directory, local_files_only=True)


def read_config(name: str, subfolder: str, file: str, local_files_only: bool) -> tuple[Path, dict[str, Any]]:
    """Read the JSON object in `file` of a part of a model; returns the local directory and it. Raises InputError."""
    directory = fetch(name, subfolder, local_files_only)
    path = directory / file
    if not path.is_file():
        raise InputError(f"{name} has no {Path(subfolder, file)}: is the copy complete?")
    return directory, json_object(path)


def json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint. Raises InputError."""
    config = read_json(path, "file")
    if not isinstance(config, dict):
        raise InputError(f"{path} is no JSON object: is it the right file?")
    return config


def entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config and of the configs in it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from entries(value)


def check_config(config: Mapping[str, Any], kind: Any, tensors: Mapping[str, Stored], label: str) -> None:
    """Raise InputError for a config of another class, one that would run code, or one with invalid entries."""
    ours = kind.__module__.startswith("diffusers.")
    if ours and config.get("_class_name", kind.__name__) != kind.__name__:
        raise InputError(f"{label} is a {config['_class_name']}: a {kind.__name__} is needed")
    if ours:
        _check_known(config, kind, label)
    if "transformers_weights" in config:
        raise InputError(f"{label}: its config names weights in {config['transformers_weights']!r}: remove that entry")
    for key, value in entries(config):
        if key in ATTENTION_ENTRIES:
            for choice in value.values() if isinstance(value, dict) else [value]:
                _check_attention(key, choice, label)
        elif LAYERS.fullmatch(key):
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and not 0 <= count <= len(tensors):
                    raise InputError(f"{label}: its config says {key} {count}, its files hold {len(tensors)} tensors")
        elif key in STATISTICS and value is not None:
            if not isinstance(value, list) and key != "scaling_factor":
                raise InputError(f"{label}: {key} must be a list of numbers, not {value!r:.40}")
            for number in value if isinstance(value, list) else [value]:
                check_number(number, f"{label}: {key}", above=STATISTICS[key])


def _check_known(config: Mapping[str, Any], kind: Any, label: str) -> None:
    """Refuse a guidance scale as an input that the class does not have; give a Notice of other unknown entries."""
    known = inspect.signature(kind.__init__).parameters
    plain = {*known, "quantization_config"}
    unknown = [key for key, value in config.items() if value and not key.startswith("_") and key not in plain]
    for key in unknown:
        if key.startswith("guidance_embed"):
            raise InputError(
                f"{label}: its config says {key}: the guidance scale is an input of this model, and no"
                f" {kind.__name__} has it: give a checkpoint without"
            )
    if unknown:
        listed = ", ".join(f"{key} = {config[key]!r:.40}" for key in unknown[:8])
        warnings.warn(
            f"{label}: {kind.__name__} knows nothing of {listed} in its config: ignored", Notice, stacklevel=4
        )


def _check_size(kind: Any, directory: Path, config: dict[str, Any], tensors: Mapping[str, Stored], label: str) -> None:
    """Raise InputError for a config of a network much larger than the files, before it is allocated."""
    with torch.device("meta"):
        if kind.__module__.startswith("diffusers."):
            network = kind.from_config(config)
        else:
            network = kind(kind.config_class.from_pretrained(directory, local_files_only=True))
    size = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    stored = sum(math.prod(each.shape) for each in tensors.values())
    if size > 2 * stored + ALLOWANCE:
        raise InputError(f"{label}: its config is of a network of {size} values, its files hold {stored}")


def _check_no_others(directory: Path, label: str) -> None:
    """Raise InputError for files that transformers would load instead of, or beside, model.safetensors."""
    for pattern in ("adapter_config.json", "shard-*-model-*.safetensors"):
        if file := next(directory.glob(pattern), None):
            raise InputError(f"{label} holds {file.name} too, which transformers would load: merge or remove it")


def _check_attention(key: str, choice: Any, label: str) -> None:
    if not isinstance(choice, str | None) or choice not in ATTENTION:
        known = ", ".join(name for name in ATTENTION if name)
        raise InputError(f"{label}: its config names the {key} {choice!r}, which could run code: choose from {known}")
    package = ATTENTION[choice]
    if package and importlib.util.find_spec(package) is None:  # transformers would fetch a kernel from the hub
        raise InputError(f"{label}: its config asks for {choice}, which is not installed: change it to sdpa")


def quantization(config: Mapping[str, Any], label: str) -> str | None:
    """The method by which a network is quantised in its files, or None.

    Raises InputError, which names the package to install, where a package is missing.
    """
    section = next((value for key, value in entries(config) if key == "quantization_config" and value), None)
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else None
    if not isinstance(method, str) and isinstance(section, dict) and {"load_in_4bit", "load_in_8bit"} & set(section):
        method = "bitsandbytes"
    if not isinstance(method, str):
        raise InputError(
            f"{label} has a quantization_config without a quant_method: give weights that are not quantised"
        )
    for package in PACKAGES.get(method, ()):
        if not _is_installed(MODULES.get(package, package)):
            raise InputError(
                f"{label} is quantised by {method}, which needs the package {package}: pip install {package}, or give"
                " weights that are not quantised"
            )
    return method


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package within another one
        return False


def _plain(network: Any, method: str, dtype: torch.dtype, label: str, tensors: Mapping[str, Stored]) -> Any:
    """Dequantise a network. Raises InputError where its library cannot."""
    if getattr(network, "hf_quantizer", None) is None:  # transformers did it at loading, as for float8 on a CPU
        if all(stored.dtype in FLOATS for stored in tensors.values()):
            raise InputError(
                f"{label} says that it is quantised by {method}, and its files hold plain weights: remove the"
                " quantization_config from its config.json, or give the checkpoint that it was written for"
            )
        return network.to(dtype)
    try:
        network = network.dequantize() or network
    except NotImplementedError as error:
        raise InputError(
            f"{label} is quantised by {method}, which cannot be dequantised: give weights that are not quantised,"
            " or the checkpoint of another method"
        ) from error
    return network.to(dtype)


def check_keys(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any], label: str) -> None:
    """Raise InputError, with the number and the first name, for missing, unexpected or mismatched tensors."""
    for keys, what in (
        (missing, "lacks"),
        ((key for key in unexpected if not key.endswith("position_ids")), "has, unlike its class,"),
        ((f"{key} {tuple(got)}, not {tuple(wanted)}" for key, got, wanted in mismatched), "has other shapes in"),
    ):
        if names := sorted(keys):
            more = ", ..." if len(names) > 1 else ""
            raise InputError(f"{label} {what} {len(names)} weights ({names[0]}{more}): is the copy complete?")


def check_finite(network: nn.Module, label: str) -> None:
    """Raise InputError for a weight with NaN or infinity."""
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and weight.numel() and type(weight) is nn.Parameter:
            low, high = weight.detach().aminmax()  # one pass, no memory
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise InputError(f"{label}: {name} holds NaN or infinity: the file is damaged, fetch it again")


@contextmanager
def refusing(label: str) -> Iterator[None]:
    """Turn any exception of a library into an InputError of one line."""
    try:
        yield
    except (InputError, MissingExtra):
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{label} cannot be loaded ({reason}): is the copy complete?") from error


def check_processor(config: Mapping[str, Any], label: str) -> None:
    """Raise InputError for an invalid entry in the config of an image or video processor."""
    for key in ("min_pixels", "max_pixels", "max_video_tokens"):
        if config.get(key) is not None:
            check_number(config[key], f"{label}: {key}", whole=True, least=1)
    for key in ("size", "crop_size"):
        sides = config.get(key)
        for name, side in sides.items() if isinstance(sides, dict) else [("", sides)] if sides is not None else ():
            check_number(side, f"{label}: {key} {name}".rstrip(), whole=True, least=1)
    for key, above in (("image_mean", -math.inf), ("image_std", 0)):
        values = config.get(key)
        if values is not None and not (isinstance(values, list) and len(values) == 3):
            raise InputError(f"{label}: {key} must be 3 numbers, of red, green and blue, not {values!r:.40}")
        for value in values or ():
            check_number(value, f"{label}: {key}", above=above)
    for key in ("do_resize", "do_rescale", "do_normalize", "cap_pixels_per_frame"):
        if not isinstance(config.get(key), bool | None):
            raise InputError(f"{label}: {key} must be true or false, not {config[key]!r:.40}")
