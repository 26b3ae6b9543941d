"""Feed-forward layer with a depthwise convolution between its linear layers (PVT v2 and its relatives).

Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

from torch import Tensor, nn

from .shapes import to_channels_first, to_channels_last


class ConvMlp(nn.Module):
    """fc1 -> (ReLU) -> depthwise 3x3 -> GELU -> fc2 on a (B, H, W, C) map; `relu=True` is EFT's encoder."""

    def __init__(self, *, dim: int, hidden_dim: int, relu: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act1 = nn.ReLU() if relu else nn.Identity()
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.act2 = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = self.act1(self.fc1(x_BHWC))
        x_BHWC = to_channels_last(self.dwconv(to_channels_first(x_BHWC)))
        return self.fc2(self.act2(x_BHWC))
