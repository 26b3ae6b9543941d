"""Token merging as pure functions: each returns (merge, unmerge), a pair that shrinks tokens and copies them back.

Sources: ToMe (Bolya et al., arXiv 2210.09461) for the bipartite matching, Segformer++ (arXiv 2405.14467) for its
two-dimensional form and the neighbour forms. A pair that merges nothing is `(identity, identity)`.

Every average is taken of differences to one of the tokens, so that equal tokens come back bit by bit.

Shape letters: B batch, C channels, H, W grid, N tokens, M those left, S sources, R of them merged and U kept, D
destinations.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import SegzooError
from .shapes import ceil_div, to_channels_first, to_channels_last

TokenMap = Callable[[Tensor], Tensor]

# Upper bound of the similarity buffer of one chunk of sources. Small enough for 3840x2160 in 64 MiB in all, and
# near the size of a core's cache, which makes the chunked form no slower than the plain one.
CHUNK_BYTES = 8 * 2**20


def identity(x_BNC: Tensor) -> Tensor:
    return x_BNC


def bipartite_2d(
    metric_BNC: Tensor, grid: tuple[int, int], *, ratio: float, stride: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[TokenMap, TokenMap]:
    """Merge the tokens most similar to the destination of their choice (Segformer++, section III-B).

    The top-left token of every complete `stride` x `stride` cell is a destination, all others (also those of a
    remainder row or column) are sources. The `r = min(int(N * ratio), sources)` sources with the highest cosine
    similarity to their best destination are averaged into it, the destination itself included. Sources of equal scores
    go in row-major order; but scores that are equal on paper may differ in their last bit, so that the choice among
    them may depend on the machine, on `chunk_bytes` and on the number of images.

    Args:
        metric_BNC: (B, N, C) tokens in row-major order to compare.
        grid: (H, W) with H * W = N.
        ratio: share of all N tokens to merge away, in [0, 1]; at most the sources go (1 - 1 / stride**2).
        stride: side of a cell, >= 1; a grid smaller than one cell merges nothing.
        chunk_bytes: bound of the similarity buffer; the sources are compared chunk by chunk.

    Returns:
        merge: (B, N, C) -> (B, N - r, C), the kept sources first, then the destinations in row-major order.
        unmerge: (B, N - r, C) -> (B, N, C), every merged source gets its destination's token.

    Raises:
        SegzooError: a ratio outside [0, 1], a stride that is no whole number of at least 1, or a grid that does not
            hold N tokens; in `merge`, another number of tokens.
    """
    H, W = grid
    B, N, _ = metric_BNC.shape
    device = metric_BNC.device
    _check("bipartite_2d", stride=stride, ratio=ratio)
    if H * W != N:
        raise SegzooError(f"bipartite_2d: a grid of {H} x {W} does not hold {N} tokens; pass (H, W) with H * W = N")
    source_S, destination_D = _split_cells(H, W, stride, device)
    num_merged = min(int(N * ratio), len(source_S))
    if num_merged == 0 or len(destination_D) == 0:
        return identity, identity

    with torch.no_grad():  # the choice of partners is not differentiable; the averages are
        score_BS, partner_BS = _best_partner(metric_BNC, source_S, destination_D, chunk_bytes)
        # A stable sort, so that equal scores keep the row-major order. Equal to the last bit they need not be: a matmul
        # rounds by the place in its tiles, which shifts with the chunk.
        order_BS = score_BS.argsort(dim=-1, descending=True, stable=True)
        merged_BR, kept_BU = order_BS[:, :num_merged], order_BS[:, num_merged:]
        num_kept = kept_BU.shape[1]
        M = num_kept + len(destination_D)

        # Rows of the merged tokens: the token that each starts from, and the row where each merged token goes.
        start_BM = torch.cat([source_S[kept_BU], destination_D.expand(B, -1)], dim=1)
        target_BR = num_kept + partner_BS.gather(1, merged_BR)
        merged_BR = source_S[merged_BR]
        row_M = torch.arange(M, device=device).expand(B, -1)
        origin_BN = torch.empty(B, N, dtype=torch.long, device=device)
        origin_BN = origin_BN.scatter_(1, start_BM, row_M).scatter_(1, merged_BR, target_BR)

        # Indices into all images' rows at once, since whole rows are copied and added much faster that way.
        image_B1 = torch.arange(B, device=device)[:, None]
        start, origin = (start_BM + image_B1 * N).flatten(), (origin_BN + image_B1 * M).flatten()
        merged, target = (merged_BR + image_B1 * N).flatten(), (target_BR + image_B1 * M).flatten()
        group_size = torch.ones(B * M, device=device).index_add_(0, target, torch.ones(B * num_merged, device=device))

    def merge(x_BNC: Tensor) -> Tensor:
        _check_tokens("bipartite_2d", x_BNC, N)
        x = x_BNC.flatten(0, 1)
        kept = x[start]
        added = torch.zeros_like(kept).index_add(0, target, x[merged].sub_(kept[target]))
        return (kept + added / group_size.to(x.dtype)[:, None]).unflatten(0, (B, M))

    def unmerge(x_BMC: Tensor) -> Tensor:
        return x_BMC.flatten(0, 1)[origin].unflatten(0, (B, N))

    return merge, unmerge


def neighbour_2d(grid: tuple[int, int], *, stride: int) -> tuple[TokenMap, TokenMap]:
    """Average every `stride` x `stride` cell; cells at the border average the tokens that exist (Segformer++ n2d).

    Args:
        grid: (H, W); smaller than one cell in both directions merges nothing.
        stride: side of a cell, >= 1.

    Returns:
        merge: (B, H * W, C) -> (B, ceil(H / stride) * ceil(W / stride), C).
        unmerge: the way back, every token gets its cell's average.

    Raises:
        SegzooError: a stride that is no whole number of at least 1; in `merge`, another number of tokens than H * W.
    """
    H, W = grid
    _check("neighbour_2d", stride=stride)
    if stride == 1 or (H < stride and W < stride):
        return identity, identity
    cells = (ceil_div(H, stride), ceil_div(W, stride))

    def merge(x_BNC: Tensor) -> Tensor:
        _check_tokens("neighbour_2d", x_BNC, H * W)
        first_B1C = x_BNC[:, :1]
        map_BCHW = to_channels_first((x_BNC - first_B1C).unflatten(1, (H, W)))
        pooled_BCHW = F.avg_pool2d(map_BCHW, stride, ceil_mode=True, count_include_pad=False)
        return first_B1C + to_channels_last(pooled_BCHW).flatten(1, 2)

    def unmerge(x_BMC: Tensor) -> Tensor:
        rows = torch.arange(H, device=x_BMC.device) // stride
        columns = torch.arange(W, device=x_BMC.device) // stride
        return x_BMC.unflatten(1, cells)[:, rows][:, :, columns].flatten(1, 2)

    return merge, unmerge


def neighbour_1d(num_tokens: int, *, stride: int) -> tuple[TokenMap, TokenMap]:
    """Average every `stride` consecutive tokens in row-major order; the last group may be shorter.

    Args:
        num_tokens: N; fewer than `stride` merge nothing.
        stride: tokens a group, >= 1.

    Returns:
        merge: (B, N, C) -> (B, ceil(N / stride), C).
        unmerge: the way back, every token gets its group's average.

    Raises:
        SegzooError: a stride that is no whole number of at least 1; in `merge`, another number of tokens than N.
    """
    _check("neighbour_1d", stride=stride)
    if stride == 1 or num_tokens < stride:
        return identity, identity

    def merge(x_BNC: Tensor) -> Tensor:
        _check_tokens("neighbour_1d", x_BNC, num_tokens)
        first_B1C = x_BNC[:, :1]
        pooled_BCM = F.avg_pool1d((x_BNC - first_B1C).mT, stride, ceil_mode=True, count_include_pad=False)
        return first_B1C + pooled_BCM.mT

    def unmerge(x_BMC: Tensor) -> Tensor:
        return x_BMC[:, torch.arange(num_tokens, device=x_BMC.device) // stride]

    return merge, unmerge


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1, Python's or NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def is_share(value: object) -> bool:
    """Whether a value is a number between 0 and 1, Python's or NumPy's."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _check(function: str, *, stride: int, ratio: float = 0.0) -> None:
    if not is_count(stride):
        raise SegzooError(f"{function}: stride must be a whole number of at least 1, not {stride!r}")
    if not is_share(ratio):
        raise SegzooError(f"{function}: ratio must be a number between 0 and 1, not {ratio!r}")


def _check_tokens(function: str, x_BNC: Tensor, num_tokens: int) -> None:
    if x_BNC.shape[1] != num_tokens:
        raise SegzooError(f"{function}: made for a grid of {num_tokens} tokens, not {x_BNC.shape[1]}")


def _split_cells(H: int, W: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row-major indices of the sources and of the destinations of an H x W grid."""
    rows = torch.arange(0, H // stride * stride, stride, device=device)
    columns = torch.arange(0, W // stride * stride, stride, device=device)
    destination_D = (rows[:, None] * W + columns).flatten()
    is_destination_N = torch.zeros(H * W, dtype=torch.uint8, device=device).index_fill(0, destination_D, 1)
    # Sorting by the flag lists the sources with a shape known in advance, as compilers and meta tensors need.
    source_S = is_destination_N.argsort(stable=True)[: H * W - len(destination_D)]
    return source_S, destination_D


def _best_partner(
    metric_BNC: Tensor, source_S: Tensor, destination_D: Tensor, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each source to its most similar destination, and that destination's position."""
    B, _, C = metric_BNC.shape
    destination_BCD = F.normalize(metric_BNC[:, destination_D], dim=-1).mT
    source_bytes = B * (len(destination_D) + 2 * C) * metric_BNC.element_size()
    # Chunks of nearly one size: a last chunk of a few rows might be rounded by another kernel than the rest.
    num_chunks = min(len(source_S), -(-len(source_S) * source_bytes // chunk_bytes))
    chunks = source_S.tensor_split(num_chunks)
    # One buffer for all chunks, and results in place: the allocator has no chance to spread them over the heap.
    similarity_BSD = destination_BCD.new_empty(B, len(chunks[0]), len(destination_D))
    score_BS = destination_BCD.new_empty(B, len(source_S))
    partner_BS = torch.empty(B, len(source_S), dtype=torch.long, device=metric_BNC.device)
    first = 0
    for chunk_S in chunks:
        rows = slice(first, first + len(chunk_S))
        source_BSC = F.normalize(metric_BNC[:, chunk_S], dim=-1)
        similarity = torch.matmul(source_BSC, destination_BCD, out=similarity_BSD[:, : len(chunk_S)])
        score_BS[:, rows], partner_BS[:, rows] = similarity.max(dim=-1)
        first = rows.stop
    return score_BS, partner_BS
