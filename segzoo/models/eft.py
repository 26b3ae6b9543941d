"""EFT, the embedding-free transformer encoder of EDAFormer (Yu et al., ECCV 2024, arXiv 2407.17261, section 3).

What the released code computes (github.com/hyunwoo137/EDAFormer @9f98d76, `eft.py`): queries are the normed tokens
themselves; keys and values are one and the same 1x1 convolution of the average-pooled tokens, without any
query/key/value projection; the feed-forward layer has a ReLU before its depthwise convolution. Where the paper is
silent (LayerNorm eps, floor-mode pooling) the code counts.

What segzoo changed: tokens stay a channels-last view of the map, attention goes through the fused kernel, the 1x1
convolution is a Linear on the pooled tokens, and a pooling window larger than the map is clamped instead of raising.
The ImageNet head (mean pool + Linear) is our assumption, supported by the published parameter counts: the official
repository has none.

Licence of the published weights: none stated; they lie in a Google Drive folder named in the official README.

Shape letters: B batch, C channels, H, W rows and columns of a map, N query tokens, M key and value tokens.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.block import pyramid_stages
from ..layers.reduction import KeyValueReduction, QueryReduction
from .base import NOT_MEASURED, PyramidEncoder
from .config import EncoderConfig
from .eft_weights import LAYOUTS, PRETRAINED
from .family import Family, PublishedCost, Variant, register_family


@dataclasses.dataclass(frozen=True, kw_only=True)
class EFTConfig(EncoderConfig):
    """Configuration of an EFT encoder; one entry a stage in every tuple."""

    embed_dims: tuple[int, ...] = (32, 64, 128, 256)  # channels
    depths: tuple[int, ...] = (2, 2, 10, 2)  # blocks
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratio: float = 3.8  # hidden width = int(ratio * channels)
    pool: tuple[int, ...] = (8, 4, 2, 1)  # trained side of the key/value pooling window
    embedding_free: bool = True  # False: query, key and value projections, to compare with
    drop_path_rate: float = 0.2  # of the last block; grows linearly from 0

    def build(self) -> EFT:
        return EFT(self)

    @property
    def map_chans(self) -> tuple[int, ...]:
        return self.embed_dims

    def check(self) -> None:
        super().check()
        self.require_positive("embed_dims", "depths", "mlp_ratio", "pool")
        self.require_lengths(len(self.embed_dims), "a stage", "depths", "num_heads", "pool")
        self.require_heads("num_heads", self.num_heads, f"embed_dims={self.embed_dims}", self.embed_dims)


class EmbeddingFreeAttention(nn.Module):
    """Attention whose queries are its input and whose keys and values are one Linear of the pooled input.

    `kv_norm` is the LayerNorm + GELU that the decoder has after that Linear and the encoder has not. With
    `embedding_free=False` it gets the usual three projections. Owns a key/value leaf and a query leaf.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self, *, dim: int, num_heads: int, pool: int, part: str, level: int, kv_norm: bool, embedding_free: bool
    ):
        super().__init__()
        self.num_heads = num_heads
        self.q_reduction = QueryReduction(part=part, level=level)
        self.q = nn.Identity() if embedding_free else nn.Linear(dim, dim)
        self.kv_reduction = KeyValueReduction(part=part, level=level, trained=pool)
        self.kv = nn.Linear(dim, dim)
        self.kv_norm = nn.LayerNorm(dim) if kv_norm else nn.Identity()
        self.kv_act = nn.GELU() if kv_norm else nn.Identity()
        self.k = nn.Identity() if embedding_free else nn.Linear(dim, dim)
        self.v = nn.Identity() if embedding_free else nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        q_BNC, restore = self.q_reduction(x_BHWC)
        kv_BMC = self.kv_act(self.kv_norm(self.kv(self.kv_reduction(x_BHWC))))
        out_BNC = attend(self.q(q_BNC), self.k(kv_BMC), self.v(kv_BMC), num_heads=self.num_heads)
        return restore(self.proj(out_BNC))


class EFT(PyramidEncoder):
    """Embedding-free transformer: maps at strides 4, 8, 16, 32 and an ImageNet head."""

    key_layouts = LAYOUTS
    reduction_presets = {
        "base": {},
        "optimal": {"encoder": (2, 2, 1, 1)},
        "fast": {"encoder": 2},
    }
    preset_accuracy = {"base": "as trained", "optimal": NOT_MEASURED, "fast": NOT_MEASURED}  # of the encoder alone

    def __init__(self, cfg: EFTConfig):
        def attention(stage: int) -> EmbeddingFreeAttention:
            return EmbeddingFreeAttention(
                dim=cfg.embed_dims[stage],
                num_heads=cfg.num_heads[stage],
                pool=cfg.pool[stage],
                part="encoder",
                level=stage,
                kv_norm=False,
                embedding_free=cfg.embedding_free,
            )

        stages = pyramid_stages(
            in_chans=cfg.in_chans,
            embed_dims=cfg.embed_dims,
            depths=cfg.depths,
            attention=attention,
            mlp_ratio=cfg.mlp_ratio,
            mlp_relu=True,
            norm_eps=1e-6,
            drop_path_rate=cfg.drop_path_rate,
        )
        super().__init__(cfg=cfg, stages=stages)


EFT_T = EFTConfig()
EFT_B = EFTConfig(embed_dims=(64, 128, 256, 512), depths=(3, 3, 22, 3), mlp_ratio=4)
TEST_EFT = EFTConfig(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratio=2, num_classes=10
)

VARIANTS = {
    "eft_t": Variant(EFT_T, params=3_675_404, published=(PublishedCost((224, 224), gmacs=0.6, params_m=3.7),)),
    "eft_b": Variant(EFT_B, params=25_367_080, published=(PublishedCost((224, 224), gmacs=4.2, params_m=25.4),)),
    "test_eft": Variant(TEST_EFT),
}

register_family(Family(name="eft", build=EFT, variants=VARIANTS, pretrained=PRETRAINED))
