"""Read images and clips of any format and kind of pixels, or refuse them; write videos."""

from __future__ import annotations

import base64
import errno
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmteacher.errors import InputError, Notice, first_line
from vlmteacher.files import check_text, replacing

if TYPE_CHECKING:
    from torch import Tensor

ImageInput: TypeAlias = Union[Image.Image, str, os.PathLike[str], np.ndarray, "Tensor", Sequence["ImageInput"]]
"""An RGB image: PIL's, the path of a file, an array (H, W, 3) or tensor (3, H, W) of uint8 or floats in [0, 1], or a
list of one of them."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MOST_PIXELS = 2**26  # 8192x8192; PIL needs up to 16 bytes and 0.1 us for each
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags
STRIP, STRIP_HEIGHT = 8, 144  # frames of a film strip at most, and its height in pixels at most
ASPECT_TOLERANCE = 0.05
RATE_TOLERANCE = 0.1  # of a clip slower than the model: at most every tenth frame is then shown twice
FIRST_FRAME_CELLS, FIRST_FRAME_TOLERANCE = 8, 36  # see `check_first_frame`


# ---------------------------------------------------------------- images


def read_image(image: ImageInput, name: str = "image") -> Image.Image:
    """Read an image as RGB: rotated by its EXIF orientation, deep pixels scaled to 8 bits, transparency over white.

    Files may be PNG, JPEG, WebP, BMP, TIFF or GIF. Transparency, and an animation, whose first frame is taken,
    give a Notice. name: of the image, for messages. Raises InputError for an image that cannot be read, is too large (a
    decompression bomb), is empty, or has pixels of an unknown range.
    """
    if isinstance(image, list | tuple):
        if len(image) != 1:
            raise InputError(f"{name}: a list of {len(image)} images, not one: give the first frame")
        return read_image(image[0], name)
    if isinstance(image, str | os.PathLike):
        return _read_file(os.fspath(image), name)
    if isinstance(image, Image.Image):
        return _to_rgb(*_load(image, name), name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if hasattr(image, "detach") and hasattr(image, "cpu"):  # a tensor; torch is not imported for the command line
        array = image.detach().cpu()
        array = array.float().numpy() if array.is_floating_point() else array.numpy()
        return _from_array(np.moveaxis(array, -3, -1) if array.ndim >= 3 else array, name)
    raise InputError(f"{name}: a {type(image).__name__} is no image: give a path, a PIL image, an array or a tensor")


def _read_file(path: str, name: str) -> Image.Image:
    label = f"{name} {path}"
    check_text(path, label)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path):
        raise InputError(f"{label} is a URL: download it, and give the path of the file")
    if not os.path.exists(path):
        raise InputError(f"{label} does not exist")
    if not os.path.isfile(path):
        raise InputError(f"{label} cannot be read: it is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and malformed metadata
            with Image.open(path, formats=FORMATS) as file:
                loaded = _load(file, label)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{label} cannot be read: give a PNG, JPEG, WebP, BMP, TIFF or GIF file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{label} is too large ({error}): make it smaller") from error
    except Exception as error:  # PIL's readers raise errors of many types for damaged files
        reason = first_line(error)[:120]
        raise InputError(f"{label} cannot be read ({reason}): save it again as PNG or JPEG") from error
    return _to_rgb(*loaded, label)


def _load(image: Image.Image, label: str) -> tuple[Image.Image, int]:
    """The pixels of the first frame, upright and of 8 bits, and the number of frames."""
    if image.width * image.height > MOST_PIXELS:
        raise InputError(
            f"{label} is too large ({image.width}x{image.height}, of {MOST_PIXELS:,} pixels at most): make it smaller"
        )
    # The second image of a camera's JPEG (MPO) is a preview, not a frame.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        image.seek(0)
    image.load()
    upright = ImageOps.exif_transpose(image)
    return _from_deep(upright, getattr(image, "tag_v2", {})) if image.mode.startswith("I;16") else upright, frames


def _to_rgb(image: Image.Image, frames: int, label: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{label} is empty ({image.width}x{image.height} pixels)")
    if frames > 1:
        warnings.warn(f"{label} holds {frames} frames: the first is taken", Notice, stacklevel=2)
    if image.mode == "F":
        return _from_array(np.repeat(np.asarray(image)[:, :, None], 3, 2), label)
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa"):
        raise InputError(f"{label} has pixels of the kind {image.mode!r}: save it as RGB or grey of 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            warnings.warn(f"{label} is transparent in places: they are taken as white", Notice, stacklevel=2)
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey pixels of up to 16 bits scaled to 8; `image.convert` would clip them at 255. tags: of a TIFF."""
    order = ">u2" if image.mode.endswith("B") else "<u2"
    deep = np.frombuffer(image.tobytes("raw", image.mode), order).reshape(image.height, image.width)
    white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        deep = white - deep
    grey = Image.fromarray((deep * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return grey


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """The image of an array (H, W, 3) or (1, H, W, 3)."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"{name}: its shape is {array.shape}, channels last: give (H, W, 3), or (3, H, W) as a tensor")
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype.kind != "f":
        raise InputError(f"{name}: its pixels are {array.dtype}: give uint8, or floats in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"{name}: floats must be in [0, 1], these span [{low:.4g}, {high:.4g}]: rescale them")
    return Image.fromarray((array.astype(np.float32) * 255).round().astype(np.uint8))


def fit_image(
    image: ImageInput, height: int, width: int, name: str = "image", fit: Literal["refuse", "crop", "pad"] = "refuse"
) -> Image.Image:
    """Read an image and resize it to a video's size.

    fit: what happens to an aspect ratio that is not the video's: InputError, the middle is cropped, or black is padded.
    """
    rgb = read_image(image, name)
    if fit == "crop":
        return ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(rgb, (width, height), Image.Resampling.LANCZOS)
    remedy = "crop it to that shape, let `fit` crop or pad it"
    check_aspect(rgb.width, rgb.height, height, width, f"the {name}", remedy)
    return resize(rgb, height, width)


def check_aspect(
    own_width: int, own_height: int, height: int, width: int, label: str, remedy: str = "crop it to that shape"
) -> None:
    """Raise InputError unless the aspect ratio of a picture is the video's, within `ASPECT_TOLERANCE`."""
    if abs(own_width / own_height / (width / height) - 1) > ASPECT_TOLERANCE:
        raise InputError(
            f"{label} is {own_width}x{own_height} pixels, the video {width}x{height}: {remedy}, or give another width"
            " and height"
        )


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an RGB image to this size in pixels."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def shrink(image: Image.Image, pixels: int) -> Image.Image:
    """Scale an RGB image down to this number of pixels where it has more; its aspect ratio stays."""
    scale = (pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    return resize(image, *(max(1, round(side * scale)) for side in (image.height, image.width)))


# ---------------------------------------------------------------- clips


def read_clip(
    path: str | os.PathLike[str], num_frames: int, fps: float | None = None, name: str = "video"
) -> np.ndarray:
    """The first frames (num_frames, H, W, 3) uint8 of a clip, upright.

    fps: frames per second of the result, made of the frames nearest in time; None takes every frame. Raises InputError
    for a file that cannot be read or is damaged, pixels that are not square, and a clip too short or slower than `fps`.
    """
    label = f"{name} {os.fspath(path)}"
    # The filter takes the last frame before a time; shifted by half a frame, that is the nearest frame.
    nearest = f"setpts=PTS-STARTPTS-0.5/(FRAME_RATE*TB),fps={fps!r}:round=up"
    chosen = ("-fps_mode", "passthrough") if fps is None else ("-vf", nearest)
    frames, stream = _decode(path, (*chosen, "-frames:v", str(num_frames)), label)
    if (sar := re.search(r"\[SAR (\d+):(\d+)", stream)) and sar[1] != sar[2]:
        raise InputError(f"{label} has pixels of {sar[1]}:{sar[2]}, which are not square: scale it to square ones")
    own = _rate(stream)
    if fps is not None and own and own < fps * (1 - RATE_TOLERANCE):
        raise InputError(f"{label} has {own:g} frames a second, fewer than the model's {fps:g}: give a faster one")
    if len(frames) < num_frames:
        at = "" if fps is None else f" at {fps:g} a second"
        raise InputError(f"{label} is too short: {len(frames)} frames of {num_frames}{at}")
    return np.stack(frames)


def sample_clip(path: str | os.PathLike[str], per_second: float, name: str = "video") -> list[Image.Image]:
    """The first frame of a clip and every int(rate / per_second)-th after it, upright, in the clip's own size.

    Raises InputError for a file that cannot be read or is damaged.
    """
    label = f"{name} {os.fspath(path)}"
    _, stream = _decode(path, ("-frames:v", "1"), label)
    interval = max(1, int((_rate(stream) or 0) / per_second))
    chosen = ("-vf", f"select=not(mod(n\\,{interval}))", "-fps_mode", "passthrough")
    return [Image.fromarray(frame) for frame in _decode(path, chosen, label)[0]]


def _decode(path: str | os.PathLike[str], chosen: Sequence[str], label: str) -> tuple[list[np.ndarray], str]:
    """Frames (H, W, 3) uint8 of a clip, and ffmpeg's line about it. chosen: ffmpeg's options that choose the frames."""
    import imageio_ffmpeg

    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-xerror"),
        # An absolute path is neither an option nor a URL, and a playlist in place of a clip reads no other files.
        *("-protocol_whitelist", "file", "-i", os.path.abspath(path), "-map", "0:V:0"),
        *(*chosen, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"),
    ]
    result = subprocess.run(command, capture_output=True)
    log = result.stderr.decode(errors="replace")
    frames = [] if result.returncode else list(_ppm_frames(result.stdout))
    if not frames:
        known = (
            re.search(r"(?:\[.*?\] *)?(.*(?:error|invalid|no streams).*)", line, re.I) for line in log.splitlines()
        )
        reason = next((line[1] for line in known if line), "it holds no frame")
        raise InputError(f"{label} cannot be read ({reason[:120]}): is it a whole video?")
    return frames, next(line for line in log.splitlines() if "Video:" in line and "attached pic" not in line)


def _rate(stream: str) -> float | None:
    """The frames per second in ffmpeg's line about a clip."""
    rate = re.search(r"([\d.]+) fps", stream)
    return float(rate[1]) if rate else None


def _ppm_frames(data: bytes) -> Iterator[np.ndarray]:
    start = 0
    while header := re.compile(rb"P6\s(\d+)\s(\d+)\s255\s").match(data, start):
        width, height = int(header[1]), int(header[2])
        start = header.end() + 3 * width * height
        yield np.frombuffer(data[header.end() : start], np.uint8).reshape(height, width, 3)


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (F, H, W, 3) uint8, H and W even, as an H.264 file that browsers play.

    The frames of the file are counted. Raises OutputError, with ffmpeg's message where ffmpeg fails.
    """
    count, height, width = frames.shape[:3]
    rate = str(Fraction(fps).limit_denominator())
    raw = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", "rgb24", "-r", rate]
    coded = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "8", "-movflags", "+faststart"]
    with replacing(path) as temporary:
        # With the protocol, because a colon in the name would be taken for the end of one.
        file = f"file:{temporary.absolute()}"
        _ffmpeg(["-y", *raw, "-i", "-", *coded, file], np.ascontiguousarray(frames).tobytes())
        listed = _ffmpeg(["-i", file, "-map", "0:v", "-f", "framecrc", "-"]).splitlines()
        if (readable := sum(not line.startswith(b"#") for line in listed)) != count:
            raise OSError(errno.EIO, f"ffmpeg wrote {readable} of {count} frames")


def shrink_video(path: Path, limit: int, width: int | None = None) -> bytes:
    """The bytes of a video recoded to at most `limit`, smaller and coarser until it fits; b"" where it never does.

    width: in pixels at most. Raises OSError for a file that cannot be read as a video.
    """
    width = width or 1280
    with tempfile.TemporaryDirectory() as folder:
        recoded = Path(folder) / "recoded.mp4"
        for quality, share in ((23, 1.0), (28, 0.75), (32, 0.5), (36, 0.35)):
            scale = f"scale=w='2*trunc(min(iw,{int(width * share)})/2)':h=-2"
            coded = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", str(quality), "-g", "12"]
            source = ["-protocol_whitelist", "file", "-i", os.path.abspath(path)]
            _ffmpeg(["-y", *source, "-vf", scale, *coded, "-movflags", "+faststart", f"file:{recoded}"])
            if recoded.stat().st_size <= limit:
                return recoded.read_bytes()
    return b""


def _ffmpeg(arguments: list[str], given: bytes = b"") -> bytes:
    """The standard output of ffmpeg. Raises OSError with the last line of its messages when it fails."""
    from imageio_ffmpeg import get_ffmpeg_exe

    # In a session of its own, so that Ctrl-C does not reach ffmpeg.
    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, start_new_session=True)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        full = any(os.strerror(errno.ENOSPC) in line for line in lines)
        reason = " ".join(lines[-1].split())[:200] if lines else f"exit status {done.returncode}"
        raise OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg: {reason}")
    return done.stdout


def film_strip(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` of the frames (F, H, W, 3), evenly spread, side by side: (H, W * count, 3)."""
    return np.concatenate([frames[k] for k in strip_indices(len(frames), count)], axis=1)


def strip_indices(frames: int, count: int) -> list[int]:
    """The indices of `count` frames, evenly spread, both ends included; of all where there are fewer."""
    count = min(count, frames)
    return [round(k * (frames - 1) / max(count - 1, 1)) for k in range(count)]


def write_strips(path: Path, strips: Sequence[np.ndarray]) -> None:
    """Write film strips (H, W, 3) uint8, one below the other, as a WebP file; all get the size of the first, scaled
    down to `STRIP_HEIGHT`. Raises OutputError."""
    height, width = strips[0].shape[:2]
    scale = min(1.0, STRIP_HEIGHT / height)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    sheet = np.concatenate([np.asarray(resize(Image.fromarray(strip), *size)) for strip in strips])
    with replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary, "WEBP", quality=90)


def data_url(kind: str, data: bytes) -> str:
    """Return the content of a file of a MIME type as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def resize_clip(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames (F, H, W, 3) uint8 to this size in pixels."""
    return np.stack([np.asarray(resize(Image.fromarray(frame), height, width)) for frame in frames])


def check_first_frame(image: Image.Image, frame: np.ndarray, label: str) -> None:
    """Raise InputError unless an RGB image shows the frame (H, W, 3); its size and coding may differ.

    Both are averaged over a grid of `FIRST_FRAME_CELLS` squared cells, whose values a codec changes little; no cell may
    differ by more than `FIRST_FRAME_TOLERANCE` of 255.
    """
    cells = (FIRST_FRAME_CELLS, FIRST_FRAME_CELLS)
    one, other = (
        np.asarray(picture.resize(cells, Image.Resampling.BOX), np.float32)
        for picture in (image, Image.fromarray(frame))
    )
    if (difference := np.abs(one - other).mean(-1).max()) > FIRST_FRAME_TOLERANCE:
        raise InputError(
            f"{label} is not the first frame of its video (they differ by {difference:.0f} of 255 in places): take the"
            " video's own"
        )
