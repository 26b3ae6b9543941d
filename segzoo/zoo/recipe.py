"""A name becomes a model in two steps: `resolve` decides everything and fetches the weights, `assemble` builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

from .._errors import SegzooError, UnreadableError, WeightsError
from ..models.base import Encoder, FeaturePyramid, Model, WeightsState
from ..models.family import VARIANTS
from ..models.rows import PretrainedCfg
from ..models.segmenter import SegmentationModel
from .checkpoint import WeightsFile, build_with_weights, load_weights
from .config import SavedConfig, read_config
from .download import row_file, saved_config_file, saved_files, say_terms
from .download.cache import caching_in
from .index import SAVED_PREFIXES, is_model
from .names import default_tag, parse_name, rows_of
from .options import check_num_classes, overlay_row, override, timm_options, trained_cfg


@overload
def create_model(
    model_name: str,
    pretrained: bool = ...,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = ...,
    pretrained_cfg_overlay: Mapping[str, Any] | None = ...,
    checkpoint_path: str | Path | None = ...,
    *,
    num_classes: int | None = ...,
    in_chans: int | None = ...,
    features_only: Literal[False] = ...,
    out_indices: None = ...,
    force_download: bool = ...,
    cache_dir: str | Path | None = ...,
    **cfg_overrides: Any,
) -> Model: ...


@overload
def create_model(
    model_name: str,
    pretrained: bool = ...,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = ...,
    pretrained_cfg_overlay: Mapping[str, Any] | None = ...,
    checkpoint_path: str | Path | None = ...,
    *,
    num_classes: int | None = ...,
    in_chans: int | None = ...,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = ...,
    force_download: bool = ...,
    cache_dir: str | Path | None = ...,
    **cfg_overrides: Any,
) -> FeaturePyramid: ...


def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint_path: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    force_download: bool = False,
    cache_dir: str | Path | None = None,
    **cfg_overrides: Any,
) -> Model | FeaturePyramid:
    """Build a model by name, optionally with weights. Names and order of the arguments are timm's.

    >>> import segzoo
    >>> model = segzoo.create_model("test_segformer", num_classes=19)  # the tiny ones are called test_*
    >>> model.get_classifier().out_channels
    19
    >>> pyramid = segzoo.create_model("mit_b0", features_only=True)
    >>> [info["num_chs"] for info in pyramid.feature_info]
    [32, 64, 160, 256]

    Args:
        model_name: "variant" or "variant.tag" (see `list_models`, `list_pretrained`). A tag sets the number of classes
            and the options that its weights were trained with, also when the weights themselves are not loaded.
            "local-dir:/path" and "hf-hub:org/name@revision" are models saved by `save_pretrained` or
            `push_to_hub`; they always come with their weights, dtype and reduction.
        pretrained: load the weights of the tag; without a tag, the first row whose weights can be loaded.
        pretrained_cfg: a tag in place of the name's, a weights row in place of the tag's, or single fields of it.
        pretrained_cfg_overlay: fields of the weights row to replace, for example {"sha256": ...}.
        checkpoint_path: local file to load instead: segzoo's own or an official one.
        num_classes: other than the weights' number renews the classifier; an encoder with 0 has no head.
        in_chans: input channels, 3 unless a saved model has others; weights of the first convolution are summed (1)
            or tiled and rescaled (others).
        features_only: return the encoder as a `FeaturePyramid`, whose forward gives the list of maps.
        out_indices: with `features_only`, which maps (0 = finest); a number n means the last n.
        force_download: fetch the weights anew even if they are in the cache.
        cache_dir: folder in which this call keeps and looks for files of every source, instead of those of the
            environment (HF_HOME, SEGZOO_CACHE).
        **cfg_overrides: fields of the family's config, such as `drop_path_rate`; a dict replaces single fields of a
            nested config. What timm's models take is understood or refused by name (see `zoo.options.timm_options`),
            and an option that is None and cannot be None is as if not given.

    Raises:
        SegzooError: an unknown name, tag, option or value of a row's field (the message lists the valid ones), or a
            number of classes that the model cannot have.
        WeightsError: weights that are not published, missing, corrupt or of another model.
    """
    name, row, fields = _with_cfg(model_name, pretrained_cfg)
    request = Request(
        name=name,
        pretrained=pretrained,
        checkpoint_path=checkpoint_path or None,  # timm's script says "" for none
        num_classes=num_classes,
        row=row,
        overlay={**fields, **(pretrained_cfg_overlay or {})},
        force_download=force_download,
        options=cfg_overrides if in_chans is None else {**cfg_overrides, "in_chans": in_chans},
    )
    with caching_in(cache_dir):
        model = assemble(resolve(request))
    if features_only:
        encoder = model.encoder if isinstance(model, SegmentationModel) else model
        assert isinstance(encoder, Encoder)  # a family is one or the other
        encoder.reset_classifier(0)
        encoder.pretrained_cfg = model.pretrained_cfg
        return FeaturePyramid(encoder=encoder, out_indices=out_indices)
    if out_indices is not None:
        raise SegzooError("out_indices needs features_only=True")
    return model


def blueprint(name: str, *, num_classes: int | None = None, options: Mapping[str, Any] | None = None) -> Model:
    """The model of any kind of name on the meta device, without its weights; of a saved one only the config is fetched.

    Args and Raises as `create_model`, whose other options are `options`. The model of "variant" alone is that of its
    default weights.
    """
    request = Request(name=name, num_classes=num_classes, options=options or {})
    if name.startswith(SAVED_PREFIXES):
        recipe = _of_config(request, saved_config_file(name), None)
    else:
        variant_name, tag = parse_name(name)
        tag = tag or default_tag(rows_of(variant_name))
        recipe = _registered(dataclasses.replace(request, name=f"{variant_name}.{tag}" if tag else variant_name))
    with torch.device("meta"):
        return assemble(recipe)


def _with_cfg(
    name: str, pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None
) -> tuple[str, PretrainedCfg | None, Mapping[str, Any]]:
    """The name with the tag that `pretrained_cfg` says, the row that it is, or the fields of a row that it gives."""
    if isinstance(pretrained_cfg, PretrainedCfg):
        return name, pretrained_cfg, {}
    if isinstance(pretrained_cfg, Mapping):
        return name, None, pretrained_cfg
    if pretrained_cfg is None or pretrained_cfg == "":
        return name, None, {}
    tagged = f"{name.partition('.')[0]}.{pretrained_cfg}"
    if not isinstance(pretrained_cfg, str) or name.startswith(SAVED_PREFIXES) or not is_model(tagged):
        raise SegzooError(
            f"pretrained_cfg={pretrained_cfg!r} is no tag of {name}; give one, a PretrainedCfg or a dict of its "
            "fields, and a file as checkpoint_path="
        )
    return tagged, None, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `create_model` was asked for; fields as its arguments."""

    name: str
    pretrained: bool = False
    checkpoint_path: str | Path | None = None
    num_classes: int | None = None
    row: PretrainedCfg | None = None  # in place of the one that the name stands for
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
    weights_state: WeightsState = "pretrained"  # what the weights of the source are
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
    # Without a row, the preprocessing that segzoo falls back to, so that timm's functions find one.
    model.pretrained_cfg = recipe.row or PretrainedCfg(num_classes=model.num_classes)
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
    model = build_with_weights(lambda: recipe.build(recipe.cfg), path, keep_mapped=keep_mapped)
    model.mark_loaded(recipe.weights_state)
    return model


def _with_origin(error: WeightsError, recipe: Recipe, origin: str) -> WeightsError:
    renew = "; delete it, or pass force_download=True, to fetch it again" if isinstance(error, UnreadableError) else ""
    return WeightsError(f"{recipe.name}: {error}. It came from {origin}{renew}")


def _registered(request: Request) -> Recipe:
    """Of "variant" or "variant.tag"."""
    variant_name, tag = parse_name(request.name)
    family = VARIANTS[variant_name]
    variant, rows = family.variants[variant_name], rows_of(variant_name)
    check_num_classes(request.num_classes, variant_name)
    tag = _tag_or_default(tag, request, variant_name, rows)
    name = f"{variant_name}.{tag}" if tag else variant_name
    named = rows[tag] if tag else next(iter(rows.values()), None)
    row = named if request.row is None else request.row
    row = overlay_row(row, request.overlay)
    trained = trained_cfg(variant_name, row) if row is not None and (tag or request.row is not None) else variant.cfg
    cfg = override(trained, timm_options(trained, request.options), variant_name)
    source = _source(request, name, row, trained)
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


def _tag_or_default(
    tag: str | None, request: Request, variant_name: str, rows: Mapping[str, PretrainedCfg]
) -> str | None:
    """The tag of the name, else the one that pretrained=True stands for."""
    if request.pretrained and tag is None and request.row is None:
        tag = default_tag(rows)
        if tag is None:
            raise WeightsError(
                f"{variant_name} has no weights; give your own as checkpoint_path=, or leave out pretrained=True"
            )
    return tag


def _source(request: Request, name: str, row: PretrainedCfg | None, trained: Any) -> WeightsFile | None:
    """The file of a registered model's weights, fetched if it is the row's."""
    if request.checkpoint_path is not None:
        return WeightsFile(request.checkpoint_path, by_hand=True)
    if request.pretrained and row is not None:
        return row_file(name, row, trained, force=request.force_download)
    return None


def _saved(request: Request) -> Recipe:
    """Of "local-dir:/path" or "hf-hub:org/name@revision"."""
    if request.checkpoint_path is not None:
        raise SegzooError(
            f"{request.name} comes with its weights; leave out checkpoint_path, or build the model by its name"
        )
    recipe = _of_config(request, *saved_files(request.name, force=request.force_download))
    if recipe.row is not None:
        say_terms(request.name, recipe.row)
    return recipe


def _of_config(request: Request, config_file: Path, source: WeightsFile | None) -> Recipe:
    """Of a saved model's config.json."""
    saved = read_config(config_file)
    check_num_classes(request.num_classes, saved.variant)
    row = overlay_row(saved.pretrained_cfg if request.row is None else request.row, request.overlay)
    return Recipe(
        name=saved.name,
        build=_builder_of(saved, f"{config_file} with the options given" if request.options else f"{config_file}"),
        cfg=override(saved.cfg, timm_options(saved.cfg, request.options), saved.variant),
        source=source,
        weights_state=saved.weights_state,
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
