"""Replay a manifest: its runs one after the other in a folder, each in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.microworld.both import BOTH
from recipes.microworld.manifest import AVERAGE, SINGLE, Entry, Manifest
from recipes.microworld.stages import STAGES, Stage, check_pair, execute, part_of_pair, settings_of
from recipes.microworld.training import Run
from vlmteacher.errors import InputError
from vlmteacher.files import claimed, read_json, write_json

MANIFESTS = {"both": BOTH, "single": SINGLE}  # the packaged pair's, and that of the pair before it
JOURNAL = "replay.json"  # the finished runs and their settings
SHORTENED = {"steps": 1, "until": 1, "shards": 1, "videos": 8, "count": 8, "scenes": 8}  # and the least of each
SHORTENED |= {"heads_first": 0}  # so that all weights are trained
SHORTENED |= {"runs": 2, "labels": 2, "right": 2}  # videos of a step of teacher-point


def find_manifest(name: str) -> Manifest:
    """The manifest of a name. Raises InputError for an unknown one."""
    if name not in MANIFESTS:
        raise InputError(f"unknown manifest {name!r}: choose from {', '.join(MANIFESTS)}")
    return MANIFESTS[name]


def replay(
    out: Path,
    first: str | None = None,
    last: str | None = None,
    shorten: int = 1,
    init: Path | None = None,
    device: str = "cpu",
    manifest: Manifest = BOTH,
) -> None:
    """Run the entries of a manifest from `first` to `last` in the folder `out`; those that are finished are kept.

    shorten: steps and numbers of videos are divided by it. init: the pair whose weights those stages start from that
    can. device: of the stages that can train on a GPU.

    Raises InputError: an unknown name; `out` lacks what an entry needs, or holds a run with other settings; a manifest
    that takes results from a pair, without one.
    """
    if shorten < 1:
        raise InputError(f"--shorten must be at least 1, not {shorten}")
    entries = manifest.selected(first, last)
    if manifest.of_pair and not init:
        raise InputError(f"this manifest takes {', '.join(manifest.of_pair)} from a pair: give its folder as --init")
    if init:
        check_pair(init)
    with claimed(out):
        finished = journal(out)
        for number, entry in enumerate(entries, 1):
            title = f"[{number}/{len(entries)}] {entry.name}"
            settings = describe(manifest, entry, shorten)
            if entry.name in finished:
                if finished[entry.name] != settings:
                    raise InputError(f"{out} holds {entry.name} with other settings: give another --out")
                print(f"{title}: finished", flush=True)
                continue
            print(f"{title}: {summary(entry, settings)}", flush=True)
            execute(stage_of(manifest, entry), run_of(manifest, entry, out, settings, init, device))
            finished[entry.name] = settings
            write_json(out / JOURNAL, finished)


def journal(out: Path) -> dict[str, Any]:
    """The settings of the finished runs in a folder, by their names."""
    path = out / JOURNAL
    return read_json(path, "replay journal") if path.exists() else {}


def stage_of(manifest: Manifest, entry: Entry) -> Stage:
    """The stage that an entry runs."""
    if entry.stage != AVERAGE:
        return STAGES[entry.stage]
    shares = entry.settings["shares"]
    needs = tuple(name if name in manifest.of_pair else manifest.folder(name) for name in shares)
    return Stage(AVERAGE, "teacher.average:average", (f"{entry.folder}/teacher",), needs)


def describe(manifest: Manifest, entry: Entry, shorten: int = 1) -> dict[str, Any]:
    """The settings that an entry is run with, `until` among them, as JSON values."""
    packaged = settings_of(stage_of(manifest, entry))
    shared = {name: value for name, value in manifest.settings.items() if name in packaged}
    settings = packaged | shared | dict(entry.settings) | {"until": entry.until}
    return json.loads(json.dumps(_shortened(settings, shorten)))


def _shortened(value: Any, shorten: int, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _shortened(part, shorten, key) for key, part in value.items()}
    if isinstance(value, int) and name in SHORTENED:
        return min(value, max(SHORTENED[name], value // shorten))
    return value


def run_of(
    manifest: Manifest, entry: Entry, out: Path, settings: dict[str, Any], init: Path | None, device: str
) -> Run:
    """The run of an entry in the folder `out`."""
    stage, config = stage_of(manifest, entry), dict(settings)
    start = None
    if stage.start and entry.start:
        start = out.joinpath(manifest.folder(entry.start), *stage.start.split("/")[1:])
    elif stage.part and init:
        start = part_of_pair(stage, init)
    return Run(
        out,
        out / entry.folder,
        config,
        start,
        device if stage.gpu else "cpu",
        until=config.pop("until"),
        continues=out / manifest.folder(entry.continues) if entry.continues else None,
        instead={place: manifest.folder(name) for place, name in entry.instead.items()},
        given={result: init / place for result, place in manifest.of_pair.items()} if init else {},
    )


def summary(entry: Entry, settings: dict[str, Any]) -> str:
    """The stage, the origin and the length of an entry's run in one line."""
    parts = [f"stage {entry.stage}"]
    if entry.start or entry.continues:
        parts.append(f"continues {entry.continues}" if entry.continues else f"from {entry.start}")
    if entry.stage == AVERAGE:
        parts.append(", ".join(f"{share:g} of {name}" for name, share in entry.settings["shares"].items()))
    if "steps" in settings:
        parts.append(f"{settings['until'] or settings['steps']} steps")
    return "; ".join(parts)


def listing(manifest: Manifest = BOTH) -> str:
    """A manifest as text: every run with its result, and what a replay does in another way."""
    lines = []
    for entry in manifest.entries:
        lines.append(f"{entry.name}: {summary(entry, describe(manifest, entry))}")
        if entry.result:
            lines.append(f"    gave: {entry.result}")
        if entry.unlike:
            lines.append(f"    not exactly repeatable: {entry.unlike}")
    return "\n".join(lines)
