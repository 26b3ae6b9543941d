"""`check_data` finds every fault of masks by its kind, and finds none in good ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segzoo.data.checking import check_data
from segzoo.data.segmentation import open_data

GOOD = [[0, 1, 2], [255, 1, 2]]


def make(root: Path, *masks, classes=("road", "car", "sky"), **record):
    """A folder of images and masks; a mask is None, bytes, a PIL image or stored values."""
    for i, mask in enumerate(masks):
        path = root / f"masks/{i}.png"
        for folder in ("images", "masks"):
            (root / folder).mkdir(exist_ok=True)
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(root / f"images/{i}.png")
        if isinstance(mask, bytes):
            path.write_bytes(mask)
        elif isinstance(mask, Image.Image):
            mask.save(path)
        elif mask is not None:
            Image.fromarray(np.array(mask, np.uint8)).save(path)
    if classes:
        record["classes"] = list(classes)
    (root / "dataset.json").write_text(json.dumps(record))
    return open_data(root)


def kinds(report):
    return {finding.kind: finding for finding in report.findings}


def test_good_masks(tmp_path):
    report = check_data(make(tmp_path, GOOD, [[0, 0, 0], [0, 0, 0]]))
    assert report.ok and report.findings == ()
    assert report.class_names == ("road", "car", "sky")
    assert report.pixels == (7, 2, 2)
    assert report.images_with == (2, 1, 1)
    assert report.ignored_pixels == 1
    assert "no fault found" in str(report)
    lines = report.histogram(width=14).splitlines()
    assert lines[0].split() == ["0", "road", "63.64", "%", "2", "images", "#" * 14]
    assert lines[1].split()[-1] == "#" * 4
    assert lines[-1] == "ignored (255): 8.33 %"
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


@pytest.mark.parametrize(
    ("mask", "kind", "words"),
    [
        (None, "missing", "without a mask"),
        (b"nothing", "unreadable", "cannot be read"),
        (Image.new("RGB", (3, 2), (9, 0, 0)), "colours", "up to 1 in one"),
        ([[0, 1], [2, 1]], "size", "another size"),
        ([[0, 1, 2], [7, 9, 7]], "range", "labels 7, 9 are no classes of 0 to 2 nor 255"),
        ([[1, 2, 3], [0, 3, 3]], "off by one", "set reduce_zero_label"),
    ],
)
def test_a_fault_is_found_by_its_kind_and_file(tmp_path, mask, kind, words):
    report = check_data(make(tmp_path, GOOD, mask))
    assert not report.ok
    assert list(kinds(report)) == [kind]
    finding = kinds(report)[kind]
    assert finding.error and words in finding.text
    assert [Path(file).stem for file in finding.files] == ["1"]
    assert "error: " in str(report) and finding.files[0] in str(report)


def test_an_image_that_cannot_be_read(tmp_path):
    data = make(tmp_path, GOOD, GOOD)
    (tmp_path / "images/1.png").write_bytes(b"x")
    assert [Path(file).parent.name for file in kinds(check_data(data))["unreadable"].files] == ["images"]


def test_a_lossy_mask(tmp_path):
    make(tmp_path, GOOD)
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "masks/0.jpg")
    (tmp_path / "masks/0.png").unlink()
    assert list(kinds(check_data(open_data(tmp_path)))) == ["lossy", "empty class"]


def test_zero_reduced_twice(tmp_path):
    """Masks that already count from 0, with reduce_zero_label set: class 0 would be ignored, all others shifted."""
    report = check_data(make(tmp_path, GOOD, reduce_zero_label=True))
    assert report.ok
    found = kinds(report)
    assert "no mask stores 3, which is 'sky'" in found["off by one"].text
    assert "1 of 3 classes never occur: sky" in found["empty class"].text
    right = check_data(make(tmp_path, [[0, 1, 2], [3, 3, 3]], reduce_zero_label=True))
    assert right.findings == () and right.pixels == (1, 1, 3) and right.ignored_pixels == 1


def test_notes_do_not_fail(tmp_path):
    report = check_data(make(tmp_path, [[0, 1, 1], [0, 0, 0]], [[255] * 3] * 2))
    assert report.ok
    assert list(kinds(report)) == ["ignored", "empty class"]
    assert "never occur: sky" in kinds(report)["empty class"].text


def test_without_classes(tmp_path):
    report = check_data(make(tmp_path, [[0, 1, 4], [255, 0, 0]], classes=None))
    assert report.ok and report.pixels == (3, 1, 0, 0, 1)
    assert "the labels go to 4" in kinds(report)["classes"].text


def test_many_files_are_counted(tmp_path):
    report = check_data(make(tmp_path, *[[[9] * 3] * 2] * 7))
    assert len(kinds(report)["range"].files) == 7
    assert "and 2 more" in str(report)


def test_progress_wraps_the_pairs(tmp_path):
    seen = []
    check_data(make(tmp_path, GOOD, GOOD), progress=lambda pairs: seen.append(len(pairs)) or pairs)
    assert seen == [2]
