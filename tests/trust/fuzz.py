"""Inputs made at random for everything that reads what a user or a hub gives: each gives a value or an InputError.

A target draws an input from a hypothesis strategy and reads it. Documents of ours are damaged where they are: a value
is replaced by one of another kind, an entry left out or doubled, bytes changed, cut off or put in. Some inputs would
run code, or take all memory, in a reader that trusts them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests.tiny_models import TINY_SETTINGS
from tests.tiny_pair import PROMPT, QUERIES, tiny_decoder, tiny_pair

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """name: of what is read. inputs: what to try. read: does it; its file is in the folder that is given too."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], Any]
    cost: int = 1  # how many examples of a cheap target take as long as one of this


# ------------------------------------------------------------------ values

TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\ud800", "\0", "../../../etc/passwd", "a" * 5000, "<|im_end|>", "--help", "{prompt}", "nan"]
    ),
)
NUMBERS = st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e308, 1e-320, True, 10**18])
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4),
    max_leaves=8,
)
RAW_JSON = (
    b"", b"null", b"[]", b"{}", b"3", b'"text"', b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"goal": 1' + b"0" * 400 + b"}",
    b"[" * 100_000, b'{"a":' * 50_000, b'{"goal": "x", "goal": "y"}', b'{"goal": NaN}', b'{"goal": -Infinity}',
    b'{"goal": 1e999}', b'{"goal": "\\ud800"}', b'{"goal": "\\u0000"}', b"1" * 5000, b"\0" * 100,
    b'{"__class__": "os.system"}', b"// a comment\n{}", b"{'goal': 'x'}",
)  # fmt: skip


@st.composite
def damaged_values(draw: Any, valid: Any) -> Any:
    """`valid` with one or two values in it replaced, left out or renamed."""
    root = [json.loads(json.dumps(valid))]
    for _ in range(draw(st.integers(1, 2))):
        node: Any = root
        place: Any = 0
        while isinstance(node[place], (dict, list)) and node[place] and draw(st.integers(0, 3)):
            node = node[place]
            place = (
                draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else draw(st.integers(0, len(node) - 1))
            )
        if isinstance(node, dict) and draw(st.integers(0, 3)) == 0:
            moved = node.pop(place)
            if draw(st.booleans()):
                node[draw(st.text(max_size=8))] = moved
        else:
            node[place] = draw(VALUES)
    return root[0]


@st.composite
def damaged_bytes(draw: Any, valid: bytes, most: int = 4) -> bytes:
    """`valid` with bytes changed, cut off, doubled or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == 2 and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == 3:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at : at + draw(st.integers(1, 16))]
    return bytes(data)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def documents(valid: Any) -> st.SearchStrategy[bytes]:
    """JSON files that are nearly this one, and others."""
    return st.one_of(
        damaged_values(valid).map(as_json),
        damaged_bytes(as_json(valid)),
        st.sampled_from(RAW_JSON),
        VALUES.map(as_json),
    )


# ------------------------------------------------------------------ files to begin from


@cache
def folder() -> Path:
    """One for all targets, removed at the end of the process."""
    import atexit

    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def pair() -> dict[str, str]:
    return tiny_pair(folder() / "pair")


@cache
def pipe() -> Any:
    from vlmteacher.pipeline import TeacherPipeline

    return TeacherPipeline.from_pretrained(**pair())


def marker() -> Path:
    """What only code in an input can make."""
    return folder() / "ran"


class Code:
    """A pickle that opens `marker` for writing when it is read."""

    def __reduce__(self) -> Any:
        return open, (str(marker()), "w")


def pickled(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@cache
def decoder_file(suffix: str) -> bytes:
    path = tiny_decoder(folder() / "seed.safetensors")
    if suffix == ".safetensors":
        return path.read_bytes()
    from safetensors.torch import load_file

    return pickled(load_file(path))


LORA_NAMES = (  # of diffusers, ComfyUI, musubi-tuner, DiffSynth; each with what else may stand there
    ("transformer.blocks.{}.attn1.to_q.lora_A.weight", "transformer.blocks.{}.attn1.to_q.lora_B.weight", None),
    ("diffusion_model.blocks.{}.self_attn.q.lora_A.weight", "diffusion_model.blocks.{}.self_attn.q.lora_B.weight",
     "diffusion_model.blocks.{}.self_attn.q.diff_b"),
    ("lora_unet_blocks_{}_self_attn_q.lora_down.weight", "lora_unet_blocks_{}_self_attn_q.lora_up.weight",
     "lora_unet_blocks_{}_self_attn_q.alpha"),
    ("blocks.{}.self_attn.q.lora_A.default.weight", "blocks.{}.self_attn.q.lora_B.default.weight",
     "blocks.{}.self_attn.norm_q.diff"),
)  # fmt: skip


@cache
def lora_files() -> tuple[bytes, ...]:
    files = []
    for down, up, other in LORA_NAMES:
        tensors = {}
        for block in range(2):
            tensors |= {down.format(block): torch.ones(2, 32), up.format(block): torch.zeros(32, 2)}
            if other:
                tensors[other.format(block)] = torch.tensor(2.0) if other.endswith("alpha") else torch.zeros(32)
        files.append(save(tensors, metadata={"format": "pt"}))
    return tuple(files)


def lora_inputs() -> st.SearchStrategy[bytes]:
    return st.one_of(*map(safetensors_files, lora_files()), st.sampled_from(lora_files()))


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {"attn1.to_q": 8},
    "target_modules": ["to_q"], "use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False,
}  # fmt: skip


def lora_folder(data: bytes, where: Path) -> Any:
    from vlmteacher.lora.formats import read_lora

    written(data, where / "adapter/adapter_config.json")
    written(lora_files()[0], where / "adapter/adapter_model.safetensors")
    return read_lora(where / "adapter")


def image_file(format: str, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (20, 14), (30,) * len(mode) if mode in ("RGB", "RGBA") else 120).save(data, format)
    return data.getvalue()


@st.composite
def safetensors_files(draw: Any, valid: bytes) -> bytes:
    """Damaged anywhere, and with a header that says something else."""
    if draw(st.booleans()):
        return draw(damaged_bytes(valid))
    size = struct.unpack("<Q", valid[:8])[0]
    header = json.loads(valid[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    change = draw(st.integers(0, 5))
    if change == 0:
        header[name]["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, -1]), max_size=6))
    elif change == 1:
        header[name]["dtype"] = draw(st.sampled_from(["F64", "I64", "BOOL", "F8_E4M3", "BF16", "X", "", None]))
    elif change == 2:
        header[name]["data_offsets"] = draw(st.lists(st.sampled_from([0, 1, 8, 2**40, -1]), min_size=2, max_size=3))
    elif change == 3:
        header[draw(TEXT)] = header.pop(name)
    elif change == 4:
        header["__metadata__"] = draw(VALUES)
    else:
        header = draw(damaged_values(header))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text), len(text) + 8, 0, 2**63, 100 * 2**20]))
    return struct.pack("<Q", length) + text + valid[8 + size :]


# ------------------------------------------------------------------ targets


def written(data: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def queries(data: bytes, where: Path) -> Any:
    from vlmteacher.queries import QuerySet

    return QuerySet.load(written(data, where / "queries.json"))


def query_text(text: str, where: Path) -> Any:
    from vlmteacher.queries import QuerySet

    return QuerySet.from_json(text)


def run_record(data: bytes, where: Path) -> Any:
    from vlmteacher.runs.folder import RunFolder

    written(data, where / "run/run.json")
    return RunFolder(where / "run", resume=True)


def run_state(data: bytes, where: Path) -> Any:
    from vlmteacher.state import read_state

    return read_state(written(data, where / "state.pt"), "vlmteacher run 1", 2**24)


def reasoner_settings(data: bytes, where: Path) -> Any:
    from vlmteacher.reasoners.sampling import SamplerSettings

    return SamplerSettings.load(written(data, where / "reasoner.json"))


def model_index(data: bytes, where: Path) -> Any:
    """A pipeline's index: of all that it names, nothing is there."""
    from vlmteacher.errors import InputError
    from vlmteacher.reasoners.loading import load_reasoner

    written(data, where / "model/model_index.json")
    try:
        load_reasoner(where / "model")
    except InputError:
        return
    raise AssertionError("a model without weights was loaded")


def pair_description(data: bytes, where: Path) -> Any:
    from vlmteacher.pipeline import read_pair

    written(data, where / "pair/pair.json")
    return read_pair(where / "pair")


def teacher_style(data: bytes, where: Path) -> Any:
    from vlmteacher.queries import QueryStyle

    return QueryStyle.load(written(data, where / "teacher.json"))


def teacher_config(change: tuple[str, bytes], where: Path) -> Any:
    """A whole Teacher of which one file is another."""
    from vlmteacher.teachers import load_teacher

    name, data = change
    model = where / "teacher"
    if not model.exists():
        shutil.copytree(pair()["teacher"], model)
    kept = (model / name).read_bytes()
    try:
        written(data, model / name)
        return load_teacher(model)
    finally:
        written(kept, model / name)


def part_config(change: tuple[str, bytes], where: Path) -> Any:
    """A whole Reasoner of which one file is another."""
    from vlmteacher.reasoners.loading import load_reasoner

    name, data = change
    model = where / "reasoner"
    if not model.exists():
        shutil.copytree(pair()["reasoner"], model)
    kept = (model / name).read_bytes()
    try:
        written(data, model / name)
        return load_reasoner(model)
    finally:
        written(kept, model / name)


def lora(data: bytes, where: Path) -> Any:
    from vlmteacher.lora.formats import read_lora

    read = read_lora(written(data, where / "lora.safetensors"))
    for style in ("diffusers", "comfyui", "musubi"):
        read.to_bytes(style)  # type: ignore[arg-type]


def decoder(file: tuple[str, bytes], where: Path) -> Any:
    from vlmteacher.decoders import SurrogateDecoder

    suffix, data = file
    return SurrogateDecoder.from_checkpoint(written(data, where / f"decoder{suffix}"))


def training_settings(file: tuple[str, bytes], where: Path) -> Any:
    from vlmteacher.baselines import flow_grpo
    from vlmteacher.distillation import decoder, distill, sft

    kind, data = file
    module = {"sft": sft, "distill": distill, "decoder": decoder, "flow_grpo": flow_grpo}[kind]
    return module.load_settings(written(data, where / "settings.yaml"), {}).to_dict()


def solve_flags(file: tuple[str, bytes], where: Path) -> Any:
    """What `solve --config` makes of a file."""
    from vlmteacher.cli import solve
    from vlmteacher.cli.defaults import checked, read_config

    commands = argparse.ArgumentParser().add_subparsers()
    solve.add(commands)
    actions = {action.dest: action for action in commands.choices["solve"]._actions}
    suffix, data = file
    path = str(written(data, where / f"flags{suffix}"))
    return {name: checked(name, value, actions, path) for name, value in read_config(path).items()}


def image(data: bytes, where: Path) -> Any:
    from vlmteacher.media import read_image

    return read_image(str(written(data, where / "image.png")))


def clip(data: bytes, where: Path) -> Any:
    from vlmteacher.media import read_clip

    return read_clip(written(data, where / "clip.mp4"), 2, 4.0)


@cache
def clip_file() -> bytes:
    import numpy as np

    from vlmteacher.media import write_video

    video = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    write_video(folder() / "seed.mp4", video, 8.0)
    return (folder() / "seed.mp4").read_bytes()


def transformer_file(data: bytes, where: Path) -> Any:
    """In the place of a Reasoner's own."""
    from vlmteacher.reasoners.loading import load_reasoner

    return load_reasoner(pair()["reasoner"], transformer=str(written(data, where / "transformer.safetensors")))


@cache
def transformer_weights() -> bytes:
    (file,) = (Path(pair()["reasoner"]) / "transformer").glob("*.safetensors")
    return file.read_bytes()


def decoder_name(text: str, where: Path) -> Any:
    from vlmteacher.decoders import SurrogateDecoder
    from vlmteacher.decoders.find import find_decoder

    return SurrogateDecoder.from_checkpoint(find_decoder(text))


def plan(change: tuple[str, bytes], where: Path) -> Any:
    """Configurations of a Reasoner that is only planned with."""
    from vlmteacher.planning.models import build_reasoner

    name, data = change
    model = where / "reasoner"
    shutil.rmtree(model, ignore_errors=True)
    for each in REASONER:
        written((Path(pair()["reasoner"]) / each).read_bytes(), model / each)
    written(data, model / name)
    return build_reasoner(str(model))


def sweep(file: tuple[str, bytes], where: Path) -> Any:
    """What a sweep left behind."""
    from vlmteacher.evaluation.methods import find_method
    from vlmteacher.evaluation.microworld import Bench
    from vlmteacher.evaluation.sweep import Folder

    out, bench, method = where / "sweep", Bench(), find_method("base")
    shutil.rmtree(out, ignore_errors=True)
    with Folder(out, bench, method, ["id"], resume=False):
        pass
    written(file[1], out / file[0])
    with Folder(out, bench, method, ["id"], resume=True):
        pass


def ruler_data(data: bytes, where: Path) -> Any:
    from vlmteacher.evaluation.ruler import read_tasks

    written(data.replace(b"\n", b" "), where / "data/data.jsonl")
    read_tasks.cache_clear()
    return read_tasks(where / "data")


def judge_reply(reply: str, where: Path) -> Any:
    """What a judge answers, and what its cache holds of that."""
    from vlmteacher.errors import InputError
    from vlmteacher.evaluation.ruler import parse_ratings

    try:
        return parse_ratings(2)(reply)
    except ValueError as error:
        raise InputError(str(error)) from error


def judge_cache(data: bytes, where: Path) -> Any:
    from vlmteacher.evaluation.judge import Judge
    from vlmteacher.evaluation.ruler import parse_ratings
    from vlmteacher.evaluation.vlm import RemoteVLM

    judge = Judge(RemoteVLM("o", "http://localhost/v1", "NO_KEY"), where, "1")
    judge.vlm.ask = lambda *_: REPLY  # type: ignore[method-assign]
    key = judge.key("", ["text"])
    written(data, where / key[:2] / f"{key}.json")
    assert judge.ask("", ["text"], parse_ratings(2))


def prompt(text: str, where: Path) -> Any:
    """To the Reasoner's text encoder and the Teacher's chat."""
    reasoner, teacher = pipe().reasoner, pipe().teacher
    reasoner.encode(text, None, 5, 32, 48)
    return teacher.write_queries(text)


def asked(texts: list[str], where: Path) -> Any:
    """Queries, to the Teacher."""
    from vlmteacher.queries import QuerySet

    queries = QuerySet(texts[0], texts[1:])
    with torch.no_grad():
        return pipe().teacher.losses(torch.zeros(2, 3, 32, 48), [0, 1], 8.0, queries)


def command_line(arguments: list[str], where: Path) -> Any:
    """Models that are not there, so that nothing is computed; any other flags. The exit status is part of it."""
    from contextlib import redirect_stderr, redirect_stdout

    from vlmteacher.cli import main

    before = sorted(each.name for each in where.iterdir())
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        status = main(arguments)
    assert status in (0, 2), f"exit status {status}"
    lines = [line for line in err.getvalue().splitlines(keepends=True) if "\r" not in line]  # of progress bars
    assert "Traceback" not in err.getvalue()
    assert status == 0 or sum(line.startswith("error: ") for line in lines) == 1, f"no reason: {err.getvalue()!r}"
    assert status == 0 or lines[-1].startswith("error: "), f"not one line: {err.getvalue()!r}"
    assert sorted(each.name for each in where.iterdir()) == before, "something was left behind"


FLAGS = (
    "--num-frames", "--height", "--width", "--max-steps", "--threshold", "--teacher-frames", "--rank", "--lr",
    "--goal-weight", "--fit",
    "--engine", "--lora-blocks", "--keep", "--target", "--frame-jitter", "--lora-decay", "--pull",
    "--frame-statistics", "--warm-start", "--warm-start-from", "--final-samples",
    "--activations", "--seed", "--num-inference-steps", "--guidance-scale", "--negative-prompt", "--preset", "--dtype",
    "--device", "--device-map", "--quantize", "--image", "--queries", "--lora", "--decoder", "--teacher", "--prompt",
    "--few-step-lora", "--transformer", "--quantize-reasoner",
)  # fmt: skip
OTHER_FLAGS = (
    "--limit", "--workers", "--seed", "--seeds", "--method", "--table", "--split", "--family", "--count", "--config",
    "--steps", "--lr", "--batch-size", "--data", "--reasoner", "--teacher", "--memory", "--dtype", "--to", "-o",
)  # fmt: skip
SWITCHES = (
    "--check-final",
    "--no-check-final",
    "--fused-lora",
    "--preserve",
    "--offload",
    "--resume",
    "--help",
    "--what",
)
GIVEN = st.one_of(
    TEXT, NUMBERS.map(str), st.sampled_from(["cpu", "meta", "last:1", "1e400", "-5", "reasoner=cpu", "/dev/null"])
)


@st.composite
def solve_lines(draw: Any) -> list[str]:
    where = folder() / "command line"
    where.mkdir(exist_ok=True)
    command = draw(st.sampled_from(["solve", "queries"]))
    line = [command, "--prompt", draw(GIVEN)]
    for flag in draw(st.lists(st.sampled_from(FLAGS), max_size=3)):
        line += [flag, draw(GIVEN)]
    line += draw(st.lists(st.sampled_from(SWITCHES), max_size=1))
    missing = str(folder() / "no such model")
    if command == "queries":
        return [*line, "--teacher", missing]
    return [*line, "--out", str(where / "out"), "--reasoner", missing]


@st.composite
def other_lines(draw: Any) -> list[str]:
    command = draw(
        st.sampled_from(
            [
                ["lora", "convert"], ["bench", "microworld", "--out", "/proc/x"], ["distill", "decoder"], ["env"],
                ["distill", "reasoner"], ["microworld", "measure", "--reasoner", "/nowhere"], ["plan"],
                ["microworld", "export", "--out", "/proc/x"], ["train-microworld", "--stage", "x"], [],
                ["demo", "--out", "/proc/x"], ["train", "sft"],
            ]
        )
    )  # fmt: skip
    line = list(command)
    for flag in draw(st.lists(st.sampled_from(OTHER_FLAGS), max_size=3)):
        line += [flag, draw(GIVEN)]
    return line + draw(st.lists(GIVEN, max_size=1))


YAML = (
    b"", b"- 1\n", b"a: &a [x]\nb: [*a, *a]\n", b"x: !!python/object/apply:os.system ['true']\n", b"a: 1\na: 2\n",
    b"? [1, 2]\n: 3\n", b"a: 2001-99-99\n", b"a: 2001-01-01\n", b"a: .nan\n", b"a: " + b"9" * 5000, b"[" * 5000,
    b"a: !!binary aGk=\n", b"a: !!set {x, y}\n", b"\0", b"a: \xff", b"%YAML 9.9\n---\na: 1\n", b"--- a\n--- b\n",
    b"<<: {reasoner: x}\n", b"a: 0x\n", b"a: 1_0\n", b"a: 190:20:30\n",
)  # fmt: skip
CONFIGS = {
    "sft": ROOT / "vlmteacher/distillation/configs/sft.yaml",
    "distill": ROOT / "vlmteacher/distillation/configs/dmd2.yaml",
    "decoder": ROOT / "vlmteacher/distillation/configs/decoder.yaml",
    "flow_grpo": ROOT / "vlmteacher/distillation/configs/grpo.yaml",
}


def bomb() -> bytes:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines).encode()


def yaml_files() -> st.SearchStrategy[tuple[str, bytes]]:
    import yaml

    def of(kind: str) -> st.SearchStrategy[tuple[str, bytes]]:
        text = CONFIGS[kind].read_bytes()
        code = f"x: !!python/object/apply:builtins.open ['{marker()}', 'w']\n".encode()
        data = st.one_of(
            damaged_values(yaml.safe_load(text)).map(as_json),  # which is YAML too
            damaged_bytes(text),
            st.sampled_from([*YAML, bomb(), code]),
        )
        return data.map(lambda each: (kind, each))

    return st.sampled_from(sorted(CONFIGS)).flatmap(of)


def flag_files() -> st.SearchStrategy[tuple[str, bytes]]:
    flags = {
        "prompt": "x",
        "seed": 3,
        "lr": 1e-3,
        "keep": "best",
        "offload": True,
        "queries": QUERIES,
        "reward": ["a=1"],
    }
    return st.one_of(
        documents(RECORD).map(lambda data: (".json", data)),
        st.one_of(documents(flags), st.sampled_from([*YAML, bomb()])).map(lambda data: (".yaml", data)),
    )


def decoder_files() -> st.SearchStrategy[tuple[str, bytes]]:
    wide = {"decoder.1.weight": torch.zeros(1).expand(10**6, 8, 1000, 1000)}
    odd = [
        Code(),
        {"decoder.1.weight": Code()},
        [],
        3,
        {"decoder.1.weight": 3},
        wide,
        {"decoder.0.weight": torch.zeros(2, 2)},
    ]
    return st.one_of(
        safetensors_files(decoder_file(".safetensors")).map(lambda data: (".safetensors", data)),
        damaged_bytes(decoder_file(".pth")).map(lambda data: (".pth", data)),
        st.sampled_from([*map(pickled, odd), pickle.dumps(Code())]).map(lambda data: (".pth", data)),
    )


def model_files(part: str, names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, bytes]]:
    def of(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        return documents(json.loads((Path(pair()[part]) / name).read_bytes())).map(lambda data: (name, data))

    return st.sampled_from(names).flatmap(of)


def images() -> st.SearchStrategy[bytes]:
    formats = [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "L"),
        ("PNG", "1"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
    ]
    formats += [("TIFF", "F"), ("TIFF", "I;16"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB"), ("ICO", "RGBA")]
    huge = bytearray(image_file("PNG"))
    huge[16:24] = struct.pack(">II", 10**6, 10**6)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(marker()).encode() + b") (w) file closefile\n"
    seeds = [image_file(*each) for each in formats]
    return st.one_of(
        st.sampled_from(seeds).flatmap(damaged_bytes),
        st.binary(max_size=64),
        st.sampled_from([bytes(huge), eps, *seeds]),
    )


RECORD = {
    "prompt": PROMPT, "config": {"seed": 3, "max_steps": 4}, "queries": QUERIES, "steps": [], "stopped": "interrupted",
    "updates": 0, "seconds": {}, "models": {}, "version": "0.1.0",
}  # fmt: skip
ROW = {"method": "base", "split": "id", "index": 0, "noise": 0, "success": True, "score": 1.0, "seconds": 0.1}


def states() -> st.SearchStrategy[bytes]:
    valid = pickled({"form": "vlmteacher run 1", "step": 3, "lora": {"x": torch.zeros(4)}})
    return st.one_of(
        damaged_bytes(valid), st.sampled_from([pickled(Code()), pickle.dumps(Code()), pickled([1]), valid])
    )


def sweeps() -> st.SearchStrategy[tuple[str, bytes]]:
    lines = st.one_of(
        documents(ROW).map(lambda data: data + b"\n"),
        st.sampled_from([b"}\n", b"{}\n", b"\xff}\n", b"{" * 9999 + b"}\n"]),
    )
    logs = lines.map(lambda data: ("instances.jsonl", data))
    return st.one_of(logs, documents(ROW).map(lambda data: ("settings.json", data)))


def indices() -> st.SearchStrategy[bytes]:
    return documents(json.loads((Path(pair()["reasoner"]) / "model_index.json").read_text()))


TEACHER = ("config.json", "tokenizer_config.json", "tokenizer.json")
REASONER = (
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "model_index.json",
    "reasoner.json",
)
HUB_NAMES = st.from_regex(r"[a-z./@~%-]{1,4}/[a-z./@-]{1,6}(/[a-z.]{1,4}\.pth)?(@[a-z/.]{1,4})?", fullmatch=True)
PAIR = {"reasoner": "a", "teacher": "b", "decoder": "c.pth", "defaults": {"rank": 2, "threshold": 0.1}}
STYLE = {"query_instruction": "Ask {prompt}", "own_wording": True}
CHECKLIST = [{"Rule Coherence": "Does it roll?"}, {"Visual Fidelity": "Is it sharp?"}]
RULER = {
    "prompt": PROMPT, "index": 3, "task_name": "physics", "category": "science", "implicit_explanation": "It rolls.",
    "checklist": CHECKLIST, "input_image_path": "", "gt_image_path": None,
}  # fmt: skip
REPLY = '<think>It rolls.</think><answer>["Good", "Poor"]</answer>'
TARGETS = [
    Target(
        "data of RULER-Bench",
        st.deferred(lambda: documents(RULER) | documents(RULER | {"checklist": str(CHECKLIST)})),
        ruler_data,
    ),
    Target(
        "reply of a judge",
        TEXT | damaged_bytes(REPLY.encode()).map(lambda data: data.decode(errors="replace")),
        judge_reply,
    ),
    Target("cache of a judge", st.deferred(lambda: documents({"reply": REPLY})), judge_cache, 2),
    Target("queries file", st.deferred(lambda: documents(QUERIES)), queries),
    Target("queries text", st.one_of(TEXT, damaged_values(QUERIES).map(json.dumps)), query_text),
    Target("run.json", st.deferred(lambda: documents(RECORD)), run_record),
    Target("state.pt", st.deferred(states), run_state),
    Target("pair.json", st.deferred(lambda: documents(PAIR)), pair_description),
    Target("teacher.json", st.deferred(lambda: documents(STYLE)), teacher_style),
    Target("reasoner.json", st.deferred(lambda: documents(TINY_SETTINGS)), reasoner_settings),
    Target("model_index.json", st.deferred(indices), model_index, 2),
    Target("files of a Teacher", st.deferred(lambda: model_files("teacher", TEACHER)), teacher_config, 20),
    Target("files of a Reasoner", st.deferred(lambda: model_files("reasoner", REASONER)), part_config, 20),
    Target("configurations of a plan", st.deferred(lambda: model_files("reasoner", REASONER)), plan, 10),
    Target("LoRA file", st.deferred(lora_inputs), lora),
    Target("LoRA folder", st.deferred(lambda: documents(ADAPTER)), lora_folder),
    Target("decoder file", st.deferred(decoder_files), decoder),
    Target("training settings", st.deferred(yaml_files), training_settings, 2),
    Target("flags of solve", st.deferred(flag_files), solve_flags, 4),
    Target("image", st.deferred(images), image),
    Target("clip", st.deferred(lambda: damaged_bytes(clip_file())), clip, 10),
    Target("transformer file", st.deferred(lambda: safetensors_files(transformer_weights())), transformer_file, 20),
    Target("decoder name", st.one_of(TEXT, HUB_NAMES), decoder_name),
    Target("results of a sweep", st.deferred(sweeps), sweep, 4),
    Target("prompt", TEXT, prompt, 20),
    Target("queries to a Teacher", st.lists(TEXT, min_size=1, max_size=4), asked, 5),
    Target("command line of solve and queries", solve_lines(), command_line, 4),
    Target("command line of the others", other_lines(), command_line, 4),
]


def check(target: Target, example: Any) -> None:
    """Read an input. Raises what is neither a value nor an InputError of one line, and where code was run."""
    from vlmteacher.errors import InputError

    where = folder() / target.name
    where.mkdir(exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        target.read(example, where)
    except InputError as error:
        message = str(error)
        assert message and len(message) < 20_000, f"a message of {len(message)} characters"
        message.encode()  # it is to be printed
    assert not marker().exists(), "code in the input was run"
