"""Fewer tokens for attention: typed plan entries, and the leaves that carry them out.

A leaf is a parameter-free module owned by an attention layer. It is neutral until an entry is set, takes the
entries that it understands and refuses the rest by name. Nothing here knows a model, a family or where a leaf stands;
`segzoo.plans` finds leaves and gives each its entry.

Shape letters: B batch, C and D channels, H, W map, N query tokens, M key and value tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

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
        if not merging.is_share(self.ratio):
            raise SegzooError(f"Bipartite: ratio must be a number between 0 and 1, not {self.ratio!r}")
        object.__setattr__(self, "ratio", float(self.ratio))
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


Entry = Pool | OverlapPool | Bipartite | Neighbour2d | Neighbour1d
ENTRY_TYPES: tuple[type, ...] = (Pool, OverlapPool, Bipartite, Neighbour2d, Neighbour1d)
NEUTRAL = Pool(1)


def parse_entry(value: object) -> Entry:
    """An entry from what a plan may hold: None, an int, an entry, or an entry's JSON form."""
    if value is None:
        return NEUTRAL
    if isinstance(value, (Pool, OverlapPool, Bipartite, Neighbour2d, Neighbour1d)):
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
        "OverlapPool(n), Bipartite(ratio, stride), Neighbour2d(stride) or Neighbour1d(stride); in JSON "
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

    def forward(self, x_BHWC: Tensor) -> Tensor:
        entry = self.in_force
        if isinstance(entry, OverlapPool):
            return _overlap_pool(x_BHWC, self.trained * entry.factor).flatten(1, 2)
        if isinstance(entry, Pool):
            return _pool(x_BHWC, self.trained * entry.factor, entry.kind).flatten(1, 2)
        x_BHWC = _pool(x_BHWC, self.trained, "avg")
        tokens_BNC = x_BHWC.flatten(1, 2)
        merge, _ = _match(entry, tokens_BNC, x_BHWC.shape[1:3])
        return merge(tokens_BNC)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", trained={self.trained}" if self.trained > 1 else "")


class QueryReduction(Reduction):
    """Fewer queries, with their way back: (B, H, W, C) -> ((B, N', C), restore: (B, N', D) -> (B, H, W, D)).

    `Pool(n)` averages cells of n x n, border cells included, since every query needs an answer.
    """

    side = "q"
    takes = (Pool, Bipartite, Neighbour2d, Neighbour1d)

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
        assert not isinstance(entry, OverlapPool)  # `check` lets none in
        merge, unmerge = _match(entry, tokens_BNC, grid)
        return merge(tokens_BNC), lambda out_BNC: unmerge(out_BNC).unflatten(1, grid)


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


def _pool(x_BHWC: Tensor, window: int, kind: str) -> Tensor:
    """Non-overlapping pool in floor mode (remainder rows and columns are dropped); the window is clamped to the map."""
    H, W = x_BHWC.shape[1:3]
    window_HW = (min(window, H), min(window, W))
    if window_HW == (1, 1):
        return x_BHWC
    pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
    return to_channels_last(pool(to_channels_first(x_BHWC), window_HW))


def _overlap_pool(x_BHWC: Tensor, window: int) -> Tensor:
    H, W = x_BHWC.shape[1:3]
    h, w = min(window, H), min(window, W)
    if (h, w) == (1, 1):
        return x_BHWC
    pooled = F.avg_pool2d(to_channels_first(x_BHWC), (2 * h - 1, 2 * w - 1), (h, w), (h - 1, w - 1))
    return to_channels_last(pooled)


def _match(
    entry: Bipartite | Neighbour2d | Neighbour1d, tokens_BNC: Tensor, grid: Sequence[int]
) -> tuple[merging.TokenMap, merging.TokenMap]:
    H, W = grid
    if isinstance(entry, Bipartite):
        return merging.bipartite_2d(tokens_BNC, (H, W), ratio=entry.ratio, stride=entry.stride)
    if isinstance(entry, Neighbour1d):
        return merging.neighbour_1d(H * W, stride=entry.stride)
    return merging.neighbour_2d((H, W), stride=entry.stride)
