"""Which names there are: listing, matching, and what is known about a name without building its model."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._errors import SegzooError
from ..models.family import FAMILIES, VARIANTS, PublishedCost, Variant
from ..models.rows import PretrainedCfg
from .options import trained_cfg


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known about a name without building the model."""

    name: str
    tag: str | None
    family: str
    cfg: Any
    params: int | None
    published: tuple[PublishedCost, ...]
    pretrained_cfg: PretrainedCfg | None
    tags: tuple[str, ...]
    note: str  # the variant's


def list_models(
    filter: str | Sequence[str] = "*",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = (),
) -> list[str]:
    """Names in natural order. With `pretrained`, `name.tag` of the rows whose weights can be loaded.

    >>> import segzoo
    >>> segzoo.list_models("rtformer_*", exclude_filters="*_backbone")
    ['rtformer_base', 'rtformer_slim']

    Args:
        filter: wildcard or wildcards, such as "edaformer*"; a name is listed if any matches.
        exclude_filters: wildcard or wildcards of names to leave out.
    """
    names = [name for name, row in _rows() if row.loadable] if pretrained else list(VARIANTS)
    return sorted(_select(names, filter, exclude_filters), key=_natural_key)


def list_pretrained(
    filter: str | Sequence[str] = "*",
    exclude_filters: str | Sequence[str] = (),
    *,
    source: str | None = None,
    license: str | None = None,
    commercial: bool | None = None,
    dataset: str | None = None,
) -> list[str]:
    """`name.tag` of every weights row, in natural order, also of those that are not published yet.

    >>> import segzoo
    >>> segzoo.list_pretrained("edaformer_*", source="bundled")
    ['edaformer_t.scenes']

    Args:
        filter: wildcard or wildcards, such as "segformer_b?.*"; a name is listed if any matches.
        exclude_filters: wildcard or wildcards of names to leave out.
        source: only rows that are "bundled", "hub", "url" or "unpublished".
        license: only rows under this licence, such as "apache-2.0".
        commercial: only rows that allow commercial use (True) or are known to forbid it (False).
        dataset: only rows trained on it, such as "ade20k".

    Raises:
        SegzooError: a source, licence or data set that no row has; the message lists those that there are.
    """
    rows = dict(_rows())
    for option, field, wanted in (
        ("source", "state", source),
        ("license", "license", license),
        ("commercial", "commercial_use", commercial),
        ("dataset", "dataset", dataset),
    ):
        known = {getattr(row, field) for _, row in _rows()}
        if wanted is None:
            continue
        if wanted not in known:
            valid = ", ".join(sorted(str(value) for value in known if value is not None))
            raise SegzooError(f"no weights have {option} {wanted!r}; there are: {valid}")
        rows = {name: row for name, row in rows.items() if getattr(row, field) == wanted}
    return sorted(_select(list(rows), filter, exclude_filters), key=_natural_key)


def model_info(name: str) -> ModelInfo:
    """What is known about "variant" or "variant.tag" without building it; without a tag, its default row.

    >>> import segzoo
    >>> info = segzoo.model_info("rtformer_slim.cityscapes")
    >>> info.pretrained_cfg.license, info.pretrained_cfg.num_classes
    ('apache-2.0', 19)
    """
    variant_name, tag = parse_name(name)
    family = VARIANTS[variant_name]
    variant = family.variants[variant_name]
    rows = family.pretrained.get(variant_name, {})
    tag = tag or default_tag(rows)
    return ModelInfo(
        name=variant_name,
        tag=tag,
        family=family.name,
        cfg=trained_cfg(variant_name, rows[tag]) if tag else variant.cfg,
        params=variant.params,
        published=variant.published,
        pretrained_cfg=rows.get(tag),
        tags=tuple(rows),
        note=variant.note,
    )


def variant_of(name: str) -> Variant:
    """The row of `VARIANTS` behind "variant" or "variant.tag"."""
    variant_name, _ = parse_name(name)
    return VARIANTS[variant_name].variants[variant_name]


def default_tag(rows: Mapping[str, PretrainedCfg]) -> str | None:
    """The first whose weights can be loaded, else the first; None if there are none."""
    return next((tag for tag, row in rows.items() if row.loadable), next(iter(rows), None))


def _rows() -> Iterator[tuple[str, PretrainedCfg]]:
    for family in FAMILIES.values():
        for variant_name, rows in family.pretrained.items():
            for tag, row in rows.items():
                yield f"{variant_name}.{tag}", row


def _select(names: Sequence[str], filter: str | Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    include = [filter] if isinstance(filter, str) else list(filter)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return [name for name in names if matches(name, include) and not matches(name, exclude)]


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts b2 before b10: digits compare as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def parse_name(name: str) -> tuple[str, str | None]:
    variant, _, tag = name.partition(".")
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=3) or list_models(exclude_filters="test_*")
        raise SegzooError(f"unknown model {name!r}; did you mean {', '.join(close)}? segzoo.list_models() lists all")
    if not tag:
        return variant, None
    tags = VARIANTS[variant].pretrained.get(variant, {})
    if tag not in tags:
        raise SegzooError(f"{variant} has no weights tagged {tag!r}; its tags: {', '.join(tags) or 'none'}")
    return variant, tag
