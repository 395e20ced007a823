"""A LoRA for writing queries: it is applied while the Teacher writes, and the losses do not change by it."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3VLForConditionalGeneration

from tests.tiny_teacher import tiny_qwen3_vl
from vlmteacher.errors import InputError
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

QUERIES = QuerySet("Is the red ball on the square?", ("Is the red ball red?",))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint with a random LoRA of all its linear layers, as peft saves it."""
    path = tiny_qwen3_vl(tmp_path_factory.mktemp("teacher"))
    model = Qwen3VLForConditionalGeneration.from_pretrained(path)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(path / "writer")
    (path / "teacher.json").write_text('{"writer": "writer"}')
    return path


def test_the_lora_is_on_in_writing_alone(path, monkeypatch):
    teacher = load_teacher(path)
    video = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    modules, judged = dict(teacher.model.named_modules()), teacher.losses(video, range(4), 8.0, QUERIES)
    ids = torch.tensor([teacher.tokenizer("Is the red ball on the square?").input_ids])
    plain = teacher.model(input_ids=ids).logits
    logits = []

    def generate(self, inputs, sample):
        logits.append(self.model(input_ids=ids).logits)
        return QUERIES.to_json()

    monkeypatch.setattr(QwenVLTeacher, "_generate", generate)
    for _ in range(2):  # a second time as the first
        teacher.write_queries("Move it.")
    stock = Qwen3VLForConditionalGeneration.from_pretrained(path)
    stock.load_adapter(str(path / "writer"))
    torch.testing.assert_close(logits[0], stock(input_ids=ids).logits)
    assert torch.equal(logits[0], logits[1]) and (logits[0] - plain).abs().max() > 0.01
    assert dict(teacher.model.named_modules()) == modules
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert torch.equal(teacher.model(input_ids=ids).logits, plain)
    assert torch.equal(teacher.losses(video, range(4), 8.0, QUERIES), judged)


def test_free_text_is_written_without_it(path):
    plain, writing = (load_teacher(path) for _ in range(2))
    plain.writer = None
    images = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))]
    assert writing.writer and writing.answer("What moves?", images, 8) == plain.answer("What moves?", images, 8)


def test_nothing_is_drawn_from_the_global_generator(path, monkeypatch):
    monkeypatch.setattr(QwenVLTeacher, "_generate", lambda *_: QUERIES.to_json())
    state = torch.get_rng_state()
    load_teacher(path).write_queries("Move it.")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_layers_come_back_where_writing_fails(path, monkeypatch):
    teacher = load_teacher(path)
    modules = dict(teacher.model.named_modules())
    monkeypatch.setattr(QwenVLTeacher, "_generate", lambda *_: "no queries")
    with pytest.raises(InputError):
        teacher.write_queries("Move it.")
    assert dict(teacher.model.named_modules()) == modules


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda writer: shutil.rmtree(writer), "adapter_config.json"),
        (lambda writer: (writer / "adapter_model.safetensors").write_bytes(b"{}"), "header"),
        (lambda writer: (writer / "adapter_config.json").write_text("{"), "Expecting"),
        (lambda writer: change(writer, r=8), "size mismatch|shape"),
        (lambda writer: change(writer, target_modules=["q_proj"]), "do not agree on"),
        (lambda writer: change(writer, target_modules=["nothing"]), "nothing"),
    ],
)
def test_a_writer_that_cannot_be_used_is_named(path, tmp_path, spoil, what):
    copy = tmp_path / "teacher"
    shutil.copytree(path, copy)
    spoil(copy / "writer")
    with pytest.raises(InputError, match=f"its writer 'writer' cannot be used: .*({what})") as error:
        load_teacher(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def change(writer, **entries):
    file = writer / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
