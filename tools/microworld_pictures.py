"""Draw the pictures of docs/internals/microworld.md: ``python -m tools.microworld_pictures [--solved | --table N]``.

By default a contact sheet of every family; with ``--solved`` videos before and after the packaged pair's optimisation;
``--table N`` prints how many of N videos of each kind the scorer lets pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmteacher.evaluation.microworld import first_frame, judge, noise_seed
from vlmteacher.microworld import corruptions, scorer, world
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.pipeline import TeacherPipeline

PICTURES = Path(__file__).parents[1] / "docs/internals/microworld"
SHOWN = (0, 3, 6, 12)  # frames
GAP, SCALE = 2, 2


def strip(frames: np.ndarray) -> np.ndarray:
    """Place the frames of `SHOWN` side by side: (H, W, 3)."""
    padded = np.pad(frames[list(SHOWN)], ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=1.0)
    return np.concatenate(list(padded), axis=1)


def sheet(family: str) -> Image.Image:
    """Draw two instances in domain and one out of it, a row each: the right video, then both flawed ones."""
    rows = []
    for index, split in enumerate(("id", "id", "ood")):
        rng = np.random.default_rng([7, index])
        scene = world.sample_scene(rng, family, split)
        while not world.flaw(scene, world.PACKAGED_FLAWS):
            scene = world.sample_scene(rng, family, split)
        tracks = (
            world.perform(scene),
            world.perform(FAMILIES[family].mistaken(scene)),
            FAMILIES[family].forbidden(scene),
        )
        right, mistaken, forbidden = (strip(world.draw(track)) for track in tracks)
        gap = np.ones((len(right), 8, 3))
        rows.append(np.concatenate([right, gap, mistaken, gap, forbidden], axis=1))
    return picture(rows)


def picture(rows: list[np.ndarray]) -> Image.Image:
    pixels = (np.concatenate(rows) * 255).round().astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
    return Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE)


def solved(pipe: TeacherPipeline, family: str, count: int = 3) -> Image.Image:
    """Draw the first `count` instances in domain whose video fails: before the optimisation, then after it.

    A green bar marks a video that the scorer passes, a red one a video that fails. The noises are the benchmark's.
    """
    rows: list[np.ndarray] = []
    for index in range(world.FAMILIES.index(family), 1000, len(world.FAMILIES)):
        scene, prompt = world.instance(index, seed=1)
        generator = torch.Generator().manual_seed(noise_seed(index, 1))
        out = pipe(prompt, first_frame(scene), generator=generator, output_type="pt", progress=False)
        assert isinstance(out.frames, torch.Tensor) and isinstance(out.frames_before, torch.Tensor)
        before, after = (judge(video, scene).success for video in (out.frames_before, out.frames))
        if before:
            continue
        cells = []
        for video, passes in ((out.frames_before, before), (out.frames, after)):
            drawn = strip(video.permute(0, 2, 3, 1).float().numpy())
            bar = np.full((2 * GAP, drawn.shape[1], 3), (0.1, 0.7, 0.2) if passes else (0.85, 0.1, 0.1))
            cells += [np.concatenate([bar, drawn]), np.ones((len(bar) + len(drawn), 8, 3))]
        rows.append(np.concatenate(cells[:-1], axis=1))
        if len(rows) == count:
            break
    return picture(rows)


def table(count: int) -> None:
    """Print the per cent of videos that pass, by kind and family; half of the scenes are out of domain."""
    print("| | " + " | ".join(world.FAMILIES) + " |\n" + "|---" * (len(world.FAMILIES) + 1) + "|")
    kinds = ["right", "noise", *corruptions.CORRUPTIONS]
    for kind in kinds:
        cells = []
        for family in world.FAMILIES:
            if kind in corruptions.CORRUPTIONS and kind not in corruptions.kinds(family):
                cells.append("")
                continue
            rng = np.random.default_rng(kinds.index(kind))
            passed = 0
            for k in range(count):
                scene = world.sample_scene(rng, family, ("id", "ood")[k % 2])
                if kind in corruptions.CORRUPTIONS:
                    frames = world.draw(corruptions.corrupt(kind, scene, rng))
                else:
                    frames = world.render(scene)
                    frames = frames if kind == "right" else (frames + rng.normal(0, 0.4, frames.shape)).clip(0, 1)
                passed += scorer.score(frames, scene).success
            cells.append(f"{100 * passed / count:g}")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solved", action="store_true", help="draw failures before and after the optimisation")
    parser.add_argument("--table", type=int, metavar="N", help="print the table instead")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    pipe = TeacherPipeline.from_pretrained(dtype=torch.float32, device_map="cpu") if arguments.solved else None
    for family in world.FAMILIES:
        drawn, name = (solved(pipe, family), f"{family}_solved") if pipe else (sheet(family), family)
        drawn.save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
