"""Read images and clips of any format and kind of pixels, or refuse them; write videos."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmteacher.errors import InputError, Notice
from vlmteacher.files import check_text, replacing

if TYPE_CHECKING:
    from torch import Tensor

ImageInput: TypeAlias = Union[Image.Image, str, os.PathLike[str], np.ndarray, "Tensor", Sequence["ImageInput"]]
"""An RGB image: PIL's, the path of a file, an array (H, W, 3) or tensor (3, H, W) of uint8 or floats in [0, 1], or a
list of one of them."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MOST_PIXELS = 2**26  # 8192x8192; PIL takes up to 16 bytes and .1 us for each
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF's tags
ASPECT_TOLERANCE = 0.05
RATE_TOLERANCE = 0.1  # so much slower than the model's a clip may be: every tenth frame is then shown twice
FIRST_FRAME_CELLS, FIRST_FRAME_TOLERANCE = 8, 36  # see `check_first_frame`


# ---------------------------------------------------------------- images


def read_image(image: ImageInput, name: str = "image") -> Image.Image:
    """Return an image as RGB: turned as its EXIF says, deep pixels scaled to 8 bits, transparency over white.

    Files may be PNG, JPEG, WebP, BMP, TIFF or GIF. A notice tells of transparency, and of an animation, whose first
    frame is taken. name: what the image is, for messages. Raises InputError for what cannot be read, is too large (a
    decompression bomb), empty, or of pixels whose white is not known.
    """
    if isinstance(image, list | tuple):
        if len(image) != 1:
            raise InputError(f"{name}: a list of {len(image)} images, where one is taken: give the first frame")
        return read_image(image[0], name)
    if isinstance(image, str | os.PathLike):
        return _read_file(os.fspath(image), name)
    if isinstance(image, Image.Image):
        return _to_rgb(*_load(image, name), name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if hasattr(image, "detach"):  # a tensor, of which a command line that has none must not know
        array = image.detach().cpu()
        array = array.float().numpy() if array.is_floating_point() else array.numpy()
        return _from_array(np.moveaxis(array, -3, -1) if array.ndim >= 3 else array, name)
    raise InputError(f"{name}: a {type(image).__name__} is none: give a path, an image of PIL, an array or a tensor")


def _read_file(path: str, name: str) -> Image.Image:
    label = f"{name} {path}"
    check_text(path, label)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path):
        raise InputError(f"{label} is an address: download it, and give the path of the file")
    if not os.path.exists(path):
        raise InputError(f"{label} does not exist")
    if not os.path.isfile(path):
        raise InputError(f"{label} cannot be read: it is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of metadata that is not quite as it should be
            with Image.open(path, formats=FORMATS) as file:
                loaded = _load(file, label)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{label} cannot be read: give a PNG, JPEG, WebP, BMP, TIFF or GIF file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{label} is too large ({error}): make it smaller") from error
    except Exception as error:  # PIL's readers fail in many ways on what is damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{label} cannot be read ({reason}): save it again as PNG or JPEG") from error
    return _to_rgb(*loaded, label)


def _load(image: Image.Image, label: str) -> tuple[Image.Image, int]:
    """The pixels of the first frame, upright and not deep; the number of frames."""
    if image.width * image.height > MOST_PIXELS:
        raise InputError(
            f"{label} is too large ({image.width}x{image.height}, of {MOST_PIXELS:,} pixels at most): make it smaller"
        )
    # A camera's JPEG (MPO) may carry a preview, which is no animation.
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
    """Grey pixels of up to 16 bits in 8, where `image.convert` would cut off all above 255. tags: a TIFF's."""
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
    """The image of (H, W, 3) or (1, H, W, 3)."""
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


def fit_image(image: ImageInput, height: int, width: int, name: str = "image") -> Image.Image:
    """`read_image`, resized to a video's size where it has another. Raises InputError when its shape is another."""
    rgb = read_image(image, name)
    check_aspect(rgb.width, rgb.height, height, width, f"the {name}")
    return resize(rgb, height, width)


def check_aspect(own_width: int, own_height: int, height: int, width: int, label: str) -> None:
    """Raise InputError unless a picture's shape is the video's, to `ASPECT_TOLERANCE`."""
    if abs(own_width / own_height / (width / height) - 1) > ASPECT_TOLERANCE:
        raise InputError(
            f"{label} is {own_width}x{own_height} pixels, the video {width}x{height}: crop it to that shape, or give "
            "another width and height"
        )


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """An RGB image in this size."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def shrink(image: Image.Image, pixels: int) -> Image.Image:
    """An RGB image in its own shape, made smaller where it has more pixels."""
    scale = (pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    return resize(image, *(max(1, round(side * scale)) for side in (image.height, image.width)))


# ---------------------------------------------------------------- clips


def read_clip(
    path: str | os.PathLike[str], num_frames: int, fps: float | None = None, name: str = "video"
) -> np.ndarray:
    """The first frames (num_frames, H, W, 3) uint8 of a clip, upright; of another rate, those nearest in time.

    fps: the rate that the frames are to have; None: every frame, whatever its time. Raises InputError for a file that
    cannot be read or is damaged, pixels that are not square, a clip slower than `fps` or too short.
    """
    import imageio_ffmpeg

    label = f"{name} {os.fspath(path)}"
    # The filter takes the last frame up to a time; half a frame earlier, that is the one nearest to it.
    nearest = f"setpts=PTS-STARTPTS-0.5/(FRAME_RATE*TB),fps={fps!r}:round=up"
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-xerror"),
        # A path that is absolute is no option and no address, and a list of other files in the clip's place reads none.
        *("-protocol_whitelist", "file", "-i", os.path.abspath(path), "-map", "0:V:0"),
        *(("-fps_mode", "passthrough") if fps is None else ("-vf", nearest)),
        *("-frames:v", str(num_frames), "-f", "image2pipe", "-c:v", "ppm", "-"),
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
    stream = next(line for line in log.splitlines() if "Video:" in line and "attached pic" not in line)
    if (sar := re.search(r"\[SAR (\d+):(\d+)", stream)) and sar[1] != sar[2]:
        raise InputError(f"{label} has pixels of {sar[1]}:{sar[2]}, which are not square: scale it to square ones")
    own = re.search(r"([\d.]+) fps", stream)
    if fps is not None and own and float(own[1]) < fps * (1 - RATE_TOLERANCE):
        raise InputError(f"{label} has {own[1]} frames a second, fewer than the model's {fps:g}: give a faster one")
    if len(frames) < num_frames:
        at = "" if fps is None else f" at {fps:g} a second"
        raise InputError(f"{label} is too short: {len(frames)} frames of {num_frames}{at}")
    return np.stack(frames)


def _ppm_frames(data: bytes) -> Iterator[np.ndarray]:
    start = 0
    while header := re.compile(rb"P6\s(\d+)\s(\d+)\s255\s").match(data, start):
        width, height = int(header[1]), int(header[2])
        start = header.end() + 3 * width * height
        yield np.frombuffer(data[header.end() : start], np.uint8).reshape(height, width, 3)


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (F, H, W, 3) uint8 as an H.264 file of the same size that browsers play (H and W even).

    The file is read back: all its frames must be there. Raises OutputError, with ffmpeg's own words where it fails.
    """
    count, height, width = frames.shape[:3]
    rate = str(Fraction(fps).limit_denominator())
    raw = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", "rgb24", "-r", rate]
    coded = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "8", "-movflags", "+faststart"]
    with replacing(path) as temporary:
        # The protocol in front, or a colon in the name would be taken for the end of another one.
        file = f"file:{temporary.absolute()}"
        _ffmpeg(["-y", *raw, "-i", "-", *coded, file], np.ascontiguousarray(frames).tobytes())
        listed = _ffmpeg(["-i", file, "-map", "0:v", "-f", "framecrc", "-"]).splitlines()
        if (readable := sum(not line.startswith(b"#") for line in listed)) != count:
            raise OSError(errno.EIO, f"ffmpeg wrote {readable} of {count} frames")


def _ffmpeg(arguments: list[str], given: bytes = b"") -> bytes:
    """The standard output of ffmpeg. Raises OSError with the last line of its messages when it fails."""
    from imageio_ffmpeg import get_ffmpeg_exe

    # In a session of its own, so that Ctrl-C reaches this program alone.
    command = [get_ffmpeg_exe(), "-nostdin", "-v", "error", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, start_new_session=True)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        full = any(os.strerror(errno.ENOSPC) in line for line in lines)
        reason = " ".join(lines[-1].split())[:200] if lines else f"exit status {done.returncode}"
        raise OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg: {reason}")
    return done.stdout


def resize_clip(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 in this size."""
    return np.stack([np.asarray(resize(Image.fromarray(frame), height, width)) for frame in frames])


def check_first_frame(image: Image.Image, frame: np.ndarray, label: str) -> None:
    """Raise InputError unless an RGB image is the frame (H, W, 3), in another size and coding as the case may be.

    Both are averaged over `FIRST_FRAME_CELLS` x as many cells, which a codec changes little, and no cell may differ
    by more than `FIRST_FRAME_TOLERANCE` of 255.
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
