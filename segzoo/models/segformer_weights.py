"""SegFormer's weights: the names that its parameters have elsewhere, and where checkpoints are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .keys import Drop, Layout, Prefixed, Rename
from .mit_weights import HUB_RULES, NVIDIA_TERMS, ORIGINAL_RULES, SEGFORMERPP_RULES, TRANSFORMERS_5_RULES
from .rows import MMSEG_ADE20K, MMSEG_CITYSCAPES, PretrainedCfg

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
_SEGFORMERPP_CITYSCAPES = dataclasses.replace(
    _NVIDIA_CITYSCAPES,
    cfg_overrides={"decoder": "segformerpp"},
    license="unknown",
    license_url=None,
    origin="https://github.com/KieDani/SegformerPlusPlus (arXiv 2405.14467)",
    state="url",
    url="https://mediastore.rz.uni-augsburg.de/get/yzE65lzm6N/",
    file="segformerpp_b5_cityscapes.pth",
    miou=82.39,
    miou_protocol="not named in the official README",
)
_SEGFORMERPP_ADE20K = dataclasses.replace(
    _SEGFORMERPP_CITYSCAPES,
    **{
        field: getattr(_NVIDIA, field)
        for field in ("dataset", "label_set", "num_classes", "test_mode", "crop", "stride")
    },
    url="https://mediastore.rz.uni-augsburg.de/get/nKEjUHNAfK/",
    file="segformerpp_b5_ade20k_640.pth",
    miou=49.72,
    input_size=(640, 640),
    test_size=(640, 2048),
)


def _hub(
    row: PretrainedCfg,
    repository: str,
    miou: float | None,
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
        miou=miou,
        **fields,
    )


def _smp(size: str) -> dict[str, PretrainedCfg]:
    """NVIDIA's weights as converted by segmentation_models_pytorch, which publishes no scores of its own."""
    side = 640 if size == "b5" else 512
    ade20k = {"input_size": (side, side), "test_size": (side, 2048), "file": "model.safetensors"}
    return {
        f"smp_ade20k_{side}": _hub(_NVIDIA, f"smp-hub/segformer-{size}-{side}x{side}-ade-160k", None, **ade20k),
        "smp_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES, f"smp-hub/segformer-{size}-1024x1024-city-160k", None, file="model.safetensors"
        ),
    }


_SEGFORMER_WEIGHTS = {
    "segformer_b0": {
        "nvidia_ade20k_512": _hub(
            _NVIDIA,
            "nvidia/segformer-b0-finetuned-ade-512-512",
            37.4,
            revision="489d5cd81a0b59fab9b7ea758d3548ebe99677da",
            file="model.safetensors",
            size=15_036_944,
            sha256="6ae39addd01de6b1b8bde2cf677d43a5cd733424b8d186de3f95d1c51fee23f9",
        ),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b0-finetuned-cityscapes-1024-1024",
            76.2,
            revision="21b3847fae21ddee674abd31129307b6a1235bd9",
            file="pytorch_model.bin",
            size=14_957_601,
            sha256="027ed78d8ff9c535df5a66361c92b9673cca3cb923cbeb8c5802385b6b93194c",
        ),
    },
    "segformer_b1": {
        "nvidia_ade20k_512": _hub(_NVIDIA, "nvidia/segformer-b1-finetuned-ade-512-512", 42.2),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b1-finetuned-cityscapes-1024-1024",
            78.5,
            revision="ec86afeba68e656629ccf47e0c8d2902f964917b",
        ),
    },
    "segformer_b2": {
        "nvidia_ade20k_512": _hub(_NVIDIA, "nvidia/segformer-b2-finetuned-ade-512-512", 46.5),
        "nvidia_cityscapes_1024": _hub(
            _NVIDIA_CITYSCAPES,
            "nvidia/segformer-b2-finetuned-cityscapes-1024-1024",
            81.0,
            revision="d633b2072669ca68d8f8e309de9b52bfdbf6bf72",
            file="pytorch_model.bin",
            size=109_597_961,
        ),
    },
    "segformer_b3": {
        "nvidia_ade20k_512": _hub(
            _NVIDIA,
            "nvidia/segformer-b3-finetuned-ade-512-512",
            49.4,
            revision="a820c29fc1e53723079d94ca0e09a14d2657fae6",
        ),
        "nvidia_cityscapes_1024": _hub(_NVIDIA_CITYSCAPES, "nvidia/segformer-b3-finetuned-cityscapes-1024-1024", 81.7),
    },
    "segformer_b4": {
        "nvidia_ade20k_512": _hub(_NVIDIA, "nvidia/segformer-b4-finetuned-ade-512-512", 50.3),
        "nvidia_cityscapes_1024": _hub(_NVIDIA_CITYSCAPES, "nvidia/segformer-b4-finetuned-cityscapes-1024-1024", 82.3),
    },
    "segformer_b5": {
        "nvidia_ade20k_640": _hub(
            _NVIDIA, "nvidia/segformer-b5-finetuned-ade-640-640", 51.0, input_size=(640, 640), test_size=(640, 2048)
        ),
        "nvidia_cityscapes_1024": _hub(_NVIDIA_CITYSCAPES, "nvidia/segformer-b5-finetuned-cityscapes-1024-1024", 82.4),
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


PRETRAINED = {
    **_SEGFORMER_WEIGHTS,
    **{alias: _SEGFORMER_WEIGHTS[name] for alias, (name, _) in merged_names(_SEGFORMER_WEIGHTS).items()},
}
