"""What a training writes down: the weights row and card of its model, and the record of the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..data.classification import ClassificationData
from ..data.segmentation import FileData, SegmentationData
from ..labels import list_labels, load_labels
from ..layers.reduction import entry_to_json
from ..models.base import Model
from ..models.rows import IMAGENET_MEAN, IMAGENET_STD, OWN_MEASUREMENT, PretrainedCfg, PublishedScore
from .batches import Data
from .evaluation import commit
from .recipes import Recipe
from .reports import Evaluation

FROM_SCRATCH = "from scratch"


def run_row(model: Model, data: Data, recipe: Recipe, start: str) -> PretrainedCfg:
    """The weights row of the trained model: the data's classes, and how the recipe shows images."""
    shown = _as_classified(recipe) if isinstance(data, ClassificationData) else _as_segmented(recipe)
    return PretrainedCfg(
        **_kept(model, start),
        **shown,
        **_labels(data),
        state="unpublished",
        num_classes=model.num_classes,
        input_size=recipe.at(recipe.steps).crop,
        test_min_side=1,
        test_mode="slide" if recipe.window else "whole",
        crop=recipe.window,
        stride=recipe.stride,
        origin=f"segzoo train; {start}" if start else "segzoo train",
    )


def _kept(model: Model, start: str) -> dict[str, Any]:
    """What holds on from the weights that it began with: how colours are scaled, and their terms."""
    before = model.pretrained_cfg or PretrainedCfg()
    kept = {name: getattr(before, name) for name in ("mean", "std", "size_divisor")}
    if len(before.mean) != model.in_chans:
        kept |= {"mean": IMAGENET_MEAN[:1] * model.in_chans, "std": IMAGENET_STD[:1] * model.in_chans}
    if start != FROM_SCRATCH:
        kept |= {name: getattr(before, name) for name in ("license", "license_url", "commercial_use")}
    return kept


def _as_classified(recipe: Recipe) -> dict[str, Any]:
    return {"resize": "exact", "test_size": recipe.crop}


def _as_segmented(recipe: Recipe) -> dict[str, Any]:
    size = recipe.at(recipe.steps).size
    return {"resize": "keep_ratio" if size else "none", "test_size": size or recipe.crop}


def _labels(data: Data) -> dict[str, Any]:
    """The classes, by the name of their set where it is one of segzoo's."""
    if isinstance(data, ClassificationData):
        return {"label_names": data.classes}
    found = {"dataset": "" if data.name in ("folder", "list") else data.name}
    if not isinstance(data, SegmentationData) or data.labels is None:
        return found
    labels = data.labels
    known = labels.name in list_labels() and labels.classes == load_labels(labels.name).classes
    return {**found, **({"label_set": labels.name} if known else {"label_names": labels.classes})}


def with_figures(row: PretrainedCfg, result: Evaluation, step: int, reduction: str | None) -> PretrainedCfg:
    """The row with what the evaluation measured."""
    names = {"mIoU": "miou", "small mIoU": "miou_small", "top-1": "top1"}
    common = {
        "reduction": reduction or "base",
        "protocol": f"{result.samples} images of {result.data} {result.split}; {result.protocol_text}",
        "source": f"segzoo train, step {step}",
        "confirmed_by": OWN_MEASUREMENT,
    }
    scores = tuple(
        PublishedScore(value=round(100 * value, 2), metric=names[name], **common)
        for name, value in result.metrics.items()
        if name in names and not math.isnan(value)
    )
    return dataclasses.replace(row, published=scores)


def card_sections(record: Mapping[str, Any], recipe: Recipe, step: int, result: Evaluation | None) -> tuple[str, ...]:
    """What the card of a trained model says beside the usual."""
    kept = ("batch_size", "crop", "size", "loss", "optimizer", "lr", "schedule", "weight_decay", "ema_decay", "seed")
    values = ", ".join(f"{name} {getattr(recipe, name)}" for name in kept)
    text = (
        f"## Training\n\nRecipe `{recipe.name}`: {recipe.steps} steps, {values}; these are the weights of step {step}. "
        f"Begun {record['start'] or 'with weights of which nothing is recorded'}. Data: {_in_words(record['data'])}."
    )
    if record["reduction"] is not None:
        when = "in training and evaluation" if record["during_training"] else "in evaluation alone"
        text += f" Reduction {record['reduction']} {when}."
    classes = result.class_rows() if result is not None else []
    if not classes:
        return (text,)
    table = ["| class | IoU in percent | pixels |", "| --- | --- | --- |"]
    table += [f"| {row['name']} | {'-' if row['IoU'] is None else row['IoU']} | {row['pixels']} |" for row in classes]
    return text, "## Classes\n\n" + "\n".join(table)


def _in_words(data: Mapping[str, Any]) -> str:
    words = f"{data['samples']} images of {data['name']} {data['split']}"
    if "ignore_index" not in data:
        return words
    return f"{words}, ignore_index {data['ignore_index']}, reduce_zero_label {str(data['reduce_zero_label']).lower()}"


def describe(data: Data) -> dict[str, Any]:
    """What a run records of its data, and by which it knows them again."""
    if isinstance(data, ClassificationData):
        names = [path.name for path, _ in data.items]
        record = {"name": "imagenet folder", "split": data.split, "classes": list(data.classes)}
    else:
        names = [pair.name for pair in data.pairs] if isinstance(data, FileData) else [repr(data)]
        record = {
            "name": data.name,
            "split": data.split,
            "classes": None if data.labels is None else list(data.labels.classes),
            "ignore_index": data.ignore_index,
            "reduce_zero_label": data.reduce_zero_label,
        }
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return {**record, "samples": len(data), "names_sha256": digest}


def figures(data: Data) -> tuple[str, ...]:
    """The log's columns of an evaluation."""
    return ("top-1",) if isinstance(data, ClassificationData) else ("mIoU", "pixel accuracy")


def plan_text(reduction: object) -> str | None:
    if reduction is None or isinstance(reduction, str):
        return reduction
    return json.dumps(reduction, default=entry_to_json)


def conditions(accelerator: Any) -> dict[str, Any]:
    import accelerate

    device = accelerator.device
    return {
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "segzoo": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
