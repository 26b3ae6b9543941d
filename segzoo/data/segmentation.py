"""Segmentation data sets as sequences of samples: a published layout, a folder pair, a list file, or drawn scenes.

data = open_data("cityscapes:/data/cityscapes", split="val")
image_HWC, labels_HW, name = data[0]
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .._errors import ImageError, SegzooError
from ..labels import LabelSet, generic_labels, list_labels, load_labels
from ..preprocess import load_image
from . import layouts, scenes
from .layouts import LAYOUTS, MaskForm, Pair
from .scenes import context

FIRST_HELD_OUT_SEED = 1_000_000  # of the scenes: training seeds stay below, seeds of evaluation at or above
# By label set.
DRAWN: Mapping[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {"scenes": scenes.render, "context": context.render}
DRAWN_SPLITS = {"train": 4000, "val": 200}  # how many
LOSSY = ("JPEG", "MPO", "WEBP")  # formats that no mask should be in
RECORD = "dataset.json"  # in a folder: what a layout cannot know


class Sample(NamedTuple):
    """An image with its labels, at the size of the file."""

    image: np.ndarray  # (H, W, 3) uint8, RGB in 0..255
    labels: np.ndarray  # (H, W) classes 0 to K - 1, or the data's ignore_index; uint8, else int32
    name: str  # for messages and results


@dataclasses.dataclass(frozen=True)
class SegmentationData:
    """A sequence of samples, and what their labels mean."""

    name: str  # layout, "list" or a name of `DRAWN`
    split: str
    labels: LabelSet | None  # names and colours of the classes; None: nobody has said how many there are
    ignore_index: int = 255
    reduce_zero_label: bool = False  # of the files: stored 0 is "no class" and stored k is class k - 1

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def num_classes(self) -> int | None:
        return len(self.labels) if self.labels else None

    def first(self, count: int | None) -> SegmentationData:
        """The first `count` samples (None: all)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FileData(SegmentationData):
    """Images and masks in files."""

    pairs: tuple[Pair, ...] = dataclasses.field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Raises ImageError for a file that cannot be read, a mask of another size, or a label that is no class."""
        pair = self.pairs[index]
        if pair.mask is None:
            raise ImageError(f"{pair.image} has no mask; `segzoo data check` lists all such images")
        image_HWC = load_image(pair.image)
        stored_HW = read_mask(pair.mask)
        if stored_HW.shape != image_HWC.shape[:2]:
            raise ImageError(
                f"{pair.mask} has {stored_HW.shape[1]} x {stored_HW.shape[0]} pixels, its image "
                f"{image_HWC.shape[1]} x {image_HWC.shape[0]}; a mask has the size of its image"
            )
        labels_HW = class_labels(stored_HW, pair.form, self.ignore_index)
        wrong = out_of_range(labels_HW, self.num_classes, self.ignore_index)
        if wrong:
            raise ImageError(
                f"{pair.mask} has labels {wrong[:5]}, which are none of the {self.num_classes} classes from 0 on nor "
                f"{self.ignore_index} (ignored); `segzoo data check` says what is wrong with the masks"
            )
        return Sample(image_HWC, labels_HW, pair.name)

    def first(self, count: int | None) -> FileData:
        return dataclasses.replace(self, pairs=self.pairs[:count])


@dataclasses.dataclass(frozen=True)
class SceneData(SegmentationData):
    """Synthetic scenes of `DRAWN`, drawn when asked for."""

    first_seed: int = FIRST_HELD_OUT_SEED
    count: int = 200
    size: tuple[int, int] = (256, 512)  # (H, W) in pixels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        image_HWC, labels_HW = DRAWN[self.name](seed=self.first_seed + index, size=self.size)
        return Sample(image_HWC, labels_HW, f"{self.name} {self.first_seed + index}")

    def first(self, count: int | None) -> SceneData:
        return dataclasses.replace(self, count=self.count if count is None else min(count, self.count))


def open_data(
    where: str | Path,
    *,
    split: str | None = None,
    layout: str | None = None,
    num_classes: int | None = None,
    reduce_zero_label: bool | None = None,
) -> SegmentationData:
    """Open a data set.

    Args:
        where: a folder in one of `LAYOUTS`; "LAYOUT:FOLDER"; a text file with an image and its mask a line, relative to
            the file; or a name of `DRAWN`. A folder of `images/` and `masks/`, and that of a list file, may have a
            "dataset.json" with any of "classes" (list of names), "label_set" (of `segzoo.labels`), "ignore_index" and
            "reduce_zero_label".
        split: "train", "val" or another of the layout; default: "val" where there is one, else the only one.
        layout: name of the layout, where the folder leaves a choice.
        num_classes: classes of a data set that does not say; also settles PASCAL Context's 59 or 60.
        reduce_zero_label: overrides what layout and "dataset.json" say.

    Raises:
        SegzooError: nothing there, an unknown layout or split, or several layouts that fit.
    """
    text = str(where)
    prefix, _, rest = text.partition(":")
    if layout is None and prefix in LAYOUTS and rest:
        layout, text = prefix, rest
    if text in DRAWN:
        return _drawn(text, split or "val")
    path = Path(text)
    if path.is_file():
        return _list_file(path, split, num_classes, reduce_zero_label)
    if not path.is_dir():
        raise SegzooError(f"--data {where}: no such folder or list file; or give {' or '.join(DRAWN)}")
    chosen = _layout(path, layout, split, num_classes)
    split = split or _default_split(layouts.splits_of(chosen, path))
    found = tuple(layouts.pairs(chosen, path, split))
    if not found:
        raise SegzooError(
            f"{path} has no image of split {split!r} where layout {chosen.name} has them: {chosen.images}"
        )
    if chosen.label_set:
        record = _Record(labels=load_labels(chosen.label_set))
    else:
        record = _read_record(path, num_classes)
    return _file_data(chosen.name, split, record, found, reduce_zero_label)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) stored values, uint8 or int32, of a mask with one value a pixel: grey, palette, 1 or 16 bits.

    Raises:
        ImageError: the file cannot be read, is in a format that changes labels, or has colours instead of labels.
    """
    try:
        with Image.open(path) as image:
            if image.format in LOSSY:
                raise ImageError(f"{path} is a mask in {image.format}, which changes labels; save it as PNG")
            if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
                raise ImageError(
                    f"{path} is a mask in mode {image.mode}; a mask has one label a pixel (grey or palette), and "
                    "colours cannot be told apart safely: save class indices"
                )
            stored_HW = np.asarray(image)
    except ImageError:
        raise
    except Exception as error:  # whatever a decoder stumbles over
        raise ImageError(f"{path} is no mask that Pillow can read ({error}); save it as PNG") from error
    return stored_HW.astype(np.uint8 if stored_HW.dtype in (np.bool_, np.uint8) else np.int32)


def class_labels(stored_HW: np.ndarray, form: MaskForm, ignore_index: int) -> np.ndarray:
    """Stored values -> classes or `ignore_index`, uint8 where they fit, else int32. Values out of range stay so."""
    if form.class_of is None and not form.reduce_zero_label:
        return stored_HW
    table = np.arange(max(256, int(stored_HW.max(initial=0)) + 1))
    if form.class_of is not None:
        table[:] = ignore_index
        table[list(form.class_of)] = list(form.class_of.values())
    if form.reduce_zero_label:
        table = np.where((table == 0) | (table == ignore_index), ignore_index, table - 1)
    labels_HW = table[stored_HW]
    return labels_HW.astype(np.uint8 if labels_HW.max(initial=0) <= 255 else np.int32)


def out_of_range(labels_HW: np.ndarray, num_classes: int | None, ignore_index: int) -> list[int]:
    """The labels that are neither a class nor `ignore_index`; none where the number of classes is unknown."""
    if num_classes is None:
        return []
    return [int(v) for v in np.unique(labels_HW) if v != ignore_index and not 0 <= v < num_classes]


@dataclasses.dataclass(frozen=True)
class _Record:
    """What "dataset.json" says, or a layout knows."""

    labels: LabelSet | None
    ignore_index: int = 255
    reduce_zero_label: bool | None = None


def _drawn(name: str, split: str) -> SceneData:
    if split not in DRAWN_SPLITS:
        raise SegzooError(f"--split {split}: {name} have {', '.join(DRAWN_SPLITS)}")
    first_seed = FIRST_HELD_OUT_SEED if split == "val" else 0
    return SceneData(name=name, split=split, labels=load_labels(name), first_seed=first_seed, count=DRAWN_SPLITS[split])


def _layout(path: Path, name: str | None, split: str | None, num_classes: int | None) -> layouts.Layout:
    if name is not None:
        if name not in LAYOUTS:
            raise SegzooError(f"there is no layout {name!r}; layouts: {', '.join(LAYOUTS)}")
        return LAYOUTS[name]
    found = layouts.find_layouts(path, split) or layouts.find_layouts(path)
    if len(found) > 1 and num_classes is not None:
        found = [layout for layout in found if _classes(layout) in (None, num_classes)] or found
    if len(found) == 1:
        return found[0]
    raise _no_single_layout(path, found)


def _classes(layout: layouts.Layout) -> int | None:
    return len(load_labels(layout.label_set)) if layout.label_set else None


def _no_single_layout(path: Path, found: Sequence[layouts.Layout]) -> SegzooError:
    """What to say of a folder that fits several layouts, or none."""
    names = ", ".join(layout.name for layout in found)
    if found:
        return SegzooError(f"{path} may be {names}; say which: --data {found[0].name}:{path}")
    known = "; ".join(f"{layout.name} ({layout.images})" for layout in LAYOUTS.values())
    return SegzooError(f"{path} is in no layout that segzoo knows: {known}. The simplest is images/ and masks/")


def _default_split(splits: Sequence[str]) -> str:
    return "val" if "val" in splits else splits[-1] if splits else "val"


def _list_file(path: Path, split: str | None, num_classes: int | None, reduce: bool | None) -> FileData:
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SegzooError(f"{path} is no list of images and masks in UTF-8 ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.split("\t") if "\t" in line else line.split()
        if len(parts) != 2 or "\0" in line:
            raise SegzooError(f"{path}, line {number}: an image and its mask are needed, parted by a blank or a tab")
        image, mask = (path.parent / part.strip() for part in parts)
        found.append(Pair(image, mask if mask.is_file() else None, MaskForm(""), parts[0].strip()))
    if not found:
        raise SegzooError(f"{path} lists no image; it needs an image and its mask a line")
    return _file_data("list", split or path.stem, _read_record(path.parent, num_classes), tuple(found), reduce)


def _read_record(folder: Path, num_classes: int | None) -> _Record:
    path = folder / RECORD
    values = _json_object(path) if path.exists() else {}
    unknown = set(values) - {"classes", "label_set", "ignore_index", "reduce_zero_label"}
    if unknown:
        raise SegzooError(
            f"{path}: unknown key {sorted(unknown)[0]!r}; it may have classes, label_set, ignore_index and "
            "reduce_zero_label"
        )
    ignore_index = values.get("ignore_index", 255)
    is_number = isinstance(ignore_index, int) and not isinstance(ignore_index, bool)
    if not is_number or not isinstance(values.get("reduce_zero_label", False), bool):
        raise SegzooError(f"{path}: ignore_index must be a whole number and reduce_zero_label true or false")
    labels = _labels(path, values, num_classes)
    if labels is not None:
        try:
            labels = dataclasses.replace(labels, ignore_index=ignore_index)
        except ValueError as error:
            raise SegzooError(f"{path}: {error}") from None
    return _Record(labels, ignore_index, values.get("reduce_zero_label"))


def _labels(path: Path, values: dict[str, Any], num_classes: int | None) -> LabelSet | None:
    names = values.get("classes")
    if names is not None:
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise SegzooError(f"{path}: classes must be a list of names, one a class")
        if len(set(names)) != len(names):
            raise SegzooError(f"{path}: a class name appears twice")
        try:
            generic = generic_labels(len(names))
        except ValueError as error:
            raise SegzooError(f"{path}: {error}") from None
        return dataclasses.replace(generic, name=path.parent.name, classes=tuple(names), source=str(path))
    if "label_set" in values:
        if values["label_set"] not in list_labels():
            raise SegzooError(f"{path}: label_set must be one of {', '.join(list_labels())}")
        return load_labels(values["label_set"])
    return generic_labels(num_classes) if num_classes else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SegzooError(f"{path} is no JSON file ({error})") from None
    if not isinstance(values, dict):
        raise SegzooError(f'{path} must hold an object, such as {{"classes": ["road", "car"]}}')
    return values


def _file_data(name: str, split: str, record: _Record, found: tuple[Pair, ...], reduce: bool | None) -> FileData:
    reduce = record.reduce_zero_label if reduce is None else reduce
    if reduce is not None:
        found = tuple(
            dataclasses.replace(pair, form=dataclasses.replace(pair.form, reduce_zero_label=reduce)) for pair in found
        )
    return FileData(
        name=name,
        split=split,
        labels=record.labels,
        ignore_index=record.ignore_index,
        reduce_zero_label=found[0].form.reduce_zero_label,
        pairs=found,
    )
