"""Plain vision transformer as a segmentation encoder (Dosovitskiy et al., ICLR 2021; as SegViT uses it).

Parameters carry timm's names, so that timm's weights load by name. What the code that trained SegViT computes
(github.com/zbwxp/SegVit @763137e on mmsegmentation 0.24): the class token is dropped before the first block, so that
attention never sees it; LayerNorm eps is 1e-6 and the outputs of blocks are taken without a final norm; stochastic
depth acts on the feed-forward branch only; the position embedding is resized bicubically, without antialias.

What segzoo changed: every layer knows the token grid, any size and aspect ratio is taken (the image is zero-padded at
the bottom and right to whole patches), the class token is dropped when weights are loaded, and the position embedding
keeps its grid, (1, H, W, C), so that a grid of 4x9 is never mistaken for 6x6.

Not in the registry: it is a part of SegViT. timm's ViT weights are Apache-2.0.

Shape letters: B batch, C channels, H, W rows and columns of tokens, N query tokens, M key and value tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.attention import attend
from ..layers.block import BlockSequence
from ..layers.grids import fit_grid, grid_of, pad_to_multiple, resize_grid
from ..layers.init import init_weights
from ..layers.reduction import KeyValueReduction, QueryReduction
from ..layers.shapes import to_channels_first, to_channels_last
from .base import NOT_MEASURED, Encoder, Pyramid
from .config import EncoderConfig
from .features import FeatureInfo, pair
from .keys import StateDict
from .vit_weights import LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Configuration of a plain vision transformer."""

    img_size: tuple[int, int] = (512, 512)  # (H, W) in pixels that the position embedding is made for
    patch_size: int = 16  # side of a patch in pixels
    embed_dim: int = 768  # channels
    depth: int = 12  # blocks
    num_heads: int = 12
    mlp_ratio: float = 4.0  # hidden width = ratio * channels
    stages: tuple[int, ...] = (5, 7, 11)  # blocks, from 0, whose outputs are the features
    downsample_block: int | None = None  # block whose queries are every second token of every second row
    downsample: str = "nearest"  # "nearest" or "conv": how that block makes its queries (SegViT, Table 7)
    downsample_tokens: str = "q"  # "q", or "qkv": keys and values are down-sampled too (SegViT, Table 7)
    drop_path_rate: float = 0.1  # of the last block's feed-forward branch; grows linearly from 0
    num_classes: int = 0  # 0: pooled features

    def build(self) -> ViT:
        return ViT(self)

    @property
    def map_chans(self) -> tuple[int, ...]:
        return (self.embed_dim,) * len(self.stages)

    def check(self) -> None:
        super().check()
        self.require_positive("img_size", "patch_size", "embed_dim", "depth", "mlp_ratio")
        self.require_heads("num_heads", (self.num_heads,), f"embed_dim={self.embed_dim}", (self.embed_dim,))
        self.require_rising("stages", self.depth, "block")
        self.require(
            self.downsample_block is None or 0 <= self.downsample_block < self.depth,
            f"downsample_block={self.downsample_block} must be None or from 0 to {self.depth - 1} (depth - 1)",
        )
        self.require_choice("downsample", ("nearest", "conv"))
        self.require_choice("downsample_tokens", ("q", "qkv"))


class PatchEmbed(nn.Module):
    """Linear embedding of patches: (B, C_in, H, W) -> (B, H / patch, W / patch, C), both sides being multiples."""

    def __init__(self, *, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return to_channels_last(self.proj(x_BCHW))


class ViTAttention(nn.Module):
    """Multi-head attention from a map of queries to a map of keys and values, which may have another grid.

    Owns a key/value leaf and a query leaf, both on patch tokens.

    Shape: (B, H, W, C), (B, H', W', C) -> (B, H, W, C).
    """

    def __init__(self, *, dim: int, num_heads: int, level: int):
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.q_reduction = QueryReduction(part="encoder", level=level)
        self.kv_reduction = KeyValueReduction(part="encoder", level=level)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q_BHWC: Tensor, kv_BHWC: Tensor) -> Tensor:
        # The two sides may have different tokens, so the packed projection of timm is applied in two parts.
        w_q, w_kv = self.qkv.weight.split((self.dim, 2 * self.dim))
        b_q, b_kv = self.qkv.bias.split((self.dim, 2 * self.dim))
        q_BNC, restore = self.q_reduction(q_BHWC)
        k_BMC, v_BMC = F.linear(self.kv_reduction(kv_BHWC), w_kv, b_kv).chunk(2, dim=-1)
        out_BNC = attend(F.linear(q_BNC, w_q, b_q), k_BMC, v_BMC, num_heads=self.num_heads)
        return restore(self.proj(out_BNC))

    def folded(self) -> nn.Module:
        return SplitViTAttention(self)


class SplitViTAttention(nn.Module):
    """ViTAttention for inference: its packed projection as two layers."""

    def __init__(self, attn: ViTAttention):
        super().__init__()
        self.num_heads = attn.num_heads
        self.q_reduction = attn.q_reduction
        self.kv_reduction = attn.kv_reduction
        self.q = nn.Linear(attn.dim, attn.dim, device="meta")
        self.kv = nn.Linear(attn.dim, 2 * attn.dim, device="meta")  # keys, then values
        for name in ("weight", "bias"):
            q, kv = getattr(attn.qkv, name).detach().split((attn.dim, 2 * attn.dim))
            setattr(self.q, name, nn.Parameter(q.clone(), requires_grad=False))
            setattr(self.kv, name, nn.Parameter(kv.clone(), requires_grad=False))
        self.proj = attn.proj

    def forward(self, q_BHWC: Tensor, kv_BHWC: Tensor) -> Tensor:
        q_BNC, restore = self.q_reduction(q_BHWC)
        k_BMC, v_BMC = self.kv(self.kv_reduction(kv_BHWC)).chunk(2, dim=-1)
        return restore(self.proj(attend(self.q(q_BNC), k_BMC, v_BMC, num_heads=self.num_heads)))


class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward on a (B, H, W, C) map; stochastic depth on the feed-forward branch."""

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: float, level: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ViTAttention(dim=dim, num_heads=num_heads, level=level)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        normed_BHWC = self.norm1(x_BHWC)
        x_BHWC = x_BHWC + self.attn(normed_BHWC, normed_BHWC)
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


class EverySecondToken(nn.Module):
    """Nearest down-sampling by 2: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C)."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC[:, ::2, ::2]


class StridedConv(nn.Module):
    """Learned down-sampling by 2: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C)."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return to_channels_last(self.conv(to_channels_first(x_BHWC)))


class DownsamplingBlock(ViTBlock):
    """A block whose queries, and with them its residual, live on half the grid (SegViT, query-based down-sampling).

    Args:
        downsample: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C).
        full_kv: keys and values are all tokens; else only the down-sampled ones.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        level: int,
        drop_path: float,
        downsample: nn.Module,
        full_kv: bool,
    ):
        super().__init__(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio, level=level, drop_path=drop_path)
        self.downsample = downsample
        self.full_kv = full_kv

    def forward(self, x_BHWC: Tensor) -> Tensor:
        half_BHWC = self.downsample(x_BHWC)
        q_BHWC = self.norm1(half_BHWC)
        kv_BHWC = self.norm1(x_BHWC) if self.full_kv else q_BHWC
        x_BHWC = half_BHWC + self.attn(q_BHWC, kv_BHWC)
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


class ViTBlocks(BlockSequence):
    """Blocks in sequence: a map -> the outputs of the blocks in `stages`."""

    def __init__(self, *blocks: nn.Module, stages: Sequence[int]):
        super().__init__(*blocks)
        self.stages = tuple(stages)

    def forward(self, x_BHWC: Tensor) -> list[Tensor]:
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        outputs = []
        for i, block in enumerate(self):
            x_BHWC = checkpoint(block, x_BHWC, use_reentrant=False) if recompute else block(x_BHWC)
            if i in self.stages:
                outputs.append(x_BHWC)
            if i == self.stages[-1]:
                break
        return outputs


class ViT(Encoder):
    """Plain vision transformer whose features are the outputs of chosen blocks, all at one stride.

    After a down-sampling block the stride is twice the patch size.
    """

    key_layouts = LAYOUTS
    first_conv = "patch_embed.proj.weight"
    # Of the keys and values in each third of the depth; SegViT's paper has no such presets.
    reduction_presets = {"base": {}, "optimal": {"encoder": (2, 2, 1)}, "fast": {"encoder": 2}}
    preset_accuracy = {"base": "as trained", "optimal": NOT_MEASURED, "fast": NOT_MEASURED}

    def __init__(self, cfg: ViTConfig):
        super().__init__(cfg=cfg)
        self.size_multiple = cfg.patch_size
        drop_path = calculate_drop_path_rates(cfg.drop_path_rate, cfg.depth)
        self.patch_embed = PatchEmbed(in_chans=cfg.in_chans, embed_dim=cfg.embed_dim, patch_size=cfg.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid_of(cfg.img_size, cfg.patch_size), cfg.embed_dim))
        blocks = []
        for i in range(cfg.depth):
            options = {
                "dim": cfg.embed_dim,
                "num_heads": cfg.num_heads,
                "mlp_ratio": cfg.mlp_ratio,
                "level": 3 * i // cfg.depth,
                "drop_path": drop_path[i],
            }
            if i == cfg.downsample_block:
                downsample = EverySecondToken() if cfg.downsample == "nearest" else StridedConv(dim=cfg.embed_dim)
                blocks.append(DownsamplingBlock(downsample=downsample, full_kv=cfg.downsample_tokens == "q", **options))
            else:
                blocks.append(ViTBlock(**options))
        self.blocks = ViTBlocks(*blocks, stages=cfg.stages)
        shrunk = cfg.depth if cfg.downsample_block is None else cfg.downsample_block
        self.feature_info = FeatureInfo(
            {
                "num_chs": cfg.embed_dim,
                "reduction": cfg.patch_size * (2 if i >= shrunk else 1),
                "module": f"blocks.{i}",
            }
            for i in cfg.stages
        )
        self.blocks.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.make_head(cfg.embed_dim)
        self.head.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}  # as timm

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^(?:pos_embed|patch_embed)", "blocks": r"^blocks\.(\d+)"}  # as timm; stages are blocks

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """The position embedding to the grid of images of this many pixels, resized bicubically."""
        if img_size is None:
            return
        cfg = dataclasses.replace(self.cfg, img_size=pair(img_size))
        grid = grid_of(cfg.img_size, cfg.patch_size)
        self.pos_embed = nn.Parameter(resize_grid(self.pos_embed.detach(), grid))
        self.cfg = cfg

    def fit_state(self, state: StateDict) -> StateDict:
        """Position embeddings of timm and mmseg get their grid, and those made for another `img_size` are resized."""
        return fit_grid(state, "pos_embed", self.pos_embed)

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        """(B, in_chans, H, W) normalised images -> one map (B, C, ceil(H / 16), ceil(W / 16)) for each of `stages`."""
        self.check_images(x_BCHW)
        padded_BCHW = pad_to_multiple(x_BCHW, self.size_multiple)
        x_BHWC = self.patch_embed(padded_BCHW)
        x_BHWC = (x_BHWC + resize_grid(self.pos_embed, x_BHWC.shape[1:3])).contiguous()
        return self.pyramid([to_channels_first(map_BHWC) for map_BHWC in self.blocks(x_BHWC)], x_BCHW, padded_BCHW)
