"""From scores to a class map without ever holding the full-size scores, and without making most of them.

A bilinear resize mixes the four corners of a cell of the small map with weights that are not negative and add up to
one. For finite logits therefore: where all four corners have the same best class, it is the best in the whole cell; and
where the largest corner of a class is below the smallest corner of another, that class wins nowhere in the cell. Only
the other cells are computed, and in them only the classes that are left. The reference is exact bilinear interpolation,
the lower class on exact ties; a result may differ from resize + argmax in floating point only where the two best scores
lie within 2^-20 of the largest score's magnitude.

SegViT's products are sums of class probability x sigmoid of a resized mask and no such mixture; but each mask lies
between its corners, so the same sums over the smallest and over the largest corners bound every class.

Letters beyond those of `segzoo.layers`: P pixels of the result, T pixels of the small map, N cells (or blocks of pixels
inside cells), J candidates of a cell, Q masks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

# Working memory of a call beside its result, about.
CHUNK_BYTES = 64 * 2**20
# Fewer pixels a cell than this, and looking for what can be left out costs more than it saves.
MIN_PIXELS_A_CELL = 4
# Pixels computed at once: their scores of one class stay in a core's own cache.
BLOCK_PIXELS = 2**16
# Scores of single candidates cost this many times a score of the dense form (measured: 2 to 4).
SPARSE_COST = 3
# One in so many undecided cells is looked at first.
SAMPLE = 16
# Scores of the small map looked at together: a few times that is a second-level cache.
STRIP_BYTES = 4 * 2**20
# Columns of the small map that are widened by one matrix.
COLUMNS = 32
# Share of the largest magnitude that rounding may move a score by, several times over.
TOLERANCE = 2.0**-20
# Side, in pixels, of the blocks of a cell for which products are bounded.
PRODUCT_BLOCK = 8


class Upscaler(Protocol):
    """Brings what a model's `forward_head` returned to full size, and says what kind of scores they are then."""

    @property
    def score_kind(self) -> str:
        """ "logits", "product" or "heatmap"."""
        ...

    def to_size(self, head_output: Any, size: Sequence[int], /) -> Tensor:
        """Scores (B, K, *size); logits are resized bilinearly."""
        ...


class ProductUpscaler(Upscaler, Protocol):
    """One of products, which says what they are made of, and makes single rows as well."""

    def product_parts(self, head_output: Any, size: Sequence[int], /) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Class probabilities (B, Q, K), mask logits (B, Q, h, w) and the steps on their grid; see `SegViT`."""
        ...

    def score_rows(self, head_output: Any, size: tuple[int, int], start: int, stop: int, /) -> Tensor:
        """The rows start <= y < stop of `to_size`."""
        ...


@torch.no_grad()
def class_map(model: Upscaler, head_output: Any, size: tuple[int, int], chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Class of every pixel, `model.to_size(head_output, size).argmax(1)`, in little time and memory.

    Args:
        model: says by `score_kind` what its scores are. "logits" are (B, K, h, w) and resized bilinearly; of "product"
            it gives the `product_parts`.
        head_output: what `model.forward_head` returned for B images.
        size: (H, W) of the map.
        chunk_bytes: bound of the working memory, but for one row of cells.

    Returns:
        (B, H, W) in the smallest unsigned dtype that holds the classes, uint8 or uint16.
    """
    if model.score_kind == "product":
        return _map_of_products(cast(ProductUpscaler, model), head_output, size, chunk_bytes)
    B, K = head_output.shape[:2]
    few = size[0] * size[1] < MIN_PIXELS_A_CELL * head_output.shape[2] * head_output.shape[3]
    if few or head_output.device.type != "cpu" or (largest := _largest(head_output)) is None:
        return _map_by_resize(model, head_output, size, chunk_bytes)
    mask_BHW = torch.empty(B, *size, dtype=_working_dtype(K))
    for scores_KHW, mask_HW in zip(head_output, mask_BHW, strict=True):
        _LogitMap(scores_KHW, mask_HW, largest, chunk_bytes).fill()
    return mask_BHW.to(mask_dtype(K))


def mask_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.uint16


def _working_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int32  # torch has few operators for uint16


def _largest(scores: Tensor) -> float | None:
    """The largest magnitude, or None if it, or the difference of any two scores, is not finite."""
    low, high = _computed(scores.amin()), _computed(scores.amax())
    return float(torch.maximum(high, -low)) if bool((high - low).isfinite()) else None


def _computed(scores: Tensor) -> Tensor:
    """In the precision of the computation: half precisions would make ties of different scores."""
    return scores.float() if scores.dtype.itemsize < 4 else scores


def _map_of_products(model: ProductUpscaler, head_output: Any, size: tuple[int, int], chunk_bytes: int) -> Tensor:
    head_output = type(head_output)(*(_computed(x) if isinstance(x, Tensor) else x for x in head_output))
    probability_BQK, logits_BQHW, step_HW = model.product_parts(head_output, size)
    if logits_BQHW.device.type != "cpu" or _largest(logits_BQHW) is None:
        return _map_by_rows(model, head_output, size, chunk_bytes)
    K = probability_BQK.shape[2]
    mask_BHW = torch.empty(len(probability_BQK), *size, dtype=_working_dtype(K))
    for probability_QK, logits_QHW, mask_HW in zip(probability_BQK, logits_BQHW, mask_BHW, strict=True):
        _ProductMap(probability_QK, logits_QHW, step_HW, mask_HW, chunk_bytes).fill()
    return mask_BHW.to(mask_dtype(K))


def _map_by_rows(model: ProductUpscaler, head_output: Any, size: tuple[int, int], chunk_bytes: int) -> Tensor:
    """Every product of every pixel, in strips of rows; each query has a mask besides its score."""
    strip = model.score_rows(head_output, size, 0, 1)
    row_bytes = 2 * strip.numel() * strip.element_size()
    step = max(1, chunk_bytes // row_bytes)
    strips = [
        model.score_rows(head_output, size, start, min(start + step, size[0])).argmax(dim=1)
        for start in range(0, size[0], step)
    ]
    return torch.cat(strips, dim=1).to(mask_dtype(strip.shape[1]))


def _map_by_resize(model: Upscaler, scores_BKHW: Tensor, size: tuple[int, int], chunk_bytes: int) -> Tensor:
    """Every score of every pixel, some classes at a time, as torch makes them; also of infinities and NaN."""
    B, K = scores_BKHW.shape[:2]
    step = max(1, chunk_bytes // (B * size[0] * size[1] * max(4, scores_BKHW.element_size())))

    def best_of_chunk(first: int) -> tuple[Tensor, Tensor]:
        score_BHW, index_BHW = model.to_size(_computed(scores_BKHW[:, first : first + step]), size).max(dim=1)
        return score_BHW, (index_BHW + first).to(_working_dtype(K))

    # Each class is resized on its own, so a chunk of classes has the very same scores as all of them together.
    best_BHW, winner_BHW = best_of_chunk(0)
    for first in range(step, K, step):
        score_BHW, index_BHW = best_of_chunk(first)
        # On a tie the lower class stays, as in argmax, and the first NaN wins.
        better_BHW = (score_BHW > best_BHW) | (score_BHW.isnan() & ~best_BHW.isnan())
        winner_BHW = torch.where(better_BHW, index_BHW, winner_BHW)
        best_BHW = torch.where(better_BHW, score_BHW, best_BHW)
    return winner_BHW.to(mask_dtype(K))


class _Axis:
    """One side of a bilinear resize. Cell i lies between the corners i and min(i + 1, side - 1) of the small map.

    Args:
        side: of the small map.
        pixels: of the result.
        dtype: of the weights.
        step: from one pixel to the next, in cells; default: side / pixels. Half-pixel centres, clamped at the border.
    """

    def __init__(self, side: int, pixels: int, dtype: torch.dtype, step: float | None = None):
        step = side / pixels if step is None else step
        at_P = ((torch.arange(pixels, dtype=torch.float64) + 0.5) * step - 0.5).clamp(0, side - 1)
        self.cell_P = at_P.long()  # of every pixel, rising
        self.weight_P = (at_P - self.cell_P).to(dtype)  # of the cell's second corner, 0 <= weight < 1
        self.count_N = self.cell_P.bincount(minlength=side)  # pixels of every cell, may be 0
        self.start_N = self.count_N.cumsum(0) - self.count_N  # the first of them
        self.next_N = torch.arange(1, side + 1).clamp(max=side - 1)  # the second corner of every cell

    @functools.cached_property
    def matrices(self) -> list[tuple[slice, slice, Tensor]]:
        """The resize along this axis as narrow matrices: corners, their pixels, (corners, pixels)."""
        # Single elements are gathered four times as slowly as such matrices multiply (measured).
        side, found = len(self.next_N), []
        for first in range(0, side, COLUMNS):
            last = min(first + COLUMNS, side)
            corners = slice(first, min(last + 1, side))
            pixels = slice(int(self.start_N[first]), int(self.start_N[last - 1] + self.count_N[last - 1]))
            cell_P, weight_P = self.cell_P[pixels], self.weight_P[pixels]
            matrix = weight_P.new_zeros(corners.stop - first, len(cell_P))
            pixel_P = torch.arange(len(cell_P))
            matrix[cell_P - first, pixel_P] = 1 - weight_P
            matrix[self.next_N[cell_P] - first, pixel_P] += weight_P
            found.append((corners, pixels, matrix))
        return found

    def widen(self, map_KRC: Tensor, buffer_TW: Tensor) -> Tensor:
        """(K, R, side) -> (K, R, pixels), in the first rows of `buffer_TW`."""
        rows_TC = map_KRC.flatten(0, 1)
        wide_TW = buffer_TW[: len(rows_TC)]
        for corners, pixels, matrix in self.matrices:
            torch.mm(rows_TC[:, corners], matrix, out=wide_TW[:, pixels])
        return wide_TW.unflatten(0, map_KRC.shape[:2])

    def pixels(self, cell_N: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels of these cells and their weights, (most pixels of any cell, N); a cell with fewer repeats its last."""
        offset_P1 = torch.arange(int(self.count_N.max()))[:, None]
        pixel_PN = self.start_N[cell_N] + torch.minimum(offset_P1, self.count_N[cell_N] - 1)
        return pixel_PN, self.weight_P[pixel_PN]

    def blocks(self, most: int) -> tuple[Tensor, Tensor]:
        """The first and the last pixel of every block: at most so many neighbours, all in one cell."""
        pixels = len(self.cell_P)
        first_N = ((torch.arange(pixels) - self.start_N[self.cell_P]) % most == 0).nonzero().flatten()
        return first_N, torch.cat((first_N[1:], first_N.new_tensor([pixels]))) - 1


class _LogitMap:
    """Fills the (H, W) class map of one image from its (K, h, w) logits, strip by strip of cells.

    Args:
        largest: magnitude of any score.
    """

    def __init__(self, scores_KHW: Tensor, mask_HW: Tensor, largest: float, chunk_bytes: int):
        self.margin = TOLERANCE * largest
        self.scores_KHW = scores_KHW
        self.mask_HW = mask_HW
        self.chunk_bytes = chunk_bytes
        K, h, w = scores_KHW.shape
        self.dtype = torch.promote_types(scores_KHW.dtype, torch.float32)
        self.y = _Axis(h, mask_HW.shape[0], self.dtype)
        self.x = _Axis(w, mask_HW.shape[1], self.dtype)
        self.row_bytes = w * K * self.dtype.itemsize

    def fill(self) -> None:
        h = self.scores_KHW.shape[1]
        step = max(1, min(STRIP_BYTES, self.chunk_bytes // 4) // self.row_bytes)
        for first in range(0, h, step):
            self.strip(first, min(first + step, h))

    def strip(self, first: int, last: int) -> None:
        """The pixels of the cells in the rows first <= row < last."""
        start, stop = int(self.y.start_N[first]), int(self.y.start_N[last - 1] + self.y.count_N[last - 1])
        map_HWK = self.scores_KHW[:, first : last + 1].permute(1, 2, 0).to(self.dtype).contiguous()
        down_N = torch.arange(1, last - first + 1).clamp(max=len(map_HWK) - 1)  # as next_N, counted from `first`
        winner_HW = map_HWK.argmax(dim=2)
        top_HW, right_HW = winner_HW[: last - first], winner_HW.index_select(1, self.x.next_N)
        agree_HW = (top_HW == right_HW[: last - first]) & (winner_HW[down_N] == top_HW) & (right_HW[down_N] == top_HW)
        empty_HW = (self.y.count_N[first:last, None] == 0) | (self.x.count_N == 0)
        row_N, column_N = (~(agree_HW | empty_HW)).nonzero(as_tuple=True)
        w = map_HWK.shape[1]
        corner_22N = torch.stack((row_N, down_N[row_N]))[:, None] * w + torch.stack((column_N, self.x.next_N[column_N]))
        corner_4N = corner_22N.flatten(0, 1)
        # Some of the cells tell whether the others are worth looking at.
        candidates = SAMPLE * int(self.candidates(map_HWK, winner_HW, corner_4N[:, ::SAMPLE]).sum())
        scores = candidates * int(self.y.count_N.max()) * int(self.x.count_N.max())
        if SPARSE_COST * scores > (stop - start) * self.mask_HW.shape[1] * map_HWK.shape[2]:
            self.dense(start, stop)
            return
        candidate_NK = self.candidates(map_HWK, winner_HW, corner_4N)
        wide_HW = top_HW.to(self.mask_HW.dtype).index_select(1, self.x.cell_P)
        torch.index_select(wide_HW, 0, self.y.cell_P[start:stop] - first, out=self.mask_HW[start:stop])
        self.sparse(map_HWK, corner_4N, candidate_NK, row_N + first, column_N)

    def candidates(self, map_HWK: Tensor, winner_HW: Tensor, corner_4N: Tensor) -> Tensor:
        """Which classes can be the best somewhere in N cells: (N, K) bool. The best of a corner always can."""
        K = map_HWK.shape[2]
        best_4N = winner_HW.take(corner_4N)
        # Of the classes that are best at a corner, the one whose smallest corner is largest is nowhere below that.
        floor_N = map_HWK.take(corner_4N[:, None] * K + best_4N).amin(0).amax(0)
        tokens_TK = map_HWK.flatten(0, 1)
        highest_NK = tokens_TK.index_select(0, corner_4N[0])
        for corner_N in corner_4N[1:]:
            torch.maximum(highest_NK, tokens_TK.index_select(0, corner_N), out=highest_NK)
        return highest_NK >= (floor_N - self.margin)[:, None]

    def sparse(self, map_HWK: Tensor, corner_4N: Tensor, candidate_NK: Tensor, row_N: Tensor, column_N: Tensor) -> None:
        """The pixels of N cells, of their candidates only; cells with about as many candidates go together."""
        count_N = candidate_NK.sum(1)
        cell_C, class_C = candidate_NK.nonzero(as_tuple=True)  # cell by cell, classes rising
        place_C = torch.arange(len(cell_C)) - (count_N.cumsum(0) - count_N)[cell_C]
        most = int(count_N.max()) if len(count_N) else 0
        table_NJ = class_C.new_zeros(len(count_N), most)
        table_NJ[cell_C, place_C] = class_C
        at_once = max(1, BLOCK_PIXELS // int(self.y.count_N.max() * self.x.count_N.max()))
        J = 1
        while J < most:
            few, J = J, 2 * J
            for cells_N in ((count_N > few) & (count_N <= J)).nonzero().flatten().split(at_once):
                class_JN = table_NJ[cells_N, :J].T
                missing_JN = torch.arange(len(class_JN))[:, None] >= count_N[cells_N]
                class_JN = torch.where(missing_JN, class_JN[:1], class_JN)
                self.cells(map_HWK, corner_4N[:, cells_N], class_JN, row_N[cells_N], column_N[cells_N])

    def cells(self, map_HWK: Tensor, corner_4N: Tensor, class_JN: Tensor, row_N: Tensor, column_N: Tensor) -> None:
        """The pixels of N cells, each with J classes, rising but for repetitions of the first."""
        y_YN, down_YN = self.y.pixels(row_N)
        x_XN, right_XN = self.x.pixels(column_N)
        value_J4N = map_HWK.take(corner_4N * map_HWK.shape[2] + class_JN[:, None])
        best = _Best((len(y_YN), *x_XN.shape), self.dtype)
        for (a_N, b_N, c_N, d_N), class_N in zip(value_J4N, class_JN.to(self.dtype), strict=True):
            above_XN, below_XN = torch.lerp(a_N, b_N, right_XN), torch.lerp(c_N, d_N, right_XN)
            best.offer(class_N, torch.lerp(above_XN, below_XN, down_YN[:, None]))
        self.mask_HW[y_YN[:, None], x_XN] = best.winner.to(self.mask_HW.dtype)

    def dense(self, start: int, stop: int) -> None:
        """The rows start <= y < stop of the map, of every class: rows of the small map are widened, then mixed."""
        W = self.mask_HW.shape[1]
        step = max(1, min(BLOCK_PIXELS // W, self.chunk_bytes // (8 * self.row_bytes)))
        for first in range(start, stop, step):
            cell_P = self.y.cell_P[first : min(first + step, stop)]
            row_R, above_below_2P = torch.stack((cell_P, self.y.next_N[cell_P])).unique(return_inverse=True)
            down_P1 = self.y.weight_P[first : first + len(cell_P), None]
            best = _Best((len(cell_P), W), self.dtype)
            rows_KRC = self.scores_KHW[:, row_R].to(self.dtype).contiguous()
            # Into buffers: of operators this quick, taking fresh memory is half the time.
            above_PW, below_PW = torch.empty_like(best.score), torch.empty_like(best.score)
            at_once = max(1, 4 * BLOCK_PIXELS // (len(row_R) * W))
            buffer_TW = rows_KRC.new_empty(at_once * len(row_R), W)
            for i, few_KRC in enumerate(rows_KRC.split(at_once)):
                for k, wide_RW in enumerate(self.x.widen(few_KRC, buffer_TW), i * at_once):
                    torch.index_select(wide_RW, 0, above_below_2P[0], out=above_PW)
                    torch.index_select(wide_RW, 0, above_below_2P[1], out=below_PW)
                    best.offer(k, torch.lerp(above_PW, below_PW, down_P1, out=above_PW))
            self.mask_HW[first : first + len(cell_P)] = best.winner


class _ProductMap:
    """Fills the (H, W) class map of one image from class probabilities (Q, K) and mask logits (Q, h, w)."""

    def __init__(
        self,
        probability_QK: Tensor,
        logits_QHW: Tensor,
        step_HW: tuple[float, float],
        mask_HW: Tensor,
        chunk_bytes: int,
    ):
        self.weights_KQ = probability_QK.T.contiguous()
        self.logits_QHW = logits_QHW.contiguous()
        self.mask_HW = mask_HW
        Q, h, w = logits_QHW.shape
        dtype = logits_QHW.dtype
        self.y = _Axis(h, mask_HW.shape[0], dtype, step_HW[0])
        self.x = _Axis(w, mask_HW.shape[1], dtype, step_HW[1])
        self.rows_2N, self.columns_2N = (torch.stack(axis.blocks(PRODUCT_BLOCK)) for axis in (self.y, self.x))
        # A sum of Q products is off by less than this share of its size.
        self.tolerance = (Q + 8) * torch.finfo(dtype).eps
        self.at_once = max(1, min(2**20, chunk_bytes // (8 * dtype.itemsize)) // Q)  # values of every mask

    def fill(self) -> None:
        R, C = self.rows_2N.shape[1], self.columns_2N.shape[1]
        row_of_H, column_of_W = (
            torch.searchsorted(first_N, torch.arange(side), right=True) - 1
            for first_N, side in zip((self.rows_2N[0], self.columns_2N[0]), self.mask_HW.shape, strict=True)
        )
        step = max(1, self.at_once // (4 * C))
        for first in range(0, R, step):
            last = min(first + step, R)
            start, stop = int(self.rows_2N[0, first]), int(self.rows_2N[1, last - 1]) + 1
            winner_N, candidate_KN = self.bounds(self.rows_2N[:, first:last])
            wide_RW = winner_N.to(self.mask_HW.dtype).view(last - first, C).index_select(1, column_of_W)
            self.mask_HW[start:stop] = wide_RW.index_select(0, row_of_H[start:stop] - first)
            open_N = (candidate_KN.sum(0) > 1).nonzero().flatten()
            for some_N in open_N.split(max(1, self.at_once // PRODUCT_BLOCK**2)):
                class_C = candidate_KN[:, some_N].any(1).nonzero().flatten()
                self.blocks(self.rows_2N[:, first + some_N // C], self.columns_2N[:, some_N % C], class_C)

    def bounds(self, rows_2R: Tensor) -> tuple[Tensor, Tensor]:
        """Of the N blocks in these rows of blocks: the class of the largest lower bound, and which classes can win."""
        row_P = rows_2R.flatten()
        cell_P = self.y.cell_P[row_P]
        rows_QPC = torch.lerp(
            self.logits_QHW.index_select(1, cell_P),
            self.logits_QHW.index_select(1, self.y.next_N[cell_P]),
            self.y.weight_P[row_P, None],
        )
        corner_Q2R2C = (
            (rows_QPC @ self.to_block_corners).unflatten(1, rows_2R.shape).unflatten(3, self.columns_2N.shape)
        )
        a, b, c, d = (corner_Q2R2C[:, i, :, j] for i in (0, 1) for j in (0, 1))
        low_QN = torch.minimum(torch.minimum(a, b), torch.minimum(c, d)).flatten(1).sigmoid_()
        high_QN = torch.maximum(torch.maximum(a, b), torch.maximum(c, d)).flatten(1).sigmoid_()
        low_KN, high_KN = self.weights_KQ @ low_QN, self.weights_KQ @ high_QN
        floor_N = low_KN.amax(0) - self.tolerance * high_KN.amax(0)
        return low_KN.argmax(0), high_KN >= floor_N

    @functools.cached_property
    def to_block_corners(self) -> Tensor:
        """(w, 2 * columns of blocks): the resize along x at the first pixels of the blocks, then at the last ones."""
        pixel_P = self.columns_2N.flatten()
        cell_P, weight_P = self.x.cell_P[pixel_P], self.x.weight_P[pixel_P]
        matrix_CP = weight_P.new_zeros(self.logits_QHW.shape[2], len(pixel_P))
        place_P = torch.arange(len(pixel_P))
        matrix_CP[cell_P, place_P] = 1 - weight_P
        matrix_CP[self.x.next_N[cell_P], place_P] += weight_P
        return matrix_CP

    def blocks(self, rows_2N: Tensor, columns_2N: Tensor, class_C: Tensor) -> None:
        """The pixels of N blocks, of these classes only; a block with fewer rows or columns repeats its last."""
        offset_P1 = torch.arange(PRODUCT_BLOCK)[:, None]
        y_YN, x_XN = (torch.minimum(side_2N[0] + offset_P1, side_2N[1]) for side_2N in (rows_2N, columns_2N))
        row_N, column_N = self.y.cell_P[rows_2N[0]], self.x.cell_P[columns_2N[0]]
        rows_2N, columns_2N = (
            torch.stack((row_N, self.y.next_N[row_N])),
            torch.stack((column_N, self.x.next_N[column_N])),
        )
        corner_22N = rows_2N[:, None] * self.logits_QHW.shape[2] + columns_2N
        value_Q22N = self.logits_QHW.flatten(1).index_select(1, corner_22N.flatten()).unflatten(1, corner_22N.shape)
        left_Q2YN = torch.lerp(value_Q22N[:, 0, :, None], value_Q22N[:, 1, :, None], self.y.weight_P[y_YN])
        mask_QYXN = torch.lerp(left_Q2YN[:, 0, :, None], left_Q2YN[:, 1, :, None], self.x.weight_P[x_XN]).sigmoid_()
        score_CP = self.weights_KQ[class_C] @ mask_QYXN.flatten(1)
        best = _Best((score_CP.shape[1],), score_CP.dtype)
        for class_, score_P in zip(class_C.tolist(), score_CP, strict=True):
            best.offer(class_, score_P)
        self.mask_HW[y_YN[:, None], x_XN] = best.winner.view(mask_QYXN.shape[1:]).to(self.mask_HW.dtype)


class _Best:
    """The best class of every pixel so far; of equals the first.

    Everything is a float, since operators on booleans and small integers take five times as long (measured).
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.score = torch.full(shape, -torch.inf, dtype=dtype)
        self.winner = torch.zeros(shape, dtype=dtype)
        self._better = torch.empty(shape, dtype=dtype)

    def offer(self, class_: Tensor | int, score: Tensor) -> None:
        """The next class; its number must be larger than those before it wherever its score is."""
        torch.gt(score, self.score, out=self._better)
        torch.maximum(self.winner, self._better.mul_(class_), out=self.winner)
        torch.maximum(self.score, score, out=self.score)
