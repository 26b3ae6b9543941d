"""Weight initialisation of the hierarchical transformers (PVT v2, SegFormer, EFT use the same)."""

from __future__ import annotations

import math

from torch import nn


def init_weights(module: nn.Module) -> None:
    """For `model.apply`: linear layers truncated normal (0.02), convolutions by fan-out, norms one and zero."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.is_meta:  # nothing to initialise, or about to be loaded
        return
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
