"""Augmentation through torchvision's transforms v2 (extra `train`): image and mask go through the same geometry.

    transform = segmentation_transform(crop=(512, 512))
    x_CHW, labels_HW = transform(*to_tv(image_HWC, labels_HW))

The order and the ranges are those of mmsegmentation's recipes, which the papers train with: scale 0.5 to 2, a crop in
which no class has more than 0.75 of the labelled pixels, flip, photometric distortion, normalise, pad. Two things
differ: torchvision distorts brightness by a factor, mmsegmentation by a sum; and the image is resized with antialias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import SegzooError
from ..models.rows import IMAGENET_MEAN, IMAGENET_STD

try:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as tvf
except ImportError:
    raise SegzooError("augmentation needs torchvision: pip install 'segzoo[train]'") from None

MAX_CLASS_SHARE = 0.75  # of the labelled pixels of a crop
CROP_TRIES = 10


def to_tv(image_HWC: np.ndarray, labels_HW: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """uint8 image (H, W, C) and labels (H, W) -> tensors that say what they are: Image (C, H, W) and Mask (H, W)."""
    image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))
    return tv_tensors.Image(image_CHW), tv_tensors.Mask(torch.from_numpy(labels_HW.astype(np.int64)))


def segmentation_transform(
    *,
    crop: tuple[int, int],
    base: tuple[int, int] | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = MAX_CLASS_SHARE,
    distort: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    ignore_index: int = 255,
) -> v2.Compose:
    """(Image, Mask) -> normalised float32 (C, *crop) and int64 labels (*crop).

    Args:
        crop: (H, W) in pixels of what the model is trained on.
        base: (short side, long side) in pixels into which an image fits at scale 1, its ratio kept; None: its own size.
        scale: range of the random factor on that size.
        max_class_share: a crop is drawn anew, up to ten times, while one class has a larger share of it.
        distort: brightness, contrast, saturation and hue.
        ignore_index: label of the border where an image is smaller than the crop; its pixels are the mean colour.
    """
    steps: list[Any] = [
        RandomScale(base=base, scale=scale),
        VariedCrop(size=crop, max_class_share=max_class_share, ignore_index=ignore_index),
        v2.RandomHorizontalFlip(0.5),
    ]
    if distort:
        steps.append(v2.RandomPhotometricDistort(hue=(-0.1, 0.1), p=0.5))
    steps += [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(list(mean), list(std)),
        PadTo(size=crop, ignore_index=ignore_index),
        v2.ToPureTensor(),
    ]
    return v2.Compose(steps)


def classification_transform(
    *,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """Image -> normalised float32 (C, *size): a random part of it, mirrored or not."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(list(size), scale=scale, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
            v2.ToPureTensor(),
        ]
    )


def mixup(num_classes: int, *, alpha: float = 0.8) -> v2.MixUp:
    """For a batch of a classifier: (B, C, H, W) and labels (B,) -> mixed images and (B, num_classes) shares."""
    return v2.MixUp(alpha=alpha, num_classes=num_classes)


class RandomScale(v2.Transform):
    """Resize to fit into `base` (or from the image's own size) times one random factor, the ratio kept."""

    def __init__(self, *, base: tuple[int, int] | None, scale: tuple[float, float]):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise SegzooError(f"scale must be (smallest, largest) factor, such as (0.5, 2.0), not {scale!r}")
        self.base = base
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        H, W = v2.query_size(flat_inputs)
        factor = torch.empty(()).uniform_(*self.scale).item()
        if self.base is not None:
            factor *= min(min(self.base) / min(H, W), max(self.base) / max(H, W))
        return {"size": [max(1, int(H * factor + 0.5)), max(1, int(W * factor + 0.5))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tvf.resize(inpt, params["size"], antialias=True)  # a mask is resized to the nearest label


class VariedCrop(v2.Transform):
    """A random crop of at most `size` in which no class has more than a share of the labelled pixels, if one is found.

    A crop without any label, or of a single class, is drawn anew, too; the last try is taken as it is.
    """

    def __init__(self, *, size: tuple[int, int], max_class_share: float, ignore_index: int):
        super().__init__()
        if not 0 < max_class_share <= 1:
            raise SegzooError(f"max_class_share must be above 0 and at most 1, not {max_class_share!r}")
        self.size = size
        self.max_class_share = max_class_share
        self.ignore_index = ignore_index

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        H, W = v2.query_size(flat_inputs)
        height, width = min(self.size[0], H), min(self.size[1], W)
        labels_HW = next((item for item in flat_inputs if isinstance(item, tv_tensors.Mask)), None)
        top = left = 0
        for _ in range(CROP_TRIES):
            top = int(torch.randint(H - height + 1, ()))
            left = int(torch.randint(W - width + 1, ()))
            if labels_HW is None or self._is_varied(labels_HW[..., top : top + height, left : left + width]):
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def _is_varied(self, labels_HW: Tensor) -> bool:
        if self.max_class_share == 1:
            return True
        labels, counts = labels_HW.unique(return_counts=True)
        counts = counts[labels != self.ignore_index]
        return len(counts) > 1 and (counts.max() / counts.sum()).item() < self.max_class_share

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tvf.crop(inpt, **params)


class PadTo(v2.Transform):
    """Pad below and on the right to `size`: a normalised image with 0, the mean colour, a mask with `ignore_index`."""

    def __init__(self, *, size: tuple[int, int], ignore_index: int):
        super().__init__()
        self.size = size
        self.fill: Mapping[type, int] = {tv_tensors.Image: 0, tv_tensors.Mask: ignore_index}

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        H, W = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size[1] - W), max(0, self.size[0] - H)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tvf.pad(inpt, params["padding"], fill=self.fill.get(type(inpt), 0)) if any(params["padding"]) else inpt
