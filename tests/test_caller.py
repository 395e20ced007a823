"""What surrounds a call: torch's modes, other threads, callbacks, arguments of other types."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_pipeline import call, seed
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.baselines.best_of_n import best_of_n
from vlmteacher.decoders.taehv import load_decoder
from vlmteacher.errors import OutOfMemory
from vlmteacher.ops.resize import _bands
from vlmteacher.ops.surrogate_decoder import _indices
from vlmteacher.reasoners.loading import load_reasoner
from vlmteacher.reasoners.wan.reasoner import WanReasoner
from vlmteacher.settings import Settings
from vlmteacher.teachers import load_teacher
from vlmteacher.torch_modes import deterministic

# ---------------------------------------------------------------- modes of torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Any:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of half": lambda: torch.autocast("cpu", torch.float16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
}


@pytest.fixture(scope="module")
def plain(pipe: TeacherPipeline) -> Any:
    return call(pipe, output_type="pt")


def modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def same(out: Any, plain: Any) -> bool:
    losses = [row["loss"] for row in out.history]
    return (
        out.lora == plain.lora
        and losses == [row["loss"] for row in plain.history]
        and torch.equal(out.frames, plain.frames)
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_call_inside_any_mode_gives_the_same_bits(pipe: TeacherPipeline, plain: Any, mode: str) -> None:
    with MODES[mode]():
        before = modes()
        out = call(pipe, output_type="pt")
        assert modes() == before
    assert same(out, plain) and not out.frames.is_inference()


def test_a_callback_that_leaves_modes_on_changes_nothing(pipe: TeacherPipeline, plain: Any) -> None:
    def careless(*_: Any) -> None:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_autocast_enabled("cpu", True)

    before = modes()
    assert same(call(pipe, output_type="pt", callback_on_step_end=careless), plain) and modes() == before


@pytest.mark.parametrize("mode", ["inference_mode", "autocast", "default float64", "device meta"])
def test_loading_inside_a_mode_and_calling_outside(models: dict[str, str], plain: Any, mode: str) -> None:
    with MODES[mode]():
        pipe = TeacherPipeline.from_pretrained(**models)
        pipe.to("cpu")
        queries, noise_seeds = QuerySet.from_dict(QUERIES), [0]
        pipe.defaults = Settings(teacher_frames=4)
        best_of_n(pipe, PROMPT, None, noise_seeds, queries)
    parameters = [*pipe.reasoner.transformer.parameters(), *pipe.teacher.model.parameters()]
    assert not any(p.is_inference() or p.device.type != "cpu" for p in parameters)
    pipe.defaults = Settings()
    assert same(call(pipe, output_type="pt"), plain)


@pytest.mark.parametrize("made_there", [True, False])
def test_parts_used_inside_inference_mode(models: dict[str, str], plain: Any, made_there: bool) -> None:
    """As a server's own loader makes them, or uses them in their own calls, whose caches stay."""

    def make() -> tuple[Any, Any, Any]:
        reasoner = load_reasoner(models["reasoner"])
        return reasoner, load_teacher(models["teacher"]), load_decoder(models["decoder"], reasoner)

    _indices.cache_clear()
    _bands.cache_clear()
    parts = None if made_there else make()
    with torch.inference_mode():
        reasoner, teacher, decoder = parts = parts or make()
        condition = reasoner.encode(PROMPT, None, 5, 32, 48)
        latents = reasoner.sample(condition, reasoner.noise(condition, seed()))
        asked = QuerySet.from_dict(QUERIES)
        teacher.losses(decoder.decode(latents, [0, 1, 3, 4]), [0, 1, 3, 4], 8.0, asked)
        rows = decoder.decode_rows(latents, teacher.patch_layout(4, 32, 48), [0, 1, 3, 4])
        teacher.losses(rows, [0, 1, 3, 4], 8.0, asked)
    assert not any(p.is_inference() for p in (*reasoner.transformer.parameters(), *decoder.parameters()))
    assert same(call(TeacherPipeline(*parts), output_type="pt"), plain)
    assert same(call(TeacherPipeline(*parts), output_type="pt", frame_jitter=1), call_jittered(models))


def test_networks_that_somebody_else_made_inside_inference_mode(models: dict[str, str], plain: Any) -> None:
    """Their weights lie elsewhere in memory, by which a product may round otherwise."""
    parts = TeacherPipeline.from_pretrained(**models)
    with torch.inference_mode():
        for network in (*parts.reasoner.networks.values(), parts.teacher.model, parts.decoder):
            for module in network.modules():
                for name, tensor in module._parameters.items():
                    if tensor is not None:
                        module._parameters[name] = torch.nn.Parameter(tensor.clone(), requires_grad=False)
                for name, tensor in module._buffers.items():
                    module._buffers[name] = None if tensor is None else tensor.clone()
        parts.reasoner.latents_mean = parts.reasoner.latents_mean.clone()
    assert next(parts.teacher.model.parameters()).is_inference()
    out = call(parts, output_type="pt")
    assert [row["loss"] for row in out.history] == pytest.approx([row["loss"] for row in plain.history], rel=1e-5)
    torch.testing.assert_close(out.frames, plain.frames, atol=1e-3, rtol=0)


def call_jittered(models: dict[str, str]) -> Any:
    return call(TeacherPipeline.from_pretrained(**models), output_type="pt", frame_jitter=1)


def test_a_lora_fused_inside_inference_mode(models: dict[str, str], pipe: TeacherPipeline, plain: Any) -> None:
    one, other = (TeacherPipeline.from_pretrained(**models) for _ in range(2))
    one.fuse(plain)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        other.fuse(plain)
        other.load_lora(plain)
    other.load_lora(None)
    assert same(call(other, output_type="pt"), call(one, output_type="pt"))


# ---------------------------------------------------------------- one thing at a time


def test_a_second_thread_is_refused_and_the_first_goes_on(pipe: TeacherPipeline, plain: Any) -> None:
    found: list[str] = []
    sibling = TeacherPipeline(pipe.reasoner, pipe.teacher, pipe.decoder)  # of the same models

    def elsewhere() -> None:
        for work in (
            lambda: call(pipe),
            lambda: call(sibling),
            lambda: pipe.load_lora(None),
            lambda: pipe.fuse(plain),
            lambda: pipe.to("cpu"),
            lambda: pipe.write_queries(PROMPT),
        ):
            try:
                work()
            except InputError as error:
                found.append(str(error))

    def callback(*_: Any) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    out = call(pipe, output_type="pt", max_steps=1, callback_on_step_end=callback)
    assert len(found) == 6 and all("another thread" in each and "\n" not in each for each in found)
    assert out.lora == call(pipe, max_steps=1).lora
    assert same(call(pipe, output_type="pt"), plain)


def test_two_threads_at_once_one_wins(pipe: TeacherPipeline, plain: Any) -> None:
    barrier, found = threading.Barrier(2), []

    def work() -> None:
        barrier.wait()
        try:
            found.append(call(pipe, output_type="pt"))
        except InputError as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outs = [each for each in found if not isinstance(each, InputError)]
    assert len(found) == 2 and outs and all(same(out, plain) for out in outs)


def test_a_callback_may_look_but_not_call(pipe: TeacherPipeline, plain: Any) -> None:
    found: list[str] = []

    def callback(pipe: TeacherPipeline, *_: Any) -> None:
        for work in (
            lambda: call(pipe),
            lambda: pipe.load_lora(None),
            lambda: pipe.fuse(plain),
            lambda: pipe.to("cpu"),
        ):
            with pytest.raises(InputError, match="in the middle of a call") as caught:
                work()
            found.append(str(caught.value))
        loop = pipe.loop
        assert loop is not None
        video = pipe.sample(loop.condition, loop.noise)
        pipe.judge(video, loop.frame_indices, loop.queries)

    assert same(call(pipe, output_type="pt", callback_on_step_end=callback), plain) and len(found) == 8


def test_an_error_leaves_the_pipeline_free(pipe: TeacherPipeline, plain: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        call(pipe, callback_on_step_end=fail)
    assert same(call(pipe, output_type="pt"), plain)


# ---------------------------------------------------------------- types of arguments


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": [PROMPT], "generator": [seed()]},
        {"queries": QUERIES},
        {"queries": [QUERIES["goal"], *QUERIES["process"]]},
        {"num_frames": np.int64(5), "height": np.int32(32), "width": np.uint8(48), "max_steps": np.int64(2)},
        {"learning_rate": np.float64(0.03), "rank": np.int16(2), "check_final": np.bool_(False)},
        {"negative_prompt": [""], "guidance_scale": 1},
    ],
)
def test_other_types_whose_meaning_is_plain(
    pipe: TeacherPipeline, plain: Any, given: dict[str, Any], tmp_path: Path
) -> None:
    for generator in given.get("generator", []):
        generator.manual_seed(0)
    out = call(pipe, output_type="pt", run_dir=tmp_path, **given)
    assert same(out, plain)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["rank"] == 2


def test_queries_from_a_file(pipe: TeacherPipeline, plain: Any, queries_file: Path) -> None:
    for file in (queries_file, str(queries_file)):
        assert same(call(pipe, output_type="pt", queries=file), plain)


HUGE = 10**400
BAD: list[tuple[str, Any, str]] = [
    *(("prompt", value, "prompt") for value in (None, 5, b"move", [], {"a": 1}, "\u200b \u2060")),
    *(("negative_prompt", value, "negative_prompt") for value in (5, ["a", "b"])),
    *(("generator", value, "generator") for value in (0, "0", [seed(), seed()], np.random.default_rng())),
    *(("num_frames", value, "num_frames") for value in (5.0, "5", True, None.__class__, math.nan, 10**9 + 1, HUGE)),
    *(("height", value, "height") for value in (32.0, [32], 32 * 10**6)),
    *(("width", value, "width") for value in (np.float32(48), False, 48 * 10**6)),
    *(("num_inference_steps", value, "num_inference_steps") for value in (0, 2.0, True, 10**9, HUGE)),
    *(("guidance_scale", value, "guidance_scale") for value in ("1", True, math.nan, math.inf, HUGE, 0.5, 1e300)),
    *(("max_steps", value, "max_steps") for value in (True, 2.0, "2", -1, math.nan, 10**5000)),
    *(("rank", value, "rank") for value in (True, 2.5, "2", 0, 10**9, HUGE)),
    *(("final_samples", value, "final_samples") for value in (True, 0, 1.0, 10**6)),
    *(("teacher_frames", value, "frames") for value in (6, 0, True, 4.0)),
    *(("frame_jitter", value, "frame_jitter") for value in (-1, 1.5, 10**9, 32)),
    *(
        ("learning_rate", value, "learning_rate")
        for value in (0, "1", True, math.nan, math.inf, HUGE, 1e30, None.__class__)
    ),
    *(("threshold", value, "threshold") for value in ("0.2", False, [0.2], math.nan)),
    *(("goal_weight", value, "goal_weight") for value in ("x", math.nan, 2)),
    *(("pull", value, "pull") for value in ("x", -1, 1e300)),
    *(("lora_decay", value, "lora_decay") for value in ("x", -1, 1e300)),
    *(
        (name, 1, name)
        for name in ("check_final", "fused_lora", "preserve", "deterministic", "progress", "return_dict")
    ),
    *((name, 1, name) for name in ("keep", "engine", "target", "output_type", "lora_blocks")),
    *(("queries", value, "queries") for value in (5, [], ["Is it red?", 5], {"process": []}, "/nowhere.json")),
    ("callback_on_step_end", 5, "callback_on_step_end"),
    ("resume", "yes", "resume"),
    ("output_type", np.zeros(3), "output_type"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BAD)])
def test_bad_arguments_are_named_in_one_line(
    pipe: TeacherPipeline, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(pipe, run_dir=tmp_path / "run", **{name: value})
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [5, b"run", ["run"]])
def test_a_bad_run_dir(pipe: TeacherPipeline, value: Any) -> None:
    with pytest.raises(InputError, match="output directory"):
        call(pipe, run_dir=value)


def test_absurd_sizes_say_how_much_they_need(pipe: TeacherPipeline) -> None:
    with pytest.raises(InputError, match=r"needs at least \d.* GB, cpu has \d.* GB in all: give"):
        call(pipe, num_frames=4093, height=16384, width=16384)
    for given, message in (
        ({"num_frames": 4097}, "num_frames must be at most 4093, not 4097: the transformer has no more positions"),
        ({"height": 16400}, "height must be at most 16384, not 16400"),
        ({"width": 10**6}, "width must be at most 16384, not 1000000"),
        ({"rank": 33}, "rank 33 is above 32, the full rank of the largest layer: give at most 32"),
    ):
        with pytest.raises(InputError, match=message):
            call(pipe, **given)


def test_what_runs_out_of_memory_outside_of_the_steps(pipe: TeacherPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        return torch.empty(2**55)

    with monkeypatch.context() as patch:
        patch.setattr(WanReasoner, "decode", full)
        with pytest.raises(OutOfMemory, match="does not fit in memory"):
            call(pipe)


def test_types_of_what_is_loaded(models: dict[str, str]) -> None:
    for dtype in ("bfloat16", "bf16", "torch.bfloat16", torch.bfloat16):
        for name in ("dtype", "torch_dtype"):
            keywords: dict[str, Any] = {name: dtype}
            if dtype == "bf16":
                assert TeacherPipeline.from_pretrained(**models, **keywords).reasoner.dtype == torch.bfloat16
    bad: list[dict[str, Any]] = [
        {"dtype": "int8"},
        {"dtype": torch.int8},
        {"dtype": 16},
        {"torch_dtype": "auto"},
        {"dtype": "float32", "torch_dtype": "bfloat16"},
        {"device_map": {"reasoner": "cpu"}},
        {"offload": "no"},
        {"quantize": 4},
        {"preset": 5},
        {"transformer": 5},
        {"few_step_lora": [5]},
        {"reasoner": 5},
        {"teacher": b"x"},
        {"decoder": ["x"]},
    ]
    for keywords in bad:
        with pytest.raises(InputError, match=list(keywords)[-1].split("_")[-1]) as caught:
            TeacherPipeline.from_pretrained(**models | keywords)
        assert "\n" not in str(caught.value)
    for device in (5.0, "nowhere", ["cpu"], b"cpu", 10**30, -1):
        with pytest.raises(InputError, match="device"):
            TeacherPipeline.from_pretrained(**models, device_map=device)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pair"):
        TeacherPipeline.from_pretrained(pair=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [5, ["a.safetensors"], {"a": 1}])
def test_types_of_what_is_added_later(pipe: TeacherPipeline, bad: Any) -> None:
    for work, name in (
        (pipe.load_lora, "lora"),
        (pipe.fuse, "lora"),
        (call(pipe, max_steps=0).save, "output directory"),
    ):
        with pytest.raises(InputError, match=f"{name} must be a path"):
            work(bad)
    with pytest.raises(InputError, match="teacher must be a loaded model"):
        TeacherPipeline(pipe.reasoner, bad, pipe.decoder)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_refused(pipe: TeacherPipeline, empty: str) -> None:
    """A shell makes it of a variable without value; as a path it would be the working directory."""
    for work, name in ((pipe.load_lora, "lora"), (call(pipe, max_steps=0).save, "output directory")):
        with pytest.raises(InputError, match=f"{name} is empty"):
            work(empty)
    with pytest.raises(InputError, match="decoder is empty"):
        TeacherPipeline.from_pretrained(decoder=empty)


def test_settings_of_a_pair_are_checked(pipe: TeacherPipeline) -> None:
    parts = pipe.reasoner, pipe.teacher, pipe.decoder
    for defaults, message in (({"steps": 3}, "no setting 'steps'"), ([1], "by name"), ({"rank": "2"}, "rank")):
        with pytest.raises(InputError, match=message):
            TeacherPipeline(*parts, defaults=defaults)  # type: ignore[arg-type]


# ---------------------------------------------------------------- deterministic


def test_deterministic_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    """The packaged pair, of which three threads give other bits than one without it."""
    pipe, before, found = TeacherPipeline.from_pretrained(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            folder = tmp_path / str(threads)
            queries = QuerySet.from_dict(QUERIES)
            pipe(
                "The red ball moves to the box.",
                generator=seed(),
                queries=queries,
                max_steps=2,
                threshold=1e-6,
                final_samples=1,
                deterministic=True,
                progress=False,
                run_dir=folder,
            )
            assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
            record = json.loads((folder / "run.json").read_text())
            del record["seconds"], record["memory"]
            for row in record["steps"]:
                del row["seconds"]
            assert record["config"]["deterministic"] is True
            found.append((record, *((folder / name).read_bytes() for name in ("lora.safetensors", "after.mp4"))))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_what_has_no_deterministic_way_is_refused() -> None:
    with pytest.raises(InputError, match="deterministic"), deterministic():
        raise RuntimeError("x_cuda does not have a deterministic implementation, but you set ...")
    with pytest.raises(InputError, match="CUBLAS_WORKSPACE_CONFIG"), ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        stack.enter_context(deterministic(torch.device("cuda")))
    with pytest.raises(RuntimeError, match="other"), deterministic():
        raise RuntimeError("other")


# ---------------------------------------------------------------- habits of diffusers


def test_callbacks_of_four_arguments(pipe: TeacherPipeline) -> None:
    calls: list[tuple[Any, ...]] = []

    def four(pipe: Any, step: int, timestep: float, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        calls.append((pipe, step, timestep, callback_kwargs))
        return callback_kwargs

    out = call(pipe, callback_on_step_end=four)
    assert [one[:3] for one in calls] == [(pipe, 0, 1000.0), (pipe, 1, 1000.0)]
    assert [one[3] for one in calls] == out.history
    call(pipe, callback_on_step_end=lambda *given: calls.append(given))
    assert len(calls[-1]) == 3


def test_several_instances_in_one_call(pipe: TeacherPipeline, tmp_path: Path) -> None:
    prompts, generators = [PROMPT, "move it"], [seed(0), seed(1)]
    alone = [call(pipe, prompt=prompt, generator=seed(i)) for i, prompt in enumerate(prompts)]
    outs = call(
        pipe, prompt=prompts, generator=generators, run_dir=tmp_path / "runs", queries=list(alone[0].queries.questions)
    )
    assert [out.lora for out in outs] == [out.lora for out in alone]
    assert [out.prompt for out in outs] == prompts and outs.frames[1] is outs[1].frames
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["0", "1"]
    (videos,) = call(pipe, prompt=prompts, return_dict=False, max_steps=0)
    assert len(videos) == 2 and len(videos[0]) == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", "b"], "generator": [seed()]}, "generator is a list of 1 for 2 prompts"),
        ({"prompt": ["a", "b"], "queries": [{"goal": "Is it?"}, {"process": []}]}, "goal"),
        ({"prompt": ["a", "b"], "run_dir": 3}, "run_dir"),
    ],
)
def test_lists_that_do_not_fit(pipe: TeacherPipeline, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(pipe, **changed)


def test_names_of_a_pipeline_of_diffusers(pipe: TeacherPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    pipe.set_progress_bar_config(desc="steps of mine")
    call(pipe, progress=True)
    assert "steps of mine" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    call(pipe, progress=True)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config()


def test_offload_by_diffusers_name(models: dict[str, str]) -> None:
    pipe = TeacherPipeline.from_pretrained(**models, torch_dtype="float32")
    pipe.enable_model_cpu_offload("cpu")
    assert pipe.offload and pipe.device == torch.device("cpu")
    with pytest.raises(InputError, match="nowhere"):
        pipe.enable_model_cpu_offload("nowhere")
