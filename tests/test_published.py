"""The accuracies that rows record, against the papers' tables and the authors' READMEs, copied here by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import segzoo
from segzoo import SegzooError
from segzoo.models.family import VARIANTS
from segzoo.models.rows import PretrainedCfg, PublishedScore
from segzoo.zoo.config import config_to_dict, read_config

PRESETS = ("base", "decoder", "optimal", "fast")
MERGING = ("base", "hq", "fast", "n2d")
# arXiv 2407.17261, Tables 1 and 4: base, decoder, optimal, fast, and fast after fine-tuning.
EDAFORMER = {
    "edaformer_t.ade20k": (42.3, 42.2, 42.1, 41.3, 42.1),
    "edaformer_t.cityscapes": (78.7, 78.7, 78.7, 78.1, 78.6),
    "edaformer_t.coco_stuff": (40.3, 40.3, 40.3, 39.1, 40.2),
    "edaformer_b.ade20k": (49.0, 48.9, 48.9, 48.3, 48.7),
    "edaformer_b.cityscapes": (81.6, 81.6, 81.6, 81.4, 81.6),
    "edaformer_b.coco_stuff": (45.9, 45.8, 45.8, 45.0, 45.7),
}
# Single scale, several scales: the README of zbwxp/SegVit; arXiv 2210.05844, Tables 1 to 3, has the latter, too.
SEGVIT = {
    "segvit_base.ade20k": (51.3, 53.0),
    "segvit_large.ade20k": (54.6, 55.2),
    "segvit_large_shrunk.ade20k": (53.9, 55.1),
    "segvit_large.coco_stuff10k": (49.9, 50.3),
    "segvit_large_shrunk.coco_stuff10k": (49.1, 49.4),
    "segvit_large.pascal_context": (64.1, 65.3),
    "segvit_large_shrunk.pascal_context": (62.3, 63.7),
}
# README of PaddleSeg's configurations (plain, flip, several scales with flip), then the paper.
RTFORMER = {
    "rtformer_slim.cityscapes": (76.31, 77.05, 77.58, 76.3),
    "rtformer_base.cityscapes": (79.24, 79.80, 80.19, 79.3),
    "rtformer_slim.ade20k": (36.67, 37.32, 37.20, 36.7),
    "rtformer_base.ade20k": (42.02, 42.43, 42.72, 42.1),
    "rtformer_slim.camvid": (81.4,),
    "rtformer_base.camvid": (82.5,),
    "rtformer_base.coco_stuff10k": (35.3,),
}
# arXiv 2105.15203, Table 1, single scale: ADE20K, Cityscapes.
SEGFORMER = {
    "b0": (37.4, 76.2),
    "b1": (42.2, 78.5),
    "b2": (46.5, 81.0),
    "b3": (49.4, 81.7),
    "b4": (50.3, 82.3),
    "b5": (51.0, 82.4),
}
# arXiv 2405.14467, Table II: unmerged, hq, fast, n2d; all classes, then the small ones.
SEGFORMERPP = {
    "b5": ((82.39, 82.31, 82.04, 81.96), (72.97, 72.93, 72.72, 72.24)),
    "b2": ((81.08, 81.03, 80.62, 80.38), (71.97, 71.83, 71.53, 71.02)),
}
TOP1 = {
    "eft_t": 72.3,
    "eft_b": 82.4,
    "rtformer_slim_backbone": 72.3,
    "rtformer_base_backbone": 77.4,
    "mit_b0": 70.5,
    "mit_b1": 78.7,
    "mit_b2": 81.6,
    "mit_b3": 83.1,
    "mit_b4": 83.6,
    "mit_b5": 83.8,
    "pvt_v2_b0": 70.5,
    "pvt_v2_b1": 78.7,
    "pvt_v2_b2": 82.0,
}


def read_row(config: dict) -> PretrainedCfg:
    row = read_config(config).pretrained_cfg
    assert row
    return row


def row_of(name: str) -> PretrainedCfg:
    variant, _, tag = name.partition(".")
    return VARIANTS[variant].pretrained[variant][tag]


def figures(row: PretrainedCfg, metric: str = "miou", training: str = "") -> dict[str, float]:
    return {
        score.reduction: score.value for score in row.published if (score.metric, score.training) == (metric, training)
    }


def test_edaformer_at_every_reduction():
    for name, (*values, tuned) in EDAFORMER.items():
        row = row_of(name)
        assert figures(row) == dict(zip(PRESETS, values, strict=True)), name
        assert figures(row, training="fine-tuned with the reduction") == {"fast": tuned}, name
    assert figures(row_of("edaformer_mit_b0.ade20k")) == {"base": 40.1}
    assert figures(row_of("edaformer_mit_b0.cityscapes")) == {"base": 78.2, "ISR": 77.6}


def test_segvit_and_rtformer_at_every_protocol():
    for name, values in {**SEGVIT, **RTFORMER}.items():
        assert tuple(score.value for score in row_of(name).published) == values, name
        assert row_of(name).miou == values[0]
    assert row_of("rtformer_slim.coco_stuff10k").published == ()
    assert "Table" not in row_of("segvit_large.coco_stuff10k").published[0].source  # it stands in no paper


def test_segformer():
    for size, (ade20k, cityscapes) in SEGFORMER.items():
        side = 640 if size == "b5" else 512
        assert row_of(f"segformer_{size}.nvidia_ade20k_{side}").miou == ade20k
        assert row_of(f"segformer_{size}.nvidia_cityscapes_1024").miou == cityscapes


def test_segformerpp_has_its_own_figure_for_every_preset():
    for size, (every, small) in SEGFORMERPP.items():
        for preset, value in zip(MERGING, every, strict=True):
            name = f"segformer_{size}" if preset == "base" else f"segformerpp_{size}_{preset}"
            row = row_of(f"{name}.segformerpp_cityscapes_1024")
            score = row.score(preset)
            assert score and score.value == value
            assert figures(row, "miou_small") == dict(zip(MERGING, small, strict=True))
    merged = figures(row_of("segformer_b5.segformerpp_cityscapes_1024"), training="trained with the reduction")
    assert merged == {"hq": 82.19, "fast": 81.77, "n2d": 82.38}
    ade20k = row_of("segformerpp_b5_hq.segformerpp_ade20k_640")
    assert (ade20k.miou, ade20k.score("hq")) == (49.72, None)  # what was trained with merging are other weights


def test_encoders():
    for name, value in TOP1.items():
        score = row_of(f"{name}.imagenet").score()
        assert score and (score.metric, score.value) == ("top1", value)
        assert row_of(f"{name}.imagenet").miou is None


def test_the_bundled_row_says_what_was_measured():
    row = row_of("edaformer_t.scenes")
    file = Path(__file__).resolve().parent.parent / row.published[0].source
    with file.open() as lines:
        measured = {line["reduction"]: float(line["miou"]) for line in csv.DictReader(lines)}
    assert {score.reduction for score in row.published} == set(PRESETS)
    for score in row.published:
        assert score.value == pytest.approx(100 * measured[score.reduction], abs=1e-9)


def test_what_could_not_be_confirmed_says_so():
    for name in EDAFORMER:
        assert not any(score.confirmed_by for score in row_of(name).published), name
    for name in SEGVIT:
        assert all(score.confirmed_by for score in row_of(name).published), name


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ({"value": 71.2, "metric": "iou"}, "metric of a published score must be one of miou"),
        ({"value": 0.71, "miou": 3}, "must be given by its fields value, metric"),
        ({"value": 712}, "in percent, not 712"),
        ({"value": "71"}, "in percent, not '71'"),
        ({"protocol": "whole"}, "must be given by its fields"),
        (71.2, "must be given by its fields"),
    ],
)
def test_figures_that_are_none(score, words):
    with pytest.raises(SegzooError, match=words):
        PretrainedCfg(published=(score,))


def test_figures_come_back_from_config_json():
    with torch.device("meta"):
        model = segzoo.create_model("edaformer_t.ade20k")
    config = config_to_dict(model)
    assert read_row(config).published == row_of("edaformer_t.ade20k").published
    row = config["segzoo"]["pretrained_cfg"]
    del row["published"]
    row.update(miou=42.3, miou_protocol="whole image")  # as before rows had all their figures
    assert read_row(config).published == (PublishedScore(value=42.3, protocol="whole image"),)
    row.update(miou=None, miou_protocol="")
    assert read_row(config).published == ()
    for damaged in ([{"metric": "miou"}], {"value": 3}, [{"value": 1.0, "protocol": 5}], [{"value": 1.0, "seed": 5}]):
        row["published"] = damaged
        with pytest.raises(SegzooError, match=r"segzoo\.pretrained_cfg\.published"):
            read_config(config)


def cost_rows() -> list:
    """Every published cost; the large sizes of the large models take seconds each, even without numbers."""
    return [
        pytest.param(
            name,
            cost,
            id=f"{name} {cost.size[0]}x{cost.size[1]} {cost.reduction}",
            marks=[pytest.mark.slow] if cost.size[1] > 640 else [],
        )
        for name, family in VARIANTS.items()
        for cost in family.variants[name].published
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cost"), cost_rows())
def test_published_costs_hold_or_say_why(name, cost):
    options = {} if cost.num_classes is None else {"num_classes": cost.num_classes}
    with torch.device("meta"):
        model = segzoo.create_model(name, **options)
    model.set_inference_reduction(None if cost.reduction == "base" else cost.reduction)
    exact = segzoo.cost(model, cost.size)
    near = exact.macs / 1e9 == pytest.approx(cost.gmacs, rel=0.03)
    near = near and (cost.params_m is None or exact.params / 1e6 == pytest.approx(cost.params_m, rel=0.03))
    assert near or cost.why
