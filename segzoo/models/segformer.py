"""SegFormer (Xie et al., NeurIPS 2021, arXiv 2105.15203) and Segformer++ (Kienzle et al., 2024, arXiv 2405.14467).

What the released code computes (github.com/NVlabs/SegFormer @65fa8cf, `segformer_head.py`): every map goes through a
Linear without norm or activation, is resized to c1's grid, concatenated in the order c4, c3, c2, c1, fused by 1x1
convolution + BN + ReLU and classified at stride 4. Segformer++ (github.com/KieDani/SegformerPlusPlus @7fb8797) is
this model with token merging around the attention, which has no parameters; but its own checkpoints were trained
with mmsegmentation's decoder (1x1 convolution + BN + ReLU a level, 256 channels for every size, order c1 to c4) and
LayerNorm eps 1e-6 everywhere. That is the option `decoder="segformerpp"`. Its other task, human pose, takes the same
network with one heatmap per keypoint in place of the classes: `segformer_b0_keypoints` and, with a preset set,
`segformerpp_b0_keypoints_hq` and so on, without weights.

What segzoo changed: as in `mit.py`; token merging is a reduction plan (presets "hq", "fast", "n2d"), so that
`segformerpp_b2_hq` is `segformer_b2`, its weights included, with a plan set; and the unused `conv_seg` of NVIDIA's
checkpoints is dropped.

Licence of the published weights: NVIDIA Source Code License, research and evaluation only; Segformer++'s are derived
from them and state none.

Shape letters: B batch, C channels, H, W rows and columns of a map, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from .._errors import WeightsError
from ..layers.conv import ConvBNReLU, FoldedFuseLevels, FuseLevels
from ..layers.init import init_weights
from ..layers.shapes import to_channels_first, to_channels_last
from .base import Encoder
from .config import EncoderConfig, SegmenterConfig
from .family import Family, PublishedCost, Variant, register_family
from .keys import StateDict
from .mit import MIT_B0, MIT_B1, MIT_B2, MIT_B3, MIT_B4, MIT_B5, TEST_MIT, MiTConfig
from .segformer_weights import LAYOUTS, PRETRAINED, merged_names
from .segmenter import EncoderDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegFormerConfig(SegmenterConfig):
    """Configuration of SegFormer."""

    encoder: EncoderConfig = MIT_B0  # any encoder's
    score_kind: str = "logits"  # "logits" of num_classes classes, or "heatmap": one a keypoint, num_classes of them
    decoder: str = "segformer"  # "segformer", or "segformerpp": the decoder and eps of Segformer++'s own checkpoints
    decoder_dim: int = 256  # channels of decoder "segformer"
    segformerpp_dim: int = 256  # channels of decoder "segformerpp"
    dropout: float = 0.1  # of whole channels before the classifier

    def check(self) -> None:
        super().check()
        self.require_choice("score_kind", ("logits", "heatmap"))
        self.require_choice("decoder", ("segformer", "segformerpp"))
        self.require_positive("decoder_dim", "segformerpp_dim")
        self.require_rate("dropout")

    def build_encoder(self) -> Encoder:
        if self.decoder == "segformerpp" and isinstance(self.encoder, MiTConfig) and self.encoder.conv_norm_eps is None:
            return dataclasses.replace(self.encoder, num_classes=0, conv_norm_eps=1e-6).build()
        return super().build_encoder()


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
            self.fuse = self.fuse.after(cast(Sequence[nn.Linear], self.projections[::-1]))
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


class SegFormer(EncoderDecoder):
    """An encoder of maps at strides 4 to 32 and one of the two decoders; scores at the encoder's finest stride.

    Args:
        encoder: any encoder whose `feature_info` lists its maps, fine to coarse.
        decoder: an AllMLPDecoder or ConvDecoder made for its channels.
    """

    key_layouts = LAYOUTS

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

    def renew_classifier(self, num_classes: int) -> None:
        super().renew_classifier(num_classes)
        self._start_near_zero()

    def _start_near_zero(self) -> None:
        """Nearly all of a target heatmap is zero; from outputs far from it, squared errors take long to come down."""
        nn.init.normal_(cast(Tensor, self.get_classifier().weight), std=0.001)

    def forward_train(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """{"scores": (B, K, H, W) heatmaps at input size, "heatmaps": (B, K, H / 4, W / 4)}"""
        heatmaps_BKHW = self.forward_head(self.forward_features(x_BCHW))
        return {"scores": self.to_size(heatmaps_BKHW, x_BCHW.shape[2:]), "heatmaps": heatmaps_BKHW}


def build(cfg: SegFormerConfig) -> SegFormer:
    encoder = cfg.build_encoder()
    make_decoder, dim = (
        (AllMLPDecoder, cfg.decoder_dim) if cfg.decoder == "segformer" else (ConvDecoder, cfg.segformerpp_dim)
    )
    decoder = make_decoder(
        in_chans=[info["num_chs"] for info in encoder.feature_info],
        dim=dim,
        dropout=cfg.dropout,
        num_classes=cfg.num_classes,
    )
    kind = SegFormerKeypoints if cfg.score_kind == "heatmap" else SegFormer
    return kind(encoder=encoder, decoder=decoder, cfg=cfg)


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


def _keypoints(row: Variant) -> Variant:
    """One heatmap for each of COCO's 17 keypoints in place of the classes."""
    cfg = dataclasses.replace(row.cfg, score_kind="heatmap", num_classes=17)
    fewer = (row.cfg.num_classes - cfg.num_classes) * (cfg.decoder_dim + 1)  # weights and biases of the classifier
    return Variant(cfg, params=row.params and row.params - fewer)


def _merged(rows: Mapping[str, Variant]) -> dict[str, Variant]:
    """The same under Segformer++'s names, each with its preset set."""
    return {
        alias: dataclasses.replace(rows[name], published=(), reduction=preset)
        for alias, (name, preset) in merged_names(rows).items()
    }


_KEYPOINT_VARIANTS = {f"{name}_keypoints": _keypoints(row) for name, row in _SEGFORMER_VARIANTS.items()}

VARIANTS = {
    **_SEGFORMER_VARIANTS,
    **_merged(_SEGFORMER_VARIANTS),
    **_KEYPOINT_VARIANTS,
    **_merged(_KEYPOINT_VARIANTS),
    "test_segformer": Variant(TEST_SEGFORMER),
    "test_segformer_keypoints": _keypoints(Variant(TEST_SEGFORMER)),
}

register_family(Family(name="segformer", build=build, variants=VARIANTS, pretrained=PRETRAINED))
