"""Layers in oneDNN's fused operators, which run inference on CPUs faster than torch's own dispatch.

`F.linear` goes through a BLAS that on processors of other makers than its own reaches half of the matrix rate (AMD
EPYC, one thread: 99 of 217 GFLOP/s), and small convolutions of 1x1 go slow ways; oneDNN's operators do neither, and
apply the activation while the result is still in registers. They are private to torch (its own compiler uses them), so
that every layer here keeps its plain form, asks before each call and falls back to it: without the operators, for other
devices and dtypes, under autocast, for gradients, and in compilers and tracers, which choose operators themselves.
Weights stay plain parameters, since packed ones refuse deepcopy, saving and `.to`.

Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .block import Block
from .mlp import ConvMlp

# Below as many multiply-accumulates, handing tensors to oneDNN costs more than it saves (measured: 0.05 ms a call; on a
# 256x160 by 160x320 product of 13 M it is behind by 0.1 ms where BLAS is quick and ahead by 0.1 where it is not).
MIN_MACS = 2**22
# MKL on the processors of its own maker is as quick as oneDNN (72 to 97 of 60 to 94 GFLOP/s, Intel Xeon, Ice Lake, one
# thread) but for products with few terms: up to so many, oneDNN is 1.1 to 2.4 times as fast there, too.
FEW_TERMS = 128
# Layers whose activation is the next thing that sees their output, in modules that are no nn.Sequential.
FOLLOWERS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    ConvMlp: (("fc1", "act1"), ("dwconv", "act2")),
    Mlp: (("fc1", "act"),),
}


@functools.cache
def _operators_work(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the operators for a dtype."""
    map_BCHW, kernel = torch.full((1, 4, 3, 3), 3, dtype=dtype), torch.ones(4, 1, 3, 3, dtype=dtype)
    weight = torch.ones(4, 4, dtype=dtype)
    try:
        linear = torch.ops.mkldnn._linear_pointwise(map_BCHW[0, :, 0].T, weight, None, "relu", [], "")
        convolution = torch.ops.mkldnn._convolution_pointwise(
            map_BCHW, kernel, None, [1, 1], [1, 1], [1, 1], 4, "gelu", [], "none"
        )
    except (AttributeError, RuntimeError):
        return False
    return bool((linear == 12).all() and convolution[0, 0, 1, 1] == 27)


@functools.cache
def _blas_leads() -> bool:
    """Whether this is MKL on an Intel processor, where plain products are as quick as oneDNN's."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        processor = platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in processor


def _is_for_operators(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.device.type == "cpu" == weight.device.type
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and _operators_work(x.dtype)
    )


def _activation(act: nn.Module) -> tuple[str, str] | None:
    """The operators' name and algorithm of an activation, or None if they have none."""
    if type(act) is nn.Identity:
        return "none", ""
    if type(act) is nn.ReLU:
        return "relu", ""
    if type(act) is nn.GELU:
        return "gelu", act.approximate
    return None


class FastLayer(nn.Module):
    """A layer and the activation behind it, in one operator where there is one.

    Args:
        layer: a Linear or convolution that `takes`.
        act: ReLU, GELU or Identity.
    """

    def __init__(self, *, layer: Any, act: nn.Module):
        super().__init__()
        self.layer = layer
        self.act = act
        self.attr, self.algorithm = _activation(act) or ("none", "")

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        raise NotImplementedError

    def macs(self, x: Tensor) -> int:
        """Multiply-accumulates of one call; 0 where the plain form is as quick."""
        raise NotImplementedError

    def in_one(self, x: Tensor) -> Tensor:
        """The layer and its activation by the operator."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.macs(x) >= MIN_MACS and _is_for_operators(x, self.layer.weight):
            return self.in_one(x)
        return self.act(self.layer(x))

    def plain(self) -> nn.Module:
        return self.layer if type(self.act) is nn.Identity else nn.Sequential(self.layer, self.act)


class FastLinear(FastLayer):
    """(..., C_in) -> (..., C_out)."""

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return type(layer) is nn.Linear

    def macs(self, x: Tensor) -> int:
        if self.layer.in_features > FEW_TERMS and x.dtype == torch.float32 and _blas_leads():
            return 0
        return x.numel() * self.layer.out_features

    def in_one(self, x: Tensor) -> Tensor:
        layer = self.layer
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, self.attr, [], self.algorithm)


class FastPointwise(FastLayer):
    """A 1x1 convolution as the matrix product that it is, on a channels-last map: (B, C_in, H, W) -> (B, C_out, H, W).

    Measured with one thread and a batch of one, Intel Xeon (Ice Lake): 1.2 to 2 times as fast as the convolution.
    """

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return (
            type(layer) is nn.Conv2d
            and layer.kernel_size == layer.stride == (1, 1)
            and layer.groups == 1
            and not any(layer._reversed_padding_repeated_twice)
        )

    def macs(self, x: Tensor) -> int:
        # Any other layout would have to be copied first.
        return x.numel() * self.layer.out_channels if x.is_contiguous(memory_format=torch.channels_last) else 0

    def in_one(self, x: Tensor) -> Tensor:
        weight = self.layer.weight[:, :, 0, 0]
        x_BHWC = x.permute(0, 2, 3, 1)
        y_BHWC = torch.ops.mkldnn._linear_pointwise(x_BHWC, weight, self.layer.bias, self.attr, [], self.algorithm)
        return y_BHWC.permute(0, 3, 1, 2)


class FastDepthwise(FastLayer):
    """A depthwise convolution with its activation: (B, C, H, W) -> (B, C, H', W').

    Measured as above: with GELU 1.4 to 1.9 times as fast as one after the other; alone no faster than torch's.
    """

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return (
            type(layer) is nn.Conv2d
            and layer.groups == layer.in_channels == layer.out_channels > 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def macs(self, x: Tensor) -> int:
        return x.numel() * self.layer.kernel_size[0] * self.layer.kernel_size[1]

    def in_one(self, x: Tensor) -> Tensor:
        layer = self.layer
        sides = list(layer.padding), list(layer.stride), list(layer.dilation)
        return torch.ops.mkldnn._convolution_pointwise(
            x, layer.weight, layer.bias, *sides, layer.groups, self.attr, [], self.algorithm
        )


class FastBlock(nn.Module):
    """A Block for inference, whose residuals are added in place: fresh memory for each costs more than the sums.

    Profiled on SegFormer-B0 at 512x512, one thread: sums into fresh memory took a tenth of the time.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(self, x_BHWC: Tensor) -> Tensor:
        block = self.block
        x_BHWC = _add(block.attn(block.norm1(x_BHWC)), x_BHWC)
        return _add(block.mlp(block.norm2(x_BHWC)), x_BHWC)

    def plain(self) -> nn.Module:
        return self.block


def _add(branch: Tensor, x: Tensor) -> Tensor:
    """Their sum, in the branch's own memory unless gradients or autocast's precisions forbid it."""
    if torch.is_grad_enabled() or branch.dtype != x.dtype:
        return x + branch
    return branch.add_(x)


KINDS: tuple[type[FastLayer], ...] = (FastLinear, FastPointwise, FastDepthwise)


def accelerate(model: nn.Module) -> nn.Module:
    """Give the layers of a model for inference their fast form, in place; returns the model, or what replaces it."""
    for module in list(model.modules()):
        for layer_name, act_name in _pairs(module):
            layer, act = getattr(module, layer_name), getattr(module, act_name)
            if (kind := _kind(layer)) is not None and _activation(act) is not None:
                setattr(module, layer_name, kind(layer=layer, act=act))
                setattr(module, act_name, nn.Identity())

    def fast(layer: nn.Module) -> nn.Module:
        if type(layer) is Block:
            return FastBlock(layer)
        kind = _kind(layer)
        # A depthwise convolution alone is no faster than torch's.
        return layer if kind in (None, FastDepthwise) else kind(layer=layer, act=nn.Identity())

    return _replace(model, fast)


def slow_down(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place but for a model that is itself a layer."""
    return _replace(model, lambda layer: layer.plain() if isinstance(layer, (FastLayer, FastBlock)) else layer)


def _kind(layer: nn.Module) -> type[FastLayer] | None:
    return next((kind for kind in KINDS if kind.takes(layer)), None)


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a module's layers and of the activations that come right behind them."""
    yield from FOLLOWERS.get(type(module), ())
    if type(module).forward is not nn.Sequential.forward:
        return
    active = [name for name, part in module.named_children() if not isinstance(part, (nn.Identity, _DropoutNd))]
    yield from zip(active, active[1:], strict=False)


def _replace(module: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Every part of a module, inner ones first, by its replacement; a FastLayer is taken as a whole."""
    if not isinstance(module, FastLayer):
        for name, child in list(module.named_children()):
            setattr(module, name, _replace(child, replacement))
    return replacement(module)


def _linear_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _convolution_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(list(x), list(weight), list(out_shape))


if _operators_work(torch.float32):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_linear_flops)
    register_flop_formula(torch.ops.mkldnn._convolution_pointwise)(_convolution_flops)
