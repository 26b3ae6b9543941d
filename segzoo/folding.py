"""Rewrite a model for inference so that it computes the same function with fewer operations.

Two rules, neither of which knows a family:

1. In a plain `nn.Sequential`, a BatchNorm next to a convolution or Linear is multiplied into it (either side, where
   `layers.norm_folding` has an exact form; Identity and Dropout between the two do nothing in eval mode).
2. A module that defines `folded() -> nn.Module` is replaced by what it returns: the same function in eval mode, for
   the same arguments. It is called after the module's children have been folded.

What is left then gets its fast form (`layers.fast`), unless the plain one is asked for.
"""

from __future__ import annotations

import copy
from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ._errors import SegzooError
from .layers.fast import accelerate, slow_down
from .layers.norm_folding import fold_norm_after, fold_norm_before

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Foldable(Protocol):
    """A module that knows its own form for inference."""

    def folded(self) -> nn.Module: ...


def fold(model: M, *, fast: bool = True) -> M:
    """A copy of `model` for inference that computes the same scores, faster; the model itself is unchanged.

    The copy keeps `forward`, `cfg`, `set_inference_reduction` and everything else that prediction needs. It cannot be
    trained (its parameters are frozen and its norms are gone), and its state dict fits no model of the zoo: save the
    model, not the copy.

    >>> import segzoo, torch
    >>> model, image = segzoo.create_model("test_segformer").eval(), torch.rand(1, 3, 64, 64)
    >>> torch.allclose(segzoo.fold(model)(image), model(image), atol=1e-5)
    True

    Args:
        model: any module in eval mode; a folded one may be folded again.
        fast: let layers use the operators that are fastest on CPUs (`segzoo.layers.fast`); equal up to rounding. False
            is the plain form, of torch's public operators alone, from which exporters and tracers should start.

    Raises:
        SegzooError: some part of the model is in training mode, where BatchNorm and dropout are other functions.
    """
    training = next((name or type(model).__name__ for name, part in model.named_modules() if part.training), None)
    if training is not None:
        raise SegzooError(f"fold() is for inference, but {training} is in training mode; call model.eval() first")
    folded = _fold(slow_down(copy.deepcopy(model))).eval().requires_grad_(False)
    if fast:
        folded = accelerate(folded).eval()
    # The zoo's maps are channels-last; weights that are, too, need no reordering in every call.
    return cast(M, folded.to(memory_format=torch.channels_last))


def _fold(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        setattr(module, name, _fold(child))
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        _fold_sequence(module)
    return module.folded() if isinstance(module, Foldable) else module


def _fold_sequence(sequence: nn.Sequential) -> None:
    previous = None  # name of the last module that does something
    for name, module in list(sequence.named_children()):
        if isinstance(module, (nn.Identity, _DropoutNd)):
            continue
        if previous is not None:
            before = getattr(sequence, previous)
            if (layer := fold_norm_after(before, module)) is not None:
                setattr(sequence, previous, layer)
                setattr(sequence, name, nn.Identity())
                continue
            if (layer := fold_norm_before(before, module)) is not None:
                setattr(sequence, previous, nn.Identity())
                setattr(sequence, name, layer)
        previous = name
