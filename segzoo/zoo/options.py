"""Options by name become fields of configs and of weights rows."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from .._errors import SegzooError, shown
from ..models.base import Encoder
from ..models.config import EncoderConfig, fits, type_hints
from ..models.family import VARIANTS
from ..models.features import pair
from ..models.rows import PretrainedCfg

# Options of timm's models that segzoo's have not: the value that asks for nothing, and what to do instead.
_ONLY_TIMMS: dict[str, tuple[Any, str]] = {
    "drop_rate": (0.0, "there is no dropout before the classifier of this family; leave it out"),
    "global_pool": ("avg", "an encoder's head takes the mean, and features_only=True gives the maps"),
    "scriptable": (False, "they are exported by torch.export or torch.jit.trace"),
    "exportable": (False, "they are exported by torch.export or torch.jit.trace as they are; leave it out"),
    "no_jit": (False, "nothing in them is scripted; leave it out"),
    "output_stride": (32, "the strides are those that the papers trained; choose maps by out_indices="),
}


def trained_cfg(variant_name: str, row: PretrainedCfg) -> Any:
    """The variant's config with the classes and options that the row's weights were trained with."""
    return override(
        VARIANTS[variant_name].variants[variant_name].cfg,
        {"num_classes": row.num_classes, **row.cfg_overrides},
        variant_name,
    )


def check_num_classes(num_classes: int | None, variant_name: str) -> None:
    """Raises SegzooError for what is no number of classes; 0 is one of an encoder alone, None is always right."""
    build = VARIANTS[variant_name].build
    least = 0 if isinstance(build, type) and issubclass(build, Encoder) else 1
    if num_classes is None:
        return
    if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < least:
        encoder = "; features_only=True gives its encoder alone" if least else ""
        raise SegzooError(
            f"num_classes of {variant_name} must be a whole number of at least {least}, not {num_classes!r}{encoder}"
        )


def timm_options(cfg: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as timm's callers give them, in the names of a family's config.

    `encoder` may be the name of one. `img_size` may be one number, and is left out where nothing is made for one size;
    `drop_rate` is the config's `dropout`; what asks for nothing (None where None is no value, a rate of 0,
    `scriptable=False`, ...) is left out.

    Args:
        cfg: the config that the options are for.

    Raises:
        SegzooError: what timm's models can do and these cannot; names the way out.
    """
    options = _encoder_by_name(options)
    fields = _hints_with_encoder(cfg, options.get("encoder"))
    options = {
        name: value
        for name, value in options.items()
        if value is not None or (name in fields and fits(None, fields[name]))
    }
    if "img_size" in options:
        size = pair(options.pop("img_size"))
        options |= {"img_size": size} if "img_size" in fields else {}
    if "drop_rate" in options:
        rate = options.pop("drop_rate")
        options |= {"dropout": rate} if "dropout" in fields else {"drop_rate": rate} if rate else {}
    return _without_only_timms(options)


def _encoder_by_name(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options with the config of the encoder whose name they give."""
    name = options.get("encoder")
    if not isinstance(name, str):
        return options
    configs = {variant: family.variants[variant].cfg for variant, family in VARIANTS.items()}
    if not isinstance(configs.get(name), EncoderConfig):
        names = [name for name, cfg in configs.items() if isinstance(cfg, EncoderConfig) and name[:5] != "test_"]
        raise SegzooError(f"encoder={shown(name)} is no encoder's name; encoders: {', '.join(names)}")
    return {**options, "encoder": configs[name]}


def _hints_with_encoder(cfg: Any, new_encoder: Any) -> dict[str, Any]:
    """Types of the config's fields and of those that only its nested encoder has, or the one given in its place."""
    fields = type_hints(type(cfg))
    for encoder in (getattr(cfg, "encoder", None), new_encoder):
        if dataclasses.is_dataclass(encoder):
            fields = {**type_hints(type(encoder)), **fields}
    return fields


def _without_only_timms(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that segzoo's models have; SegzooError where another one asks for something."""
    for name, (neutral, way_out) in _ONLY_TIMMS.items():
        if options.get(name, neutral) not in (neutral, ""):
            raise SegzooError(f"segzoo's models have no {name}: {way_out}")
    return {name: value for name, value in options.items() if name not in _ONLY_TIMMS}


def override(cfg: Any, overrides: Mapping[str, Any], where: str) -> Any:
    """A copy of a frozen dataclass with other values, given by name.

    Args:
        overrides: a dict replaces single fields of a nested config; a list becomes a tuple; a name that only the nested
            `encoder` has goes there.
        where: what the options belong to, for refusals.

    Raises:
        SegzooError: a name that there is not (the message lists the valid ones), or a value that the config refuses.
    """
    valid = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    encoder = overrides.get("encoder")
    encoder = encoder if dataclasses.is_dataclass(encoder) else valid.get("encoder")
    of_encoder = [field.name for field in dataclasses.fields(encoder)] if dataclasses.is_dataclass(encoder) else []
    changes: dict[str, Any] = {}
    flat: dict[str, Any] = {}  # options of the encoder, set in one step, since one may need another
    for name, value in overrides.items():
        if name in valid:
            changes[name] = _new_value(valid[name], value, f"{where}: {name}")
        elif name in of_encoder:
            flat[name] = value
        else:
            raise _no_option(name, [*valid, *(name for name in of_encoder if name not in valid)], where)
    if flat and dataclasses.is_dataclass(inner := changes.get("encoder", encoder)):
        changes["encoder"] = override(inner, flat, where)
    return dataclasses.replace(cfg, **changes)


def _new_value(old: Any, value: Any, where: str) -> Any:
    """What a field that was `old` becomes: a nested config with single fields replaced, a tuple for a list."""
    if dataclasses.is_dataclass(old) and isinstance(value, Mapping):
        return override(old, value, where)
    return tuple(value) if isinstance(value, list) else value


def _no_option(name: str, names: Sequence[str], where: str) -> SegzooError:
    close = difflib.get_close_matches(name, [*names, "num_classes", "features_only", "checkpoint_path"], n=1)
    hint = f"did you mean {close[0]}? Options" if close else "options"
    return SegzooError(f"{where} has no option {name!r}; {hint}: {', '.join(names)}")


def overlay_row(row: PretrainedCfg | None, overlay: Mapping[str, Any] | None) -> PretrainedCfg | None:
    """The row with other values; one whose file comes from elsewhere forgets the size and the hash of the old file."""
    if not overlay:
        return row
    row = row or PretrainedCfg()
    source = ("file", "hf_hub_id", "hf_hub_filename", "hf_revision", "url", "drive_folder", "drive_files")
    if any(name in overlay and overlay[name] != getattr(row, name) for name in source):
        overlay = {"sha256": None, "size": None, **overlay}  # those known belong to the other file
    return override(row, overlay, "pretrained_cfg_overlay")
