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

import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.mlp import ConvMlp
from ..layers.patch_embed import OverlapPatchEmbed
from ..layers.reduction import Bipartite, KeyValueReduction, Neighbour2d, QueryReduction
from ..layers.shapes import to_channels_first, to_channels_last
from .base import PyramidEncoder, Stage
from .family import Family, Variant, register_family
from .keys import Concat, Layout, Prefixed, Rename, Split, Squeeze
from .rows import PretrainedCfg


@dataclasses.dataclass(frozen=True)
class MiTConfig:
    """Configuration of a MiT encoder; one entry a stage in every tuple."""

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)  # channels
    depths: tuple[int, ...] = (2, 2, 2, 2)  # blocks
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratio: int = 4  # hidden width = ratio * channels
    kv_stride: tuple[int, ...] = (8, 4, 2, 1)  # side of the strided convolution on keys and values; 1: none
    norm_eps: float = 1e-6  # of the LayerNorms in and after the blocks
    conv_norm_eps: float = 1e-5  # of the LayerNorms after a convolution: patch embedding, keys and values
    drop_path_rate: float = 0.1  # of the last block; grows linearly from 0
    in_chans: int = 3
    num_classes: int = 1000  # 0: pooled features

    def build(self) -> MiT:
        return MiT(self)


class StridedConvNorm(nn.Module):
    """Convolution of non-overlapping windows and LayerNorm: (B, H, W, C) -> (B, max(1, H // stride), ..., C).

    Remainder rows and columns are dropped. A map smaller than the window repeats its last row and column.
    """

    def __init__(self, *, dim: int, stride: int, norm_eps: float):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, dim, stride, stride)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BCHW = to_channels_first(x_BHWC)
        H, W = x_BCHW.shape[2:]
        if H < self.stride or W < self.stride:
            x_BCHW = F.pad(x_BCHW, (0, max(0, self.stride - W), 0, max(0, self.stride - H)), mode="replicate")
        return self.norm(to_channels_last(self.conv(x_BCHW)))


class EfficientSelfAttention(nn.Module):
    """Attention of all tokens to keys and values of a smaller map (section 3.1, "Efficient Self-Attention").

    Owns a query leaf, on the layer's input, and a key/value leaf, on the tokens after the strided convolution and
    its norm; their tokens are also what Segformer++ compares to merge them.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, *, dim: int, num_heads: int, kv_stride: int, norm_eps: float, level: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_reduction = QueryReduction(part="encoder", level=level)
        self.q = nn.Linear(dim, dim)
        self.kv_downsample = (
            StridedConvNorm(dim=dim, stride=kv_stride, norm_eps=norm_eps) if kv_stride > 1 else nn.Identity()
        )
        self.kv_reduction = KeyValueReduction(part="encoder", level=level)
        self.kv = nn.Linear(dim, 2 * dim)  # keys, then values
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        q_BNC, restore = self.q_reduction(x_BHWC)
        k_BMC, v_BMC = self.kv(self.kv_reduction(self.kv_downsample(x_BHWC))).chunk(2, dim=-1)
        return restore(self.proj(attend(self.q(q_BNC), k_BMC, v_BMC, num_heads=self.num_heads)))


class MiTBlock(nn.Module):
    """Pre-norm attention and feed-forward ("Mix-FFN") on a (B, H, W, C) map."""

    def __init__(self, *, dim: int, attn: EfficientSelfAttention, mlp_ratio: int, norm_eps: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ConvMlp(dim=dim, hidden_dim=dim * mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attn(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


# --- key rules ------------------------------------------------------------------------------------------------------

# NVIDIA's own names, which smp keeps.
ORIGINAL_RULES = (
    Rename(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.patch_embed."),
    Rename(r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    Rename(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    Rename(r"\.attn\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attn\.norm\.", ".attn.kv_downsample.norm."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)

# What transformers keeps on the Hub, below the prefix "segformer.encoder.".
HUB_RULES = (
    Rename(r"^patch_embeddings\.(\d)\.", r"stages.\1.patch_embed."),
    Rename(r"^block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    Rename(r"^layer_norm\.(\d)\.", r"stages.\1.norm."),
    Rename(r"\.patch_embed\.layer_norm\.", ".patch_embed.norm."),
    Rename(r"\.layer_norm_([12])\.", r".norm\1."),
    Rename(r"\.attention\.self\.query\.", ".attn.q."),
    Concat((r"\.attention\.self\.key\.", r"\.attention\.self\.value\."), ".attn.kv."),
    Rename(r"\.attention\.self\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attention\.self\.layer_norm\.", ".attn.kv_downsample.norm."),
    Rename(r"\.attention\.output\.dense\.", ".attn.proj."),
    Rename(r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)

# What transformers >= 5 keeps in memory, below the prefix "segformer.".
TRANSFORMERS_5_RULES = (
    Rename(r"\.patch_embeddings\.layer_norm\.", ".patch_embed.norm."),
    Rename(r"\.patch_embeddings\.", ".patch_embed."),
    Rename(r"\.layernorm_before\.", ".norm1."),
    Rename(r"\.layernorm_after\.", ".norm2."),
    Rename(r"\.attention\.q_proj\.", ".attn.q."),
    Concat((r"\.attention\.k_proj\.", r"\.attention\.v_proj\."), ".attn.kv."),
    Rename(r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attention\.sequence_reduction\.layer_norm\.", ".attn.kv_downsample.norm."),
    Rename(r"\.attention\.o_proj\.", ".attn.proj."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    Rename(r"^stages\.(\d)\.layer_norm\.", r"stages.\1.norm."),
)

# Segformer++ and the mmsegmentation that it is built on.
SEGFORMERPP_RULES = (
    Rename(r"^layers\.(\d)\.0\.projection\.", r"stages.\1.patch_embed.proj."),
    Rename(r"^layers\.(\d)\.0\.norm\.", r"stages.\1.patch_embed.norm."),
    Rename(r"^layers\.(\d)\.1\.(\d+)\.", r"stages.\1.blocks.\2."),
    Rename(r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
    Split(r"\.attn\.attn\.in_proj_(weight|bias)$", ((r".attn.q.\1", 1), (r".attn.kv.\1", 2))),
    Rename(r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    Rename(r"\.attn\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attn\.norm\.", ".attn.kv_downsample.norm."),
    Squeeze(r"\.ffn\.layers\.[04]\.weight$"),
    Rename(r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    Rename(r"\.ffn\.layers\.1\.", ".mlp.dwconv."),
    Rename(r"\.ffn\.layers\.4\.", ".mlp.fc2."),
)

_HEAD_RULE = Rename(r"^classifier\.", "head.")  # transformers' name of the ImageNet head


class MiT(PyramidEncoder):
    """Mix transformer: maps at strides 4, 8, 16, 32 and an ImageNet head."""

    key_layouts = (
        Layout("original", r"^block1\.0\.attn\.q\.", ORIGINAL_RULES),
        Layout("hub", r"^segformer\.encoder\.", (Prefixed("segformer.encoder.", "", HUB_RULES), _HEAD_RULE)),
        Layout(
            "transformers 5", r"^segformer\.stages\.", (Prefixed("segformer.", "", TRANSFORMERS_5_RULES), _HEAD_RULE)
        ),
        Layout("segformer++", r"^layers\.0\.0\.projection\.", SEGFORMERPP_RULES),
    )
    # hq, fast, n2d: the released configs of Segformer++. isr, isr_fast: the encoder's share of EDAFormer's "optimal"
    # and "fast", which on top of the trained strides amount to [16, 8, 2, 1] and [16, 8, 4, 2].
    reduction_presets = {
        "base": {},
        "hq": {
            "encoder": (Bipartite(0.6, 2), Bipartite(0.6, 2), 1, 1),
            "encoder.q": (1, 1, Bipartite(0.8, 4), Bipartite(0.8, 4)),
        },
        "fast": {
            "encoder": (Bipartite(0.9, 4), Bipartite(0.9, 4), 1, 1),
            "encoder.q": (1, 1, Bipartite(0.9, 4), Bipartite(0.9, 4)),
        },
        "n2d": {"encoder.q": Neighbour2d(2)},
        "isr": {"encoder": (2, 2, 1, 1)},
        "isr_fast": {"encoder": 2},
    }

    def __init__(self, cfg: MiTConfig):
        drop_path = calculate_drop_path_rates(cfg.drop_path_rate, list(cfg.depths), stagewise=True)
        in_chans = (cfg.in_chans, *cfg.embed_dims[:-1])
        stages = []
        for i, dim in enumerate(cfg.embed_dims):
            blocks = [
                MiTBlock(
                    dim=dim,
                    attn=EfficientSelfAttention(
                        dim=dim,
                        num_heads=cfg.num_heads[i],
                        kv_stride=cfg.kv_stride[i],
                        norm_eps=cfg.conv_norm_eps,
                        level=i,
                    ),
                    mlp_ratio=cfg.mlp_ratio,
                    norm_eps=cfg.norm_eps,
                    drop_path=drop_path[i][j],
                )
                for j in range(cfg.depths[i])
            ]
            embed = OverlapPatchEmbed(
                in_chans=in_chans[i],
                embed_dim=dim,
                kernel_size=7 if i == 0 else 3,
                stride=4 if i == 0 else 2,
                norm_eps=cfg.conv_norm_eps,
            )
            stages.append(Stage(patch_embed=embed, blocks=blocks, norm=nn.LayerNorm(dim, eps=cfg.norm_eps)))
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


# Of MiT's weights, and of everything trained from them.
NVIDIA_TERMS = {
    "license": "nvidia-source-code-license",
    "license_url": "https://github.com/NVlabs/SegFormer/blob/master/LICENSE",
    "commercial_use": False,
    "origin": "https://github.com/NVlabs/SegFormer (arXiv 2105.15203)",
}


def _imagenet(size: str, revision: str) -> dict[str, PretrainedCfg]:
    row = PretrainedCfg(
        state="hub",
        hf_hub_id=f"smp-hub/mit_{size}.imagenet",
        hf_revision=revision,
        dataset="imagenet",
        num_classes=1000,
        input_size=(224, 224),
        resize="exact",
        test_size=(224, 224),
        **NVIDIA_TERMS,
    )
    return {"imagenet": row}


PRETRAINED = {
    "mit_b0": _imagenet("b0", "9ce53d104d92d75aabb00aae70677aaab67e7c84"),
    "mit_b1": _imagenet("b1", "a04bf4f13a549bce677cf79b04852e7510782817"),
    "mit_b2": _imagenet("b2", "868ab6f13871dcf8c3d9f90ee4519403475b65ef"),
    "mit_b3": _imagenet("b3", "32558d12a65f1daa0ebcf4f4053c4285e2c1cbda"),
    "mit_b4": _imagenet("b4", "3a3454e900a4b4f11dd60eeb59101a9a1a36b017"),
    "mit_b5": _imagenet("b5", "ced04d96c586b6297fd59a7a1e244fc78fdb6531"),
}

register_family(Family(name="mit", build=MiT, variants=VARIANTS, pretrained=PRETRAINED))
