"""What `benchmarks.gpu.paper_scale` measures one by one: rates of the device, and parts of a step against rivals."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import backends, forced
from benchmarks.gpu.paper_models import frame_indices
from benchmarks.gpu.stages import Clock, gradients, milliseconds
from benchmarks.gpu.surrogate_decoder import Vendor
from benchmarks.presets import Instance
from benchmarks.step import OurLoop, PeakMemory
from vlmteacher import environment as installation
from vlmteacher.ops import lora_linear as lora_operator
from vlmteacher.ops import surrogate_decoder as decoder_operator
from vlmteacher.planning.teacher import stock_reader
from vlmteacher.reasoners.checkpointing import block_list
from vlmteacher.teachers.shared_prefix import Keep, answer_losses

TOP = 40  # kernels of a profile
TOKENS = 64  # of an answer whose writing is timed
RANK = 16
GROUPS = {  # of kernels, by their names; the first that fits
    "attention": r"flash|fmha|sdpa|attention|softmax",
    "convolution": r"conv|implicit_gemm|fprop|dgrad|winograd",
    "LoRA and glue": r"lora|ada_norm|qk_norm|rope|patchify|shuffle",
    "product": r"gemm|nvjet|cutlass|cublas|matmul|::mm|addmm|bmm|linear",
    "copy": r"copy|memcpy|memset|cat|fill",
    "reduction": r"reduce|norm|sum|mean|multi_tensor",
    "element-wise": r"elementwise|vectorized|mul|add|sigmoid|silu|gelu|sub|pow|where",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, devices and backends of this installation, and torch's own."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return installation.report() | {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda}


def copy_rate(size: int, device: torch.device) -> dict[str, float]:
    """GB/s of a copy within the device's memory, bytes read and written."""
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    taken = milliseconds(lambda: y.copy_(x), device)
    return {"ms": taken, "gb_per_s": 2 * size / taken / 1e6}


def product_rate(side: int, kind: str, device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a product of two square matrices, in bfloat16 or in fp8 (e4m3, one scale a tensor)."""
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    if kind == "fp8":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            return {"absent": "fp8 products need an NVIDIA GPU of compute capability 8.9 or more"}
        one = torch.ones((), device=device)
        x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        taken = milliseconds(lambda: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16), device, 10)
    else:
        taken = milliseconds(lambda: a @ b, device, 10)
    return {"ms": taken, "tflop_per_s": 2 * side**3 / taken / 1e9}


@dataclass(frozen=True)
class Shape:
    """One attention of a step: q (B, H, N, d) and k, v (B, G, M, d). mask: under a mask of N rows."""

    name: str
    batch: int
    heads: tuple[int, int]
    tokens: tuple[int, int]
    channels: int
    causal: bool = False
    mask: bool = False


def attention_shapes(shrink: int) -> list[Shape]:
    """The attentions of a step at the paper's scale, with `shrink` times fewer tokens."""

    def few(*tokens: int) -> Any:
        return tuple(max(count // shrink, 8) for count in tokens)

    return [
        Shape("Reasoner, self", 1, (24, 24), few(20240, 20240), 128),
        Shape("Reasoner, text", 1, (24, 24), few(20240, 512), 128),
        Shape("Teacher, vision", 4, (16, 16), few(3520, 3520), 64),
        Shape("Teacher, prefix", 1, (32, 8), few(10600, 10600), 128, causal=True),
        Shape("Teacher, questions", 1, (32, 8), few(152, 10752), 128, mask=True),
        Shape("Reasoner, self, 480p", 1, (24, 24), few(8580, 8580), 128),
    ]


def attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Forward and backward by each backend of torch's, and the one that torch chooses."""
    (heads, keys), (n, m) = shape.heads, shape.tokens
    q = torch.randn(shape.batch, heads, n, shape.channels, dtype=dtype, device=device, requires_grad=True)
    k, v = (
        torch.randn(shape.batch, keys, m, shape.channels, dtype=dtype, device=device, requires_grad=True)
        for _ in range(2)
    )
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if shape.mask else None

    def run() -> tuple[Tensor, ...]:
        made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=shape.causal, enable_gqa=heads != keys)
        return gradients(made, (q, k, v))

    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, shape.causal, enable_gqa=heads != keys))
    result: dict[str, Any] = {"chosen": chosen.name, "ms": milliseconds(run, device)}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        if backend == SDPBackend.MATH and n * m > 2**26:
            continue  # the matrix of scores would not fit
        try:
            with sdpa_kernel([backend]):
                finite = all(bool(grad.isfinite().all()) for grad in run())
                result[backend.name] = {"ms": milliseconds(run, device), "finite": finite}
        except RuntimeError as error:
            result[backend.name] = {"absent": str(error).splitlines()[0]}
    return result


def profile(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The kernels of one step that take the longest, and the time of each group of `GROUPS`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        step()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [
        {"kernel": event.key, "group": group(event.key), "ms": getattr(event, name) / 1e3, "calls": event.count}
        for event in recorded.key_averages()
        if device.type != "cuda" or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    rows.sort(key=lambda row: -row["ms"])
    groups = dict.fromkeys([*GROUPS, "other"], 0.0)
    for row in rows:
        groups[row["group"]] += row["ms"]
    return {"groups_ms": groups, "total_ms": sum(groups.values()), "top": rows[:TOP]}


def group(kernel: str) -> str:
    """The group of `GROUPS` that a kernel belongs to, or "other"."""
    return next((name for name, words in GROUPS.items() if re.search(words, kernel, re.IGNORECASE)), "other")


def decoder_backends() -> dict[str, Any]:
    """What may run the decoder's convolutions: the policy's choice, cuDNN under the same function, our backends."""
    return {"chosen": ..., "plain decoder": ..., "cuDNN": Vendor, **backends("surrogate_decoder")}


def decoder(models: Instance, name: str) -> dict[str, Any]:
    """Forward and backward of the surrogate decoder, all of it on one backend, and its peak."""
    indices, network = frame_indices(models), models.decoder
    latents = models.noise.z1.to(models.reasoner.dtype).detach().requires_grad_()
    device = latents.device

    def run() -> object:
        plain = name == "plain decoder"
        frames = network.decode_batch(latents)[0][indices] if plain else network.decode(latents, indices, check=False)
        return gradients(frames, [latents])

    own = name in ("chosen", "plain decoder")
    with contextlib.nullcontext() if own else forced(decoder_operator, decoder_backends()[name]):
        taken = milliseconds(run, device)
        with PeakMemory(str(device)) as memory:
            run()
    return {"ms": taken, "peak_bytes": memory.bytes}


def lora_layers(models: Instance) -> dict[str, tuple[int, list[nn.Linear]]]:
    """Layers of a block with the tokens that they take: q, k and v, and the two products of the MLP."""
    block: Any = block_list(models.reasoner.transformer)[0]
    tokens = models.noise.z1[0, 0].numel() // (models.reasoner.patch[0] * models.reasoner.patch[1])
    attn, mlp = block.attn1, block.ffn.net
    return {
        "q, k, v": (tokens, [attn.to_q, attn.to_k, attn.to_v]),
        "MLP, up": (tokens, [mlp[0].proj]),
        "MLP, down": (tokens, [mlp[2]]),
    }


def lora_products(models: Instance, tokens: int, layers: Sequence[nn.Linear]) -> dict[str, float]:
    """Forward and backward of layers with a LoRA, by each backend, and of the frozen layers alone."""
    like = layers[0].weight
    x = torch.randn(tokens, like.shape[1], dtype=like.dtype, device=like.device, requires_grad=True)
    a = [torch.randn(RANK, like.shape[1], device=like.device, requires_grad=True) for _ in layers]
    b = [torch.zeros(layer.weight.shape[0], RANK, device=like.device, requires_grad=True) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    scaling = [1.0] * len(layers)

    def ours() -> object:
        return gradients(lora_operator.lora_linear_group(x, weights, biases, a, b, scaling), [x, *a, *b])

    def frozen() -> object:
        return gradients([layer(x) for layer in layers], [x])

    result = {"chosen_ms": milliseconds(ours, x.device), "frozen_ms": milliseconds(frozen, x.device)}
    for name, namespace in ({"torch": None} | backends("lora_linear")).items():
        with forced(lora_operator, namespace):
            result[f"{name}_ms"] = milliseconds(ours, x.device)
    return result | {"over_frozen": result["chosen_ms"] / result["frozen_ms"]}


def _frames(models: Instance) -> tuple[Tensor, Any]:
    """Frames that the Teacher sees, with a gradient, and their place in the prompt."""
    teacher, condition, indices = models.teacher, models.condition, frame_indices(models)
    clip = teacher.clip(indices, models.reasoner.fps, condition.height, condition.width)
    size = len(indices), 3, condition.height, condition.width
    return torch.rand(size, device=teacher.device).requires_grad_(), clip


def vision(models: Instance) -> dict[str, float]:
    """Forward and backward of all of the Teacher but its language model, ours and transformers' own."""
    frames, clip = _frames(models)
    teacher = models.teacher
    stock = teacher.stock_encoder(clip)
    result = {"ours_ms": milliseconds(lambda: gradients(teacher.encode(frames, clip.size), [frames]), frames.device, 2)}
    result["stock_ms"] = milliseconds(lambda: gradients(stock(frames), [frames]), frames.device, 2)
    return result


def language(models: Instance) -> dict[str, float]:
    """Forward and backward of the language model: ours on all questions at each level, transformers' on one."""
    frames, clip = _frames(models)
    teacher, queries = models.teacher, models.queries
    with torch.no_grad():
        made = teacher.encode(frames, clip.size)
    features = [feature.detach().requires_grad_() for feature in made]
    layout, head = teacher.layout(clip, queries), teacher.model.get_output_embeddings()
    result = {}
    for keep in Keep:

        def ours(keep: Keep = keep) -> object:
            losses = answer_losses(
                teacher.language, head, layout, features[0], features[1:], keep, decoder=teacher.decoder
            )
            return gradients(losses, features)

        result[f"ours_{keep.name.lower()}_ms"] = milliseconds(ours, frames.device, 2)
    read = stock_reader(teacher, clip, queries.goal)
    result["stock_one_question_ms"] = milliseconds(lambda: gradients(read(features), features), frames.device, 2)
    return result | {"questions": len(queries.questions)}


def sampling(models: Instance) -> dict[str, Any]:
    """Seconds of the few-step sampler."""
    start = time.perf_counter()
    latents = models.reasoner.sample(models.condition, models.noise)
    finite = bool(latents.isfinite().all())  # waits for the device
    return {"seconds": time.perf_counter() - start, "steps": len(models.reasoner.settings.sigmas), "finite": finite}


def vae(models: Instance, clock: Clock) -> dict[str, Any]:
    """The standard VAE by dtype and layout of its weights: seconds, peak, and PSNR against float32's frames."""
    network, latents = models.reasoner.vae, models.noise.z1
    result: dict[str, Any] = {}
    wanted: Tensor | None = None
    before = next(network.parameters()).dtype
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last_3d)):
                if result and clock.left() < 2 * max(each["seconds"] for each in result.values()):
                    return result
                network.to(dtype)
                for module in network.modules():
                    if isinstance(module, nn.Conv3d):
                        module.to(memory_format=layout)
                start = time.perf_counter()
                with PeakMemory(str(latents.device)) as memory:
                    video = models.reasoner.decode(latents).cpu()
                seconds = time.perf_counter() - start
                wanted = video if wanted is None else wanted
                error = float((video - wanted).double().square().mean())
                psnr = None if error == 0 else -10 * torch.tensor(error).log10().item()
                entry = {"seconds": seconds, "peak_bytes": memory.bytes, "psnr": psnr}
                result[f"{str(dtype).removeprefix('torch.')}, {name}"] = entry
        return result
    finally:
        network.to(before)


def writing(models: Instance) -> dict[str, Any]:
    """Seconds in which the Teacher reads an image and writes `TOKENS` tokens; random weights do not stop before."""
    from PIL import Image

    image = Image.new("RGB", (models.condition.width, models.condition.height))
    seconds = []
    for _ in range(2):  # the first fills caches
        start = time.perf_counter()
        models.teacher.answer("Describe the picture.", [image], TOKENS)
        seconds.append(time.perf_counter() - start)
    return {"tokens": TOKENS, "first_s": seconds[0], "seconds": seconds[1]}


def ladder(models: Instance) -> dict[str, Any]:
    """A step with ever less memory: the rungs that it takes, its seconds and its loss.

    On a GPU torch's allocator is capped at shares of the peak of a free step; elsewhere a rung is taken at a time.
    """
    device, loop = models.teacher.device, OurLoop(models)
    rows: list[dict[str, Any]] = []
    try:
        loop.step()
        with PeakMemory(str(device)) as memory:
            loop.step()
        free = loop.loop.state_dict()
        for share in (0.9, 0.75, 0.6, 0.45) if device.type == "cuda" else (1.0, 1.0):
            loop.loop.load_state_dict(free)  # the same step again
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                peak = (memory.bytes or 0) + torch.cuda.memory_allocated(device)
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(min(share * peak / total, 1.0), device)
            else:
                loop.loop.ladder.down()
            start = time.perf_counter()
            loss = loop.step()
            taken = list(loop.loop.ladder.taken)
            rows.append({"share": share, "rungs": taken, "loss": loss, "seconds": time.perf_counter() - start})
    except ArithmeticError as error:
        rows.append({"error": str(error)})
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        loop.close()
    losses = [row["loss"] for row in rows if "loss" in row]
    return {"steps": rows, "loss_spread": max(losses) / min(losses) - 1, "median_loss": statistics.median(losses)}
