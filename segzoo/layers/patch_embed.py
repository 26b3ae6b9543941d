"""Overlapping patch embedding (PVT v2, section 3.2; SegFormer, section 3.1).

Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

from torch import Tensor, nn

from .shapes import to_channels_last


class OverlapPatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: (B, C_in, H, W) -> (B, ceil(H / stride), ceil(W / stride), C_out)."""

    def __init__(self, *, in_chans: int, embed_dim: int, kernel_size: int, stride: int, norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(to_channels_last(self.proj(x_BCHW)))
