"""MiT, the mix transformer encoder of SegFormer (Xie et al., NeurIPS 2021, arXiv 2105.15203, section 3.1).

What the released code computes (github.com/NVlabs/SegFormer @65fa8cf, `mix_transformer.py`): keys and values of the
first three stages come from a strided convolution and a LayerNorm, which the paper describes as a reshape and a
linear layer; the patch embeddings' norms and the one after the strided convolution have eps 1e-5, all others 1e-6.

What segzoo changed: tokens stay a channels-last view of the map, attention goes through the fused kernel, and a map
smaller than the strided convolution's window is extended by its own border instead of raising. Segformer++'s token
merging (arXiv 2405.14467) is a set of entries for the two reduction leaves that every attention owns. No line comes
from NVIDIA's code, whose licence is non-commercial.

Licence of the published weights: NVIDIA Source Code License, research and evaluation only.
"""

from __future__ import annotations

import dataclasses

from ..layers.block import pyramid_stages
from ..layers.reduction import Bipartite, Neighbour2d
from ..layers.spatial_reduction import EfficientSelfAttention
from .base import NOT_MEASURED, PUBLISHED_IN_ROWS, PyramidEncoder
from .config import EncoderConfig
from .family import Family, Variant, register_family
from .mit_weights import LAYOUTS, PRETRAINED


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiTConfig(EncoderConfig):
    """Configuration of a MiT encoder; one entry a stage in every tuple."""

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)  # channels
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratio: int = 4  # hidden width = ratio * channels
    kv_stride: tuple[int, ...] = (8, 4, 2, 1)  # side of the strided convolution on keys and values; 1: none
    norm_eps: float = 1e-6  # of the LayerNorms in and after the blocks
    # Of the LayerNorms after a convolution (patch embedding, keys and values). None: 1e-5, or what a segmenter's
    # official weights were trained with.
    conv_norm_eps: float | None = None
    drop_path_rate: float = 0.1  # of the last block; grows linearly from 0

    def build(self) -> MiT:
        return MiT(self)

    @property
    def map_chans(self) -> tuple[int, ...]:
        return self.embed_dims

    def check(self) -> None:
        super().check()
        self.require_positive("embed_dims", "depths", "mlp_ratio", "kv_stride", "norm_eps", "conv_norm_eps")
        self.require_lengths(len(self.embed_dims), "a stage", "depths", "num_heads", "kv_stride")
        self.require_heads("num_heads", self.num_heads, f"embed_dims={self.embed_dims}", self.embed_dims)


HQ = {
    "encoder": (Bipartite(0.6, 2), Bipartite(0.6, 2), 1, 1),
    "encoder.q": (1, 1, Bipartite(0.8, 4), Bipartite(0.8, 4)),
}


class MiT(PyramidEncoder):
    """Mix transformer: maps at strides 4, 8, 16, 32 and an ImageNet head."""

    key_layouts = LAYOUTS
    # hq, fast, n2d: the released configs of Segformer++. isr, isr_fast: the encoder's share of EDAFormer's "optimal"
    # and "fast", which on top of the trained strides amount to [16, 8, 2, 1] and [16, 8, 4, 2].
    reduction_presets = {
        "base": {},
        "hq": HQ,
        "fast": {
            "encoder": (Bipartite(0.9, 4), Bipartite(0.9, 4), 1, 1),
            "encoder.q": (1, 1, Bipartite(0.9, 4), Bipartite(0.9, 4)),
        },
        "n2d": {"encoder.q": Neighbour2d(2)},
        "optimal": HQ,  # the name that every family answers to
        "isr": {"encoder": (2, 2, 1, 1)},
        "isr_fast": {"encoder": 2},
    }
    # Segformer++ has figures of SegFormer-B2 and B5 alone.
    preset_accuracy = {
        "base": "as trained",
        **dict.fromkeys(("hq", "optimal", "fast", "n2d"), PUBLISHED_IN_ROWS),
        **dict.fromkeys(("isr", "isr_fast"), NOT_MEASURED),
    }

    def __init__(self, cfg: MiTConfig):
        conv_norm_eps = 1e-5 if cfg.conv_norm_eps is None else cfg.conv_norm_eps

        def attention(stage: int) -> EfficientSelfAttention:
            return EfficientSelfAttention(
                dim=cfg.embed_dims[stage],
                num_heads=cfg.num_heads[stage],
                kv_stride=cfg.kv_stride[stage],
                norm_eps=conv_norm_eps,
                level=stage,
            )

        stages = pyramid_stages(
            in_chans=cfg.in_chans,
            embed_dims=cfg.embed_dims,
            depths=cfg.depths,
            attention=attention,
            mlp_ratio=cfg.mlp_ratio,
            norm_eps=cfg.norm_eps,
            drop_path_rate=cfg.drop_path_rate,
            embed_norm_eps=conv_norm_eps,
        )
        super().__init__(cfg=cfg, stages=stages)


MIT_B0 = MiTConfig(embed_dims=(32, 64, 160, 256))
MIT_B1 = MiTConfig()
MIT_B2 = MiTConfig(depths=(3, 4, 6, 3))
MIT_B3 = MiTConfig(depths=(3, 4, 18, 3))
MIT_B4 = MiTConfig(depths=(3, 8, 27, 3))
MIT_B5 = MiTConfig(depths=(3, 6, 40, 3))
TEST_MIT = MiTConfig(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratio=2, num_classes=10
)

VARIANTS = {
    "mit_b0": Variant(MIT_B0, params=3_576_392),
    "mit_b1": Variant(MIT_B1, params=13_664_424),
    "mit_b2": Variant(MIT_B2, params=24_709_288),
    "mit_b3": Variant(MIT_B3, params=44_585_128),
    "mit_b4": Variant(MIT_B4, params=61_355_688),
    "mit_b5": Variant(MIT_B5, params=81_956_008),
    "test_mit": Variant(TEST_MIT),
}

register_family(Family(name="mit", build=MiT, variants=VARIANTS, pretrained=PRETRAINED))
