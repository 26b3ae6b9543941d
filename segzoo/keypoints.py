"""Keypoints as heatmaps: Gaussian targets, the way back to positions, and PCK; and what keypoints are called.

Positions are (x, y) in pixels with the origin at the image's top left corner, x to the right, y down: the centre of
the first pixel is (0.5, 0.5), as in segzoo's resizes. Annotations that count pixels from 0 want 0.5 added. Cell
(row i, column j) of a heatmap of h x w cells over an image of H x W pixels has its centre at ((j + 0.5) * W / w,
(i + 0.5) * H / h).

Shape suffixes: B batch, K keypoints, H, W rows and columns of a heatmap; 2 is (x, y).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._errors import SegzooError


class Keypoints(NamedTuple):
    """Keypoints found in images."""

    xy: Tensor  # (..., K, 2) positions in pixels of the image
    score: Tensor  # (..., K) height of the heatmap's peak, about 1 for a sure keypoint and 0 for none


def gaussian_heatmaps(
    xy_BK2: Tensor, visible_BK: Tensor, *, image_size: tuple[int, int], map_size: tuple[int, int], sigma: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Target heatmaps of height 1, centred on the keypoints to a fraction of a cell.

    Args:
        xy_BK2: (B, K, 2) positions in pixels of the image.
        visible_BK: (B, K), nonzero where the position is known.
        image_size: (H, W) of the image in pixels.
        map_size: (h, w) of the heatmaps in cells.
        sigma: standard deviation in cells.

    Returns:
        heatmaps: (B, K, h, w) in [0, 1], zero for a keypoint that does not count.
        weights: (B, K), 1 where a keypoint counts, 0 where it is invisible or more than 3 sigma outside the map.

    Raises:
        SegzooError: shapes that do not belong together, or a sigma that is not positive.
    """
    if xy_BK2.ndim != 3 or xy_BK2.shape[2] != 2 or visible_BK.shape != xy_BK2.shape[:2]:
        raise SegzooError(
            f"keypoints must be (B, K, 2) with (B, K) visibilities, not {tuple(xy_BK2.shape)} and "
            f"{tuple(visible_BK.shape)}"
        )
    if not sigma > 0:
        raise SegzooError(f"sigma must be positive, not {sigma!r}")
    h, w = map_size
    cells_2 = xy_BK2.new_tensor([w, h])
    centre_BK2 = xy_BK2 * cells_2 / xy_BK2.new_tensor(image_size[::-1])
    reach = 3 * sigma
    inside_BK = ((centre_BK2 > -reach) & (centre_BK2 < cells_2 + reach)).all(dim=-1)  # False for a NaN, too
    counts_BK = inside_BK & (visible_BK != 0)

    def bell(centre_BK: Tensor, cells: int) -> Tensor:
        position = torch.arange(cells, device=xy_BK2.device) + 0.5
        return torch.exp(-((position - centre_BK[..., None]) ** 2) / (2 * sigma**2))

    bell_BKH, bell_BKW = bell(centre_BK2[..., 1], h), bell(centre_BK2[..., 0], w)
    heatmaps_BKHW = bell_BKH[..., :, None] * bell_BKW[..., None, :]
    return heatmaps_BKHW.masked_fill(~counts_BK[..., None, None], 0), counts_BK.to(xy_BK2.dtype)


def decode_heatmaps(
    heatmaps_BKHW: Tensor, image_size: tuple[float, float], *, origin: tuple[float, float] = (0.0, 0.0)
) -> Keypoints:
    """The peak of every heatmap, moved by a quarter of a cell towards its higher neighbour.

    The quarter is the usual refinement of heatmap methods (stacked hourglass and HRNet on), in x and y separately: a
    Gaussian whose centre lies anywhere in the peak's cell is then at most a quarter of a cell away. A peak in the
    first or last row (column) is not moved in y (x).

    Args:
        heatmaps_BKHW: (B, K, h, w); a model's `forward_head` is as good a source as its `forward`, and cheaper.
        image_size: (H, W) in pixels of the image (or of the part of it) that the heatmaps cover.
        origin: (x, y) in the whole image of that part's top left corner, in pixels.

    Returns:
        Keypoints with xy (B, K, 2) in pixels of the whole image and score (B, K).
    """
    h, w = heatmaps_BKHW.shape[2:]
    score_BK, index_BK = heatmaps_BKHW.flatten(2).max(dim=2)
    row_BK, column_BK = index_BK // w, index_BK % w

    def quarter(step_row: int, step_column: int, at: Tensor, cells: int) -> Tensor:
        def neighbour(sign: int) -> Tensor:
            row = (row_BK + sign * step_row).clamp(0, h - 1)
            column = (column_BK + sign * step_column).clamp(0, w - 1)
            return heatmaps_BKHW.flatten(2).gather(2, (row * w + column)[..., None])[..., 0]

        slope_BK = torch.sign(neighbour(1) - neighbour(-1))
        return torch.where((at > 0) & (at < cells - 1), 0.25 * slope_BK, 0)

    x_BK = (column_BK + 0.5 + quarter(0, 1, column_BK, w)) * (image_size[1] / w) + origin[0]
    y_BK = (row_BK + 0.5 + quarter(1, 0, row_BK, h)) * (image_size[0] / h) + origin[1]
    return Keypoints(xy=torch.stack([x_BK, y_BK], dim=-1), score=score_BK)


def pck(xy_BK2: Tensor, truth_BK2: Tensor, visible_BK: Tensor, length_B: Tensor, *, t: float) -> float:
    """PCK@t: the fraction of visible keypoints found within `t` times a reference length, in [0, 1].

    Args:
        xy_BK2, truth_BK2: (B, K, 2) positions found and true, in the same pixels.
        visible_BK: (B, K), nonzero where a keypoint counts.
        length_B: (B,) reference length of every image in those pixels, for example the longer side of its box.
        t: share of the length, for example 0.1.

    Returns:
        The fraction over all images; NaN if no keypoint is visible.
    """
    near_BK = (xy_BK2 - truth_BK2).norm(dim=-1) <= t * length_B[:, None]
    return near_BK[visible_BK != 0].float().mean().item()


# --- names ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """What the keypoints of a model are called, and which are joined by a line.

    Raises:
        SegzooError: an edge between keypoints that there are not.
    """

    name: str
    keypoints: tuple[str, ...]  # in the order of the heatmaps; left and right are the person's own
    edges: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        strange = {name for edge in self.edges for name in edge} - set(self.keypoints)
        if strange:
            raise SegzooError(f"edges of a skeleton must join its keypoints, not {', '.join(sorted(strange))}")

    def pairs(self) -> list[tuple[int, int]]:
        """The edges as indices of keypoints."""
        return [(self.keypoints.index(a), self.keypoints.index(b)) for a, b in self.edges]


def _both_sides(*edges: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Edges within a side of the body, given without the side, as those of both."""
    return tuple((f"{side}_{a}", f"{side}_{b}") for side in ("left", "right") for a, b in edges)


# As COCO's person_keypoints annotations record them.
COCO = Skeleton(
    name="coco",
    keypoints=(
        *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
        *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
        *("left_knee", "right_knee", "left_ankle", "right_ankle"),
    ),
    edges=(
        ("nose", "left_eye"),
        ("nose", "right_eye"),
        ("left_eye", "right_eye"),
        ("left_shoulder", "right_shoulder"),
        ("left_hip", "right_hip"),
        *_both_sides(("eye", "ear"), ("ear", "shoulder"), ("shoulder", "elbow"), ("elbow", "wrist")),
        *_both_sides(("shoulder", "hip"), ("hip", "knee"), ("knee", "ankle")),
    ),
)
# Order and edges of the Jump Broadcast Dataset (Ludwig et al., arXiv 2304.02939), on which Segformer++ was trained, as
# its released configuration has them; the names are written out here.
JUMP_BROADCAST = Skeleton(
    name="jump_broadcast",
    keypoints=(
        *("head", "neck"),
        *("right_shoulder", "right_elbow", "right_wrist", "right_hand"),
        *("left_shoulder", "left_elbow", "left_wrist", "left_hand"),
        *("right_hip", "right_knee", "right_ankle", "right_heel", "right_toe"),
        *("left_hip", "left_knee", "left_ankle", "left_heel", "left_toe"),
    ),
    edges=(
        ("head", "neck"),
        ("neck", "left_shoulder"),
        ("neck", "right_shoulder"),
        *_both_sides(("shoulder", "elbow"), ("elbow", "wrist"), ("wrist", "hand"), ("shoulder", "hip")),
        *_both_sides(("hip", "knee"), ("knee", "ankle"), ("ankle", "heel"), ("heel", "toe")),
    ),
)
SKELETONS = {skeleton.name: skeleton for skeleton in (COCO, JUMP_BROADCAST)}


def skeleton_of(count: int, names: Sequence[str] | None = None) -> Skeleton:
    """The known skeleton of these names, or without names the one with so many keypoints; else one without edges.

    Args:
        count: number of keypoints.
        names: what they are called, where that is known.
    """
    for known in SKELETONS.values():
        if known.keypoints == tuple(names) if names else len(known.keypoints) == count:
            return known
    return Skeleton("", tuple(names or (f"keypoint {index}" for index in range(count))))
