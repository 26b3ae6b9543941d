"""Names, variants and weight tags: `create_model`, `list_models`, `list_pretrained`, `model_info`."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from .._errors import SegzooError, WeightsError
from ._base import Encoder, FeaturePyramid, Model, SegmentationModel
from ._checkpoint import build_with_weights, load_weights
from ._config import read_config, register_configs
from ._pretrained import PretrainedCfg
from ._weights import load_row, saved_files, say_terms


@dataclasses.dataclass(frozen=True)
class PublishedCost:
    """A figure of the paper: multiply-accumulates in units of 1e9 and parameters in units of 1e6."""

    size: tuple[int, int]  # input (H, W) in pixels
    gmacs: float
    params_m: float | None = None
    reduction: str = "base"  # preset
    num_classes: int | None = None  # None: the variant's own


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a family's `VARIANTS`: its config, its parameter count and the paper's figures."""

    cfg: Any  # frozen dataclass of the family
    params: int | None = None  # exact parameter count; None for the tiny test variants
    published: tuple[PublishedCost, ...] = ()
    reduction: Any = None  # plan that belongs to the name itself


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family file registers."""

    name: str
    build: Callable[[Any], Model]  # config -> model; of a family of encoders, their class
    variants: Mapping[str, Variant]
    pretrained: Mapping[str, Mapping[str, PretrainedCfg]]  # variant -> tag -> row; the first row is the default


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


_FAMILIES: dict[str, Family] = {}
_VARIANTS: dict[str, Family] = {}  # variant name -> its family


def register_family(family: Family) -> None:
    """Make a family's variants known. Called once, at the end of the family's file."""
    taken = sorted(set(family.variants) & set(_VARIANTS))
    if taken:
        raise SegzooError(f"family {family.name}: {', '.join(taken)} already registered")
    _FAMILIES[family.name] = family
    _VARIANTS.update(dict.fromkeys(family.variants, family))
    register_configs({name: variant.cfg for name, variant in family.variants.items()})


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_path_rate: float | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **cfg_overrides: Any,
) -> Model | FeaturePyramid:
    """Build a model by name, optionally with weights.

    Args:
        name: "variant" or "variant.tag" (see `list_models`, `list_pretrained`). A tag sets the number of classes
            and the options that its weights were trained with, also when the weights themselves are not loaded.
            "local-dir:/path" and "hf-hub:org/name@revision" are models saved by `save_pretrained` or
            `push_to_hub`; they always come with their weights, dtype and reduction.
        pretrained: load the weights of the tag; without a tag, the first row whose weights can be loaded.
        checkpoint_path: local file to load instead: segzoo's own or an official one.
        num_classes: other than the weights' number renews the classifier; an encoder with 0 has no head.
        in_chans: input channels, 3 unless a saved model has others; weights of the first convolution are summed (1)
            or tiled and rescaled (others).
        drop_path_rate: stochastic depth of the encoder's last block.
        features_only: return the encoder as a `FeaturePyramid`, whose forward gives the list of maps.
        out_indices: with `features_only`, which maps (0 = finest).
        pretrained_cfg_overlay: fields of the weights row to replace, for example {"sha256": ...}.
        **cfg_overrides: fields of the family's config; a dict replaces single fields of a nested config.

    Raises:
        SegzooError: an unknown name, tag, option or value of a row's field (the message lists the valid ones), or a
            number of classes that the model cannot have.
        WeightsError: weights that are not published, missing, corrupt or of another model.
    """
    if drop_path_rate is not None:
        cfg_overrides["drop_path_rate"] = drop_path_rate
    if in_chans is not None:
        cfg_overrides["in_chans"] = in_chans
    if name.startswith(("local-dir:", "hf-hub:")):
        if checkpoint_path is not None:
            raise SegzooError(
                f"{name} comes with its weights; leave out checkpoint_path, or build the model by its name"
            )
        model = _create_saved(name, num_classes, pretrained_cfg_overlay, cfg_overrides)
    else:
        model = _create_named(name, pretrained, checkpoint_path, num_classes, pretrained_cfg_overlay, cfg_overrides)
    if not features_only:
        if out_indices is not None:
            raise SegzooError("out_indices needs features_only=True")
        return model
    encoder = model.encoder if isinstance(model, SegmentationModel) else model
    encoder.reset_classifier(0)
    return FeaturePyramid(encoder=encoder, out_indices=out_indices)


def _create_named(
    name: str,
    pretrained: bool,
    checkpoint_path: str | Path | None,
    num_classes: int | None,
    overlay: Mapping[str, Any] | None,
    cfg_overrides: Mapping[str, Any],
) -> Model:
    variant_name, tag = _parse_name(name)
    family = _VARIANTS[variant_name]
    variant = family.variants[variant_name]
    rows = family.pretrained.get(variant_name, {})
    _check_num_classes(num_classes, variant_name)
    if pretrained and tag is None:
        tag = _default_tag(rows)
        if tag is None:
            raise SegzooError(f"{variant_name} has no weights; leave out pretrained=True")
    row = _overlay(rows[tag] if tag else next(iter(rows.values()), None), overlay)

    trained_cfg = _trained_cfg(variant_name, row) if tag else variant.cfg
    cfg = _override(trained_cfg, cfg_overrides, variant_name)
    if pretrained and checkpoint_path is None:
        model = load_row(lambda: family.build(cfg), f"{variant_name}.{tag}", row, trained_cfg)
        if num_classes is not None and num_classes != cfg.num_classes:
            model.reset_classifier(num_classes)
    else:
        if num_classes is not None:
            cfg = _override(cfg, {"num_classes": num_classes}, variant_name)
        model = family.build(cfg)
        if checkpoint_path is not None:
            load_weights(model, checkpoint_path, renew_classifier=num_classes is not None, adapt_in_chans=True)
    model.name = f"{variant_name}.{tag}" if tag else variant_name
    model.pretrained_cfg = row
    if variant.reduction is not None:
        model.set_inference_reduction(variant.reduction)
    return model


def _create_saved(
    name: str, num_classes: int | None, overlay: Mapping[str, Any] | None, cfg_overrides: Mapping[str, Any]
) -> Model:
    config, weights = saved_files(name)
    saved = read_config(config)
    _check_num_classes(num_classes, saved.variant)
    row = _overlay(saved.pretrained_cfg, overlay)
    if row is not None:
        say_terms(name, row)
    cfg = _override(saved.cfg, cfg_overrides, saved.variant)
    family = _VARIANTS[saved.variant]

    def build() -> Model:
        try:
            return family.build(cfg).to(saved.dtype)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            given = " with the options given" if cfg_overrides else ""
            raise WeightsError(f"{config}{given} describes no model that can be built: {error}") from error

    model = build_with_weights(build, weights, keep_mapped=name.startswith("hf-hub:"))
    if num_classes is not None and num_classes != cfg.num_classes:
        model.reset_classifier(num_classes)
    model.name = saved.name
    model.pretrained_cfg = row
    if saved.reduction is not None:
        try:
            model.set_inference_reduction(saved.reduction, during_training=saved.during_training)
        except SegzooError as error:
            raise WeightsError(f"{config}: {error}") from None
    return model


def list_models(
    filter: str | Sequence[str] = "*",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = (),
) -> list[str]:
    """Names in natural order. With `pretrained`, `name.tag` of the rows whose weights can be loaded.

    Args:
        filter: wildcard or wildcards, such as "edaformer*"; a name is listed if any matches.
        exclude_filters: wildcard or wildcards of names to leave out.
    """
    names = [name for name, row in _rows() if row.loadable] if pretrained else list(_VARIANTS)
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
    """What is known about "variant" or "variant.tag" without building it; without a tag, its default row."""
    variant_name, tag = _parse_name(name)
    family = _VARIANTS[variant_name]
    variant = family.variants[variant_name]
    rows = family.pretrained.get(variant_name, {})
    tag = tag or _default_tag(rows)
    return ModelInfo(
        name=variant_name,
        tag=tag,
        family=family.name,
        cfg=_trained_cfg(variant_name, rows[tag]) if tag else variant.cfg,
        params=variant.params,
        published=variant.published,
        pretrained_cfg=rows.get(tag),
        tags=tuple(rows),
    )


def variant_of(name: str) -> Variant:
    """The row of `VARIANTS` behind "variant" or "variant.tag"."""
    variant_name, _ = _parse_name(name)
    return _VARIANTS[variant_name].variants[variant_name]


def _default_tag(rows: Mapping[str, PretrainedCfg]) -> str | None:
    """The first whose weights can be loaded, else the first; None if there are none."""
    return next((tag for tag, row in rows.items() if row.loadable), next(iter(rows), None))


def _trained_cfg(variant_name: str, row: PretrainedCfg) -> Any:
    """The variant's config with the classes and options that the row's weights were trained with."""
    return _override(variant_of(variant_name).cfg, {"num_classes": row.num_classes, **row.cfg_overrides}, variant_name)


def _check_num_classes(num_classes: int | None, variant_name: str) -> None:
    build = _VARIANTS[variant_name].build
    least = 0 if isinstance(build, type) and issubclass(build, Encoder) else 1
    if num_classes is None:
        return
    if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < least:
        encoder = "; features_only=True gives its encoder alone" if least else ""
        raise SegzooError(
            f"num_classes of {variant_name} must be a whole number of at least {least}, not {num_classes!r}{encoder}"
        )


def _rows() -> Iterator[tuple[str, PretrainedCfg]]:
    for family in _FAMILIES.values():
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


def _parse_name(name: str) -> tuple[str, str | None]:
    variant, _, tag = name.partition(".")
    if variant not in _VARIANTS:
        close = difflib.get_close_matches(variant, _VARIANTS, n=3) or list_models(exclude_filters="test_*")
        raise SegzooError(f"unknown model {name!r}; did you mean {', '.join(close)}? segzoo.list_models() lists all")
    if not tag:
        return variant, None
    tags = _VARIANTS[variant].pretrained.get(variant, {})
    if tag not in tags:
        raise SegzooError(f"{variant} has no weights tagged {tag!r}; its tags: {', '.join(tags) or 'none'}")
    return variant, tag


def _override(cfg: Any, overrides: Mapping[str, Any], where: str) -> Any:
    """`dataclasses.replace` that refuses unknown names with the valid ones, and goes into nested configs by dict."""
    valid = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    changes = {}
    for name, value in overrides.items():
        if name not in valid:
            close = difflib.get_close_matches(name, [*valid, "num_classes", "features_only", "checkpoint_path"], n=1)
            hint = f"did you mean {close[0]}? Options" if close else "options"
            raise SegzooError(f"{where} has no option {name!r}; {hint}: {', '.join(valid)}")
        nested = valid[name]
        if dataclasses.is_dataclass(nested) and isinstance(value, Mapping):
            value = _override(nested, value, f"{where}: {name}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(cfg, **changes)


def _overlay(row: PretrainedCfg | None, overlay: Mapping[str, Any] | None) -> PretrainedCfg | None:
    if not overlay:
        return row
    row = row or PretrainedCfg()
    source = ("file", "hf_hub_id", "hf_hub_filename", "hf_revision", "url")
    if any(name in overlay and overlay[name] != getattr(row, name) for name in source):
        overlay = {"sha256": None, "size": None, **overlay}  # those known belong to the other file
    return _override(row, overlay, "pretrained_cfg_overlay")
