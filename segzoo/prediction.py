"""The walk: image -> preprocess -> model (whole or sliding window) -> class map -> Segmentation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ._errors import ImageError, SegzooError
from .keypoints import Keypoints, decode_heatmaps
from .labels import LabelSet, generic_labels, load_labels
from .layers.reduction import Plan, current_plan
from .layers.shapes import resize as resize_map
from .masks import class_map
from .models._pretrained import PretrainedCfg
from .preprocess import ImageSource, describe, load_image, model_size, to_input
from .visualize import overlay, palette_image


class PresentLabel(NamedTuple):
    """A class that occurs in a mask."""

    index: int
    name: str
    pixels: int


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """A predicted mask of one image, at the image's own size."""

    mask: np.ndarray  # (H, W) class indices, uint8 up to 256 classes, else uint16
    label_set: LabelSet  # names and colours of the classes
    image: np.ndarray  # (H, W, 3) uint8, the upright image that the mask belongs to
    source: str  # file name, or the kind of object given
    plan: Plan  # inference reduction that was in force
    _full_scores: Callable[[], Tensor] = dataclasses.field(repr=False)

    @property
    def labels(self) -> list[PresentLabel]:
        """Classes present, most pixels first."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.label_set))
        present = sorted(np.flatnonzero(counts), key=lambda index: -counts[index])
        return [PresentLabel(int(i), self.label_set.classes[i], int(counts[i])) for i in present]

    def scores(self) -> Tensor:
        """(K, H, W) float32 on the CPU, made on request: logits, or for SegViT products of probabilities."""
        return self._full_scores()[0].float().cpu()

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image with the classes' colours over it; alpha from 0 (image) to 1 (colours)."""
        if not 0 <= alpha <= 1:
            raise SegzooError(f"alpha must be between 0 and 1, not {alpha!r}")
        return overlay(self.image, self.mask, self.label_set, alpha)

    def save(self, path: str | Path, *, alpha: float = 0.5) -> tuple[Path, Path]:
        """Write the mask (PNG in palette mode, pixel value = class) and the overlay `<name>_overlay.png`.

        Each file appears whole or not at all. Returns both paths.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise SegzooError(f"{path}: masks are saved as .png, because lossy formats would change classes")
        overlay_path = path.with_name(f"{path.stem}_overlay.png")
        write_png(palette_image(self.mask, self.label_set), path)
        write_png(self.overlay(alpha), overlay_path)
        return path, overlay_path


def predict(
    model: nn.Module,
    image: ImageSource | Sequence[ImageSource],
    *,
    resize: tuple[int, int] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Segmentation | list[Segmentation]:
    """Segment an image, or each of a list.

    Args:
        model: a segmentation model of segzoo; it is run in eval mode and left in the mode it was in.
        image: path, bytes of an image file, PIL image, or uint8 array (H, W, C); or a list or tuple of these.
        resize: (H, W) in pixels at which the model sees the image; default: the rule of its weights row.
        mode: "whole" or "slide" (windows whose scores are averaged); default: the row's.
        crop, stride: (H, W) in pixels of the window and of its step; default: the row's, else its training size and
            two thirds of it.

    Returns:
        A Segmentation, or a list of them.

    Raises:
        ImageError: an image that cannot be read. Of a list, all others are still processed: the error names every
            image that failed, and its `results` has the others, None in the failed places.
    """
    if not hasattr(model, "forward_head") or not hasattr(model, "to_size"):
        raise SegzooError(f"{type(model).__name__} is no segmentation model; segzoo.list_models() lists them")
    walk = _Walk(model, resize=resize, mode=mode, crop=crop, stride=stride)
    if not isinstance(image, (list, tuple)):
        return walk(image)
    results: list[Segmentation | None] = []
    failures = []
    for item in image:
        try:
            results.append(walk(item))
        except ImageError as error:
            results.append(None)
            failures.append(str(error))
    if failures:
        error = ImageError("; ".join(failures))
        error.results = results
        raise error
    return results


@torch.inference_mode()
def predict_keypoints(
    model: nn.Module,
    image: ImageSource,
    *,
    box: tuple[float, float, float, float] | None = None,
    resize: tuple[int, int] | None = None,
) -> Keypoints:
    """Find keypoints in an image, or top-down in a part of it.

    Args:
        model: a keypoint model of segzoo (`segformer_b0_keypoints`); run in eval mode and left in the mode it was in.
        image: as for `predict`.
        box: (x0, y0, x1, y1) in pixels of the part to look at, for example a detected person with some room around;
            rounded outwards to whole pixels and clipped to the image. Default: the whole image.
        resize: (H, W) in pixels at which the model sees that part, best that of its training; default: the rule of
            its weights row.

    Returns:
        Keypoints with xy (K, 2) in pixels of the whole image (`segzoo.keypoints` has the convention) and score (K,),
        float32 on the CPU.

    Raises:
        ImageError: an image that cannot be read.
        SegzooError: a model of another kind, or a box without a pixel of the image.
    """
    if getattr(model, "score_kind", None) != "heatmap":
        raise SegzooError(f"{type(model).__name__} is no keypoint model; segzoo.list_models('*_keypoints') lists them")
    image_HWC = load_image(image, model.in_chans)
    H, W = image_HWC.shape[:2]
    x0, y0, x1, y1 = (0, 0, W, H) if box is None else box
    left, top, right, bottom = max(0, floor(x0)), max(0, floor(y0)), min(W, ceil(x1)), min(H, ceil(y1))
    if left >= right or top >= bottom:
        raise SegzooError(f"box {box} has no pixel of an image of {W} x {H}; give (x0, y0, x1, y1) in pixels")
    part_HWC = image_HWC[top:bottom, left:right]
    size = part_HWC.shape[:2]
    row = getattr(model, "pretrained_cfg", None) or PretrainedCfg()
    x_BCHW = to_input(part_HWC, model_size(size, row, resize), row, next(model.parameters()))
    with _eval_mode(model):
        heatmaps_BKHW = model.forward_head(model.forward_features(x_BCHW)).float().cpu()
    xy_BK2, score_BK = decode_heatmaps(heatmaps_BKHW, size, origin=(left, top))
    return Keypoints(xy=xy_BK2[0], score=score_BK[0])


class _Walk:
    """The options of one call, checked once, and the walk of one image."""

    def __init__(
        self,
        model: nn.Module,
        *,
        resize: tuple[int, int] | None,
        mode: str | None,
        crop: tuple[int, int] | None,
        stride: tuple[int, int] | None,
    ):
        if getattr(model, "score_kind", None) == "heatmap":
            raise SegzooError(
                f"{model.name or type(model).__name__} gives heatmaps of keypoints, not classes; call "
                "segzoo.prediction.predict_keypoints(model, image)"
            )
        self.model = model
        self.row = getattr(model, "pretrained_cfg", None) or PretrainedCfg()
        self.label_set = _label_set(self.row, model.num_classes)
        self.resize = resize
        self.mode = mode or self.row.test_mode
        if self.mode not in ("whole", "slide"):
            raise SegzooError(f"mode must be 'whole' or 'slide', not {mode!r}")
        if self.mode == "whole" and (crop or stride):
            raise SegzooError("crop and stride belong to mode='slide'")
        self.crop = crop or self.row.crop or self.row.input_size
        self.stride = stride or self.row.stride or tuple(max(1, side * 2 // 3) for side in self.crop)
        if min(*self.crop, *self.stride) < 1 or any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            raise SegzooError(f"a window of {self.crop} cannot move by {self.stride}: 1 <= stride <= crop is needed")

    @torch.inference_mode()
    def __call__(self, source: ImageSource) -> Segmentation:
        image_HWC = load_image(source, self.model.in_chans)
        size = image_HWC.shape[:2]
        like = next(self.model.parameters())
        x_BCHW = to_input(image_HWC, model_size(size, self.row, self.resize), self.row, like)
        with _eval_mode(self.model):
            if self.mode == "whole":
                head_output = self.model.forward_head(self.model.forward_features(x_BCHW))
                mask_BHW = class_map(self.model, head_output, size)
                full_scores = torch.inference_mode()(lambda: self.model.to_size(head_output, size))
            else:
                scores_BKHW = self.slide(x_BCHW)
                mask_BHW = class_map(_Scores, scores_BKHW, size)
                full_scores = torch.inference_mode()(lambda: resize_map(scores_BKHW, size))
        mask = mask_BHW[0].cpu().numpy()
        return Segmentation(
            mask=mask if mask.dtype == np.uint8 else mask.astype(np.uint16),
            label_set=self.label_set,
            image=image_HWC if image_HWC.shape[2] == 3 else np.repeat(image_HWC[..., :1], 3, axis=2),
            source=describe(source),
            plan=current_plan(self.model),
            _full_scores=full_scores,
        )

    def slide(self, x_BCHW: Tensor) -> Tensor:
        """Mean over windows of the scores at input size, the last window of a row or column flush with the border."""
        total_BKHW = count_HW = None
        for rows, columns in windows(x_BCHW.shape[2:], self.crop, self.stride):
            scores = self.model(x_BCHW[:, :, rows, columns])
            if total_BKHW is None:
                total_BKHW = scores.new_zeros(*scores.shape[:2], *x_BCHW.shape[2:])
                count_HW = scores.new_zeros(x_BCHW.shape[2:])
            total_BKHW[:, :, rows, columns] += scores
            count_HW[rows, columns] += 1
        return total_BKHW.div_(count_HW)


def windows(size: Sequence[int], crop: tuple[int, int], stride: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Windows that cover a map of `size`, as mmseg places them: rows and columns as slices."""

    def starts(side: int, window: int, step: int) -> list[int]:
        steps = max(0, -(-(side - window) // step))
        return [min(i * step, max(0, side - window)) for i in range(steps + 1)]

    for y in starts(size[0], crop[0], stride[0]):
        for x in starts(size[1], crop[1], stride[1]):
            yield slice(y, y + crop[0]), slice(x, x + crop[1])


class _Scores:
    """Averaged scores in place of a model: what is left to do is one bilinear resize, for any kind of score."""

    score_kind = "logits"
    to_size = staticmethod(resize_map)


class _eval_mode:  # noqa: N801  (reads as a verb in `with`)
    """Run in eval mode and give every module its own mode back."""

    def __init__(self, model: nn.Module):
        self.training = [module for module in model.modules() if module.training]
        self.model = model

    def __enter__(self) -> None:
        if self.training:
            self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True


def _label_set(row: PretrainedCfg, num_classes: int) -> LabelSet:
    """The row's names if the model still has its classes, else numbered ones."""
    if row.label_set:
        labels = load_labels(row.label_set)
        if len(labels) == num_classes:
            return labels
    labels = generic_labels(num_classes)
    if row.label_names and len(row.label_names) == num_classes:
        return dataclasses.replace(labels, classes=row.label_names)
    return labels


def write_png(image: Image.Image, path: Path) -> None:
    """Write a PNG that appears whole or not at all, with the folders that it needs."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(partial, format="PNG")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SegzooError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
