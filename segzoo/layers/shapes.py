"""Views between maps and tokens, and the bilinear resize of the field."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_channels_first(x_BHWC: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view; channels-last in memory if the input is contiguous."""
    return x_BHWC.permute(0, 3, 1, 2)


def to_channels_last(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view; contiguous if the input is channels-last in memory."""
    return x_BCHW.permute(0, 2, 3, 1)


def resize(map_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to `size` = (H, W) with half-pixel centres (`align_corners=False`, no antialias)."""
    if map_BCHW.shape[2:] == tuple(size):
        return map_BCHW
    return F.interpolate(map_BCHW, size=size, mode="bilinear", align_corners=False)
