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
"""

from __future__ import annotations

import dataclasses

from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.mlp import ConvMlp
from ..layers.patch_embed import OverlapPatchEmbed
from ..layers.reduction import KeyValueReduction, QueryReduction
from .base import PyramidEncoder, Stage
from .family import Family, PublishedCost, Variant, register_family
from .keys import Layout, Rename, Squeeze
from .rows import PretrainedCfg


@dataclasses.dataclass(frozen=True)
class EFTConfig:
    """Configuration of an EFT encoder; one entry a stage in every tuple."""

    embed_dims: tuple[int, ...] = (32, 64, 128, 256)  # channels
    depths: tuple[int, ...] = (2, 2, 10, 2)  # blocks
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratio: float = 3.8  # hidden width = int(ratio * channels)
    pool: tuple[int, ...] = (8, 4, 2, 1)  # trained side of the key/value pooling window
    embedding_free: bool = True  # False: query, key and value projections (the ablation of Table 5b)
    drop_path_rate: float = 0.2  # of the last block; grows linearly from 0
    in_chans: int = 3
    num_classes: int = 1000  # 0: pooled features

    def build(self) -> EFT:
        return EFT(self)


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


class EFTBlock(nn.Module):
    """Pre-norm attention and feed-forward on a (B, H, W, C) map; also the block of EDAFormer's decoder."""

    def __init__(
        self,
        *,
        dim: int,
        attn: EmbeddingFreeAttention,
        mlp_ratio: float,
        mlp_relu: bool,
        norm_eps: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ConvMlp(dim=dim, hidden_dim=int(dim * mlp_ratio), relu=mlp_relu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attn(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


# Checkpoints name stages from 1 and may carry the prefix of the segmentation model that they were cut from.
ENCODER_RULES = (
    Rename(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.patch_embed."),
    Rename(r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    Rename(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    Squeeze(r"\.attn\.sr\.weight$"),
    Rename(r"\.attn\.sr\.", ".attn.kv."),
)


class EFT(PyramidEncoder):
    """Embedding-free transformer: maps at strides 4, 8, 16, 32 and an ImageNet head."""

    key_layouts = (Layout("official", r"^block1\.0\.attn\.sr\.", ENCODER_RULES),)
    reduction_presets = {
        "base": {},
        "optimal": {"encoder": (2, 2, 1, 1)},
        "fast": {"encoder": 2},
    }

    def __init__(self, cfg: EFTConfig):
        drop_path = calculate_drop_path_rates(cfg.drop_path_rate, list(cfg.depths), stagewise=True)
        in_chans = (cfg.in_chans, *cfg.embed_dims[:-1])
        stages = []
        for i, dim in enumerate(cfg.embed_dims):
            blocks = [
                EFTBlock(
                    dim=dim,
                    attn=EmbeddingFreeAttention(
                        dim=dim,
                        num_heads=cfg.num_heads[i],
                        pool=cfg.pool[i],
                        part="encoder",
                        level=i,
                        kv_norm=False,
                        embedding_free=cfg.embedding_free,
                    ),
                    mlp_ratio=cfg.mlp_ratio,
                    mlp_relu=True,
                    norm_eps=1e-6,
                    drop_path=drop_path[i][j],
                )
                for j in range(cfg.depths[i])
            ]
            embed = OverlapPatchEmbed(
                in_chans=in_chans[i], embed_dim=dim, kernel_size=7 if i == 0 else 3, stride=4 if i == 0 else 2
            )
            stages.append(Stage(patch_embed=embed, blocks=blocks, norm=nn.LayerNorm(dim, eps=1e-6)))
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

_IMAGENET = PretrainedCfg(
    dataset="imagenet",
    num_classes=1000,
    input_size=(224, 224),
    resize="exact",
    test_size=(224, 224),
    origin="https://github.com/hyunwoo137/EDAFormer",
    how_to_get=(
        "download the ImageNet checkpoint from the Google Drive folder named in the README of "
        "https://github.com/hyunwoo137/EDAFormer and pass it as checkpoint_path="
    ),
)

PRETRAINED = {"eft_t": {"imagenet": _IMAGENET}, "eft_b": {"imagenet": _IMAGENET}}

register_family(Family(name="eft", build=EFT, variants=VARIANTS, pretrained=PRETRAINED))
