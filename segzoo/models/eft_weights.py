"""EFT's weights: the official names of its parameters, and where checkpoints are."""

from __future__ import annotations

import dataclasses

from .keys import Layout, Rename, Squeeze
from .rows import PretrainedCfg, scores

# Checkpoints name stages from 1 and may carry the prefix of the segmentation model that they were cut from.
ENCODER_RULES = (
    Rename(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.patch_embed."),
    Rename(r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    Rename(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    Squeeze(r"\.attn\.sr\.weight$"),
    Rename(r"\.attn\.sr\.", ".attn.kv."),
)

LAYOUTS = (Layout("official", r"^block1\.0\.attn\.sr\.", ENCODER_RULES),)

_IMAGENET = PretrainedCfg(
    dataset="imagenet",
    num_classes=1000,
    input_size=(224, 224),
    resize="exact",
    test_size=(224, 224),
    origin="https://github.com/hyunwoo137/EDAFormer",
    how_to_get=(
        "download the ImageNet checkpoint from the Google Drive folder named in the README of "
        "https://github.com/hyunwoo137/EDAFormer and pass it as checkpoint_path="
    ),
)

_TOP1 = {"metric": "top1", "protocol": "224x224", "source": "arXiv 2407.17261, Table 2"}

PRETRAINED = {
    "eft_t": {"imagenet": dataclasses.replace(_IMAGENET, published=scores({"base": 72.3}, **_TOP1))},
    "eft_b": {"imagenet": dataclasses.replace(_IMAGENET, published=scores({"base": 82.4}, **_TOP1))},
}
