"""Export of microworld instances as files in VBVR's layouts: for the training of a Reasoner, and as a benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmteacher.errors import InputError
from vlmteacher.files import claimed, make_folder, remove_leftovers, replacing, write_json, write_text
from vlmteacher.media import write_video
from vlmteacher.microworld import world
from vlmteacher.progress import track

BENCH_SPLITS = {"id": "In-Domain_50", "ood": "Out-of-Domain_50"}


def export(
    out: Path,
    count: int,
    seed: int,
    split: str = "train",
    flaws: str | None = None,
    chosen: Sequence[str] = world.FAMILIES,
) -> None:
    """Write `count` instances to ``out/<family>_task/<index>``; complete ones from an earlier call are kept.

    An instance holds first_frame.png, prompt.txt, ground_truth.mp4 and metadata.json, the symbolic state. Seed, index
    and chosen families determine an instance.

    Args:
        split: ``train``, ``id``, ``ood`` or ``validation``.
        flaws: a scheme of `world.FLAWS` for flawed videos; metadata.json says which flaw an instance has.
        chosen: the families, which alternate.

    Raises:
        InputError: a count below 1, an unknown split, scheme or family, a folder that is not writable or in use.
        OutputError: the disk is full; complete instances stay.
    """
    if count < 1:
        raise InputError(f"--limit must be at least 1, not {count}")
    world.check(split, chosen)
    if flaws is not None and flaws not in world.FLAWS:
        raise InputError(f"unknown scheme of flaws {flaws!r}: choose from {', '.join(world.FLAWS)}")
    with claimed(out):
        for folder in out.glob("*_task"):
            remove_leftovers(folder)
        for index in track(range(count), "export", "instance"):
            scene, prompt = world.instance(index, seed, split, chosen)
            instance = out / f"{scene.family}_task" / f"{index:06d}"
            description = {"index": index, "seed": seed, "split": split, "flaws": flaws, "scene": scene.to_json()}
            shown = world.training_track(scene, flaws) if flaws else world.perform(scene)
            flaw = world.flaw(scene, flaws) if flaws else None
            _write(instance, prompt, shown, description, {"right": flaw is None, "flaw": flaw})


def export_bench(out: Path, count: int, seed: int, chosen: Sequence[str] = world.FAMILIES) -> None:
    """Write `count` instances of each test split in the layout of VBVR-Bench's data.

    They are in ``out/In-Domain_50`` (split ``id``) and ``out/Out-of-Domain_50`` (``ood``), as
    ``<family>_data-generator/<five digits>``, each with final_frame.png beside the files that `export` writes. Complete
    ones from an earlier call are kept. Raises as `export` does.
    """
    if count < 1:
        raise InputError(f"--limit must be at least 1, not {count}")
    world.check("id", chosen)
    with claimed(out):
        for folder in out.glob("*/*_data-generator"):
            remove_leftovers(folder)
        for split, name in BENCH_SPLITS.items():
            for index in track(range(count), f"export {split}", "instance"):
                scene, prompt = world.instance(index, seed, split, chosen)
                instance = out / name / f"{scene.family}_data-generator" / f"{index // len(chosen):05d}"
                description = {"index": index, "seed": seed, "split": split, "scene": scene.to_json()}
                _write(instance, prompt, world.perform(scene), description, {}, final_frame=True)


def _write(
    instance: Path, prompt: str, shown: world.Track, description: dict, more: dict, final_frame: bool = False
) -> None:
    """Write an instance that shows a track, or check that it is there; `more`: of metadata.json."""
    if instance.exists():
        _check_same(instance, description)
        return
    pixels = (world.draw(shown) * 255).round().astype(np.uint8)
    make_folder(instance.parent)
    with replacing(instance) as temporary:
        temporary.mkdir()
        Image.fromarray(pixels[0]).save(temporary / "first_frame.png")
        if final_frame:
            Image.fromarray(pixels[-1]).save(temporary / "final_frame.png")
        write_text(temporary / "prompt.txt", prompt + "\n")
        write_video(temporary / "ground_truth.mp4", pixels, world.FPS)
        write_json(temporary / "metadata.json", {**description, **more, "fps": world.FPS})


def _check_same(instance: Path, description: dict) -> None:
    try:
        existing = json.loads((instance / "metadata.json").read_text(encoding="utf-8"))
        same = all(existing.get(name) == json.loads(json.dumps(value)) for name, value in description.items())
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        raise InputError(f"{instance} holds another instance: give another --out, or remove that folder")
