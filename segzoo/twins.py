"""A model's twin: the same tensors under module objects of its own, so that running one never touches the other.

A forward pass reads, beside tensors, what module objects carry: the mode (`training`) and the entries of the reduction
leaves. A twin has its own, so that any number of threads may run twins of one model, whatever mode or plan the model is
given meanwhile.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ._errors import SegzooError
from .plans import plan_lock

M = TypeVar("M", bound=nn.Module)

# What every module carries and a twin holds in dicts of its own: tensors, children, and the hooks of its forward, so
# that none comes to a twin at work or leaves it.
_OWN_DICTS = (
    *("_parameters", "_buffers", "_modules"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_COMMON = frozenset(nn.Module().__dict__)
_PLAIN = frozenset((int, float, bool, str, type(None)))  # attributes that hold no module


def eval_twin(model: M) -> M:
    """A twin of `model` in eval mode, with the reduction that is in force now.

    Parameters and buffers are the model's own tensors; a new tensor assigned to the one is not seen by the other. Hooks
    are those of the model and get the twin's modules. Modules that a module keeps outside its children (a bound method,
    a partial, a list) are replaced by their twins.

    Raises:
        SegzooError: a part that can only run as the model itself: one compiled by `torch.compile` while the model is
            in training mode, or a TorchScript module.
    """
    with plan_lock:  # one plan, not the half of an old and the half of a new one
        originals = list(model.modules())
        twins = {id(module): _bare_twin(module) for module in originals}
    compiled = None
    for twin in twins.values():
        state = twin.__dict__
        state["_modules"] = {name: twins.get(id(child)) for name, child in state["_modules"].items()}
        if getattr(twin, "_compiled_call_impl", None) is not None:
            compiled = type(twin).__name__
        for key in state.keys() - _COMMON:
            value = state[key]
            if type(value) in _PLAIN:
                continue
            if hasattr(value, "_torchdynamo_orig_callable"):
                compiled = f"{type(twin).__name__}.{key}"
            else:
                state[key] = _rebound(value, twins)
    if compiled is not None and any(module.training for module in originals):
        raise SegzooError(
            f"{compiled} is compiled, which binds it to the model, and the model is in training mode; "
            "call model.eval() first"
        )
    return cast(M, twins[id(model)])


def _bare_twin(module: M) -> M:
    """The module alone, in eval mode; its children are still the original's."""
    if isinstance(module, torch.jit.ScriptModule):
        raise SegzooError(f"{type(module).__name__} is a TorchScript module and cannot be run by predict")
    twin = module.__class__.__new__(module.__class__)
    state = module.__dict__.copy()
    for name in _OWN_DICTS:
        state[name] = state[name].copy()
    state["training"] = False
    twin.__dict__ = state
    return twin


def _rebound(value: Any, twins: Mapping[int, nn.Module]) -> Any:
    """A value with modules of the model replaced by their twins."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if type(value) is functools.partial:
        return functools.partial(
            _rebound(value.func, twins), *_rebound(value.args, twins), **_rebound(value.keywords, twins)
        )
    if type(value) is list:
        return [_rebound(item, twins) for item in value]
    if type(value) is tuple:
        return tuple(_rebound(item, twins) for item in value)
    if type(value) is dict:
        return {key: _rebound(item, twins) for key, item in value.items()}
    return value
