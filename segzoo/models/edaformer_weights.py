"""EDAFormer's weights: the official names of its parameters, and where checkpoints are."""

from __future__ import annotations

import dataclasses

from .eft_weights import DRIVE, ENCODER_RULES, SIZES, drive_files
from .keys import Drop, Layout, Prefixed, Rename, Squeeze
from .rows import (
    MMSEG_ADE20K,
    MMSEG_CITYSCAPES,
    OWN_MEASUREMENT,
    SLIDE_1024,
    WHOLE,
    PretrainedCfg,
    PublishedScore,
    scores,
)

# attn4, attn44, attn444 are the blocks on c4, attn3 and attn33 those on c3, attn2 the one on c2.
OFFICIAL_RULES = (
    Drop(r"^decode_head\.conv_seg\.", "mmseg's classifier, never used by this head"),
    Prefixed("backbone.", "encoder.", ENCODER_RULES),
    Rename(r"^decode_head\.attn(4+|3+|2+)\.", lambda m: f"decoder.levels.{4 - int(m[1][0])}.{len(m[1]) - 1}."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    Rename(r"\.attn\.norm\.", ".attn.kv_norm."),
    Squeeze(r"\.attn\.sr\.weight$"),
    Rename(r"\.attn\.sr\.", ".attn.kv."),
    Rename(r"^decode_head\.linear_fuse\.", "decoder.fuse."),
    Rename(r"^decode_head\.linear_pred\.", "decoder.classifier."),
)

LAYOUTS = (Layout("official", r"^decode_head\.linear_fuse\.", OFFICIAL_RULES),)

_ORIGIN = "https://github.com/hyunwoo137/EDAFormer (arXiv 2407.17261)"
_OFFICIAL = {"recommended_reduction": "optimal", "origin": _ORIGIN, **DRIVE}
_ADE20K = dataclasses.replace(MMSEG_ADE20K, **_OFFICIAL)
_CITYSCAPES = dataclasses.replace(MMSEG_CITYSCAPES, **_OFFICIAL)
_COCO_STUFF = dataclasses.replace(_ADE20K, dataset="coco_stuff", label_set="coco_stuff", num_classes=171)
# Trained by a script that is now the recipe `scenes` (see there); accuracy in benchmarks/results.
_SCENES = PretrainedCfg(
    state="bundled",
    file="edaformer_t.scenes.safetensors",
    sha256="9124ca5556f880e6357cb27bacfd190570b43b51d5cc7ed1801ceef2990734cf",
    size=9_861_554,
    dataset="scenes",
    label_set="scenes",
    num_classes=13,
    input_size=(256, 512),
    test_size=(256, 512),
    recommended_reduction="optimal",
    license="apache-2.0",
    commercial_use=True,
    origin="segzoo, synthetic street scenes (segzoo.data.scenes)",
    advice="not for photographs, for which `segzoo predict --model segformer_b0.nvidia_ade20k_512` (anything; not "
    "commercial) or `--model rtformer_slim.cityscapes` (streets; Apache-2.0) gets weights",
    published=scores(
        {"base": 89.04, "decoder": 89.05, "optimal": 89.03, "fast": 89.01},
        protocol=f"200 rendered scenes of 256x512, {WHOLE}",
        source="benchmarks/results/scenes_edaformer_t.scenes_256x512_cpu1.csv",
        confirmed_by=OWN_MEASUREMENT,
    ),
)
_TABLES = "arXiv 2407.17261, Tables 1 and 4"


def _official(
    size: str, *, ade20k: tuple[float, ...], cityscapes: tuple[float, ...], coco_stuff: tuple[float, ...]
) -> dict[str, PretrainedCfg]:
    """The rows of a size; mIoU of each at base, decoder, optimal, fast, and fast after fine-tuning with it."""

    def row(data: PretrainedCfg, word: str, miou: tuple[float, ...], protocol: str) -> PretrainedCfg:
        return dataclasses.replace(data, drive_files=drive_files(SIZES[size], word), published=_miou(miou, protocol))

    return {
        "ade20k": row(_ADE20K, "ade", ade20k, WHOLE),
        "cityscapes": row(_CITYSCAPES, "city", cityscapes, SLIDE_1024),
        "coco_stuff": row(_COCO_STUFF, "coco", coco_stuff, WHOLE),
    }


def _miou(values: tuple[float, ...], protocol: str) -> tuple[PublishedScore, ...]:
    *as_trained, tuned = values
    presets: dict[str, float] = dict(zip(("base", "decoder", "optimal", "fast"), as_trained, strict=True))
    return (
        *scores(presets, protocol=protocol, source=_TABLES),
        *scores({"fast": tuned}, protocol=protocol, source=_TABLES, training="fine-tuned with the reduction"),
    )


_MIT = {
    "origin": "arXiv 2407.17261",
    "how_to_get": "no weights of EDAFormer's decoder on MiT are known to be released; train the model and pass "
    "checkpoint_path=",
}

PRETRAINED = {
    "edaformer_t": {
        **_official(
            "t",
            ade20k=(42.3, 42.2, 42.1, 41.3, 42.1),
            cityscapes=(78.7, 78.7, 78.7, 78.1, 78.6),
            coco_stuff=(40.3, 40.3, 40.3, 39.1, 40.2),
        ),
        "scenes": _SCENES,
    },
    "edaformer_b": _official(
        "b",
        ade20k=(49.0, 48.9, 48.9, 48.3, 48.7),
        cityscapes=(81.6, 81.6, 81.6, 81.4, 81.6),
        coco_stuff=(45.9, 45.8, 45.8, 45.0, 45.7),
    ),
    "edaformer_mit_b0": {
        "ade20k": dataclasses.replace(
            MMSEG_ADE20K, **_MIT, published=scores({"base": 40.1}, protocol=WHOLE, source="arXiv 2407.17261, Table 10")
        ),
        "cityscapes": dataclasses.replace(
            MMSEG_CITYSCAPES,
            **_MIT,
            published=scores({"base": 78.2, "ISR": 77.6}, protocol=SLIDE_1024, source="arXiv 2407.17261, Table 7"),
        ),
    },
}
