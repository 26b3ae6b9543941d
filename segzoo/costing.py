"""Exact cost of a model: multiply-accumulates of convolutions, linear layers, matmuls and attention.

Resizes, norms, activations and softmax are not counted, as in the tables' `macs_exact`. The model runs on the meta
device, so that no activation is ever allocated.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._errors import SegzooError
from .layers.reduction import NEUTRAL, Reduction, entry_to_text
from .plans import Plan, current_plan


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one image in inference mode."""

    size: tuple[int, int]  # input (H, W) in pixels
    params: int  # learned numbers
    macs: int  # multiply-accumulates; a "FLOP" count of the papers is usually this figure
    stages: dict[str, int]  # multiply-accumulates of the model's parts; they add up to `macs`
    sites: dict[str, int]  # multiply-accumulates of the attention layers at each reduction site
    plan: Plan  # reduction in force

    def __str__(self) -> str:
        H, W = self.size
        lines = [f"{self.params / 1e6:.3f} M parameters, {self.macs / 1e9:.3f} GMACs at {H}x{W}"]
        lines += [f"  {name:<28}{macs / 1e9:>9.3f} G" for name, macs in self.stages.items()]
        if self.sites:
            lines.append("attention by reduction site:")
            # A query site is the same attention as its key/value site: shown only where something is set.
            lines += [
                f"  {site:<28}{macs / 1e9:>9.3f} G   factor {entry_to_text(self.plan[site])}"
                for site, macs in self.sites.items()
                if not site.endswith(".q") or self.plan[site] != NEUTRAL
            ]
        return "\n".join(lines)


def cost(model: nn.Module, size: tuple[int, int], *, in_chans: int | None = None) -> Cost:
    """Parameters and multiply-accumulates of one image of `size` = (H, W) pixels, reduction in force included.

    The model itself is neither run nor changed; nothing is allocated but shapes.

    >>> import segzoo
    >>> model = segzoo.create_model("edaformer_t")
    >>> f"{segzoo.cost(model, (512, 512)).macs / 1e9:.1f} GMACs"
    '5.6 GMACs'

    Args:
        model: any module that takes images (1, in_chans, H, W).
        size: (H, W) in pixels.
        in_chans: the image's channels; default: what the model says, else those of its first convolution, else 3.
    """
    H, W = _check_size(size)
    shadow = _meta_copy(model).eval()
    in_chans = in_chans or _in_chans(shadow)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            shadow(torch.empty(1, in_chans, H, W, device="meta", dtype=next(shadow.parameters()).dtype))
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise SegzooError(f"size {H}x{W}: tensors of such an image have more bytes than can be counted") from None
    root = type(shadow).__name__
    macs_of = {
        name.removeprefix(f"{root}."): sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()
    }
    return Cost(
        size=(H, W),
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        stages=_by_stage(shadow, macs_of),
        sites=_by_site(shadow, macs_of),
        plan=current_plan(model),
    )


def _check_size(size: object) -> tuple[int, int]:
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2 or any(int(side) < 1 for side in size):
        raise SegzooError(f"size must be (H, W) in pixels, both at least 1, not {size!r}")
    return int(size[0]), int(size[1])


def _in_chans(model: nn.Module) -> int:
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return getattr(getattr(model, "encoder", model), "in_chans", first)


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose tensors live on the meta device: no weight is copied on the way."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def _by_stage(model: nn.Module, macs_of: dict[str, int]) -> dict[str, int]:
    """The model's children; a child with stages or levels is split into them."""
    parts: dict[str, int] = {}
    for name, child in model.named_children():
        pieces = {
            f"{name}.{attribute}.{i}"
            for attribute in ("stages", "levels")
            for i in range(len(getattr(child, attribute, ())))
        }
        parts.update((piece, macs_of.get(piece, 0)) for piece in sorted(pieces))
        rest = _total(name, child, macs_of) - sum(parts[piece] for piece in pieces)
        if rest:
            parts[f"{name} (rest)" if pieces else name] = rest
    return parts


def _total(name: str, module: nn.Module, macs_of: dict[str, int]) -> int:
    """Of a module; one whose own forward is not called (an encoder used by its parts) is the sum of its children."""
    if name in macs_of:
        return macs_of[name]
    return sum(_total(f"{name}.{child_name}", child, macs_of) for child_name, child in module.named_children())


def _by_site(model: nn.Module, macs_of: dict[str, int]) -> dict[str, int]:
    """Attention layers are the modules that own a leaf; one with two leaves counts at both."""
    sites: dict[str, int] = {}
    for name, owner in model.named_modules():
        for leaf in owner.children():
            if isinstance(leaf, Reduction):
                sites[leaf.site] = sites.get(leaf.site, 0) + macs_of.get(name, 0)
    return sites
