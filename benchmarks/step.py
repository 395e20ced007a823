"""Compare one step of test-time optimisation with the stock loop, in one process and in alternation.

python -m benchmarks.step [--preset tiny|mid|mid-long] [--json] [--pairs N] [--variants checkpointed plain compiled]

Ours is `Optimization.step()` itself; stock is `benchmarks.stock`, from the same weights, LoRA, noise and questions.
Both make real updates, and their losses over the first five steps must agree (relative 1e-5 in float32, 1e-3 in half
precision), or the exit status is 1. In half precision the Teacher's rounding alone moves a loss by that much. So where
two losses differ by more, up to ten times the tolerance, the stock code computes the losses of both LoRAs again in
float32, and these must agree.
`speedup` and `memory_ratio` compare with the first variant (by default "checkpointed"), `vs_best_stock` with the
fastest one. docs/results/performance.md describes the parts. After a long preset the shorter one of the same models
is measured: `exponent` is x in seconds ~ tokens^x, for the step and its parts. `instance` holds the seconds of a whole
instance (`benchmarks.instance`), against the first variant.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import instance as whole
from benchmarks.presets import PRESETS, SHORTER, Instance, build
from benchmarks.stock import PARTS, VARIANTS, StockLoop, Variant, Watch
from benchmarks.timing import argument_parser, compare, parsed, publish
from vlmteacher.lora.adapter import add_lora, load_lora_state, lora_state_dict
from vlmteacher.ops.patchify import PatchRows
from vlmteacher.optimization.loop import Optimization
from vlmteacher.reasoners.checkpointing import block_list, keep_activations, parse_levels
from vlmteacher.teachers.preprocessing import preprocess_video

COMPARED_STEPS = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
MIB = 2**20


class OurLoop:
    """`Optimization` on the instance's own models, its parts timed by a `Watch`."""

    def __init__(self, instance: Instance, activations: str | None = None) -> None:
        reasoner, decoder, teacher, settings = instance.reasoner, instance.decoder, instance.teacher, instance.settings
        add_lora(reasoner.transformer, settings.rank, seed=instance.seed, fused=settings.fused_lora)
        if activations is not None:
            blocks = len(block_list(reasoner.transformer))
            keep_activations(reasoner.transformer, parse_levels(activations, blocks))
        self.loop = Optimization(
            reasoner, decoder, teacher, instance.condition, instance.noise, instance.queries, settings
        )
        self.modules: tuple[nn.Module, ...] = (reasoner.transformer, decoder, teacher.model)
        self.watch = Watch()
        self._watching: tuple[tuple[Any, str, str, str | None], ...] = (
            (reasoner, "predict_clean", "reasoner_forward", "decode_backward"),
            (decoder, "decode", "decode_forward", "teacher_backward"),
            (decoder, "decode_rows", "decode_forward", "teacher_backward"),
            (teacher, "losses", "teacher_forward", None),
        )
        for owner, name, part, gradient in self._watching:
            setattr(owner, name, self._watched(getattr(owner, name), part, gradient))
        self.loop.optimizer.register_step_pre_hook(lambda *_: self.watch.mark("reasoner_backward"))

    def _watched(self, call: Callable[..., Any], part: str, gradient: str | None) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if gradient:
                self.watch.at_gradient(result.rows if isinstance(result, PatchRows) else result, gradient)
            self.watch.mark(part)
            return result

        return watched

    def close(self) -> None:
        """Leave the models as they were, but for the LoRA."""
        self.loop.close()
        for owner, name, *_ in self._watching:
            delattr(owner, name)

    def step(self, watch: Watch | None = None) -> float:
        self.watch = watch or Watch()
        loss = self.loop.step()["loss"]
        self.watch.mark("update")
        return loss


class SavedBytes:
    """Bytes that autograd keeps for the backward pass until `stop` is called, weights not counted.

    With gradient checkpointing these are the inputs of the checkpointed layers; what the backward pass recomputes shows
    in the peak memory only.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        weights = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
        self._own = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept: dict[int, int] = {}
        self._counting = True
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._counting and storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def stop(self) -> None:
        self._counting = False

    @property
    def total(self) -> int:
        return sum(self._kept.values())


class PeakMemory:
    """The memory that a block of code needs at its peak beyond what was allocated before: `bytes`, None if unknown.

    On the CPU it is the resident set's high-water mark, which Linux lets a process reset; on a GPU torch's own.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        try:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
                self._before: int | None = torch.cuda.memory_allocated()
            else:
                ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps after a free would hide its reuse
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")
                self._before = resident("VmRSS")
        except (OSError, AttributeError):
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self._before


def resident(name: str) -> int:
    """The value of a line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


class Side:
    """One loop and its measurements."""

    def __init__(self, name: str, loop: OurLoop | StockLoop, device: str) -> None:
        self.name, self.loop, self.device = name, loop, device
        self.losses: list[float] = []
        self.loras: list[dict[str, Tensor]] = []  # of the first losses
        self.float32_losses: dict[int, float] = {}  # by step, where `agree` needs them
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads; hardly affected by other programs
        self.parts: list[dict[str, float]] = []
        self.peaks: list[int | None] = []
        self.saved_bytes = 0

    def _step(self, watch: Watch) -> None:
        if len(self.losses) < COMPARED_STEPS:
            self.loras.append({name: value.clone() for name, value in lora_state_dict(self.loop.modules[0]).items()})
        self.losses.append(self.loop.step(watch))

    def _log(self, message: str) -> None:
        print(f"{self.name}, {message}: loss {self.losses[-1]:.6f}", file=sys.stderr, flush=True)

    def warm_up(self) -> None:
        """Take the first step, which compiles, fills caches and creates the optimiser's state; count saved bytes."""
        saved = SavedBytes(self.loop.modules)
        watch = Watch(self.device, lambda part: saved.stop() if part == "teacher_forward" else None)
        with saved.hooks:
            self._step(watch)
        self.saved_bytes = saved.total
        self._log(f"warm-up, {self.saved_bytes / MIB:.1f} MiB saved")

    def timed_step(self) -> None:
        with PeakMemory(self.device) as memory:
            before, watch = time.process_time(), Watch(self.device)
            self._step(watch)
            self.cpu_seconds.append(time.process_time() - before)
        self.parts.append(watch.seconds())
        self.seconds.append(sum(self.parts[-1].values()))
        self.peaks.append(memory.bytes)
        self._log(f"{self.seconds[-1]:.2f} s, {self.cpu_seconds[-1]:.2f} s of CPU time")

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def peak_bytes(self) -> int | None:
        known = [peak for peak in self.peaks if peak is not None]
        return max(known) if known else None

    def report(self) -> dict[str, Any]:
        return {
            "ms": self.milliseconds,
            "ms_low": 1e3 * min(self.seconds),
            "ms_high": 1e3 * max(self.seconds),
            "cpu_ms": 1e3 * statistics.median(self.cpu_seconds),
            "parts_ms": {part: 1e3 * statistics.median(parts[part] for parts in self.parts) for part in PARTS},
            "peak_bytes": self.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "losses": self.losses,
        }


def ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """Seconds of the other side over ours, round by round."""
    return [theirs / mine for mine, theirs in zip(ours, other, strict=True)]


def loss_differences(ours: Sequence[float], stock: Sequence[float]) -> list[float]:
    """Relative differences of the first `COMPARED_STEPS` losses; infinite when a loss is NaN."""
    pairs = list(zip(ours, stock, strict=True))[:COMPARED_STEPS]
    differences = [abs(a - b) / abs(b) if b else abs(a - b) for a, b in pairs]
    return [float("inf") if math.isnan(difference) else difference for difference in differences]


class Float32:
    """The stock loop in float32, from the instance's own weights; create it before a LoRA is added to them."""

    def __init__(self, instance: Instance) -> None:
        self.loop = StockLoop(instance, "plain")
        for model in self.loop.modules:
            model.float()
        embeds = instance.condition.prompt_embeds.float()
        self.loop.instance = replace(instance, condition=replace(instance.condition, prompt_embeds=embeds))

    @torch.no_grad()
    def loss(self, lora: dict[str, Tensor]) -> float:
        load_lora_state(self.loop.transformer, lora)
        return self.loop.loss().item()


def agree(ours: Side, stock: Side, exact: Float32 | None, tolerance: float) -> bool:
    """Whether the losses agree to the tolerance, in half precision by the rule of the module's docstring."""
    differences = loss_differences(ours.losses, stock.losses)
    if max(differences) <= tolerance or exact is None or max(differences) > 10 * tolerance:
        return max(differences) <= tolerance
    steps = [step for step, difference in enumerate(differences) if difference > tolerance]
    for side in (ours, stock):
        for step in steps:
            if step not in side.float32_losses:
                side.float32_losses[step] = exact.loss(side.loras[step])
    again = loss_differences(*([side.float32_losses[step] for step in steps] for side in (ours, stock)))
    return max(again) <= tolerance


def measure(
    preset: str,
    instance: Instance,
    variants: Sequence[Variant],
    rounds: int,
    device: str = "cpu",
    activations: str | None = None,
) -> dict[str, Any]:
    """Measure one instance: a warm-up step of each side, then `rounds` steps of each in alternation."""
    half = instance.reasoner.dtype != torch.float32
    exact = Float32(instance) if half else None
    loops = {variant: StockLoop(instance, variant) for variant in variants}
    preprocessing = measure_preprocessing(instance, loops[variants[0]], device)
    ours = Side("ours", OurLoop(instance, activations), device)
    start = lora_state_dict(instance.reasoner.transformer)
    for loop in loops.values():
        load_lora_state(loop.transformer, start)
    stock = [Side(variant, loop, device) for variant, loop in loops.items()]
    sides = [ours, *stock]
    for side in sides:
        side.warm_up()
    for turn in range(rounds):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            side.timed_step()

    reference, best = stock[0], min(stock, key=lambda side: side.milliseconds)
    against = ratios(ours.seconds, reference.seconds)
    low, middle, high = statistics.quantiles(against, n=4, method="inclusive") if rounds > 1 else against * 3
    tolerance = TOLERANCE[instance.reasoner.dtype]
    differences = {side.name: max(loss_differences(ours.losses, side.losses)) for side in stock}
    same = all([agree(ours, side, exact, tolerance) for side in stock])
    memory = None
    if ours.peak_bytes is not None and reference.peak_bytes:
        memory = ours.peak_bytes / reference.peak_bytes
    steps = [side.cpu_seconds if device == "cpu" else side.seconds for side in (ours, reference)]
    medians = statistics.median(steps[0]), statistics.median(steps[1])
    per_instance = whole.measure_instance(instance, loops[variants[0]], medians, device)
    return {
        "case": f"{preset}, {reference.name}",
        "ours_ms": ours.milliseconds,
        "stock_ms": reference.milliseconds,
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "memory_ratio": memory,
        "saved_ratio": ours.saved_bytes / max(reference.saved_bytes, 1),
        "vs_best_stock": statistics.median(ratios(ours.seconds, best.seconds)),
        "best_stock": best.name,
        "cpu_speedup": statistics.median(ratios(ours.cpu_seconds, reference.cpu_seconds)),
        "sides": {side.name: side.report() for side in sides},
        "instance": per_instance,
        "preprocessing_ms": {"ours": preprocessing["ours_ms"], "stock": preprocessing["stock_ms"]},
        "compared_steps": min(COMPARED_STEPS, rounds + 1),
        "loss_change": ours.losses[min(COMPARED_STEPS, rounds + 1) - 1] / ours.losses[0] - 1,
        "loss_difference": differences,
        "loss_tolerance": tolerance,
        "float32_losses": {side.name: side.float32_losses for side in sides if side.float32_losses},
        "same_losses": same,
    }


def measure_preprocessing(instance: Instance, stock: StockLoop, device: str) -> dict[str, Any]:
    """Measure frames to patch rows and back; within a step it cannot be separated from the Teacher."""
    with torch.no_grad():
        frames = stock.decoder.decode_batch(stock.predict_clean())[0][stock.indices]
    frames.requires_grad_()
    grad = torch.randn_like(stock.pixels(frames)[0])
    video = instance.teacher.video
    return compare(
        "preprocessing",
        lambda: torch.autograd.grad(preprocess_video(frames, video)[0], frames, grad),
        lambda: torch.autograd.grad(stock.pixels(frames)[0], frames, grad),
        pairs=5,
        device=device,
    )


def tokens(instance: Instance) -> int:
    """Number of the video's tokens in the Reasoner."""
    return instance.noise.z1[0, 0].numel() // math.prod(instance.reasoner.patch)


def exponents(long: dict[str, Any], short: dict[str, Any], counts: tuple[int, int]) -> dict[str, Any]:
    """x in time ~ tokens^x between two rows, by side, for the step (wall and processor time), the Reasoner and the
    surrogate decoder. The Teacher sees as many frames in both. counts: tokens of the long row and of the short one."""

    def exponent(side: str, milliseconds: Callable[[dict[str, Any]], float]) -> float:
        ratio = milliseconds(long["sides"][side]) / milliseconds(short["sides"][side])
        return math.log(ratio) / math.log(counts[0] / counts[1])

    def part(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda side: sum(side["parts_ms"][f"{name}_{direction}"] for direction in ("forward", "backward"))

    times: dict[str, Callable[[dict[str, Any]], float]] = {
        "step": lambda side: side["ms"],
        "step_cpu": lambda side: side["cpu_ms"],
        "reasoner": part("reasoner"),
        "decode": part("decode"),
    }
    by_side = {side: {name: exponent(side, time) for name, time in times.items()} for side in long["sides"]}
    return {"tokens": list(counts), **by_side}


def show(row: dict[str, Any]) -> None:
    """Print the parts of a step, the memory and the losses, a column for each side."""
    sides = row["sides"]
    print(" " * 22 + "".join(f"{name:>14}" for name in sides))
    for part in PARTS:
        print(f"  {part:<20}" + "".join(f"{side['parts_ms'][part]:>11.1f} ms" for side in sides.values()))
    print(f"  {'step':<20}" + "".join(f"{side['ms']:>11.1f} ms" for side in sides.values()))
    print(f"  {'CPU time':<20}" + "".join(f"{side['cpu_ms']:>11.1f} ms" for side in sides.values()))
    for name in ("peak_bytes", "saved_bytes"):
        values = [side[name] for side in sides.values()]
        cells = (f"{'?':>14}" if value is None else f"{value / MIB:>10.1f} MiB" for value in values)
        print(f"  {name:<20}" + "".join(cells))
    for step in range(row["compared_steps"]):
        print(f"  {f'loss of step {step}':<20}" + "".join(f"{side['losses'][step]:>14.6f}" for side in sides.values()))
    for name, losses in row["float32_losses"].items():
        again = ", ".join(f"{loss:.6f} (step {step})" for step, loss in losses.items())
        print(f"  by the stock code in float32, {name}: {again}")
    ours, stock = row["preprocessing_ms"]["ours"], row["preprocessing_ms"]["stock"]
    print(f"  preprocessing by itself, both ways: ours {ours:.1f} ms, stock {stock:.1f} ms")
    print(f"  x{row['vs_best_stock']:.2f} against the fastest stock variant, {row['best_stock']}")
    whole.show(row["instance"])


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS[:2]),
        choices=VARIANTS,
        help="stock loops; ratios are against the first. compiled spends minutes on its first step",
    )
    parser.add_argument(
        "--activations",
        metavar="LEVELS",
        help="what our Reasoner's blocks keep, as in `vlmteacher solve` (default: long; at tiny all)",
    )
    parser.set_defaults(dtype=None, pairs=None)
    settings = parsed(parser)
    rounds = settings.pairs or (4 if settings.preset.startswith("mid") else 9)
    activations = settings.activations or ("long" if settings.preset.startswith("mid") else "all")
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    torch.backends.cudnn.allow_tf32 = False  # torch's default: the stock decoder's float32 would have 10 bits

    def measured(preset: str) -> tuple[dict[str, Any], int]:
        instance = build(preset, dtype, settings.device)
        settings.dtype = str(instance.reasoner.dtype).removeprefix("torch.")
        row = measure(preset, instance, settings.variants, rounds, settings.device, activations)
        return row, tokens(instance)

    row, count = measured(settings.preset)
    show(row)
    if settings.preset in SHORTER:
        short, fewer = measured(SHORTER[settings.preset])
        show(short)
        row["exponent"] = exponents(row, short, (count, fewer))
        row["shorter"] = short
        for side, values in row["exponent"].items():
            if side != "tokens":
                print(f"  time ~ tokens^x, {side}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    publish("step", settings, [row])
    if not row["same_losses"]:
        differences = ", ".join(f"{value:.1e} ({name})" for name, value in row["loss_difference"].items())
        sys.exit(f"the losses differ by {differences}, relative; at most {row['loss_tolerance']:.0e} is allowed")


if __name__ == "__main__":
    main()
