"""The label sets: counts, well-formed files, and the facts about repeated colours."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import segzoo.labels
from segzoo.labels import LabelSet, generic_labels, list_labels, load_labels

# name -> (classes, distinct colours)
COUNTS = {
    "ade20k": (150, 149),
    "camvid": (11, 11),
    "cityscapes": (19, 19),
    "coco_stuff": (171, 162),
    "context": (17, 17),
    "pascal_context_59": (59, 58),
    "pascal_context_60": (60, 59),
    "scenes": (13, 13),
    "voc": (21, 21),
}

# name -> sha256 of its names and colours: whoever changes one says so here, and says in the change why.
DIGESTS = {
    "ade20k": "f8f1fbe2e61e446c3dcd276468903119",
    "camvid": "17d8e59fb68d83828ae7d006a4d3a004",
    "cityscapes": "fdc2c09f612a02c029416031d41804eb",
    "coco_stuff": "d0aafa5b5c8d7713583f9c02c2aa2af8",
    "context": "307999c41e63f986b44387ad2358e987",
    "pascal_context_59": "393ab99eafd5609fadde524bdb9e5833",
    "pascal_context_60": "4e63a0804d03b58d37070759bee37663",
    "scenes": "bfaaecf55c643b7414091eda3c09cc77",
    "voc": "3d61c831cd0012d427e887e301f8df99",
}
# As the data sets' own pages and tools have them.
CITYSCAPES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
ADE20K = {
    "wall": (120, 120, 120),
    "building": (180, 120, 120),
    "sky": (6, 230, 230),
    "floor": (80, 50, 50),
    "tree": (4, 200, 3),
    "ceiling": (120, 120, 80),
    "road": (140, 140, 140),
}
VOC = {"background": (0, 0, 0), "aeroplane": (128, 0, 0), "bicycle": (0, 128, 0), "bird": (128, 128, 0)}


def make(**changes: object) -> LabelSet:
    fields = {
        "name": "two",
        "title": "Two classes",
        "classes": ("a", "b"),
        "palette": ((0, 0, 0), (1, 1, 1)),
        "ignore_index": 255,
        "source": "this test",
        "notes": "",
    }
    return LabelSet(**(fields | changes))


def test_every_set_is_listed() -> None:
    assert list_labels() == sorted(COUNTS)


def test_the_list_is_the_callers_own() -> None:
    list_labels().clear()
    assert list_labels() == sorted(COUNTS)


@pytest.mark.parametrize("name", list_labels())
def test_set(name: str) -> None:
    labels = load_labels(name)
    count, distinct = COUNTS[name]
    assert labels.name == name
    assert len(labels) == len(labels.classes) == len(labels.palette) == count
    assert len(set(labels.palette)) == distinct
    assert labels.ignore_index == 255
    assert all(text and text == text.strip() for text in (*labels.classes, labels.title, labels.source, labels.notes))
    assert isinstance(labels.classes, tuple) and all(isinstance(colour, tuple) for colour in labels.palette)
    assert load_labels(name) is labels
    hash(labels)


@pytest.mark.parametrize("name", list_labels())
def test_file_has_every_field_and_no_other(name: str) -> None:
    record = json.loads((Path(segzoo.labels.__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    assert list(record) == ["name", "title", "source", "classes", "palette", "ignore_index", "notes"]


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown label set 'ade'") as error:
        load_labels("ade")
    assert all(name in str(error.value) for name in COUNTS)


@pytest.mark.parametrize("name", ["", "README", "../labels/voc", "voc.json", "VOC"])
def test_only_exact_names_load(name: str) -> None:
    with pytest.raises(ValueError, match="unknown label set"):
        load_labels(name)


@pytest.mark.parametrize("name", list_labels())
def test_no_name_and_no_colour_has_changed(name: str) -> None:
    labels = load_labels(name)
    text = json.dumps([labels.classes, labels.palette])
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == DIGESTS[name]


@pytest.mark.parametrize(("name", "first"), [("cityscapes", CITYSCAPES), ("ade20k", ADE20K), ("voc", VOC)])
def test_names_and_colours_are_those_of_the_data_set(name: str, first: dict[str, tuple[int, int, int]]) -> None:
    labels = load_labels(name)
    assert labels.classes[: len(first)] == tuple(first)
    assert labels.palette[: len(first)] == tuple(first.values())


def test_order_and_colours_at_known_places() -> None:
    cityscapes = load_labels("cityscapes")
    assert (cityscapes.classes[0], cityscapes.palette[0]) == ("road", (128, 64, 128))
    assert (cityscapes.classes[18], cityscapes.palette[18]) == ("bicycle", (119, 11, 32))
    ade20k = load_labels("ade20k")
    assert (ade20k.classes[0], ade20k.classes[7], ade20k.classes[149]) == ("wall", "bed", "flag")
    coco_stuff = load_labels("coco_stuff")
    assert (coco_stuff.classes[0], coco_stuff.classes[79], coco_stuff.classes[170]) == ("person", "toothbrush", "wood")
    assert " ".join(load_labels("camvid").classes) == (
        "sky building pole road pavement tree signsymbol fence car pedestrian bicyclist"
    )


def test_context_60_is_context_59_after_background() -> None:
    without, with_background = load_labels("pascal_context_59"), load_labels("pascal_context_60")
    assert with_background.classes == ("background", *without.classes)
    assert with_background.palette[1:] == without.palette


def test_scenes_are_drawn_in_the_colours_of_cityscapes() -> None:
    scenes, cityscapes = load_labels("scenes"), load_labels("cityscapes")
    assert scenes.classes == (
        *("sky", "building", "road", "sidewalk", "vegetation", "car", "truck", "person", "bicycle", "pole"),
        *("traffic light", "traffic sign", "fence"),
    )
    colours = dict(zip(cityscapes.classes, cityscapes.palette, strict=True))
    assert scenes.palette == tuple(colours[name] for name in scenes.classes)


def test_voc_background_is_a_class() -> None:
    assert load_labels("voc").classes[0] == "background"


@pytest.mark.parametrize("name", ["ade20k", "pascal_context_59"])
def test_notes_say_when_masks_count_from_one(name: str) -> None:
    assert "subtract 1" in load_labels(name).notes


@pytest.mark.parametrize("num_classes", [1, 2, 21, 255, 256, 1000, 65535])
def test_generic_labels(num_classes: int) -> None:
    labels = generic_labels(num_classes)
    assert len(labels) == num_classes
    assert labels.classes[0] == "class 0" and labels.classes[-1] == f"class {num_classes - 1}"
    assert len(set(labels.palette)) == num_classes
    assert (0, 0, 0) not in labels.palette
    assert labels.ignore_index >= num_classes


def test_generic_colours_do_not_depend_on_the_number_of_classes() -> None:
    assert generic_labels(100).palette[:7] == generic_labels(7).palette
    assert generic_labels(20).palette == load_labels("voc").palette[1:]


@pytest.mark.parametrize("num_classes", [-1, 0, 65536])
def test_generic_labels_refuse_counts_that_no_mask_can_hold(num_classes: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.65535"):
        generic_labels(num_classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"palette": ((0, 0, 0),)}, "2 classes but 1 colours"),
        ({"classes": ("a", "a")}, "twice"),
        ({"palette": ((0, 0, 0), (0, 256, 0))}, r"0\.\.255"),
        ({"palette": ((0, 0, 0), (0, 0))}, r"0\.\.255"),
        ({"ignore_index": 1}, "ignore_index 1"),
    ],
)
def test_a_malformed_set_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_set_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        make().name = "three"


def test_labels_load_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from segzoo.labels import load_labels; load_labels('voc');"
        "print(sorted({'torch', 'numpy', 'timm', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
