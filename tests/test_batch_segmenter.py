"""BatchSegmenter: a batch in, what `predict` says of each image out, in any process and whatever is wrong with some."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import segzoo
from segzoo.data import scenes
from segzoo.scale import BatchSegmenter

MODEL = "edaformer_t.scenes"


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [scenes.render(seed=5_000_000 + i, size=(64, 96))[0] for i in range(3)]


@pytest.fixture(scope="module")
def masks(images) -> list[np.ndarray]:
    model = segzoo.create_model("edaformer_t", pretrained=True)
    model.set_inference_reduction("fast")
    return [result.mask for result in segzoo.predict(model, images)]


@pytest.fixture(scope="module")
def segment() -> BatchSegmenter:
    return BatchSegmenter(model=MODEL, reduction="fast")


def png(image_HWC: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image_HWC).save(stream, format="PNG")
    return stream.getvalue()


def unpacked(mask_png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(mask_png)))


def test_arrays_bytes_and_paths_give_what_predict_gives(segment, images, masks, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png(image))
    names = [str(path) for path in paths]
    batches = [
        {"image": np.stack(images), "id": np.arange(3)},  # as Ray Data's map_batches gives it
        {"image": [Image.fromarray(image) for image in images], "id": [0, 1, 2]},  # as datasets.map does
        {"bytes": np.array([png(image) for image in images], dtype=object), "path": names, "id": [0, 1, 2]},
        {"path": np.array(names), "id": [0, 1, 2]},
    ]
    for batch in batches:
        out = segment(batch)
        kept = {"id", "path"} & set(batch)
        assert set(out) == {"mask_png", "areas", "error"} | kept
        assert list(out["id"]) == [0, 1, 2]
        assert "path" not in batch or list(out["path"]) == names
        assert out["error"] == ["", "", ""]
        assert out["areas"].dtype == np.int64
        for mask_png, areas_K, mask_HW in zip(out["mask_png"], out["areas"], masks, strict=True):
            assert np.array_equal(unpacked(mask_png), mask_HW)
            assert areas_K.tolist() == [(mask_HW == index).sum() for index in range(13)]
    assert segment.classes[:2] == ("sky", "building")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools with numpy 2
def test_run_lengths(images, masks):
    segment = BatchSegmenter(model=MODEL, reduction="fast", masks="rle", batch_size=3)
    out = segment({"image": images})
    for text, mask_HW in zip(out["mask_rle"], masks, strict=True):
        rebuilt_HW = np.full(mask_HW.shape, 255, np.uint8)
        for name, rle in json.loads(text).items():
            rebuilt_HW[coco.decode(rle).astype(bool)] = segment.classes.index(name)
        assert (rebuilt_HW == mask_HW).mean() > 0.999  # sums in another order


def test_bad_images_are_rows_and_stop_nothing(segment, images, masks):
    bad = [b"no image", png(images[0])[:200], None, np.zeros((4, 4, 3), np.float32)]
    out = segment({"image": [bad[0], images[0], *bad[1:], images[1]]})
    assert [bool(error) for error in out["error"]] == [True, False, True, True, True, False]
    assert "no image" in out["error"][0]
    assert out["mask_png"][0] == b"" and not out["areas"][0].any()
    assert np.array_equal(unpacked(out["mask_png"][1]), masks[0])
    assert np.array_equal(unpacked(out["mask_png"][5]), masks[1])
    all_bad = segment({"bytes": [b""]})
    assert {name: type(values) for name, values in all_bad.items()} == {
        name: type(values) for name, values in out.items()
    }
    assert all_bad["areas"].shape == (1, 13)
    assert segment({"image": []})["areas"].shape == (0, 13)


@pytest.mark.slow
def test_it_is_plain_data_that_builds_its_model_where_it_is_called(segment, images, masks):
    segment({"image": images[:1]})
    data = pickle.dumps(segment)
    assert len(data) < 1000
    code = (
        "import pickle, sys, numpy as np\n"
        "segment, image = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(segment({'image': [image]})['mask_png'][0])\n"
    )
    job = pickle.dumps((segment, images[0]))
    child = subprocess.run([sys.executable, "-c", code], input=job, capture_output=True, check=False)
    assert child.returncode == 0, child.stderr.decode()
    assert np.array_equal(unpacked(child.stdout), masks[0])


def test_an_engine(images):
    segment = BatchSegmenter(model=MODEL, reduction="fast", engine="eager")
    engine = segzoo.create_model("edaformer_t", pretrained=True)
    engine.set_inference_reduction("fast")
    expected = segzoo.predict(segzoo.compile(engine, "eager"), images[0]).mask
    again = pickle.loads(pickle.dumps(segment))
    assert np.array_equal(unpacked(again({"image": images[:1]})["mask_png"][0]), expected)


def test_in_datasets_map(segment, images, masks):
    rows = {"bytes": [b"no image", *map(png, images)], "id": list("abcd")}
    # The first batch holds nothing but a failure: the types of columns must be known all the same.
    done = datasets.Dataset.from_dict(rows).map(segment, batched=True, batch_size=1, remove_columns=["bytes"])
    assert done["id"] == list("abcd")
    assert [bool(error) for error in done["error"]] == [True, False, False, False]
    for mask_png, areas_K, mask_HW in list(zip(done["mask_png"], done["areas"], [None, *masks], strict=True))[1:]:
        assert np.array_equal(unpacked(mask_png), mask_HW)
        assert sum(areas_K) == 64 * 96


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "edaformer_q"}, "edaformer"),
        ({"model": MODEL, "masks": "jpeg"}, "'png' or 'rle'"),
        ({"model": MODEL, "engine": "cray"}, "engine"),
        ({"model": MODEL, "precision": "bf16"}, "are of an engine"),
        ({"model": MODEL, "engine": "eager", "device": "cuda"}, "leave out device"),
    ],
)
def test_options_that_are_none(options, words):
    with pytest.raises(segzoo.SegzooError, match=words):
        BatchSegmenter(**options)


@pytest.mark.parametrize("batch", [{"picture": [b""]}, {"image": [b""], "bytes": [b""]}])
def test_a_batch_without_one_column_of_images(segment, batch):
    with pytest.raises(segzoo.SegzooError, match="one column of images"):
        segment(batch)
