"""The walk: image -> preprocess -> model (whole or sliding window, scales and flips) -> class map -> Segmentation.

Shape suffixes: B batch, K classes, C channels, H, W rows and columns of an image or map.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import typing
import weakref
from collections.abc import Callable, Iterator, Sequence
from math import ceil, floor, isfinite
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from ._errors import ImageError, SegzooError
from .keypoints import Skeleton, decode_heatmaps, skeleton_of
from .labels import LabelSet, generic_labels
from .layers.shapes import resize as resize_map
from .masks import Upscaler, class_map
from .models.base import WeightsState
from .models.rows import PretrainedCfg, label_set
from .models.segmenter import SegmentationModel
from .plans import Plan, current_plan
from .preprocess import ImageSource, check_pixels, describe, is_file, load_image, model_size, pixel_pair, to_input
from .results import Pose, Segmentation
from .twins import eval_twin

MAX_SCALE = 64
MAX_WINDOWS = 10_000  # of one image; 8192 x 8192 pixels in windows of 512 with stride 256 are 961

# Is told how many looks at an image (windows of all views) are done, and of how many: 0 first, then after each.
OnLook = Callable[[int, int], object]

_Result = typing.TypeVar("_Result")
_log = logging.getLogger("segzoo")
_warned: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose weights' state has been said


class ScoreMaker(typing.Protocol):
    """What the walk runs: a segmentation model, or whatever has these members in its place."""

    @property
    def name(self) -> str: ...

    @property
    def in_chans(self) -> int: ...

    @property
    def row(self) -> PretrainedCfg:
        """How images are prepared, and the test protocol."""
        ...

    @property
    def label_set(self) -> LabelSet: ...

    @property
    def weights_state(self) -> WeightsState: ...

    @property
    def plan(self) -> Plan:
        """The inference reduction that its scores are made with."""
        ...

    @property
    def like(self) -> Tensor:
        """Any tensor on the device and in the dtype in which images are taken."""
        ...

    def head_output(self, x_BCHW: Tensor) -> Any:
        """Normalised images -> what the model's `forward_head` returns."""
        ...

    @property
    def upscaler(self) -> Upscaler:
        """The model's `to_size` and `score_kind`."""
        ...


@overload
def predict(
    model: nn.Module | ScoreMaker,
    image: ImageSource,
    *,
    resize: tuple[int, int] | None = ...,
    mode: str | None = ...,
    crop: tuple[int, int] | None = ...,
    stride: tuple[int, int] | None = ...,
    scales: Sequence[float] = ...,
    flip: bool = ...,
) -> Segmentation: ...


@overload
def predict(
    model: nn.Module | ScoreMaker,
    image: list[ImageSource] | tuple[ImageSource, ...],
    *,
    resize: tuple[int, int] | None = ...,
    mode: str | None = ...,
    crop: tuple[int, int] | None = ...,
    stride: tuple[int, int] | None = ...,
    scales: Sequence[float] = ...,
    flip: bool = ...,
    batch_size: int = ...,
) -> list[Segmentation]: ...


@overload
def predict(
    model: nn.Module | ScoreMaker,
    image: Iterator[ImageSource],
    *,
    resize: tuple[int, int] | None = ...,
    mode: str | None = ...,
    crop: tuple[int, int] | None = ...,
    stride: tuple[int, int] | None = ...,
    scales: Sequence[float] = ...,
    flip: bool = ...,
) -> Iterator[Segmentation]: ...


def predict(
    model: nn.Module | ScoreMaker,
    image: ImageSource | list[ImageSource] | tuple[ImageSource, ...] | Iterator[ImageSource],
    *,
    resize: tuple[int, int] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 1,
) -> Segmentation | list[Segmentation] | Iterator[Segmentation]:
    """Segment an image, or each of a list or of an iterator.

    >>> import numpy as np, segzoo
    >>> model = segzoo.create_model("edaformer_t", pretrained=True)
    >>> result = segzoo.predict(model, np.zeros((64, 96, 3), np.uint8))
    >>> result.mask.shape, result.mask.dtype
    ((64, 96), dtype('uint8'))

    Args:
        model: a segmentation model of segzoo, in any mode: what runs is its twin in eval mode (`segzoo.twins`), so that
            the model is never touched and several threads may use it (docs/threads.md).
        image: path, http(s) URL, bytes of an image file, open binary file, PIL image, or uint8 array (H, W, C); or a
            list, tuple or iterator (such as a generator) of these.
        resize: (H, W) in pixels at which the model sees the image; default: the rule of its weights row.
        mode: "whole" or "slide" (windows whose scores are averaged); default: the row's.
        crop, stride: (H, W) in pixels of the window and of its step; default: the row's, else its training size and
            two thirds of it.
        scales: factors on the size at which the model sees the image; it sees every one of them.
        flip: it sees the mirror image of each, too. Of several views the probabilities are averaged (softmax of
            logits; SegViT's products as they are), at the size of scale 1.
        batch_size: of a list, so many whole images that the model sees at one size go through it together, each in a
            single view. Scores then differ from those one by one as floating-point sums in another order do.

    Returns:
        A Segmentation, a list of them, or of an iterator an iterator, which segments each image when it is asked for
        it: one that cannot be read raises there, and the next call goes on with the next image. Each keeps what its
        `scores()` are made from, on the CPU: of a sliding window that is K floats a pixel, so take what you need of a
        long list and let the results go.

    Raises:
        ImageError: an image that cannot be read. Of a list, all others are still processed: the error names every
            image that failed, and its `results` has the others, None in the failed places.
    """
    maker = mask_maker(model)
    protocol = protocol_of(maker.row, resize=resize, mode=mode, crop=crop, stride=stride, scales=scales, flip=flip)
    if isinstance(image, Iterator) and not is_file(image):
        return map(functools.partial(segment_one, maker, protocol=protocol), image)
    if not isinstance(image, (list, tuple)):
        return segment_one(maker, cast(ImageSource, image), protocol)
    return _all_or_raise(list(segment_many(maker, image, protocol, batch_size)), Segmentation)


def mask_maker(model: nn.Module | ScoreMaker) -> ScoreMaker:
    """`score_maker` where masks are wanted; of a model that can only guess it is said, once.

    Raises:
        SegzooError: it gives no scores of classes.
    """
    maker = score_maker(model)
    if maker.upscaler.score_kind == "heatmap":
        raise SegzooError(
            f"{maker.name} gives heatmaps of keypoints, not classes; call segzoo.predict_keypoints(model, image)"
        )
    _say_weights_state(model, maker)
    return maker


def _say_weights_state(model: object, maker: ScoreMaker) -> None:
    """Warn once a model, through logging, that what it finds means nothing."""
    if maker.weights_state == "pretrained" or model in _warned:
        return
    _warned.add(model)
    what = "all weights are" if maker.weights_state == "untrained" else "the classifier is"
    _log.warning(
        "%s: %s as drawn at random, so what it finds means nothing; give it weights with create_model(..., "
        "pretrained=True) or load_weights, or if you have trained it, set model.weights_state = 'pretrained'",
        maker.name,
        what,
    )


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
    return _all_or_raise(list(pose_many(maker, image, batch_size, resize=resize, skeleton=skeleton)), Pose)


def pose_maker(model: nn.Module | ScoreMaker) -> ScoreMaker:
    """`score_maker` where keypoints are wanted; of a model that can only guess it is said, once.

    Raises:
        SegzooError: it gives no heatmaps.
    """
    maker = score_maker(model)
    if maker.upscaler.score_kind != "heatmap":
        raise SegzooError(f"{maker.name} is no keypoint model; segzoo.list_models('*_keypoints*') lists them")
    _say_weights_state(model, maker)
    return maker


def _all_or_raise(outcomes: Sequence[_Result | ImageError], kind: type[_Result]) -> list[_Result]:
    """What became of a list of images, if none failed; else one error that names all that did, with the others."""
    failures = [str(outcome) for outcome in outcomes if isinstance(outcome, ImageError)]
    if failures:
        error = ImageError("; ".join(failures))
        error.results = [None if isinstance(outcome, ImageError) else outcome for outcome in outcomes]
        raise error
    return [outcome for outcome in outcomes if isinstance(outcome, kind)]


# --- what a call asks for ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one call looks at each of its images, every option decided and checked."""

    resize: tuple[int, int] | None  # (H, W) in pixels at which the model sees an image; None = the row's rule
    mode: str  # "whole" or "slide"
    crop: tuple[int, int]  # slide: window (H, W) in pixels
    stride: tuple[int, int]  # slide: step (H, W) in pixels
    scales: tuple[float, ...]  # factors on the size at which the model sees the image, one view each
    flip: bool  # the mirror image of each view, too

    @property
    def num_views(self) -> int:
        return len(self.scales) * (2 if self.flip else 1)

    @property
    def in_one_look(self) -> bool:
        """One view of the whole image, whose scores need no averaging."""
        return self.mode == "whole" and self.num_views == 1


def protocol_of(
    row: PretrainedCfg,
    *,
    resize: tuple[int, int] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Protocol:
    """The protocol of a call: its options where given, else those of the weights row.

    Raises:
        SegzooError: an option that is none, or two that contradict each other.
    """
    mode = mode or row.test_mode
    if mode not in ("whole", "slide"):
        raise SegzooError(f"mode must be 'whole' or 'slide', not {mode!r}")
    if mode == "whole" and (crop is not None or stride is not None):
        raise SegzooError("crop and stride belong to mode='slide'")
    window, step = _window_and_step(row, crop, stride)
    _check_scales(scales)
    return Protocol(resize=resize, mode=mode, crop=window, stride=step, scales=tuple(scales), flip=bool(flip))


def _window_and_step(
    row: PretrainedCfg, crop: tuple[int, int] | None, stride: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Crop and stride of a sliding window: as given, else the row's; SegzooError if windows would leave gaps."""
    window = (row.crop or row.input_size) if crop is None else pixel_pair("crop", crop)
    two_thirds = (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
    step = (row.stride or two_thirds) if stride is None else pixel_pair("stride", stride)
    if any(s > c for s, c in zip(step, window, strict=True)):
        whose = "" if stride is not None else " (the stride of the weights row; give stride=, too)"
        raise SegzooError(f"a window of {window} cannot move by {step}{whose}: stride <= crop is needed")
    return window, step


def _check_scales(scales: object) -> None:
    if not isinstance(scales, (list, tuple)) or not scales or not all(_is_positive(scale) for scale in scales):
        raise SegzooError(
            f"scales must be a list of positive factors, such as (0.75, 1.0, 1.25), of at most {MAX_SCALE}, "
            f"not {scales!r}"
        )


def score_maker(model: nn.Module | ScoreMaker) -> ScoreMaker:
    """What the walk runs for a model or an engine.

    Raises:
        SegzooError: it gives no scores of an image.
    """
    if not isinstance(model, nn.Module):
        return model
    inner = dict(model.named_children()).get("module")
    model = dict(model.named_children()).get("_orig_mod", model)  # torch.compile's wrapper: its parts are what is run
    if isinstance(model, SegmentationModel):
        return ModelScores(model)
    hint = "; pass its .module" if isinstance(inner, SegmentationModel) else ""
    raise SegzooError(f"{type(model).__name__} is no segmentation model; segzoo.list_models() lists them{hint}")


class ModelScores:
    """A model as a ScoreMaker: its twin in eval mode, with the reduction in force when this was made."""

    def __init__(self, model: SegmentationModel):
        twin = eval_twin(model)
        self.upscaler = self.twin = twin
        self.name = twin.name or type(twin).__name__
        self.in_chans = twin.in_chans
        self.row = twin.pretrained_cfg or PretrainedCfg()
        self.label_set = label_set(self.row, twin.num_classes) or generic_labels(twin.num_classes)
        self.weights_state: WeightsState = twin.weights_state
        self.plan = current_plan(twin)
        self.like = next(twin.parameters())

    def head_output(self, x_BCHW: Tensor) -> Any:
        return self.twin.forward_head(self.twin.forward_features(x_BCHW))


# --- one image, in the order of the data ------------------------------------------------------------------------------


@torch.inference_mode()
def segment_one(
    maker: ScoreMaker, source: ImageSource, protocol: Protocol, on_look: OnLook | None = None
) -> Segmentation:
    image_HWC = load_image(source, maker.in_chans)
    size = (image_HWC.shape[0], image_HWC.shape[1])
    seen_size = model_size(size, maker.row, protocol.resize)
    if protocol.in_one_look:
        (view,) = views(maker, image_HWC, seen_size, protocol)
        return _segmentation(maker, source, image_HWC, maker.upscaler, maker.head_output(view.x))
    scores_BKHW = mean_of_views(maker, image_HWC, seen_size, protocol, on_look)
    return _segmentation(maker, source, image_HWC, AVERAGED, scores_BKHW)


def _segmentation(
    maker: ScoreMaker, source: ImageSource, image_HWC: np.ndarray, upscaler: Upscaler, head_output: Any
) -> Segmentation:
    """The result of an image from what the upscaler makes full-size scores of."""
    size = (image_HWC.shape[0], image_HWC.shape[1])
    mask_HW = class_map(upscaler, head_output, size)[0].cpu().numpy()
    kept = _on_cpu(head_output)
    return Segmentation(
        mask=mask_HW if mask_HW.dtype == np.uint8 else mask_HW.astype(np.uint16),
        label_set=maker.label_set,
        image=_rgb(image_HWC),
        source=describe(source),
        model=maker.name,
        weights_state=maker.weights_state,
        plan=maker.plan,
        _full_scores=lambda: upscaler.to_size(kept, size),
    )


def segment_many(
    maker: ScoreMaker,
    sources: Sequence[ImageSource],
    protocol: Protocol,
    batch_size: int,
    on_look: OnLook | None = None,
) -> Iterator[Segmentation | ImageError]:
    """What becomes of each image, in order; `batch_size` of them are read at a time.

    Args:
        on_look: told of each image that takes several looks.
    """
    for some in _batches(sources, batch_size):
        yield from _segment_batch(maker, some, protocol, on_look)


def _batches(sources: Sequence[ImageSource], batch_size: int) -> Iterator[Sequence[ImageSource]]:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise SegzooError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    for first in range(0, len(sources), batch_size):
        yield sources[first : first + batch_size]


@torch.inference_mode()
def _segment_batch(
    maker: ScoreMaker, sources: Sequence[ImageSource], protocol: Protocol, on_look: OnLook | None
) -> list[Segmentation | ImageError]:
    outcomes: dict[int, Segmentation | ImageError] = {}
    together: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}  # size seen -> images, by their places
    for i, source in enumerate(sources):
        try:
            if len(sources) == 1 or not protocol.in_one_look:
                outcomes[i] = segment_one(maker, source, protocol, on_look)
                continue
            image_HWC = load_image(source, maker.in_chans)
            size = model_size((image_HWC.shape[0], image_HWC.shape[1]), maker.row, protocol.resize)
            together.setdefault(size, []).append((i, image_HWC))
        except ImageError as error:
            outcomes[i] = error
    for size, images in together.items():
        x_BCHW = torch.cat([view.x for _, image in images for view in views(maker, image, size, protocol)])
        head_output = maker.head_output(x_BCHW)
        for place, (i, image_HWC) in enumerate(images):
            own = _row_of_batch(head_output, place)
            outcomes[i] = _segmentation(maker, sources[i], image_HWC, maker.upscaler, own)
    return [outcomes[i] for i in range(len(sources))]


def pose_many(
    maker: ScoreMaker,
    sources: Sequence[ImageSource],
    batch_size: int,
    *,
    resize: tuple[int, int] | None = None,
    skeleton: Skeleton | None = None,
) -> Iterator[Pose | ImageError]:
    """What becomes of each image, in order; `batch_size` of them are read at a time."""
    for some in _batches(sources, batch_size):
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
        image=_rgb(part.image),
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


def _rgb(image_HWC: np.ndarray) -> np.ndarray:
    """The image as it is shown: of other than three channels the first."""
    return image_HWC if image_HWC.shape[2] == 3 else np.repeat(image_HWC[..., :1], 3, axis=2)


class View(NamedTuple):
    """One look at an image."""

    x: Tensor  # (1, C, H, W) as the model sees it
    mirrored: bool


def views(maker: ScoreMaker, image_HWC: np.ndarray, seen_size: tuple[int, int], protocol: Protocol) -> Iterator[View]:
    """The image at every scale of the protocol, and the mirror image of each where it flips."""
    for size in _view_sizes(maker, seen_size, protocol):
        x_BCHW = to_input(image_HWC, size, maker.row, maker.like)
        yield View(x_BCHW, mirrored=False)
        if protocol.flip:
            yield View(x_BCHW.flip(-1), mirrored=True)


def _view_sizes(maker: ScoreMaker, seen_size: tuple[int, int], protocol: Protocol) -> list[tuple[int, int]]:
    """(H, W) at which the model sees the image, a scale after the other."""
    divisor = maker.row.size_divisor if protocol.resize is None else 1
    return [_scaled(seen_size, scale, divisor) for scale in protocol.scales]


def mean_of_views(
    maker: ScoreMaker,
    image_HWC: np.ndarray,
    seen_size: tuple[int, int],
    protocol: Protocol,
    on_look: OnLook | None = None,
) -> Tensor:
    """(1, K, *seen_size): the scores of a single view, else the mean of the views' probabilities."""
    total_BKHW: Tensor | None = None
    looked = _counter(on_look, num_looks(_view_sizes(maker, seen_size, protocol), protocol))
    for view in views(maker, image_HWC, seen_size, protocol):
        if protocol.mode == "slide":
            scores_BKHW = resize_map(slide(maker, view.x, protocol, looked), seen_size)
        else:
            scores_BKHW = maker.upscaler.to_size(maker.head_output(view.x), seen_size)
            looked()
        if protocol.num_views == 1:
            return scores_BKHW
        if maker.upscaler.score_kind == "logits":
            scores_BKHW = scores_BKHW.softmax(dim=1)
        if view.mirrored:
            scores_BKHW = scores_BKHW.flip(-1)
        total_BKHW = scores_BKHW if total_BKHW is None else total_BKHW.add_(scores_BKHW)
    return cast(Tensor, total_BKHW).div_(protocol.num_views)


def num_looks(view_sizes: Sequence[tuple[int, int]], protocol: Protocol) -> int:
    """How often the model runs for an image that it sees at these sizes: windows of all views, mirrored ones too."""
    mirrors = 2 if protocol.flip else 1
    if protocol.mode == "whole":
        return mirrors * len(view_sizes)
    return mirrors * sum(num_windows(size, protocol.crop, protocol.stride) for size in view_sizes)


def _counter(on_look: OnLook | None, total: int) -> Callable[[], None]:
    """What to call after each look, so that `on_look` is told."""
    if on_look is None:
        return lambda: None
    on_look(0, total)
    done = itertools.count(1)

    def looked() -> None:
        on_look(next(done), total)

    return looked


def slide(maker: ScoreMaker, x_BCHW: Tensor, protocol: Protocol, looked: Callable[[], None] = lambda: None) -> Tensor:
    """Mean over windows of the scores at input size, the last window of a row or column flush with the border.

    Args:
        looked: called after each window.
    """
    size = (x_BCHW.shape[2], x_BCHW.shape[3])
    mean_BKHW: Tensor | None = None
    check_windows(size, protocol.crop, protocol.stride)
    for rows, strip_BKHW in slide_strips(maker, size, lambda ys, xs: x_BCHW[:, :, ys, xs], protocol, looked=looked):
        if mean_BKHW is None:
            mean_BKHW = strip_BKHW.new_empty(*strip_BKHW.shape[:2], *size)
        mean_BKHW[:, :, rows] = strip_BKHW
    return cast(Tensor, mean_BKHW)


def slide_strips(
    maker: ScoreMaker,
    size: tuple[int, int],
    read: Callable[[slice, slice], Tensor],
    protocol: Protocol,
    columns: slice | None = None,
    looked: Callable[[], None] = lambda: None,
) -> Iterator[tuple[slice, Tensor]]:
    """What `slide` returns, from top to bottom, without an image or scores of full size.

    Args:
        size: (H, W) of the image in pixels.
        read: rows and columns of a window, which lie in the image -> (B, C, h, w), normalised.
        columns: of the result, as for `strip_windows`.
        looked: called after each window.

    Yields:
        rows, and their mean scores (B, K, rows, columns) once no later window touches them. The next strip takes their
        memory.
    """
    left, right = (columns.start, columns.stop) if columns else (0, size[1])
    wanted = strip_windows(size, protocol, columns)
    by_row = [list(row) for _, row in itertools.groupby(wanted, key=lambda window: window[0])]
    sums: _Strip | None = None
    for row, stop in zip(by_row, [*(row[0][0].start for row in by_row[1:]), size[0]], strict=True):
        for rows, xs in row:
            window_BCHW = read(rows, xs)
            scores_BKHW = maker.upscaler.to_size(maker.head_output(window_BCHW), window_BCHW.shape[2:])
            if sums is None:
                sums = _Strip(scores_BKHW, right - left)
            inside = slice(max(xs.start, left), min(xs.stop, right))
            sums.add(scores_BKHW[..., inside.start - xs.start : inside.stop - xs.start], inside.start - left)
            looked()
        start = row[0][0].start
        done = cast(_Strip, sums)
        yield slice(start, stop), done.mean(stop - start)
        done.scroll(stop - start)


def strip_windows(size: tuple[int, int], protocol: Protocol, columns: slice | None = None) -> list[tuple[slice, slice]]:
    """The windows that lie in an image of (H, W), clipped to it, row by row.

    Args:
        columns: start and stop; only windows that touch them. Default: all.
    """
    left, right = (columns.start, columns.stop) if columns else (0, size[1])
    return [
        (slice(ys.start, min(ys.stop, size[0])), slice(xs.start, min(xs.stop, size[1])))
        for ys, xs in windows(size, protocol.crop, protocol.stride)
        if xs.start < right and xs.stop > left
    ]


class _Strip:
    """Sums of scores of the rows that the present row of windows covers, and how many windows each pixel has.

    Args:
        scores_BKHW: of a window; its height is that of all windows.
    """

    def __init__(self, scores_BKHW: Tensor, width: int):
        B, K, H, _ = scores_BKHW.shape
        self.total_BKHW = scores_BKHW.new_zeros(B, K, H, width)
        self.count_HW = scores_BKHW.new_zeros(H, width)

    def add(self, scores_BKHW: Tensor, left: int) -> None:
        columns = slice(left, left + scores_BKHW.shape[3])
        self.total_BKHW[..., columns] += scores_BKHW
        self.count_HW[:, columns] += 1

    def mean(self, rows: int) -> Tensor:
        """Of the first rows, in place of their sums."""
        return self.total_BKHW[:, :, :rows].div_(self.count_HW[:rows])

    def scroll(self, rows: int) -> None:
        """Move up by so many rows; the last rows are empty then."""
        for plane_HW in (*self.total_BKHW.flatten(0, 1), self.count_HW):
            kept_HW = plane_HW[rows:].clone()
            plane_HW[: len(kept_HW)] = kept_HW
            plane_HW[len(kept_HW) :] = 0


def windows(size: Sequence[int], crop: tuple[int, int], stride: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Windows that cover a map of `size`, as mmseg places them: rows and columns as slices."""

    (ys, xs) = (starts(*sides) for sides in zip(size, crop, stride, strict=True))
    for y in ys:
        for x in xs:
            yield slice(y, y + crop[0]), slice(x, x + crop[1])


def starts(side: int, window: int, step: int) -> list[int]:
    """Where windows of a side begin, the last one flush with its end."""
    return [*range(0, max(0, side - window), step), max(0, side - window)]


def num_windows(size: Sequence[int], crop: tuple[int, int], stride: tuple[int, int]) -> int:
    rows, columns = (len(starts(*sides)) for sides in zip(size, crop, stride, strict=True))
    return rows * columns


def check_windows(size: Sequence[int], crop: tuple[int, int], stride: tuple[int, int]) -> None:
    """Raises ImageError if an image of (H, W) would be seen in more windows than can be meant."""
    if (count := num_windows(size, crop, stride)) > MAX_WINDOWS:
        raise ImageError(
            f"the image at {size[0]} x {size[1]} pixels would be seen in {count:,} windows of {crop[0]} x "
            f"{crop[1]}, more than {MAX_WINDOWS:,}; give a larger crop and stride, or mode='whole'"
        )


@dataclasses.dataclass(frozen=True)
class Averaged:
    """Averaged scores of windows or views: what is left to do is one bilinear resize, for any kind of score."""

    score_kind: str = "logits"

    def to_size(self, head_output: Tensor, size: Sequence[int]) -> Tensor:
        return resize_map(head_output, size)


AVERAGED = Averaged()


def _scaled(size: tuple[int, int], scale: float, divisor: int) -> tuple[int, int]:
    """`size` times `scale`, up to multiples of `divisor`; as it is at scale 1. ImageError beyond SEGZOO_MAX_PIXELS."""
    if scale == 1:
        return size
    H, W = (max(1, ceil(side * scale / divisor)) * divisor for side in size)
    check_pixels(f"the image at scale {scale}", (H, W))
    return H, W


def _row_of_batch(head_output: Any, place: int) -> Any:
    """What belongs to one image of a batch; its tensors keep their batch axis and nothing of the others."""
    if isinstance(head_output, Tensor):
        return head_output[place : place + 1].clone()
    if isinstance(head_output, tuple) and hasattr(head_output, "_fields"):
        return type(head_output)(*(_row_of_batch(item, place) for item in head_output))
    return head_output


def _on_cpu(head_output: Any) -> Any:
    """A tensor, or a tuple with tensors, on the CPU and in a precision that its kernels have."""
    if isinstance(head_output, Tensor):
        return head_output.to("cpu", torch.float32) if head_output.dtype.itemsize < 4 else head_output.cpu()
    if isinstance(head_output, tuple) and hasattr(head_output, "_fields"):
        return type(head_output)(*map(_on_cpu, head_output))
    return head_output


def _box(box: object) -> tuple[float, float, float, float]:
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4 or not all(isfinite(side) for side in box):
        raise SegzooError(f"box must be (x0, y0, x1, y1) in pixels, not {box!r}")
    x0, y0, x1, y1 = box
    return x0, y0, x1, y1


def _is_positive(scale: object) -> bool:
    return isinstance(scale, (int, float)) and 0 < scale <= MAX_SCALE
