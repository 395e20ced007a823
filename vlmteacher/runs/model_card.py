"""The README.md beside a LoRA: its purpose, its training and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlmteacher.errors import InputError
from vlmteacher.lora.formats import read_lora
from vlmteacher.reasoners.family import Family
from vlmteacher.runs.verdict import Verdict

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(record: dict[str, Any], data: bytes) -> str:
    """Markdown with the hub's YAML front matter; of local paths it shows the last part only.

    record: results of the run, as in run.json. data: the LoRA file.
    """
    import yaml

    lora = read_lora(data)
    models = {name: ", ".join(map(_public, model.split(", "))) for name, model in record["models"].items()}
    changes = {"transformer": "the transformer", "few_step_lora": "the few-step LoRA", "fused": "the fused LoRA"}
    changed = "; ".join(f"{text} {_text(models[name])}" for name, text in changes.items() if name in models)
    base = models.get("reasoner", "a Reasoner without a name")
    on_hub = HUB_ID.fullmatch(base) is not None
    has_image = record["config"]["image"] is not None
    front: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video" if has_image else "text-to-video",
        "tags": ["lora", "vlmteacher", "test-time-optimization"],
        "instance_prompt": record["prompt"],
    }
    if not on_hub:
        del front["base_model"], front["base_model_relation"]
    queries = record["queries"]
    rows = zip(
        ["goal", *["process"] * len(queries["process"])],
        [queries["goal"], *queries["process"]],
        record["p_yes_before"] or [None] * len(record["p_yes_after"]),
        record["p_yes_after"],
        strict=True,
    )
    questions = "\n".join(
        f"| {kind} | {_text(q)} | {'-' if p is None else f'{p:.2f}'} | {after:.2f} |" for kind, q, p, after in rows
    )
    start = "" if record["loss_before"] is None else f"from {record['loss_before']:.3f} "
    settings = "\n".join(f"| {name} | {_text(str(value))} |" for name, value in record["config"].items())
    return f"""---
{yaml.safe_dump(front, allow_unicode=True, sort_keys=False).strip()}
---

# A LoRA for one video

For {_text(base)} and one prompt{" with one first frame" if has_image else ""}, trained at test time by
[vlmteacher](https://arxiv.org/abs/2606.02564): a vision-language model ({_text(models.get("teacher", "the Teacher"))})
answered the questions below about the video, and the gradient of its answers trained the LoRA.
{f"It was trained with parts from elsewhere, which are needed too: {changed}." if changed else ""}

{_fenced(record["prompt"], "text")}

| | question | P(Yes) before | P(Yes) after |
|---|---|---|---|
{questions}

The objective went {start}to {record["loss_after"]:.3f} in {record["updates"]} updates \
(stopped: {record["stopped"]}). The final video: {_outcome(record)}. P(Yes) is the opinion of the Teacher
that trained it, no independent measure.

## How to load it

{_fenced(_usage(base if on_hub else "DIRECTORY OF THE BASE MODEL", lora), "python")}

Rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.layers)} layers. The sampler must be the one that it was trained with:
the base model's few steps, from the same noise. ComfyUI and musubi-tuner name the layers otherwise:
`vlmteacher lora convert lora.safetensors --to comfyui -o FILE`.

## Settings

| | |
|---|---|
{settings}

## Licence

The LoRA is made from the weights of the base model: that model's licence says what may be done with it.
"""


def _usage(base: str, lora: Any) -> str:
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16)',
    ]
    try:
        load = lora.family.load_lora
    except InputError:
        load = Family.load_lora
    return "\n".join([*lines, load])


def _outcome(record: dict[str, Any]) -> str:
    verdict = Verdict.of(record)
    worse = (f"{_text(row['question'])} ({row['before']:.2f} to {row['after']:.2f})" for row in verdict.worse)
    return f"{verdict.outcome}; worse: {'; '.join(worse)}" if verdict.worse else verdict.outcome


def _public(model: str) -> str:
    """A hub id unchanged; of a local path the last part only, so that no directories are published."""
    if model.startswith("packaged/"):
        return f"vlmteacher's {model.replace('/', ' ')}"
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else Path(model).name


def _text(text: str) -> str:
    """Text as one line of Markdown, with its special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    """A block of code with a fence longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
