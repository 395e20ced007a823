"""One optimisation step at the paper's scale on a GPU, measured part by part, beside what was predicted for it.

    python -m benchmarks.gpu.paper_scale [--minutes 9] [--out DIR] [--preset paper|smoke] [--json]

Wan2.2-TI2V-5B (the distilled one: no guidance), 89 frames of 704x1280, Qwen3-VL-4B with 24 frames and 4 questions,
bfloat16, random weights made on the GPU. Every stage writes DIR/STAGE.json after each of its pieces, so that a run that
is cut off leaves all that it measured; a piece that fails is named there, and the exit status is 1. `--preset smoke`
runs all stages at tiny sizes, on a CPU too.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import paper_parts
from benchmarks.gpu.paper_models import SCALES, Scale, build, frame_indices
from benchmarks.gpu.stages import Clock, Stage
from benchmarks.presets import Instance
from benchmarks.step import OurLoop, PeakMemory
from benchmarks.stock import PARTS, StockLoop, Watch
from benchmarks.timing import argument_parser, parsed
from vlmteacher.files import write_json
from vlmteacher.lora.adapter import add_lora, load_lora_state, lora_state_dict, remove_lora
from vlmteacher.placement import device_memory
from vlmteacher.planning.fit import fit_memory
from vlmteacher.planning.plan import GB
from vlmteacher.reasoners.checkpointing import format_levels, keep_activations, kept_levels

STEPS = 3
SAME_LOSSES = 1e-3
PREDICTED = {  # seconds; of docs/results/performance.md: estimates, but for the decoder's
    "Reasoner": {"stock": 3.6, "ours": 1.7, "reachable": 1.5},
    "decoder": {"stock": 0.104, "ours": 0.102, "reachable": 0.047},
    "Teacher": {"stock": 5.2, "ours": 1.2, "reachable": 0.7},
    "step": {"stock": 8.9, "ours": 3.1, "reachable": 2.35},
}
PARTS_OF = {
    "Reasoner": ("reasoner_forward", "reasoner_backward"),
    "decoder": ("decode_forward", "decode_backward"),
    "Teacher": ("teacher_forward", "teacher_backward"),
    "step": PARTS,
}


class Run:
    """The models, and what later stages need of earlier ones: the losses and LoRA gradients of the first steps."""

    def __init__(self, scale: Scale, device: torch.device, folder: Path, clock: Clock) -> None:
        self.scale, self.device, self.folder, self.clock = scale, device, folder, clock
        self.instance: Instance | None = None
        self.losses: dict[str, list[float]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        self.parts: dict[str, dict[str, float]] = {}  # median seconds, by side
        self.stages: list[Stage] = []

    def stage(self, name: str) -> Stage:
        self.stages.append(Stage(name, self.folder, self.clock))
        return self.stages[-1]

    @property
    def models(self) -> Instance:
        assert self.instance is not None
        return self.instance


def collect_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A list to which each of the first two steps appends its flat LoRA gradient, on the CPU."""
    collected: list[Tensor] = []

    def collect(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if len(collected) < 2:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            collected.append(torch.cat([weight.grad.detach().float().cpu().flatten() for weight in weights]))

    optimizer.register_step_pre_hook(collect)
    return collected


def steps(run: Run, loop: OurLoop | StockLoop, name: str) -> dict[str, Any]:
    """Three steps of a loop: seconds of the parts, peaks, losses, and in ours what blocks and Teacher keep."""
    rows = []
    optimizer = loop.loop.optimizer if isinstance(loop, OurLoop) else loop.optimizer
    collected = collect_gradients(optimizer)
    for _ in range(STEPS):
        with PeakMemory(str(run.device)) as memory:
            watch = Watch(str(run.device))
            loss = loop.step(watch)
        row: dict[str, Any] = {"loss": loss, "parts_s": watch.seconds(), "peak_bytes": memory.bytes}
        if run.device.type == "cuda":
            row["reserved_bytes"] = torch.cuda.memory_reserved(run.device)
        if isinstance(loop, OurLoop):
            row["activations"] = format_levels(kept_levels(run.models.reasoner.transformer))
            row["teacher_kept_bytes"] = run.models.teacher.kept_bytes
            row["rungs"] = list(loop.loop.ladder.taken)
        row["seconds"] = sum(row["parts_s"].values())
        rows.append(row)
    run.losses[name], run.gradients[name] = [row["loss"] for row in rows], collected
    later = rows[1:]  # the first fills caches
    run.parts[name] = {part: statistics.median(row["parts_s"][part] for row in later) for part in PARTS}
    return {"steps": rows, "seconds": statistics.median(row["seconds"] for row in later), "parts_s": run.parts[name]}


def our_steps(run: Run, name: str, activations: str | None = None, memory: str | None = None) -> dict[str, Any]:
    """Our steps with these activations, or those of the plan for a memory."""
    models = run.models
    shape = models.condition.num_frames, models.condition.height, models.condition.width
    fitted: dict[str, Any] = {}
    levels = kept_levels(models.reasoner.transformer)
    if memory:
        remove_lora(models.reasoner.transformer)
        settings = models.settings.updated(memory=memory)
        parts = models.reasoner, models.decoder, models.teacher
        fit = fit_memory(*parts, shape, frame_indices(models), len(models.queries.questions), settings)
        fitted = {"plan": str(fit), "planned_peak_bytes": fit.peak_bytes}
        with fit.on(models.reasoner, models.teacher):
            loop = OurLoop(models)
            try:
                return fitted | steps(run, loop, name)
            finally:
                loop.close()
    loop = OurLoop(models, activations)
    try:
        return steps(run, loop, name)
    finally:
        loop.close()
        keep_activations(models.reasoner.transformer, levels)


def stage_environment(run: Run) -> None:
    stage = run.stage("1_environment")
    stage.piece("environment", lambda: paper_parts.environment(run.device))
    stage.piece("copy", lambda: paper_parts.copy_rate(run.scale.copied, run.device))
    for kind in ("bfloat16", "fp8"):
        stage.piece(f"product_{kind}", partial(paper_parts.product_rate, run.scale.product, kind, run.device))
    for shape in paper_parts.attention_shapes(run.scale.shrink):
        stage.piece(f"attention: {shape.name}", partial(paper_parts.attention, shape, run.scale.dtype, run.device))


def stage_ours(run: Run) -> None:
    stage = run.stage("2_ours")
    stage.piece("build", lambda: _build(run), 20)
    if run.instance is None:
        return
    memory = "auto" if run.device.type != "cuda" else f"{(device_memory(run.device) or 0) * 0.95 / GB:.4g}"
    stage.piece("default", lambda: our_steps(run, "default"), 15)
    stage.piece("plan", lambda: our_steps(run, "plan", memory=memory), 30)
    stage.piece("long", lambda: our_steps(run, "long", activations="long"), 15)


def _build(run: Run) -> dict[str, Any]:
    run.instance = build(run.scale, run.device)
    networks = {
        **run.instance.reasoner.networks,
        "decoder": run.instance.decoder,
        "teacher": run.instance.teacher.model,
    }
    return {name: sum(p.nbytes for p in network.parameters()) for name, network in networks.items()}


def stage_profile(run: Run) -> None:
    stage = run.stage("3_profile")

    def profile() -> dict[str, Any]:
        loop = OurLoop(run.models)
        try:
            loop.step()
            return paper_parts.profile(loop.step, run.device)
        finally:
            loop.close()

    stage.piece("step", profile, 20)


def stage_stock(run: Run) -> None:
    """The stock loop on the same modules, from the same LoRA as ours."""
    stage, models = run.stage("4_stock"), run.models
    add_lora(models.reasoner.transformer, models.settings.rank, seed=models.seed)
    start = lora_state_dict(models.reasoner.transformer)

    def stock() -> dict[str, Any]:
        loop = StockLoop(models, "checkpointed", copies=False)
        try:
            load_lora_state(loop.transformer, start)
            return steps(run, loop, "stock")
        finally:
            loop.close()

    stage.piece("checkpointed", stock, 45)


def stage_agreement(run: Run) -> None:
    stage = run.stage("5_agreement")

    def agreement() -> dict[str, Any]:
        ours, stock = run.losses["default"], run.losses["stock"]
        differences = [abs(a - b) / abs(b) for a, b in zip(ours, stock, strict=True)]
        pairs = zip(run.gradients["default"], run.gradients["stock"], strict=True)
        cosines = [float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0)) for a, b in pairs]
        return {
            "losses": {"ours": ours, "stock": stock},
            "loss_differences": differences,
            "gradient_cosines": cosines,
            "same": max(differences) <= SAME_LOSSES,
        }

    stage.piece("losses", agreement)


def stage_parts(run: Run) -> None:
    stage, models = run.stage("6_parts"), run.models
    remove_lora(models.reasoner.transformer)
    for name in paper_parts.decoder_backends():
        stage.piece(f"decoder: {name}", partial(paper_parts.decoder, models, name), 5)
    for case, layer in paper_parts.lora_layers(models).items():
        stage.piece(f"products: {case}", partial(paper_parts.lora_products, models, *layer), 5)
    stage.piece("teacher vision", lambda: paper_parts.vision(models), 15)
    stage.piece("teacher language", lambda: paper_parts.language(models), 15)


def stage_around(run: Run) -> None:
    """What is outside the step, and a step in too little memory."""
    stage, models = run.stage("7_around"), run.models
    sample = stage.piece("sampling", lambda: paper_parts.sampling(models), 15)
    if sample is not None:
        stage.piece("vae", lambda: paper_parts.vae(models, run.clock), 30)
    stage.piece("queries", lambda: paper_parts.writing(models), 30)
    stage.piece("ladder", lambda: paper_parts.ladder(models), 30)


def table(run: Run) -> list[dict[str, Any]]:
    """Measured and predicted seconds and their ratio, of ours (the plan's settings) and of stock."""
    rows = []
    for part, predicted in PREDICTED.items():
        row: dict[str, Any] = {"part": part, "reachable_s": predicted["reachable"]}
        for side, name in (("ours", "plan"), ("stock", "stock")):
            parts = run.parts.get(name)
            measured = None if parts is None else sum(parts[each] for each in PARTS_OF[part])
            ratio = None if measured is None else measured / predicted[side]
            row |= {f"{side}_s": measured, f"{side}_predicted_s": predicted[side], f"{side}_ratio": ratio}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| part | ours, s | predicted | ratio | stock, s | predicted | ratio | reachable |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (
            "not measured" if value is None else f"{value:.3g}"
            for side in ("ours", "stock")
            for value in (row[f"{side}_s"], row[f"{side}_predicted_s"], row[f"{side}_ratio"])
        )
        print(f"| {row['part']} | {' | '.join(cells)} | {row['reachable_s']:.3g} |")


STAGES = (stage_environment, stage_ours, stage_profile, stage_stock, stage_agreement, stage_parts, stage_around)


def main() -> int:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--preset", choices=SCALES, default="paper")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that would end later (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper_scale"), help="folder for a JSON of each stage")
    settings = parsed(parser)
    if settings.preset == "paper" and not settings.device.startswith("cuda"):
        print("benchmarks.gpu.paper_scale: torch sees no GPU: give --preset smoke on a CPU", file=sys.stderr)
        return 2
    if not (settings.minutes > 0 and math.isfinite(settings.minutes)):
        print(f"benchmarks.gpu.paper_scale: --minutes must be above 0, not {settings.minutes}", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False
    settings.out.mkdir(parents=True, exist_ok=True)
    run = Run(
        SCALES[settings.preset], torch.empty(0, device=settings.device).device, settings.out, Clock(settings.minutes)
    )
    for stage in STAGES:
        if stage is stage_environment or stage is stage_ours or run.instance is not None:
            stage(run)
    rows = table(run)
    show(rows)
    summary: dict[str, Any] = {
        "benchmark": "gpu.paper_scale",
        "preset": settings.preset,
        "device": settings.device,
        "table": rows,
        "failed": {stage.name: stage.failed for stage in run.stages if stage.failed},
        "skipped": {stage.name: stage.skipped for stage in run.stages if stage.skipped},
    }
    write_json(settings.out / "summary.json", summary)
    if settings.json:
        print(json.dumps(summary))
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
