"""Options by name become fields of configs and of weights rows."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from .._errors import SegzooError
from ..models.base import Encoder
from ..models.family import VARIANTS
from ..models.rows import PretrainedCfg


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
            nested = valid[name]
            if dataclasses.is_dataclass(nested) and isinstance(value, Mapping):
                value = override(nested, value, f"{where}: {name}")
            changes[name] = tuple(value) if isinstance(value, list) else value
        elif name in of_encoder:
            flat[name] = value
        else:
            names = [*valid, *(name for name in of_encoder if name not in valid)]
            close = difflib.get_close_matches(name, [*names, "num_classes", "features_only", "checkpoint_path"], n=1)
            hint = f"did you mean {close[0]}? Options" if close else "options"
            raise SegzooError(f"{where} has no option {name!r}; {hint}: {', '.join(names)}")
    if flat and dataclasses.is_dataclass(inner := changes.get("encoder", encoder)):
        changes["encoder"] = override(inner, flat, where)
    return dataclasses.replace(cfg, **changes)


def overlay_row(row: PretrainedCfg | None, overlay: Mapping[str, Any] | None) -> PretrainedCfg | None:
    """The row with other values; one whose file comes from elsewhere forgets the size and the hash of the old file."""
    if not overlay:
        return row
    row = row or PretrainedCfg()
    source = ("file", "hf_hub_id", "hf_hub_filename", "hf_revision", "url")
    if any(name in overlay and overlay[name] != getattr(row, name) for name in source):
        overlay = {"sha256": None, "size": None, **overlay}  # those known belong to the other file
    return override(row, overlay, "pretrained_cfg_overlay")
