"""From whatever a user calls an image to the model's input: decoding, conversion, resize, normalisation."""

from __future__ import annotations

import contextlib
import io
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ._errors import ImageError, SegzooError

if TYPE_CHECKING:
    from .models.rows import PretrainedCfg

# Pixels of an image, as decoded and as the model sees it, unless SEGZOO_MAX_PIXELS says otherwise: 8192 x 8192.
MAX_PIXELS = 2**26
# Beyond this ratio of its sides no image is enlarged to `test_min_side`: its long side would have no bound.
MAX_ASPECT = 16

# A string is a path or an http(s) URL.
ImageSource = str | Path | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray


def describe(source: ImageSource) -> str:
    """How messages and results name an image."""
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, Image.Image) and (filename := getattr(source, "filename", "")):
        return str(filename)
    if is_file(source) and isinstance(name := getattr(source, "name", None), str):
        return name
    return f"<{type(source).__name__}>"


def is_file(source: object) -> TypeGuard[IO[Any]]:
    """An open file, of whatever class: the standard library's share no base."""
    return callable(getattr(source, "read", None))


def is_url(source: object) -> TypeGuard[str]:
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def load_image(source: ImageSource, in_chans: int = 3) -> np.ndarray:
    """Decode and convert an image: (H, W, in_chans) uint8 in 0..255, RGB order for three channels, upright.

    EXIF orientation is applied; grey and palette images become RGB; CMYK is converted; transparent pixels are laid over
    white. 16-bit greys are scaled to 8 bits; 32-bit ones, whose range no file states, are taken as 8 bits where none is
    over 255, else as 16 bits. An image of more pixels than SEGZOO_MAX_PIXELS (67,108,864) is refused undecoded.

    Arrays are uint8: of in_chans channels they are copied as they are; (H, W), (H, W, 1), (H, W, 3) and (H, W, 4),
    where the fourth channel is opacity, are otherwise converted as images are, for a model of 1 or 3 channels.

    Raises:
        ImageError: names the file and what to do.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, in_chans)
    name = describe(source)
    with _decoding(name):
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(_read(source, name)))
        if 0 in image.size:
            raise ImageError(f"{name} has no pixels ({image.width}x{image.height})")
        check_pixels(name, (image.height, image.width))
        image = ImageOps.exif_transpose(image)
        image.load()
        if in_chans not in (1, 3):
            raise ImageError(
                f"the model takes {in_chans} channels; give a uint8 array (H, W, {in_chans}), not an image"
            )
        array = np.asarray(_to_rgb(image, name).convert("L" if in_chans == 1 else "RGB"))
    return array if array.ndim == 3 else array[..., None]


def _read(source: object, name: str) -> bytes:
    if is_url(source):
        from .zoo.download.image import fetch_image

        return fetch_image(source)
    if is_file(source):
        source = _read_open(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source:
            raise ImageError("the image is empty: 0 bytes given")
        return bytes(source)
    if not isinstance(source, (str, Path)):
        raise ImageError(
            "an image must be a path, an http(s) URL, the bytes of an image file, an open binary file, a PIL image or "
            f"a uint8 array (H, W, C), not a {type(source).__name__}"
        )
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a directory; name the image files in it, for example {name}/*.jpg")
        if not path.exists():
            raise ImageError(f"{name}: no such file; check the path")
        if not path.is_file():
            raise ImageError(
                f"{name} is no ordinary file but a pipe or device; save the image to a file or give its bytes"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror}); check its name and permissions") from error
    if not data:
        raise ImageError(f"{name} is empty; save or download it again")
    return data


def _read_open(file: IO[Any], name: str) -> bytes:
    """All of an open file, wherever its position is; of a stream that cannot go back, what is left."""
    try:
        if file.seekable():
            file.seek(0)
        data = file.read()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise ImageError(f"{name} cannot be read ({error}); open it again") from error
    if not isinstance(data, bytes):
        raise ImageError(f"{name} is open as text; open it in binary mode, with 'rb'")
    return data


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Say what is wrong with an image that Pillow cannot decode."""
    try:
        yield
    except ImageError:
        raise
    # The warning is raised only where the caller has made errors of warnings.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).rstrip(".")
        raise ImageError(
            f"{name}: {reason}; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS or cut it into tiles"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image that Pillow can read; convert it to PNG or JPEG") from None
    # Pillow lets through what a decoder stumbles over: beside OSError also RuntimeError, AttributeError and others.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} is truncated or damaged ({reason}); save or download it again") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # more than 8 bits, which Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has grey values outside 0..65535; convert it to 8 or 16 bits")
        scale = 1 if image.mode == "I" and values.max() <= 255 else 257
        return Image.fromarray((values // scale).astype(np.uint8))
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point greys without a known range; convert it to 8 bits")
    if image.mode in ("La", "LAB"):
        raise ImageError(f"{name} is in mode {image.mode}, which Pillow cannot convert; save it as RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image


def _from_array(array: np.ndarray, in_chans: int) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ImageError(f"an image array must be uint8 in 0..255, not {array.dtype}; scale and convert it")
    if array.ndim not in (2, 3):
        raise ImageError(f"an image array must be (H, W, C) or (H, W), not of shape {array.shape}")
    if 0 in array.shape:
        raise ImageError(f"the image array of shape {array.shape} has no pixels")
    array = array if array.ndim == 3 else array[..., None]
    check_pixels("the image array", array.shape[:2])
    if array.shape[2] == in_chans:
        return array.copy()  # a result keeps it, and the caller may fill theirs with the next frame
    if in_chans in (1, 3) and array.shape[2] in (1, 3, 4):
        mode_array = array[..., 0] if array.shape[2] == 1 else array
        return load_image(Image.fromarray(np.ascontiguousarray(mode_array)), in_chans)
    hint = "; channels come last" if array.shape[0] in (1, 3, 4, in_chans) else ""
    raise ImageError(f"an image array must be (H, W, {in_chans}) for this model, not {array.shape}{hint}")


def pixel_pair(option: str, value: object) -> tuple[int, int]:
    """An option that is (H, W) in whole pixels, Python's or NumPy's; refused by its name if it is none."""

    def is_whole(side: object) -> bool:
        return isinstance(side, numbers.Real) and not isinstance(side, bool) and side % 1 == 0

    sides = tuple(value) if isinstance(value, Iterable) else ()
    if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
        raise SegzooError(f"{option} must be (H, W) in pixels, both at least 1, not {value!r}")
    return int(sides[0]), int(sides[1])


def check_pixels(what: str, size: Sequence[int]) -> None:
    """Raises ImageError if (H, W) is more than the pixels that SEGZOO_MAX_PIXELS allows."""
    text = os.environ.get("SEGZOO_MAX_PIXELS", "") or str(MAX_PIXELS)
    if not text.isdecimal():
        raise SegzooError(f"SEGZOO_MAX_PIXELS must be a whole number of pixels, not {text!r}")
    H, W = size
    if H * W > int(text):
        raise ImageError(
            f"{what}: {H} x {W} pixels are more than the {text} that are taken; make it smaller, cut it into tiles, or "
            f"set SEGZOO_MAX_PIXELS={H * W} in the environment if the memory is there"
        )


def model_size(image_size: tuple[int, int], row: PretrainedCfg, resize: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) at which the model sees an image of `image_size` by the row's resize rule, or exactly `resize`.

    `keep_ratio` fits the image into `test_size`, then enlarges it until both sides have `test_min_side`, but the long
    side to no more than `MAX_ASPECT` times that. A side has at least one pixel and is rounded up to the divisor.

    Raises:
        ImageError: more pixels than SEGZOO_MAX_PIXELS.
    """
    if resize is not None:
        size = pixel_pair("resize", resize)
    elif row.resize == "exact":
        size = row.test_size
    else:
        H, W = _fitted(image_size, row) if row.resize == "keep_ratio" else image_size
        divisor = row.size_divisor
        size = (math.ceil(H / divisor) * divisor, math.ceil(W / divisor) * divisor)
    check_pixels("the size at which the model would see the image", size)
    return size


def _fitted(image_size: tuple[int, int], row: PretrainedCfg) -> tuple[int, int]:
    """`keep_ratio` before the divisor."""
    H, W = image_size
    short, long = min(H, W), max(H, W)
    fit = min(row.test_size[0] / short, row.test_size[1] / long)
    enlarged = row.test_min_side * min(1 / short, MAX_ASPECT / long)
    scale = max(fit, enlarged)
    return max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))


def to_input(image_HWC: np.ndarray, size: tuple[int, int], row: PretrainedCfg, like: Tensor) -> Tensor:
    """(H, W, C) uint8 -> (1, C, *size), normalised, on the device and in the dtype of `like`.

    The resize is bilinear, with antialias where it shrinks, so that fine texture does not turn into noise.
    """
    x = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)[None].to(like.device).float().div_(255)
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (per_channel(values, x.shape[1]).to(x.device) for values in (row.mean, row.std))
    return ((x - mean) / std).to(like.dtype)


def per_channel(values: tuple[float, ...], channels: int) -> Tensor:
    """Statistics of RGB serve one channel by their mean and more channels by repetition, as the first conv does."""
    tensor = torch.tensor(values)
    if channels == 1:
        tensor = tensor.mean(dim=0, keepdim=True)
    return tensor.repeat(-(-channels // len(tensor)))[:channels].view(1, -1, 1, 1)


def rgb(image_HWC: np.ndarray) -> np.ndarray:
    """The image as it is shown: of other than three channels the first."""
    return image_HWC if image_HWC.shape[2] == 3 else np.repeat(image_HWC[..., :1], 3, axis=2)
