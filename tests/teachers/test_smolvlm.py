"""SmolVLM2: its two resizes, its text and its chat template, against transformers' own processor."""

from __future__ import annotations

import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from num2words import num2words
from PIL import Image
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor
from transformers.video_utils import VideoMetadata

from tests.tiny_teacher import tiny_smolvlm
from vlmteacher.errors import InputError
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.smolvlm import FrameSettings, in_words

# by its full name: without torchvision transformers' lazy package hands out a placeholder instead
stock = importlib.import_module("transformers.models.smolvlm.video_processing_smolvlm")
SETTINGS = FrameSettings(8, 1, 1, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4), fixed_size=(32, 32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_smolvlm(tmp_path_factory.mktemp("smolvlm"))


def test_numbers_in_words():
    assert [in_words(number) for number in range(1000)] == [num2words(number) for number in range(1000)]


@pytest.fixture
def two_functions(monkeypatch):
    """Stand-ins for the torchvision functions that the stock class calls; the resize is Pillow's, on float planes."""

    def resize(self, image, size, resample, antialias):
        assert resample == Image.Resampling.LANCZOS and antialias
        planes = [Image.fromarray(plane) for plane in image.flatten(0, -3).numpy()]
        planes = [np.asarray(plane.resize((size.width, size.height), resample)) for plane in planes]
        return torch.from_numpy(np.stack(planes)).view(*image.shape[:-2], size.height, size.width)

    def normalize(self, image, mean, std, **_):
        return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    monkeypatch.setattr(stock.BaseVideoProcessor, "resize", resize)
    monkeypatch.setattr(stock.BaseVideoProcessor, "normalize", normalize)


SIZES = [(64, 40, 60), (64, 60, 40), (32, 17, 17), (1456, 9, 100), (20, 200, 3)]


@pytest.mark.parametrize(("edge", "height", "width"), SIZES)
def test_pixels_are_those_of_the_stock_processor(two_functions, edge, height, width):
    video = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    settings = SETTINGS.updated({"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": 48}}, "it")
    processor = stock.SmolVLMVideoProcessor(max_image_size={"longest_edge": 48})
    want = processor._preprocess(
        [video * 255],
        do_resize=True,
        size=stock.SizeDict(longest_edge=edge),
        resample=processor.resample,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        do_pad=False,
        image_mean=settings.image_mean,
        image_std=settings.image_std,
    )["pixel_values"][0]
    torch.testing.assert_close(settings.pixels(video), want, atol=2e-5, rtol=0)


def test_every_size_of_the_first_resize_is_the_stock_one():
    generator = torch.Generator().manual_seed(0)
    for edge, height, width in torch.randint(1, 700, (500, 3), generator=generator).tolist():
        settings = SETTINGS.updated({"size": {"longest_edge": edge}}, "it")
        assert settings.first_size(height, width) == stock.get_resize_output_image_size(
            torch.empty(1, height, width), edge
        )


@pytest.mark.parametrize(
    ("config", "edges"),
    [
        ({}, (1456, 32)),
        ({"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, (2048, 512)),
        ({"video_sampling": {"video_size": {"longest_edge": 512}}}, (512, 32)),
        ({"size": {"longest_edge": 10**6}, "video_sampling": {"video_size": {"longest_edge": 512}}}, (4096, 32)),
    ],
)
def test_sizes_of_a_processor(config, edges):
    settings = SETTINGS.updated(config, "it")
    assert (settings.longest_edge, settings.side) == edges


@pytest.mark.parametrize(
    "config", [{"size": {"height": 32, "width": 32}}, {"max_image_size": {"longest_edge": 9999}}, {"size": 8.5}]
)
def test_sizes_that_are_refused(config):
    with pytest.raises(InputError, match=r"^it: "):
        SETTINGS.updated(config, "it")


@pytest.mark.parametrize("indices", [[0, 3, 6, 9, 12], range(0, 900, 30), [3700]])
def test_the_text_of_a_video_is_that_of_the_stock_processor(checkpoint, indices):
    """Without the length of the whole video, which a Teacher does not know: then it is the last frame's time."""
    teacher = load_teacher(checkpoint)
    metadata = VideoMetadata(total_num_frames=4000, fps=8.0, frames_indices=list(indices))
    processor = SimpleNamespace(
        image_seq_len=4,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    inputs = {"pixel_values": torch.empty(1, len(indices), 3, 32, 32), "video_metadata": [metadata]}
    want = SmolVLMProcessor.replace_video_token(processor, inputs, 0)
    assert teacher.video_text(teacher.clip(indices, 8.0, 32, 32)) == want


def test_a_template_without_a_video_gives_way_to_transformers_own(checkpoint, tmp_path):
    """As in the stock processor; the published templates know images only."""
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    file = path / "chat_template.jinja"
    file.write_text(file.read_text().replace("{% elif part.type == 'video' %}<video>", ""))
    teacher, before = load_teacher(path), load_teacher(checkpoint)
    assert teacher.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    assert teacher._chat("Is it?", "video", "V") == before._chat("Is it?", "video", "V")
    assert teacher._chat("Is it?", "image", "I") == before._chat("Is it?", "image", "I")


def test_a_grey_frame_counts(checkpoint):
    """Its pixels are zero after normalisation; the stock model drops such images as padding."""
    teacher = load_teacher(checkpoint)
    frames = torch.tensor(teacher.video.image_mean).view(3, 1, 1).expand(2, 3, 32, 32)
    assert teacher.losses(frames, [0, 1], 8.0, QuerySet("Is it?")).isfinite().all()


def test_images_that_make_no_tokens_are_refused(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "copy")
    file = path / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_image_size": {"longest_edge": 24}}))
    with pytest.raises(InputError, match=r"images of \(24, 24\) pixels do not split into patches of 8, of which 2x2"):
        load_teacher(path)


def test_too_many_frames_are_refused(checkpoint):
    teacher = load_teacher(checkpoint)
    with pytest.raises(InputError, match="1000 frames: SmolVLM takes at most 999"):
        teacher.losses(torch.rand(1000, 3, 4, 4), range(1000), 8.0, QuerySet("Is it?"))
