"""Every published layout on a small imitation of it, folder pairs and list files, and what their labels become."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segzoo._errors import ImageError, SegzooError
from segzoo.data.classification import open_classification
from segzoo.data.layouts import LAYOUTS, find_layouts
from segzoo.data.scenes import context, render
from segzoo.data.segmentation import SceneData, open_data, read_mask

SIZE = (2, 3)  # (H, W)


def put_image(path: Path, size=SIZE, value=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def put_mask(path: Path, values, dtype=np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype)).save(path)


def put_list(path: Path, *stems: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{stem}\n" for stem in stems))


# One row a form: layout, its split, image, mask, list file or None, stored values, labels expected. The expected labels
# are written out by hand from the data sets' own descriptions.
FORMS = {
    "ade20k": (
        *("val", "images/validation/ADE_val_1.jpg", "annotations/validation/ADE_val_1.png", None),
        *([[0, 1, 150], [2, 255, 3]], [[255, 0, 149], [1, 255, 2]]),
    ),
    "cityscapes": (
        *(
            "val",
            "leftImg8bit/val/ulm/ulm_0_0_leftImg8bit.png",
            "gtFine/val/ulm/ulm_0_0_gtFine_labelTrainIds.png",
            None,
        ),
        *([[0, 18, 255], [5, 6, 7]], [[0, 18, 255], [5, 6, 7]]),
    ),
    "cityscapes ids": (
        *("train", "leftImg8bit/train/ulm/u_1_leftImg8bit.png", "gtFine/train/ulm/u_1_gtFine_labelIds.png", None),
        # road, bicycle, unlabelled; rider, trailer, car
        *([[7, 33, 0], [25, 30, 26]], [[0, 18, 255], [12, 255, 13]]),
    ),
    "coco_stuff164k": (
        *("val", "images/val2017/000000000139.jpg", "annotations/val2017/000000000139_labelTrainIds.png", None),
        *([[0, 170, 255], [1, 2, 3]], [[0, 170, 255], [1, 2, 3]]),
    ),
    "coco_stuff164k maps": (
        *("train", "images/train2017/000000000009.jpg", "annotations/train2017/000000000009.png", None),
        # stored is the id less one: person 1, stop sign 13, the unused 12, toothbrush 90, banner 92, wood 182
        *([[0, 12, 11], [89, 91, 181]], [[0, 11, 255], [79, 80, 170]]),
    ),
    "coco_stuff10k": (
        *("val", "images/test2014/COCO_1.jpg", "annotations/test2014/COCO_1_labelTrainIds.png", None),
        *([[0, 1, 171], [2, 2, 2]], [[255, 0, 170], [1, 1, 1]]),
    ),
    "pascal_context_59": (
        *("val", "JPEGImages/2008_1.jpg", "SegmentationClassContext/2008_1.png"),
        *("ImageSets/SegmentationContext/val.txt", [[0, 1, 59], [2, 2, 2]], [[255, 0, 58], [1, 1, 1]]),
    ),
    "pascal_context_60": (
        *("train", "JPEGImages/2008_1.jpg", "SegmentationClassContext/2008_1.png"),
        *("ImageSets/SegmentationContext/train.txt", [[0, 1, 59], [2, 2, 2]], [[0, 1, 59], [2, 2, 2]]),
    ),
    "voc": (
        *("val", "JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png", "ImageSets/Segmentation/val.txt"),
        *([[0, 20, 255], [2, 2, 2]], [[0, 20, 255], [2, 2, 2]]),
    ),
    "voc aug": (
        *("trainaug", "JPEGImages/2007_2.jpg", "SegmentationClassAug/2007_2.png"),
        *("ImageSets/Segmentation/trainaug.txt", [[0, 20, 255], [2, 2, 2]], [[0, 20, 255], [2, 2, 2]]),
    ),
    "camvid": (
        *("test", "test/0001TP_1.png", "testannot/0001TP_1.png", None),
        *([[0, 10, 11], [2, 2, 2]], [[0, 10, 255], [2, 2, 2]]),
    ),
    "folder": (
        *("val", "images/val/a/1.jpg", "masks/val/a/1.png", None),
        *([[0, 1, 255], [2, 2, 2]], [[0, 1, 255], [2, 2, 2]]),
    ),
    "folder flat": (
        *("all", "images/1.webp", "masks/1.png", None),
        *([[0, 1, 255], [2, 2, 2]], [[0, 1, 255], [2, 2, 2]]),
    ),
}


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    split, image, mask, listed, stored, labels = FORMS[request.param]
    put_image(tmp_path / image, value=7)
    put_mask(tmp_path / mask, stored)
    if listed:
        put_list(tmp_path / listed, Path(image).stem)
        put_image(tmp_path / Path(image).with_name("not_listed.jpg"))
    return request.param.split()[0], split, tmp_path, labels


def test_layout(form):
    layout, split, root, labels = form
    data = open_data(f"{layout}:{root}", split=split)
    assert (data.name, data.split, len(data)) == (layout, split, 1)
    sample = data[0]
    assert sample.labels.tolist() == labels
    assert sample.labels.dtype == np.uint8
    assert sample.image.shape == (*SIZE, 3)
    assert abs(int(sample.image.mean()) - 7) <= 1  # JPEG
    expected = LAYOUTS[layout].label_set
    assert data.labels is None if expected is None else data.labels.name == expected
    assert [s.name for s in data] == [sample.name]


def test_the_folder_tells_the_layout(form):
    layout, split, root, _ = form
    found = [candidate.name for candidate in find_layouts(root, split)]
    if layout.startswith("pascal_context"):
        assert found == ["pascal_context_59", "pascal_context_60"]
        with pytest.raises(SegzooError, match="may be pascal_context_59, pascal_context_60; say which"):
            open_data(root, split=split)
        assert open_data(root, split=split, num_classes=60).name == "pascal_context_60"
    else:
        assert found == [layout]
        assert open_data(root, split=split).name == layout


def test_every_layout_is_imitated():
    assert {name.split()[0] for name in FORMS} == set(LAYOUTS)


def test_train_ids_win_over_ids(tmp_path):
    put_image(tmp_path / "leftImg8bit/val/ulm/u_leftImg8bit.png")
    put_mask(tmp_path / "gtFine/val/ulm/u_gtFine_labelIds.png", [[7, 7, 7], [7, 7, 7]])
    put_mask(tmp_path / "gtFine/val/ulm/u_gtFine_labelTrainIds.png", [[3, 3, 3], [3, 3, 3]])
    assert np.unique(open_data(tmp_path)[0].labels).tolist() == [3]


def pair(root: Path, stored, **record) -> None:
    put_image(root / "images/1.png")
    put_mask(root / "masks/1.png", stored)
    if record:
        (root / "dataset.json").write_text(json.dumps(record))


def test_dataset_json(tmp_path):
    record = {"classes": ["road", "car"], "reduce_zero_label": True, "ignore_index": 99}
    pair(tmp_path, [[0, 1, 2], [99, 1, 2]], **record)
    data = open_data(tmp_path)
    assert data.labels.classes == ("road", "car")
    assert (data.ignore_index, data.labels.ignore_index, data.reduce_zero_label) == (99, 99, True)
    assert data[0].labels.tolist() == [[99, 0, 1], [99, 0, 1]]
    assert open_data(tmp_path, reduce_zero_label=False).reduce_zero_label is False


def test_sixteen_bits(tmp_path):
    put_image(tmp_path / "images/1.png")
    put_mask(tmp_path / "masks/1.png", [[0, 300, 65535], [1, 1, 1]], np.uint16)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"classes": [str(i) for i in range(400)], "ignore_index": 65535, "reduce_zero_label": True})
    )
    data = open_data(tmp_path)
    assert data[0].labels.tolist() == [[65535, 299, 65535], [0, 0, 0]]
    assert data[0].labels.dtype == np.int32


def test_palette_masks_are_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    image.putpalette([9, 9, 9] * 256)
    image.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[0, 1], [2, 255]]


def test_list_file(tmp_path):
    put_image(tmp_path / "a/1.png")
    put_mask(tmp_path / "b/1 x.png", [[0, 1, 1], [1, 1, 1]])
    (tmp_path / "val.txt").write_text("a/1.png\tb/1 x.png\n\n")
    (tmp_path / "dataset.json").write_text('{"label_set": "camvid"}')
    data = open_data(tmp_path / "val.txt")
    assert (data.name, data.split, data.num_classes, len(data)) == ("list", "val", 11, 1)
    assert data[0].labels.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_paired_landscapes():
    data = open_data("context")
    assert isinstance(data, SceneData) and len(data) == 200 and data.num_classes == 17
    assert np.array_equal(data[1].labels, context.render(seed=1_000_001)[1])
    assert len(open_data("context", split="train")) == 4000


def test_scenes():
    data = open_data("scenes")
    assert isinstance(data, SceneData) and len(data) == 200 and data.num_classes == 13
    image, labels = render(seed=1_000_001)
    assert np.array_equal(data[1].image, image) and np.array_equal(data[1].labels, labels)
    assert len(data.first(3)) == 3 and len(list(data.first(2))) == 2
    assert open_data("scenes", split="train").first_seed == 0
    with pytest.raises(IndexError):
        data[200]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"klasses": []}', "unknown key 'klasses'"),
        ('{"classes": []}', "classes must be a list of names"),
        ('{"classes": ["a", "a"]}', "appears twice"),
        ('{"classes": ["a", "b"], "ignore_index": 1}', "also the index of a class"),
        ('{"label_set": "mars"}', "label_set must be one of ade20k"),
        ('{"reduce_zero_label": 1}', "true or false"),
        ("[]", "must hold an object"),
        ("{", "is no JSON file"),
        ("[" * 100_000, "is no JSON file"),
        ('{"classes": ["a"], "ignore_index": true}', "ignore_index must be a whole number"),
        (json.dumps({"classes": [str(i) for i in range(65536)]}), "65535"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_record_is_refused(tmp_path, record, message):
    pair(tmp_path, [[0, 1, 1], [1, 1, 1]])
    (tmp_path / "dataset.json").write_text(record)
    with pytest.raises(SegzooError, match=message):
        open_data(tmp_path)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(SegzooError, match="no such folder"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(SegzooError, match="in no layout that segzoo knows: ade20k"):
        open_data(tmp_path)
    with pytest.raises(SegzooError, match="there is no layout 'ade'; layouts: ade20k, "):
        open_data(tmp_path, layout="ade")
    (tmp_path / "list.txt").write_text("a b c\n")
    with pytest.raises(SegzooError, match="line 1: an image and its mask"):
        open_data(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("a\0 b\n")
    with pytest.raises(SegzooError, match="line 1: an image and its mask"):
        open_data(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe a\n")
    with pytest.raises(SegzooError, match="no list of images and masks in UTF-8"):
        open_data(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(SegzooError, match="lists no image"):
        open_data(tmp_path / "list.txt")
    pair(tmp_path, [[0, 1, 1], [1, 1, 1]])
    with pytest.raises(SegzooError, match="no split 'val' of layout folder; it has all"):
        open_data(tmp_path, split="val")
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(SegzooError, match="no image of split 'all'"):
        open_data(tmp_path)
    with pytest.raises(SegzooError, match="scenes have train, val"):
        open_data("scenes", split="test")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda p: p.unlink(), "has no mask"),
        (lambda p: put_mask(p, [[0, 1], [1, 1]]), "2 x 2 pixels, its image 3 x 2"),
        (
            lambda p: put_mask(p, [[0, 1, 2], [2, 7, 8]]),
            r"labels \[2, 7, 8\], which are none of the 2 classes from 0 on nor 255",
        ),
        (lambda p: put_image(p), "mode RGB"),
        (lambda p: p.write_bytes(b"x"), "no mask that Pillow can read"),
    ],
)
def test_a_bad_mask_is_named(tmp_path, fault, message):
    pair(tmp_path, [[0, 1, 1], [1, 1, 1]], classes=["a", "b"])
    fault(tmp_path / "masks/1.png")
    with pytest.raises(ImageError, match=message):
        open_data(tmp_path)[0]


def test_a_lossy_mask_is_refused(tmp_path):
    path = tmp_path / "mask.jpg"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    with pytest.raises(ImageError, match="in JPEG, which changes labels"):
        read_mask(path)


def test_class_folders(tmp_path):
    for name in ("val/n02/b.JPEG", "val/n01/a.JPEG", "val/n01/c.png", "train/n01/x.JPEG"):
        put_image((tmp_path / name).with_suffix(".png"))
        (tmp_path / name).with_suffix(".png").rename(tmp_path / name)
    (tmp_path / "val/n01/notes.txt").write_text("")
    data = open_classification(tmp_path)
    assert data.classes == ("n01", "n02") and data.split == "val"
    found = [(path.name, index) for path, index in (data[i] for i in range(len(data)))]
    assert found == [("a.JPEG", 0), ("c.png", 0), ("b.JPEG", 1)]
    assert len(open_classification(tmp_path, split="train")) == 1
    with pytest.raises(SegzooError, match="no folder .*test"):
        open_classification(tmp_path, split="test")
    with pytest.raises(SegzooError, match="has no CLASS"):
        open_classification(tmp_path / "val" / "n01")
