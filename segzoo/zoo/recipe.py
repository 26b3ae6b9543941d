"""A name becomes a model: `create_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import SegzooError, WeightsError
from ..models.base import FeaturePyramid, Model, SegmentationModel
from ..models.family import VARIANTS
from .checkpoint import build_with_weights, load_weights
from .config import read_config
from .download import load_row, saved_files, say_terms
from .names import default_tag, parse_name
from .options import check_num_classes, overlay_row, override, trained_cfg


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
    variant_name, tag = parse_name(name)
    family = VARIANTS[variant_name]
    variant = family.variants[variant_name]
    rows = family.pretrained.get(variant_name, {})
    check_num_classes(num_classes, variant_name)
    if pretrained and tag is None:
        tag = default_tag(rows)
        if tag is None:
            raise SegzooError(f"{variant_name} has no weights; leave out pretrained=True")
    row = overlay_row(rows[tag] if tag else next(iter(rows.values()), None), overlay)

    own_cfg = trained_cfg(variant_name, row) if tag else variant.cfg
    cfg = override(own_cfg, cfg_overrides, variant_name)
    if pretrained and checkpoint_path is None:
        model = load_row(lambda: family.build(cfg), f"{variant_name}.{tag}", row, own_cfg)
        if num_classes is not None and num_classes != cfg.num_classes:
            model.reset_classifier(num_classes)
    else:
        if num_classes is not None:
            cfg = override(cfg, {"num_classes": num_classes}, variant_name)
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
    check_num_classes(num_classes, saved.variant)
    row = overlay_row(saved.pretrained_cfg, overlay)
    if row is not None:
        say_terms(name, row)
    cfg = override(saved.cfg, cfg_overrides, saved.variant)
    family = VARIANTS[saved.variant]

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
