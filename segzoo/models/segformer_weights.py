"""SegFormer's weights: the names that its parameters have elsewhere, and where checkpoints are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .keys import Drop, Layout, Prefixed, Rename
from .mit_weights import HUB_RULES, NVIDIA_TERMS, ORIGINAL_RULES, SEGFORMERPP_RULES, TRANSFORMERS_5_RULES
from .rows import MMSEG_ADE20K, MMSEG_CITYSCAPES, SLIDE_1024, WHOLE, PretrainedCfg, PublishedScore, scores

_ORIGINAL = (
    Drop(r"^decode_head\.conv_seg\.", "mmseg's classifier, never used by this head"),
    Prefixed("backbone.", "encoder.", ORIGINAL_RULES),
    Rename(r"^decode_head\.linear_c(\d)\.proj\.", lambda m: f"decoder.projections.{int(m[1]) - 1}."),
    Rename(r"^decode_head\.linear_fuse\.", "decoder.fuse."),
    Rename(r"^decode_head\.linear_pred\.", "decoder.classifier."),
)
_TRANSFORMERS_HEAD = (
    Rename(r"^decode_head\.(linear_c|linear_projections)\.(\d)\.proj\.", r"decoder.projections.\2."),
    Rename(r"^decode_head\.linear_fuse\.", "decoder.fuse.conv."),
    Rename(r"^decode_head\.batch_norm\.", "decoder.fuse.bn."),
    Rename(r"^decode_head\.classifier\.", "decoder.classifier."),
)
_HUB = (Prefixed("segformer.encoder.", "encoder.", HUB_RULES), *_TRANSFORMERS_HEAD)
_TRANSFORMERS_5 = (Prefixed("segformer.", "encoder.", TRANSFORMERS_5_RULES), *_TRANSFORMERS_HEAD)
_SMP = (
    Prefixed("encoder.", "encoder.", ORIGINAL_RULES),
    Rename(r"^decoder\.mlp_stage\.(\d)\.linear\.", lambda m: f"decoder.projections.{3 - int(m[1])}."),
    Rename(r"^decoder\.fuse_stage\.0\.", "decoder.fuse.conv."),
    Rename(r"^decoder\.fuse_stage\.1\.", "decoder.fuse.bn."),
    Rename(r"^segmentation_head\.0\.", "decoder.classifier."),
)
_SEGFORMERPP = (
    Prefixed("backbone.", "encoder.", SEGFORMERPP_RULES),
    Rename(r"^decode_head\.convs\.(\d)\.", r"decoder.level_convs.\1."),
    Rename(r"^decode_head\.fusion_conv\.", "decoder.fuse."),
    Rename(r"^decode_head\.conv_seg\.", "decoder.classifier."),
)

LAYOUTS = (
    Layout("original", r"^decode_head\.linear_c4\.proj\.", _ORIGINAL),
    Layout("hub", r"^segformer\.encoder\.", _HUB),
    Layout("transformers 5", r"^segformer\.stages\.", _TRANSFORMERS_5),
    Layout("smp", r"^decoder\.mlp_stage\.", _SMP),
    Layout("segformer++", r"^decode_head\.fusion_conv\.", _SEGFORMERPP),
)

_NVIDIA = dataclasses.replace(MMSEG_ADE20K, **NVIDIA_TERMS)
_NVIDIA_CITYSCAPES = dataclasses.replace(MMSEG_CITYSCAPES, **NVIDIA_TERMS)
_TABLE_2 = {"source": "arXiv 2405.14467, Table II"}
_PLUS_README = {"confirmed_by": "README of github.com/KieDani/SegformerPlusPlus"}
_MERGED = "trained with the reduction"
_SEGFORMERPP_CITYSCAPES = dataclasses.replace(
    _NVIDIA_CITYSCAPES,
    cfg_overrides={"decoder": "segformerpp"},
    license="unknown",
    license_url=None,
    origin="https://github.com/KieDani/SegformerPlusPlus (arXiv 2405.14467)",
    state="url",
    url="https://mediastore.rz.uni-augsburg.de/get/yzE65lzm6N/",
    file="segformerpp_b5_cityscapes.pth",
    published=(
        *scores({"base": 82.39, "hq": 82.31, "fast": 82.04, "n2d": 81.96}, **_TABLE_2, **_PLUS_README),
        *scores({"base": 72.97, "hq": 72.93, "fast": 72.72, "n2d": 72.24}, metric="miou_small", **_TABLE_2),
        *scores(
            {"hq": 82.19, "fast": 81.77, "n2d": 82.38},
            source="arXiv 2405.14467, Table III",
            training=_MERGED,
            **_PLUS_README,
        ),
    ),
)
# Of B2 the paper has figures, but its authors released no weights.
_SEGFORMERPP_B2_CITYSCAPES = dataclasses.replace(
    _SEGFORMERPP_CITYSCAPES,
    state="unpublished",
    url=None,
    file=None,
    how_to_get="Segformer++'s authors released B5 alone; train the model and pass checkpoint_path=, or take "
    "nvidia_cityscapes_1024",
    published=(
        *scores({"base": 81.08, "hq": 81.03, "fast": 80.62, "n2d": 80.38}, **_TABLE_2),
        *scores({"base": 71.97, "hq": 71.83, "fast": 71.53, "n2d": 71.02}, metric="miou_small", **_TABLE_2),
    ),
)
_SEGFORMERPP_ADE20K = dataclasses.replace(
    _SEGFORMERPP_CITYSCAPES,
    **{
        field: getattr(_NVIDIA, field)
        for field in ("dataset", "label_set", "num_classes", "test_mode", "crop", "stride")
    },
    url="https://mediastore.rz.uni-augsburg.de/get/nKEjUHNAfK/",
    file="segformerpp_b5_ade20k_640.pth",
    published=(
        *scores({"base": 49.72}, source="arXiv 2405.14467", **_PLUS_README),
        *scores(
            {"hq": 49.77, "fast": 49.10, "n2d": 49.35}, source="arXiv 2405.14467", training=_MERGED, **_PLUS_README
        ),
    ),
    input_size=(640, 640),
    test_size=(640, 2048),
)


# Where figures of SegFormer's Table 1 were read again; the paper's tables themselves could not be.
_ABSTRACT = "the paper's abstract and Figure 1"
_QUOTED = "tables of other projects that quote it"
_ISSUES = "issues 28 and 128 of github.com/NVlabs/SegFormer"


def _table_1(
    single: float, protocol: str, confirmed_by: str = "", *, multi: float | None = None
) -> tuple[PublishedScore, ...]:
    """mIoU of SegFormer's Table 1 at a single scale, and at several where that was confirmed."""
    of_table = {"source": "arXiv 2105.15203, Table 1"}
    listed = {"protocol": "multi-scale, flip", "confirmed_by": "the paper's abstract, or Papers with Code"}
    return (
        *scores({"base": single}, protocol=protocol, confirmed_by=confirmed_by, **of_table),
        *(scores({"base": multi}, **listed, **of_table) if multi is not None else ()),
    )


def _hub(
    row: PretrainedCfg,
    repository: str,
    published: tuple[PublishedScore, ...] = (),
    *,
    revision: str | None = None,
    file: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
    **fields: object,
) -> PretrainedCfg:
    """A row of the Hub. One whose commit is not recorded follows the branch "main"."""
    return dataclasses.replace(
        row,
        state="hub",
        hf_hub_id=repository,
        hf_hub_filename=file,
        hf_revision=revision,
        size=size,
        sha256=sha256,
        published=published,
        **fields,
    )


def _smp(size: str) -> dict[str, PretrainedCfg]:
    """NVIDIA's weights as converted by segmentation_models_pytorch, which publishes no scores of its own."""
    side = 640 if size == "b5" else 512
    ade20k = {"input_size": (side, side), "test_size": (side, 2048), "file": "model.safetensors"}
    return {
        f"smp_ade20k_{side}": _hub(_NVIDIA, f"smp-hub/segformer-{size}-{side}x{side}-ade-160k", **ade20k),
        "smp_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES, f"smp-hub/segformer-{size}-1024x1024-city-160k", file="model.safetensors"
        ),
    }


_SEGFORMER_WEIGHTS = {
    "segformer_b0": {
        "nvidia_ade20k_512": _hub(
            _NVIDIA,
            "nvidia/segformer-b0-finetuned-ade-512-512",
            _table_1(37.4, WHOLE, _QUOTED),
            revision="489d5cd81a0b59fab9b7ea758d3548ebe99677da",
            file="model.safetensors",
            size=15_036_944,
            sha256="6ae39addd01de6b1b8bde2cf677d43a5cd733424b8d186de3f95d1c51fee23f9",
        ),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b0-finetuned-cityscapes-1024-1024",
            _table_1(76.2, SLIDE_1024, _QUOTED),
            revision="21b3847fae21ddee674abd31129307b6a1235bd9",
            file="pytorch_model.bin",
            size=14_957_601,
            sha256="027ed78d8ff9c535df5a66361c92b9673cca3cb923cbeb8c5802385b6b93194c",
        ),
    },
    "segformer_b1": {
        "nvidia_ade20k_512": _hub(_NVIDIA, "nvidia/segformer-b1-finetuned-ade-512-512", _table_1(42.2, WHOLE, _QUOTED)),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b1-finetuned-cityscapes-1024-1024",
            _table_1(78.5, SLIDE_1024, _QUOTED),
            revision="ec86afeba68e656629ccf47e0c8d2902f964917b",
        ),
    },
    "segformer_b2": {
        "nvidia_ade20k_512": _hub(_NVIDIA, "nvidia/segformer-b2-finetuned-ade-512-512", _table_1(46.5, WHOLE, _QUOTED)),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b2-finetuned-cityscapes-1024-1024",
            _table_1(81.0, SLIDE_1024, _ISSUES),
            revision="d633b2072669ca68d8f8e309de9b52bfdbf6bf72",
            file="pytorch_model.bin",
            size=109_597_961,
        ),
        "segformerpp_cityscapes_1024": _SEGFORMERPP_B2_CITYSCAPES,
    },
    "segformer_b3": {
        "nvidia_ade20k_512": _hub(
            _NVIDIA,
            "nvidia/segformer-b3-finetuned-ade-512-512",
            _table_1(49.4, WHOLE, _QUOTED),
            revision="a820c29fc1e53723079d94ca0e09a14d2657fae6",
        ),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES, "nvidia/segformer-b3-finetuned-cityscapes-1024-1024", _table_1(81.7, SLIDE_1024)
        ),
    },
    "segformer_b4": {
        "nvidia_ade20k_512": _hub(
            _NVIDIA, "nvidia/segformer-b4-finetuned-ade-512-512", _table_1(50.3, WHOLE, _ABSTRACT, multi=51.1)
        ),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES, "nvidia/segformer-b4-finetuned-cityscapes-1024-1024", _table_1(82.3, SLIDE_1024)
        ),
    },
    "segformer_b5": {
        "nvidia_ade20k_640": _hub(
            _NVIDIA,
            "nvidia/segformer-b5-finetuned-ade-640-640",
            _table_1(51.0, WHOLE, _ABSTRACT, multi=51.8),
            input_size=(640, 640),
            test_size=(640, 2048),
        ),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b5-finetuned-cityscapes-1024-1024",
            _table_1(82.4, SLIDE_1024, _ISSUES, multi=84.0),
        ),
        "segformerpp_ade20k_640": _SEGFORMERPP_ADE20K,
        "segformerpp_cityscapes_1024": _SEGFORMERPP_CITYSCAPES,
    },
}

_SEGFORMER_WEIGHTS = {name: {**rows, **_smp(name.rpartition("_")[2])} for name, rows in _SEGFORMER_WEIGHTS.items()}


def merged_names(rows: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Segformer++'s names: {"segformerpp_b2_hq": ("segformer_b2", "hq"), ...}, the same models with a preset set."""
    return {
        f"{name.replace('segformer', 'segformerpp')}_{preset}": (name, preset)
        for name in rows
        for preset in ("hq", "fast", "n2d")
    }


def _cityscapes_first(rows: Mapping[str, PretrainedCfg]) -> dict[str, PretrainedCfg]:
    """Segformer++ is about Cityscapes, so that its names default to these weights, its own before NVIDIA's."""
    return dict(
        sorted(
            rows.items(),
            key=lambda row: (row[1].dataset != "cityscapes", not row[1].loadable, not row[0].startswith("segformerpp")),
        )
    )


PRETRAINED = {
    **_SEGFORMER_WEIGHTS,
    **{
        alias: _cityscapes_first(_SEGFORMER_WEIGHTS[name])
        for alias, (name, _) in merged_names(_SEGFORMER_WEIGHTS).items()
    },
}
