"""FLOPs and peak memory of one optimisation step, at any size, without weights, GPU or network.

The models are built from their configs on the meta device and the step itself, the same classes and functions that run on
real tensors, is traced there: every product and attention is counted, and every storage from its birth to its death, as an
allocator without losses would see it. Only the fused surrogate decoder goes by formulas (`decoder_cost`).
"""

from __future__ import annotations

import functools
import json
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vlmteacher.decoders.taehv import TinyVideoDecoder
from vlmteacher.errors import InputError
from vlmteacher.lora import add_lora, lora_parameters, remove_lora
from vlmteacher.optimization import teacher_frame_indices
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Condition, Noise, Reasoner, Settings
from vlmteacher.reasoners.checkpointing import Keep, format_levels, keep_activations
from vlmteacher.reasoners.wan import WanReasoner
from vlmteacher.teachers import shared_prefix
from vlmteacher.teachers.preprocessing import VisionSettings, preprocess_video, read_settings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher
from vlmteacher.teachers.visual_checkpoint import stream
from vlmteacher.teachers.vlm import Clip

KNOWN = Path(__file__).parent / "known_models"
PACKAGED = Path(__file__).parent / "microworld" / "models"
META = torch.device("meta")
GOAL = "Is the yellow ball inside the purple box at the end?"
PROCESS = "Does the yellow ball stay clear of the dark blocks?"
GB = 10**9


# ---------------------------------------------------------------- counting


def attention_flops(query: Sequence[int], key: Sequence[int], causal: bool) -> int:
    """Of one forward, (B, H, N, d) by (B, h, M, d): two products, of which causal attention does half. Backward: x 2.5."""
    batch, heads, n, d = query
    return 4 * batch * heads * n * key[-2] * d // (2 if causal else 1)


class Trace(TorchDispatchMode):
    """Counts FLOPs and live bytes under the name of the stage that runs.

    FLOPs: of products, convolutions and attention, 2 for a multiplication and an addition; element-wise work is left out.
    peak: the most bytes alive in each stage, weights (`resident`) included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.resident: dict[str, int] = {}
        self.live = 0
        self.stage = ""
        self._storages: dict[int, Any] = {}

    def weights(self, name: str, *modules: nn.Module, count: bool = True) -> None:
        """Note modules' parameters and buffers: views of them are no new memory. count: they are resident."""
        size = 0
        for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers())):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = storage  # held, so that the address stays theirs
                size += storage.nbytes()
        if count:
            self.resident[name] = self.resident.get(name, 0) + size

    def inputs(self, *tensors: Tensor) -> None:
        """Note tensors made before the trace that stay alive all along."""
        for tensor in tensors:
            self._see(tensor)

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        before, self.stage = self.stage, stage
        self._note()
        try:
            yield
        finally:
            self.stage = before

    def transient(self, nbytes: int) -> None:
        """Bytes that live for a moment and no tensor here stands for."""
        self.live += nbytes
        self._note()
        self.live -= nbytes

    @property
    def weight_bytes(self) -> int:
        return sum(self.resident.values())

    def _note(self) -> None:
        now = self.live + self.weight_bytes
        if now > self.peak.get(self.stage, 0):
            self.peak[self.stage] = now

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = storage.nbytes()
            self.live += size
            self._storages[key] = weakref.ref(storage, functools.partial(self._gone, key, size))

    def _gone(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        self._storages.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self._note()
        if (count := _flops(func, args, kwargs, out)) is not None:
            self.flops[self.stage] += count
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    name = func._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return attention_flops(args[0].shape, args[1].shape, (args[4] if len(args) > 4 else kwargs.get("is_causal", False)))
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return attention_flops(args[1].shape, args[2].shape, args[7]) * 5 // 2
    if name == "vlmteacher::lora_linear":
        x, weights, _, a, b, _ = args
        return 2 * len(x) * sum(t.numel() for t in (*weights, *a, *b))
    if name == "vlmteacher::lora_linear_backward":
        x, _, weights, a, b, _, need_x, need_a, need_b = args[1:]
        frozen, down, up = (sum(t.numel() for t in part) for part in (weights, a, b))
        counted = need_x * (frozen + down) + need_a * down + need_b * up + (need_x or need_a) * up
        return 2 * len(x) * counted
    formula = flop_registry.get(func.overloadpacket)
    return None if formula is None else formula(*args, **kwargs, out_val=out)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as one operator that keeps its inputs, its output and a logarithm per row, as it is on GPUs: meta tensors
    would get the plain expression, whose N x M matrix nobody makes."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def tracing() -> Iterator[Trace]:
    """A `Trace`, with attention as on a GPU. (A TorchFunctionMode does not reach what a backward computes again.)"""
    stock = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _flash
    try:
        with Trace() as trace:
            yield trace
    finally:
        F.scaled_dot_product_attention = stock


# ---------------------------------------------------------------- models


def known_models(kind: str) -> list[str]:
    return sorted(p.stem for p in KNOWN.glob("*.json") if json.loads(p.read_text())["kind"] == kind)


def _known(name: str, kind: str) -> dict[str, Any]:
    file = KNOWN / f"{name}.json"
    facts = json.loads(file.read_text()) if os.path.basename(name) == name and file.is_file() else {}
    if facts.get("kind") != kind:
        names = [*known_models(kind), *([] if kind == "decoder" else ["packaged"])]
        also = "" if kind == "decoder" else ", or a local directory with its config files"
        raise InputError(f"--{kind} {name!r} is unknown: known are {', '.join(names)}{also}")
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be used ({error}): a config.json of the model is needed there") from error


def build_reasoner(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Reasoner, str | None]:
    """(the Reasoner on the meta device, the name of its family's decoder, if known). Raises InputError."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    directory = PACKAGED / "reasoner" if name == "packaged" else Path(name)
    settings, decoder = Settings(), None
    if directory.is_dir():
        index = _read(directory / "model_index.json")
        if index.get("_class_name") not in ("WanPipeline", "WanImageToVideoPipeline"):
            raise InputError(f"{name} is a {index.get('_class_name')}: the plan knows Wan pipelines")
        facts: dict[str, Any] = {
            part: _read(directory / part / "config.json") for part in ("transformer", "vae", "text_encoder")
        } | {"expand_timesteps": bool(index.get("expand_timesteps"))}
        if (directory / "reasoner.json").is_file():
            settings = Settings.load(directory / "reasoner.json")
    else:
        facts = _known(name, "reasoner")
        decoder = facts["decoder"]
    try:
        with META:
            transformer = WanTransformer3DModel.from_config(facts["transformer"]).to(dtype)
            vae = AutoencoderKLWan.from_config(facts["vae"])
            text_encoder = UMT5EncoderModel(UMT5Config(**facts["text_encoder"])).to(dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"--reasoner {name!r}: its configs make no model ({str(error).splitlines()[0]})") from error
    if transformer.config.in_channels != vae.config.z_dim:
        raise InputError(f"--reasoner {name!r} appends its image as channels (Wan 2.1 I2V): it cannot be taught")
    return WanReasoner(transformer, vae, text_encoder, None, facts["expand_timesteps"], settings), decoder


def build_teacher(name: str, dtype: torch.dtype = torch.bfloat16) -> QwenVLTeacher:
    """The Teacher on the meta device, with the packaged tokenizer: only numbers of tokens matter. Raises InputError."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    directory = PACKAGED / "teacher" if name == "packaged" else Path(name)
    config = _read(directory / "config.json") if directory.is_dir() else _known(name, "teacher")["config"]
    if config.get("model_type", "qwen3_vl") != "qwen3_vl":
        raise InputError(f"--teacher {name!r} is a {config['model_type']}: the plan knows Qwen3-VL")
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "teacher", local_files_only=True)
    pads = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{pad}|>") for key, pad in zip(keys, pads, strict=True)}
    try:
        full = Qwen3VLConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")} | ids)
        full.text_config.pad_token_id = None
        with META:
            model = Qwen3VLForConditionalGeneration(full).to(dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(f"--teacher {name!r}: its config makes no model ({str(error).splitlines()[0]})") from error
    if directory.is_dir():
        return QwenVLTeacher(model, tokenizer, *read_settings(str(directory), full.vision_config, local_files_only=True))
    return QwenVLTeacher(model, tokenizer, VisionSettings(patch_size=full.vision_config.patch_size))


def build_decoder(name: str, dtype: torch.dtype = torch.bfloat16) -> TinyVideoDecoder:
    if name == "packaged":
        name = str(PACKAGED / "decoder.safetensors")
    if Path(name).is_file():
        return TinyVideoDecoder.from_checkpoint(name, dtype).to(META)
    facts = _known(name, "decoder")
    with META:
        return TinyVideoDecoder(facts["latent_channels"], patch=facts["patch"]).to(dtype).eval().requires_grad_(False)
