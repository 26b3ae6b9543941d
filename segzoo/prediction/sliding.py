"""Windows over an image, and the mean of their scores.

Shape suffixes: B batch, K classes, C channels, H, W rows and columns of an image or map.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from torch import Tensor

from .._errors import ImageError
from .makers import ScoreMaker
from .protocol import Protocol

MAX_WINDOWS = 10_000  # of one image; 8192 x 8192 pixels in windows of 512 with stride 256 are 961


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
