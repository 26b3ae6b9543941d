"""EDAFormer's weights: the official names of its parameters, and where checkpoints are."""

from __future__ import annotations

import dataclasses

from .eft_weights import ENCODER_RULES
from .keys import Drop, Layout, Prefixed, Rename, Squeeze
from .rows import MMSEG_ADE20K, MMSEG_CITYSCAPES, PretrainedCfg

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

_RECIPE = (
    "download the checkpoint from the Google Drive folder named in the README of "
    "https://github.com/hyunwoo137/EDAFormer and pass it as checkpoint_path="
)
_ORIGIN = "https://github.com/hyunwoo137/EDAFormer (arXiv 2407.17261)"
_UNPUBLISHED = {"recommended_reduction": "optimal", "origin": _ORIGIN, "how_to_get": _RECIPE}
_ADE20K = dataclasses.replace(MMSEG_ADE20K, **_UNPUBLISHED)
_CITYSCAPES = dataclasses.replace(MMSEG_CITYSCAPES, **_UNPUBLISHED)
_COCO_STUFF = dataclasses.replace(_ADE20K, dataset="coco_stuff", label_set="coco_stuff", num_classes=171)
# Trained by benchmarks/train_scenes.py; accuracy in benchmarks/results.
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
)
_OFFICIAL = {"ade20k": _ADE20K, "cityscapes": _CITYSCAPES, "coco_stuff": _COCO_STUFF}

PRETRAINED = {"edaformer_t": {**_OFFICIAL, "scenes": _SCENES}, "edaformer_b": _OFFICIAL}
