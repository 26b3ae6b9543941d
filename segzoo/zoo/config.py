"""`config.json` beside saved weights: what a model is, as plain JSON, and back.

The top-level keys are timm's, so that its tools can read the file; everything that timm has no key for is in the
"segzoo" block, since timm refuses unknown keys inside `pretrained_cfg`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._errors import SegzooError, WeightsError, first_line, shown
from .._version import __version__
from ..layers.reduction import entry_to_json, parse_entry
from ..models.base import WEIGHTS_STATES, WeightsState
from ..models.family import FAMILIES, VARIANTS
from ..models.fields import choices, describe, fits, type_hints
from ..models.rows import PretrainedCfg, PublishedScore, label_names
from ..plans import current_plan, reduction_sites

if TYPE_CHECKING:
    from ..models.base import Model

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1  # raised when a reader of the old form would misunderstand the new one
DTYPES = ("float32", "float16", "bfloat16", "float64")
MAX_BYTES = 2 << 20  # of a config.json; one with the names of a thousand classes has 40,000
MAX_NESTED = 32

# Of a weights row, where its file was and how the row differs from the variant: neither holds for the saved model.
SOURCE_FIELDS = frozenset(
    ("state", "file", "hf_hub_id", "hf_hub_filename", "hf_revision", "url", "drive_folder", "drive_files", "sha256")
) | {"size", "how_to_get", "cfg_overrides"}


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """What `config.json` says about a saved model."""

    name: str  # "variant" or "variant.tag", as `Model.name`; the tag need not be one that this version knows
    cfg: Any  # the family's config, with the saved model's num_classes and in_chans
    dtype: torch.dtype  # of the parameters
    pretrained_cfg: PretrainedCfg | None  # preprocessing, test protocol and terms
    reduction: dict[str, Any] | None  # plan in force, site -> entry in JSON form; None: neutral
    during_training: bool = False  # the plan is in force in training mode, too
    weights_state: WeightsState = "pretrained"  # what older files, which do not say, are taken for

    @property
    def variant(self) -> str:
        return self.name.partition(".")[0]


# --- to JSON --------------------------------------------------------------------------------------------------------


def config_to_dict(model: Model, row: PretrainedCfg | None = None) -> dict[str, Any]:
    """`config.json` of a model from `create_model`, as plain data.

    Args:
        row: what to record about the weights, if other than the model's own row.

    Raises:
        SegzooError: a model that has no name, mixes dtypes, or has options that JSON cannot hold.
    """
    variant = model.name.partition(".")[0]
    if variant not in VARIANTS:
        raise SegzooError(f"this {type(model).__name__} has no registered name; build it with segzoo.create_model")
    row = row or model.pretrained_cfg
    plan = current_plan(model)
    config = {
        "architecture": variant,
        "num_classes": model.num_classes,
        "num_features": model.feature_info[-1]["num_chs"],
        "pretrained_cfg": _timm_cfg(model, row or PretrainedCfg()),
        "segzoo": {
            "version": FORMAT_VERSION,
            "segzoo_version": __version__,
            "name": model.name,
            "dtype": _dtype(model),
            "weights_state": model.weights_state,
            "cfg": _cfg_to_json(model.cfg),
            "in_chans": model.in_chans,
            "pretrained_cfg": _row_to_json(row) if row else None,
            "labels": label_names(row, model.num_classes),
            "reduction": None if plan.is_neutral else {site: entry_to_json(entry) for site, entry in plan.items()},
            "reduction_during_training": any(
                leaf.during_training for leaves in reduction_sites(model).values() for leaf in leaves
            ),
        },
    }
    try:
        text = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SegzooError(f"{model.name} has an option that config.json cannot hold: {error}") from None
    if read_config(json.loads(text)).cfg != model.cfg:
        raise SegzooError(f"{model.name} has options that do not come back from config.json unchanged: {model.cfg}")
    return config


def _dtype(model: Model) -> str:
    found = {str(p.dtype).removeprefix("torch.") for p in model.state_dict().values() if p.is_floating_point()}
    if len(found) > 1 or not found <= set(DTYPES):
        raise SegzooError(
            f"{model.name} holds {' and '.join(sorted(found))}; make it one of {', '.join(DTYPES)} with model.to()"
        )
    return found.pop()


def _timm_cfg(model: Model, row: PretrainedCfg) -> dict[str, Any]:
    """Only keys of timm's own `PretrainedCfg`."""
    cfg = {**model.default_cfg, **row, "custom_load": False, "num_classes": model.num_classes}
    cfg["input_size"] = (model.in_chans, *row.input_size)
    del cfg["architecture"]  # stands beside it
    return {key: _value_to_json(value) for key, value in cfg.items()}


def _row_to_json(row: PretrainedCfg) -> dict[str, Any]:
    fields = {
        field.name: _value_to_json(getattr(row, field.name))
        for field in dataclasses.fields(row)
        if field.name not in SOURCE_FIELDS
    }
    return {**fields, "published": [dataclasses.asdict(score) for score in row.published]}


def _cfg_to_json(cfg: Any) -> dict[str, Any]:
    fields = {field.name: _value_to_json(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}
    return {"type": type(cfg).__name__, **fields}


def _value_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _cfg_to_json(value)
    return [_value_to_json(item) for item in value] if isinstance(value, tuple) else value


# --- from JSON ------------------------------------------------------------------------------------------------------


def read_config(source: str | Path | Mapping[str, Any]) -> SavedConfig:
    """What a `config.json` of segzoo says: a file, the folder that it lies in, or its content.

    Raises:
        WeightsError: no such file, or not segzoo's, damaged, or of a later segzoo; names the file and the field.
    """
    if isinstance(source, Mapping):
        where, config = CONFIG_NAME, source
    else:
        where = Path(source) / CONFIG_NAME if Path(source).is_dir() else Path(source)
        config = _read_json(where)
    block = config.get("segzoo") if isinstance(config, Mapping) else None
    if not isinstance(block, Mapping):
        raise WeightsError(
            f'{where} has no "segzoo" block, so segzoo did not write it; build the model by its name and pass the '
            "weights file as checkpoint_path="
        )
    version, writer = block.get("version"), str(block.get("segzoo_version", "unknown"))[:40]
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"{where} has version {shown(version)} and was written by segzoo {writer}; this is segzoo {__version__}, "
            f"which reads version {FORMAT_VERSION}: upgrade segzoo"
        )
    try:
        return _saved_config(config, block)
    except _InvalidError as error:
        raise WeightsError(
            f"{where}: {error}; the file is damaged, or written by a later segzoo (by {writer}; this is {__version__})"
        ) from None


class _InvalidError(Exception):
    """What is wrong, without the file's name."""


def _read_json(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise WeightsError(f"{path} is no ordinary file; save the model with segzoo.save_pretrained")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; save the model with segzoo.save_pretrained") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise WeightsError(
            f"{path} has more than {MAX_BYTES:,} bytes, which no config needs; download or copy it again"
        )
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} is no valid JSON ({first_line(error)}); delete it and download or copy it again"
        ) from error
    if _nesting(value) > MAX_NESTED:
        raise WeightsError(
            f"{path} is nested more than {MAX_NESTED} deep, which no config is; download or copy it again"
        )
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _nesting(value: Any) -> int:
    """How deep lists and objects lie in each other; what is deeper than can be meant is not looked into."""
    level, values = 0, [value]
    while values and level <= MAX_NESTED:
        insides = [
            item.values() if isinstance(item, dict) else item for item in values if isinstance(item, (dict, list))
        ]
        values = [item for inside in insides for item in inside]
        level += bool(insides)
    return level


def _saved_config(config: Mapping[str, Any], block: Mapping[str, Any]) -> SavedConfig:
    name, variant = _names(config, block)
    dtype, row = block.get("dtype"), block.get("pretrained_cfg")
    during_training = block.get("reduction_during_training", False)
    weights_state = block.get("weights_state", "pretrained")
    if dtype not in DTYPES:
        raise _InvalidError(f"segzoo.dtype must be one of {', '.join(DTYPES)}, not {shown(dtype)}")
    cfg = _cfg_from_json(block.get("cfg"), "segzoo.cfg")
    if type(cfg) is not type(VARIANTS[variant].variants[variant].cfg):
        raise _InvalidError(f"segzoo.cfg is a {type(cfg).__name__}, but {variant} has another config")
    for key, value, expected in (
        ("num_classes", config.get("num_classes"), cfg.num_classes),
        ("segzoo.in_chans", block.get("in_chans"), cfg.in_chans),
    ):
        if value != expected:
            raise _InvalidError(f"{key} is {shown(value)}, but segzoo.cfg says {expected}")
    if not isinstance(during_training, bool):
        raise _InvalidError(f"segzoo.reduction_during_training is {shown(during_training)}")
    if weights_state not in WEIGHTS_STATES:
        known = ", ".join(WEIGHTS_STATES)
        raise _InvalidError(f"segzoo.weights_state must be one of {known}, not {shown(weights_state)}")
    return SavedConfig(
        name=name,
        cfg=cfg,
        dtype=getattr(torch, dtype),
        pretrained_cfg=_row_from_json(row, "segzoo.pretrained_cfg"),
        reduction=_reduction_from_json(block.get("reduction")),
        during_training=during_training,
        weights_state=weights_state,
    )


def _names(config: Mapping[str, Any], block: Mapping[str, Any]) -> tuple[str, str]:
    """The model's name and its variant, which is registered."""
    name = block.get("name")
    variant = name.partition(".")[0] if isinstance(name, str) else name
    if not isinstance(name, str) or not isinstance(variant, str) or variant not in VARIANTS:
        close = difflib.get_close_matches(str(variant)[:100], VARIANTS, n=3)
        raise _InvalidError(
            f"unknown model {shown(variant)}" + (f" (did you mean {', '.join(close)}?)" if close else "")
        )
    if config.get("architecture") != variant:
        raise _InvalidError(f"architecture is {shown(config.get('architecture'))}, but segzoo.name is {shown(name)}")
    return name, variant


def _reduction_from_json(plan: Any) -> dict[str, Any] | None:
    """Checked entry by entry; whether the model has these sites shows when the plan is set."""
    if plan is None:
        return None
    if not isinstance(plan, Mapping):
        raise _InvalidError(f"segzoo.reduction is {shown(plan)}, not a plan")
    for site, entry in plan.items():
        try:
            parse_entry(entry)
        except SegzooError as error:
            raise _InvalidError(f"segzoo.reduction: {site[:80]}: {first_line(error)}") from None
    return dict(plan)


def _row_from_json(values: Any, where: str) -> PretrainedCfg | None:
    if not isinstance(values, Mapping):
        return None if values is None else _fields_from_json(PretrainedCfg, values, where)
    values = dict(values)
    # Before rows had all their figures they had one, as "miou" and "miou_protocol".
    value, protocol = values.pop("miou", None), values.pop("miou_protocol", "")
    found = values.pop("published", [] if value is None else [{"value": value, "protocol": protocol}])
    if not isinstance(found, list) or not all(isinstance(score, Mapping) and "value" in score for score in found):
        raise _InvalidError(f"{where}.published is {found!r}, not a list of figures, each with its value")
    row = _fields_from_json(PretrainedCfg, values, where)
    figures = tuple(_fields_from_json(PublishedScore, score, f"{where}.published") for score in found)
    return dataclasses.replace(row, published=figures)


def _cfg_from_json(value: Any, where: str) -> Any:
    kind = value.get("type") if isinstance(value, Mapping) else None
    types = _config_types()
    if not isinstance(kind, str) or kind not in types:
        raise _InvalidError(f"{where} is no known config ({shown(kind)}); known: {', '.join(sorted(types))}")
    return _fields_from_json(types[kind], {name: item for name, item in value.items() if name != "type"}, where)


def _config_types() -> dict[str, type]:
    """The classes of all configs that a registered variant uses, nested ones included, by name."""
    types: dict[str, type] = {}

    def add(cfg: Any) -> None:
        types[type(cfg).__name__] = type(cfg)
        for field in dataclasses.fields(cfg):
            if dataclasses.is_dataclass(value := getattr(cfg, field.name)):
                add(value)

    for family in FAMILIES.values():
        for variant in family.variants.values():
            add(variant.cfg)
    return types


def _fields_from_json(kind: type, values: Any, where: str) -> Any:
    """A dataclass from its fields. One that is missing takes its default: what older models did without it."""
    if not isinstance(values, Mapping):
        raise _InvalidError(f"{where} is {shown(values)}, not a set of fields")
    hints = type_hints(kind)
    unknown = [name for name in values if name not in hints or (kind is PretrainedCfg and name in SOURCE_FIELDS)]
    if unknown:
        raise _InvalidError(f"{where} has an unknown field {shown(unknown[0])}")
    fields = {name: _value_from_json(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**fields)
    except SegzooError as error:  # the dataclass's own refusal
        raise _InvalidError(f"{where}: {error}") from None


def _value_from_json(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        # Any known config: a segmenter takes any encoder's, also one that its own type hint does not name.
        nested = [kind for kind in choices(hint) if dataclasses.is_dataclass(kind)]
        if nested:
            return _cfg_from_json(value, where)
    value = _tuples(value)
    if not fits(value, hint):
        raise _InvalidError(f"{where} is {shown(value)}, which is not {describe(hint)}")
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
