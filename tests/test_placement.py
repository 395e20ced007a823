"""Parts on several devices, and parts that wait in main memory; the second device is that of `other_device.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.other_device import There, other_device
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher import InputError, QuerySet, TeacherPipeline
from vlmteacher.baselines.best_of_n import best_of_n
from vlmteacher.placement import find_device, find_devices, parse_device_map
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

CPU, META = torch.device("cpu"), torch.device("meta")
MAPS = [
    {"reasoner": "cpu", "teacher": "meta"},
    {"reasoner": "meta", "teacher": "cpu"},
    {"reasoner": "meta", "teacher": "meta"},
]


def call(pipe: TeacherPipeline, **keywords: Any) -> Any:
    """Three updates. PEFT's own LoRA layers: ours asks torch about autocast, which knows none on "meta"."""
    values: dict[str, Any] = {"queries": QuerySet.from_dict(QUERIES), "max_steps": 3, **keywords}
    generator = torch.Generator().manual_seed(0)
    fixed = {"rank": 2, "teacher_frames": 4, "learning_rate": 0.03, "progress": False, "fused_lora": False}
    return pipe(PROMPT, generator=generator, output_type="pt", **fixed, **values)


@pytest.fixture(scope="module")
def expected(models: dict[str, str]) -> Any:
    return call(TeacherPipeline.from_pretrained(**models))


def test_the_second_device_is_one() -> None:
    x = torch.ones(3, requires_grad=True)
    with other_device():
        there = torch.arange(3.0).to("meta")
        with pytest.raises(RuntimeError, match="same device"):
            x + there
        (x.to("meta") * there * torch.tensor([2.0], device="meta")).sum().backward()
        assert isinstance(there, There) and (there * 2).to("cpu").tolist() == [0, 2, 4]
    assert x.grad is not None and x.grad.tolist() == [0, 2, 4] and not isinstance(x.grad, There)


@pytest.mark.parametrize(
    ("device_map", "offload"),
    [
        (MAPS[0], True),
        (MAPS[1], False),
        *(pytest.param(MAPS[number], number > 0, marks=pytest.mark.slow) for number in range(3)),
        pytest.param(MAPS[2], False, marks=pytest.mark.slow),
    ],
)
def test_frames_and_gradients_cross_devices(
    models: dict[str, str], expected: Any, device_map: dict[str, str], offload: bool
) -> None:
    pipe = TeacherPipeline.from_pretrained(**models, offload=offload)
    with other_device():
        pipe.to(device_map)
        homes = {part: torch.device(where) for part, where in device_map.items()}
        assert pipe.devices == homes and device_of(pipe.decoder) == pipe.reasoner.device == homes["reasoner"]
        if not offload:
            assert {device_of(n) for n in pipe.reasoner.networks.values()} == {homes["reasoner"]}
            assert pipe.teacher.device == homes["teacher"]
        out = call(pipe)
        frames = out.frames.to("cpu")
    for ours, theirs in zip(out.history, expected.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        # Adam's first update is the sign of the gradient, even where that is nothing but rounding.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3 if ours["step"] else 1e-5)
    assert out.updates == 3 and len({round(row["loss"], 4) for row in out.history}) == 3
    change = (expected.frames - expected.frames_before).abs().max()
    assert (frames - expected.frames).abs().max() < 0.02 * change


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def watched(pipe: TeacherPipeline) -> Iterator[list[tuple[str, set[str]]]]:
    """What runs, and which networks are on the device then; what follows the same again is left out."""
    networks = {**pipe.reasoner.networks, "teacher": pipe.teacher.model}
    seen: list[tuple[str, set[str]]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            row = name, {other for other, network in networks.items() if device_of(network) == META}
            if [row] != seen[-1:]:
                seen.append(row)

        return hook

    inner = {"vae": networks["vae"].decoder, "teacher": pipe.teacher.model.lm_head}  # those that are called themselves
    runs = {**networks, **inner, "surrogate": pipe.decoder.decoder[0]}
    handles = [module.register_forward_pre_hook(look(name)) for name, module in runs.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("check_final", [False, True])
def test_what_is_not_needed_waits_in_main_memory(models: dict[str, str], check_final: bool, monkeypatch: Any) -> None:
    def write(self: QwenVLTeacher, prompt: str, image: Any = None) -> QuerySet:
        """A random Teacher writes none; it runs all the same."""
        self._generate(self._query_inputs(prompt, image), sample=False)
        return QuerySet.from_dict(QUERIES)

    monkeypatch.setattr(QwenVLTeacher, "write_queries", write)
    monkeypatch.setattr(f"{QwenVLTeacher._generate.__module__}.MAX_NEW_TOKENS", 2)
    pipe = TeacherPipeline.from_pretrained(**models, offload=True)
    with other_device():
        pipe.to("meta")
        everything = {**pipe.reasoner.networks, "teacher": pipe.teacher.model}
        assert {device_of(network) for network in everything.values()} == {CPU}
        with watched(pipe) as seen:
            threshold = 50.0 if check_final else 1e-6  # content with the first step, so that the video is looked at
            call(pipe, queries=None, check_final=check_final, threshold=threshold, max_steps=1)
        loop = {"transformer", "teacher"} | ({"vae"} if check_final else set())
        final = [("transformer", loop), ("vae", loop), ("teacher", loop)]
        alone = [("transformer", {"transformer"}), ("vae", {"vae"}), ("teacher", {"teacher"})]
        assert seen == [
            ("text_encoder", {"text_encoder", "vae"}),
            ("teacher", {"teacher"}),  # writes
            ("transformer", loop),
            ("surrogate", loop),
            ("teacher", loop),
            *(final if check_final else alone),
            *alone,  # the video from before
        ]
        assert {device_of(network) for network in everything.values()} == {CPU}  # between calls the device is free


def test_without_offload_nothing_is_moved(models: dict[str, str]) -> None:
    pipe = TeacherPipeline.from_pretrained(**models)
    with other_device():
        pipe.to("meta")
        with watched(pipe) as seen:
            call(pipe, max_steps=1)
        assert {frozenset(there) for _, there in seen} == {frozenset(("transformer", "vae", "text_encoder", "teacher"))}


def test_best_of_n_needs_no_more_than_it_says(models: dict[str, str]) -> None:
    queries = QuerySet.from_dict(QUERIES)
    pipe = TeacherPipeline.from_pretrained(**models)
    pipe.defaults = type(pipe.defaults)(teacher_frames=4)
    expected = best_of_n(pipe, PROMPT, None, [0, 1], queries)
    pipe = TeacherPipeline.from_pretrained(**models, offload=True)
    with other_device():
        pipe.to("meta")
        pipe.defaults = type(pipe.defaults)(teacher_frames=4)
        with watched(pipe) as seen:
            found = best_of_n(pipe, PROMPT, None, [0, 1], queries)
        assert all(name in there and len(there) <= 2 for name, there in seen)
    assert found.losses == pytest.approx(expected.losses, abs=1e-5) and found.best == expected.best


def test_to_takes_one_device_or_a_map(models: dict[str, str]) -> None:
    pipe = TeacherPipeline.from_pretrained(**models)
    with other_device():
        assert pipe.to("meta") is pipe and pipe.devices == {"reasoner": META, "teacher": META}
        pipe.to({"reasoner": "cpu", "teacher": META})
        assert (device_of(pipe.reasoner.transformer), pipe.teacher.device) == (CPU, META)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"reasoner": "cpu", "tutor": "cpu"}, "unknown part 'tutor': the parts are reasoner and teacher"),
        ({"reasoner": "cpu", "decoder": "cpu"}, "unknown part 'decoder'"),
        ({"reasoner": "cpu"}, "no device for the teacher"),
        ({}, "no device for the reasoner"),
        ({"reasoner": "cpu", "teacher": "cuda:77"}, "device_map: teacher=cuda:77 cannot be used here"),
        ({"reasoner": "abacus", "teacher": "cpu"}, "device_map: reasoner=abacus cannot be used here"),
        ({"reasoner": "cpu", "teacher": None}, "no device for the teacher"),
        ("meta", "device meta cannot be used here"),
    ],
)
def test_bad_maps_are_named_before_a_model_is_loaded(device_map: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        TeacherPipeline.from_pretrained("no-such/model", device_map=device_map)
    assert "\n" not in str(error.value)


def test_the_map_of_the_command_line() -> None:
    assert parse_device_map(" reasoner=cuda:0, teacher = cpu") == {"reasoner": "cuda:0", "teacher": "cpu"}
    for text in ("", "cuda", "reasoner=", "=cpu", "reasoner=cpu,", "reasoner=cpu,reasoner=cpu"):
        with pytest.raises(InputError, match="not of the form reasoner=cuda:0,teacher=cuda:1"):
            parse_device_map(text)


def test_one_device_is_meant_for_both() -> None:
    assert find_devices("cpu") == {"reasoner": CPU, "teacher": CPU} and find_device(CPU) == CPU
