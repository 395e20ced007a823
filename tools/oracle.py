"""Print what a LoRA can mend at best: ``python -m tools.oracle --out DIR [--count N] [--family NAME ...]``.

For the first N validation scenes of each family whose few-step video fails: a LoRA is optimised by the squared distance
of the one-step prediction's latents from those of the right video, instead of by the Teacher, as often and with the
learning rate that the pair's defaults say. The share of few-step videos that pass the scorer afterwards is the ceiling
of the method: where it is low, the Reasoner or the size of the world is the limit, and no Teacher helps.

DIR/oracle.jsonl has a line for each scene; the same command goes on with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmteacher.evaluation.journal import Journal
from vlmteacher.evaluation.microworld import first_frame, judge, noise_seed, right_latents
from vlmteacher.lora.adapter import add_lora, lora_parameters, remove_lora
from vlmteacher.microworld import world
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.settings import Settings

SEED, SPLIT = 1, "validation"
TRIES = 6  # scenes that are looked at for each failing one, at most


def mend(pipe: TeacherPipeline, settings: Settings, scene: world.Scene, prompt: str, seed: int) -> dict[str, Any]:
    """Whether the few-step video of a scene passes before and after the optimisation, and both distances."""
    reasoner = pipe.reasoner
    with torch.no_grad():
        condition = reasoner.encode(prompt, first_frame(scene), world.NUM_FRAMES, world.SIZE, world.SIZE)
        noise = reasoner.noise(condition, torch.Generator().manual_seed(seed))
        if judge(reasoner.decode(reasoner.sample(condition, noise)), scene).success:
            return {"before": True}
        right = right_latents(reasoner, scene)
    add_lora(reasoner.transformer, settings.rank, seed=0)
    try:
        parameters = list(lora_parameters(reasoner.transformer))
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0)
        distances = []
        for _ in range(settings.max_steps):
            distance = (reasoner.predict_clean(condition, noise) - right).square().mean()
            optimizer.zero_grad()
            distance.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            distances.append(distance.item())
        with torch.no_grad():
            verdict = judge(reasoner.decode(reasoner.sample(condition, noise)), scene)
    finally:
        remove_lora(reasoner.transformer)
    broken = [name for name, value in verdict.subscores.items() if value < 1]
    return {"before": False, "after": verdict.success, "broken": broken, "distances": [distances[0], distances[-1]]}


def run(
    pipe: TeacherPipeline, settings: Settings, families: Sequence[str], count: int, out: Path
) -> list[dict[str, Any]]:
    """The rows of all scenes that are looked at, `count` failing ones of each family; new ones are added to `out`."""
    journal = Journal(out)
    known = {row["index"]: row for row in journal.read(_check, "remove that line")}
    with journal.appending():
        for family in families:
            failing = 0
            for turn in range(TRIES * count):
                index = turn * len(world.FAMILIES) + world.FAMILIES.index(family)
                if index not in known:
                    scene, prompt = world.instance(index, SEED, SPLIT)
                    result = mend(pipe, settings, scene, prompt, noise_seed(index, SEED))
                    known[index] = {"family": family, "index": index, **result}
                    journal.append([known[index]])
                failing += not known[index]["before"]
                if failing == count:
                    break
    return [known[index] for index in sorted(known)]


def _check(row: dict[str, Any]) -> None:
    _ = row["family"], row["index"], row["before"] or (row["after"], row["broken"])


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown: failing scenes, mended ones, and what the others break."""
    lines = ["| family | scenes | right before | failing | mended | broken afterwards |", "|---|---|---|---|---|---|"]
    for family in world.FAMILIES:
        here = [row for row in rows if row["family"] == family]
        failing = [row for row in here if not row["before"]]
        broken = [name for row in failing for name in row["broken"]]
        counts = ", ".join(f"{name} {broken.count(name)}" for name in sorted(set(broken)))
        mended = sum(row["after"] for row in failing)
        if here:
            lines.append(
                f"| `{family}` | {len(here)} | {len(here) - len(failing)} | {len(failing)} | {mended} | {counts} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of oracle.jsonl")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="failing scenes of a family (default: 10)")
    parser.add_argument("--family", nargs="+", default=world.FAMILIES, choices=world.FAMILIES)
    parser.add_argument("--pair", metavar="DIR", help="folder with a pair.json (default: the packaged pair)")
    arguments = parser.parse_args()
    pipe = TeacherPipeline.from_pretrained(pair=arguments.pair, dtype=torch.float32, device_map="cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(table(run(pipe, pipe.defaults, arguments.family, arguments.count, arguments.out / "oracle.jsonl")))


if __name__ == "__main__":
    main()
