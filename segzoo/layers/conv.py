"""Convolution, batch norm and ReLU in one module, and the fusion of a pyramid by a 1x1 convolution.

Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .norm_folding import fold_norm_after
from .shapes import resize


class ConvBNReLU(nn.Sequential):
    """Convolution without bias -> BatchNorm -> ReLU, (B, C_in, H, W) -> (B, C_out, H, W) at stride 1."""

    def __init__(self, *, in_chans: int, out_chans: int, kernel_size: int = 1):
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False),
                bn=nn.BatchNorm2d(out_chans),
                act=nn.ReLU(),
            )
        )


class FuseLevels(nn.Module):
    """Maps resized to one grid, concatenated and fused: 1x1 convolution without bias -> BatchNorm -> ReLU.

    Shape: L maps (B, C_l, H_l, W_l) -> (B, out_chans, *size).
    """

    def __init__(self, *, level_chans: Sequence[int], out_chans: int):
        super().__init__()
        self.level_chans = tuple(level_chans)
        self.conv = nn.Conv2d(sum(level_chans), out_chans, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU()

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        x_BCHW = torch.cat([resize(map_BCHW, size) for map_BCHW in maps], dim=1)
        return self.act(self.bn(self.conv(x_BCHW)))

    @torch.no_grad()
    def folded(self) -> nn.Module:
        conv = fold_norm_after(self.conv, self.bn)
        assert conv is not None and conv.bias is not None  # a BatchNorm behind a convolution always folds
        levels = []
        for i, weight in enumerate(conv.weight.split(self.level_chans, dim=1)):
            level = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=i == 0).to(weight)
            level.weight.copy_(weight)
            if level.bias is not None:
                level.bias.copy_(conv.bias)
            levels.append(level)
        return FoldedFuseLevels(levels=levels)


class FoldedFuseLevels(nn.Module):
    """FuseLevels in eval mode as one 1x1 convolution a level, each at its level's own resolution.

    Exact because a bilinear resize is linear, acts on each channel alone, and its weights add up to one.
    """

    def __init__(self, *, levels: Sequence[nn.Conv2d]):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        total_BCHW, *others = (resize(level(map_BCHW), size) for level, map_BCHW in zip(self.levels, maps, strict=True))
        for part_BCHW in others:
            total_BCHW += part_BCHW  # in place: what is added up is this layer's own, and the largest there is
        return self.act(total_BCHW)

    @torch.no_grad()
    def after(self, projections: Sequence[nn.Linear]) -> FoldedFuseLevels:
        """The same with a Linear before each level multiplied into it: one matrix a level instead of two."""
        levels = []
        for projection, level in zip(projections, cast(Iterable[nn.Conv2d], self.levels), strict=True):
            matrix = level.weight.flatten(1).double()
            weight = matrix @ projection.weight.double()
            bias = torch.zeros_like(weight[:, 0]) if level.bias is None else level.bias.double()
            if projection.bias is not None:
                bias = bias + matrix @ projection.bias.double()
            merged = nn.Conv2d(projection.in_features, level.out_channels, 1).to(level.weight)
            merged.weight.copy_(weight[:, :, None, None])
            if merged.bias is not None:
                merged.bias.copy_(bias)
            levels.append(merged)
        return FoldedFuseLevels(levels=levels)
