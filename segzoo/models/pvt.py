"""PVT v2, the pyramid vision transformer (Wang et al., CVMJ 2022, arXiv 2106.13797, section 3), and the same with
EDAFormer's embedding-free attention (arXiv 2407.17261, Table 13).

SegFormer's encoder took its attention, its feed-forward layer and its patch embeddings from here, and with them the eps
of the norms (1e-5 after a convolution, else 1e-6); the feed-forward layers of the first two stages are wider here.

With `embedding_free=True` queries are the normed tokens themselves, and keys and values are one and the same: the
tokens after the strided convolution and its norm. That keeps PVT's own reduction and leaves out the three projections;
EDAFormer released no code of it, so the choice is ours. Nobody released weights either.

What segzoo changed: as in `mit.py`. Licence of the published weights: Apache-2.0.
"""

from __future__ import annotations

import dataclasses

from ..layers.block import pyramid_stages
from ..layers.spatial_reduction import EfficientSelfAttention
from .base import NOT_MEASURED, PyramidEncoder
from .config import EncoderConfig
from .family import Family, PublishedCost, Variant, register_family
from .pvt_weights import LAYOUTS, PRETRAINED


@dataclasses.dataclass(frozen=True, kw_only=True)
class PVTv2Config(EncoderConfig):
    """Configuration of a PVT v2 encoder; one entry a stage in every tuple."""

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)  # channels
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)  # hidden width = ratio * channels
    kv_stride: tuple[int, ...] = (8, 4, 2, 1)  # side of the strided convolution on keys and values; 1: none
    embedding_free: bool = False  # no query, key and value projections
    drop_path_rate: float = 0.1  # of the last block; grows linearly from 0

    def build(self) -> PVTv2:
        return PVTv2(self)

    @property
    def map_chans(self) -> tuple[int, ...]:
        return self.embed_dims

    def check(self) -> None:
        super().check()
        self.require_positive("embed_dims", "depths", "mlp_ratios", "kv_stride")
        self.require_lengths(len(self.embed_dims), "a stage", "depths", "num_heads", "mlp_ratios", "kv_stride")
        self.require_heads("num_heads", self.num_heads, f"embed_dims={self.embed_dims}", self.embed_dims)


class PVTv2(PyramidEncoder):
    """Pyramid vision transformer: maps at strides 4, 8, 16, 32 and an ImageNet head."""

    key_layouts = LAYOUTS
    # EDAFormer's of its encoder: on top of the trained strides [16, 8, 2, 1] and [16, 8, 4, 2].
    reduction_presets = {"base": {}, "optimal": {"encoder": (2, 2, 1, 1)}, "fast": {"encoder": 2}}
    preset_accuracy = {"base": "as trained", "optimal": NOT_MEASURED, "fast": NOT_MEASURED}

    def __init__(self, cfg: PVTv2Config):
        def attention(stage: int) -> EfficientSelfAttention:
            return EfficientSelfAttention(
                dim=cfg.embed_dims[stage],
                num_heads=cfg.num_heads[stage],
                kv_stride=cfg.kv_stride[stage],
                norm_eps=1e-5,
                level=stage,
                embedding_free=cfg.embedding_free,
            )

        stages = pyramid_stages(
            in_chans=cfg.in_chans,
            embed_dims=cfg.embed_dims,
            depths=cfg.depths,
            attention=attention,
            mlp_ratio=cfg.mlp_ratios,
            norm_eps=1e-6,
            drop_path_rate=cfg.drop_path_rate,
        )
        super().__init__(cfg=cfg, stages=stages)


PVT_V2_B0 = PVTv2Config(embed_dims=(32, 64, 160, 256))
PVT_V2_B1 = PVTv2Config()
PVT_V2_B2 = PVTv2Config(depths=(3, 4, 6, 3))
TEST_PVT_V2 = PVTv2Config(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=(3, 3, 2, 2), num_classes=10
)


def _published(gmacs: float, params_m: float, why: str = "") -> tuple[PublishedCost, ...]:
    return (PublishedCost((224, 224), gmacs=gmacs, params_m=params_m, why=why),)


VARIANTS = {
    "pvt_v2_b0": Variant(PVT_V2_B0, params=3_666_760, published=_published(0.6, 3.7, "rounded to one digit")),
    "pvt_v2_b1": Variant(PVT_V2_B1, params=14_009_000, published=_published(2.1, 14.0)),
    "pvt_v2_b2": Variant(PVT_V2_B2, params=25_362_856, published=_published(4.0, 25.4)),
    "test_pvt_v2": Variant(TEST_PVT_V2),
}

register_family(Family(name="pvt", build=PVTv2, variants=VARIANTS, pretrained=PRETRAINED))
