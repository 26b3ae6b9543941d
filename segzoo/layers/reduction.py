"""Fewer tokens for attention: typed plan entries, and the leaves that carry them out.

A leaf is a parameter-free module owned by an attention layer. It is neutral until an entry is set, takes the
entries that it understands and refuses the rest by name. Nothing here knows a model, a family or where a leaf stands;
`segzoo.plans` finds leaves and gives each its entry.

Shape letters: B batch, C and D channels, H, W map or window, N query tokens, M key and value tokens, V windows of a
batch, G windows of an image, L heads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import SegzooError
from . import merging
from .shapes import to_channels_first, to_channels_last

# --- plan entries -------------------------------------------------------------------------------------------------


def _require_int(entry: object, name: str) -> None:
    value = getattr(entry, name)
    if not merging.is_count(value):
        raise SegzooError(f"{type(entry).__name__}: {name} must be a whole number of at least 1, not {value!r}")
    object.__setattr__(entry, name, int(value))  # Python's, for JSON, from NumPy's too


def _require_share(entry: object, name: str) -> None:
    value = getattr(entry, name)
    if not merging.is_share(value):
        raise SegzooError(f"{type(entry).__name__}: {name} must be a number between 0 and 1, not {value!r}")
    object.__setattr__(entry, name, float(value))


@dataclasses.dataclass(frozen=True)
class Pool:
    """Pool windows of `factor` x `factor` times the trained window (EDAFormer's ISR). `Pool(1)` is neutral.

    >>> import segzoo
    >>> model = segzoo.create_model("test_eft")
    >>> model.set_inference_reduction({"encoder.0": segzoo.Pool(2, "max")})["encoder.0"]
    Pool(factor=2, kind='max')
    """

    factor: int
    kind: str = "avg"  # "avg" or "max"

    def __post_init__(self) -> None:
        _require_int(self, "factor")
        if self.kind not in ("avg", "max"):
            raise SegzooError(f"Pool: kind must be 'avg' or 'max', not {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class OverlapPool:
    """Average pooling with overlap: for a window w = trained x factor, kernel 2w - 1, stride w, padding w - 1."""

    factor: int

    def __post_init__(self) -> None:
        _require_int(self, "factor")


@dataclasses.dataclass(frozen=True)
class Bipartite:
    """Merge the `ratio` of all tokens most similar to the destination token of their choice (Segformer++).

    >>> import segzoo
    >>> model = segzoo.create_model("test_segformer")
    >>> model.set_inference_reduction({"encoder.q": (1, 1, segzoo.Bipartite(0.8, 4), 1)})["encoder.2.q"]
    Bipartite(ratio=0.8, stride=4)
    """

    ratio: float  # share of the tokens to merge away, 0 to 1; at most 1 - 1 / stride**2 of them can go
    stride: int  # one destination a cell of stride x stride tokens

    def __post_init__(self) -> None:
        _require_share(self, "ratio")
        _require_int(self, "stride")


@dataclasses.dataclass(frozen=True)
class Neighbour2d:
    """Average every `stride` x `stride` cell of the grid, border cells included (Segformer++ n2d)."""

    stride: int

    def __post_init__(self) -> None:
        _require_int(self, "stride")


@dataclasses.dataclass(frozen=True)
class Neighbour1d:
    """Average every `stride` consecutive tokens in row-major order (Segformer++ n1d)."""

    stride: int

    def __post_init__(self) -> None:
        _require_int(self, "stride")


@dataclasses.dataclass(frozen=True)
class Window:
    """Average windows of `side` x `side` tokens, whatever the trained window: for sides that are no multiple of it, as
    EDAFormer's Table 5b has them. Only for keys and values, and never smaller than the trained window.

    (B, H, W, C) -> (B, (H // side) * (W // side), C) at no cost; the window is clamped to the map.

    >>> import segzoo
    >>> model = segzoo.create_model("test_edaformer")  # its decoder was trained with windows of 1, 2 and 4
    >>> model.set_inference_reduction({"decoder": (3, 3, segzoo.Window(9))})["decoder.2"]
    Window(side=9)
    """

    side: int

    def __post_init__(self) -> None:
        _require_int(self, "side")


@dataclasses.dataclass(frozen=True)
class LocalGlobal:
    """Merge the most uniform windows, then the most similar of the tokens left, wherever they are (after ALGM).

    (B, N, C) -> (B, M, C) with M = M1 - min(int(M1 * ratio), M1 // 2) and M1 what the windows leave: N less
    window**2 - 1 tokens for each of the share `local` of the complete windows. Comparing takes (M1 / 2)**2 * C
    multiply-accumulates. `LocalGlobal(window, 0, 0)` is neutral. See `layers.merging.local_then_global`.

    >>> import segzoo
    >>> model = segzoo.create_model("test_segformer")
    >>> model.set_inference_reduction({"encoder.2.q": segzoo.LocalGlobal(2, 0.5, 0.2)})["encoder.2.q"]
    LocalGlobal(window=2, local=0.5, ratio=0.2)
    """

    window: int  # side of a local window; a remainder row or column is in none
    local: float  # share of the complete windows to merge, 0 to 1
    ratio: float  # share of the tokens left to merge away, 0 to 1; at most half of them can go

    def __post_init__(self) -> None:
        _require_int(self, "window")
        _require_share(self, "local")
        _require_share(self, "ratio")


@dataclasses.dataclass(frozen=True)
class EnergyProtected:
    """Merge tokens of which there are many alike, and protect the rare ones (PiToMe).

    (B, N, C) -> (B, N - r, C) with r = min(int(N * ratio), N // 2). The energies take N**2 * C multiply-accumulates,
    which is as much as half an attention of N queries: for small sets of tokens. `EnergyProtected(0)` is neutral. See
    `layers.merging.energy_protected`.

    >>> import segzoo
    >>> model = segzoo.create_model("test_segvit")
    >>> model.set_inference_reduction({"encoder.1": segzoo.EnergyProtected(0.4)})["encoder.1"]
    EnergyProtected(ratio=0.4, margin=0.5)
    """

    ratio: float  # share of all tokens to merge away, 0 to 1; at most half of them can go
    margin: float = 0.5  # similarity from which tokens count as alike, -1 to 1; the paper's falls with depth from 0.9

    def __post_init__(self) -> None:
        _require_share(self, "ratio")
        if not merging.is_similarity(self.margin):
            raise SegzooError(f"EnergyProtected: margin must be a number between -1 and 1, not {self.margin!r}")
        object.__setattr__(self, "margin", float(self.margin))


@dataclasses.dataclass(frozen=True)
class GridMerge:
    """Merge adjacent tokens of every row, then of every column, the most similar first (after CubistMerge).

    (B, H, W, C) -> (B, H' * W', C) with H' = ceil(H / factor), W' = ceil(W / factor): as many tokens as
    `Neighbour2d(factor)` leaves, still a grid on which strided and depthwise convolutions work, but fine where the
    image is busy and coarse where it is not. Comparing takes 2 * H * W * C multiply-accumulates, which no count shows,
    since they are no matmul. `GridMerge(1)` is neutral. See `layers.merging.merge_grid`.

    >>> import segzoo
    >>> model = segzoo.create_model("test_segformer")
    >>> model.set_inference_reduction({"encoder": segzoo.GridMerge(1.5)})["encoder.0"]
    GridMerge(factor=1.5, kind='avg')
    """

    factor: float  # by which each side shrinks, at least 1
    kind: str = "avg"  # or "magnitude", the paper's: in every channel the value farthest from zero

    def __post_init__(self) -> None:
        is_number = isinstance(self.factor, numbers.Real) and not isinstance(self.factor, bool)
        if not (is_number and 1 <= self.factor < math.inf):
            raise SegzooError(f"GridMerge: factor must be a number of at least 1, not {self.factor!r}")
        object.__setattr__(self, "factor", float(self.factor))
        if self.kind not in ("avg", "magnitude"):
            raise SegzooError(f"GridMerge: kind must be 'avg' or 'magnitude', not {self.kind!r}")

    def size(self, grid: Sequence[int]) -> tuple[int, int]:
        """(H', W') that is left of a grid (H, W)."""
        H, W = grid
        return math.ceil(H / self.factor), math.ceil(W / self.factor)


GridEntry = Pool | OverlapPool | Window | GridMerge  # what they leave is a map again
GRID_ENTRIES = (Pool, OverlapPool, Window, GridMerge)  # for isinstance where torch 2.6 compiles, which knows no unions
Matching = Bipartite | LocalGlobal | EnergyProtected | GridMerge | Neighbour2d | Neighbour1d
Entry = GridEntry | Matching
ENTRY_TYPES: tuple[type, ...] = typing.get_args(Entry)
NEUTRAL = Pool(1)


def parse_entry(value: object) -> Entry:
    """An entry from what a plan may hold: None, an int, an entry, or an entry's JSON form."""
    if value is None:
        return NEUTRAL
    if isinstance(value, Entry):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return Pool(int(value))
    if isinstance(value, Mapping):
        fields = dict(value)
        name = fields.pop("type", None)
        kind = next((entry for entry in ENTRY_TYPES if entry.__name__ == name), None)
        if kind is not None and set(fields) <= {field.name for field in dataclasses.fields(kind)}:
            with contextlib.suppress(TypeError):  # a missing field: told below with the valid forms
                return kind(**fields)
    raise SegzooError(
        f"{value!r} is no reduction entry; use a whole number n (= Pool(n)), None, Pool(n, 'avg' | 'max'), "
        "OverlapPool(n), Window(side), Bipartite(ratio, stride), LocalGlobal(window, local, ratio), "
        "EnergyProtected(ratio, margin), GridMerge(factor, kind), Neighbour2d(stride) or Neighbour1d(stride); in JSON "
        '{"type": "Bipartite", "ratio": 0.6, "stride": 2}'
    )


def entry_to_json(entry: Entry) -> int | dict[str, Any]:
    if isinstance(entry, Pool) and entry.kind == "avg":
        return entry.factor
    return {"type": type(entry).__name__, **dataclasses.asdict(entry)}


def entry_to_text(entry: Entry) -> str:
    if entry == NEUTRAL:
        return "1"
    return f"{type(entry).__name__}({', '.join(str(value) for value in dataclasses.astuple(entry))})"


# --- leaves -------------------------------------------------------------------------------------------------------


class Reduction(nn.Module):
    """A site's leaf. Subclasses say what their entries do; this class holds the entry and the site's name.

    Args:
        part: "encoder" or "decoder".
        level: stage of the encoder, level of the decoder (0 = deepest), or third of a plain ViT's depth.
    """

    side: ClassVar[str]  # "kv", "q" or "grid"
    takes: ClassVar[tuple[type, ...]]  # entry types that this leaf understands

    def __init__(self, *, part: str, level: int = 0):
        super().__init__()
        self.part = part
        self.level = level
        self.entry: Entry = NEUTRAL
        self.during_training = False

    @property
    def site(self) -> str:
        if self.side == "grid":
            return f"{self.part}.grid"
        return f"{self.part}.{self.level}" + (".q" if self.side == "q" else "")

    def check(self, entry: Entry) -> None:
        """Raises SegzooError, naming the site, if this leaf does not understand the entry."""
        if not isinstance(entry, self.takes):
            valid = ", ".join(kind.__name__ for kind in self.takes)
            raise SegzooError(f"site {self.site} takes {valid}, not {entry_to_text(entry)}")

    @property
    def in_force(self) -> Entry:
        """The entry that the next forward uses: neutral in training mode unless set for training, too."""
        return self.entry if self.during_training or not self.training else NEUTRAL

    def extra_repr(self) -> str:
        training = ", during_training=True" if self.during_training else ""
        return f"site={self.site}, factor={entry_to_text(self.entry)}{training}"


class KeyValueReduction(Reduction):
    """Fewer keys and values: (B, H, W, C) -> (B, M, C).

    Args:
        trained: side of the pooling window that the model was trained with; the leaf is that pool.
    """

    side = "kv"
    takes = ENTRY_TYPES

    def __init__(self, *, part: str, level: int, trained: int = 1):
        super().__init__(part=part, level=level)
        self.trained = trained

    def check(self, entry: Entry) -> None:
        super().check(entry)
        if isinstance(entry, Window) and entry.side < self.trained:
            raise SegzooError(
                f"site {self.site} was trained with windows of {self.trained} x {self.trained}, and "
                f"{entry_to_text(entry)} would give more tokens than that, not fewer"
            )

    def forward(self, x_BHWC: Tensor) -> Tensor:
        entry = self.in_force
        if isinstance(entry, GRID_ENTRIES):
            return reduce_map(entry, x_BHWC, trained=self.trained).flatten(1, 2)
        x_BHWC = _pool(x_BHWC, self.trained, "avg")
        tokens_BNC = x_BHWC.flatten(1, 2)
        merge, _ = _match(entry, tokens_BNC, x_BHWC.shape[1:3])
        return merge(tokens_BNC)

    def assignment(self, x_BHWC: Tensor) -> Tensor:
        """Which of the M tokens each position of the map goes into: (B, H, W) int64, -1 for what a pool leaves out.

        Of overlapping windows the one whose centre is nearest.
        """
        entry, grid = self.in_force, tuple(x_BHWC.shape[1:3])
        if isinstance(entry, Pool | OverlapPool | Window):
            side = entry.side if isinstance(entry, Window) else self.trained * entry.factor
            cell_HW = _cells(grid, side, overlap=isinstance(entry, OverlapPool), device=x_BHWC.device)
            return cell_HW.expand(len(x_BHWC), *grid)
        cell_HW = _cells(grid, self.trained, overlap=False, device=x_BHWC.device)
        token_BN = _assigned(entry, _pool(x_BHWC, self.trained, "avg")).flatten(1)
        return torch.where(cell_HW >= 0, token_BN[:, cell_HW.clamp(min=0)], -1)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", trained={self.trained}" if self.trained > 1 else "")


class WindowReduction(Reduction):
    """Fewer keys and values in each window of a windowed attention: (V, H, W, C) windows -> (V, M, C).

    Cells of n x n tokens become one, border cells included, since a window is small. What an attention adds to its
    scores goes with them: see `bias`.
    """

    side = "kv"
    takes = (Pool, Neighbour2d)

    @property
    def cell(self) -> int:
        """Side of a cell in tokens."""
        entry = self.in_force
        assert isinstance(entry, Pool | Neighbour2d)  # `check` lets nothing else in
        return entry.factor if isinstance(entry, Pool) else entry.stride

    def forward(self, x_VHWC: Tensor) -> Tensor:
        entry = self.in_force
        kind = entry.kind if isinstance(entry, Pool) else "avg"
        return to_channels_last(_pool_cells(to_channels_first(x_VHWC), self.cell, kind)).flatten(1, 2)

    def bias(self, bias_LNHW: Tensor, mask_GNHW: Tensor | None, *, windows: int) -> Tensor:
        """What is added to the scores of each window: (V or 1, L, N, M).

        Args:
            bias_LNHW: of L heads, N queries and the H x W keys of a window; a cell has the mean.
            mask_GNHW: 0 or very small, of the G windows of an image; a cell is seen by who sees any token of it.
            windows: V, those of all images.
        """
        bias_LNM = _pool_cells(bias_LNHW, self.cell, "avg").flatten(2)
        if mask_GNHW is None:
            return bias_LNM[None]
        bias_GLNM = bias_LNM + _pool_cells(mask_GNHW, self.cell, "max").flatten(2)[:, None]
        return bias_GLNM.expand(windows // len(bias_GLNM), *bias_GLNM.shape).flatten(0, 1)


class QueryReduction(Reduction):
    """Fewer queries, with their way back: (B, H, W, C) -> ((B, N', C), restore: (B, N', D) -> (B, H, W, D)).

    `Pool(n)` averages cells of n x n, border cells included, since every query needs an answer.
    """

    side = "q"
    takes = (Pool, Bipartite, LocalGlobal, EnergyProtected, GridMerge, Neighbour2d, Neighbour1d)

    def check(self, entry: Entry) -> None:
        super().check(entry)
        if isinstance(entry, Pool) and entry.kind != "avg":
            raise SegzooError(f"site {self.site} pools queries by average only, not {entry_to_text(entry)}")

    def forward(self, x_BHWC: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        entry = self.in_force
        grid = tuple(x_BHWC.shape[1:3])
        tokens_BNC = x_BHWC.flatten(1, 2)
        if isinstance(entry, Pool):
            entry = Neighbour2d(entry.factor)
        assert not isinstance(entry, (OverlapPool, Window))  # `check` lets none in
        merge, unmerge = _match(entry, tokens_BNC, grid)
        return merge(tokens_BNC), lambda out_BNC: unmerge(out_BNC).unflatten(1, grid)

    def assignment(self, x_BHWC: Tensor) -> Tensor:
        """Which of the N' tokens each position of the map goes into: (B, H, W) int64."""
        entry = self.in_force
        if isinstance(entry, Pool):
            entry = Neighbour2d(entry.factor)
        assert not isinstance(entry, OverlapPool | Window)  # `check` lets none in
        return _assigned(entry, x_BHWC)


class GridReduction(Reduction):
    """Side of the square grid of a cross-resolution attention: `side()` is the trained side / factor, at least 1."""

    side = "grid"
    takes = (Pool,)

    def __init__(self, *, part: str, trained: int):
        super().__init__(part=part)
        self.trained = trained

    def check(self, entry: Entry) -> None:
        super().check(entry)
        if isinstance(entry, Pool) and entry.kind != "avg":
            raise SegzooError(f"site {self.site} shrinks a grid and has no kind of pooling; use an int")

    def forward(self) -> int:
        entry = self.in_force
        assert isinstance(entry, Pool)  # `check` lets nothing else in
        return max(1, self.trained // entry.factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trained={self.trained}"


def reduce_map(entry: GridEntry, x_BHWC: Tensor, *, trained: int = 1) -> Tensor:
    """(B, H, W, C) -> (B, H', W', C), a smaller map that a strided or depthwise convolution can go on with.

    Args:
        trained: side of the pooling window that the model was trained with.
    """
    if isinstance(entry, OverlapPool):
        return _overlap_pool(x_BHWC, trained * entry.factor)
    if isinstance(entry, Pool):
        return _pool(x_BHWC, trained * entry.factor, entry.kind)
    if isinstance(entry, Window):
        return _pool(x_BHWC, entry.side, "avg")
    x_BHWC = _pool(x_BHWC, trained, "avg")
    tokens_BNC, grid = x_BHWC.flatten(1, 2), x_BHWC.shape[1:3]
    merge, _ = _match(entry, tokens_BNC, grid)
    return merge(tokens_BNC).unflatten(1, entry.size(grid))


def _pool(x_BHWC: Tensor, window: int, kind: str) -> Tensor:
    """Non-overlapping pool in floor mode (remainder rows and columns are dropped); the window is clamped to the map."""
    H, W = x_BHWC.shape[1:3]
    window_HW = (min(window, H), min(window, W))
    if window_HW == (1, 1):
        return x_BHWC
    pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
    return to_channels_last(pool(to_channels_first(x_BHWC), window_HW))


def _pool_cells(map_BCHW: Tensor, side: int, kind: str) -> Tensor:
    """Cells of side x side, of which those at the border hold what is left; the side is clamped to the map."""
    H, W = map_BCHW.shape[2:]
    side_HW = (min(side, H), min(side, W))
    if side_HW == (1, 1):
        return map_BCHW
    pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
    return pool(map_BCHW, side_HW, ceil_mode=True)


def _overlap_pool(x_BHWC: Tensor, window: int) -> Tensor:
    H, W = x_BHWC.shape[1:3]
    h, w = min(window, H), min(window, W)
    if (h, w) == (1, 1):
        return x_BHWC
    pooled = F.avg_pool2d(to_channels_first(x_BHWC), (2 * h - 1, 2 * w - 1), (h, w), (h - 1, w - 1))
    return to_channels_last(pooled)


def _cells(grid: Sequence[int], side: int, *, overlap: bool, device: torch.device) -> Tensor:
    """Number of the pooled cell of each position: (H, W) int64, -1 for the remainder."""

    def cell(length: int) -> tuple[Tensor, int]:
        window = min(side, length)
        position = torch.arange(length, device=device)
        if overlap:  # of ceil(length / window) windows, whose centres stand at multiples of `window`
            count = (length - 1) // window + 1
            return ((position + window // 2) // window).clamp(max=count - 1), count
        count = length // window
        return torch.where(position < count * window, position // window, -1), count

    (row_H, _), (column_W, columns) = map(cell, grid)
    is_in_HW = (row_H[:, None] >= 0) & (column_W >= 0)
    return torch.where(is_in_HW, row_H[:, None] * columns + column_W, -1)


def _assigned(entry: Matching, x_BHWC: Tensor) -> Tensor:
    """Number of the merged token of each position: (B, H, W) int64."""
    grid = tuple(x_BHWC.shape[1:3])
    tokens_BNC = x_BHWC.flatten(1, 2)
    merge, unmerge = _match(entry, tokens_BNC, grid)
    B, M, _ = merge(tokens_BNC).shape
    number_BM1 = torch.arange(M, device=x_BHWC.device, dtype=torch.float64).expand(B, M)[..., None]
    return unmerge(number_BM1)[..., 0].round().long().unflatten(1, grid)


def _match(entry: Matching, tokens_BNC: Tensor, grid: Sequence[int]) -> tuple[merging.TokenMap, merging.TokenMap]:
    H, W = grid
    if isinstance(entry, Bipartite):
        return merging.bipartite_2d(tokens_BNC, (H, W), ratio=entry.ratio, stride=entry.stride)
    if isinstance(entry, LocalGlobal):
        return merging.local_then_global(tokens_BNC, (H, W), window=entry.window, local=entry.local, ratio=entry.ratio)
    if isinstance(entry, EnergyProtected):
        return merging.energy_protected(tokens_BNC, ratio=entry.ratio, margin=entry.margin)
    if isinstance(entry, GridMerge):
        return merging.merge_grid(tokens_BNC, (H, W), size=entry.size(grid), kind=entry.kind)
    if isinstance(entry, Neighbour1d):
        return merging.neighbour_1d(H * W, stride=entry.stride)
    return merging.neighbour_2d((H, W), stride=entry.stride)
