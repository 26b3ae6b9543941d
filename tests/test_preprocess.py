"""Every kind of image that people have: accepted, or refused as an ImageError that says what is needed."""

from __future__ import annotations

import io
import os
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import segzoo
from segzoo._errors import ImageError
from segzoo.models import PretrainedCfg
from segzoo.preprocess import load_image, model_size, to_input

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


# --- the size at which the model sees an image, by hand ---------------------------------------------------------------

ADE20K = PretrainedCfg(test_size=(512, 2048), size_divisor=32)
SEGVIT_ADE20K = PretrainedCfg(test_size=(512, 2048), test_min_side=512)
SEGVIT_PASCAL = PretrainedCfg(test_size=(520, 520), test_min_side=480)


@pytest.mark.parametrize(
    ("row", "image_size", "expected"),
    [
        (PretrainedCfg(test_size=(512, 2048)), (333, 500), (512, 769)),  # 500 * 512 / 333 = 768.8, rounded, not cut
        (PretrainedCfg(test_size=(512, 2048)), (500, 333), (769, 512)),
        (PretrainedCfg(resize="none"), (33, 77), (33, 77)),
        (PretrainedCfg(resize="none", size_divisor=32), (33, 64), (64, 64)),
        (ADE20K, (600, 900), (512, 768)),
        (ADE20K, (1, 2_000_000), (32, 2048)),
        (ADE20K, (2_000_000, 1), (2048, 32)),
        (SEGVIT_ADE20K, (480, 640), (512, 683)),  # 640 * 512 / 480 = 682.7
        (SEGVIT_ADE20K, (300, 2000), (512, 3413)),  # into (512, 2048) by 1.024, enlarged to 512 / 300
        (SEGVIT_ADE20K, (100, 1600), (512, 8192)),  # 16:1
        (SEGVIT_ADE20K, (10, 1000), (82, 8192)),  # longer: enlarged to 16 * 512 at the long side
        (SEGVIT_ADE20K, (1, 2_000_000), (1, 8192)),
        (SEGVIT_PASCAL, (375, 500), (480, 640)),  # 1.04 would do for 520; 480 / 375 = 1.28 is needed
        (SEGVIT_PASCAL, (500, 500), (520, 520)),
    ],
)
def test_model_size(row, image_size, expected):
    assert model_size(image_size, row, None) == expected


def test_the_rows_of_segvit_have_its_rule():
    rows = [segzoo.model_info(name).pretrained_cfg for name in segzoo.list_pretrained("segvit_*")]
    rules = {(row.dataset, row.test_size, row.test_min_side) for row in rows if row.test_min_side > 1}
    assert {size for _, size, _ in rules} >= {(512, 2048), (520, 520)}
    assert {side for _, size, side in rules if size == (520, 520)} == {480}


# --- what a model is given, by hand -----------------------------------------------------------------------------------

PLAIN = PretrainedCfg(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_one_channel_has_the_mean_statistics():
    """(1 - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3) = 0.551 / 0.226."""
    x_BCHW = to_input(np.full((2, 2, 1), 255, np.uint8), (2, 2), PretrainedCfg(), torch.zeros(1))
    torch.testing.assert_close(x_BCHW, torch.full((1, 1, 2, 2), 0.551 / 0.226), rtol=1e-5, atol=0)


def test_shrinking_has_antialias():
    """From 4 pixels to 2, each new one sees those within 2 of its centre by 1 - distance / 2: 3, 3 and 1 sevenths."""
    row = np.array([[0, 0, 255, 0]], np.uint8)[..., None].repeat(3, axis=2)
    x_BCHW = to_input(row, (1, 2), PLAIN, torch.zeros(1))
    torch.testing.assert_close(x_BCHW[0, :, 0], torch.tensor([[1 / 7, 3 / 7]] * 3))


def test_enlarging_has_half_pixel_centres():
    row = np.array([[0, 255]], np.uint8)[..., None].repeat(3, axis=2)
    x_BCHW = to_input(row, (1, 4), PLAIN, torch.zeros(1))
    torch.testing.assert_close(x_BCHW[0, :, 0], torch.tensor([[0, 0.25, 0.75, 1]] * 3))


# --- images that lie --------------------------------------------------------------------------------------------------


def test_pixels_are_bounded_before_they_are_decoded(monkeypatch):
    data = encoded(Image.fromarray(RGB))
    monkeypatch.setenv("SEGZOO_MAX_PIXELS", "256")
    assert load_image(data).shape == (16, 16, 3)
    monkeypatch.setenv("SEGZOO_MAX_PIXELS", "255")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("was decoded"))
    for source in (data, RGB):
        with pytest.raises(ImageError, match="16 x 16 pixels are more than the 255.*SEGZOO_MAX_PIXELS=256"):
            load_image(source)
    monkeypatch.setenv("SEGZOO_MAX_PIXELS", "many")
    with pytest.raises(segzoo.SegzooError, match="whole number"):
        load_image(data)


def test_a_small_file_of_many_pixels_is_refused(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (9400, 9400)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(ImageError, match="huge.png: 9400 x 9400 pixels.*SEGZOO_MAX_PIXELS=88360000"):
        load_image(path)


@pytest.mark.parametrize("row", [PretrainedCfg(resize="none"), ADE20K])
def test_what_the_model_sees_is_bounded(row):
    with pytest.raises(ImageError, match="200000 x 200000 pixels.*SEGZOO_MAX_PIXELS"):
        model_size((8, 8), row, (200_000, 200_000))
    assert model_size((8, 8), row, (8192, 8192)) == (8192, 8192)


def test_pipes_and_devices_are_no_images(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(ImageError, match="no ordinary file"):
            load_image(path)
