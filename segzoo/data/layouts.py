"""How published segmentation data sets lie on disk, as data: where images and masks are, what a mask's values mean.

A pattern is a path below the data set's folder. "{split}" stands for the split's own folder name, "{stem}" for what an
image and its mask share, folders included, and a suffix ".*" for any of `IMAGE_SUFFIXES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from .._errors import SegzooError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class MaskForm:
    """One form in which a data set's masks are published."""

    path: str  # pattern
    reduce_zero_label: bool = False  # stored 0 is "no class" and stored k is class k - 1
    class_of: Mapping[int, int] | None = None  # stored value -> class, every other value is ignored; None: as stored


@dataclasses.dataclass(frozen=True)
class Layout:
    """One published layout. Of several forms of masks, an image's is the first whose file exists."""

    name: str
    label_set: str | None  # of `segzoo.labels`; None: the folder's dataset.json says, if anything does
    images: str  # pattern
    masks: tuple[MaskForm, ...]
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"train": "train", "val": "val"})
    list_file: str | None = None  # pattern of a text file with a stem a line; None: every image of the folder
    origin: str = ""  # where the layout is from


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path | None  # None: there is none
    form: MaskForm
    name: str  # stem of both, for messages


# Cityscapes' own ids of the 19 classes that are evaluated, in the order of the classes (its `labels.py`).
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# COCO's 91 ids of things have 11 that no picture uses; stuff follows from 92 to 182.
_COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_COCO_STUFF_IDS = tuple(i for i in range(1, 183) if i not in _COCO_UNUSED)
_YEAR_2017 = {"train": "train2017", "val": "val2017"}
_VOC_SPLITS = {split: split for split in ("train", "val", "trainval")}

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="ade20k",
            label_set="ade20k",
            images="images/{split}/{stem}.jpg",
            masks=(MaskForm("annotations/{split}/{stem}.png", reduce_zero_label=True),),
            splits={"train": "training", "val": "validation"},
            origin="ADEChallengeData2016",
        ),
        Layout(
            name="cityscapes",
            label_set="cityscapes",
            images="leftImg8bit/{split}/{stem}_leftImg8bit.png",
            masks=(
                MaskForm("gtFine/{split}/{stem}_gtFine_labelTrainIds.png"),
                MaskForm(
                    "gtFine/{split}/{stem}_gtFine_labelIds.png",
                    class_of={value: index for index, value in enumerate(_CITYSCAPES_IDS)},
                ),
            ),
            splits={"train": "train", "val": "val", "test": "test"},
            origin="leftImg8bit_trainvaltest and gtFine_trainvaltest",
        ),
        Layout(
            name="coco_stuff164k",
            label_set="coco_stuff",
            images="images/{split}/{stem}.jpg",
            masks=(
                MaskForm("annotations/{split}/{stem}_labelTrainIds.png"),
                # Published are ids less one, with 255 for what is not labelled.
                MaskForm(
                    "annotations/{split}/{stem}.png",
                    class_of={value - 1: index for index, value in enumerate(_COCO_STUFF_IDS)},
                ),
            ),
            splits=_YEAR_2017,
            origin="train2017, val2017 and stuffthingmaps_trainval2017, the maps below annotations/",
        ),
        Layout(
            name="coco_stuff10k",
            label_set="coco_stuff",
            images="images/{split}/{stem}.jpg",
            masks=(MaskForm("annotations/{split}/{stem}_labelTrainIds.png", reduce_zero_label=True),),
            splits={"train": "train2014", "val": "test2014"},
            origin="cocostuff-10k-v1.1 as converted by mmsegmentation (published are MATLAB files)",
        ),
        *(
            Layout(
                name=f"pascal_context_{classes}",
                label_set=f"pascal_context_{classes}",
                images="JPEGImages/{stem}.jpg",
                masks=(MaskForm("SegmentationClassContext/{stem}.png", reduce_zero_label=classes == 59),),
                list_file="ImageSets/SegmentationContext/{split}.txt",
                origin="VOC2010 with the masks of PASCAL Context as mmsegmentation converts them",
            )
            for classes in (59, 60)
        ),
        Layout(
            name="voc",
            label_set="voc",
            images="JPEGImages/{stem}.jpg",
            masks=(MaskForm("SegmentationClass/{stem}.png"), MaskForm("SegmentationClassAug/{stem}.png")),
            splits={**_VOC_SPLITS, "trainaug": "trainaug"},
            list_file="ImageSets/Segmentation/{split}.txt",
            origin="VOCdevkit/VOC2012; trainaug with SBD's masks in SegmentationClassAug",
        ),
        Layout(
            name="camvid",
            label_set="camvid",
            images="{split}/{stem}.png",
            # Void is stored as 11.
            masks=(MaskForm("{split}annot/{stem}.png", class_of={index: index for index in range(11)}),),
            splits={"train": "train", "val": "val", "test": "test"},
            origin="CamVid in 11 classes, of the SegNet tutorial",
        ),
        Layout(
            name="folder",
            label_set=None,
            images="images/{split}/{stem}.*",
            masks=tuple(MaskForm(f"masks/{{split}}/{{stem}}{suffix}") for suffix in (".png", ".tif", ".jpg")),
            splits={"train": "train", "val": "val", "test": "test", "all": ""},
            origin="a folder of images and one of masks of the same names, with or without a folder a split",
        ),
    )
}


def find_layouts(root: Path, split: str | None = None) -> list[Layout]:
    """The layouts that a folder may have, by the folders and lists in it (of `split`, or of any split)."""
    return [layout for layout in LAYOUTS.values() if any(_lies(layout, root, s) for s in _asked(layout, split))]


def splits_of(layout: Layout, root: Path) -> list[str]:
    """The splits of the layout that a folder has."""
    return [split for split in layout.splits if _lies(layout, root, split)]


def pairs(layout: Layout, root: Path, split: str) -> Iterator[Pair]:
    """Images with their masks, sorted by name.

    Raises:
        SegzooError: the layout or the folder has no such split.
    """
    if split not in splits_of(layout, root):
        has = ", ".join(splits_of(layout, root)) or f"none of {', '.join(layout.splits)}"
        raise SegzooError(f"{root} has no split {split!r} of layout {layout.name}; it has {has}")
    own_name = layout.splits[split]
    for stem, image in sorted(_stems(layout, root, own_name)):
        found = ((form, root / form.path.format(split=own_name, stem=stem)) for form in layout.masks)
        form, mask = next(((form, path) for form, path in found if path.is_file()), (layout.masks[0], None))
        yield Pair(image=image, mask=mask, form=form, name=stem)


def _asked(layout: Layout, split: str | None) -> list[str]:
    return list(layout.splits) if split is None else [split] if split in layout.splits else []


def _lies(layout: Layout, root: Path, split: str) -> bool:
    own_name = layout.splits[split]
    if layout.list_file and not (root / layout.list_file.format(split=own_name)).is_file():
        return False
    masks = any(_folder(form.path, root, own_name).is_dir() for form in layout.masks)
    return masks and _folder(layout.images, root, own_name).is_dir()


def _folder(pattern: str, root: Path, own_name: str) -> Path:
    return root / pattern.partition("{stem}")[0].format(split=own_name)


def _stems(layout: Layout, root: Path, own_name: str) -> Iterator[tuple[str, Path]]:
    folder, ending = _folder(layout.images, root, own_name), layout.images.partition("{stem}")[2]
    if layout.list_file:
        listed = (root / layout.list_file.format(split=own_name)).read_text(encoding="utf-8").split("\n")
        for line in filter(None, map(str.strip, listed)):
            stem = line.split()[0]
            yield stem, folder / f"{stem}{ending}"
        return
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if ending == ".*":
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield name[: -len(path.suffix)], path
        elif name.endswith(ending) and path.is_file():
            yield name.removesuffix(ending), path
