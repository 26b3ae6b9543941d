"""Convolution, batch norm and ReLU in one module."""

from __future__ import annotations

from torch import Tensor, nn


class ConvBNReLU(nn.Module):
    """Convolution without bias -> BatchNorm -> ReLU, (B, C_in, H, W) -> (B, C_out, H, W) at stride 1."""

    def __init__(self, *, in_chans: int, out_chans: int, kernel_size: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x_BCHW)))
