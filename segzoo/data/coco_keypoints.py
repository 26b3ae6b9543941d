"""COCO's person keypoints: annotated people, one by one, as a top-down model sees them.

Positions are moved to segzoo's convention (`segzoo.keypoints`), in which the first pixel's centre is (0.5, 0.5).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._errors import SegzooError

NUM_KEYPOINTS = 17


class Person(NamedTuple):
    """One annotated person."""

    image: Path
    xy: np.ndarray  # (17, 2) float32 in pixels of the image
    visible: np.ndarray  # (17,) bool: annotated, hidden or not
    length: float  # longer side of the box in pixels
    box: tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels of the image
    image_id: int  # COCO's


@dataclasses.dataclass(frozen=True)
class CocoKeypointData:
    """The people of a split that have annotated keypoints."""

    split: str
    people: tuple[Person, ...] = dataclasses.field(repr=False)
    coco: Any = dataclasses.field(repr=False)  # pycocotools' COCO, which computes the average precision

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> Person:
        return self.people[index]

    def first(self, count: int | None) -> CocoKeypointData:
        """The first `count` people (None: all)."""
        return dataclasses.replace(self, people=self.people[:count])


def open_coco_keypoints(root: str | Path, *, split: str = "val") -> CocoKeypointData:
    """Open `annotations/person_keypoints_val2017.json` with the images in `val2017/` or `images/val2017/`.

    Raises:
        SegzooError: pycocotools or a file is missing, or no person has keypoints.
    """
    root = Path(root)
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise SegzooError("COCO's keypoints need pycocotools: pip install 'segzoo[train]'") from None
    path = root / "annotations" / f"person_keypoints_{split}2017.json"
    folder = next((root / name for name in (f"{split}2017", f"images/{split}2017") if (root / name).is_dir()), None)
    if not path.is_file() or folder is None:
        raise SegzooError(
            f"--data {root}: COCO's keypoints are {path.relative_to(root)} and the images in {split}2017/"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        coco = COCO(str(path))
    people = tuple(
        _person(folder / coco.imgs[annotation["image_id"]]["file_name"], annotation)
        for _, annotation in sorted(coco.anns.items())
        if annotation.get("num_keypoints", 0) and not annotation.get("iscrowd", 0)
    )
    if not people:
        raise SegzooError(f"{path} has no person with keypoints")
    return CocoKeypointData(split=split, people=people, coco=coco)


def _person(image: Path, annotation: Mapping[str, Any]) -> Person:
    keypoints_K3 = np.array(annotation["keypoints"], dtype=np.float32).reshape(NUM_KEYPOINTS, 3)
    x, y, w, h = annotation["bbox"]
    return Person(
        image=image,
        xy=keypoints_K3[:, :2] + 0.5,
        visible=keypoints_K3[:, 2] > 0,
        length=max(w, h),
        box=(x, y, x + w, y + h),
        image_id=annotation["image_id"],
    )
