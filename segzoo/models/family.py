"""What a family file registers: its variants with their published costs, its weights rows, and how to build it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .._errors import SegzooError
from .base import Model
from .rows import PretrainedCfg


@dataclasses.dataclass(frozen=True)
class PublishedCost:
    """A figure of the paper: multiply-accumulates in units of 1e9 and parameters in units of 1e6."""

    size: tuple[int, int]  # input (H, W) in pixels
    gmacs: float
    params_m: float | None = None
    reduction: str = "base"  # preset
    num_classes: int | None = None  # None: the variant's own
    why: str = ""  # of a figure more than 3 % off the exact cost: what the paper counts otherwise


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a family's `VARIANTS`: its config, its parameter count and the paper's figures."""

    cfg: Any  # frozen dataclass of the family
    params: int | None = None  # exact parameter count; None for the tiny test variants
    published: tuple[PublishedCost, ...] = ()
    reduction: Any = None  # plan that belongs to the name itself
    note: str = ""  # what its name alone would have a reader take for granted wrongly


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family file registers."""

    name: str
    build: Callable[[Any], Model]  # config -> model; of a family of encoders, their class
    variants: Mapping[str, Variant]
    pretrained: Mapping[str, Mapping[str, PretrainedCfg]]  # variant -> tag -> row; the first row is the default


FAMILIES: dict[str, Family] = {}
VARIANTS: dict[str, Family] = {}  # variant name -> its family


def register_family(family: Family) -> None:
    """Make a family's variants known. Called once, at the end of the family's file."""
    taken = sorted(set(family.variants) & set(VARIANTS))
    if taken:
        raise SegzooError(f"family {family.name}: {', '.join(taken)} already registered")
    FAMILIES[family.name] = family
    VARIANTS.update(dict.fromkeys(family.variants, family))
