"""Fewer tokens for attention: typed plan entries, the leaves that carry them out, and the walk that finds leaves.

A leaf is a parameter-free module owned by an attention layer. It is neutral until an entry is set, takes the
entries that it understands and refuses the rest by name. `reduction_sites` finds leaves in any module tree; a plan
gives an entry to each site. Nothing here knows a model, a family or where a leaf stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Pool windows of `factor` x `factor` times the trained window (EDAFormer's ISR). `Pool(1)` is neutral."""

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
    """Merge the `ratio` of all tokens most similar to the destination token of their choice (Segformer++)."""

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
    if isinstance(value, ENTRY_TYPES):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return Pool(value)
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
        if entry.kind != "avg":
            raise SegzooError(f"site {self.site} shrinks a grid and has no kind of pooling; use an int")

    def forward(self) -> int:
        return max(1, self.trained // self.in_force.factor)

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


def _match(entry: Entry, tokens_BNC: Tensor, grid: Sequence[int]) -> tuple[merging.TokenMap, merging.TokenMap]:
    H, W = grid
    if isinstance(entry, Bipartite):
        return merging.bipartite_2d(tokens_BNC, (H, W), ratio=entry.ratio, stride=entry.stride)
    if isinstance(entry, Neighbour1d):
        return merging.neighbour_1d(H * W, stride=entry.stride)
    return merging.neighbour_2d((H, W), stride=entry.stride)


# --- the walk and the plan ------------------------------------------------------------------------------------------


class Plan(dict):
    """A plan as it is in force: site name -> entry, one for every site. Itself a valid plan."""

    def to_json(self) -> str:
        return json.dumps({site: entry_to_json(entry) for site, entry in self.items()})

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{site}: {entry_to_text(entry)}" for site, entry in self.items()) + "}"

    @property
    def is_neutral(self) -> bool:
        return all(entry == NEUTRAL for entry in self.values())


def reduction_sites(model: nn.Module) -> dict[str, tuple[Reduction, ...]]:
    """Every site of a module tree with its leaves, in the order in which the data flows: {"encoder.0": (...), ...}."""
    sites: dict[str, tuple[Reduction, ...]] = {}
    for module in model.modules():
        if isinstance(module, Reduction):
            sites[module.site] = sites.get(module.site, ()) + (module,)
    return sites


def set_inference_reduction(model: nn.Module, plan: object, *, during_training: bool = False) -> Plan:
    """Choose after training how many tokens attention sees, in any module tree that owns reduction leaves.

    Args:
        plan: a preset's name; an int or entry for every key/value and grid site; a dict whose keys are parts
            ("encoder", "decoder", "encoder.q") with one entry per level or one for all, or single sites
            ("encoder.2", "encoder.2.q"), which win over their part; the JSON text of such a dict; or None, which
            makes every site neutral and restores the trained model bit-exactly. Sites not named become neutral.
        during_training: also reduce in training mode, for fine-tuning with the reduction in place.

    Returns:
        The whole plan in force, one entry a site.

    Raises:
        SegzooError: a wrong preset, site, length or entry; lists the valid ones and leaves the model as it was.
    """
    sites = reduction_sites(model)
    resolved = resolve_plan(plan, sites, getattr(model, "reduction_presets", {}))
    for site, leaves in sites.items():
        for leaf in leaves:
            leaf.entry, leaf.during_training = resolved[site], during_training and resolved[site] != NEUTRAL
    return resolved


@contextlib.contextmanager
def inference_reduction(model: nn.Module, plan: object, *, during_training: bool = False) -> Iterator[Plan]:
    """`with inference_reduction(model, plan):` sets a plan and restores what was set before on the way out."""
    leaves = [leaf for leaves in reduction_sites(model).values() for leaf in leaves]
    before = [(leaf.entry, leaf.during_training) for leaf in leaves]
    try:
        yield set_inference_reduction(model, plan, during_training=during_training)
    finally:
        for leaf, (entry, during) in zip(leaves, before, strict=True):
            leaf.entry, leaf.during_training = entry, during


def current_plan(model: nn.Module) -> Plan:
    """The plan that is set now (also while training mode makes it neutral)."""
    return Plan((site, leaves[0].entry) for site, leaves in reduction_sites(model).items())


def resolve_plan(
    plan: object, sites: Mapping[str, Sequence[Reduction]], presets: Mapping[str, Mapping[str, Any]]
) -> Plan:
    """The form in force of any accepted form of a plan; raises SegzooError without having changed anything."""
    resolved = Plan((site, NEUTRAL) for site in sites)
    if isinstance(plan, str):
        plan = _parse_text(plan, presets)
    if plan is None:
        return resolved
    if not sites:
        raise SegzooError("this model has no reduction sites: none of its attention layers owns a reduction leaf")
    try:
        if isinstance(plan, Mapping) and "type" not in plan:
            # Parts first, so that a single site wins over its part whatever the order of the keys.
            for key in sorted(plan, key=lambda key: key in sites):
                resolved.update(_resolve_key(key, plan[key], sites))
        else:
            entry = parse_entry(plan)
            resolved.update((site, entry) for site, leaves in sites.items() if leaves[0].side != "q")
        for site, leaves in sites.items():
            for leaf in leaves:
                leaf.check(resolved[site])
    except SegzooError as error:
        hint = f"; presets: {', '.join(presets)}" if presets else ""
        raise SegzooError(f"reduction plan refused: {error}. Sites of this model: {', '.join(sites)}{hint}") from None
    return resolved


def _parse_text(text: str, presets: Mapping[str, Mapping[str, Any]]) -> object:
    if text in presets:
        return presets[text]
    if text.lstrip().startswith("{") or text.strip().isdigit():
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise SegzooError(f"reduction plan refused: not valid JSON ({error}): {text}") from None
    names = ", ".join(presets) or "none for this model"
    raise SegzooError(
        f"reduction plan refused: no preset is called {text!r}; presets: {names}; or an int or a JSON dict"
    )


def _resolve_key(key: object, value: object, sites: Mapping[str, Sequence[Reduction]]) -> Iterator[tuple[str, Entry]]:
    if key in sites:
        yield key, parse_entry(value)
        return
    part, _, side = str(key).partition(".")
    wanted = ("q",) if side == "q" else ("kv", "grid")
    covered = [site for site, leaves in sites.items() if leaves[0].part == part and leaves[0].side in wanted]
    covered.sort(key=lambda site: sites[site][0].level)
    if side not in ("", "q") or not covered:
        raise SegzooError(f"there is no part or site {key!r}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(covered):
            raise SegzooError(
                f"{key!r} has {len(covered)} levels ({', '.join(covered)}), but {len(value)} entries given"
            )
        values = value
    else:
        values = [value] * len(covered)
    for site, item in zip(covered, values, strict=True):
        yield site, parse_entry(item)
