"""One of two ranks that solve the same instances as one process does: `torchrun -m tests.ranks_process PAIR OUT`.

Writes to OUT/RANK.json how far losses, gradients' norms, LoRA and video are from those of one process, and what was
refused.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLMTEACHER_CHECK_DECODER"] = "0"

import torch
from PIL import Image
from safetensors.torch import load

from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import InputError
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.ranks import join, split_rows

CASES: dict[str, dict[str, Any]] = {  # 5 frames are three pairs, which two ranks do not share evenly
    "ours": {"check_final": True, "teacher_frames": 5},
    "stock": {"fused_lora": False, "lora_blocks": "last:1", "teacher_frames": 4},
    "all steps": {"target": "full", "pull": 0.1, "teacher_frames": 2},
}


def solve(pipe: TeacherPipeline, prompt: str = PROMPT, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    given = {"max_steps": 3, "threshold": 1e-6, "rank": 2, "learning_rate": 0.02, **settings}
    image = Image.linear_gradient("L").convert("RGB").resize((48, 32))
    return pipe(prompt, image, generator=generator, queries=QUERIES, output_type="pt", progress=False, **given)


def differences(one: Any, two: Any) -> dict[str, float]:
    """The largest relative difference of each kind of number."""
    result = {
        name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(one.history, two.history, strict=True))
        for name in ("loss", "grad_norm")
    }
    before, after = load(one.lora), load(two.lora)
    for kind in ("lora_A", "lora_B"):
        names = sorted(name for name in before if kind in name)
        ours, theirs = (torch.cat([state[name].flatten() for name in names]) for state in (before, after))
        result[kind] = float((ours - theirs).norm() / ours.norm())
    return {**result, "video": float((one.frames - two.frames).abs().max()), "steps": len(two.history)}


def rows(ranks: Any) -> float:
    """How far `split_rows` of 5 rows in pairs is from the whole, with its gradient."""
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = torch.cat([x, x[-1:]])[: len(x) + len(x) % 2].unflatten(0, (-1, 2))
        return ((pairs.sum(1) @ weight).sin(),)

    x = torch.linspace(0, 1, 15, dtype=torch.float64).view(5, 3).requires_grad_()
    results = []
    for run in (encode, lambda x: split_rows(encode, x, 2, ranks)):
        (y,) = run(x)
        results.append(torch.cat([y.flatten(), torch.autograd.grad(y.square().sum(), x)[0].flatten()]))
    return float((results[0] - results[1]).abs().max())


def main(pair: str, out: str) -> None:
    pipe = TeacherPipeline.from_pretrained(**json.loads(pair), device_map="cpu")
    alone = {name: solve(pipe, **settings) for name, settings in CASES.items()}
    ranks = join(2, "cpu")
    pipe.share(ranks)
    result: dict[str, Any] = {name: differences(alone[name], solve(pipe, **given)) for name, given in CASES.items()}
    result["rows"] = rows(ranks)
    transformer = pipe.reasoner.transformer
    result["hooks"] = [name for name, module in transformer.named_modules() if "forward" in vars(module)]
    assert transformer._parallel_config is None
    file = Path(out) / f"{ranks.rank}.json"
    try:
        solve(pipe, f"{PROMPT} {ranks.rank}", teacher_frames=2)
    except InputError as error:
        result["refused"] = str(error)
    except SystemExit as stop:
        result["refused"] = stop.code
    file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
