"""MiT's weights: the names that its parameters have elsewhere, and where checkpoints are."""

from __future__ import annotations

from .keys import Concat, Layout, Prefixed, Rename, Split, Squeeze
from .rows import IMAGENET, PretrainedCfg, scores

# NVIDIA's own names, which smp keeps.
ORIGINAL_RULES = (
    Rename(r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.patch_embed."),
    Rename(r"^block(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    Rename(r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    Rename(r"\.attn\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attn\.norm\.", ".attn.kv_downsample.norm."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)

# What transformers keeps on the Hub, below the prefix "segformer.encoder.".
HUB_RULES = (
    Rename(r"^patch_embeddings\.(\d)\.", r"stages.\1.patch_embed."),
    Rename(r"^block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    Rename(r"^layer_norm\.(\d)\.", r"stages.\1.norm."),
    Rename(r"\.patch_embed\.layer_norm\.", ".patch_embed.norm."),
    Rename(r"\.layer_norm_([12])\.", r".norm\1."),
    Rename(r"\.attention\.self\.query\.", ".attn.q."),
    Concat((r"\.attention\.self\.key\.", r"\.attention\.self\.value\."), ".attn.kv."),
    Rename(r"\.attention\.self\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attention\.self\.layer_norm\.", ".attn.kv_downsample.norm."),
    Rename(r"\.attention\.output\.dense\.", ".attn.proj."),
    Rename(r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)

# What transformers >= 5 keeps in memory, below the prefix "segformer.".
TRANSFORMERS_5_RULES = (
    Rename(r"\.patch_embeddings\.layer_norm\.", ".patch_embed.norm."),
    Rename(r"\.patch_embeddings\.", ".patch_embed."),
    Rename(r"\.layernorm_before\.", ".norm1."),
    Rename(r"\.layernorm_after\.", ".norm2."),
    Rename(r"\.attention\.q_proj\.", ".attn.q."),
    Concat((r"\.attention\.k_proj\.", r"\.attention\.v_proj\."), ".attn.kv."),
    Rename(r"\.attention\.sequence_reduction\.sequence_reduction\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attention\.sequence_reduction\.layer_norm\.", ".attn.kv_downsample.norm."),
    Rename(r"\.attention\.o_proj\.", ".attn.proj."),
    Rename(r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    Rename(r"^stages\.(\d)\.layer_norm\.", r"stages.\1.norm."),
)

# Segformer++ and the mmsegmentation that it is built on.
SEGFORMERPP_RULES = (
    Rename(r"^layers\.(\d)\.0\.projection\.", r"stages.\1.patch_embed.proj."),
    Rename(r"^layers\.(\d)\.0\.norm\.", r"stages.\1.patch_embed.norm."),
    Rename(r"^layers\.(\d)\.1\.(\d+)\.", r"stages.\1.blocks.\2."),
    Rename(r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
    Split(r"\.attn\.attn\.in_proj_(weight|bias)$", ((r".attn.q.\1", 1), (r".attn.kv.\1", 2))),
    Rename(r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    Rename(r"\.attn\.sr\.", ".attn.kv_downsample.conv."),
    Rename(r"\.attn\.norm\.", ".attn.kv_downsample.norm."),
    Squeeze(r"\.ffn\.layers\.[04]\.weight$"),
    Rename(r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    Rename(r"\.ffn\.layers\.1\.", ".mlp.dwconv."),
    Rename(r"\.ffn\.layers\.4\.", ".mlp.fc2."),
)

_HEAD_RULE = Rename(r"^classifier\.", "head.")  # transformers' name of the ImageNet head

LAYOUTS = (
    Layout("original", r"^block1\.0\.attn\.q\.", ORIGINAL_RULES),
    Layout("hub", r"^segformer\.encoder\.", (Prefixed("segformer.encoder.", "", HUB_RULES), _HEAD_RULE)),
    Layout("transformers 5", r"^segformer\.stages\.", (Prefixed("segformer.", "", TRANSFORMERS_5_RULES), _HEAD_RULE)),
    Layout("segformer++", r"^layers\.0\.0\.projection\.", SEGFORMERPP_RULES),
)

# Of MiT's weights, and of everything trained from them.
NVIDIA_TERMS = {
    "license": "nvidia-source-code-license",
    "license_url": "https://github.com/NVlabs/SegFormer/blob/master/LICENSE",
    "commercial_use": False,
    "origin": "https://github.com/NVlabs/SegFormer (arXiv 2105.15203)",
}


def _imagenet(size: str, revision: str, top1: float) -> dict[str, PretrainedCfg]:
    row = PretrainedCfg(
        state="hub",
        hf_hub_id=f"smp-hub/mit_{size}.imagenet",
        hf_revision=revision,
        **IMAGENET,
        num_classes=1000,
        published=scores(
            {"base": top1},
            metric="top1",
            protocol="224x224",
            source="arXiv 2105.15203",
            confirmed_by="the documentation of transformers",
        ),
        **NVIDIA_TERMS,
    )
    return {"imagenet": row}


PRETRAINED = {
    "mit_b0": _imagenet("b0", "9ce53d104d92d75aabb00aae70677aaab67e7c84", 70.5),
    "mit_b1": _imagenet("b1", "a04bf4f13a549bce677cf79b04852e7510782817", 78.7),
    "mit_b2": _imagenet("b2", "868ab6f13871dcf8c3d9f90ee4519403475b65ef", 81.6),
    "mit_b3": _imagenet("b3", "32558d12a65f1daa0ebcf4f4053c4285e2c1cbda", 83.1),
    "mit_b4": _imagenet("b4", "3a3454e900a4b4f11dd60eeb59101a9a1a36b017", 83.6),
    "mit_b5": _imagenet("b5", "ced04d96c586b6297fd59a7a1e244fc78fdb6531", 83.8),
}
