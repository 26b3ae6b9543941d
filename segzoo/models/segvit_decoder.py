"""The parts of SegViT's decoder (arXiv 2210.05844, Figure 2): attention-to-mask, its cascade, the query up-sampling.

What the released code computes, and what segzoo changed, is in `segvit.py`.

Shape letters: B batch, C channels, D hidden channels, H, W map, N queries, M tokens of a map, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.grids import resize_grid
from ..layers.init import init_weights
from ..layers.shapes import resize, to_channels_last


class SelfAttention(nn.Module):
    """Multi-head attention among queries with packed projections, (B, N, C) -> (B, N, C)."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        q_BNC, k_BNC, v_BNC = self.qkv(x_BNC).chunk(3, dim=-1)
        dropout = self.attn_drop.p if self.training else 0.0
        return self.proj(attend(q_BNC, k_BNC, v_BNC, num_heads=self.num_heads, dropout=dropout))


class CrossAttention(nn.Module):
    """Multi-head attention from queries to tokens, whose scores can serve as masks (attention-to-mask).

    Shape: (B, N, C), (B, M, C) -> (B, N, C), and with `want_masks` (B, N, M): the scaled scores before the softmax,
    averaged over the heads; else None.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = nn.Dropout(dropout)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor, memory_BMC: Tensor, *, want_masks: bool) -> tuple[Tensor, Tensor | None]:
        q_BNC, k_BMC, v_BMC = self.q(x_BNC), self.k(memory_BMC), self.v(memory_BMC)
        if not want_masks:
            dropout = self.attn_drop.p if self.training else 0.0
            return self.proj(attend(q_BNC, k_BMC, v_BMC, num_heads=self.num_heads, dropout=dropout)), None
        # The scores are an output here, so they are made once and used twice; the fused kernel keeps them to itself.
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q_BNC, k_BMC, v_BMC))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, M)
        out = self.attn_drop(scores.softmax(dim=-1)) @ v
        return self.proj(out.transpose(1, 2).flatten(2)), scores.mean(dim=1)


class DecoderLayer(nn.Module):
    """Post-norm decoder layer: self-attention of the queries, cross-attention to the tokens, feed-forward with ReLU."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.self_attn = SelfAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BNC: Tensor, memory_BMC: Tensor, *, want_masks: bool = False) -> tuple[Tensor, Tensor | None]:
        x_BNC = self.norm1(x_BNC + self.dropout(self.self_attn(x_BNC)))
        out_BNC, masks_BNM = self.cross_attn(x_BNC, memory_BMC, want_masks=want_masks)
        x_BNC = self.norm2(x_BNC + self.dropout(out_BNC))
        hidden_BND = self.dropout(F.relu(self.linear1(x_BNC)))
        return self.norm3(x_BNC + self.dropout(self.linear2(hidden_BND))), masks_BNM


class DecoderStage(nn.Module):
    """Decoder layers over the tokens of one map.

    Args:
        in_chans: channels of the map, projected and normed; None takes a map that is already of width `dim`.
    """

    def __init__(self, *, in_chans: int | None, dim: int, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        self.proj = nn.Identity() if in_chans is None else nn.Linear(in_chans, dim)
        self.norm = nn.Identity() if in_chans is None else nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            DecoderLayer(dim=dim, num_heads=num_heads, dropout=dropout) for _ in range(num_layers)
        )

    def forward(self, x_BNC: Tensor, map_BCHW: Tensor) -> Tensor:
        """Queries and a map -> the queries after the last layer."""
        memory_BMC = self.memory(map_BCHW)
        for layer in self.layers:
            x_BNC, _ = layer(x_BNC, memory_BMC)
        return x_BNC

    def with_masks(self, x_BNC: Tensor, map_BCHW: Tensor, *, last: int) -> list[tuple[Tensor, Tensor]]:
        """Queries (B, N, C) and mask logits (B, N, H, W) after each of the `last` layers."""
        memory_BMC = self.memory(map_BCHW)
        outputs = []
        for i, layer in enumerate(self.layers):
            want_masks = i >= len(self.layers) - last
            x_BNC, masks_BNM = layer(x_BNC, memory_BMC, want_masks=want_masks)
            if want_masks:
                outputs.append((x_BNC, masks_BNM.unflatten(-1, tuple(map_BCHW.shape[2:]))))
        return outputs

    def memory(self, map_BCHW: Tensor) -> Tensor:
        return self.norm(self.proj(to_channels_last(map_BCHW).flatten(1, 2)))


class QueryUpsampling(nn.Module):
    """Learned spatial queries collect the features of every map, fine first: maps -> one map on the finest grid.

    Args:
        grid: (H, W) of the queries as learned; interpolated to the finest map's.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        in_chans: Sequence[int],
        dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(*grid, dim))
        self.stages = nn.ModuleList(
            DecoderStage(in_chans=chans, dim=dim, num_heads=num_heads, num_layers=num_layers, dropout=dropout)
            for chans in in_chans
        )
        self.apply(init_weights)
        nn.init.normal_(self.queries)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """The queries, resized bicubically."""
        self.queries = nn.Parameter(resize_grid(self.queries.detach()[None], grid)[0])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        B, _, H, W = features[0].shape
        x_BNC = resize_grid(self.queries[None], (H, W)).flatten(1, 2).repeat(B, 1, 1)
        for stage, map_BCHW in zip(self.stages, features, strict=True):
            x_BNC = stage(x_BNC, map_BCHW)
        return [x_BNC.transpose(1, 2).unflatten(-1, (H, W))]


class AttentionToMask(nn.Module):
    """The ATM cascade: maps, fine to coarse or shallow to deep -> class logits and mask logits of one query a class.

    Stages are numbered in the order in which they run: the last map first.

    Args:
        in_chans: channels of each map; None for a single map that is already of width `dim`.
    """

    def __init__(
        self,
        *,
        in_chans: Sequence[int | None],
        dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        num_classes: int,
    ):
        super().__init__()
        self.stages = nn.ModuleList(
            DecoderStage(in_chans=chans, dim=dim, num_heads=num_heads, num_layers=num_layers, dropout=dropout)
            for chans in reversed(in_chans)
        )
        self.apply(init_weights)
        self.make_classifier(num_classes, like=None, dim=dim)

    def make_classifier(self, num_classes: int, *, like: Tensor | None, dim: int) -> None:
        """Fresh class queries and class logits, the two things that exist once a class."""
        self.class_queries = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.normal_(self.class_queries)
        # The last class is "no object".
        self.class_embed = nn.Linear(dim, num_classes + 1).apply(init_weights).train(self.training)
        if like is not None:
            self.to(like)

    def forward(self, features: Sequence[Tensor], *, auxiliary: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Maps -> [(class logits (B, K, K + 1), mask logits (B, K, H, W) on the first map's grid), ...].

        The last item is the prediction. With `auxiliary`, the earlier predictions that are supervised come before it:
        those after each stage, or with a single stage those after each layer.
        """
        x_BNC = self.class_queries.repeat(features[0].shape[0], 1, 1)
        outputs = []
        stages = cast("Sequence[DecoderStage]", self.stages)  # a text: torch 2.6 cannot record a generic alias
        if len(stages) == 1:
            stage = stages[0]
            outputs = stage.with_masks(x_BNC, features[0], last=len(stage.layers) if auxiliary else 1)
        else:
            grid = tuple(features[0].shape[2:])
            total_BNHW = None
            for stage, map_BCHW in zip(stages, reversed(features), strict=True):
                ((x_BNC, masks_BNHW),) = stage.with_masks(x_BNC, map_BCHW, last=1)
                masks_BNHW = resize(masks_BNHW, grid)
                total_BNHW = masks_BNHW if total_BNHW is None else total_BNHW + masks_BNHW
                outputs.append((x_BNC, total_BNHW))
        return [(self.class_embed(x_BNC), masks_BNHW) for x_BNC, masks_BNHW in outputs[0 if auxiliary else -1 :]]
