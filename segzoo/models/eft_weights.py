"""EFT's weights: the official names of its parameters, and where checkpoints are."""

from __future__ import annotations

import dataclasses

from .keys import Layout, Rename, Squeeze
from .rows import IMAGENET, PretrainedCfg, scores

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

# The authors' public folder, named in the README of their repository. What its files are called nobody here has seen:
# their configurations name EFT_T.pth, and are called edaformer.tiny.512x512.ade.160k.py.
DRIVE_FOLDER = "1hiAFQcfH9qd37WOc1_HMB0vKzbY-IWrO"
SIZES = {"t": "(?:edaformer|eft)?(?:t|tiny)(?![a-z0-9])", "b": "(?:edaformer|eft)?(?:b|base)(?![a-z0-9])"}


def drive_files(*words: str) -> str:
    """Pattern of the checkpoints whose path has all of these patterns, each at the beginning of a word."""
    return "".join(f"(?=.*(?<![a-z]){word})" for word in words) + r".*\.(?:pth|pt|tar|bin|ckpt|safetensors)$"


DRIVE = {
    "state": "drive",
    "drive_folder": DRIVE_FOLDER,
    "how_to_get": "pip install 'segzoo[drive]', then pretrained=True finds the file there by its name, with the strict "
    "load as the only proof of it; or download it in a browser and pass it as checkpoint_path=",
}
_IMAGENET = dataclasses.replace(
    PretrainedCfg(**IMAGENET, num_classes=1000),
    origin="https://github.com/hyunwoo137/EDAFormer",
    **DRIVE,
)


def _imagenet(size: str, top1: float) -> dict[str, PretrainedCfg]:
    published = scores({"base": top1}, metric="top1", protocol="224x224", source="arXiv 2407.17261, Table 2")
    files = drive_files(f"eft[-_. ]?{SIZES[size]}")
    return {"imagenet": dataclasses.replace(_IMAGENET, drive_files=files, published=published)}


PRETRAINED = {"eft_t": _imagenet("t", 72.3), "eft_b": _imagenet("b", 82.4)}
