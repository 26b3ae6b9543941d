"""The plain ViT's key rules: the names that timm and mmsegmentation give its parameters. It has no weights rows."""

from __future__ import annotations

import dataclasses

from .keys import Drop, Layout, Rename, StateDict


@dataclasses.dataclass(frozen=True)
class DropClassToken:
    """Leave out the class token and its position: they are dropped before block 0 and never reach attention."""

    why: str = "the class token is dropped before block 0 and never reaches attention"

    def __call__(self, state: StateDict) -> StateDict:
        if "cls_token" not in state:
            return state
        state = {key: tensor for key, tensor in state.items() if key != "cls_token"}
        if "pos_embed" in state:
            state["pos_embed"] = state["pos_embed"][:, 1:]
        return state


TIMM_RULES = (
    DropClassToken(),
    Drop(r"^(fc_)?norm\.", "the final norm: features are taken without it"),
    Drop(r"^head\.", "timm's classifier sits on the final norm"),
)

# mmsegmentation's names; the packing of q, k and v is the same.
MMSEG_RULES = (
    DropClassToken(),
    Drop(r"^ln1\.", "the final norm of the pretrained ViT: features are taken without it"),
    Rename(r"^patch_embed\.projection\.", "patch_embed.proj."),
    Rename(r"^layers\.(\d+)\.", r"blocks.\1."),
    Rename(r"\.ln([12])\.", r".norm\1."),
    Rename(r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    Rename(r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    Rename(r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    Rename(r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)

LAYOUTS = (
    Layout("timm", r"^(cls_token$|(fc_)?norm\.)", TIMM_RULES),
    Layout("mmseg", r"^layers\.0\.attn\.attn\.", MMSEG_RULES),
)
