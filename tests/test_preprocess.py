"""Every kind of image that people have: accepted, or refused as an ImageError that says what is needed."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import segzoo
from segzoo._errors import ImageError
from segzoo.models import PretrainedCfg
from segzoo.preprocess import load_image, model_size

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.repeat(GREY[..., None], 3, axis=2)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format)
    return stream.getvalue()


def unknown_dds() -> bytes:
    data = bytearray(encoded(Image.fromarray(RGB), "DDS"))
    data[80:88] = struct.pack("<I4s", 4, b"ZZZZ")  # compressed, by a method that nobody has heard of
    return bytes(data)


@pytest.mark.parametrize("hold", [bytearray, memoryview, io.BytesIO])
def test_bytes_of_any_kind(hold):
    held = hold(encoded(Image.fromarray(RGB)))
    if isinstance(held, io.BytesIO):
        held.seek(0, io.SEEK_END)  # where writing into it ends
    assert np.array_equal(load_image(held), RGB)


def test_an_array_is_copied():
    frame = RGB.copy()
    image = load_image(frame)
    frame[:] = 0
    assert np.array_equal(image, RGB)


def test_greys_of_more_than_8_bits():
    """int32 states no range: up to 255 it is 8 bits, else 16; a format of 16 bits is always that."""
    wide = GREY.astype(np.int32)
    assert np.array_equal(load_image(Image.fromarray(wide)), RGB)
    assert np.array_equal(load_image(Image.fromarray(wide * 257)), RGB)
    assert not load_image(Image.fromarray(GREY.astype(np.uint16))).any()
    for out_of_range in (wide - 1, wide * 258):
        with pytest.raises(ImageError, match="outside 0..65535"):
            load_image(Image.fromarray(out_of_range))


def test_opacity_of_arrays():
    half = np.full((2, 2, 4), 255, np.uint8)
    half[0, :, 3] = 0
    half[..., 0] = 9
    assert load_image(half)[:, 0].tolist() == [[255, 255, 255], [9, 255, 255]]
    assert np.array_equal(load_image(half, in_chans=4), half)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (io.BytesIO(), "empty"),
        (None, r"an image must be a path.*not a NoneType"),
        (torch.zeros(3, 8, 8), r"uint8 array \(H, W, C\), not a Tensor"),
        ([RGB], "not a list"),
        ("x" * 300, "cannot be read.*File name too long"),
        (unknown_dds(), "damaged.*pixel format"),
        (Image.new("La", (4, 4)), "mode La"),
        (Image.new("LAB", (4, 4)), "mode LAB"),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_what_is_no_image(source, message, in_chans):
    with pytest.raises(ImageError, match=message):
        load_image(source, in_chans)


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, struct.error, MemoryError])
def test_whatever_a_decoder_stumbles_over(kind, monkeypatch):
    """Of a damaged file AVIF's raises RuntimeError, SPIDER's AttributeError."""

    def stumble(*_):
        raise kind

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", stumble)
    with pytest.raises(ImageError, match=rf"damaged \({kind.__name__}\)"):
        load_image(encoded(Image.fromarray(RGB)))


def test_a_large_photograph_is_no_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    data = encoded(Image.fromarray(RGB))
    with pytest.warns(Image.DecompressionBombWarning):
        assert np.array_equal(load_image(data), RGB)
    with warnings.catch_warnings(), pytest.raises(ImageError, match="decompression bomb.*MAX_IMAGE_PIXELS"):
        warnings.simplefilter("error")
        load_image(data)


def test_filters_of_warnings_are_left_alone():
    """They belong to the process: a thread that restores them undoes what another has set meanwhile."""
    data, filters, seen = encoded(Image.fromarray(RGB)), warnings.filters, set()
    original = Image.open

    def watched(*args, **kwargs):
        seen.add(warnings.filters is filters)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", watched)
        load_image(data)
    assert seen == {True}


@pytest.mark.parametrize("resize", [32, (32,), (0, 5), (32.5, 32), ("32", "32"), (True, 32), (float("nan"), 32), None])
def test_resize_is_a_size(resize):
    row = PretrainedCfg(resize="exact", test_size=(64, 96))
    if resize is None:
        assert model_size((10, 10), row, resize) == (64, 96)
        return
    with pytest.raises(segzoo.SegzooError, match=r"resize must be \(H, W\) in pixels"):
        model_size((10, 10), row, resize)
