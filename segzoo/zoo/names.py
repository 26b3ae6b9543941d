"""What is known about a registered name without building its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..models.family import VARIANTS, PublishedCost, Variant
from ..models.rows import PretrainedCfg
from .index import split_name
from .options import trained_cfg


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known about a name without building the model."""

    name: str
    tag: str | None
    family: str
    cfg: Any  # with the options that the tag's weights were trained with
    params: int  # exact count of a model of `cfg`
    published: tuple[PublishedCost, ...]  # each with a number of classes of its own
    pretrained_cfg: PretrainedCfg | None
    tags: tuple[str, ...]
    note: str  # the variant's


def model_info(name: str) -> ModelInfo:
    """What is known about "variant" or "variant.tag" without building it; without a tag, its default row.

    >>> import segzoo
    >>> info = segzoo.model_info("rtformer_slim.cityscapes")
    >>> info.pretrained_cfg.license, info.cfg.num_classes, info.params
    ('apache-2.0', 19, 5403398)
    """
    variant_name, tag = parse_name(name)
    family = VARIANTS[variant_name]
    variant, rows = family.variants[variant_name], rows_of(variant_name)
    tag = tag or default_tag(rows)
    cfg = trained_cfg(variant_name, rows[tag]) if tag else variant.cfg
    return ModelInfo(
        name=variant_name,
        tag=tag,
        family=family.name,
        cfg=cfg,
        params=variant.params if variant.params and cfg == variant.cfg else _count_params(variant_name, cfg),
        published=variant.published,
        pretrained_cfg=rows[tag] if tag else None,
        tags=tuple(rows),
        note=variant.note,
    )


def _count_params(variant_name: str, cfg: Any) -> int:
    with torch.device("meta"):
        model = VARIANTS[variant_name].build(cfg)
    return sum(parameter.numel() for parameter in model.parameters())


def get_pretrained_cfg(name: str) -> PretrainedCfg | None:
    """The weights row of "variant.tag"; without a tag, the default one, or None if there is none.

    >>> import segzoo
    >>> row = segzoo.get_pretrained_cfg("rtformer_slim.cityscapes")
    >>> row.input_size, row["input_size"]  # segzoo's field, and timm's
    ((512, 1024), (3, 512, 1024))
    """
    variant_name, tag = parse_name(name)
    rows = rows_of(variant_name)
    tag = tag or default_tag(rows)
    return rows[tag] if tag else None


def variant_of(name: str) -> Variant:
    """The row of `VARIANTS` behind "variant" or "variant.tag"."""
    variant_name, _ = parse_name(name)
    return VARIANTS[variant_name].variants[variant_name]


def rows_of(variant_name: str) -> Mapping[str, PretrainedCfg]:
    """Tag -> weights row of a registered variant; the first is the default."""
    return VARIANTS[variant_name].pretrained.get(variant_name, {})


def default_tag(rows: Mapping[str, PretrainedCfg]) -> str | None:
    """The first that comes with the package, else that can be loaded, else the first; None if there are none."""
    return min(rows, key=lambda tag: (rows[tag].state != "bundled", not rows[tag].loadable), default=None)


def parse_name(name: str) -> tuple[str, str | None]:
    """A registered variant or variant.tag becomes the variant and the tag, which is None without one.

    Raises:
        SegzooError: no such variant or tag; the message lists close ones.
    """
    return split_name(name, {variant_name: rows_of(variant_name) for variant_name in VARIANTS})
