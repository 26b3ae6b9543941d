"""The record of RTFormer's weights: official names of parameters to segzoo's, and where the files are.

Licence of the published weights: Apache-2.0 (PaddleSeg).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .keys import Drop, Layout, Rename, Squeeze
from .rows import IMAGENET, WHOLE, PretrainedCfg, PublishedScore, scores

# --- key rules ------------------------------------------------------------------------------------------------------

# The backbone's keys: official -> ours, both without prefix.
ENCODER_RULES = (
    Rename(r"\._mean$", ".running_mean"),
    Rename(r"\._variance$", ".running_var"),
    Rename(r"^conv1\.(0|3)\.", lambda m: f"stem.{int(m[1]) // 3}.conv."),
    Rename(r"^conv1\.(1|4)\.", lambda m: f"stem.{int(m[1]) // 3}.bn."),
    Rename(r"^layer3_\.", "layer3_high."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.conv([12])\.", r"\1.conv\2.conv."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.bn([12])\.", r"\1.conv\2.bn."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.downsample\.1\.", r"\1.shortcut.bn."),
    Rename(r"^(compression3|layer[45]\.compression)\.0\.", r"\1.bn."),
    Rename(r"^(compression3|layer[45]\.compression)\.2\.", r"\1.conv."),
    Rename(r"^layer([45])\.", lambda m: f"blocks.{int(m[1]) - 4}."),
    Rename(r"^(blocks\.\d\.)compression\.", r"\1compress."),
    Rename(r"^compression3\.", "compress3."),
    Rename(r"\.attn_shortcut_l\.0\.", ".shortcut_low.bn."),
    Rename(r"\.attn_shortcut_l\.1\.", ".shortcut_low.conv."),
    Rename(r"\.attn_l\.norm\.", ".attn_low.keys.bn."),
    Rename(r"\.attn_l\.k$", ".attn_low.keys.conv.weight"),
    Rename(r"\.attn_l\.v$", ".attn_low.values.weight"),
    Squeeze(r"\.attn_low\.values\.weight$"),
    Rename(r"\.attn_h\.norm\.", ".attn_high.norm."),
    Rename(r"\.cross_kv\.0\.", ".attn_high.kv_norm."),
    Rename(r"\.cross_kv\.2\.", ".attn_high.kv."),
    Rename(r"\.mlp_l\.", ".mlp_low."),
    Rename(r"\.mlp_h\.", ".mlp_high."),
    Rename(r"\.down\.", ".inject."),
)
# The decoder's: official, behind the backbone's rules -> the model's.
DECODER_RULES = (
    Rename(r"^spp\.scale0\.(\d)\.", lambda m: f"decoder.context.point.{m[1]}."),
    Rename(r"^spp\.scale([1-4])\.(\d)\.", lambda m: f"decoder.context.scales.{int(m[1]) - 1}.{int(m[2]) - 1}."),
    Rename(r"^spp\.process([1-4])\.(\d)\.", lambda m: f"decoder.context.process.{int(m[1]) - 1}.{m[2]}."),
    Rename(r"^spp\.(compression|shortcut)\.(\d)\.", lambda m: f"decoder.context.{m[1]}.{m[2]}."),
    Rename(r"^(decoder\.context\..*?)\.0\.(?=[a-z_]+$)", r"\1.bn."),
    Rename(r"^(decoder\.context\..*?)\.2\.(?=[a-z_]+$)", r"\1.conv."),
    Rename(r"^decoder\.context\.compression\.", "decoder.context.compress."),
    Rename(r"^seghead\.", "decoder.head."),
    Rename(r"^seghead_extra\.", "decoder.aux_heads.0."),
    Rename(r"^(decoder\.(?:head|aux_heads\.0))\.conv1\.", r"\1.conv."),
    Rename(r"^(decoder\.(?:head|aux_heads\.0))\.conv2\.", r"\1.classifier."),
)
SIGNATURE = r"^layer4\.attn_l\.k$"

BACKBONE_LAYOUTS = (
    Layout(
        "official",
        SIGNATURE,
        (Drop(r"^(spp|seghead|seghead_extra)\.", "the segmentation decoder, no part of the encoder"), *ENCODER_RULES),
    ),
)
LAYOUTS = (
    Layout(
        "official",
        SIGNATURE,
        (
            *ENCODER_RULES,
            *DECODER_RULES,
            Rename(r"^(stem|layer[123]|layer3_high|compress3|blocks)\.", r"encoder.\1."),
        ),
    ),
)

# --- rows -----------------------------------------------------------------------------------------------------------

_ORIGIN = "https://github.com/PaddlePaddle/PaddleSeg (configs/rtformer; arXiv 2210.07124)"
_STORE = "https://paddleseg.bj.bcebos.com/dygraph"

_CITYSCAPES = PretrainedCfg(
    dataset="cityscapes",
    label_set="cityscapes",
    num_classes=19,
    input_size=(512, 1024),
    resize="keep_ratio",
    test_size=(1024, 2048),
    license="apache-2.0",
    commercial_use=True,
    origin=_ORIGIN,
)
_ADE20K = dataclasses.replace(
    _CITYSCAPES,
    dataset="ade20k",
    label_set="ade20k",
    num_classes=150,
    input_size=(512, 512),
    test_size=(512, 2048),
)
# No weights were released for these two; the options are the paper's.
_CAMVID = dataclasses.replace(
    _CITYSCAPES,
    dataset="camvid",
    label_set="camvid",
    num_classes=11,
    input_size=(720, 960),
    test_size=(720, 960),
    license="unknown",
    commercial_use=None,
    how_to_get="nobody has released these weights; train from the backbone's ImageNet weights, as the paper does, and "
    "pass checkpoint_path=",
)
_COCO_STUFF_10K = dataclasses.replace(
    _CAMVID,
    how_to_get="nobody has released these weights; train the model and pass checkpoint_path=",
    dataset="coco_stuff10k",
    label_set="coco_stuff",
    num_classes=171,
    input_size=(640, 640),
    resize="exact",
    test_size=(640, 640),
)
_IMAGENET = PretrainedCfg(
    state="url",
    **IMAGENET,
    num_classes=0,  # the archives hold no classifier
    license="apache-2.0",
    commercial_use=True,
    origin=_ORIGIN,
)


_README = "configs/rtformer/README.md of PaddleSeg"
_LISTINGS = "indexes of papers' results (Papers with Code, wizwand)"


def _released(
    row: PretrainedCfg, file: str, readme: tuple[float, float, float], paper: tuple[PublishedScore, ...], **options: Any
) -> PretrainedCfg:
    """A released model; `readme` is the mIoU that its README states: plain, with flip, at several scales with flip."""
    protocols = (WHOLE, f"{WHOLE}, flip", "multi-scale, flip")
    stated = tuple(
        PublishedScore(value=value, protocol=protocol, source=_README, confirmed_by="its text")
        for value, protocol in zip(readme, protocols, strict=True)
    )
    return dataclasses.replace(
        row,
        state="url",
        url=f"{_STORE}/{row.dataset}/{file}/model.pdparams",
        published=(*stated, *paper),
        cfg_overrides=options,
    )


def _paper(row: PretrainedCfg, published: tuple[PublishedScore, ...] = (), **options: Any) -> PretrainedCfg:
    return dataclasses.replace(row, published=published, cfg_overrides=options)


def _miou(value: float, confirmed_by: str = "") -> tuple[PublishedScore, ...]:
    """The paper's own figure."""
    return scores({"base": value}, source="arXiv 2210.07124", confirmed_by=confirmed_by)


PRETRAINED = {
    "rtformer_slim": {
        "cityscapes": _released(
            _CITYSCAPES,
            "rtformer_slim_cityscapes_1024x512_120k",
            (76.31, 77.05, 77.58),
            _miou(76.3, _LISTINGS),
            cross_size=12,
            injection=(True, True),
            drop_path_rate=0.2,
        ),
        "ade20k": _released(
            _ADE20K,
            "rtformer_slim_ade20k_512x512_160k",
            (36.67, 37.32, 37.20),
            _miou(36.7),
            cross_size=8,
            injection=(True, False),
            drop_path_rate=0.1,
        ),
        "camvid": _paper(_CAMVID, _miou(81.4, _LISTINGS), cross_size=8, injection=(True, False), drop_path_rate=0.2),
        "coco_stuff10k": _paper(_COCO_STUFF_10K, cross_size=8, injection=(True, False), drop_path_rate=0.1),
    },
    "rtformer_base": {
        "cityscapes": _released(
            _CITYSCAPES,
            "rtformer_base_cityscapes_1024x512_120k",
            (79.24, 79.80, 80.19),
            _miou(79.3, _LISTINGS),
            cross_size=12,
            injection=(True, False),
            drop_path_rate=0.2,
        ),
        "ade20k": _released(
            _ADE20K,
            "rtformer_base_ade20k_512x512_160k",
            (42.02, 42.43, 42.72),
            _miou(42.1, _LISTINGS),
            cross_size=12,
            injection=(True, False),
            drop_path_rate=0.1,
        ),
        "camvid": _paper(_CAMVID, _miou(82.5, _LISTINGS), cross_size=12, injection=(True, False), drop_path_rate=0.2),
        "coco_stuff10k": _paper(
            _COCO_STUFF_10K, _miou(35.3, _LISTINGS), cross_size=12, injection=(True, False), drop_path_rate=0.1
        ),
    },
}
# The classifier that reached these figures was not released.
_TOP1 = {"metric": "top1", "protocol": "224x224", "source": "arXiv 2210.07124, Table 7"}


def _backbone(size: str, published: tuple[PublishedScore, ...]) -> dict[str, PretrainedCfg]:
    url = f"{_STORE}/backbone/rtformer_{size}_backbone_imagenet_pretrained.zip"
    return {"imagenet": dataclasses.replace(_IMAGENET, url=url, published=published)}


BACKBONE_PRETRAINED = {
    "rtformer_slim_backbone": _backbone("slim", scores({"base": 72.3}, **_TOP1)),
    "rtformer_base_backbone": _backbone("base", scores({"base": 77.4}, confirmed_by=_LISTINGS, **_TOP1)),
}
