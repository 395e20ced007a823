"""GLM-4.xV: its text and sizes against transformers' own processors, and where its answer is read."""

from __future__ import annotations

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.video_utils import VideoMetadata

from tests.tiny_teacher import tiny_glm4v, tiny_glm4v_moe
from vlmteacher.errors import InputError
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.base import adopt_teacher
from vlmteacher.teachers.preprocessing import preprocess_video, video_size

# by its full name: without torchvision transformers' lazy package hands out a placeholder instead
stock = importlib.import_module("transformers.models.glm4v.video_processing_glm4v")
stock_images = importlib.import_module("transformers.models.glm4v.image_processing_pil_glm4v")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_glm4v(tmp_path_factory.mktemp("glm4v"))


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def stock_text(processor, indices, tokens):
    """The text of a video of pairs of `tokens` visual tokens, by the stock processor's own code."""
    metadata = VideoMetadata(total_num_frames=400, fps=8.0, frames_indices=list(indices))
    grid = torch.tensor([[-(-len(indices) // 2), 2, 2 * tokens]])
    parts = {"image_token": "<|image|>", "video_processor": SimpleNamespace(merge_size=2)}
    own = SimpleNamespace(**parts)
    own.replace_frame_token_id = lambda *args, **rest: processor.replace_frame_token_id(own, *args, **rest)
    return processor.replace_video_token(own, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)


@pytest.mark.parametrize("indices", [range(0, 60, 5), [3], [0, 9, 20]])
@pytest.mark.parametrize("processor", [Glm4vProcessor, Glm46VProcessor])
def test_the_text_of_a_video_is_that_of_the_stock_processor(copied, processor, indices):
    (copied / "preprocessor_config.json").write_text(json.dumps({"processor_class": processor.__name__}))
    teacher = load_teacher(copied)
    clip = teacher.clip(indices, 8.0, 32, 48)
    assert teacher.video_text(clip) == stock_text(processor, indices, teacher.patches_per_frame(clip.size) // 4)


def test_the_tokenizer_may_name_the_processor_too(copied):
    assert not load_teacher(copied).has_tenths
    file = copied / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": "Glm46VProcessor"}))
    assert load_teacher(copied).has_tenths


def test_sizes_are_those_of_the_stock_processors(checkpoint):
    settings = load_teacher(checkpoint).video
    limits = {"min_pixels": settings.min_pixels, "max_pixels": 100_000, "factor": 16, "temporal_factor": 2}
    settings = settings.updated({"size": {"longest_edge": 100_000, "shortest_edge": settings.min_pixels}}, "it")
    generator = torch.Generator().manual_seed(0)
    for frames, height, width in torch.randint(2, 300, (200, 3), generator=generator).tolist():
        assert video_size(frames, height, width, settings) == stock.smart_resize(frames, height, width, **limits)
        image = stock_images.smart_resize(2, height, width, **limits)
        grid = preprocess_video(torch.empty(1, 3, height, width), settings)[1]
        assert (grid[0, 1:] * 8).tolist() == list(image)


@pytest.mark.parametrize("make", [tiny_glm4v, tiny_glm4v_moe])
def test_the_answer_is_read_in_the_box_behind_a_thought_of_nothing(make, tmp_path):
    teacher = load_teacher(make(tmp_path))
    prompt, answer = teacher._question_chat("Do you <think> so?", "")
    before = {tiny_glm4v: "<think></think><answer>", tiny_glm4v_moe: "<think></think>\n"}[make]
    assert teacher.tokenizer.decode(prompt).endswith(f"Answer Yes or No.<|assistant|>\n{before}<|begin_of_box|>")
    assert teacher.tokenizer.decode(answer) == "Yes"
    written = teacher._query_inputs("Move it.", None)["input_ids"][0]
    assert teacher.tokenizer.decode(written).endswith("<|assistant|>\n" + before)  # free text has no box


def test_a_template_that_opens_a_thought_is_refused(copied):
    file = copied / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>{% endif"))
    with pytest.raises(InputError, match=r"opens a thought \(<think>\)"):
        load_teacher(copied)


def test_a_free_answer_ends_with_its_tag(checkpoint, monkeypatch):
    teacher = load_teacher(checkpoint)
    tokenizer = teacher.tokenizer
    end = tokenizer.convert_tokens_to_ids("</answer>")
    ids = [*tokenizer("Yes red ball", add_special_tokens=False)["input_ids"], end]
    given = {}

    def generate(**inputs):
        given.update(inputs)
        return torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)

    monkeypatch.setattr(teacher.model, "generate", generate)
    assert teacher.answer("Is it?", (), len(ids)) == "Yes red ball"
    assert end in given["eos_token_id"] and tokenizer.convert_tokens_to_ids("<|user|>") in given["eos_token_id"]


def test_another_activation_is_refused(tmp_path):
    path = tiny_glm4v(tmp_path, text={"hidden_act": "gelu"})
    with pytest.raises(InputError, match="hidden_act is 'gelu'; only silu"):
        load_teacher(path)


@pytest.mark.parametrize("name", ["Glm4vProcessor", "Glm46VProcessor"])
def test_a_loaded_model_takes_the_times_of_its_processor(checkpoint, name):
    teacher = load_teacher(checkpoint)
    videos = stock.Glm4vVideoProcessor(patch_size=8)
    parts = {"tokenizer": teacher.tokenizer, "video_processor": videos, "image_processor": None}
    adopted = adopt_teacher(teacher.model, type(name, (SimpleNamespace,), {})(**parts))
    assert adopted.has_tenths == (name == "Glm46VProcessor")
    assert adopted.video_text(adopted.clip([3], 8.0, 32, 32)).endswith("0.4 seconds" if adopted.has_tenths else ">0")
