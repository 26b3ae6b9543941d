"""What EDAFormer's paper (arXiv 2407.17261, Table 3a) compares the attention of its decoder with.

No weights of these decoders were released, and the official code has none of them. The table says "convolution" and
"depthwise convolution"; that they stand in the attention's place in every block, between its norm and its residual,
with a kernel of 3x3 and a bias, is ours.

Cost at 512x512 with 150 classes, by segzoo's count, of T and B: attention 5.59 and 31.8 G with 4.93 and 29.4 M
parameters, conv 5.97 and 34.1 G with 6.56 and 36.0 M, dwconv 5.07 and 30.5 G with 4.47 and 27.6 M. The figures of the
paper's table are not confirmed, so none is given.

Shape letters: B batch, C channels, H, W rows and columns of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..layers.shapes import to_channels_first, to_channels_last


class ConvMixer(nn.Module):
    """A 3x3 convolution of all channels: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return to_channels_last(self.conv(to_channels_first(x_BHWC)))


class DepthwiseConvMixer(nn.Module):
    """A 3x3 convolution of each channel alone: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return to_channels_last(self.conv(to_channels_first(x_BHWC)))


MIXERS: Mapping[str, Callable[..., nn.Module]] = {"conv": ConvMixer, "dwconv": DepthwiseConvMixer}
