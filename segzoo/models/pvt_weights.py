"""PVT v2's weights: timm's names of its parameters, and its Hub repositories."""

from __future__ import annotations

from .keys import Layout, Rename
from .rows import IMAGENET, PretrainedCfg, scores

# timm has the first patch embedding beside the stages and the others in them.
TIMM_RULES = (
    Rename(r"^patch_embed\.", "stages.0.patch_embed."),
    Rename(r"^stages\.(\d)\.downsample\.", r"stages.\1.patch_embed."),
    Rename(r"\.attn\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attn\.norm\.", ".attn.kv_downsample.norm."),
)

LAYOUTS = (Layout("timm", r"^patch_embed\.proj\.", TIMM_RULES),)


def _imagenet(size: str, revision: str | None, top1: float) -> dict[str, PretrainedCfg]:
    row = PretrainedCfg(
        state="hub",
        hf_hub_id=f"timm/pvt_v2_{size}.in1k",
        hf_revision=revision,
        **IMAGENET,
        num_classes=1000,
        published=scores(
            {"base": top1},
            metric="top1",
            protocol="224x224",
            source="arXiv 2106.13797",
            confirmed_by="README of github.com/whai362/PVT",
        ),
        license="apache-2.0",
        license_url=f"https://huggingface.co/timm/pvt_v2_{size}.in1k",
        commercial_use=True,
        origin="https://github.com/whai362/PVT (arXiv 2106.13797)",
    )
    return {"imagenet": row}


PRETRAINED = {
    "pvt_v2_b0": _imagenet("b0", "49dc8313e71a48d663725f72de23fcffffd09485", 70.5),
    "pvt_v2_b1": _imagenet("b1", "13157087b0d5eb03c71042dc512737e9d42bc741", 78.7),
    "pvt_v2_b2": _imagenet("b2", None, 82.0),  # follows "main": of the commit only the first digits are known, 250d713
}
