"""Write the tables of docs/results/models.md from the families, the known models and one whole step of each.

    python -m tools.models_page [--keep]

The steps of `vlmteacher plan --verify` and the Teachers' passes are run on tensors without data, which takes minutes
and no GPU; --keep leaves their two tables as they are and writes the others.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools import results_tables
from tools.results_tables import lines
from tools.settings import written
from vlmteacher.planning.models import build_teacher, known_models, read_known
from vlmteacher.planning.plan import GB, nbytes
from vlmteacher.planning.teacher import Video, language_costs, query_set, vision_costs
from vlmteacher.planning.verify import HEADER, QUESTIONS, TEACHER_FRAMES, format_verified, verify
from vlmteacher.reasoners.family import Family
from vlmteacher.reasoners.registry import FAMILIES
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.teachers.base import find_family
from vlmteacher.teachers.shared_prefix import Keep

PAGE = Path(__file__).parents[1] / "docs" / "results" / "models.md"
VIDEO = Video(tuple(range(TEACHER_FRAMES)), 24.0, 704, 1280)


marks = functools.partial(results_tables.marks, tool="models_page")


def sampling(settings: SamplerSettings) -> tuple[str, str]:
    """Steps and guidance of a preset, in words."""
    guidance = f"{settings.guidance_scale:g}" if settings.guided else "none"
    if settings.embedded_guidance is not None:
        guidance += f"; {settings.embedded_guidance:g} embedded"
    return f"{len(settings.timesteps)}, {settings.sampler}, shift {settings.shift:.3g}", guidance


def presets() -> str:
    """Hub ids, then the presets that are chosen by name only."""
    rows = []
    for family in FAMILIES:
        rows += [[f"`{hub}`", f"`{name}`", *sampling(family.presets[name])] for hub, name in family.hub_ids.items()]
    for family in FAMILIES:
        named = sorted(set(family.presets) - set(family.hub_ids.values()))
        rows += [["by name only", f"`{name}`", *sampling(family.presets[name])] for name in named]
    return lines(["hub id", "preset", "steps", "guidance"], rows)


def decoders(family: Family) -> str:
    """The surrogate decoders of a family's known models."""
    entries = [read_known(name, "reasoner") for name in known_models("reasoner")]
    names = {entry["decoder"] for entry in entries if entry["pipeline"] in family.pipelines}
    return ", ".join(f"`{name}`" for name in sorted(names))


def reasoners() -> str:
    """The families of Reasoners, and their classes in diffusers."""
    rows = [
        [family.name, f"`{family.transformer}`", ", ".join(f"`{name}`" for name in family.pipelines), decoders(family)]
        for family in FAMILIES
    ]
    return lines(["family", "transformer", "pipelines", "surrogate decoder"], rows)


def teacher_rows() -> Iterator[list[str]]:
    """One pass of each known Teacher, forward and backward to the pixels, on tensors without data."""
    for name in known_models("teacher"):
        teacher = build_teacher(name)
        family = find_family(read_known(name, "teacher")["config"]["model_type"], name)
        vision = vision_costs(teacher, VIDEO, [TEACHER_FRAMES])[TEACHER_FRAMES]
        language = language_costs(teacher, VIDEO, QUESTIONS)[Keep.ALL]
        flops = sum(cost.forward + cost.backward for cost in (vision, language))
        tokens = len(teacher.layout(VIDEO.clip(teacher), query_set(QUESTIONS)).ids)
        size = sum(p.numel() for p in teacher.model.parameters())
        yield [
            name, f"`{family.architecture}`", f"{size / 1e9:.2f} B", f"{tokens:,}", f"{flops / 1e12:,.0f}",
            f"{nbytes(teacher.model) / GB:.1f}", f"{(vision.kept + language.kept) / GB:.1f}",
        ]  # fmt: skip


def step_rows() -> Iterator[str]:
    """The rows of `vlmteacher plan --verify`."""
    return map(format_verified, verify())


def shown(rows: Iterable[list[str]] | Iterable[str]) -> Iterator:
    """The rows, with a dot on stderr for each that is done."""
    for row in rows:
        print(".", end="", file=sys.stderr, flush=True)
        yield row


def teachers() -> str:
    columns = ["Teacher", "class", "size", "tokens", "TFLOP", "weights, GB", "kept, GB"]
    return lines(columns, shown(teacher_rows()))


def steps() -> str:
    return "\n".join([HEADER, *shown(step_rows())]) + "\n"


QUICK = (presets, reasoners)
LONG = (steps, teachers)


def page(text: str, keep: bool) -> str:
    """The page's text with its tables."""
    for table in QUICK if keep else (*QUICK, *LONG):
        text = written(text, marks(table.__name__), table())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the tables of steps and Teachers as they are")
    PAGE.write_text(page(PAGE.read_text(), parser.parse_args().keep))


if __name__ == "__main__":
    main()
