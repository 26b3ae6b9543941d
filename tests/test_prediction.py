"""The walk from anything a user calls an image to a mask of its own size, and every way in which that can fail."""

from __future__ import annotations

import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import segzoo
from segzoo import prediction
from segzoo.masks import class_map
from segzoo.models import PretrainedCfg
from segzoo.prediction import posing
from segzoo.preprocess import load_image, model_size, to_input


@pytest.fixture(scope="module")
def model():
    return make("test_edaformer")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def png(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=options.pop("format", "PNG"), **options)
    return stream.getvalue()


KINDS = ["test_edaformer", "test_segvit"]  # one a kind of score


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return segzoo.create_model(name).eval()


def opened(path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


# --- what goes in -----------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_mask(model, photo, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    sources = [photo, Image.fromarray(photo), path, str(path), path.read_bytes()]
    masks = [result.mask for result in segzoo.predict(model, sources)]
    for mask in masks:
        assert mask.shape == (60, 90)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, masks[0])


def test_open_files(model, photo, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    mask = segzoo.predict(model, photo).mask
    with path.open("rb") as file:
        file.read()
        result = segzoo.predict(model, file)  # wherever its position is
        assert np.array_equal(result.mask, mask)
        assert result.source == str(path)
    with pytest.raises(segzoo.SegzooError, match="photo.png cannot be read"):
        segzoo.predict(model, file)
    with path.open("rb") as file, io.BufferedReader(NoSeeking(file)) as stream:
        assert np.array_equal(segzoo.predict(model, stream).mask, mask)
    with path.open(encoding="latin1") as file, pytest.raises(segzoo.SegzooError, match="'rb'"):
        segzoo.predict(model, file)


class NoSeeking(io.RawIOBase):
    """As a pipe or a socket is."""

    def __init__(self, file):
        self.file = file

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.file.readinto(buffer)


def test_an_iterator_is_segmented_as_it_goes(model, photo, tmp_path):
    taken = []

    def frames():
        for source in (photo, tmp_path / "missing.png", photo):
            taken.append(source)
            yield source

    results = segzoo.predict(model, frames())
    assert taken == []
    assert next(results).mask.shape == (60, 90)
    assert len(taken) == 1
    with pytest.raises(segzoo.SegzooError, match="missing.png"):
        next(results)
    assert next(results).mask.shape == (60, 90)  # it goes on
    assert list(results) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_its_images_one_by_one(name, photo, tmp_path):
    model, sizes = make(name), []
    forward_features = model.encoder.forward_features
    model.encoder.forward_features = lambda x: sizes.append(tuple(x.shape)) or forward_features(x)
    images = [photo, photo[::-1].copy(), photo[:40, :40], photo[:, ::-1].copy()]
    together = segzoo.predict(model, images, batch_size=3)
    assert [size[0] for size in sizes] == [2, 1, 1]  # of the first three two have one size
    for image, result in zip(images, together, strict=True):
        alone = segzoo.predict(model, image)
        torch.testing.assert_close(result.scores(), alone.scores(), rtol=1e-4, atol=1e-5)
        assert np.array_equal(result.image, image)
    views = segzoo.predict(model, images, batch_size=3, flip=True)
    assert np.array_equal(views[1].mask, segzoo.predict(model, images[1], flip=True).mask)
    with pytest.raises(segzoo.SegzooError, match="missing.png") as error:
        segzoo.predict(model, [photo, tmp_path / "missing.png", photo], batch_size=2)
    assert [result is None for result in error.value.results] == [False, True, False]
    with pytest.raises(segzoo.SegzooError, match="batch_size"):
        segzoo.predict(model, images, batch_size=0)


def test_the_model_keeps_its_mode(photo):
    model = segzoo.create_model("test_edaformer").train()
    model.encoder.eval()
    segzoo.predict(model, photo)
    assert model.training
    assert not model.encoder.training
    assert model.decoder.training


def test_exif_orientation(photo):
    upright = Image.fromarray(photo)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    data = png(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert np.array_equal(load_image(data), photo)


def test_conversions():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(load_image(png(Image.fromarray(grey))), rgb)
    assert np.array_equal(load_image(png(Image.fromarray(grey.astype(np.uint16) * 257))), rgb)
    assert np.array_equal(load_image(png(Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE))), rgb)
    assert np.array_equal(load_image(png(Image.fromarray(rgb).convert("CMYK"), format="TIFF")), rgb)
    assert np.array_equal(load_image(png(Image.fromarray(grey > 127))), np.where(rgb > 127, 255, 0))
    assert np.array_equal(load_image(grey), rgb)
    assert np.array_equal(load_image(grey[..., None]), rgb)


def test_transparency_is_laid_over_white():
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[:2, :, 0] = rgba[:2, :, 3] = 255
    for image in (load_image(png(Image.fromarray(rgba))), load_image(rgba)):
        assert (image[:2] == (255, 0, 0)).all()
        assert (image[2:] == 255).all()


def test_other_channel_counts():
    multi = segzoo.create_model("test_edaformer", in_chans=5).eval()
    assert segzoo.predict(multi, np.zeros((20, 30, 5), dtype=np.uint8)).mask.shape == (20, 30)
    single = segzoo.create_model("test_edaformer", in_chans=1).eval()
    assert segzoo.predict(single, np.zeros((20, 30, 3), dtype=np.uint8)).mask.shape == (20, 30)
    with pytest.raises(segzoo.SegzooError, match=r"\(H, W, 5\)"):
        segzoo.predict(multi, np.zeros((20, 30, 3), dtype=np.uint8))


def test_resize_rules(model):
    row = segzoo.model_info("edaformer_t.ade20k").pretrained_cfg
    assert model_size((600, 900), row, None) == (512, 768)
    assert model_size((100, 1000), row, None) == (224, 2048)  # long side bounded, then up to a multiple of 32
    assert model_size((600, 900), row, (97, 131)) == (97, 131)
    with pytest.raises(segzoo.SegzooError, match="resize"):
        segzoo.predict(model, np.zeros((9, 9, 3), np.uint8), resize=(0, 5))


def test_normalisation():
    row = segzoo.model_info("edaformer_t.ade20k").pretrained_cfg
    x = to_input(np.full((4, 6, 3), 255, np.uint8), (4, 6), row, torch.zeros(1, dtype=torch.float64))
    expected = [(1 - mean) / std for mean, std in zip(row.mean, row.std, strict=True)]
    assert x.dtype == torch.float64
    assert x[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


# --- what comes out -----------------------------------------------------------------------------------------------


def test_segmentation(model, photo, tmp_path):
    result = segzoo.predict(model, photo)
    assert np.array_equal(result.scores().argmax(0).numpy(), result.mask)
    assert sum(label.pixels for label in result.labels) == 60 * 90
    assert [label.pixels for label in result.labels] == sorted((x.pixels for x in result.labels), reverse=True)
    assert np.array_equal(np.asarray(result.overlay(0)), photo)
    assert result.overlay().size == (90, 60)
    mask_path, overlay_path, classes_path = result.save(tmp_path / "new" / "mask.png", legend=False)
    saved = opened(mask_path)
    assert saved.mode == "P"
    assert np.array_equal(np.asarray(saved), result.mask)
    colours = np.asarray(saved.convert("RGB"))
    first = result.labels[0].index
    assert (colours[result.mask == first] == result.label_set.palette[first]).all()
    assert opened(overlay_path).size == (90, 60)
    written = {path.name for path in mask_path.parent.iterdir()}
    assert written == {"mask.png", overlay_path.name, classes_path.name}


def test_more_than_256_classes_are_saved_as_16_bit(photo, tmp_path):
    result = segzoo.predict(segzoo.create_model("test_edaformer", num_classes=300).eval(), photo)
    assert result.mask.dtype == np.uint16
    path = result.save(tmp_path / "mask.png").mask
    assert np.array_equal(np.asarray(opened(path)), result.mask)


def test_one_resize_of_the_scores(model, photo):
    """The mask is the argmax of the decoder's scores resized once, straight to the image's size."""
    row = model.pretrained_cfg or segzoo.models.PretrainedCfg()
    with torch.no_grad():
        x = to_input(photo, (64, 96), row, torch.zeros(1))
        scores = model.to_size(model.forward_head(model.forward_features(x)), (60, 90))
    assert np.array_equal(segzoo.predict(model, photo, resize=(64, 96)).mask, scores.argmax(1)[0].numpy())


@pytest.mark.parametrize("name", segzoo.list_models("test_*former"))
def test_low_memory_masks_are_exact(name):
    torch.manual_seed(1)
    model = segzoo.create_model(name).eval()
    with torch.no_grad():
        head_output = model.forward_head(model.forward_features(torch.randn(2, 3, 64, 96)))
        full = model.to_size(head_output, (131, 77)).argmax(1)
        for chunk_bytes in (1, 200_000, 2**30):
            assert torch.equal(class_map(model, head_output, (131, 77), chunk_bytes).long(), full)


@pytest.mark.parametrize("name", segzoo.list_models("test_segvit*"))
def test_low_memory_masks_of_products(name):
    torch.manual_seed(1)
    model = segzoo.create_model(name).double().eval()
    with torch.no_grad():
        head_output = model.forward_head(model.forward_features(torch.randn(2, 3, 50, 70).double()))
        scores = model.to_size(head_output, (131, 77))
        for chunk_bytes in (1, 200_000, 2**30):
            mask = class_map(model, head_output, (131, 77), chunk_bytes).long()
            # Random queries score almost alike: what is chosen must have the best score, whichever of equals it is.
            torch.testing.assert_close(scores.gather(1, mask[:, None])[:, 0], scores.amax(1), rtol=0, atol=1e-12)


def test_ties_go_to_the_lower_class(model):
    assert class_map(model, torch.zeros(1, 5, 4, 4), (8, 8), chunk_bytes=1).eq(0).all()


# --- sliding window -------------------------------------------------------------------------------------------------


def test_one_window_is_the_whole_image(model, photo):
    whole = segzoo.predict(model, photo, resize=(64, 96))
    slide = segzoo.predict(model, photo, resize=(64, 96), mode="slide", crop=(64, 96), stride=(64, 96))
    bigger = segzoo.predict(model, photo, resize=(64, 96), mode="slide", crop=(640, 960), stride=(64, 96))
    # Two resizes here (to the input's size, then to the image's) against one: scores differ a little at most.
    numpy_s = segzoo.predict(model, photo, resize=(64, 96), mode="slide", crop=np.array((64, 96)), stride=(64, 96))
    assert np.array_equal(slide.mask, numpy_s.mask)
    assert (whole.mask == slide.mask).mean() > 0.97
    assert np.array_equal(slide.mask, bigger.mask)


@pytest.mark.parametrize("name", KINDS)
def test_sliding_window_averages_as_a_plain_loop_does(name, photo):
    model = make(name)
    x = to_input(photo, (60, 90), segzoo.models.PretrainedCfg(), torch.zeros(1))
    total, count = torch.zeros(1, model.num_classes, 60, 90), torch.zeros(60, 90)
    with torch.no_grad():
        for y in (0, 20, 28):  # the last window ends at the border: 60 - 32
            for left in (0, 30, 42):
                total[:, :, y : y + 32, left : left + 48] += model(x[:, :, y : y + 32, left : left + 48])
                count[y : y + 32, left : left + 48] += 1
    result = segzoo.predict(model, photo, resize=(60, 90), mode="slide", crop=(32, 48), stride=(20, 30))
    torch.testing.assert_close(result.scores(), (total / count)[0])
    assert np.array_equal(result.mask, result.scores().argmax(0))


@pytest.mark.parametrize("name", KINDS)
def test_the_scores_of_a_whole_image_are_the_model_s(name, photo):
    model = make(name)
    x = to_input(photo, (60, 90), segzoo.models.PretrainedCfg(), torch.zeros(1))
    result = segzoo.predict(model, photo, resize=(60, 90))
    with torch.no_grad():
        torch.testing.assert_close(result.scores(), model(x)[0])
    assert (result.mask == result.scores().argmax(0).numpy()).mean() > 0.999  # products: up to rounding


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_views_average_as_a_plain_loop_does(name, mode, photo):
    model = make(name)
    options = {} if mode == "whole" else {"mode": mode, "crop": (640, 640), "stride": (64, 64)}
    total, views = 0, []
    for size in ((60, 90), (30, 45)):
        x = to_input(photo, size, segzoo.models.PretrainedCfg(), torch.zeros(1))
        views += [(x, False), (x.flip(-1), True)]
    for x, mirrored in views:
        with torch.no_grad():
            scores = model(x) if mode == "slide" else model.forward_head(model.forward_features(x))
            to_size = torch.nn.functional.interpolate if mode == "slide" else model.to_size
            scores = to_size(scores, (60, 90), **({"mode": "bilinear"} if mode == "slide" else {}))
        if model.score_kind == "logits":
            scores = scores.softmax(1)
        total = total + (scores.flip(-1) if mirrored else scores)
    result = segzoo.predict(model, photo, resize=(60, 90), scales=(1.0, 0.5), flip=True, **options)
    torch.testing.assert_close(result.scores(), (total / len(views))[0])
    assert np.array_equal(result.mask, result.scores().argmax(0))


def test_looks_at_an_image_are_counted(model, photo):
    """The photo is 60 x 90: at scale 1 in three rows of three windows, at 0.5 in one, and all of them mirrored."""
    told = []

    def look(**options):
        protocol = prediction.protocol_of(segzoo.models.PretrainedCfg(), resize=(60, 90), **options)
        told.clear()
        prediction.segment_one(prediction.mask_maker(model), photo, protocol, lambda *counts: told.append(counts))
        return told

    slide = {"mode": "slide", "crop": (32, 48), "stride": (20, 30)}
    assert look(**slide, scales=(1, 0.5), flip=True) == [(done, 20) for done in range(21)]
    assert look(scales=(1, 0.5), flip=True) == [(done, 4) for done in range(5)]
    assert look() == []


def test_one_scale_keeps_the_kind_of_score(model, photo):
    half = segzoo.predict(model, photo, resize=(60, 90), scales=[0.5])
    assert torch.equal(half.scores(), segzoo.predict(model, photo, resize=(30, 45)).scores())


def test_a_result_stands_alone(model, photo):
    frame = photo.copy()
    result = segzoo.predict(model, frame)
    scores = result.scores()
    frame[:] = 0
    scores.sub_(scores.max())  # the caller's own, and no inference tensor
    assert np.array_equal(result.image, photo)
    assert result.scores().max() > scores.max() == 0
    copy = pickle.loads(pickle.dumps(result))
    assert np.array_equal(copy.mask, result.mask)
    assert copy.labels == result.labels
    with pytest.raises(segzoo.SegzooError, match="scores"):
        copy.scores()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiles"}, "'whole' or 'slide'"),
        ({"crop": (32, 32)}, "mode='slide'"),
        ({"mode": "slide", "crop": (32, 32), "stride": (64, 64)}, "stride <= crop"),
        ({"mode": "slide", "crop": (32, 32), "stride": (0, 1)}, "stride must be"),
        ({"mode": "slide", "crop": 32}, "crop must be"),
        ({"scales": 1.0}, "scales must be"),
        ({"scales": ()}, "scales must be"),
        ({"scales": (1.0, 0.0)}, "scales must be"),
        ({"scales": (1e9,)}, "at most 64"),
        ({"scales": (1.0, 64.0)}, "at scale 64.0: 32768 x 49152 pixels.*SEGZOO_MAX_PIXELS"),
    ],
)
def test_wrong_options(model, photo, options, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        segzoo.predict(model, photo, **options)


# --- the protocol, by hand --------------------------------------------------------------------------------------------


def sizes_seen(row: PretrainedCfg, seen_size: tuple[int, int], **options) -> list[tuple[int, int]]:
    model = segzoo.create_model("test_edaformer", pretrained_cfg_overlay=dataclasses.asdict(row))
    protocol = prediction.protocol_of(row, **options)
    image_HWC = np.zeros((10, 10, 3), np.uint8)
    seen = prediction.views(prediction.score_maker(model), image_HWC, seen_size, protocol)
    return [tuple(view.x.shape[2:]) for view in seen]


def test_scaled_views_keep_the_divisor():
    row = PretrainedCfg(size_divisor=32)
    # 0.7 * (64, 96) = (44.8, 67.2), up to multiples of 32; an exact `resize` knows no divisor
    assert sizes_seen(row, (64, 96), scales=(0.7, 1.0)) == [(64, 96), (64, 96)]
    assert sizes_seen(row, (64, 96), scales=(0.5,), flip=True) == [(32, 64), (32, 64)]
    assert sizes_seen(row, (64, 96), scales=(0.7,), resize=(64, 96)) == [(45, 68)]


def test_the_default_stride_is_two_thirds_of_the_window():
    protocol = prediction.protocol_of(PretrainedCfg(), mode="slide", crop=(48, 32))
    assert (protocol.crop, protocol.stride) == ((48, 32), (32, 21))
    assert prediction.protocol_of(PretrainedCfg(input_size=(90, 3)), mode="slide").stride == (60, 2)
    starts = [(rows.start, columns.start) for rows, columns in prediction.windows((80, 60), (48, 32), protocol.stride)]
    assert starts == [(0, 0), (0, 21), (0, 28), (32, 0), (32, 21), (32, 28)]


def test_windows_without_end_are_refused(photo):
    model = segzoo.create_model("test_edaformer")
    with pytest.raises(segzoo.SegzooError, match="120 x 100 pixels .* 12,000 windows of 1 x 1, more than 10,000"):
        segzoo.predict(model, photo, resize=(120, 100), mode="slide", crop=(1, 1), stride=(1, 1))


def test_a_keypoint_box_is_rounded_outwards(monkeypatch):
    seen, original = [], posing.to_input
    monkeypatch.setattr(posing, "to_input", lambda part, *rest: seen.append(part.copy()) or original(part, *rest))
    image_HWC = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    model = segzoo.create_model("test_segformer_keypoints")
    prediction.predict_keypoints(model, image_HWC, box=(9.6, 5.2, 30.1, 20), resize=(32, 32))
    assert np.array_equal(seen[0], image_HWC[5:20, 9:31])


def test_half_precision_scores_are_widened_before_the_resize(photo):
    model = make("test_segformer").bfloat16()
    x = to_input(photo, (64, 96), PretrainedCfg(), torch.zeros(1, dtype=torch.bfloat16))
    with torch.no_grad():
        head_output = model.forward_head(model.forward_features(x))
    wide = torch.nn.functional.interpolate(head_output.float(), (60, 90), mode="bilinear")
    assert torch.equal(segzoo.predict(model, photo, resize=(64, 96)).scores(), wide[0])


@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (256, torch.uint8), (257, torch.uint16)])
def test_the_dtype_of_a_mask(classes, dtype):
    scores = torch.zeros(1, classes, 1, 2)
    scores[0, -1] = 1
    for chunk_bytes in (1, 2**20):
        mask = class_map(prediction.AVERAGED, scores, (2, 4), chunk_bytes)
        assert mask.dtype == dtype
        assert (mask.numpy() == classes - 1).all()


def test_a_save_that_fails_midway_leaves_the_old_file(model, photo, tmp_path, monkeypatch):
    result = segzoo.predict(model, photo, resize=(64, 96))
    path = tmp_path / "mask.png"
    path.write_bytes(b"the old one")

    def half(image, partial, **options):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(segzoo.SegzooError, match="No space left"):
        result.save(path, overwrite=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("mask.png", b"the old one")]


# --- bad input --------------------------------------------------------------------------------------------------------


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def cut_jpeg(photo: np.ndarray) -> bytes:
    data = png(Image.fromarray(photo), format="JPEG")
    return data[: len(data) // 2]


BAD_IMAGES = {
    "missing": (lambda folder, photo: folder / "missing.png", "no such file"),
    "directory": (lambda folder, photo: folder, "is a directory"),
    "empty": (lambda folder, photo: write(folder / "empty.png", b""), "is empty"),
    "text": (lambda folder, photo: write(folder / "text.png", b"hello, a text"), "no image that Pillow can read"),
    "truncated jpeg": (lambda folder, photo: write(folder / "cut.jpg", cut_jpeg(photo)), "truncated"),
    "truncated png": (
        lambda folder, photo: write(folder / "cut.png", png(Image.fromarray(photo))[:-4000]),
        "truncated",
    ),
    "empty bytes": (lambda folder, photo: b"", "empty"),
    "no bytes of an image": (lambda folder, photo: b"\x00\x01", "no image"),
    "zero-sized": (lambda folder, photo: np.zeros((0, 5, 3), np.uint8), "no pixels"),
    "float": (lambda folder, photo: np.zeros((5, 5, 3)), "uint8"),
    "rank": (lambda folder, photo: np.zeros((1, 5, 5, 3), np.uint8), r"\(H, W, C\)"),
    "channels first": (lambda folder, photo: np.zeros((3, 50, 50), np.uint8), "channels come last"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(model, photo, tmp_path, case):
    make_source, message = BAD_IMAGES[case]
    source = make_source(tmp_path, photo)
    with pytest.raises(segzoo.SegzooError, match=message) as error:
        segzoo.predict(model, source)
    assert "\n" not in str(error.value)
    if not isinstance(source, (bytes, np.ndarray)):
        assert str(source) in str(error.value)


def test_decompression_bomb(model, photo, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.fromarray(photo).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(segzoo.SegzooError, match="decompression bomb"):
        segzoo.predict(model, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # large, but no bomb: Pillow only warns
    with pytest.warns(Image.DecompressionBombWarning):
        assert segzoo.predict(model, path).mask.shape == (60, 90)


def test_the_others_of_a_list_are_still_processed(model, photo, tmp_path):
    with pytest.raises(segzoo.SegzooError, match="missing.png") as error:
        segzoo.predict(model, [photo, tmp_path / "missing.png", photo])
    done = error.value.results
    assert [result is None for result in done] == [False, True, False]


def test_no_partial_file_is_left(model, photo, tmp_path):
    result = segzoo.predict(model, photo)
    with pytest.raises(segzoo.SegzooError, match=".png"):
        result.save(tmp_path / "mask.jpg")
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(segzoo.SegzooError, match="cannot be written"):
        result.save(blocked / "mask.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_encoder_cannot_predict(photo):
    with pytest.raises(segzoo.SegzooError, match="no segmentation model"):
        segzoo.predict(segzoo.create_model("test_eft"), photo)


def test_a_wrapped_model_is_pointed_out(model, photo):
    with pytest.raises(segzoo.SegzooError, match=r"pass its \.module"):
        segzoo.predict(torch.nn.DataParallel(model), photo)


def test_a_window_that_the_row_s_stride_does_not_fit(photo):
    row = {"test_mode": "slide", "crop": (64, 64), "stride": (48, 48)}
    model = segzoo.create_model("test_edaformer", pretrained_cfg_overlay=row).eval()
    with pytest.raises(segzoo.SegzooError, match="the stride of the weights row; give stride="):
        segzoo.predict(model, photo, crop=(32, 32))
