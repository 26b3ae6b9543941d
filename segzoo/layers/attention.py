"""Scaled dot-product attention over tokens; the only place that calls the fused kernel.

Shape letters: B batch, C channels, N query tokens, M key and value tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BNC: Tensor,
    k_BMC: Tensor,
    v_BMC: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Multi-head attention without projections: (B, N, C), (B, M, C), (B, M, C) -> (B, N, C).

    Args:
        num_heads: divides C; head h owns the channels [h * C / heads, (h + 1) * C / heads).
        scale: factor of the scores before the softmax; default (C / heads) ** -0.5.
        dropout: probability of dropping an attention weight; pass 0 outside training.
        bias: added to the scaled scores; (B or 1, heads, N, M).
    """

    def split(x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    k = split(k_BMC)
    v = k if v_BMC is k_BMC else split(v_BMC)
    out = F.scaled_dot_product_attention(split(q_BNC), k, v, bias, scale=scale, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)
