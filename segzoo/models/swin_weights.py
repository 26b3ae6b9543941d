"""Swin's key rules: the names of timm's parameters and of the original files. It has no weights rows yet."""

from __future__ import annotations

from collections.abc import Mapping

from .keys import Drop, Layout, Rename, Split, StateDict
from .rows import PretrainedCfg


def _downsample_first(state: StateDict) -> StateDict:
    """Original Swin files merge patches at the end of a stage, timm at the start of the next one."""
    if "layers.0.downsample.reduction.weight" not in state:
        return state
    return Rename(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.")(state)


SWIN_RULES = (
    Drop(r"\.(relative_position_index|attn_mask)$", "buffers that older timm versions stored"),
    Drop(r"^norm\.", "the final norm: features are taken without it"),
    Drop(r"^head\.", "timm's classifier sits on the final norm"),
    _downsample_first,
    Rename(r"^patch_embed\.", "stages.0.patch_embed."),
    Rename(r"^layers\.(\d+)\.downsample\.reduction\.", r"stages.\1.patch_embed.proj."),
    Rename(r"^layers\.(\d+)\.downsample\.", r"stages.\1.patch_embed."),
    Rename(r"^layers\.", "stages."),
    Rename(r"\.relative_position_bias_table$", ".position_bias"),
    Split(r"\.attn\.qkv\.", ((".attn.q.", 1), (".attn.kv.", 2))),
)

LAYOUTS = (Layout("timm", r"^layers\.0\.blocks\.", SWIN_RULES),)

PRETRAINED: Mapping[str, Mapping[str, PretrainedCfg]] = {}
