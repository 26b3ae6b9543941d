"""SegViT's weights: the official names of its parameters, and where checkpoints are."""

from __future__ import annotations

from typing import Any

from .keys import Drop, Layout, Prefixed, Rename, Split
from .rows import PretrainedCfg, PublishedScore
from .vit_weights import MMSEG_RULES

STAGE_RULES = (
    Drop(r"criterion\.empty_weight$", "class weights of the loss"),
    Drop(r"^(conv_seg|conv_0|conv_1|syncbn_fc_0)\.", "classifiers of mmseg and of an early version, not used"),
    Rename(r"^input_proj_(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.proj."),
    Rename(r"^proj_norm_(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    Rename(r"^decoder_(\d)\.layers\.", lambda m: f"stages.{int(m[1]) - 1}.layers."),
    Rename(r"\.self_attn\.in_proj_", ".self_attn.qkv."),
    Rename(r"\.self_attn\.out_proj\.", ".self_attn.proj."),
    Rename(r"\.multihead_attn\.out_proj\.", ".cross_attn.proj."),
    Rename(r"\.multihead_attn\.", ".cross_attn."),
    # torch packs the projections of its cross-attention; attention-to-mask has three.
    Split(
        r"\.cross_attn\.in_proj_(weight|bias)$",
        ((r".cross_attn.q.\1", 1), (r".cross_attn.k.\1", 1), (r".cross_attn.v.\1", 1)),
    ),
)
ATM_RULES = (*STAGE_RULES, Rename(r"^q\.weight$", "class_queries"))
OFFICIAL_RULES = (
    Prefixed("backbone.", "encoder.", MMSEG_RULES),
    Prefixed("decode_head.", "decoder.atm.", ATM_RULES),
)
# `decode_head.q` holds the spatial queries here and `atm.q` the classes.
OFFICIAL_SHRUNK_RULES = (
    Prefixed("backbone.", "encoder.", MMSEG_RULES),
    Prefixed("decode_head.atm.", "decoder.atm.", ATM_RULES),
    Prefixed("decode_head.", "decoder.upsample.", (*STAGE_RULES, Rename(r"^q\.weight$", "queries"))),
)

LAYOUTS = (
    Layout("official", r"^decode_head\.class_embed\.", OFFICIAL_RULES),
    Layout("official shrunk", r"^decode_head\.atm\.class_embed\.", OFFICIAL_SHRUNK_RULES),
)


_README = "README of github.com/zbwxp/SegVit"


def _row(file: str, single: float, multi: float, *, table: int, **fields: Any) -> PretrainedCfg:
    """A released checkpoint: the .pth files of one Hub repository.

    Args:
        single, multi: mIoU at a single scale and at several, in percent. Of the paper's tables, only Table 1 has
            the former; the others stand in the README and in the names of the files.
        table: of the paper.
    """
    of_paper = f"arXiv 2210.05844, Table {table}"
    return PretrainedCfg(
        state="hub",
        hf_hub_id="Akide/SegViTv1",
        hf_hub_filename=file,
        hf_revision="1cfdaf61e504fb2bd81753425711b5e579b34b69",
        test_mode="slide",
        published=(
            PublishedScore(
                value=single,
                protocol="single scale, sliding window",
                source=of_paper if table == 1 else f"the name of the released file, {file}",
                confirmed_by=_README,
            ),
            PublishedScore(value=multi, protocol="multi-scale", source=of_paper, confirmed_by=_README),
        ),
        license="adelaidet-non-commercial",
        license_url="https://huggingface.co/Akide/SegViTv1",
        commercial_use=False,
        origin="https://github.com/zbwxp/SegVit (arXiv 2210.05844)",
        **fields,
    )


_ADE20K = {"dataset": "ade20k", "label_set": "ade20k", "num_classes": 150}
_COCO_STUFF = {"dataset": "coco_stuff10k", "label_set": "coco_stuff", "num_classes": 171}
_CONTEXT = {"dataset": "pascal_context", "label_set": "pascal_context_59", "num_classes": 59}
_CONTEXT_60 = {"dataset": "pascal_context", "label_set": "pascal_context_60", "num_classes": 60}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # 127.5 in [0, 255]
_SIDE_512 = {
    "input_size": (512, 512),
    "test_size": (512, 2048),
    "test_min_side": 512,
    "crop": (512, 512),
    "stride": (341, 341),
    "cfg_overrides": {"encoder": {"img_size": (512, 512)}},
}
_SIDE_640 = {
    "input_size": (640, 640),
    "test_size": (640, 2048),
    "crop": (640, 640),
    "stride": (608, 608),
    "cfg_overrides": {"encoder": {"img_size": (640, 640)}},
}
_SIDE_480 = {
    "input_size": (480, 480),
    "test_size": (520, 520),
    "test_min_side": 480,
    "crop": (480, 480),
    "stride": (320, 320),
    "cfg_overrides": {"encoder": {"img_size": (480, 480)}},
}


def _unreleased(**fields: Any) -> PretrainedCfg:
    """A training of the paper whose weights are not known to be released, and whose figures could not be read."""
    return PretrainedCfg(
        test_mode="slide",
        origin="https://github.com/zbwxp/SegVit (arXiv 2210.05844)",
        how_to_get="the released files of PASCAL Context have 59 classes; train the model with 60 and pass "
        "checkpoint_path=",
        **fields,
    )


PRETRAINED = {
    "segvit_base": {"ade20k": _row("ade_51.3.pth", 51.3, 53.0, table=1, **_ADE20K, **_SIDE_512)},
    "segvit_large": {
        "ade20k": _row("ade_54.6.pth", 54.6, 55.2, table=1, **_ADE20K, **_HALF, **_SIDE_640),
        "coco_stuff10k": _row("COCOstuff_49.9.pth", 49.9, 50.3, table=2, **_COCO_STUFF, **_HALF, **_SIDE_512),
        "pascal_context": _row("PC59cls_64.1.pth", 64.1, 65.3, table=3, **_CONTEXT, **_HALF, **_SIDE_480),
        "pascal_context_60": _unreleased(**_CONTEXT_60, **_HALF, **_SIDE_480),
    },
    "segvit_large_shrunk": {
        "ade20k": _row("ade_shrunk_53.9.pth", 53.9, 55.1, table=1, **_ADE20K, **_HALF, **_SIDE_640),
        "coco_stuff10k": _row("COCOstuff10k_shrunk_49.1.pth", 49.1, 49.4, table=2, **_COCO_STUFF, **_HALF, **_SIDE_512),
        "pascal_context": _row("PC59cls_62.3.pth", 62.3, 63.7, table=3, **_CONTEXT, **_HALF, **_SIDE_480),
        "pascal_context_60": _unreleased(**_CONTEXT_60, **_HALF, **_SIDE_480),
    },
}
