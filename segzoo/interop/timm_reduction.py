"""Fewer keys and values in models that segzoo did not write: timm's PVT v2, MViT v2, Swin, DaViT and ViT, transformers'
SegFormer, and every attention for which an adapter is registered (EDAFormer's Table 7 does this to other encoders).

`reduce(model, plan)` gives each attention a leaf as a child, which has no parameters and no key in the state dict, and
then nothing is different from a model of segzoo: `reduction_sites`, `inference_reduction`, plans in JSON and `cost`
find the leaves. `reduce(model, None)` takes everything away again. How a leaf gets between keys and queries:

- By hooks, where a submodule makes the keys' map or takes their tokens: PVT v2 and transformers' SegFormer after the
  strided convolution, or before keys and values are projected where there is none; MViT v2 after `pool_k` and `pool_v`,
  with the position bias that timm computes for a map of that size.
- By a forward of our own over the attention's submodules, where one packed projection is reshaped at a single length:
  ViT, Swin and the spatial blocks of DaViT. Keys and values are projected and then merged, which saves the products of
  the attention and no projections. Prefix tokens of a ViT stay as they are. Swin's position bias is averaged over each
  cell of a window, and a cell is masked only where all of it is.

A neutral leaf leaves the module's own forward to run. What an adapter does not know of a class, it refuses by name.

Shape letters: B batch, C channels, H, W map or window, V windows, N query tokens, M key and value tokens, L heads.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.attention import attend
from ..layers.reduction import GridEntry, KeyValueReduction, OverlapPool, Pool, Reduction, Window, WindowReduction
from ..layers.reduction import reduce_map as reduce_map_by
from ..layers.shapes import to_channels_first, to_channels_last
from ..plans import Plan, plan_lock, reduction_sites, resolve_plan, set_inference_reduction

CHILD = "segzoo_reduction"  # name of the leaf in its attention
LINK = "segzoo_leaf"  # where a hooked submodule finds the leaf: a plain attribute, no child
GRID = "segzoo_grid"  # where a ViT's patch embedding keeps the grid of the image that it embedded last


def reduce(model: nn.Module, plan: object, *, during_training: bool = False) -> Plan:
    """Choose how many keys and values the attention of any supported model sees, in place.

    >>> import timm, segzoo
    >>> vit = timm.create_model("test_vit", img_size=64)
    >>> segzoo.reduce(vit, {"encoder": 2})
    {encoder.0: Pool(2, avg), encoder.1: Pool(2, avg), encoder.2: Pool(2, avg)}
    >>> segzoo.reduce(vit, None).is_neutral  # as it was, to the bit
    True

    Reduce first and compile then: a compiled model does not see hooks that it gets later. Plans that follow, while one
    is in force, it does see.

    Args:
        model: of timm or transformers, or anything that contains one, such as an smp model on timm's encoder; or a
            model of segzoo, for which this is `set_inference_reduction`.
        plan: as for `set_inference_reduction`. Sites are stages, "encoder.0" the finest, and thirds of a ViT's depth.
            None, and every plan that reduces nothing, takes away what was added to the model.
        during_training: also reduce in training mode.

    Returns:
        The plan in force, one entry a site.

    Raises:
        SegzooError: no attention that is known, one with parts that its adapter does not know, or a wrong plan. The
            model is as it was.
    """
    found = list(_attentions(model))
    if not found and not reduction_sites(model):
        raise SegzooError(_nothing_found(model))
    leaves = {name: _leaf(model, name, attention, adapter) for name, attention, adapter in found}
    resolved = _resolve(model, plan, leaves)
    with plan_lock:
        for name, attention, adapter in found:
            if resolved.is_neutral:
                _detach(attention)
            elif CHILD not in attention._modules:
                attention.add_module(CHILD, leaves[name].train(attention.training))
                adapter.attach(attention, leaves[name])
    if reduction_sites(model):
        set_inference_reduction(model, resolved, during_training=during_training)
    return resolved


def register_adapter(
    attention: type[nn.Module],
    forward: Callable[..., Any],
    *,
    leaf: type[KeyValueReduction | WindowReduction] = KeyValueReduction,
    level: Callable[[str], int] | None = None,
) -> None:
    """Let `reduce` know an attention of yours.

    Args:
        attention: its class; subclasses need an adapter of their own.
        forward: (module, leaf, *arguments of its forward) -> what its forward returns, called instead of it while a
            reduction is in force. A `KeyValueReduction` takes a map (B, H, W, C) of what keys and values are made from
            to tokens (B, M, C); a `WindowReduction` does so for windows, and has `bias` for what is added to scores.
            Give a function of a module, so that models can be pickled.
        leaf: which of the two.
        level: the module's name in the model -> its level, from 0; default: the number after "stages.", "layers." or
            "block." in the name, else 0.
    """
    adapter = Adapter(attach=functools.partial(_override, forward), leaf=_plain_leaf(leaf))
    ADAPTERS[attention] = adapter if level is None else dataclasses.replace(adapter, level=lambda _, name: level(name))


# --- leaves -----------------------------------------------------------------------------------------------------------


class SequenceReduction(KeyValueReduction):
    """For tokens (B, N, C) whose grid the attention is told in each call: a hook notes it here."""

    grid: tuple[int, int] = (0, 0)

    def tokens(self, x_BNC: Tensor) -> Tensor:
        return self(x_BNC.unflatten(1, self.grid))


class MapReduction(KeyValueReduction):
    """For maps of keys and maps of values, each pooled by itself: no entry that compares tokens."""

    takes = (Pool, OverlapPool, Window)

    def map(self, map_BCHW: Tensor) -> Tensor:
        entry = self.in_force
        assert isinstance(entry, GridEntry)  # `check` lets nothing else in
        return to_channels_first(reduce_map_by(entry, to_channels_last(map_BCHW)))


class PatchReduction(KeyValueReduction):
    """For the tokens of a ViT, which are prefix tokens and then a grid of patches.

    Args:
        vit: has `num_prefix_tokens` and `patch_embed.grid_size`, which change with its `set_input_size`; one with
            `dynamic_img_size` takes any image, and a hook notes the grid of each.
    """

    def __init__(self, *, part: str, level: int, vit: nn.Module):
        super().__init__(part=part, level=level)
        self.__dict__["vit"] = vit  # a plain attribute: the model is no child of its part

    def tokens(self, x_BNC: Tensor) -> Tensor:
        """(B, prefix + H * W, C) -> (B, prefix + M, C)."""
        vit: Any = self.__dict__["vit"]
        prefix = vit.num_prefix_tokens
        H, W = vit.patch_embed.__dict__.get(GRID) or vit.patch_embed.grid_size
        if x_BNC.shape[1] != prefix + H * W:
            raise SegzooError(
                f"{type(vit).__name__} has {x_BNC.shape[1] - prefix} patch tokens where its patch_embed says {H}x{W}; "
                "model.set_input_size((H, W)) with the image's size in pixels tells it"
            )
        return torch.cat((x_BNC[:, :prefix], self(x_BNC[:, prefix:].unflatten(1, (H, W)))), dim=1)


class ShorterSequence(nn.Module):
    """In the place where transformers' SegFormer has a strided convolution in other stages: (B, N, C) -> (B, M, C)."""

    def __init__(self, leaf: Reduction):
        super().__init__()
        self.__dict__[LINK] = leaf

    def forward(self, x_BNC: Tensor, height: int, width: int) -> Tensor:
        leaf = self.__dict__[LINK]
        return x_BNC if _is_neutral(leaf) else leaf(x_BNC.unflatten(1, (height, width)))


def _is_neutral(leaf: Reduction) -> bool:
    entry = leaf.in_force
    return isinstance(entry, Pool) and entry.factor == 1


# --- hooks ------------------------------------------------------------------------------------------------------------


def _reduce_sequence_map(module: nn.Module, args: Any, map_BCHW: Tensor) -> Tensor | None:
    """The output of a convolution that somebody flattens next: (B, C, H, W) -> (B, C, M, 1)."""
    leaf = module.__dict__[LINK]
    return None if _is_neutral(leaf) else leaf(to_channels_last(map_BCHW)).transpose(1, 2)[..., None]


def _reduce_map(module: nn.Module, args: Any, map_BCHW: Tensor) -> Tensor | None:
    leaf = module.__dict__[LINK]
    return None if _is_neutral(leaf) else leaf.map(map_BCHW)


def _reduce_tokens(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    leaf = module.__dict__[LINK]
    return None if _is_neutral(leaf) else (leaf.tokens(args[0]), *args[1:])


def _note_feat_size(attention: nn.Module, args: Any, kwargs: Any) -> None:
    H, W = kwargs["feat_size"] if "feat_size" in kwargs else args[1]
    _leaf_of(attention).grid = (H, W)


def _note_height_and_width(attention: nn.Module, args: Any, kwargs: Any) -> None:
    height, width = (kwargs[name] if name in kwargs else args[i] for i, name in ((1, "height"), (2, "width")))
    _leaf_of(attention).grid = (height, width)


def _note_patches(patch_embed: nn.Module, args: Any, patches_BHWC: Tensor) -> None:
    H, W = patches_BHWC.shape[1:3]
    setattr(patch_embed, GRID, (H, W))


_NOTES = (_note_feat_size, _note_height_and_width, _note_patches)
_HOOKS = (_reduce_sequence_map, _reduce_map, _reduce_tokens, *_NOTES)


def _hook_output(module: nn.Module, leaf: Reduction, hook: Callable[..., Any]) -> None:
    module.__dict__[LINK] = leaf
    module.register_forward_hook(hook)


def _hook_tokens(attention: nn.Module, leaf: Reduction, note_grid: Callable[..., Any], *projections: str) -> None:
    attention.register_forward_pre_hook(note_grid, with_kwargs=True)
    for name in projections:
        projection = attention.get_submodule(name)
        projection.__dict__[LINK] = leaf
        projection.register_forward_pre_hook(_reduce_tokens)


def _attach_pvt(attention: Any, leaf: Reduction) -> None:
    if attention.sr is not None:
        _hook_output(attention.sr, leaf, _reduce_sequence_map)
    else:
        _hook_tokens(attention, leaf, _note_feat_size, "kv")


def _attach_mvit(attention: Any, leaf: Reduction) -> None:
    _hook_output(attention.pool_k, leaf, _reduce_map)
    _hook_output(attention.pool_v, leaf, _reduce_map)


def _attach_vit(attention: Any, leaf: Reduction) -> None:
    _override(_vit_attention, attention, leaf)
    vit: Any = leaf.__dict__["vit"]
    if vit.dynamic_img_size and _note_patches not in vit.patch_embed._forward_hooks.values():
        vit.patch_embed.register_forward_hook(_note_patches)


def _attach_segformer(attention: Any, leaf: Reduction) -> None:
    if attention.sequence_reduction_ratio > 1:
        _hook_output(attention.sequence_reduction.sequence_reduction, leaf, _reduce_sequence_map)
    else:  # the projections' outputs are shaped by their input, so that no hook on them could shorten it
        attention.sequence_reduction_ratio = 2
        attention.sequence_reduction = ShorterSequence(leaf)


def _attach_segformer_4(attention: Any, leaf: Reduction) -> None:
    if attention.sr_ratio > 1:
        _hook_output(attention.sr, leaf, _reduce_sequence_map)
    else:
        _hook_tokens(attention, leaf, _note_height_and_width, "key", "value")


# --- forwards of our own ----------------------------------------------------------------------------------------------


def _override(forward: Callable[..., Any], attention: nn.Module, leaf: Reduction) -> None:
    # A partial, since it survives deepcopy and pickle as a bound method of our own would not.
    attention.__dict__["forward"] = functools.partial(_run, forward, attention)


def _run(forward: Callable[..., Any], attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    leaf = _leaf_of(attention)
    if _is_neutral(leaf):
        return type(attention).forward(attention, *args, **kwargs)
    return forward(attention, leaf, *args, **kwargs)


def _dropout(attention: Any) -> float:
    return attention.attn_drop.p if attention.training else 0.0


def _vit_attention(
    attention: Any, leaf: PatchReduction, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    if attn_mask is not None or is_causal:
        raise SegzooError("a ViT's attention with a mask cannot be reduced; segzoo.reduce(model, None) restores it")
    q_BNLD, k_BNLD, v_BNLD = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    q_BNC, k_BNC = attention.q_norm(q_BNLD).flatten(2), attention.k_norm(k_BNLD).flatten(2)
    k_BMC, v_BMC = leaf.tokens(torch.cat((k_BNC, v_BNLD.flatten(2)), dim=-1)).chunk(2, dim=-1)
    out_BNC = attend(
        q_BNC, k_BMC, v_BMC, num_heads=attention.num_heads, scale=attention.scale, dropout=_dropout(attention)
    )
    out_BNC = attention.norm(out_BNC)
    gate = getattr(attention, "gate", None)  # since timm 1.0.25 or so
    if gate is not None:
        out_BNC = out_BNC * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out_BNC))


def _swin_attention(attention: Any, leaf: WindowReduction, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(V, N, C) windows and a (G, N, N) mask of the windows of an image, or None."""
    window = tuple(attention.window_size)
    q_VNC, k_VNC, v_VNC = attention.qkv(x).chunk(3, dim=-1)
    k_VMC, v_VMC = leaf(torch.cat((k_VNC, v_VNC), dim=-1).unflatten(1, window)).chunk(2, dim=-1)
    bias_NNL = attention.relative_position_bias_table[attention.relative_position_index]
    bias_LNHW = bias_NNL.permute(2, 0, 1).unflatten(2, window)
    mask_GNHW = None if mask is None else mask.unflatten(2, window)
    bias = leaf.bias(bias_LNHW, mask_GNHW, windows=len(x)).to(q_VNC.dtype)
    out_VNC = attend(
        q_VNC,
        k_VMC,
        v_VMC,
        num_heads=attention.num_heads,
        scale=attention.scale,
        dropout=_dropout(attention),
        bias=bias,
    )
    return attention.proj_drop(attention.proj(out_VNC))


def _davit_attention(attention: Any, leaf: WindowReduction, x: Tensor) -> Tensor:
    """(V, N, C) windows."""
    q_VNC, k_VNC, v_VNC = attention.qkv(x).chunk(3, dim=-1)
    kv_VHWC = torch.cat((k_VNC, v_VNC), dim=-1).unflatten(1, tuple(attention.window_size))
    k_VMC, v_VMC = leaf(kv_VHWC).chunk(2, dim=-1)
    return attention.proj(attend(q_VNC, k_VMC, v_VMC, num_heads=attention.num_heads, scale=attention.scale))


# --- adapters ---------------------------------------------------------------------------------------------------------


def _stage_of(model: nn.Module, name: str) -> int:
    """The stage in a module's name; timm's lists of features write "stages_2" for "stages.2"."""
    match = re.search(r"(?:^|\.)(?:stages|layers|block)[._](\d+)(?:\.|$)", name)
    return int(match[1]) if match else 0


def _third_of(model: nn.Module, name: str) -> int:
    depth = len(_vit_of(model, name).blocks)
    return 3 * int(name.rpartition("blocks.")[2].partition(".")[0]) // depth


def _vit_of(model: nn.Module, name: str) -> Any:
    """The vision transformer around an attention, which knows the grid of the tokens."""
    vit: Any = model.get_submodule(name.rpartition("blocks.")[0].rstrip("."))
    if not any(_path(kind) == _VIT for kind in type(vit).__mro__):
        raise SegzooError(f"{name} is an attention of timm's ViT in {type(vit).__name__}, whose grid is not known")
    return vit


def _plain_leaf(kind: type[KeyValueReduction | WindowReduction]) -> Callable[[nn.Module, str, int], Reduction]:
    return lambda model, name, level: kind(part="encoder", level=level)


def _patch_leaf(model: nn.Module, name: str, level: int) -> Reduction:
    return PatchReduction(part="encoder", level=level, vit=_vit_of(model, name))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How one class of attention takes part. `needs` are attributes that it must have; of an attention whose forward is
    replaced, `parts` are all children that it may have, so that a version with new ones is refused."""

    attach: Callable[[nn.Module, Reduction], None]
    leaf: Callable[[nn.Module, str, int], Reduction]  # (model, name of the attention, level) -> a new leaf
    level: Callable[[nn.Module, str], int] = _stage_of
    needs: tuple[str, ...] = ()
    parts: tuple[str, ...] | None = None


_VIT = "timm.models.vision_transformer.VisionTransformer"
_VIT_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
_SWIN_PARTS = ("qkv", "attn_drop", "proj", "proj_drop")

# Classes, and of libraries that need not be installed their names.
ADAPTERS: dict[type[nn.Module] | str, Adapter] = {
    "timm.models.pvt_v2.Attention": Adapter(
        attach=_attach_pvt, leaf=_plain_leaf(SequenceReduction), needs=("sr", "kv", "norm")
    ),
    "timm.models.mvitv2.MultiScaleAttention": Adapter(
        attach=_attach_mvit, leaf=_plain_leaf(MapReduction), needs=("pool_k", "pool_v")
    ),
    "timm.models.swin_transformer.WindowAttention": Adapter(
        attach=functools.partial(_override, _swin_attention),
        leaf=_plain_leaf(WindowReduction),
        needs=(
            *("num_heads", "window_size", "scale", "relative_position_bias_table", "relative_position_index"),
            *_SWIN_PARTS,
        ),
        parts=(*_SWIN_PARTS, "softmax"),
    ),
    "timm.models.davit.WindowAttention": Adapter(
        attach=functools.partial(_override, _davit_attention),
        leaf=_plain_leaf(WindowReduction),
        needs=("num_heads", "window_size", "scale", "qkv", "proj"),
        parts=("qkv", "proj", "softmax"),
    ),
    "timm.layers.attention.Attention": Adapter(
        attach=_attach_vit,
        leaf=_patch_leaf,
        level=_third_of,
        needs=("num_heads", "scale", *_VIT_PARTS),
        parts=(*_VIT_PARTS, "gate"),
    ),
    "transformers.models.segformer.modeling_segformer.SegformerAttention": Adapter(
        attach=_attach_segformer,
        leaf=_plain_leaf(SequenceReduction),
        needs=("sequence_reduction_ratio", "k_proj", "v_proj"),
    ),
    "transformers.models.segformer.modeling_segformer.SegformerEfficientSelfAttention": Adapter(
        attach=_attach_segformer_4, leaf=_plain_leaf(SequenceReduction), needs=("sr_ratio", "key", "value")
    ),
}

# Classes without tokens to reduce; beside others they are left alone.
REFUSED: Mapping[str, str] = {
    f"timm.models.davit.{name}": "attends from channel to channel and has no keys and values of tokens"
    for name in ("ChannelAttention", "ChannelAttentionV2")
}


# --- finding, adding and taking away ----------------------------------------------------------------------------------


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _adapter_of(module: nn.Module) -> Adapter | None:
    return ADAPTERS.get(type(module)) or ADAPTERS.get(_path(type(module)))


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Every attention with an adapter, and its name in the model; not what only wraps one, as in transformers 4."""
    for name, module in model.named_modules():
        adapter = _adapter_of(module)
        if adapter is not None and not any(map(_adapter_of, module.children())):
            yield name, module, adapter


def _leaf_of(attention: nn.Module) -> Any:
    return attention._modules[CHILD]


def _leaf(model: nn.Module, name: str, attention: nn.Module, adapter: Adapter) -> Reduction:
    """The leaf that the attention has, or a new one for it.

    Raises:
        SegzooError: the attention is not as its adapter knows it.
    """
    if CHILD in attention._modules:
        return _leaf_of(attention)
    _check_parts(name, attention, adapter)
    return adapter.leaf(model, name, adapter.level(model, name))


def _check_parts(name: str, attention: nn.Module, adapter: Adapter) -> None:
    """SegzooError where the attention is not as its adapter knows it."""
    what = f"{name or 'the model'} ({_path(type(attention))}{_version_of(attention)})"
    missing = [part for part in adapter.needs if not hasattr(attention, part)]
    if missing:
        raise SegzooError(f"{what} has no {', '.join(missing)}, which its reduction needs")
    empty = [part for part in ("pool_k", "pool_v") if part in adapter.needs and getattr(attention, part) is None]
    if empty:
        raise SegzooError(f"{what} has no pooling of keys and values, after which they could be reduced")
    extra = [] if adapter.parts is None else sorted(dict(attention.named_children()).keys() - set(adapter.parts))
    if extra:
        raise SegzooError(f"{what} has parts that its reduction does not know: {', '.join(extra)}")
    if "forward" in attention.__dict__:
        raise SegzooError(f"{what} has a forward that was put in place of its class's; reduce the model before that")


def _version_of(attention: nn.Module) -> str:
    library = sys.modules[type(attention).__module__.partition(".")[0]]
    version = getattr(library, "__version__", None)
    return f" of version {version}" if version else ""


def _resolve(model: nn.Module, plan: object, leaves: Mapping[str, Reduction]) -> Plan:
    """The plan for the sites that the model has or would have with these leaves."""
    sites = reduction_sites(model)
    known = {id(leaf) for group in sites.values() for leaf in group}
    for leaf in leaves.values():
        if id(leaf) not in known:
            sites[leaf.site] = sites.get(leaf.site, ()) + (leaf,)
    try:
        return resolve_plan(plan, sites, getattr(model, "reduction_presets", {}))
    except SegzooError as error:
        alone = _refusals(model)
        raise SegzooError(f"{error}; left alone: {alone}" if alone else str(error)) from None


def _refusals(model: nn.Module) -> str:
    paths = dict.fromkeys(_path(type(module)) for module in model.modules())
    return "; ".join(f"{path} {REFUSED[path]}" for path in paths if path in REFUSED)


def _nothing_found(model: nn.Module) -> str:
    kinds = dict.fromkeys(_path(type(part)) for part in model.modules() if "attention" in type(part).__name__.lower())
    reasons = [f"{kind} {REFUSED.get(kind, 'is not known')}" for kind in kinds]
    return (
        f"{type(model).__name__} has no attention that can be reduced ({'; '.join(reasons) or 'none at all'}); known "
        "are timm's pvt_v2, mvitv2, swin, davit and vit, and transformers' SegFormer; "
        "segzoo.interop.timm_reduction.register_adapter adds one"
    )


def _detach(attention: nn.Module) -> None:
    """Leave the attention as its library made it. Hooks are found by what they are, so that copies can do it, too."""
    leaf = attention._modules.pop(CHILD, None)
    touched = [*attention.modules(), *([leaf.__dict__["vit"].patch_embed] if isinstance(leaf, PatchReduction) else [])]
    override = attention.__dict__.get("forward")
    if isinstance(override, functools.partial) and override.func is _run:
        del attention.__dict__["forward"]
    if isinstance(attention._modules.get("sequence_reduction"), ShorterSequence):
        del attention.sequence_reduction
        attention.__dict__["sequence_reduction_ratio"] = 1
    for module in touched:
        for name in (LINK, GRID):
            module.__dict__.pop(name, None)
        for hooks, with_kwargs in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]
                with_kwargs.pop(key, None)
