"""BatchNorm as paddle computes it, and the small stacks around it that RTFormer is made of.

B batch, C channels, H, W map.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose running variance is that of the batch itself, as paddle's, not the unbiased estimate."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        self.num_batches_tracked.add_(1)
        mean_C, variance_C = self.running_mean.clone(), self.running_var.clone()
        out = F.batch_norm(x_BCHW, mean_C, variance_C, self.weight, self.bias, True, self.momentum, self.eps)
        with torch.no_grad():
            kept_C = (1 - self.momentum) * self.running_var
            count = x_BCHW.shape[0] * x_BCHW.shape[2] * x_BCHW.shape[3]
            self.running_var.copy_(kept_C + (variance_C - kept_C) * ((count - 1) / count))
            self.running_mean.copy_(mean_C)
        return out


def conv_norm(
    in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, *, bias: bool = False, act: bool = False
) -> nn.Sequential:
    """Convolution -> BatchNorm (-> ReLU)."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=bias)
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, bn=BatchNorm(out_chans))
    if act:
        parts["act"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)


def norm_act_conv(in_chans: int, out_chans: int, kernel_size: int = 1, stride: int = 1) -> nn.Sequential:
    """BatchNorm -> ReLU -> convolution without bias."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(bn=BatchNorm(in_chans), act=nn.ReLU(inplace=True), conv=conv))
