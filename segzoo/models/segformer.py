"""SegFormer (Xie et al., NeurIPS 2021, arXiv 2105.15203) and Segformer++ (Kienzle et al., 2024, arXiv 2405.14467).

What the released code computes (github.com/NVlabs/SegFormer @65fa8cf, `segformer_head.py`): every map goes through a
Linear without norm or activation, is resized to c1's grid, concatenated in the order c4, c3, c2, c1, fused by 1x1
convolution + BN + ReLU and classified at stride 4. Segformer++ (github.com/KieDani/SegformerPlusPlus @7fb8797) is
this model with token merging around the attention, which has no parameters; but its own checkpoints were trained
with mmsegmentation's decoder (1x1 convolution + BN + ReLU a level, 256 channels for every size, order c1 to c4) and
LayerNorm eps 1e-6 everywhere. That is the option `decoder="segformerpp"`. Its other task, human pose, takes the same
network with one heatmap per keypoint in place of the classes: `segformer_b0_keypoints` and so on, without weights.

What segzoo changed: as in `mit.py`; token merging is a reduction plan (presets "hq", "fast", "n2d"), so that
`segformerpp_b2_hq` is `segformer_b2`, its weights included, with a plan set; and the unused `conv_seg` of NVIDIA's
checkpoints is dropped.

Licence of the published weights: NVIDIA Source Code License, research and evaluation only; Segformer++'s are derived
from them and state none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .._errors import SegzooError, WeightsError
from ..layers.conv import ConvBNReLU, FoldedFuseLevels, FuseLevels
from ..layers.init import init_weights
from ..layers.shapes import to_channels_first, to_channels_last
from .base import Encoder, EncoderDecoder
from .family import Family, PublishedCost, Variant, register_family
from .keys import Drop, Layout, Prefixed, Rename, StateDict
from .mit import (
    HUB_RULES,
    MIT_B0,
    MIT_B1,
    MIT_B2,
    MIT_B3,
    MIT_B4,
    MIT_B5,
    NVIDIA_TERMS,
    ORIGINAL_RULES,
    SEGFORMERPP_RULES,
    TEST_MIT,
    TRANSFORMERS_5_RULES,
    MiT,
    MiTConfig,
)
from .rows import MMSEG_ADE20K, MMSEG_CITYSCAPES, PretrainedCfg


@dataclasses.dataclass(frozen=True)
class SegFormerConfig:
    """Configuration of SegFormer."""

    encoder: MiTConfig = MIT_B0
    score_kind: str = "logits"  # "logits" of num_classes classes, or "heatmap": one a keypoint, num_classes of them
    decoder: str = "segformer"  # "segformer", or "segformerpp": the decoder and eps of Segformer++'s own checkpoints
    decoder_dim: int = 256  # channels of decoder "segformer"
    segformerpp_dim: int = 256  # channels of decoder "segformerpp"
    conv_norm_eps: float | None = None  # of the encoder's; None: 1e-5, or 1e-6 with decoder "segformerpp"
    dropout: float = 0.1  # of whole channels before the classifier
    drop_path_rate: float = 0.1  # of the encoder's last block; grows linearly from 0
    in_chans: int = 3
    num_classes: int = 150


class AllMLPDecoder(nn.Module):
    """SegFormer's decoder, linear up to the ReLU: maps -> scores at the resolution of the finest.

    Args:
        in_chans: channels of the encoder's maps, fine to coarse.
        dim: channels that every map is projected to, and of the fusion.
        dropout: probability that a channel is dropped before the classifier.
        num_classes: channels of the scores.
    """

    def __init__(self, *, in_chans: Sequence[int], dim: int, dropout: float, num_classes: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(chans, dim) for chans in in_chans)
        self.fuse = FuseLevels(level_chans=[dim] * len(in_chans), out_chans=dim)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [
            to_channels_first(projection(to_channels_last(map_BCHW)))
            for projection, map_BCHW in zip(self.projections, features, strict=True)
        ]
        return self.classifier(self.dropout(self.fuse(maps[::-1], features[0].shape[2:])))

    def folded(self) -> AllMLPDecoder:
        """For `segzoo.fold`, which has folded the fusion before: one matrix a level, at the level's own resolution."""
        if isinstance(self.fuse, FoldedFuseLevels) and isinstance(self.projections[0], nn.Linear):
            self.fuse = self.fuse.after(self.projections[::-1])
            self.projections = nn.ModuleList(nn.Identity() for _ in self.projections)
        return self


class ConvDecoder(nn.Module):
    """Segformer++'s decoder, with a norm and a ReLU at every level: maps -> scores at the resolution of the finest.

    Args: as AllMLPDecoder.
    """

    def __init__(self, *, in_chans: Sequence[int], dim: int, dropout: float, num_classes: int):
        super().__init__()
        self.level_convs = nn.ModuleList(ConvBNReLU(in_chans=chans, out_chans=dim) for chans in in_chans)
        self.fuse = FuseLevels(level_chans=[dim] * len(in_chans), out_chans=dim)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [conv(map_BCHW) for conv, map_BCHW in zip(self.level_convs, features, strict=True)]
        return self.classifier(self.dropout(self.fuse(maps, features[0].shape[2:])))


# --- key rules ------------------------------------------------------------------------------------------------------

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


class SegFormer(EncoderDecoder):
    """An encoder of maps at strides 4 to 32 and one of the two decoders; scores at the encoder's finest stride.

    Args:
        encoder: any encoder whose `feature_info` lists its maps, fine to coarse.
        decoder: an AllMLPDecoder or ConvDecoder made for its channels.
    """

    key_layouts = (
        Layout("original", r"^decode_head\.linear_c4\.proj\.", _ORIGINAL),
        Layout("hub", r"^segformer\.encoder\.", _HUB),
        Layout("transformers 5", r"^segformer\.stages\.", _TRANSFORMERS_5),
        Layout("smp", r"^decoder\.mlp_stage\.", _SMP),
        Layout("segformer++", r"^decode_head\.fusion_conv\.", _SEGFORMERPP),
    )
    reduction_presets = MiT.reduction_presets

    def fit_state(self, state: StateDict) -> StateDict:
        """Refuses the other decoder's weights by name: a list of keys would not tell which option to pass."""
        for decoder, prefix in (("segformer", "decoder.projections."), ("segformerpp", "decoder.level_convs.")):
            if decoder != self.cfg.decoder and any(key.startswith(prefix) for key in state):
                raise WeightsError(f"these weights have another decoder; pass decoder={decoder!r} to create_model")
        return state


class SegFormerKeypoints(SegFormer):
    """SegFormer whose outputs are heatmaps of keypoints, about 1 at the keypoint and 0 elsewhere (`segzoo.keypoints`).

    `forward` gives them at input size, `forward_head` at the stride of the encoder's finest map, where they are
    trained (`segzoo.training.losses.HeatmapLoss`) and decoded.
    """

    score_kind = "heatmap"

    def __init__(self, *, encoder: Encoder, decoder: AllMLPDecoder | ConvDecoder, cfg: SegFormerConfig):
        super().__init__(encoder=encoder, decoder=decoder, cfg=cfg)
        self._start_near_zero()

    def reset_classifier(self, num_classes: int) -> None:
        super().reset_classifier(num_classes)
        self._start_near_zero()

    def _start_near_zero(self) -> None:
        """Nearly all of a target heatmap is zero; from outputs far from it, squared errors take long to come down."""
        nn.init.normal_(self.decoder.classifier.weight, std=0.001)

    def forward_train(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """{"scores": (B, K, H, W) heatmaps at input size, "heatmaps": (B, K, H / 4, W / 4)}"""
        heatmaps_BKHW = self.forward_head(self.forward_features(x_BCHW))
        return {"scores": self.to_size(heatmaps_BKHW, x_BCHW.shape[2:]), "heatmaps": heatmaps_BKHW}


def build(cfg: SegFormerConfig) -> SegFormer:
    models = {"logits": SegFormer, "heatmap": SegFormerKeypoints}
    if cfg.score_kind not in models:
        raise SegzooError(f"score_kind must be {' or '.join(map(repr, models))}, not {cfg.score_kind!r}")
    # The class of the decoder, its width, and the eps that the official weights with this decoder were trained with.
    decoders = {
        "segformer": (AllMLPDecoder, cfg.decoder_dim, 1e-5),
        "segformerpp": (ConvDecoder, cfg.segformerpp_dim, 1e-6),
    }
    if cfg.decoder not in decoders:
        raise SegzooError(f"decoder must be {' or '.join(map(repr, decoders))}, not {cfg.decoder!r}")
    make_decoder, dim, official_eps = decoders[cfg.decoder]
    encoder = dataclasses.replace(
        cfg.encoder,
        conv_norm_eps=official_eps if cfg.conv_norm_eps is None else cfg.conv_norm_eps,
        drop_path_rate=cfg.drop_path_rate,
        in_chans=cfg.in_chans,
        num_classes=0,
    ).build()
    decoder = make_decoder(
        in_chans=[info["num_chs"] for info in encoder.feature_info],
        dim=dim,
        dropout=cfg.dropout,
        num_classes=cfg.num_classes,
    )
    return models[cfg.score_kind](encoder=encoder, decoder=decoder, cfg=cfg)


# --- variants -------------------------------------------------------------------------------------------------------

SEGFORMER_B0 = SegFormerConfig()
SEGFORMER_B1 = SegFormerConfig(encoder=MIT_B1)
SEGFORMER_B2 = SegFormerConfig(encoder=MIT_B2, decoder_dim=768)
SEGFORMER_B3 = SegFormerConfig(encoder=MIT_B3, decoder_dim=768)
SEGFORMER_B4 = SegFormerConfig(encoder=MIT_B4, decoder_dim=768)
SEGFORMER_B5 = SegFormerConfig(encoder=MIT_B5, decoder_dim=768)
TEST_SEGFORMER = SegFormerConfig(encoder=TEST_MIT, decoder_dim=32, segformerpp_dim=24, num_classes=13)


def _published(
    ade20k: float, cityscapes: float, params_m: float, *, side: int = 512, city_classes: int = 150
) -> tuple[PublishedCost, ...]:
    """Figures of the paper's Table 1. Those at 1024x2048 hold with ADE20K's 150 classes, but for B5's."""
    return (
        PublishedCost((side, side), gmacs=ade20k, params_m=params_m, num_classes=150),
        PublishedCost((1024, 2048), gmacs=cityscapes, num_classes=city_classes),
    )


_SEGFORMER_VARIANTS = {
    "segformer_b0": Variant(SEGFORMER_B0, params=3_752_694, published=_published(8.4, 125.5, 3.8)),
    "segformer_b1": Variant(SEGFORMER_B1, params=13_715_798, published=_published(15.9, 243.7, 13.7)),
    "segformer_b2": Variant(SEGFORMER_B2, params=27_461_974, published=_published(62.4, 717.1, 27.5)),
    "segformer_b3": Variant(SEGFORMER_B3, params=47_337_814, published=_published(79.0, 962.9, 47.3)),
    "segformer_b4": Variant(SEGFORMER_B4, params=64_108_374, published=_published(95.7, 1240.6, 64.1)),
    "segformer_b5": Variant(
        SEGFORMER_B5, params=84_708_694, published=_published(183.3, 1447.6, 84.7, side=640, city_classes=19)
    ),
}


def _merged(rows: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Segformer++'s names: {"segformerpp_b2_hq": ("segformer_b2", "hq"), ...}, the same models with a preset set."""
    return {
        f"{name.replace('segformer', 'segformerpp')}_{preset}": (name, preset)
        for name in rows
        for preset in ("hq", "fast", "n2d")
    }


def _keypoints(row: Variant) -> Variant:
    """One heatmap for each of COCO's 17 keypoints in place of the classes."""
    cfg = dataclasses.replace(row.cfg, score_kind="heatmap", num_classes=17)
    fewer = (row.cfg.num_classes - cfg.num_classes) * (cfg.decoder_dim + 1)  # weights and biases of the classifier
    return Variant(cfg, params=row.params and row.params - fewer)


VARIANTS = {
    **_SEGFORMER_VARIANTS,
    **{
        alias: dataclasses.replace(_SEGFORMER_VARIANTS[name], published=(), reduction=preset)
        for alias, (name, preset) in _merged(_SEGFORMER_VARIANTS).items()
    },
    **{f"{name}_keypoints": _keypoints(row) for name, row in _SEGFORMER_VARIANTS.items()},
    "test_segformer": Variant(TEST_SEGFORMER),
    "test_segformer_keypoints": _keypoints(Variant(TEST_SEGFORMER)),
}

# --- weights --------------------------------------------------------------------------------------------------------

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
PRETRAINED = {
    **_SEGFORMER_WEIGHTS,
    **{alias: _SEGFORMER_WEIGHTS[name] for alias, (name, _) in _merged(_SEGFORMER_WEIGHTS).items()},
}

register_family(Family(name="segformer", build=build, variants=VARIANTS, pretrained=PRETRAINED))
