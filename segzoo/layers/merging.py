"""Token merging as pure functions: each returns (merge, unmerge), a pair that shrinks tokens and copies them back.

Sources: ToMe (Bolya et al., arXiv 2210.09461) for the bipartite matching, Segformer++ (arXiv 2405.14467) for its
two-dimensional form and the neighbour forms, ALGM (Norouzi et al., CVPR 2024, arXiv 2406.09936) for windows before
matching, PiToMe (Tran et al., NeurIPS 2024, arXiv 2405.16148) for the energy that protects tokens, CubistMerge (Gong
and Lis, arXiv 2509.21764) for the merging that leaves a grid. A pair that merges nothing is `(identity, identity)`.

Every average is taken of differences to one of the tokens, so that equal tokens come back bit by bit. How many tokens
are left never depends on what they hold, so that batches, compilers and exports know every shape in advance.

Shape letters: B batch, C channels, H, W grid, N tokens, M those left, S sources, R of them merged and U kept, D
destinations, T windows of P tokens, L lines.
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
    _check_grid("bipartite_2d", grid, N)
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


def local_then_global(
    metric_BNC: Tensor,
    grid: tuple[int, int],
    *,
    window: int,
    local: float,
    ratio: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[TokenMap, TokenMap]:
    """Merge whole windows of similar tokens, then match what is left across the image (after ALGM).

    First, of the complete `window` x `window` cells, the share `local` whose tokens are most alike, by the mean cosine
    similarity of all their pairs, become one token each. Then the tokens left are destinations and sources in turn, in
    row-major order of their first token, and the `ratio` of them with the highest similarity to their best destination
    is averaged into it. Every average is that of all the tokens it stands for. ALGM merges whatever is above a
    threshold, and does its two steps in two layers; here shares say how much, and both steps are one layer's.

    Cost: N * C for the windows, (M1 / 2)**2 * C for the matching of the M1 tokens that the windows leave.

    Args:
        metric_BNC: (B, N, C) tokens in row-major order to compare.
        grid: (H, W) with H * W = N; a remainder row or column is in no window.
        window: side of a local window, >= 1.
        local: share of the complete windows to merge, in [0, 1].
        ratio: share of the M1 tokens left to merge away, in [0, 1]; at most half of them can go.
        chunk_bytes: bound of the similarity buffer.

    Returns:
        merge: (B, N, C) -> (B, M, C) with M1 = N - int(windows * local) * (window**2 - 1) and
            M = M1 - min(int(M1 * ratio), M1 // 2); rows in row-major order of the token that others came to.
        unmerge: (B, M, C) -> (B, N, C), every token gets its group's average.

    Raises:
        SegzooError: an option out of its range, or a grid that does not hold N tokens; in `merge`, another number of
            tokens.
    """
    H, W = grid
    B, N, _ = metric_BNC.shape
    _check("local_then_global", window=window, local=local, ratio=ratio)
    _check_grid("local_then_global", grid, N)
    num_windows = int((H // window) * (W // window) * local) if window > 1 else 0
    num_left = N - num_windows * (window**2 - 1)
    num_matched = min(int(num_left * ratio), num_left // 2)
    if num_windows == num_matched == 0:
        return identity, identity

    with torch.no_grad():
        row_BN = _rows(_window_roots(metric_BNC, grid, window, num_windows))
        if num_matched:
            merge, _ = _pair("local_then_global", row_BN, num_left)
            merged_BR, target_BR = _match_alternately(merge(metric_BNC), num_matched, chunk_bytes)
            root_BM = _own_index(B, num_left, metric_BNC.device).scatter_(1, merged_BR, target_BR)
            row_BN = _rows(root_BM).gather(1, row_BN)
    return _pair("local_then_global", row_BN, num_left - num_matched)


def energy_protected(
    metric_BNC: Tensor, *, ratio: float, margin: float, chunk_bytes: int = CHUNK_BYTES
) -> tuple[TokenMap, TokenMap]:
    """Merge only tokens of which there are many alike; what is rare is protected (PiToMe).

    The energy of a token is the mean over all tokens of f(cosine similarity), f(x) = x from the margin on and
    exp(x - margin) - 1 below it: high in a large uniform region, low where a token stands alone. The 2 r tokens of the
    highest energy are, in the order of their energy, destinations and sources in turn, and every source is averaged
    into its most similar destination; all others stay as they are. The grid plays no part.

    Cost: N**2 * C for the energies, r**2 * C for the matching.

    Args:
        metric_BNC: (B, N, C) tokens to compare.
        ratio: share of all N tokens to merge away, in [0, 1]; r = min(int(N * ratio), N // 2).
        margin: similarity from which tokens count as alike, in [-1, 1]. The paper lowers it with the depth, from 0.9
            at the first layer towards 0 at the last.
        chunk_bytes: bound of the similarity buffer.

    Returns:
        merge: (B, N, C) -> (B, N - r, C), the tokens left in their order.
        unmerge: (B, N - r, C) -> (B, N, C), every merged token gets its destination's.

    Raises:
        SegzooError: an option out of its range; in `merge`, another number of tokens.
    """
    B, N, C = metric_BNC.shape
    _check("energy_protected", ratio=ratio, margin=margin)
    num_merged = min(int(N * ratio), N // 2)
    if num_merged == 0:
        return identity, identity
    with torch.no_grad():
        energy_BN = _energy(metric_BNC, margin, chunk_bytes)
        common_BE = energy_BN.argsort(dim=-1, descending=True, stable=True)[:, : 2 * num_merged]
        common_BEC = metric_BNC.gather(1, common_BE[..., None].expand(-1, -1, C))
        merged_BR, target_BR = _match_alternately(common_BEC, num_merged, chunk_bytes)
        root_BN = _own_index(B, N, metric_BNC.device)
        root_BN.scatter_(1, common_BE.gather(1, merged_BR), common_BE.gather(1, target_BR))
    return _pair("energy_protected", _rows(root_BN), N - num_merged)


def merge_grid(
    metric_BNC: Tensor, grid: tuple[int, int], *, size: tuple[int, int], kind: str = "avg"
) -> tuple[TokenMap, TokenMap]:
    """Merge adjacent tokens until a smaller grid is left, which convolutions can go on with (after CubistMerge).

    In every row the `W - size[1]` most similar pairs of adjacent tokens grow together, chains of pairs as one; so every
    row keeps as many tokens, in their order. Then the same in every column of what is left. Uniform regions shrink
    most, and a token stays left of, right of, above and below those that it was.

    Cost: 2 * N * C; nothing is compared with anything but its neighbours.

    Args:
        metric_BNC: (B, N, C) tokens in row-major order to compare.
        grid: (H, W) with H * W = N.
        size: (H', W') of the grid that is left, each from 1 to the side.
        kind: "avg", the average of a group's tokens, or "magnitude", in every channel the value farthest from zero
            (the paper's; the positive one of two that are equally far).

    Returns:
        merge: (B, H * W, C) -> (B, H' * W', C), in row-major order of the smaller grid.
        unmerge: the way back, every token gets its group's.

    Raises:
        SegzooError: a size or kind that does not exist, or a grid that does not hold N tokens; in `merge`, another
            number of tokens.
    """
    H, W = grid
    _check_grid("merge_grid", grid, metric_BNC.shape[1])
    if not all(is_count(new) and new <= old for new, old in zip(size, grid, strict=True)):
        raise SegzooError(f"merge_grid: size must be (H', W') between 1 x 1 and the grid {H} x {W}, not {size!r}")
    if kind not in ("avg", "magnitude"):
        raise SegzooError(f"merge_grid: kind must be 'avg' or 'magnitude', not {kind!r}")
    if tuple(size) == (H, W):
        return identity, identity
    height, width = size
    with torch.no_grad():
        column_BHW = _joined(metric_BNC.unflatten(1, (H, W)), width)
        row_H1 = torch.arange(H, device=metric_BNC.device)[:, None]
        merge, _ = _pair("merge_grid", (row_H1 * width + column_BHW).flatten(1), H * width)
        row_BwH = _joined(merge(metric_BNC).unflatten(1, (H, width)).transpose(1, 2), height)
        row_BHW = row_BwH.transpose(1, 2).gather(2, column_BHW)
    return _pair("merge_grid", (row_BHW * width + column_BHW).flatten(1), height * width, kind)


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1, Python's or NumPy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def is_share(value: object) -> bool:
    """Whether a value is a number between 0 and 1, Python's or NumPy's."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def is_similarity(value: object) -> bool:
    """Whether a value is a number between -1 and 1, Python's or NumPy's."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -1 <= float(value) <= 1


# What the options of merging may be: a test, and its words.
OPTIONS: dict[str, tuple[Callable[[object], bool], str]] = {
    "stride": (is_count, "a whole number of at least 1"),
    "window": (is_count, "a whole number of at least 1"),
    "ratio": (is_share, "a number between 0 and 1"),
    "local": (is_share, "a number between 0 and 1"),
    "margin": (is_similarity, "a number between -1 and 1"),
}


def _check(function: str, **options: object) -> None:
    for name, value in options.items():
        is_valid, words = OPTIONS[name]
        if not is_valid(value):
            raise SegzooError(f"{function}: {name} must be {words}, not {value!r}")


def _check_grid(function: str, grid: tuple[int, int], num_tokens: int) -> None:
    H, W = grid
    if H * W != num_tokens:
        raise SegzooError(
            f"{function}: a grid of {H} x {W} does not hold {num_tokens} tokens; pass (H, W) with H * W = N"
        )


def _check_tokens(function: str, x_BNC: Tensor, num_tokens: int) -> None:
    if x_BNC.shape[1] != num_tokens:
        raise SegzooError(f"{function}: made for a grid of {num_tokens} tokens, not {x_BNC.shape[1]}")


def _split_cells(H: int, W: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row-major indices of the sources and of the destinations of an H x W grid."""
    rows = torch.arange(0, H // stride * stride, stride, device=device)
    columns = torch.arange(0, W // stride * stride, stride, device=device)
    destination_D = (rows[:, None] * W + columns).flatten()
    is_destination_N = torch.zeros(H * W, dtype=torch.long, device=device).index_fill(0, destination_D, 1)
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


def _match_alternately(metric_BMC: Tensor, num_merged: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """Tokens are destinations and sources in turn: (B, R) sources most similar to a destination, and that one."""
    M, device = metric_BMC.shape[1], metric_BMC.device
    destination_D, source_S = torch.arange(0, M, 2, device=device), torch.arange(1, M, 2, device=device)
    score_BS, partner_BS = _best_partner(metric_BMC, source_S, destination_D, chunk_bytes)
    order_BR = score_BS.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    return source_S[order_BR], destination_D[partner_BS.gather(1, order_BR)]


def _window_roots(metric_BNC: Tensor, grid: tuple[int, int], window: int, num_merged: int) -> Tensor:
    """(B, N): a token's own index, or in the `num_merged` most uniform windows that of the top-left token."""
    H, W = grid
    B, N, _ = metric_BNC.shape
    root_BN = _own_index(B, N, metric_BNC.device)
    if num_merged == 0:
        return root_BN
    rows, columns = H // window, W // window
    token_HW = torch.arange(N, device=metric_BNC.device).view(H, W)[: rows * window, : columns * window]
    token_TP = token_HW.reshape(rows, window, columns, window).transpose(1, 2).reshape(-1, window**2)
    unit_BTPC = F.normalize(metric_BNC, dim=-1)[:, token_TP]
    # The sum of unit vectors, squared, is the sum of all pairs' similarities and of every token's with itself.
    similarity_BT = unit_BTPC.sum(dim=2).square().sum(dim=-1) - unit_BTPC.square().sum(dim=(2, 3))
    merged_BRP = token_TP[similarity_BT.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]]
    return root_BN.scatter_(1, merged_BRP.flatten(1), merged_BRP[..., :1].expand_as(merged_BRP).flatten(1))


def _energy(metric_BNC: Tensor, margin: float, chunk_bytes: int) -> Tensor:
    """(B, N): PiToMe's energy with its alpha of 1; a token's similarity to itself shifts all of them alike."""
    B, N, _ = metric_BNC.shape
    unit_BNC = F.normalize(metric_BNC, dim=-1)
    row_bytes = 2 * B * N * metric_BNC.element_size()  # the similarities, and what the tokens below the margin count
    energies = []
    for chunk_BSC in unit_BNC.tensor_split(min(N, -(-N * row_bytes // chunk_bytes)), dim=1):
        similarity_BSN = chunk_BSC @ unit_BNC.mT
        below_BSN = (similarity_BSN - margin).expm1_()
        energies.append(torch.where(similarity_BSN >= margin, similarity_BSN, below_BSN).mean(dim=-1))
    return torch.cat(energies, dim=1)


def _joined(line_BLNC: Tensor, num_left: int) -> Tensor:
    """(B, L, N): in every line, which of its `num_left` groups of adjacent tokens each token falls into."""
    unit_BLNC = F.normalize(line_BLNC, dim=-1)
    similarity_BLE = (unit_BLNC[:, :, 1:] * unit_BLNC[:, :, :-1]).sum(dim=-1)
    num_joined = line_BLNC.shape[2] - num_left
    edge_BLR = similarity_BLE.argsort(dim=-1, descending=True, stable=True)[..., :num_joined]
    starts_BLE = torch.ones_like(similarity_BLE, dtype=torch.long).scatter_(2, edge_BLR, 0)
    return F.pad(starts_BLE.cumsum(dim=-1), (1, 0))


def _own_index(B: int, N: int, device: torch.device) -> Tensor:
    return torch.arange(N, device=device).expand(B, N).clone()


def _rows(root_BN: Tensor) -> Tensor:
    """(B, N): the row of each token's group, where a group is known by its root, which is its own root, and groups
    stand in the order of their roots."""
    own_N = torch.arange(root_BN.shape[1], device=root_BN.device)
    return ((root_BN == own_N).long().cumsum(dim=1) - 1).gather(1, root_BN)


def _pair(function: str, row_BN: Tensor, M: int, kind: str = "avg") -> tuple[TokenMap, TokenMap]:
    """(merge, unmerge) of groups: token n of image b belongs to row `row_BN[b, n]` of M; no row is empty."""
    B, N = row_BN.shape
    token_BN = _own_index(B, N, row_BN.device)
    start_BM = torch.full((B, M), N, device=row_BN.device).scatter_reduce_(1, row_BN, token_BN, "amin")
    image_B1 = torch.arange(B, device=row_BN.device)[:, None]
    start, row = (start_BM + image_B1 * N).flatten(), (row_BN + image_B1 * M).flatten()
    group_size = torch.zeros(B * M, device=row_BN.device).index_add_(0, row, torch.ones(B * N, device=row_BN.device))

    def merge(x_BNC: Tensor) -> Tensor:
        _check_tokens(function, x_BNC, N)
        x = x_BNC.flatten(0, 1)
        first = x[start]
        if kind == "magnitude":
            index = row[:, None].expand_as(x)
            high, low = (first.scatter_reduce(0, index, x, reduce) for reduce in ("amax", "amin"))
            return torch.where(high >= -low, high, low).unflatten(0, (B, M))
        added = torch.zeros_like(first).index_add(0, row, x - first[row])
        return (first + added / group_size.to(x.dtype)[:, None]).unflatten(0, (B, M))

    def unmerge(x_BMC: Tensor) -> Tensor:
        return x_BMC.flatten(0, 1)[row].unflatten(0, (B, N))

    return merge, unmerge
