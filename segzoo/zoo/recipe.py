"""A name becomes a model in two steps: `resolve` decides everything and fetches the weights, `assemble` builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from .._errors import SegzooError, UnreadableError, WeightsError
from ..models.base import Encoder, FeaturePyramid, Model, SegmentationModel
from ..models.family import VARIANTS
from ..models.rows import PretrainedCfg
from .checkpoint import WeightsFile, build_with_weights, load_weights
from .config import SavedConfig, read_config
from .download import row_file, saved_files, say_terms
from .index import SAVED_PREFIXES
from .names import default_tag, parse_name, rows_of
from .options import check_num_classes, overlay_row, override, trained_cfg


@overload
def create_model(
    name: str,
    pretrained: bool = ...,
    checkpoint_path: str | Path | None = ...,
    num_classes: int | None = ...,
    in_chans: int | None = ...,
    drop_path_rate: float | None = ...,
    features_only: Literal[False] = ...,
    out_indices: None = ...,
    pretrained_cfg_overlay: Mapping[str, Any] | None = ...,
    force_download: bool = ...,
    **cfg_overrides: Any,
) -> Model: ...


@overload
def create_model(
    name: str,
    pretrained: bool = ...,
    checkpoint_path: str | Path | None = ...,
    num_classes: int | None = ...,
    in_chans: int | None = ...,
    drop_path_rate: float | None = ...,
    *,
    features_only: Literal[True],
    out_indices: Sequence[int] | None = ...,
    pretrained_cfg_overlay: Mapping[str, Any] | None = ...,
    force_download: bool = ...,
    **cfg_overrides: Any,
) -> FeaturePyramid: ...


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
    force_download: bool = False,
    **cfg_overrides: Any,
) -> Model | FeaturePyramid:
    """Build a model by name, optionally with weights.

    >>> import segzoo
    >>> model = segzoo.create_model("test_segformer", num_classes=19)  # the tiny ones are called test_*
    >>> model.get_classifier().out_channels
    19
    >>> pyramid = segzoo.create_model("mit_b0", features_only=True)
    >>> [info["num_chs"] for info in pyramid.feature_info]
    [32, 64, 160, 256]

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
        force_download: fetch the weights anew even if they are in the cache.
        **cfg_overrides: fields of the family's config; a dict replaces single fields of a nested config.

    Raises:
        SegzooError: an unknown name, tag, option or value of a row's field (the message lists the valid ones), or a
            number of classes that the model cannot have.
        WeightsError: weights that are not published, missing, corrupt or of another model.
    """
    flat = {"drop_path_rate": drop_path_rate, "in_chans": in_chans}
    request = Request(
        name=name,
        pretrained=pretrained,
        checkpoint_path=checkpoint_path,
        num_classes=num_classes,
        overlay=pretrained_cfg_overlay or {},
        force_download=force_download,
        options={**cfg_overrides, **{option: value for option, value in flat.items() if value is not None}},
    )
    model = assemble(resolve(request))
    if features_only:
        encoder = model.encoder if isinstance(model, SegmentationModel) else model
        assert isinstance(encoder, Encoder)  # a family is one or the other
        encoder.reset_classifier(0)
        return FeaturePyramid(encoder=encoder, out_indices=out_indices)
    if out_indices is not None:
        raise SegzooError("out_indices needs features_only=True")
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `create_model` was asked for; fields as its arguments."""

    name: str
    pretrained: bool = False
    checkpoint_path: str | Path | None = None
    num_classes: int | None = None
    overlay: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of the weights row
    force_download: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of the family's config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a model, before any of it is built; files are on this machine."""

    name: str  # of the model: "variant" or "variant.tag"
    build: Callable[[Any], Model]  # config -> model
    cfg: Any  # the family's config that the weights are loaded into
    source: WeightsFile | None  # None: as drawn
    row: PretrainedCfg | None
    num_classes: int | None = None  # None: as `cfg`; another number than its renews the classifier after loading
    plan: Any = None  # reduction that belongs to the name; None: neutral
    during_training: bool = False  # the plan holds in training mode, too
    config_file: Path | None = None  # of a saved model: what refusals of its own settings name


def resolve(request: Request) -> Recipe:
    """Any kind of name becomes its recipe; weights that are wanted are downloaded. Raises as `create_model`."""
    return _saved(request) if request.name.startswith(SAVED_PREFIXES) else _registered(request)


def assemble(recipe: Recipe) -> Model:
    """Build, load, set the classes and the reduction, and say what it is."""
    model = _filled(recipe)
    if recipe.num_classes not in (None, model.num_classes):
        model.reset_classifier(recipe.num_classes)
    model.name = recipe.name
    model.pretrained_cfg = recipe.row
    if recipe.plan is not None:
        try:
            model.set_inference_reduction(recipe.plan, during_training=recipe.during_training)
        except SegzooError as error:
            if recipe.config_file is None:
                raise
            raise WeightsError(f"{recipe.config_file}: {error}") from None
    return model


def _filled(recipe: Recipe) -> Model:
    """The model with its parameters: as drawn, or those of the file."""
    source = recipe.source
    if source is None:
        return recipe.build(recipe.cfg)
    if source.by_hand:
        model = recipe.build(recipe.cfg)
        load_weights(model, source.path, renew_classifier=recipe.num_classes is not None, adapt_in_chans=True)
        return model
    try:
        return _from_file(recipe, Path(source.path), source.keep_mapped)
    except WeightsError as error:
        if source.origin is None:
            raise
        unreadable = isinstance(error, UnreadableError)
        path = source.again(Path(source.path), error) if unreadable and source.again else None
        if path is None:
            raise _with_origin(error, recipe, source.origin) from error
    try:
        return _from_file(recipe, path, source.keep_mapped)
    except WeightsError as error:
        raise _with_origin(error, recipe, source.origin) from error


def _from_file(recipe: Recipe, path: Path, keep_mapped: bool) -> Model:
    return build_with_weights(lambda: recipe.build(recipe.cfg), path, keep_mapped=keep_mapped)


def _with_origin(error: WeightsError, recipe: Recipe, origin: str) -> WeightsError:
    renew = "; delete it, or pass force_download=True, to fetch it again" if isinstance(error, UnreadableError) else ""
    return WeightsError(f"{recipe.name}: {error}. It came from {origin}{renew}")


def _registered(request: Request) -> Recipe:
    """Of "variant" or "variant.tag"."""
    variant_name, tag = parse_name(request.name)
    family = VARIANTS[variant_name]
    variant, rows = family.variants[variant_name], rows_of(variant_name)
    check_num_classes(request.num_classes, variant_name)
    if request.pretrained and tag is None:
        tag = default_tag(rows)
        if tag is None:
            raise SegzooError(f"{variant_name} has no weights; leave out pretrained=True")
    name = f"{variant_name}.{tag}" if tag else variant_name
    row = overlay_row(rows[tag] if tag else next(iter(rows.values()), None), request.overlay)
    trained = trained_cfg(variant_name, row) if tag and row else variant.cfg
    cfg = override(trained, request.options, variant_name)
    if request.checkpoint_path is not None:
        source = WeightsFile(request.checkpoint_path, by_hand=True)
    else:
        source = row_file(name, row, trained, force=request.force_download) if request.pretrained and row else None
    if request.num_classes is not None and (source is None or source.by_hand):
        cfg = override(cfg, {"num_classes": request.num_classes}, variant_name)
    return Recipe(
        name=name,
        build=family.build,
        cfg=cfg,
        source=source,
        row=row,
        num_classes=request.num_classes,
        plan=variant.reduction,
    )


def _saved(request: Request) -> Recipe:
    """Of "local-dir:/path" or "hf-hub:org/name@revision"."""
    if request.checkpoint_path is not None:
        raise SegzooError(
            f"{request.name} comes with its weights; leave out checkpoint_path, or build the model by its name"
        )
    config_file, source = saved_files(request.name, force=request.force_download)
    saved = read_config(config_file)
    check_num_classes(request.num_classes, saved.variant)
    row = overlay_row(saved.pretrained_cfg, request.overlay)
    if row is not None:
        say_terms(request.name, row)
    return Recipe(
        name=saved.name,
        build=_builder_of(saved, f"{config_file} with the options given" if request.options else f"{config_file}"),
        cfg=override(saved.cfg, request.options, saved.variant),
        source=source,
        row=row,
        num_classes=request.num_classes,
        plan=saved.reduction,
        during_training=saved.during_training,
        config_file=config_file,
    )


def _builder_of(saved: SavedConfig, where: str) -> Callable[[Any], Model]:
    """config -> model in the saved dtype; a config that fits no model is the file's fault and refused by its name."""

    def build(cfg: Any) -> Model:
        try:
            return VARIANTS[saved.variant].build(cfg).to(saved.dtype)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise WeightsError(f"{where} describes no model that can be built: {error}") from error

    return build
