"""Attention whose keys and values come from a smaller map, made by a strided convolution (PVT; PVT v2, SegFormer).

Shape letters: B batch, C channels, H, W rows and columns of a map, N query tokens, M key and value tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .reduction import KeyValueReduction, QueryReduction
from .shapes import to_channels_first, to_channels_last


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
    """Attention of all tokens to keys and values of a smaller map (SegFormer, section 3.1; PVT, section 3.3).

    Owns a query leaf, on the layer's input, and a key/value leaf, on the tokens after the strided convolution and
    its norm; their tokens are also what Segformer++ compares to merge them. With `embedding_free`, queries are the
    input, and keys and values these tokens, without projections.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self, *, dim: int, num_heads: int, kv_stride: int, norm_eps: float, level: int, embedding_free: bool = False
    ):
        super().__init__()
        self.num_heads = num_heads
        self.embedding_free = embedding_free
        self.q_reduction = QueryReduction(part="encoder", level=level)
        self.q = nn.Identity() if embedding_free else nn.Linear(dim, dim)
        self.kv_downsample = (
            StridedConvNorm(dim=dim, stride=kv_stride, norm_eps=norm_eps) if kv_stride > 1 else nn.Identity()
        )
        self.kv_reduction = KeyValueReduction(part="encoder", level=level)
        self.kv = nn.Identity() if embedding_free else nn.Linear(dim, 2 * dim)  # keys, then values
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        q_BNC, restore = self.q_reduction(x_BHWC)
        kv_BMD = self.kv(self.kv_reduction(self.kv_downsample(x_BHWC)))
        k_BMC, v_BMC = (kv_BMD, kv_BMD) if self.embedding_free else kv_BMD.chunk(2, dim=-1)
        return restore(self.proj(attend(self.q(q_BNC), k_BMC, v_BMC, num_heads=self.num_heads)))
