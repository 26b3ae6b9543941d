"""One image seen at several scales and mirrored, and the mean of what was seen.

Shape suffixes: B batch, K classes, C channels, H, W rows and columns of an image or map.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import NamedTuple, cast

import numpy as np
from torch import Tensor

from ..layers.shapes import resize as resize_map
from ..preprocess import check_pixels, to_input
from .makers import ScoreMaker
from .protocol import Protocol
from .sliding import num_windows, slide

# Is told how many looks at an image (windows of all views) are done, and of how many: 0 first, then after each.
OnLook = Callable[[int, int], object]


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


def _scaled(size: tuple[int, int], scale: float, divisor: int) -> tuple[int, int]:
    """`size` times `scale`, up to multiples of `divisor`; as it is at scale 1. ImageError beyond SEGZOO_MAX_PIXELS."""
    if scale == 1:
        return size
    H, W = (max(1, ceil(side * scale / divisor)) * divisor for side in size)
    check_pixels(f"the image at scale {scale}", (H, W))
    return H, W


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


@dataclasses.dataclass(frozen=True)
class Averaged:
    """Averaged scores of windows or views: what is left to do is one bilinear resize, for any kind of score."""

    score_kind: str = "logits"

    def to_size(self, head_output: Tensor, size: Sequence[int]) -> Tensor:
        return resize_map(head_output, size)


AVERAGED = Averaged()
