"""The transformer block with a depthwise convolution in its feed-forward layer, and the stages of a pyramid of them.

PVT v2, SegFormer and EFT share both; what differs is the attention. Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .mlp import ConvMlp
from .patch_embed import OverlapPatchEmbed
from .shapes import to_channels_first


class Block(nn.Module):
    """Pre-norm attention and feed-forward on a (B, H, W, C) map.

    Args:
        attn: (B, H, W, C) -> (B, H, W, C).
        mlp_ratio: hidden width of the feed-forward layer = int(ratio * dim).
        mlp_relu: a ReLU before its depthwise convolution, too.
        norm_eps: of both LayerNorms.
        drop_path: probability that a branch is left out in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        norm_eps: float,
        drop_path: float,
        mlp_relu: bool = False,
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


class BlockSequence(nn.Sequential):
    """Blocks in sequence, optionally recomputed in the backward pass."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Stage(nn.Module):
    """One level of a pyramid: patch embedding, blocks, norm. (B, C_in, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, *, patch_embed: OverlapPatchEmbed, blocks: Sequence[nn.Module], norm: nn.Module):
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = BlockSequence(*blocks)
        self.norm = norm

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return to_channels_first(self.norm(self.blocks(self.patch_embed(x_BCHW))))


def pyramid_stages(
    *,
    in_chans: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    attention: Callable[[int], nn.Module],
    mlp_ratio: float | Sequence[float],
    norm_eps: float,
    drop_path_rate: float,
    mlp_relu: bool = False,
    embed_norm_eps: float = 1e-5,
) -> list[Stage]:
    """The stages of a pyramid at strides 4, 8, 16, ...: the first embeds patches of 7x7 pixels, the others of 3x3.

    Args:
        in_chans: channels of the image.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        attention: stage, from 0 -> a new attention layer for one of its blocks.
        mlp_ratio: of `Block`, for all stages or one a stage.
        mlp_relu: see `Block`.
        norm_eps: of the LayerNorms in and after the blocks.
        drop_path_rate: of the last block; grows linearly from 0 over all blocks.
        embed_norm_eps: of the LayerNorms of the patch embeddings.
    """
    drop_path = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
    chans = (in_chans, *embed_dims)
    mlp_ratios = [mlp_ratio] * len(embed_dims) if isinstance(mlp_ratio, (int, float)) else mlp_ratio
    stages = []
    for i, dim in enumerate(embed_dims):
        blocks = [
            Block(
                dim=dim,
                attn=attention(i),
                mlp_ratio=mlp_ratios[i],
                norm_eps=norm_eps,
                drop_path=drop_path[i][j],
                mlp_relu=mlp_relu,
            )
            for j in range(depths[i])
        ]
        embed = OverlapPatchEmbed(
            in_chans=chans[i],
            embed_dim=dim,
            kernel_size=7 if i == 0 else 3,
            stride=4 if i == 0 else 2,
            norm_eps=embed_norm_eps,
        )
        stages.append(Stage(patch_embed=embed, blocks=blocks, norm=nn.LayerNorm(dim, eps=norm_eps)))
    return stages
