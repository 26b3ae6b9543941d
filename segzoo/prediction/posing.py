"""Keypoints: image or box -> preprocess -> model -> heatmaps -> Pose.

Shape suffixes: B batch, K classes, C channels, H, W rows and columns of an image or map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, floor, isfinite
from typing import NamedTuple, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import ImageError, SegzooError
from ..keypoints import Skeleton, decode_heatmaps, skeleton_of
from ..models.rows import PretrainedCfg
from ..preprocess import ImageSource, describe, load_image, model_size, rgb, to_input
from ..results import Pose
from .lists import all_or_raise, in_batches
from .makers import ScoreMaker, pose_maker


@overload
def predict_keypoints(
    model: nn.Module | ScoreMaker,
    image: ImageSource,
    *,
    box: tuple[float, float, float, float] | None = ...,
    resize: tuple[int, int] | None = ...,
    skeleton: Skeleton | None = ...,
) -> Pose: ...


@overload
def predict_keypoints(
    model: nn.Module | ScoreMaker,
    image: list[ImageSource] | tuple[ImageSource, ...],
    *,
    resize: tuple[int, int] | None = ...,
    skeleton: Skeleton | None = ...,
    batch_size: int = ...,
) -> list[Pose]: ...


def predict_keypoints(
    model: nn.Module | ScoreMaker,
    image: ImageSource | list[ImageSource] | tuple[ImageSource, ...],
    *,
    box: tuple[float, float, float, float] | None = None,
    resize: tuple[int, int] | None = None,
    skeleton: Skeleton | None = None,
    batch_size: int = 1,
) -> Pose | list[Pose]:
    """Find keypoints in an image, or top-down in a part of it, or in each image of a list.

    >>> import numpy as np, segzoo
    >>> model = segzoo.create_model("test_segformer_keypoints")
    >>> pose = segzoo.predict_keypoints(model, np.zeros((64, 48, 3), np.uint8), resize=(64, 48))
    >>> pose.xy.shape, pose.skeleton.keypoints[0]
    (torch.Size([17, 2]), 'nose')

    Args:
        model: a keypoint model of segzoo (`segformer_b0_keypoints`) or an engine of one; in any mode, as for `predict`.
        image: as for `predict`, but for iterators.
        box: of a single image (x0, y0, x1, y1) in pixels of the part to look at, for example a detected person with
            some room around; rounded outwards to whole pixels and clipped to the image. Default: the whole image.
        resize: (H, W) in pixels at which the model sees that part, best that of its training; default: the rule of
            its weights row.
        skeleton: what the keypoints are called; default: the names of the weights row, else those of the known
            skeleton with so many keypoints (`segzoo.keypoints.skeleton_of`: 17 are COCO's).
        batch_size: of a list, so many images that the model sees at one size go through it together.

    Returns:
        A Pose, or a list of them.

    Raises:
        ImageError: an image that cannot be read; of a list as `predict` does it.
        SegzooError: a model of another kind, a skeleton of another number of keypoints, or a box without a pixel of
            the image.
    """
    maker = pose_maker(model)
    if not isinstance(image, (list, tuple)):
        outcome = _pose_batch(maker, [cast(ImageSource, image)], resize, skeleton, box)[0]
        if isinstance(outcome, ImageError):
            raise outcome
        return outcome
    if box is not None:
        raise SegzooError("a box belongs to one image; call predict_keypoints for each of the list")
    return all_or_raise(list(pose_many(maker, image, batch_size, resize=resize, skeleton=skeleton)), Pose)


def pose_many(
    maker: ScoreMaker,
    sources: Sequence[ImageSource],
    batch_size: int,
    *,
    resize: tuple[int, int] | None = None,
    skeleton: Skeleton | None = None,
) -> Iterator[Pose | ImageError]:
    """What becomes of each image, in order; `batch_size` of them are read at a time."""
    for some in in_batches(sources, batch_size):
        yield from _pose_batch(maker, some, resize, skeleton, None)


class Part(NamedTuple):
    """A part of an image, which a keypoint model looks at."""

    image: np.ndarray  # (H, W, C) uint8, the whole image
    box: tuple[int, int, int, int]  # (x0, y0, x1, y1) in whole pixels of it

    @property
    def pixels(self) -> np.ndarray:
        x0, y0, x1, y1 = self.box
        return self.image[y0:y1, x0:x1]

    @property
    def size(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0


@torch.inference_mode()
def _pose_batch(
    maker: ScoreMaker,
    sources: Sequence[ImageSource],
    resize: tuple[int, int] | None,
    skeleton: Skeleton | None,
    box: tuple[float, float, float, float] | None,
) -> list[Pose | ImageError]:
    outcomes: dict[int, Pose | ImageError] = {}
    together: dict[tuple[int, int], list[tuple[int, Part]]] = {}  # size seen -> parts of images, by their places
    for i, source in enumerate(sources):
        try:
            part = _part_of(load_image(source, maker.in_chans), box)
            together.setdefault(model_size(part.size, maker.row, resize), []).append((i, part))
        except ImageError as error:
            outcomes[i] = error
    for size, parts in together.items():
        x_BCHW = torch.cat([to_input(part.pixels, size, maker.row, maker.like) for _, part in parts])
        heatmaps_BKHW = maker.head_output(x_BCHW).float().cpu()
        for (i, part), heatmaps_KHW in zip(parts, heatmaps_BKHW, strict=True):
            outcomes[i] = _pose(maker, sources[i], part, heatmaps_KHW, skeleton)
    return [outcomes[i] for i in range(len(sources))]


def _part_of(image_HWC: np.ndarray, box: tuple[float, float, float, float] | None) -> Part:
    """The whole image, or the pixels that a box touches."""
    H, W = image_HWC.shape[:2]
    x0, y0, x1, y1 = (0, 0, W, H) if box is None else _box(box)
    left, top, right, bottom = max(0, floor(x0)), max(0, floor(y0)), min(W, ceil(x1)), min(H, ceil(y1))
    if left >= right or top >= bottom:
        raise SegzooError(f"box {box} has no pixel of an image of {W} x {H}; give (x0, y0, x1, y1) in pixels")
    return Part(image_HWC, (left, top, right, bottom))


def _box(box: object) -> tuple[float, float, float, float]:
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4 or not all(isfinite(side) for side in box):
        raise SegzooError(f"box must be (x0, y0, x1, y1) in pixels, not {box!r}")
    x0, y0, x1, y1 = box
    return x0, y0, x1, y1


def _pose(maker: ScoreMaker, source: ImageSource, part: Part, heatmaps_KHW: Tensor, skeleton: Skeleton | None) -> Pose:
    count = len(heatmaps_KHW)
    skeleton = skeleton or _skeleton_of(maker.row, count)
    if len(skeleton.keypoints) != count:
        raise SegzooError(f"{maker.name} has {count} keypoints, the skeleton {len(skeleton.keypoints)}")
    xy_BK2, score_BK = decode_heatmaps(heatmaps_KHW[None], part.size, origin=part.box[:2])
    return Pose(
        xy=xy_BK2[0],
        score=score_BK[0],
        skeleton=skeleton,
        image=rgb(part.image),
        box=part.box,
        source=describe(source),
        model=maker.name,
        weights_state=maker.weights_state,
        plan=maker.plan,
    )


def _skeleton_of(row: PretrainedCfg, count: int) -> Skeleton:
    """With the names of the weights row, if it has so many."""
    names = row.label_names
    return skeleton_of(count, names if names and len(names) == count else None)
