"""The classes of a mask as shapes: run lengths as COCO has them, and polygons along the edges of the pixels.

Both are exact: what is drawn from them is the mask again. Shape letters: H, W rows and columns, E edges, R runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Steps along the edges of pixels, clockwise: east, south, west, north; y points down.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def to_rle(mask_HW: np.ndarray) -> dict[int, dict[str, Any]]:
    """Class index -> {"size": [H, W], "counts": text}, for each class that occurs: COCO's compressed run lengths.

    The runs go down the columns, as pycocotools decodes them (`pycocotools.mask.decode`).
    """
    H, W = mask_HW.shape
    flat = mask_HW.ravel(order="F")
    starts_R = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    ends_R = np.concatenate((starts_R[1:], [flat.size]))
    class_R = flat[starts_R]
    order_R = np.argsort(class_R, kind="stable")
    classes, firsts = np.unique(class_R[order_R], return_index=True)
    rles = {}
    for index, runs in zip(classes, np.split(order_R, firsts[1:]), strict=True):
        # Background and class in turn, from the first pixel on: the distances between all borders.
        borders = np.stack((starts_R[runs], ends_R[runs]), axis=1).ravel()
        counts = np.diff(borders, prepend=0)
        if ends_R[runs[-1]] < flat.size:
            counts = np.append(counts, flat.size - ends_R[runs[-1]])
        rles[int(index)] = {"size": [H, W], "counts": _compressed(counts)}
    return rles


def _compressed(counts: np.ndarray) -> str:
    """COCO's text of run lengths: each less the one two before it, in groups of five bits, the lowest first.

    A character is 48 + group, + 32 where more follow; the last group's highest bit is the sign.
    """
    numbers = counts.astype(np.int64)
    numbers[3:] -= counts[1:-2]
    groups = []
    left = np.ones(len(numbers), dtype=bool)  # of which groups are left
    while left.any():
        group, rest = numbers & 31, numbers >> 5
        more = np.where(group & 16, rest != -1, rest != 0)
        groups.append(np.where(left, 48 + group + 32 * more, 0))
        left, numbers = left & more, rest
    characters = np.stack(groups, axis=1).ravel().astype(np.uint8)
    return characters[characters > 0].tobytes().decode("ascii")


def to_polygons(mask_HW: np.ndarray) -> dict[int, list[np.ndarray]]:
    """Class index -> its closed rings, each (N, 2) int32 corners (x, y) in pixels, for each class that occurs.

    Pixel (row y, column x) is the square from (x, y) to (x + 1, y + 1), so that rings run between pixels. Outer rings
    go clockwise as one sees them, rings around holes counter-clockwise; pixels that touch at a corner only are apart.
    Filled by the even-odd rule, all rings of a class together cover it exactly.
    """
    return {int(index): _rings(mask_HW == index) for index in np.unique(mask_HW)}


def _rings(inside_HW: np.ndarray) -> list[np.ndarray]:
    """Follow the edges that have the region on their right."""
    edges_4HW = _edges(inside_HW)
    unseen_HW = edges_4HW[0].copy()  # edges to the east, of which every ring has one
    return [_ring(edges_4HW, unseen_HW, int(x), int(y)) for y, x in np.argwhere(edges_4HW[0]) if unseen_HW[y, x]]


def _edges(inside_HW: np.ndarray) -> np.ndarray:
    """(4, H + 1, W + 1): whether an edge leaves a corner of the grid in each direction of STEPS."""
    H, W = inside_HW.shape
    padded = np.pad(inside_HW, 1)
    # The four pixels around each corner.
    nw, ne, sw, se = (padded[y : y + H + 1, x : x + W + 1] for y in (0, 1) for x in (0, 1))
    return np.stack((se & ~ne, sw & ~se, nw & ~sw, ne & ~nw))


def _ring(edges_4HW: np.ndarray, unseen_HW: np.ndarray, x: int, y: int) -> np.ndarray:
    """The corners of the ring that leaves (x, y) eastwards; its edges to the east are no longer unseen.

    (x, y) is a corner if it is the first of the ring in reading order, since another edge to the east would lie before.
    """
    start, direction = (x, y), 0
    corners = [start]
    while True:
        if direction == 0:
            unseen_HW[y, x] = False
        x, y = x + STEPS[direction][0], y + STEPS[direction][1]
        # Right before straight before left: at a corner where two pixels touch, the ring stays with its own.
        turn = next(turn for turn in (1, 0, -1) if edges_4HW[(direction + turn) % 4, y, x])
        direction = (direction + turn) % 4
        if (x, y) == start and direction == 0:
            return np.array(corners, dtype=np.int32)
        if turn:
            corners.append((x, y))
