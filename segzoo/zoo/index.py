"""Which names there are, and what is known about them: listing, matching and refusals, all without torch.

`index.json` beside this file is the registry as plain data. `python -m segzoo.zoo.index` (or `make index`) writes it
whenever a family, a variant or a weights row has changed; a test compares it with the registry.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import json
import logging
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import SegzooError

if TYPE_CHECKING:
    from ..models.family import Family
    from ..models.rows import PretrainedCfg

INDEX = Path(__file__).with_name("index.json")
SAVED_PREFIXES = ("local-dir:", "hf-hub:")  # names of saved models, which no list knows
WILDCARDS = frozenset("*?[")
TEST_PREFIX = "test_"  # the tiny variants, which are listed only where a filter asks for them

_log = logging.getLogger("segzoo")


@dataclasses.dataclass(frozen=True)
class ListedRow:
    """What a list says about a weights row; the fields mean what those of `models.rows.PretrainedCfg` do."""

    state: str
    loadable: bool = True
    from_text: str = ""  # where the file is, in short
    dataset: str = ""
    num_classes: int = 1000
    score: float | None = None  # percent, published for these weights at the reduction that belongs to the name
    metric: str = "miou"  # or "top1"
    confirmed: bool = True  # whether that figure could be confirmed
    recommended_reduction: str | None = None
    license: str = "unknown"
    license_url: str | None = None
    commercial_use: bool | None = None
    origin: str = ""
    how_to_get: str = ""  # unpublished and drive: what has to be done by hand
    advice: str = ""

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


@dataclasses.dataclass(frozen=True)
class ListedModel:
    """What a list says about a variant."""

    family: str
    params: int | None = None
    reduction: str | None = None  # preset that belongs to the name itself
    published: tuple[Mapping[str, Any], ...] = ()  # fields of `models.family.PublishedCost`
    rows: Mapping[str, ListedRow] = dataclasses.field(default_factory=dict)  # tag -> row; the first is the default

    def changed(self) -> dict[str, Any]:
        """The fields that are not empty."""
        rows = {tag: row.changed() for tag, row in self.rows.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in {**fields, "rows": rows}.items() if value}


def list_models(
    filter: str | Sequence[str] = "*",
    module: str = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = (),
    include_tags: bool | None = None,
) -> list[str]:
    """Names in natural order. The arguments are timm's, in its order.

    The tiny variants for tests are listed only where a filter begins with "test".

    >>> import segzoo
    >>> segzoo.list_models("RTFormer_*", exclude_filters="*_backbone")
    ['rtformer_base', 'rtformer_slim']
    >>> segzoo.list_models("*_t", module="edaformer", pretrained=True)
    ['edaformer_t.ade20k', 'edaformer_t.cityscapes', 'edaformer_t.coco_stuff', 'edaformer_t.scenes']

    Args:
        filter: wildcard or wildcards, such as "edaformer*", in any case; a name is listed if any matches. One without a
            dot says nothing of tags. Where nothing matches and one has no wildcard, a log message says what it is a
            part of.
        module: only names of this family, see `list_modules`.
        pretrained: only names whose weights can be loaded.
        exclude_filters: wildcard or wildcards of names to leave out.
        include_tags: "variant.tag" for every weights row instead of "variant"; None: as `pretrained`.

    Raises:
        SegzooError: a family that there is not; the message lists those that there are.
    """
    models = known_models()
    if module:
        models = _of_module(models, module)
    names = _names_of(models, pretrained, pretrained if include_tags is None else include_tags)
    return _select(names, _for_any_tag(filter), _for_any_tag(exclude_filters))


def _of_module(models: Mapping[str, ListedModel], module: str) -> Mapping[str, ListedModel]:
    """Those of the family; SegzooError if there is none of that name."""
    if module not in list_modules():
        raise SegzooError(
            f"module is a family's name, one of {', '.join(list_modules())}, not {module!r}; what a name must look "
            "like is filter=, and only those with weights gives pretrained=True"
        )
    return {name: model for name, model in models.items() if model.family == module}


def _names_of(models: Mapping[str, ListedModel], pretrained: bool, with_tags: bool) -> list[str]:
    """The variants, or "variant.tag" of those that have rows; with `pretrained` only of what can be loaded."""
    names: list[str] = []
    for name, model in models.items():
        tags = [tag for tag, row in model.rows.items() if row.loadable or not pretrained]
        if with_tags and tags:
            names += [f"{name}.{tag}" for tag in tags]
        elif tags or not pretrained:
            names.append(name)
    return names


def list_modules() -> list[str]:
    """The families, which timm would call modules.

    >>> import segzoo
    >>> segzoo.list_modules()[:2]
    ['edaformer', 'eft']
    """
    return sorted({model.family for model in known_models().values()})


def is_model(name: str) -> bool:
    """Whether `create_model` knows "variant" or "variant.tag".

    >>> import segzoo
    >>> segzoo.is_model("edaformer_t.scenes"), segzoo.is_model("resnet50")
    (True, False)
    """
    try:
        split_name(name, {variant: model.rows for variant, model in known_models().items()})
    except SegzooError:
        return False
    return True


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
        filter: wildcard or wildcards, such as "segformer_b?.*", as in `list_models`.
        exclude_filters: wildcard or wildcards of names to leave out.
        source: only rows that are "bundled", "hub", "url", "drive" or "unpublished".
        license: only rows under this licence, such as "apache-2.0".
        commercial: only rows that allow commercial use (True) or are known to forbid it (False).
        dataset: only rows trained on it, such as "ade20k".

    Raises:
        SegzooError: a source, licence or data set that no row has; the message lists those that there are.
    """
    every = rows = known_rows()
    for option, field, wanted in (
        ("source", "state", source),
        ("license", "license", license),
        ("commercial", "commercial_use", commercial),
        ("dataset", "dataset", dataset),
    ):
        if wanted is None:
            continue
        found = {getattr(row, field) for row in every.values()}
        if wanted not in found:
            valid = ", ".join(sorted(str(value) for value in found if value is not None))
            raise SegzooError(f"no weights have {option} {wanted!r}; there are: {valid}")
        rows = {name: row for name, row in rows.items() if getattr(row, field) == wanted}
    return _select(rows, filter, exclude_filters)


def known_models() -> Mapping[str, ListedModel]:
    """Every variant: of the index until the models are loaded, then of the registry, which the user may extend."""
    if "segzoo.models" not in sys.modules:
        return read_index()
    return registered()


def known_rows() -> dict[str, ListedRow]:
    """`name.tag` -> row, of every variant."""
    return {f"{name}.{tag}": row for name, model in known_models().items() for tag, row in model.rows.items()}


def check_name(name: str) -> None:
    """Refuse a mistyped name before torch is loaded; a saved model's name passes.

    Raises:
        SegzooError: no such variant or tag; the message lists close ones.
    """
    if not name.startswith(SAVED_PREFIXES):
        split_name(name, {variant: model.rows for variant, model in known_models().items()})


def split_name(name: str, known: Mapping[str, Collection[str]]) -> tuple[str, str | None]:
    """A variant or variant.tag, in any case, becomes the variant and the tag, which is None without one.

    Args:
        known: variant -> its tags.

    Raises:
        SegzooError: no such variant or tag; the message lists close ones.
    """
    wanted, _, wanted_tag = name.partition(".")
    variant = _in_any_case(wanted, known)
    if variant is None:
        close = _close_names(wanted, known)
        hint = f"; did you mean {', '.join(close)}?" if close else ";"
        raise SegzooError(f"unknown model {name!r}{hint} segzoo.list_models() lists all")
    if not wanted_tag:
        return variant, None
    tag = _in_any_case(wanted_tag, known[variant])
    if tag is None:
        tags = ", ".join(known[variant]) or "none"
        raise SegzooError(f"{variant} has no weights tagged {wanted_tag!r}; its tags: {tags}")
    return variant, tag


def _in_any_case(name: str, known: Collection[str]) -> str | None:
    """The known name that is `name`, else the one that is but for its case."""
    return name if name in known else next((other for other in known if other.lower() == name.lower()), None)


def _close_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three names that `name` may stand for: those that it is a part of, else those spelt alike."""
    names = _select(known, "*", ())
    return [other for other in names if name.lower() in other][:3] or difflib.get_close_matches(name.lower(), names)


def _select(names: Iterable[str], filter: str | Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    """Those that any wildcard of `filter` matches and none of `exclude`, in natural order."""
    names = list(names)
    include = [filter] if isinstance(filter, str) else list(filter)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    if not any(pattern.lower().lstrip("*").startswith("test") for pattern in include):
        exclude = [*exclude, f"{TEST_PREFIX}*"]
    found = [name for name in names if _matches(name, include) and not _matches(name, exclude)]
    if not found:
        _suggest_wildcards(names, include)
    return sorted(found, key=_natural_key)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _suggest_wildcards(names: Sequence[str], include: Sequence[str]) -> None:
    """Say through logging which names have a filter without wildcards as a part."""
    for pattern in include:
        part = [name for name in names if pattern.lower() in name.lower()]
        if part and not WILDCARDS & set(pattern):
            first, more = ", ".join(part[:3]), f" and {len(part) - 3} more" if len(part) > 3 else ""
            _log.warning("nothing is called %r; the filter '*%s*' finds %s%s", pattern, pattern, first, more)


def _for_any_tag(patterns: str | Sequence[str]) -> list[str]:
    """The wildcards, and each that has no dot also with any tag, as in timm."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return [*patterns, *(f"{pattern}.*" for pattern in patterns if "." not in pattern)]


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts b2 before b10: digits compare as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def registered() -> dict[str, ListedModel]:
    """Every variant that is registered at this moment, families of the user's own included, as plain data."""
    from ..models.family import VARIANTS

    return {name: _listed(name, family) for name, family in VARIANTS.items()}


def _listed(variant_name: str, family: Family) -> ListedModel:
    variant = family.variants[variant_name]
    reduction = variant.reduction if isinstance(variant.reduction, str) else None
    return ListedModel(
        family=family.name,
        params=variant.params,
        reduction=reduction,
        published=tuple({**dataclasses.asdict(cost), "size": list(cost.size)} for cost in variant.published),
        rows={
            tag: _listed_row(row, reduction or "base") for tag, row in family.pretrained.get(variant_name, {}).items()
        },
    )


def _listed_row(row: PretrainedCfg, reduction: str) -> ListedRow:
    score = row.score(reduction)
    figure = {"score": score.value, "metric": score.metric, "confirmed": bool(score.confirmed_by)} if score else {}
    own = ("score", "metric", "confirmed")
    same = [field.name for field in dataclasses.fields(ListedRow) if field.name not in own]
    return ListedRow(**{name: getattr(row, name) for name in same}, **figure)


# --- the file -------------------------------------------------------------------------------------------------------


@functools.cache
def read_index() -> Mapping[str, ListedModel]:
    """The variants that this version of segzoo ships."""
    models = {}
    for name, fields in json.loads(INDEX.read_text(encoding="utf-8")).items():
        published = tuple(fields.pop("published", ()))
        rows = {tag: ListedRow(**row) for tag, row in fields.pop("rows", {}).items()}
        models[name] = ListedModel(**fields, published=published, rows=rows)
    return models


def to_json(models: Mapping[str, ListedModel]) -> str:
    """The text of `index.json`, which leaves out what is at its default."""
    return json.dumps({name: model.changed() for name, model in models.items()}, indent=1) + "\n"


def main() -> None:
    """Write `index.json` from the registry."""
    importlib.import_module("segzoo.models")  # registers every family
    INDEX.write_text(to_json(registered()), encoding="utf-8")


if __name__ == "__main__":
    main()
