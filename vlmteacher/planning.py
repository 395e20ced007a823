"""FLOPs and peak memory of one optimisation step, at any size, without weights, GPU or network.

The models are built from their configs on the meta device and the step itself, the same classes and functions that run
on real tensors, is traced there: every product and attention is counted, and every storage from its birth to its death,
as an allocator without losses would see it. Layers that are alike are traced once or twice and added up (`per_layer`).
Only the fused surrogate decoder goes by formulas (`decoder_cost`).
"""

from __future__ import annotations

import functools
import json
import math
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

from vlmteacher.decoders.taehv import TinyVideoDecoder, check_decoder
from vlmteacher.errors import InputError
from vlmteacher.lora import add_lora, lora_parameters
from vlmteacher.optimization import teacher_frame_indices
from vlmteacher.queries import QuerySet
from vlmteacher.reasoners.base import Condition, Noise, Settings
from vlmteacher.reasoners.checkpointing import Keep, format_levels, keep_activations
from vlmteacher.reasoners.wan import WanReasoner
from vlmteacher.teachers import shared_prefix
from vlmteacher.teachers.preprocessing import VisionSettings, preprocess_video, read_settings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher
from vlmteacher.teachers.vlm import CHUNK_PATCHES, Clip

KNOWN = Path(__file__).parent / "known_models"
PACKAGED = Path(__file__).parent / "microworld" / "models"
META = torch.device("meta")
GOAL = "Is the yellow ball inside the purple box at the end?"
PROCESS = "Does the yellow ball stay clear of the dark blocks?"
GB = 10**9


# ---------------------------------------------------------------- counting


def attention_flops(query: Sequence[int], key: Sequence[int], causal: bool) -> int:
    """Of one forward, (B, H, N, d) by (B, h, M, d): two products, halved where it is causal. The backward has five."""
    batch, heads, n, d = query
    return 4 * batch * heads * n * key[-2] * d // (2 if causal else 1)


class Trace(TorchDispatchMode):
    """Counts FLOPs and live bytes under the name of the stage that runs.

    FLOPs: of products, convolutions and attention, 2 for a multiplication and an addition; not of element-wise work.
    peak: the most bytes alive in each stage, without the weights and inputs that were noted before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.live = 0
        self.stage = ""
        self._storages: dict[int, Any] = {}

    def weights(self, *modules: nn.Module) -> None:
        """Note modules' parameters and buffers: views of them are no new memory."""
        for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers())):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage  # held, so that the address stays theirs

    def inputs(self, *tensors: Tensor) -> None:
        """The same for tensors that were made before the trace and outlive it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        before, self.stage = self.stage, stage
        self._note()
        try:
            yield
        finally:
            self.stage = before

    def _note(self) -> None:
        self.peak[self.stage] = max(self.live, self.peak.get(self.stage, 0))

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
        return attention_flops(
            args[0].shape, args[1].shape, (args[4] if len(args) > 4 else kwargs.get("is_causal", False))
        )
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
    """Attention as one operator that keeps its inputs, its output and a logarithm per row, as it is on GPUs.

    Meta tensors would get the plain expression, whose N x M matrix nobody makes.
    """
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
    """The shipped facts of a model, by its name here or on the hub. Raises InputError, which lists the known ones."""
    for file in KNOWN.glob("*.json"):
        facts = json.loads(file.read_text())
        if facts["kind"] == kind and name in (file.stem, facts["source"]):
            return facts
    names = [*known_models(kind), *([] if kind == "decoder" else ["packaged"])]
    also = "a checkpoint file" if kind == "decoder" else "a local directory with its config files"
    raise InputError(f"--{kind} {name!r} is unknown: known are {', '.join(names)}, or {also}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be used ({error}): a config.json of the model is needed there") from error


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A diffusers model in `dtype`, but for what its `from_pretrained` keeps in float32."""
    keep = model._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if not any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def build_reasoner(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[WanReasoner, str | None]:
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
            transformer = cast(WanTransformer3DModel.from_config(facts["transformer"]), dtype)
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
        return QwenVLTeacher(
            model, tokenizer, *read_settings(str(directory), full.vision_config, local_files_only=True)
        )
    return QwenVLTeacher(model, tokenizer, VisionSettings(patch_size=full.vision_config.patch_size))


def build_decoder(name: str, dtype: torch.dtype = torch.bfloat16) -> TinyVideoDecoder:
    if name == "packaged":
        name = str(PACKAGED / "decoder.safetensors")
    if Path(name).is_file():
        return TinyVideoDecoder.from_checkpoint(name, dtype).to(META)
    facts = _known(name, "decoder")
    with META:
        return TinyVideoDecoder(facts["latent_channels"], patch=facts["patch"]).to(dtype).eval().requires_grad_(False)


# ---------------------------------------------------------------- parts of a step


@dataclass(frozen=True)
class Cost:
    """Of one part: FLOPs of its forward and backward; bytes: kept between the two, and alive at most during each, those
    kept included, weights and what other parts keep excluded. repeated: the part of `backward` that is done again."""

    forward: int = 0
    backward: int = 0
    repeated: int = 0
    kept: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0


def measure(run: Callable[[], Sequence[Tensor]], weights: Sequence[nn.Module], leaves: Sequence[Tensor]) -> Cost:
    """Trace `run`, which returns what depends on `leaves`, and its backward."""
    with tracing() as trace:
        trace.weights(*weights)
        trace.inputs(*leaves)
        with trace.at("forward"):
            outputs = list(run())
        kept = trace.live
        with trace.at("backward"):
            grads = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, grads, inputs=list(leaves))
        del outputs, grads
    for leaf in leaves:
        leaf.grad = None
    flops, peak = trace.flops, trace.peak
    return Cost(flops["forward"], flops["backward"], 0, kept, peak["forward"], peak["backward"])


def reasoner_cost(reasoner: Any, size: tuple[int, int, int], level: Keep, depth: int) -> Cost:
    """Of a forward and backward through `reasoner.transformer`, cut to `depth` blocks; it has its LoRA."""
    network = reasoner.transformer
    blocks = network.blocks
    network.blocks = blocks[:depth]
    try:
        keep_activations(network, level)
        _, channels, _, h, w = shape = reasoner.latent_shape(*size)
        with META:
            text = torch.empty(1, reasoner.settings.max_sequence_length, network.config.text_dim, dtype=reasoner.dtype)
            first = torch.empty(1, channels, 1, h, w) if reasoner.image_conditioning else None
            noise = Noise(torch.empty(shape), ())
        condition = Condition(text, first, *size)
        return measure(lambda: [reasoner.predict_clean(condition, noise)], [network], lora_parameters(network))
    finally:
        network.blocks = blocks
        keep_activations(network, Keep.ALL)


def per_layer(at_depth: Callable[[int], Cost], depth: int) -> tuple[Cost, Cost]:
    """(what does not grow with the depth, what each layer adds) from traces of `depth` and `depth + 1` equal layers.

    The bytes alive beyond those kept do not grow: they stand in the first.
    """
    less, more = at_depth(depth), at_depth(depth + 1)
    names = ("forward", "backward", "kept")
    layer = {name: getattr(more, name) - getattr(less, name) for name in names}
    base = {name: getattr(less, name) - depth * layer[name] for name in names}
    transient = more.forward_bytes - more.kept, more.backward_bytes - more.kept
    return Cost(**base, forward_bytes=transient[0], backward_bytes=transient[1]), Cost(**layer)


def stack(parts: Sequence[tuple[Cost, Cost]], free: Sequence[tuple[Cost, Cost]]) -> Cost:
    """The cost of a stack of layers: (base, layer) of each one's level, and the same where nothing is recomputed."""

    def add(name: str, parts: Sequence[tuple[Cost, Cost]]) -> int:
        return getattr(parts[0][0], name) + sum(getattr(layer, name) for _, layer in parts)

    kept, backward = add("kept", parts), add("backward", parts)
    return Cost(
        add("forward", parts),
        backward,
        backward - add("backward", free),
        kept,
        kept + max(base.forward_bytes for base, _ in parts),
        kept + max(base.backward_bytes for base, _ in parts),
    )


@dataclass(frozen=True)
class ReasonerCosts:
    """(base, block) of each level, see `per_layer`, and the number of blocks."""

    levels: dict[Keep, tuple[Cost, Cost]]
    blocks: int

    @classmethod
    def of(cls, reasoner: Any, size: tuple[int, int, int], levels: Sequence[Keep] = tuple(Keep)) -> ReasonerCosts:
        found = {
            level: per_layer(functools.partial(reasoner_cost, reasoner, size, level), 1)
            for level in {Keep.ALL, *levels}
        }
        return cls(found, reasoner.transformer.config.num_layers)

    def total(self, levels: Sequence[Keep]) -> Cost:
        """Of the whole transformer, one level for each block."""
        return stack([self.levels[level] for level in levels], [self.levels[Keep.ALL]] * len(levels))


def frames_needed(decoder: TinyVideoDecoder, frames: Sequence[int]) -> list[list[int]]:
    """For every layer of `decoder.decoder`, the frames of its output that `frames` of the last one's depend on.

    Frames are numbered as the layers have them: the first `temporal_stride - 1` of the last are never shown.
    """
    needed, wanted = [], set(frames)
    for layer in reversed(decoder.decoder):
        needed.append(sorted(wanted))
        name = type(layer).__name__
        if name == "MemBlock":
            wanted |= {frame - 1 for frame in wanted if frame}
        elif name == "TGrow":
            stride = layer.conv.out_channels // layer.conv.in_channels
            wanted = {frame // stride for frame in wanted}
    return needed[::-1]


def decoder_cost(decoder: TinyVideoDecoder, frames: Sequence[int], height: int, width: int) -> Cost:
    """Of the fused decoder on latents of height x width cells, for some raw `frames` (see `frames_needed`).

    Frozen weights: the backward is the products to the input. Kept: one bit per ReLU and the clamped latents. Alive at
    most: a convolution's input, its output and a residual, for all frames at once.
    """
    itemsize = decoder.decoder[1].weight.element_size()
    flops = kept = most = 0
    before = 0  # bytes of the frames that a layer reads
    for layer, needed in zip(decoder.decoder, frames_needed(decoder, frames), strict=True):
        count, cells, name = len(needed), height * width, type(layer).__name__
        if name == "MemBlock":
            convolutions = [m for m in layer.conv if isinstance(m, nn.Conv2d)]
            channels = convolutions[0].out_channels
            kept += 3 * count * cells * -(-channels // 8)
        elif name in ("Conv2d", "TGrow"):
            convolutions = [layer if name == "Conv2d" else layer.conv]
            channels = convolutions[0].out_channels
            if name == "TGrow":
                channels = convolutions[0].in_channels
        else:
            convolutions = []
            if name == "Upsample":
                height, width = height * int(layer.scale_factor), width * int(layer.scale_factor)
                continue  # a way of reading: no bytes
            channels = decoder.latent_channels if name == "SoftClamp" else channels
            if name == "ReLU":
                kept += count * cells * -(-channels // 8)
            else:
                kept += count * cells * channels * itemsize
        # a growing 1x1 convolution makes several frames of one: per frame that is needed, the weights of that frame
        flops += sum(
            2 * count * cells * c.weight[: channels if name == "TGrow" else None].numel() for c in convolutions
        )
        now = count * cells * channels * itemsize
        most = max(most, before + now * (2 if name == "MemBlock" else 1))
        before = now
    return Cost(flops, flops, 0, kept, kept + most, kept + most)


def stock_decoder_cost(decoder: TinyVideoDecoder, shape: Sequence[int], frames: Sequence[int]) -> Cost:
    """Of `decoder` in plain torch: all frames, of which some are looked at."""
    with META:
        latents = torch.empty(tuple(shape), requires_grad=True)
    return measure(lambda: [decoder.decode_batch(latents)[0][list(frames)]], [decoder], [latents])


@dataclass(frozen=True)
class Video:
    """What the Teacher sees: K frames of height x width pixels at `indices` of a video of `fps`."""

    indices: tuple[int, ...]
    fps: float
    height: int
    width: int

    def frames(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(self.indices), 3, self.height, self.width, dtype=dtype, device=META, requires_grad=True)


def _queries(count: int) -> QuerySet:
    return QuerySet(GOAL, (PROCESS,) * (count - 1))


def vision_costs(teacher: QwenVLTeacher, video: Video, steps: Sequence[int]) -> dict[int, Cost]:
    """Of the visual encoder, streamed so many frames at a time; all of them at once keep their graph.

    Chunks are alike: one is traced. Its graph stands beside all features, their gradients and the frames'.
    """
    frames = video.frames(teacher.model.dtype)
    size = teacher.resized(len(video.indices), video.height, video.width)
    whole = measure(lambda: list(teacher.encode(frames, size)), [teacher.model], [frames])
    features = sum(t.nbytes for t in _features(teacher, video))
    found = {}
    for step in steps:
        if step >= len(video.indices):
            found[step] = whole
            continue
        piece = frames[:step].detach().requires_grad_()
        chunk = measure(functools.partial(teacher.encode, piece, size), [teacher.model], [piece])
        with torch.no_grad(), tracing() as trace:
            trace.weights(teacher.model)
            trace.inputs(piece)
            teacher.encode(piece, size)
        backward = 2 * features + chunk.backward_bytes + frames.nbytes
        # pieces of the features, then the features made of them
        forward = max(2 * features, features + trace.peak[""])
        found[step] = Cost(whole.forward, whole.backward + whole.forward, whole.forward, features, forward, backward)
    return found


def _features(teacher: QwenVLTeacher, video: Video) -> list[Tensor]:
    """Leaves in the shape of the visual encoder's outputs."""
    size = teacher.resized(len(video.indices), video.height, video.width)
    merge = teacher.video.merge_size**2
    tokens = -(-len(video.indices) // teacher.frames_per_patch) * teacher.patches_per_frame(size) // merge
    count = 1 + len(teacher.visual.deepstack_visual_indexes)
    width, dtype = teacher.visual.config.out_hidden_size, teacher.model.dtype
    return [torch.empty(tokens, width, dtype=dtype, device=META, requires_grad=True) for _ in range(count)]


@contextmanager
def cut(language: Any, depth: int) -> Iterator[None]:
    """A language model with its first layers only."""
    layers, config = language.layers, language.config
    language.layers, config.num_hidden_layers = layers[:depth], depth
    try:
        yield
    finally:
        language.layers, config.num_hidden_layers = layers, len(layers)


def language_costs(teacher: QwenVLTeacher, video: Video, count: int) -> dict[shared_prefix.Keep, Cost]:
    """Of the language model on `count` questions behind one prefix, by what its layers keep."""
    size = teacher.resized(len(video.indices), video.height, video.width)
    layout = teacher._layout(Clip(video.indices, video.fps, size), _queries(count))
    features = _features(teacher, video)
    head = teacher.model.get_output_embeddings()
    layers = len(teacher.language.layers)

    def at(keep: shared_prefix.Keep, depth: int) -> Cost:
        with cut(teacher.language, depth):
            budget = activation_budget(teacher, len(layout.ids), keep)
            return measure(
                lambda: [
                    shared_prefix.answer_losses(teacher.language, head, layout, features[0], features[1:], budget)
                ],
                [teacher.model],
                features,
            )

    # from where DeepStack no longer adds anything, and the last layer, which answers only, does not either
    depth = min(len(features) + 1, layers - 1)
    found = {keep: per_layer(functools.partial(at, keep), depth) for keep in shared_prefix.Keep}
    free = [found[shared_prefix.Keep.ALL]] * layers
    return {keep: stack([parts] * layers, free) for keep, parts in found.items()}


def activation_budget(teacher: QwenVLTeacher, tokens: int, keep: shared_prefix.Keep) -> int:
    """The smallest `activation_bytes` with which the Teacher's layers keep as much as `keep`."""
    low, high = 0, 2**62
    while low < high:
        middle = (low + high) // 2
        enough = shared_prefix.how_much(teacher.language.layers, tokens, middle, META) <= keep
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def stock_teacher_cost(teacher: QwenVLTeacher, video: Video) -> tuple[Cost, Cost]:
    """(vision, language) of one question in transformers' own classes, without checkpoints."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    frames = video.frames(torch.float32)
    size = teacher.resized(len(video.indices), video.height, video.width)
    clip = Clip(video.indices, video.fps, size)
    visual, grid = teacher.visual, teacher.grid(clip)
    merge = teacher.video.merge_size
    places, factors = get_vision_interpolation_indices_and_weights(
        grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, merge
    )
    placed = {
        "interp_indices": places.to(META),
        "interp_weights": factors.to(META),
        "position_ids": get_vision_position_ids(grid, merge).to(META),
    }

    def see() -> list[Tensor]:
        rows, _ = preprocess_video(frames, teacher.video)
        # the grid stays on the CPU: the frames' lengths are a Python list
        seen = visual(rows.to(teacher.model.dtype), grid_thw=grid, return_dict=True, **placed)
        return [seen.pooler_output, *seen.deepstack_features]

    prompt, answer = teacher._question_ids(GOAL, teacher.video_text(clip))
    ids = torch.tensor([prompt + answer])
    positions = teacher.positions(ids, clip).to(META)
    tokens = (ids[0] == teacher.model.config.video_token_id).nonzero().flatten().to(META)
    features = _features(teacher, video)

    def read() -> list[Tensor]:  # of a few layers
        embeds = teacher.language.embed_tokens(ids.to(META))[0].index_copy(0, tokens, features[0])
        for feature in features[1:]:  # added before the layers, not between them: meta tensors have no masks
            embeds = embeds.index_add(0, tokens, feature)
        hidden = teacher.language(inputs_embeds=embeds[None], position_ids=positions, use_cache=False).last_hidden_state
        return [teacher.model.lm_head(hidden[0, -len(answer) - 1 : -1]).float()]

    def at(depth: int) -> Cost:
        with cut(teacher.language, depth):
            return measure(read, [teacher.model], features)

    parts = [per_layer(at, 1)] * len(teacher.language.layers)
    return measure(see, [teacher.model], [frames]), stack(parts, parts)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Step:
    """One whole step: what each part costs, what its models weigh, and how it is set up."""

    reasoner: Cost
    decoder: Cost
    preprocessing: Cost
    vision: Cost
    language: Cost
    weights: dict[str, int]
    frames: int  # bytes of the frames between decoder and Teacher
    passes: int = 1  # of the Teacher, one after the other
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        teacher = sum(part.forward + part.backward for part in (self.vision, self.language))
        return sum(part.forward + part.backward for part in (self.reasoner, self.decoder)) + self.passes * teacher

    @functools.cached_property
    def stages(self) -> dict[str, dict[str, int]]:
        """FLOPs and the most bytes alive, weights included, by stage in the order of a step."""
        weights = sum(self.weights.values())
        between = weights + self.reasoner.kept
        seen = between + self.decoder.kept + self.frames
        alive = {
            "reasoner": (weights, weights),
            "decoder": (between, between + self.frames),
            "preprocessing": (seen, seen),
            "teacher.vision": (seen, seen),
            "teacher.language": (seen + self.vision.kept, seen + self.vision.kept),
        }
        parts = {
            "reasoner": self.reasoner,
            "decoder": self.decoder,
            "preprocessing": self.preprocessing,
            "teacher.vision": self.vision,
            "teacher.language": self.language,
        }
        found = {}
        for name, part in parts.items():
            times = self.passes if name.startswith("teacher") else 1
            rows = {
                "forward": (part.forward, part.forward_bytes, 0),
                "recompute": (part.repeated, part.backward_bytes, 1),
                "backward": (part.backward - part.repeated, part.backward_bytes, 1),
            }
            for row, (flops, nbytes, place) in rows.items():
                if row != "recompute" or flops:
                    found[f"{name}.{row}"] = {"flops": times * flops, "peak_bytes": alive[name][place] + nbytes}
        found["optimiser"] = {"flops": 0, "peak_bytes": weights}  # element-wise
        return found

    @property
    def peak_bytes(self) -> int:
        return max(stage["peak_bytes"] for stage in self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
            "stages": self.stages,
            "weights": self.weights,
            "settings": self.settings,
        }


def preprocessing_cost(teacher: QwenVLTeacher, video: Video) -> Cost:
    """Frames to patches: no products, only bytes."""
    frames = video.frames(teacher.model.dtype)
    return measure(lambda: [preprocess_video(frames, teacher.video)[0]], [], [frames])


def nbytes(*modules: nn.Module) -> int:
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())


def mixes(blocks: int) -> Iterator[list[Keep]]:
    """Levels for every block, at most two different ones; the later blocks, which go backward first, keep more."""
    for less in Keep:
        yield [less] * blocks
        for more in Keep:
            if more < less:
                yield from ([less] * n + [more] * (blocks - n) for n in range(1, blocks))


def make_plan(
    reasoner: str,
    teacher: str,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    *,
    decoder: str | None = None,
    questions: int = 4,
    teacher_frames: int | None = None,
    rank: int = 16,
    memory: float = 48.0,
    text_encoder: str = "device",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """What one optimisation step costs, ours with the settings of the fewest FLOPs that fit, and stock.

    Args:
        reasoner, teacher, decoder: names of known models, "packaged", or local directories (the decoder: a file) of
            which only configs are read. The decoder is by default the Reasoner's family's.
        num_frames, height, width: of the video, by default the Reasoner's own.
        questions: 1 + M, the goal's and the process questions. teacher_frames: K, by default 24 or all.
        memory: GB (10^9 bytes) of the device. text_encoder: where it waits, "device" or "cpu".

    Returns:
        {"ours", "stock": {"flops", "peak_bytes", "stages": {name: {"flops", "peak_bytes"}}, "weights", "settings"},
        "ratio": FLOPs of ours over stock, "fits", "memory_bytes", "advice": what to change where it does not fit}.

    Raises InputError: unknown models, sizes that the Reasoner cannot make, no memory.
    """
    if not (memory > 0 and math.isfinite(memory)):
        raise InputError(f"--memory must be a number of GB above 0, not {memory:g}")
    for name, value in (("questions", questions), ("rank", rank)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if not Path(teacher).is_dir() and teacher != "packaged":
        _known(teacher, "teacher")  # a misspelt name shows before the Reasoner is built
    the_reasoner, family_decoder = build_reasoner(reasoner, dtype)
    given = {"num_frames": num_frames, "height": height, "width": width}
    size = {name: getattr(the_reasoner, name) if value is None else value for name, value in given.items()}
    the_reasoner.check(**size)
    if teacher_frames is None:
        teacher_frames = min(24, size["num_frames"])
    indices = teacher_frame_indices(size["num_frames"], teacher_frames)
    decoder = decoder or family_decoder or ("packaged" if reasoner == "packaged" else None)
    if decoder is None:
        raise InputError("--decoder is needed for a Reasoner in a directory: taew2_1 (16 channels) or taew2_2 (48)")
    the_decoder = build_decoder(decoder, dtype)
    check_decoder(the_decoder, the_reasoner, decoder)
    the_teacher = build_teacher(teacher, dtype)
    video = Video(tuple(indices), the_reasoner.fps, size["height"], size["width"])
    shape = (size["num_frames"], size["height"], size["width"])

    network: Any = the_reasoner.transformer
    weights = {"reasoner": nbytes(network)}
    add_lora(network, rank)
    lora = nbytes(network) - weights["reasoner"]
    weights |= {
        "vae": nbytes(the_reasoner.vae),
        "text_encoder": nbytes(the_reasoner.text_encoder) if text_encoder == "device" else 0,
        "decoder": nbytes(the_decoder),
        "teacher": nbytes(the_teacher.model),
        "lora": lora,
        "lora gradient and AdamW": 3 * lora,
    }
    latents = the_reasoner.latent_shape(*shape)
    trimmed = the_decoder.temporal_stride - 1
    costs = ReasonerCosts.of(the_reasoner, shape)
    pair = the_teacher.frames_per_patch
    resized = the_teacher.resized(teacher_frames, *shape[1:])
    patches = the_teacher.patches_per_frame(resized)
    default = max(1, CHUNK_PATCHES["cuda"] // patches) * pair
    visions = vision_costs(the_teacher, video, sorted({pair, default, len(indices)}))
    languages = language_costs(the_teacher, video, questions)
    ours = functools.partial(
        Step,
        decoder=decoder_cost(the_decoder, [i + trimmed for i in indices], *latents[3:]),
        preprocessing=preprocessing_cost(the_teacher, video),
        weights=weights,
        frames=video.frames(dtype).nbytes,
    )
    reasoners = [(levels, costs.total(levels)) for levels in mixes(costs.blocks)]
    candidates = [
        (levels, chunk, keep, ours(reasoner=r, vision=v, language=t))
        for levels, r in reasoners
        for chunk, v in visions.items()
        for keep, t in languages.items()
    ]
    budget = int(memory * GB)
    fitting = [c for c in candidates if c[3].peak_bytes <= budget]
    fits = bool(fitting)
    levels, chunk, keep, best = (
        min(fitting, key=lambda c: (c[3].flops, sum(c[0]), c[2], c[3].peak_bytes))
        if fits
        else min(candidates, key=lambda c: (c[3].peak_bytes, c[3].flops))
    )
    tokens = len(the_teacher._layout(Clip(video.indices, video.fps, resized), _queries(questions)).ids)
    best.settings.update(
        activations=format_levels(levels),
        teacher_activation_bytes=activation_budget(the_teacher, tokens, keep),
        teacher_keeps=keep.name.lower(),
        teacher_chunk_patches=-(-chunk // pair) * patches,
        text_encoder=text_encoder,
        decoder="fused",
        rank=rank,
    )

    add_lora(network, rank, fused=False)
    stock_costs = ReasonerCosts.of(the_reasoner, shape, (Keep.INPUT,))
    stock_vision, stock_language = stock_teacher_cost(the_teacher, video)
    stock = Step(
        stock_costs.total([Keep.INPUT] * stock_costs.blocks),
        stock_decoder_cost(the_decoder, latents, indices),
        best.preprocessing,
        stock_vision,
        stock_language,
        weights,
        video.frames(dtype).nbytes,
        passes=questions,
        settings={"activations": format_levels([Keep.INPUT] * stock_costs.blocks), "teacher_passes": questions},
    )
    return {
        "reasoner": reasoner,
        "teacher": teacher,
        "decoder": decoder,
        **size,
        "teacher_frames": teacher_frames,
        "questions": questions,
        "reasoner_tokens": math.prod(latents[2:]) // math.prod(the_reasoner.patch),
        "teacher_tokens": tokens,
        "ours": best.to_dict(),
        "stock": stock.to_dict(),
        "ratio": best.flops / stock.flops,
        "memory_bytes": budget,
        "fits": fits,
        "advice": [] if fits else advice(best, budget, text_encoder),
    }


def advice(step: Step, budget: int, text_encoder: str) -> list[str]:
    """What to change where even the least memory is too much."""
    over, found = step.peak_bytes - budget, []
    if text_encoder == "device":
        saved = step.weights["text_encoder"]
        enough = "enough" if saved >= over else "not enough alone"
        found.append(f"--text-encoder cpu saves {saved / GB:.1f} GB ({enough})")
    largest = max(step.stages, key=lambda name: step.stages[name]["peak_bytes"])
    what = (
        "--teacher-frames or a smaller --teacher"
        if largest.startswith("teacher")
        else "--num-frames, --height, --width"
    )
    found.append(f"the peak is in {largest}: reduce {what}")
    if (total := sum(step.weights.values())) > budget:
        found.append(f"the weights alone take {total / GB:.1f} GB: take smaller models")
    return found


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a table for people."""
    ours, stock = plan["ours"], plan["stock"]
    lines = [
        f"{plan['reasoner']} + {plan['teacher']} + {plan['decoder']}",
        f"{plan['num_frames']} frames {plan['height']}x{plan['width']}, {plan['reasoner_tokens']} tokens; "
        f"the Teacher sees {plan['teacher_frames']}, {plan['questions']} questions, {plan['teacher_tokens']} tokens",
        "",
        f"{'':28}{'TFLOP':>22}{'peak GB':>22}",
        f"{'stage':28}{'ours':>11}{'stock':>11}{'ours':>11}{'stock':>11}",
    ]
    names = list(dict.fromkeys([*ours["stages"], *stock["stages"]]))
    order = {part: i for i, part in enumerate(dict.fromkeys(name.rpartition(".")[0] or name for name in names))}
    rows = ("forward", "recompute", "backward")
    names.sort(key=lambda n: (order[n.rpartition(".")[0] or n], rows.index(n.rpartition(".")[2]) if "." in n else 0))

    def cells(key: str, unit: float, name: str | None) -> str:
        found = [(part if name is None else part["stages"].get(name, {})).get(key) for part in (ours, stock)]
        return "".join(
            f"{'-' if value is None else format(value / unit, '.4g' if unit == 1e12 else '.1f'):>11}" for value in found
        )

    lines += [f"{name:28}{cells('flops', 1e12, name)}{cells('peak_bytes', GB, name)}" for name in names]
    lines += [f"{'step':28}{cells('flops', 1e12, None)}{cells('peak_bytes', GB, None)}", ""]
    weights = ", ".join(f"{name} {size / GB:.2f}" for name, size in ours["weights"].items())
    lines += [f"weights (GB, in every peak): {weights}", f"FLOPs of ours: {plan['ratio']:.1%} of stock"]
    settings = ", ".join(f"{name} {value}" for name, value in ours["settings"].items())
    room = plan["memory_bytes"] / GB
    if plan["fits"]:
        lines.append(f"It fits in {room:g} GB with: {settings}")
    else:
        lines.append(f"It does not fit in {room:g} GB: the least is {ours['peak_bytes'] / GB:.1f} GB, with {settings}")
        lines += [f"  {text}" for text in plan["advice"]]
    return "\n".join(lines)
