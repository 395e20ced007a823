"""Parity with transformers' own `Qwen3VLVideoProcessor`.

Its code runs here; where torchvision is missing, the only two torchvision functions it calls are stood in for by others
written apart from ours (the resize is Pillow's, on float planes). One test asks for the real torchvision.
"""

import importlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from vlmteacher.errors import InputError
from vlmteacher.teachers.preprocessing import (
    VisionSettings,
    preprocess_frames,
    preprocess_image,
    preprocess_video,
    processor_settings,
    smart_resize,
)

# by its full name: without torchvision transformers' lazy package hands out a placeholder instead
stock = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")

TINY = VisionSettings(patch_size=8, min_pixels=1024)
SMALL = VisionSettings(
    patch_size=4, min_pixels=2000, max_pixels=9000, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)
)
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def pillow_resize(video, size, **_):
    planes = [
        Image.fromarray(plane).resize(size[::-1], Image.Resampling.BICUBIC) for plane in video.flatten(0, -3).numpy()
    ]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).view(*video.shape[:-2], *size)


def stock_rows(frames, settings, **options):
    """`_preprocess` of the stock class on frames (K, 3, H, W) in [0, 1], given as float 0..255."""
    processor = stock.Qwen3VLVideoProcessor()
    out = processor._preprocess(
        [frames * 255],
        do_resize=True,
        size=stock.SizeDict(shortest_edge=settings.min_pixels, longest_edge=settings.max_pixels),
        resample=stock.PILImageResampling.BICUBIC,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=settings.image_mean,
        image_std=settings.image_std,
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        **{"cap_pixels_per_frame": False, **options},
    )
    return out["pixel_values_videos"], out["video_grid_thw"]


@pytest.fixture
def two_functions(monkeypatch):
    """Independent torchvision stand-ins in the stock classes."""

    def resize(self, image, size, **_):
        return pillow_resize(image, (size.height, size.width))

    def normalize(self, image, mean, std, **_):
        return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    base = stock.BaseVideoProcessor
    monkeypatch.setattr(base, "resize", resize)
    monkeypatch.setattr(base, "normalize", normalize)


CASES = [
    (TINY, 12, 64, 64),  # the packaged world: unresized
    (TINY, 13, 64, 64),
    (TINY, 2, 16, 48),
    (TINY, 3, 50, 70),  # rounded to the factor
    (TINY, 5, 9, 100),  # smaller than the factor
    (SMALL, 7, 64, 40),  # over the upper limit
    (SMALL, 3, 17, 13),  # under the lower limit
    (SMALL, 2, 8, 200),
    (VisionSettings(), 4, 100, 130),
]


@pytest.mark.parametrize(("settings", "frames", "height", "width"), CASES)
def test_equal_to_the_stock_processor(two_functions, settings, frames, height, width):
    video = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows, grid = preprocess_video(video, settings)
    want, want_grid = stock_rows(video, settings)
    assert grid.tolist() == want_grid.tolist()
    assert len(rows) == grid.prod()
    torch.testing.assert_close(rows, want.view_as(rows), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 64, 96), (9, 80, 48)])
def test_the_cap_per_frame_equals_the_stock_one(two_functions, frames, height, width):
    settings = VisionSettings(patch_size=4, min_pixels=64, cap_pixels_per_frame=True, max_video_tokens=20)
    video = torch.rand(frames, 3, height, width)
    rows, grid = preprocess_video(video, settings)
    stock_class = stock.Qwen3VLVideoProcessor
    limit, stock_class.max_video_tokens = stock_class.max_video_tokens, 20
    try:
        want, want_grid = stock_rows(video, settings, cap_pixels_per_frame=True)
    finally:
        stock_class.max_video_tokens = limit
    assert grid.tolist() == want_grid.tolist()
    assert grid[0, 1] * grid[0, 2] <= 20 * 4 < height * width / 16
    torch.testing.assert_close(rows, want.view_as(rows), atol=2e-5, rtol=0)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not installed: the stock class cannot resize by itself")
@pytest.mark.parametrize(("settings", "frames", "height", "width"), CASES)
def test_equal_to_the_stock_processor_with_torchvision(settings, frames, height, width):
    video = torch.rand(frames, 3, height, width)
    processor = stock.Qwen3VLVideoProcessor(
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        image_mean=settings.image_mean,
        image_std=settings.image_std,
        patch_size=settings.patch_size,
        cap_pixels_per_frame=False,
    )
    metadata = VideoMetadata(total_num_frames=frames, fps=8, frames_indices=list(range(frames)))
    want = processor(
        videos=[video * 255],
        video_metadata=[metadata],
        do_sample_frames=False,
        input_data_format="channels_first",
        return_tensors="pt",
    )
    rows, grid = preprocess_video(video, settings)
    assert grid.tolist() == want["video_grid_thw"].tolist()
    torch.testing.assert_close(rows, want["pixel_values_videos"].view_as(rows), atol=2e-5, rtol=0)


def test_smart_resize_equals_the_stock_function_everywhere():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        frames, height, width = (int(n) for n in torch.randint(2, 400, (3,), generator=generator))
        args = {"factor": 32, "min_pixels": 4096, "max_pixels": 2_000_000}
        want = stock.smart_resize(frames, height, width, temporal_factor=2, **args)
        assert smart_resize(frames, height, width, 2, **args) == want


def test_frames_of_the_packaged_world_pass_unchanged():
    video = torch.rand(12, 3, 64, 64)
    rows, grid = preprocess_video(video, TINY)
    assert grid.tolist() == [[6, 8, 8]]
    first = rows[0].view(3, 2, 8, 8)
    torch.testing.assert_close(first, (video[:2, :, :8, :8].transpose(0, 1) - 0.5) / 0.5)


def test_the_papers_frames_stay_unresized():
    assert smart_resize(24, 704, 1280, 2, 32, VisionSettings().min_pixels, VisionSettings().max_pixels) == (704, 1280)


def test_one_frame_counts_as_two_equal_ones():
    frame = torch.rand(1, 3, 64, 64)
    one, grid = preprocess_video(frame, TINY)
    two, _ = preprocess_video(frame.expand(2, -1, -1, -1), TINY)
    assert grid.tolist() == [[1, 8, 8]]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("size", [(64, 64), (37, 90)])
def test_an_image_is_a_video_of_one_frame(size):
    image = torch.rand(3, *size)
    rows, grid = preprocess_image(image, TINY)
    want, want_grid = preprocess_video(image.expand(2, -1, -1, -1), TINY)
    assert grid.tolist() == want_grid.tolist()
    torch.testing.assert_close(rows, want)


@pytest.mark.parametrize("size", [(64, 64), (50, 130)])
def test_other_dtypes_are_float32s_result_rounded_once(size):
    video = torch.rand(3, 3, *size).bfloat16()
    exact, _ = preprocess_video(video.float(), TINY)
    rows, _ = preprocess_video(video, TINY)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, exact)
    half, _ = preprocess_video(video, TINY, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0, rtol=2**-8)


@pytest.mark.parametrize("size", [(28, 28), (20, 47), (96, 64)])
def test_whole_frames_for_internvl(size):
    """`InternVLVideoProcessor._preprocess` with Pillow's resize: its file needs torchvision to import."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    video = torch.rand(3, 3, *size, requires_grad=True)
    want = pillow_resize(video.detach() * 255, (28, 28)) / 255
    want = (want - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    results = preprocess_frames(video, 28, mean, std)
    assert results.shape == (3, 3, 28, 28)
    torch.testing.assert_close(results, want, atol=2e-5, rtol=0)
    assert preprocess_frames(video, 28, mean, std, torch.bfloat16).dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(results.sum(), video)
    assert (gradient > 0).any() and gradient.isfinite().all()


def test_too_narrow_frames_are_refused():
    with pytest.raises(InputError, match="16x6400"):
        preprocess_video(torch.rand(2, 3, 16, 6400), TINY)


@pytest.mark.parametrize("size", [(16, 16), (13, 21)])
def test_gradients_reach_every_pixel_and_match_finite_differences(size):
    settings = VisionSettings(patch_size=4, min_pixels=64)
    video = torch.rand(3, 3, *size, requires_grad=True)
    weights = torch.randn(preprocess_video(video, settings)[0].shape)

    def value(x):
        return (preprocess_video(x, settings)[0] * weights).double().sum()

    (gradient,) = torch.autograd.grad(value(video), video)
    assert (gradient.abs().amax((0, 1)) > 0).all()
    direction = torch.randn_like(video)
    step = 1e-2  # the map is linear: only rounding limits the agreement
    with torch.no_grad():
        slope = (value(video + step * direction) - value(video - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-2)


DEFAULTS = VisionSettings(patch_size=8)


def test_settings_come_from_the_checkpoints_files(tmp_path):
    size = {"shortest_edge": 1024, "longest_edge": 5000}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": size, "image_mean": [0.1, 0.2, 0.3]}))
    video, image = processor_settings(str(tmp_path), DEFAULTS)
    assert (video.patch_size, video.min_pixels, video.max_pixels) == (8, 1024, 5000)
    assert video.image_mean == (0.1, 0.2, 0.3) and video.image_std == (0.5, 0.5, 0.5)
    assert image == video
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 256, "max_pixels": 4096}))
    video, image = processor_settings(str(tmp_path), DEFAULTS)
    assert (image.min_pixels, image.max_pixels, video.max_pixels) == (256, 4096, 5000)


def test_both_processors_in_one_file(tmp_path):
    both = {"video_processor": {"size": {"longest_edge": 7777}}, "image_processor": {"size": {"longest_edge": 8888}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    video, image = processor_settings(str(tmp_path), DEFAULTS)
    assert (video.max_pixels, image.max_pixels) == (7777, 8888)


def test_without_files_the_upstream_checkpoints_values_hold(tmp_path):
    video, _ = processor_settings(str(tmp_path), DEFAULTS)
    assert (video.min_pixels, video.max_pixels, video.image_std) == (4096, 25_165_824, (0.5, 0.5, 0.5))


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"video_preprocessor_config\.json is not JSON"):
        processor_settings(str(tmp_path), DEFAULTS)
