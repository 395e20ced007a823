"""Every kind of image and clip is read as it is meant, or refused in one line."""

import io
import os
import struct
import subprocess
import warnings
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from vlmteacher.cli import main
from vlmteacher.errors import InputError, Notice
from vlmteacher.media import FORMATS, check_first_frame, fit_image, read_clip, read_image, shrink, write_video
from vlmteacher.microworld import world
from vlmteacher.queries import QuerySet

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # a grey picture that no turn leaves as it is


@pytest.fixture(autouse=True)
def no_unexpected_notice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rgb(grey):
    return np.repeat(np.asarray(grey)[:, :, None], 3, 2)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "jpg"])
def test_files_of_all_formats(tmp_path, suffix):
    how = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(rgb(RAMP)).save(tmp_path / f"a.{suffix}", **how)
    error = np.abs(pixels(read_image(tmp_path / f"a.{suffix}")).astype(int) - rgb(RAMP)).max()
    assert error <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, suffix, orientation):
    """EXIF says how the camera was held; what is stored is turned back."""
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](rgb(RAMP))
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / f"a.{suffix}", exif=exif, **how)
    read = pixels(read_image(tmp_path / f"a.{suffix}")).astype(int)
    assert read.shape == (6, 8, 3) and np.abs(read - rgb(RAMP)).max() <= (3 if suffix == "jpg" else 0)


def deep(values):
    """The 8 bits that 16 are, rounded."""
    return (np.asarray(values, float) / 65535 * 255).round().astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_scaled(tmp_path, suffix, order):
    values = (np.arange(48, dtype=np.uint16).reshape(6, 8) * 1394).astype(order)
    assert values.max() > 65000
    image = Image.fromarray(values)
    if suffix == "tif" or order == "<u2":
        image.save(tmp_path / f"a.{suffix}")
        assert (pixels(read_image(tmp_path / f"a.{suffix}")) == rgb(deep(values))).all()
    assert (pixels(read_image(image)) == rgb(deep(values))).all()


def test_deep_pixels_are_turned_and_transparent_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1394
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    assert (pixels(read_image(tmp_path / "a.png")) == rgb(deep(values))[::-1, ::-1]).all()
    Image.fromarray(values).save(tmp_path / "b.png", transparency=int(values[1, 1]))
    with pytest.warns(Notice, match=r"b.png is transparent in places"):
        found = pixels(read_image(tmp_path / "b.png"))
    want = rgb(deep(values)).copy()
    want[1, 1] = 255
    assert (found == want).all()


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 0), (16, 1)])
def test_deep_tiffs_of_other_kinds(tmp_path, bits, photometric):
    """12 bits, and 0 for white."""
    width, height = 8, 6
    values = np.arange(48).reshape(height, width) * (2**bits // 48)
    packed = "".join(f"{value:0{bits}b}" for value in values.ravel())
    data = values.astype("<u2").tobytes() if bits == 16 else int(packed, 2).to_bytes(len(packed) // 8, "big")
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, v) for tag, v in tags.items()
    )
    file = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    (tmp_path / "a.tif").write_bytes(file)
    shown = values if photometric else 2**bits - 1 - values
    want = (shown / (2**bits - 1) * 255).round().astype(np.uint8)
    assert (pixels(read_image(tmp_path / "a.tif")) == rgb(want)).all()


def test_floats_are_scaled_or_refused(tmp_path):
    values = (np.arange(48, dtype=np.float32).reshape(6, 8)) / 47
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (pixels(read_image(tmp_path / "a.tif")) == rgb((values * 255).round().astype(np.uint8))).all()
    for wrong, what in ((values * 255, r"span \[0, 255\]"), (values - 1, r"span \[-1, 0\]"), (values * np.nan, "nan")):
        Image.fromarray(wrong).save(tmp_path / "b.tif")
        with pytest.raises(InputError, match=rf"b.tif: floats must be in \[0, 1\].*{what}"):
            read_image(tmp_path / "b.tif")


def half_clear(mode):
    """Black on the left, clear on the right, in a mode with alpha."""
    image = Image.new("RGBA", (8, 6), (0, 0, 0, 255))
    image.paste((40, 50, 60, 0), (4, 0, 8, 6))
    if mode != "PA":
        return image.convert(mode)
    palette = image.convert("RGB").quantize(8)
    palette.putalpha(image.getchannel("A"))
    assert palette.mode == "PA"
    return palette


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparency_lies_over_white_and_is_told(mode):
    with pytest.warns(Notice, match="the picture is transparent in places: they are taken as white"):
        found = pixels(read_image(half_clear(mode), "the picture"))
    assert (found[:, :4] == 0).all() and (found[:, 4:] == 255).all()
    assert (pixels(read_image(Image.new("RGBA", (8, 6), (9, 8, 7, 255)))) == (9, 8, 7)).all()  # and nothing is told


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_that_is_transparent(tmp_path, mode):
    image = Image.new(mode, (8, 6), 0)
    image.paste(1 if mode != "RGB" else (1, 1, 1), (4, 0, 8, 6))
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=1 if mode != "RGB" else (1, 1, 1))
    with pytest.warns(Notice, match=r"a.png is transparent"):
        found = pixels(read_image(tmp_path / "a.png"))
    assert (found[:, 4:] == 255).all() and (found[:, :4] == ((10, 20, 30) if mode == "P" else 0)).all()


def test_other_modes():
    assert (pixels(read_image(Image.new("1", (8, 6), 1))) == 255).all()
    assert (pixels(read_image(Image.new("CMYK", (8, 6), (0, 255, 255, 0)))) == (255, 0, 0)).all()
    assert (pixels(read_image(Image.new("YCbCr", (8, 6), (255, 128, 128)))) == 255).all()
    same = Image.fromarray(rgb(RAMP))
    assert (pixels(read_image(same)) == rgb(RAMP)).all() and same.mode == "RGB"
    for mode in ("I", "LAB"):  # whose white is not known, and which PIL cannot make RGB of
        with pytest.raises(InputError, match=f"pixels of the kind '{mode}': save it as RGB or grey"):
            read_image(Image.new(mode, (8, 6)))


def test_palettes_and_cmyk_files(tmp_path):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    found = pixels(read_image(tmp_path / "a.jpg")).astype(int)
    assert np.abs(found - (255, 0, 0)).max() < 6
    Image.fromarray(rgb(RAMP)).quantize(256).save(tmp_path / "a.gif")
    assert (pixels(read_image(tmp_path / "a.gif")) == rgb(RAMP)).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_told(tmp_path, suffix):
    first, *rest = (Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue"))
    first.save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=rest, **({"lossless": True} if suffix == "webp" else {})
    )
    with pytest.warns(Notice, match=rf"a.{suffix} holds 3 frames: the first is taken"):
        assert (pixels(read_image(tmp_path / f"a.{suffix}")) == (255, 0, 0)).all()
    image = Image.open(tmp_path / f"a.{suffix}")
    image.seek(2)
    with pytest.warns(Notice, match="image holds 3 frames"), image:
        assert (pixels(read_image(image)) == (255, 0, 0)).all()


def test_python_types():
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (
        array,
        array[None],
        [array],
        (Image.fromarray(array),),
        array / 255,
        (array / 255).astype(np.float32),
        array[:, ::-1][:, ::-1],
        tensor,
        tensor[None],
        tensor / 255,
        (tensor / 255).double().requires_grad_(),
    ):
        assert (pixels(read_image(image)) == array).all()
    assert np.abs(pixels(read_image((tensor / 255).bfloat16())).astype(int) - array).max() <= 1


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (None, "a NoneType is no image"),
        (3, "a int is no image"),
        (b"bytes", "a bytes is no image"),
        (io.BytesIO(b"bytes"), "a BytesIO is no image"),
        ([], "a list of 0 images"),
        ([np.zeros((6, 8, 3), np.uint8)] * 2, "a list of 2 images"),
        (np.zeros((3, 6, 8), np.uint8), r"its shape is \(3, 6, 8\), channels last"),
        (np.zeros((6, 8), np.uint8), r"\(6, 8\)"),
        (np.zeros((6, 8, 4), np.uint8), r"\(6, 8, 4\)"),
        (np.zeros((2, 6, 8, 3), np.uint8), r"\(2, 6, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        (torch.zeros(6, 8, 3), r"\(8, 3, 6\), channels last: .* \(3, H, W\) as a tensor"),
        (np.zeros((6, 8, 3), np.int64), "its pixels are int64"),
        (np.zeros((6, 8, 3), bool), "its pixels are bool"),
        (np.full((6, 8, 3), -0.5), r"span \[-0.5, -0.5\]"),
        (np.full((6, 8, 3), 255.0), r"span \[255, 255\]"),
        (np.full((6, 8, 3), np.nan), "nan"),
        (torch.full((3, 6, 8), torch.inf), "inf"),
        (Image.new("RGB", (0, 6)), r"is empty \(0x6"),
        ("https://example.org/a.png", "is a URL: download it"),
        ("data:image/png;base64,AA", "does not exist"),
        ("a\udcff.png", "half a character"),
        ("a\0.png", "a NUL"),
        ("/dev/zero", "it is no file"),
        ("/", "it is no file"),
        ("", "does not exist"),
    ],
)
def test_what_is_no_image_is_refused(image, what):
    with pytest.raises(InputError, match=what) as error:
        read_image(image)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def png(width, height, depth=8, colour=2):
    """A PNG that says it is so large; its pixels are few."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def file_of(kind):
    stream = io.BytesIO()
    Image.fromarray(rgb(RAMP)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "give a PNG, JPEG"),
        (b"no image", "give a PNG, JPEG"),
        (png(60_000, 60_000), "is too large .*make it smaller"),
        (png(2**31 - 1, 2**31 - 1), "is too large"),
        (png(8193, 8192), "is too large .8193x8192, of 67,108,864 pixels at most.: make it smaller"),
        (png(0, 8), "cannot be read"),
        (png(64, 64), "cannot be read"),
        (file_of("PNG")[:60], "cannot be read"),
        (file_of("JPEG")[:300], "cannot be read"),
        (file_of("GIF")[:30], "cannot be read"),
        (file_of("TIFF")[:-100], "cannot be read"),
        (file_of("PPM"), "give a PNG, JPEG"),
        (file_of("ICO"), "give a PNG, JPEG"),
        (file_of("PDF"), "give a PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "give a PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "give a PNG, JPEG"),
    ],
)
def test_files_that_are_no_image_or_a_bomb_are_refused(tmp_path, content, what):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"a.png .*{what}") as error:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)


def test_damaged_files_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for kind in FORMATS:
        whole = file_of(kind)
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 6)):
                data[at] = rng.integers(0, 256)
            (tmp_path / "a").write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Notice)
                try:
                    assert read_image(tmp_path / "a").mode == "RGB"
                except InputError as error:
                    assert "\n" not in str(error)


def test_an_image_is_fitted_to_the_video(tmp_path):
    assert fit_image(rgb(RAMP), 12, 16).size == (16, 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert fit_image(tmp_path / "a.jpg", 32, 48).size == (48, 32)
    with pytest.raises(InputError, match="the image is 48x32 pixels, the video 32x48: crop it"):
        fit_image(tmp_path / "a.jpg", 48, 32)
    picture = np.full((10, 40, 3), 200, np.uint8)
    picture[:, 10:30] = 100  # the middle, of twice its height
    assert (np.asarray(fit_image(picture, 10, 20, fit="crop")) == 100).all()
    padded = np.asarray(fit_image(picture, 20, 20, fit="pad"))
    assert padded.shape == (20, 20, 3) and not padded[:7].any() and not padded[-7:].any() and padded[10].all()


def test_large_images_are_made_smaller():
    image = Image.new("RGB", (3840, 2160))
    assert shrink(image, 1280 * 720).size == (1280, 720) and shrink(image, 10**8) is image
    assert shrink(Image.new("RGB", (100_000, 1)), 400).size == (6325, 1)


def test_the_command_line_reads_as_python_does(models, queries_file, tmp_path, capsys):
    flags = ["--queries", queries_file, "--max-steps", 0, "--teacher-frames", 4, "--prompt", "move the red ball"]
    flags += [part for name, path in models.items() for part in (f"--{name}", path)]

    def solve(out, image):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return main([*map(str, ["solve", *flags, "--image", image, "--out", tmp_path / out])])

    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(picture).save(tmp_path / "plain.png")
    Image.fromarray(np.ascontiguousarray(picture[::-1, ::-1])).save(tmp_path / "turned.png", exif=exif)
    assert solve("plain", tmp_path / "plain.png") == solve("turned", tmp_path / "turned.png") == 0
    records = [(tmp_path / name / "run.json").read_text() for name in ("plain", "turned")]
    images = [record[record.index('"image"') :].splitlines()[0] for record in records]
    assert images[0] == images[1] and "null" not in images[0]
    assert solve("none", tmp_path / "none.png") == 2 and not (tmp_path / "none").exists()


def test_the_pipeline_takes_all_of_them(pipe, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), picture, [Image.fromarray(picture)], picture / 255]
    kinds.append(torch.from_numpy(picture).permute(2, 0, 1))
    given = {"queries": QuerySet("Is it?"), "max_steps": 0, "teacher_frames": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        seen = {pipe("move the ball", image, **given).config["image"] for image in kinds}
        with pytest.raises(InputError, match="a int is no image"):
            pipe("move the ball", 3, **given)
    assert len(seen) == 1 and None not in seen


# ---------------------------------------------------------------- clips


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip of 30 frames a second, every one of which is another noise."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    coarse = np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3)).astype(np.uint8)
    write_video(path, coarse.repeat(8, 1).repeat(8, 2), 30)
    return path


@pytest.mark.parametrize("source", [24, 25, 30, 29.97, 60])
@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0])
def test_the_frames_nearest_in_time_are_read(tmp_path, clip, source, fps):
    path = tmp_path / "a.mp4"
    write_video(path, read_clip(clip, 40), source)
    every, found = read_clip(path, 40), read_clip(path, 5, fps)
    for k, frame in enumerate(found):
        at = next(i for i, each in enumerate(every) if (each == frame).all())
        assert abs(at - k * source / fps) < 0.5 + 1e-3


@pytest.mark.parametrize("kind", ["yuv420p10le", "gray10le", "gbrp12le", "yuva444p"])
def test_clips_of_deep_or_other_pixels(tmp_path, kind):
    """Phones write 10 bits; the frames are of 8."""
    shades = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 16, 24, 3), 40, np.uint8)
    write_video(tmp_path / "plain.mp4", shades, 8)
    ffmpeg("-i", tmp_path / "plain.mp4", "-c:v", "ffv1", "-pix_fmt", kind, tmp_path / "deep.mkv")
    found = read_clip(tmp_path / "deep.mkv", 5, 8.0)
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - shades).max() <= 3


def test_at_its_own_rate_a_clip_is_read_frame_by_frame(clip):
    assert (read_clip(clip, 40, 30.0) == read_clip(clip, 40)).all()


def test_variable_rates_late_starts_and_turned_clips(tmp_path, clip):
    every = read_clip(clip, 40)
    ffmpeg("-i", clip, "-vf", "select=not(mod(n\\,2))+lt(n\\,10)", "-fps_mode", "vfr", "-qp", 0, tmp_path / "vfr.mp4")
    found = read_clip(tmp_path / "vfr.mp4", 5, 10.0)  # frames 0, 3, 6, 9 and 12 of the clip
    for frame, at in zip(found, (0, 3, 6, 9, 12), strict=True):
        assert np.abs(every.astype(int) - frame).mean((1, 2, 3)).argmin() == at
    ffmpeg("-itsoffset", 0.7, "-i", clip, "-c", "copy", tmp_path / "late.mp4")
    assert (read_clip(tmp_path / "late.mp4", 5, 10.0) == read_clip(clip, 5, 10.0)).all()
    ffmpeg("-display_rotation", 90, "-i", clip, "-c", "copy", tmp_path / "turned.mp4")
    assert (read_clip(tmp_path / "turned.mp4", 3) == np.rot90(every[:3], 1, (1, 2))).all()


@pytest.mark.parametrize("name", ["-i.mp4", "a:b.mp4", "file:x.mp4", "%03d.mp4", "a b'c.mp4", "\u6f22.mp4"])
def test_names_that_ffmpeg_would_take_for_something_else(tmp_path, clip, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.link(clip, name)
    assert read_clip(name, 2).shape == (2, 32, 48, 3)


def test_odd_sizes(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=97x65:r=8:d=1", "-pix_fmt", "yuv444p", tmp_path / "a.mp4")
    assert read_clip(tmp_path / "a.mp4", 5, 8.0).shape == (5, 65, 97, 3)


def damaged(tmp_path, clip):
    """(path, what is said of it)"""
    cases = {
        "missing": (None, "No such file"),
        "empty": (b"", "Invalid data"),
        "text": (b"no video at all", "Invalid data"),
        "list": (f"ffconcat version 1.0\nfile {clip}\n".encode(), "cannot be read"),
        "playlist": (f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n".encode(), "cannot be read"),
        "cut": (clip.read_bytes()[:2000], "cannot be read"),
    }
    noise = bytearray(clip.read_bytes())
    noise[2000:4000] = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8).tobytes()
    cases["noise"] = (bytes(noise), "cannot be read")
    for name, (content, what) in cases.items():
        if content is not None:
            (tmp_path / f"{name}.mp4").write_bytes(content)
        yield tmp_path / f"{name}.mp4", what
    yield tmp_path, "Is a directory"
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4")
    yield tmp_path / "sound.mp4", "matches no streams"
    ffmpeg("-i", clip, "-vf", "setsar=2", tmp_path / "wide.mp4")
    yield tmp_path / "wide.mp4", "pixels of 2:1, which are not square"


def test_damaged_and_foreign_files_are_named(tmp_path, clip):
    for path, what in damaged(tmp_path, clip):
        with pytest.raises(InputError, match=what) as error:
            read_clip(path, 5, 8.0)
        assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_slow_and_short_clips_are_named(clip):
    with pytest.raises(InputError, match="has 30 frames a second, fewer than the model's 60"):
        read_clip(clip, 5, 60.0)
    with pytest.raises(InputError, match="too short: 11 frames of 12 at 8 a second"):
        read_clip(clip, 12, 8.0)
    assert len(read_clip(clip, 11, 8.0)) == 11 and len(read_clip(clip, 5, 32.0)) == 5


def test_a_first_frame_is_told_from_that_of_another_scene(tmp_path):
    """However strongly its video is compressed, and in whatever size it is given."""
    scenes = [(world.render(world.instance(k, 0)[0]) * 255).round().astype(np.uint8) for k in range(6)]
    for k, video in enumerate(scenes):
        write_video(tmp_path / "a.mp4", video, 8)
        ffmpeg("-i", tmp_path / "a.mp4", "-crf", 40, tmp_path / "b.mp4")
        frame = read_clip(tmp_path / "b.mp4", 1)[0]
        for i, other in enumerate(scenes):
            image = Image.fromarray(other[0]).resize((160, 160))
            if i == k:
                check_first_frame(image, frame, "first")
            else:
                with pytest.raises(InputError, match="first is not the first frame of its video"):
                    check_first_frame(image, frame, "first")
