"""Token merging as pure functions: each returns (merge, unmerge), a pair that shrinks tokens and copies them back.

Sources: ToMe (Bolya et al., arXiv 2210.09461) for the bipartite matching, Segformer++ (arXiv 2405.14467) for its
two-dimensional form and the neighbour forms. A pair that merges nothing is `(identity, identity)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import to_channels_first, to_channels_last

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
    similarity to their best destination are averaged into it, the destination itself included.

    Args:
        metric_BNC: (B, N, C) tokens in row-major order to compare.
        grid: (H, W) with H * W = N.
        ratio: share of all N tokens to merge away, in [0, 1]; at most the sources go (1 - 1 / stride**2).
        stride: side of a cell, >= 1; a grid smaller than one cell merges nothing.
        chunk_bytes: bound of the similarity buffer; the sources are compared chunk by chunk.

    Returns:
        merge: (B, N, C) -> (B, N - r, C), the kept sources first, then the destinations in row-major order.
        unmerge: (B, N - r, C) -> (B, N, C), every merged source gets its destination's token.
    """
    H, W = grid
    B, N, C = metric_BNC.shape
    source_N, destination_D = _split_cells(H, W, stride, metric_BNC.device)
    num_merged = min(int(N * ratio), len(source_N))
    if num_merged == 0 or len(destination_D) == 0:
        return identity, identity

    with torch.no_grad():  # the choice of partners is not differentiable; the averages are
        score_BS, partner_BS = _best_partner(metric_BNC, source_N, destination_D, chunk_bytes)
        # A stable sort, so that equal scores keep the row-major order on every machine.
        order_BS = score_BS.argsort(dim=-1, descending=True, stable=True)
        merged_BR, kept_BU = order_BS[:, :num_merged], order_BS[:, num_merged:]
        partner_BR = partner_BS.gather(1, merged_BR)
        merged_tokens_BR, kept_tokens_BU = source_N[merged_BR], source_N[kept_BU]
    num_kept = kept_BU.shape[1]

    def take(x_BNC: Tensor, index_BT: Tensor) -> Tensor:
        return x_BNC.gather(1, index_BT[..., None].expand(-1, -1, x_BNC.shape[-1]))

    def merge(x_BNC: Tensor) -> Tensor:
        merged = take(x_BNC, merged_tokens_BR)
        index = partner_BR[..., None].expand_as(merged)
        averaged = x_BNC[:, destination_D].scatter_reduce(1, index, merged, reduce="mean", include_self=True)
        return torch.cat([take(x_BNC, kept_tokens_BU), averaged], dim=1)

    # One gather undoes the merge: row n of the result is row `origin[n]` of the merged tokens.
    origin_BN = torch.empty(B, N, dtype=torch.long, device=metric_BNC.device)
    origin_BN[:, destination_D] = num_kept + torch.arange(len(destination_D), device=metric_BNC.device)
    origin_BN = origin_BN.scatter(
        1, kept_tokens_BU, torch.arange(num_kept, device=metric_BNC.device).expand(B, num_kept)
    ).scatter(1, merged_tokens_BR, num_kept + partner_BR)

    def unmerge(x_BMC: Tensor) -> Tensor:
        return take(x_BMC, origin_BN)

    return merge, unmerge


def neighbour_2d(grid: tuple[int, int], *, stride: int) -> tuple[TokenMap, TokenMap]:
    """Average every `stride` x `stride` cell; cells at the border average the tokens that exist (Segformer++ n2d).

    merge: (B, H * W, C) -> (B, ceil(H / stride) * ceil(W / stride), C); unmerge copies the average back.
    """
    H, W = grid
    if stride == 1:
        return identity, identity

    def merge(x_BNC: Tensor) -> Tensor:
        map_BCHW = to_channels_first(x_BNC.unflatten(1, (H, W)))
        pooled = F.avg_pool2d(map_BCHW, stride, ceil_mode=True, count_include_pad=False)
        return to_channels_last(pooled).flatten(1, 2)

    def unmerge(x_BMC: Tensor) -> Tensor:
        map_BHWC = x_BMC.unflatten(1, (-(-H // stride), -(-W // stride)))
        rows = torch.arange(H, device=x_BMC.device) // stride
        columns = torch.arange(W, device=x_BMC.device) // stride
        return map_BHWC[:, rows][:, :, columns].flatten(1, 2)

    return merge, unmerge


def neighbour_1d(num_tokens: int, *, stride: int) -> tuple[TokenMap, TokenMap]:
    """Average every `stride` consecutive tokens in row-major order; the last group may be shorter.

    merge: (B, N, C) -> (B, ceil(N / stride), C); unmerge copies the average back.
    """
    if stride == 1:
        return identity, identity

    def merge(x_BNC: Tensor) -> Tensor:
        pooled = F.avg_pool1d(x_BNC.transpose(1, 2), stride, ceil_mode=True, count_include_pad=False)
        return pooled.transpose(1, 2)

    def unmerge(x_BMC: Tensor) -> Tensor:
        return x_BMC[:, torch.arange(num_tokens, device=x_BMC.device) // stride]

    return merge, unmerge


def _split_cells(H: int, W: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row-major indices of the sources and of the destinations of an H x W grid."""
    rows = torch.arange(0, H // stride * stride, stride, device=device)
    columns = torch.arange(0, W // stride * stride, stride, device=device)
    destination_D = (rows[:, None] * W + columns).flatten()
    is_destination_N = torch.zeros(H * W, dtype=torch.uint8, device=device).index_fill(0, destination_D, 1)
    # Sorting by the flag lists the sources with a shape known in advance, as compilers and meta tensors need.
    source_N = is_destination_N.argsort(stable=True)[: H * W - len(destination_D)]
    return source_N, destination_D


def _best_partner(
    metric_BNC: Tensor, source_N: Tensor, destination_D: Tensor, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosine similarity of each source to its most similar destination, and that destination's position."""
    B, _, C = metric_BNC.shape
    destination_BDC = F.normalize(metric_BNC[:, destination_D], dim=-1)
    row_bytes = B * (len(destination_D) + 2 * C) * metric_BNC.element_size()
    scores, partners = [], []
    for chunk_N in source_N.split(max(1, chunk_bytes // row_bytes)):
        source_BSC = F.normalize(metric_BNC[:, chunk_N], dim=-1)
        score_BS, partner_BS = (source_BSC @ destination_BDC.transpose(1, 2)).max(dim=-1)
        scores.append(score_BS)
        partners.append(partner_BS)
    return torch.cat(scores, dim=1), torch.cat(partners, dim=1)
