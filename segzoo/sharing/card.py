"""The model card of a saved model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .._version import __version__
from ..models.base import Model
from ..models.rows import METRICS, OWN_MEASUREMENT, PretrainedCfg, PublishedScore, label_names
from ..models.segmenter import SegmentationModel
from ..zoo.config import CONFIG_NAME, config_to_dict, read_config

CARD_NAME = "README.md"
PLACEHOLDER = "OWNER/NAME"  # in the card's code, until `publish` knows the repository

# Identifiers that the Hub knows; any other licence is "other" there, with its name and link.
HUB_LICENSES = frozenset(
    ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "isc")
    + ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "unlicense", "unknown")
)


def model_card(model: Model, row: PretrainedCfg) -> str:
    """The text of a model card: a YAML header that the Hub reads, and what a person has to know."""
    labels = label_names(row, model.num_classes)
    sections = [
        f"# {model.name}",
        _what_it_is(model, row),
        f"## Usage\n\n```sh\npip install segzoo\n```\n\n```python\n{_usage(model)}\n```",
        f"## Preprocessing\n\n{_preprocessing(model, row)}",
        f"## Inference reduction\n\n{_reduction(model, row)}",
        f"## Licence\n\n{_terms(row)}",
    ]
    if row.published:
        sections.insert(4, f"## Accuracy\n\n{_accuracy(row)}")
    if labels:
        names = ", ".join(f"{index} {name}" for index, name in enumerate(labels["names"]))
        palette = f"Label set and palette `{labels['palette']}` of segzoo: " if labels["palette"] else ""
        sections.insert(4, f"## Labels\n\n{palette}{names}.")
    return f"---\n{_card_data(model, row).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _card_data(model: Model, row: PretrainedCfg) -> ModelCardData:
    task, tags = _task(model)
    variant = model.name.partition(".")[0]
    fields = _license_fields(row)
    if row.dataset:
        fields["datasets"] = [row.dataset]
    of_weights = [score for score in row.published if not score.training and score.metric != "miou_small"]
    if of_weights:
        fields["metrics"] = sorted({_hub_metric(score) for score in of_weights})
    if of_weights and row.dataset:
        fields["model_name"] = model.name
        fields["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=row.dataset,
                dataset_name=row.dataset,
                metric_type=_hub_metric(score),
                metric_name=f"{METRICS[score.metric]} in percent, {score.reduction}, "
                + (score.protocol or "as published"),
                metric_value=score.value,
            )
            for score in of_weights
        ]
    return ModelCardData(pipeline_tag=task, library_name="segzoo", tags=["segzoo", variant, *tags], **fields)


def _license_fields(row: PretrainedCfg) -> dict[str, Any]:
    """The licence in the Hub's words."""
    known = row.license in HUB_LICENSES
    fields = {"license": row.license if known else "other"}
    if not known:
        fields["license_name"] = row.license
    if row.license_url:
        fields["license_link"] = row.license_url
    return fields


def _hub_metric(score: PublishedScore) -> str:
    """The Hub's name of its metric."""
    return "accuracy" if score.metric == "top1" else "mean_iou"


def _task(model: Model) -> tuple[str, list[str]]:
    """The Hub's name of what the model does, and tags that say it more closely."""
    if _finds_keypoints(model):
        return "keypoint-detection", []
    if isinstance(model, SegmentationModel):
        return "image-segmentation", ["semantic-segmentation"]
    return "image-classification" if model.num_classes else "image-feature-extraction", []


def _finds_keypoints(model: Model) -> bool:
    return isinstance(model, SegmentationModel) and model.score_kind == "heatmap"


def _accuracy(row: PretrainedCfg) -> str:
    lines = ["| percent | metric | reduction | protocol | source |", "| --- | --- | --- | --- | --- |"]
    for score in row.published:
        reduction = f"{score.reduction}, {score.training}" if score.training else score.reduction
        source = score.source or "not stated"
        source += f" (confirmed by {score.confirmed_by})" if score.confirmed_by else " (could not be confirmed)"
        cells = (str(score.value), METRICS[score.metric], reduction, score.protocol or "not stated", source)
        lines.append(f"| {' | '.join(cells)} |")
    own = all(score.confirmed_by == OWN_MEASUREMENT for score in row.published)
    return ("Measured by segzoo." if own else "As published, not measured anew.") + "\n\n" + "\n".join(lines)


def _what_it_is(model: Model, row: PretrainedCfg) -> str:
    variant = model.name.partition(".")[0]
    kind, outputs = "image encoder", "classes"
    if _finds_keypoints(model):
        kind, outputs = "keypoint model", "keypoints"
    elif isinstance(model, SegmentationModel):
        kind = "semantic segmentation model"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    data = f", trained on {row.dataset}" if row.dataset else ""
    origin = f" Origin of the weights: {row.origin}." if row.origin else ""
    return (
        f"`{variant}`, a {kind} of segzoo {__version__}{data}: {model.num_classes} {outputs}, {model.in_chans} "
        f"input channels, {parameters:,} parameters in {dtype}.{origin} `{CONFIG_NAME}` holds every option of the "
        "model."
    )


def _usage(model: Model) -> str:
    made = f'model = segzoo.create_model("hf-hub:{PLACEHOLDER}").eval()  # or "local-dir:PATH"\n'
    if _finds_keypoints(model) and model.in_chans == 3:
        found = 'pose = segzoo.predict_keypoints(model, "image.jpg")  # pose.xy (K, 2) in pixels, pose.score (K,)'
        return f'import segzoo\n\n{made}{found}\npose.save("keypoints.png")'
    if isinstance(model, SegmentationModel) and model.in_chans == 3:
        return f'import segzoo\n\n{made}result = segzoo.predict(model, "image.jpg")\nresult.save("mask.png")'
    size = ", ".join(map(str, (1, model.in_chans, 224, 224)))
    out = "(1, K, 224, 224) scores" if isinstance(model, SegmentationModel) else "(1, K) logits, or pooled features"
    return f"import torch\nimport segzoo\n\n{made}scores = model(torch.zeros({size}))  # normalised images -> {out}"


def _preprocessing(model: Model, row: PretrainedCfg) -> str:
    """In words, exactly what `segzoo.predict` or `predict_keypoints` does."""
    H, W = row.test_size
    resize = {
        "keep_ratio": f"with its aspect ratio into short side {H}, long side {W}",
        "exact": f"to {H} x {W} (H x W)",
        "none": "not resized",
    }[row.resize]
    lines = [
        f"- Values in [0, 1], RGB where there are three channels; mean {_numbers(row.mean)}, "
        f"standard deviation {_numbers(row.std)}.",
        f"- Test image: {resize}, bilinear with antialias"
        + (f"; both sides at least {row.test_min_side}" if row.test_min_side > 1 else "")
        + (f"; both sides rounded up to a multiple of {row.size_divisor}" if row.size_divisor > 1 else "")
        + ".",
    ]
    if isinstance(model, SegmentationModel) and not _finds_keypoints(model):
        whole = "the whole image at once"
        slide = f"sliding window {_numbers(row.crop or ())}, stride {_numbers(row.stride or ())} (H, W)"
        lines.append(f"- Test mode: {slide if row.test_mode == 'slide' else whole}.")
    lines.append(f"- Training crop: {row.input_size[0]} x {row.input_size[1]} (H x W).")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


def _reduction(model: Model, row: PretrainedCfg) -> str:
    plan = read_config(config_to_dict(model)).reduction
    if plan is None:
        setting = "None is set: attention sees every token that it was trained with."
    else:
        setting = f"This setting is in force when the model is restored:\n\n```json\n{json.dumps(plan)}\n```"
    recommended = f" Recommended: `{row.recommended_reduction}`." if row.recommended_reduction else ""
    presets = (
        f" Presets: {', '.join(f'`{name}`' for name in model.reduction_presets)}." if model.reduction_presets else ""
    )
    return (
        f"{setting}\n\nChange it with `model.set_inference_reduction(...)`; `None` takes it off.{presets}{recommended}"
    )


def _terms(row: PretrainedCfg) -> str:
    if row.license == "unknown":
        stated = "No licence is stated for these weights: ask their authors before you use them or pass them on."
    else:
        link = f" ({row.license_url})" if row.license_url else ""
        stated = f"Weights: {row.license}{link}."
    commercial = {True: "allowed", False: "not allowed", None: "unknown"}[row.commercial_use]
    return f"{stated} Commercial use: {commercial}. The code of segzoo is Apache-2.0."
