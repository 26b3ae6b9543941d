"""A folder that `create_model` restores: `model.safetensors`, `config.json` (see `zoo/config.py`) and `README.md`, a
model card of the Hugging Face Hub. It is written beside its place and moved there whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from .._errors import SegzooError, WeightsError
from ..models.base import Model
from ..models.rows import PretrainedCfg
from ..zoo.config import CONFIG_NAME, SOURCE_FIELDS, WEIGHTS_NAME, SavedConfig, config_to_dict, read_config
from ..zoo.recipe import create_model
from .card import CARD_NAME, model_card

PARTIAL_PREFIX = ".segzoo-"  # folder inside the target that files are written to first


def save_pretrained(
    model: Model, directory: str | Path, *, pretrained_cfg_overlay: Mapping[str, Any] | None = None
) -> Path:
    """Write a model as a folder from which `create_model("local-dir:...")` restores it: weights, dtype, options,
    classes, reduction plan and preprocessing.

    The weights row says what is known about the weights, and goes into the model card. A row's published figures are
    left out, since they belong to the published weights and segzoo cannot know whether these are still the same; so
    is its data set if the number of classes has changed; and without a tag in the model's name, data set, licence
    and origin. Say what holds with `pretrained_cfg_overlay`.

    >>> import segzoo
    >>> folder = segzoo.save_pretrained(segzoo.create_model("test_eft"), "my_eft")
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    >>> segzoo.create_model("local-dir:my_eft").name
    'test_eft'

    Args:
        model: from `create_model`, on any device and of one dtype; not folded, compiled or wrapped.
        directory: new, empty, or a segzoo folder, whose three files are replaced as a whole; others stay.
        pretrained_cfg_overlay: fields of the weights row to replace, for example {"dataset": "roofs",
            "label_names": ("ground", "roof"), "license": "cc-by-4.0",
            "published": [{"value": 71.2, "protocol": "whole image"}]}.

    Returns:
        The directory.

    Raises:
        SegzooError: a model that could not be restored, a directory that holds something else, or no room to write.
    """
    if not isinstance(model, Model):
        raise SegzooError(
            f"save_pretrained takes a model from create_model, not a {type(model).__name__}; of a compiled or wrapped "
            "model give the original, of a features_only one its .encoder"
        )
    return save_with_row(model, Path(directory), _with_overlay(_row_of(model), pretrained_cfg_overlay))


def _row_of(model: Model) -> PretrainedCfg:
    """What still holds of the model's weights row; see `save_pretrained`."""
    row = model.pretrained_cfg or PretrainedCfg(num_classes=model.num_classes)
    unknown = {field.name: field.default for field in dataclasses.fields(row)}
    lost = ["published"]
    if model.num_classes != row.num_classes:
        lost += ["dataset", "label_set", "label_names", "advice"]
    if "." not in model.name:
        lost += ["dataset", "license", "license_url", "commercial_use", "origin", "advice"]
    return dataclasses.replace(row, **{name: unknown[name] for name in lost})


def _with_overlay(row: PretrainedCfg, overlay: Mapping[str, Any] | None) -> PretrainedCfg:
    valid = [field.name for field in dataclasses.fields(row) if field.name not in SOURCE_FIELDS]
    for name in overlay or {}:
        if name not in valid:
            raise SegzooError(f"pretrained_cfg_overlay has no field {name!r} to save; fields: {', '.join(valid)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in (overlay or {}).items()}
    return dataclasses.replace(row, **values)


def save_with_row(model: Model, directory: Path, row: PretrainedCfg) -> Path:
    """`save_pretrained` with this row and no other."""
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise SegzooError(f"{model.name or 'this model'} is on the meta device and has no weights to save")
    names = row.label_names
    if names is not None and len(names) != model.num_classes:
        raise SegzooError(f"label_names must be {model.num_classes} different names, one a class, not {names}")
    config = config_to_dict(model, row)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, read_config(config), "this model")
    card = model_card(model, row)

    def write(folder: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    _write_folder(directory, write)
    return directory


def check_shapes(shapes: Mapping[str, tuple[int, ...]], saved: SavedConfig, what: str) -> None:
    """Refuse parameters (name -> shape) of `what` that a model built from the config does not have."""
    options = {field.name: getattr(saved.cfg, field.name) for field in dataclasses.fields(saved.cfg)}
    with torch.device("meta"):
        fresh = create_model(saved.variant, **options).state_dict()
    wrong = [name for name, tensor in fresh.items() if shapes.get(name) != tuple(tensor.shape)]
    wrong += [name for name in shapes if name not in fresh]
    if wrong:
        raise WeightsError(
            f"{what} does not have the parameters of {saved.name} with its config: {len(wrong)} are missing, left over "
            f"or of another shape, such as {wrong[0]}; a folded or altered model cannot be restored from its name, so "
            "save the model that it was made from"
        )


def _write_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder inside `directory`, then move the files to their place.

    The old config goes first and the new one comes last, so that no moment has the config of one model beside the
    weights of another: a crash between leaves a folder without config, which is refused.
    """
    made: list[Path] = []
    try:
        _check_target(directory)
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=directory))
        try:
            write(partial)
            (directory / CONFIG_NAME).unlink(missing_ok=True)
            for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
                (partial / name).replace(directory / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                path.rmdir()
        raise SegzooError(f"{directory} cannot be written ({error}); choose another place") from error


def _check_target(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise SegzooError(f"{directory} is a file; name a directory")
    present = [path for path in directory.iterdir() if not path.name.startswith(PARTIAL_PREFIX)]
    if present and not _is_segzoo_folder(directory):
        raise SegzooError(
            f"{directory} is not empty and no segzoo folder (it holds {present[0].name}); choose an empty directory"
        )


def _is_segzoo_folder(directory: Path) -> bool:
    try:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "segzoo" in config
