"""The walk: image -> preprocess -> model (whole or sliding window, scales and flips) -> class map -> Segmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, floor, inf, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._errors import ImageError, SegzooError
from .keypoints import Keypoints, decode_heatmaps
from .labels import generic_labels
from .layers.shapes import resize as resize_map
from .masks import class_map
from .models.rows import PretrainedCfg, label_set
from .plans import current_plan
from .preprocess import ImageSource, describe, load_image, model_size, pixel_pair, to_input
from .results import Segmentation


def predict(
    model: nn.Module,
    image: ImageSource | Sequence[ImageSource],
    *,
    resize: tuple[int, int] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Segmentation | list[Segmentation]:
    """Segment an image, or each of a list.

    >>> import numpy as np, segzoo
    >>> model = segzoo.create_model("edaformer_t", pretrained=True)
    >>> result = segzoo.predict(model, np.zeros((64, 96, 3), np.uint8))
    >>> result.mask.shape, result.mask.dtype
    ((64, 96), dtype('uint8'))

    Args:
        model: a segmentation model of segzoo; it is run in eval mode and left in the mode it was in.
        image: path, bytes of an image file (or a BytesIO), PIL image, or uint8 array (H, W, C); or a list or tuple of
            these.
        resize: (H, W) in pixels at which the model sees the image; default: the rule of its weights row.
        mode: "whole" or "slide" (windows whose scores are averaged); default: the row's.
        crop, stride: (H, W) in pixels of the window and of its step; default: the row's, else its training size and
            two thirds of it.
        scales: factors on the size at which the model sees the image; it sees every one of them.
        flip: it sees the mirror image of each, too. Of several views the probabilities are averaged (softmax of
            logits; SegViT's products as they are), at the size of scale 1.

    Returns:
        A Segmentation, or a list of them. Each keeps what its `scores()` are made from, on the CPU: of a sliding window
        that is K floats a pixel, so take what you need of a long list and let the results go.

    Raises:
        ImageError: an image that cannot be read. Of a list, all others are still processed: the error names every
            image that failed, and its `results` has the others, None in the failed places.
    """
    if not hasattr(model, "forward_head") or not hasattr(model, "to_size"):
        inner = "; pass its .module" if hasattr(getattr(model, "module", None), "forward_head") else ""
        raise SegzooError(f"{type(model).__name__} is no segmentation model; segzoo.list_models() lists them{inner}")
    walk = _Walk(model, resize=resize, mode=mode, crop=crop, stride=stride, scales=scales, flip=flip)
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
    x0, y0, x1, y1 = (0, 0, W, H) if box is None else _box(box)
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
        scales: Sequence[float],
        flip: bool,
    ):
        if getattr(model, "score_kind", None) == "heatmap":
            raise SegzooError(
                f"{model.name or type(model).__name__} gives heatmaps of keypoints, not classes; call "
                "segzoo.prediction.predict_keypoints(model, image)"
            )
        self.model = model
        self.row = getattr(model, "pretrained_cfg", None) or PretrainedCfg()
        self.label_set = label_set(self.row, model.num_classes) or generic_labels(model.num_classes)
        self.resize = resize
        self.mode = mode or self.row.test_mode
        if self.mode not in ("whole", "slide"):
            raise SegzooError(f"mode must be 'whole' or 'slide', not {self.mode!r}")
        if self.mode == "whole" and (crop is not None or stride is not None):
            raise SegzooError("crop and stride belong to mode='slide'")
        self.crop = self.row.crop or self.row.input_size if crop is None else pixel_pair("crop", crop)
        two_thirds = tuple(max(1, side * 2 // 3) for side in self.crop)
        self.stride = self.row.stride or two_thirds if stride is None else pixel_pair("stride", stride)
        if any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            whose = "" if stride is not None else " (the stride of the weights row; give stride=, too)"
            raise SegzooError(f"a window of {self.crop} cannot move by {self.stride}{whose}: stride <= crop is needed")
        if not isinstance(scales, (list, tuple)) or not scales or not all(_is_positive(scale) for scale in scales):
            raise SegzooError(f"scales must be a list of positive factors, such as (0.75, 1.0, 1.25), not {scales!r}")
        self.scales = scales
        self.mirrored = (False, True) if flip else (False,)
        self.num_views = len(self.scales) * len(self.mirrored)

    @torch.inference_mode()
    def __call__(self, source: ImageSource) -> Segmentation:
        image_HWC = load_image(source, self.model.in_chans)
        size = image_HWC.shape[:2]
        seen_size = model_size(size, self.row, self.resize)
        with _eval_mode(self.model):
            if self.num_views > 1 or self.mode == "slide":
                maker, head_output = _Scores, self.mean_of_views(image_HWC, seen_size)
            else:
                maker, head_output = self.model, self.head_output(self.input(image_HWC, seen_size, self.scales[0]))
            mask_BHW = class_map(maker, head_output, size)
        kept = _on_cpu(head_output)
        mask = mask_BHW[0].cpu().numpy()
        return Segmentation(
            mask=mask if mask.dtype == np.uint8 else mask.astype(np.uint16),
            label_set=self.label_set,
            image=image_HWC if image_HWC.shape[2] == 3 else np.repeat(image_HWC[..., :1], 3, axis=2),
            source=describe(source),
            plan=current_plan(self.model),
            _full_scores=lambda: maker.to_size(kept, size),
        )

    def input(self, image_HWC: np.ndarray, seen_size: tuple[int, int], scale: float) -> Tensor:
        """The image as the model sees it at one scale."""
        divisor = self.row.size_divisor if self.resize is None else 1
        size = tuple(max(1, ceil(side * scale / divisor)) * divisor for side in seen_size) if scale != 1 else seen_size
        return to_input(image_HWC, size, self.row, next(self.model.parameters()))

    def head_output(self, x_BCHW: Tensor) -> Any:
        return self.model.forward_head(self.model.forward_features(x_BCHW))

    def mean_of_views(self, image_HWC: np.ndarray, seen_size: tuple[int, int]) -> Tensor:
        """(1, K, *seen_size): the scores of a single view, else the mean of the views' probabilities."""
        total_BKHW = None
        for scale in self.scales:
            x_BCHW = self.input(image_HWC, seen_size, scale)
            for mirrored in self.mirrored:
                scores_BKHW = self.scores(x_BCHW.flip(-1) if mirrored else x_BCHW, seen_size)
                if self.num_views == 1:
                    return scores_BKHW
                if self.model.score_kind == "logits":
                    scores_BKHW = scores_BKHW.softmax(dim=1)
                if mirrored:
                    scores_BKHW = scores_BKHW.flip(-1)
                total_BKHW = scores_BKHW if total_BKHW is None else total_BKHW.add_(scores_BKHW)
        return total_BKHW.div_(self.num_views)

    def scores(self, x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """(1, K, *size) of one view."""
        if self.mode == "slide":
            return resize_map(self.slide(x_BCHW), size)
        return self.model.to_size(self.head_output(x_BCHW), size)

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


def _on_cpu(head_output: Any) -> Any:
    """A tensor, or a tuple with tensors, on the CPU and in a precision that its kernels have."""
    if isinstance(head_output, Tensor):
        return head_output.to("cpu", torch.float32) if head_output.dtype.itemsize < 4 else head_output.cpu()
    if isinstance(head_output, tuple) and hasattr(head_output, "_fields"):
        return type(head_output)(*map(_on_cpu, head_output))
    return head_output


def _box(box: object) -> Sequence[float]:
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4 or not all(isfinite(side) for side in box):
        raise SegzooError(f"box must be (x0, y0, x1, y1) in pixels, not {box!r}")
    return box


def _is_positive(scale: object) -> bool:
    return isinstance(scale, (int, float)) and 0 < scale < inf
