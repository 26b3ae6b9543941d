"""Exact folding of a BatchNorm's eval-mode affine map into the linear layer next to it.

In eval mode BatchNorm is x -> scale * x + shift for each channel. After a convolution or Linear it scales the layer's
outputs; before one it scales the layer's inputs. The arithmetic runs in float64 and is stored in the layer's dtype.

Shape letters: C channels of the norm, G groups of the layer.
"""

from __future__ import annotations

import copy
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

L = TypeVar("L", bound=nn.Module)
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The float64 (C,) scale and shift that `norm` applies in eval mode."""
    assert norm.running_var is not None and norm.running_mean is not None
    variance_C, mean_C = norm.running_var.double(), norm.running_mean.double()
    scale_C = (variance_C + norm.eps).rsqrt()
    if norm.weight is None:
        return scale_C, -mean_C * scale_C
    scale_C = scale_C * norm.weight.double()
    return scale_C, norm.bias.double() - mean_C * scale_C


@torch.no_grad()
def fold_norm_after(layer: nn.Module, norm: nn.Module) -> Linear | None:
    """One layer that computes `norm(layer(x))`, or None if there is none."""
    if not (isinstance(layer, LINEAR) and _has_statistics(norm) and norm.num_features == layer.weight.shape[0]):
        return None
    scale_C, shift_C = scale_and_shift(norm)
    weight = layer.weight.double()
    bias_C = shift_C if layer.bias is None else shift_C + scale_C * layer.bias.double()
    return with_weights(layer, scale_C.view(-1, *[1] * (weight.ndim - 1)) * weight, bias_C)


@torch.no_grad()
def fold_norm_before(norm: nn.Module, layer: nn.Module) -> Linear | None:
    """One layer that computes `layer(norm(x))`, or None if there is none.

    A convolution that pads with zeros has none: its padding is zero behind the norm, which is no constant before it.
    """
    if not (isinstance(layer, LINEAR) and _has_statistics(norm)):
        return None
    groups = getattr(layer, "groups", 1)
    if norm.num_features != layer.weight.shape[1] * groups:
        return None
    scale_C, shift_C = scale_and_shift(norm)
    if _pads_with_zeros(layer) and bool(shift_C.any()):
        return None
    weight = layer.weight.double()
    by_group = weight.unflatten(0, (groups, -1))  # (G, out / G, in / G, *kernel)
    in_shape = (groups, 1, -1, *[1] * (weight.ndim - 2))
    bias = (by_group * shift_C.view(in_shape)).flatten(2).sum(2).flatten()
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    return with_weights(layer, (by_group * scale_C.view(in_shape)).flatten(0, 1), bias)


def absorb(norm: nn.Module, layer: L) -> L:
    """`fold_norm_before` where there is such a layer for certain: a BatchNorm before a layer that does not pad."""
    folded = fold_norm_before(norm, layer)
    assert isinstance(folded, type(layer))
    return folded


@torch.no_grad()
def with_weights(layer: Linear, weight: Tensor, bias: Tensor) -> Linear:
    """A copy of a linear layer with these weights, in the layer's own dtype and memory format."""
    like = layer.weight
    layer = copy.deepcopy(layer)
    layer.weight = nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(like), requires_grad=False)
    return layer


def _has_statistics(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None


def _pads_with_zeros(layer: Linear) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    return any(layer._reversed_padding_repeated_twice)
