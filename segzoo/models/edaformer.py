"""EDAFormer: EFT encoder and an all-attention decoder (Yu et al., ECCV 2024, arXiv 2407.17261).

What the released code computes (github.com/hyunwoo137/EDAFormer @9f98d76, `edaformer_head.py`): three attention
blocks on c4, two on c3, one on c2, none on c1; in the decoder a LayerNorm and a GELU follow the 1x1 convolution of
keys and values, the feed-forward layer has no ReLU; c4 and c3 are resized to c2's grid, concatenated in the order
c4, c3, c2, fused by 1x1 convolution + BN + ReLU and classified at stride 8.

What segzoo changed: as in `eft.py`; and the unused `conv_seg` of the checkpoints is dropped.

Licence of the published weights: none stated; they lie in a Google Drive folder named in the official README.

Shape letters: B batch, C channels, H, W rows and columns of a map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.block import Block, BlockSequence
from ..layers.conv import FuseLevels
from ..layers.init import init_weights
from ..layers.shapes import to_channels_first, to_channels_last
from .base import PUBLISHED_IN_ROWS
from .config import EncoderConfig, SegmenterConfig
from .edaformer_baselines import MIXERS
from .edaformer_weights import LAYOUTS, PRETRAINED
from .eft import EFT_B, EFT_T, TEST_EFT, EmbeddingFreeAttention
from .family import Family, PublishedCost, Variant, register_family
from .mit import MIT_B0
from .segmenter import EncoderDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDAFormerConfig(SegmenterConfig):
    """Configuration of EDAFormer. Tuples of the decoder go from deep to fine: (c4, c3, c2)."""

    encoder: EncoderConfig = EFT_T  # any encoder's; its finest map is not used
    decoder_depths: tuple[int, ...] = (3, 2, 1)  # attention blocks a level (Table 3b)
    decoder_num_heads: tuple[int, ...] = (8, 4, 2)
    decoder_pool: tuple[int, ...] = (1, 2, 4)  # trained side of the key/value pooling window
    decoder_mlp_ratio: float = 2.0
    decoder_mixer: str = "attention"  # or in its place a 3x3 convolution, "conv" or "dwconv" (Table 3a)
    decoder_embedding_free: bool = True  # False: query, key and value projections (Table 3a)
    decoder_drop_path: float = 0.1  # of every decoder block
    decoder_dim: int = 128  # channels after the fusion
    dropout: float = 0.1  # of whole channels before the classifier

    def check(self) -> None:
        super().check()
        level_chans = self.encoder.map_chans[:0:-1]
        tuples = ("decoder_depths", "decoder_num_heads", "decoder_pool")
        self.require_lengths(len(level_chans), "a map of the encoder but the finest", *tuples)
        self.require_positive("decoder_depths", "decoder_pool", "decoder_mlp_ratio", "decoder_dim")
        self.require_rate("decoder_drop_path", "dropout")
        self.require_choice("decoder_mixer", ("attention", *MIXERS))
        what = f"the encoder's channels {level_chans}, deep to fine"
        self.require_heads("decoder_num_heads", self.decoder_num_heads, what, level_chans)


def token_mixer(cfg: EDAFormerConfig, *, dim: int, level: int) -> nn.Module:
    """What a decoder block of a level, 0 the deepest, mixes its tokens with: (B, H, W, C) -> (B, H, W, C)."""
    if cfg.decoder_mixer in MIXERS:
        return MIXERS[cfg.decoder_mixer](dim=dim)
    return EmbeddingFreeAttention(
        dim=dim,
        num_heads=cfg.decoder_num_heads[level],
        pool=cfg.decoder_pool[level],
        part="decoder",
        level=level,
        kv_norm=True,
        embedding_free=cfg.decoder_embedding_free,
    )


class AllAttentionDecoder(nn.Module):
    """Attention blocks on the three deepest maps, fused at the finest of them: maps -> scores at its resolution.

    Args:
        in_chans: channels of the encoder's maps, fine to coarse; the first map is not used.
        cfg: see EDAFormerConfig.
    """

    def __init__(self, *, in_chans: Sequence[int], cfg: EDAFormerConfig):
        super().__init__()
        level_chans = list(reversed(in_chans[1:]))
        self.levels = nn.ModuleList(
            BlockSequence(
                *(
                    Block(
                        dim=dim,
                        attn=token_mixer(cfg, dim=dim, level=level),
                        mlp_ratio=cfg.decoder_mlp_ratio,
                        mlp_relu=False,
                        norm_eps=1e-5,
                        drop_path=cfg.decoder_drop_path,
                    )
                    for _ in range(cfg.decoder_depths[level])
                )
            )
            for level, dim in enumerate(level_chans)
        )
        self.fuse = FuseLevels(level_chans=level_chans, out_chans=cfg.decoder_dim)
        self.dropout = nn.Dropout2d(cfg.dropout)
        self.classifier = nn.Conv2d(cfg.decoder_dim, cfg.num_classes, 1)
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [
            to_channels_first(blocks(to_channels_last(map_BCHW)))
            for blocks, map_BCHW in zip(self.levels, reversed(features[1:]), strict=True)
        ]
        return self.classifier(self.dropout(self.fuse(maps, features[1].shape[2:])))


# Paper notation [encoder]-[decoder] of the pooling sides; the factors multiply what was trained.
PRESETS: dict[str, dict[str, Any]] = {
    "base": {},  # [8, 4, 2, 1]-[1, 2, 4]
    "decoder": {"decoder": 2},  # [8, 4, 2, 1]-[2, 4, 8]
    "optimal": {"encoder": (2, 2, 1, 1), "decoder": 2},  # [16, 8, 2, 1]-[2, 4, 8]
    "fast": {"encoder": 2, "decoder": 2},  # [16, 8, 4, 2]-[2, 4, 8]
}
ACCURACY = {"base": "as trained", **dict.fromkeys(("decoder", "optimal", "fast"), PUBLISHED_IN_ROWS)}


class EDAFormer(EncoderDecoder):
    """An encoder of four maps and the all-attention decoder; scores at stride 8 of the encoder's second map.

    Args:
        encoder: any encoder whose `feature_info` lists four maps, fine to coarse.
        decoder: an AllAttentionDecoder made for its channels.
    """

    key_layouts = LAYOUTS

    @property
    def reduction_presets(self) -> Mapping[str, Mapping[str, Any]]:
        if self.cfg.decoder_mixer == "attention":
            return PRESETS
        return self.encoder.reduction_presets  # convolutions have no sites

    @property
    def preset_accuracy(self) -> Mapping[str, str]:
        return ACCURACY if self.cfg.decoder_mixer == "attention" else self.encoder.preset_accuracy


def build(cfg: EDAFormerConfig) -> EDAFormer:
    encoder = cfg.build_encoder()
    decoder = AllAttentionDecoder(in_chans=[info["num_chs"] for info in encoder.feature_info], cfg=cfg)
    return EDAFormer(encoder=encoder, decoder=decoder, cfg=cfg)


EDAFORMER_T = EDAFormerConfig()
EDAFORMER_B = EDAFormerConfig(encoder=EFT_B, decoder_mlp_ratio=1.0, decoder_dim=768)
EDAFORMER_MIT_B0 = EDAFormerConfig(encoder=MIT_B0)  # Table 10
TEST_EDAFORMER = EDAFormerConfig(
    encoder=TEST_EFT, decoder_depths=(2, 1, 1), decoder_num_heads=(4, 3, 2), decoder_dim=32, num_classes=13
)


def _published(rows: Sequence[tuple[str, float, float]]) -> tuple[PublishedCost, ...]:
    """Figures of the paper by preset: at 512x512 with 150 classes and at 1024x2048 with 19."""
    ade20k = (PublishedCost((512, 512), gmacs, reduction=preset, num_classes=150) for preset, gmacs, _ in rows)
    cityscapes = (PublishedCost((1024, 2048), gmacs, reduction=preset, num_classes=19) for preset, _, gmacs in rows)
    return (*ade20k, *cityscapes)


VARIANTS = {
    "edaformer_t": Variant(
        EDAFORMER_T,
        params=4_929_914,
        published=_published(
            (("base", 5.6, 151.7), ("decoder", 5.3, 133.6), ("optimal", 4.7, 94.9), ("fast", 4.1, 59.1))
        ),
    ),
    "edaformer_b": Variant(
        EDAFORMER_B,
        params=29_438_166,
        published=_published(
            (("base", 32.0, 605.9), ("decoder", 31.3, 569.0), ("optimal", 29.4, 452.9), ("fast", 26.6, 298.1))
        ),
    ),
    "edaformer_mit_b0": Variant(
        EDAFORMER_MIT_B0, params=4_947_574, published=(PublishedCost((512, 512), gmacs=4.6, num_classes=150),)
    ),
    "test_edaformer": Variant(TEST_EDAFORMER),
}

register_family(Family(name="edaformer", build=build, variants=VARIANTS, pretrained=PRETRAINED))
