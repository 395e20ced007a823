"""Keep what a replay needs to go on elsewhere: a few megabytes of every run, small enough to be committed.

Of the finished runs only the results that later ones read are kept, in half precision: no optimizer states, and no data
that are drawn from seeds, which are drawn again; and the training curves. A run that was stopped starts again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.microworld.manifest import AVERAGE, Entry, Manifest
from recipes.microworld.replay import JOURNAL, journal, stage_of
from recipes.microworld.training import forget_origins
from vlmteacher.distillation.trainer import FORM, STATE
from vlmteacher.errors import InputError
from vlmteacher.files import claimed, make_folder, write_json
from vlmteacher.state import write_state

DRAWN = ("latents", "collect", "optimise")  # stages that make data
LOG = "log.jsonl"
READ_STATE = ("teacher-finetune", AVERAGE)  # stages that read the state of the run that they start from


def keep(out: Path, to: Path, manifest: Manifest) -> None:
    """Write to the folder `to` what the unfinished runs of the folder `out` need; `to` is then as good as `out`.

    Raises InputError: `out` holds no finished run; one of them is continued by a run that is not finished.
    """
    finished = journal(out)
    if not finished:
        raise InputError(f"{out} holds no finished run of a replay: give the --out of one")
    left = [entry for entry in manifest.entries if entry.name not in finished]
    for entry in reversed(manifest.entries):
        if entry.name in finished and entry.stage in DRAWN and entry.folder in _read(manifest, left):
            left.append(entry)
    again, read = {entry.name for entry in left}, _read(manifest, left)
    with claimed(to):
        for entry in manifest.entries:
            if entry.name in finished and (out / entry.folder / LOG).exists():
                _copy(out / entry.folder / LOG, out, to)
            if entry.name in again or entry.folder not in read:
                continue
            readers = [other for other in left if entry.name in _origins(other)]
            if any(other.continues for other in readers):
                raise InputError(f"{entry.name} is continued, optimizer included: finish the run that does it first")
            for result in stage_of(manifest, entry).makes:
                _copy(out.joinpath(entry.folder, *result.split("/")[1:]), out, to)
            if any(other.stage in READ_STATE or other.settings.get("adapter") == entry.name for other in readers):
                modules = torch.load(out / entry.folder / STATE, weights_only=True)["modules"]
                make_folder((to / entry.folder / STATE).parent)
                halves = {name: _halved(tensors) for name, tensors in modules.items()}
                write_state(to / entry.folder / STATE, FORM, {"modules": halves})
        forget_origins(to)
        write_json(to / JOURNAL, {name: settings for name, settings in finished.items() if name not in again})


def _origins(entry: Entry) -> set[str]:
    """The runs that an entry names."""
    named = {entry.start, entry.continues, entry.settings.get("adapter"), *entry.settings.get("shares", ())}
    return {name for name in named if name}


def _read(manifest: Manifest, entries: list[Entry]) -> set[str]:
    """The folders of other runs that the runs of some entries read."""
    folders = set()
    for entry in entries:
        needs = {need.split("/")[0] for need in stage_of(manifest, entry).needs if need not in manifest.of_pair}
        folders |= {manifest.folder(name) for name in entry.instead.values()}
        folders |= {manifest.folder(name) for name in _origins(entry) - set(manifest.of_pair)}
        folders |= needs - set(entry.instead)
    return folders


def _copy(source: Path, out: Path, to: Path) -> None:
    """Copy a result, a file or a folder, with its weights in half precision; without states."""
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        target = to / path.relative_to(out)
        if path.is_dir() or STATE.parent.name in path.relative_to(source).parts:
            continue
        make_folder(target.parent)
        if path.suffix == ".safetensors":
            save_file(_halved(load_file(path)), target, metadata={"format": "pt"})
        else:
            shutil.copyfile(path, target)


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()}
