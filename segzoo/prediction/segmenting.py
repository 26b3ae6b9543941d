"""The walk: image -> preprocess -> model (whole or sliding window, scales and flips) -> class map -> Segmentation.

Shape suffixes: B batch, K classes, C channels, H, W rows and columns of an image or map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import ImageError
from ..masks import Upscaler, class_map
from ..preprocess import ImageSource, describe, is_file, load_image, model_size, rgb
from ..results import Segmentation
from .lists import all_or_raise, in_batches
from .makers import ScoreMaker, mask_maker
from .protocol import Protocol, protocol_of
from .viewing import AVERAGED, OnLook, mean_of_views, views


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
    return all_or_raise(list(segment_many(maker, image, protocol, batch_size)), Segmentation)


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
    kept = _each_tensor(head_output, _on_cpu)
    return Segmentation(
        mask=mask_HW if mask_HW.dtype == np.uint8 else mask_HW.astype(np.uint16),
        label_set=maker.label_set,
        image=rgb(image_HWC),
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
    for some in in_batches(sources, batch_size):
        yield from _segment_batch(maker, some, protocol, on_look)


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
            own = _each_tensor(head_output, lambda tensor, place=place: tensor[place : place + 1].clone())
            outcomes[i] = _segmentation(maker, sources[i], image_HWC, maker.upscaler, own)
    return [outcomes[i] for i in range(len(sources))]


def _each_tensor(head_output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, or a named tuple with all tensors in it changed; a batch's axis stays the first."""
    if isinstance(head_output, Tensor):
        return change(head_output)
    if isinstance(head_output, tuple) and hasattr(head_output, "_fields"):
        return type(head_output)(*(_each_tensor(item, change) for item in head_output))
    return head_output


def _on_cpu(tensor: Tensor) -> Tensor:
    """In a precision that the CPU's kernels have."""
    return tensor.to("cpu", torch.float32) if tensor.dtype.itemsize < 4 else tensor.cpu()
