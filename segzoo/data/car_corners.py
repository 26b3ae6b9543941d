"""A keypoint task from the synthetic street scenes: the corners of the nearest car's box, seen top-down.

"Top-down" as in human pose estimation: a detector (here the true box) has found the object, and the model sees a crop
around it. The crop is a square with most of the car somewhere inside, at a random scale and shifted, so that no
constant answer is right; a corner that the crop misses is invisible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import scenes

KEYPOINTS = ("top left", "top right", "bottom right", "bottom left")

_SCENE_SIZE = (256, 512)
_MARGIN = (1.3, 2.2)  # side of the crop over the longer side of the box
_SHIFT = 1.2  # largest shift over the room beside the box; beyond 1, a side of the box leaves the crop


class CarCrop(NamedTuple):
    """A crop around a car."""

    image: np.ndarray  # (H, W, 3) uint8, RGB; what lies outside the scene is grey
    xy: np.ndarray  # (4, 2) float32, the corners as in KEYPOINTS, (x, y) in pixels of the crop
    visible: np.ndarray  # (4,) bool; False where the corner is outside the crop
    length: float  # longer side of the box in pixels of the crop


def car_crops(count: int, *, first_seed: int = 0, side: int = 96) -> Iterator[CarCrop]:
    """`count` crops of `side` x `side` pixels, of the scenes from `first_seed` on that have a car.

    One seed gives one crop, whatever `count` is.
    """
    seed = first_seed
    while count > 0:
        crop = _crop(seed, side)
        seed += 1
        if crop is not None:
            count -= 1
            yield crop


def _crop(seed: int, side: int) -> CarCrop | None:
    image, _, boxes = scenes.render_with_boxes(seed=seed, size=_SCENE_SIZE)
    if len(boxes) == 0:
        return None
    x0, y0, x1, y1 = boxes[0].tolist()
    rng = np.random.default_rng(seed)
    longer = max(x1 - x0, y1 - y0)
    extent = longer * rng.uniform(*_MARGIN)
    room = extent - np.array([x1 - x0, y1 - y0])
    shift = rng.uniform(-_SHIFT, _SHIFT, size=2) * room / 2
    left, top = np.array([x0 + x1, y0 + y1]) / 2 + shift - extent / 2

    pad = int(1.2 * extent) + 1  # no crop reaches further out
    padded = Image.fromarray(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=128))
    box = (left + pad, top + pad, left + pad + extent, top + pad + extent)
    crop = np.asarray(padded.resize((side, side), Image.Resampling.BILINEAR, box=box))

    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    xy = ((corners - (left, top)) * side / extent).astype(np.float32)
    return CarCrop(
        image=crop,
        xy=xy,
        visible=((xy >= 0) & (xy <= side)).all(axis=1),
        length=longer * side / extent,
    )
