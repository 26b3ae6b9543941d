"""Hand a SegFormer or MiT to transformers: the tensor names that it keeps on the Hub, its config, and a folder.

The other way round needs nothing: `segzoo.load_weights` and `checkpoint_path=` read transformers' names.

transformers uses LayerNorm eps 1e-5 everywhere, SegFormer's released code mostly 1e-6, so that its scores differ from
segzoo's by about 1e-5 of their size. It knows no reduction: what it computes is the model without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .._errors import SegzooError
from ..labels import generic_labels
from ..layers.conv import FuseLevels
from ..models.keys import Prefixed, Rename, Split, apply_rules
from ..models.mit import MiT, MiTConfig
from ..models.rows import label_set
from ..models.segformer import AllMLPDecoder, SegFormer

_ENCODER_RULES = (
    Rename(r"^stages\.(\d)\.patch_embed\.proj\.", r"patch_embeddings.\1.proj."),
    Rename(r"^stages\.(\d)\.patch_embed\.norm\.", r"patch_embeddings.\1.layer_norm."),
    Rename(r"^stages\.(\d)\.blocks\.(\d+)\.", r"block.\1.\2."),
    Rename(r"^stages\.(\d)\.norm\.", r"layer_norm.\1."),
    Rename(r"\.norm([12])\.", r".layer_norm_\1."),
    Rename(r"\.attn\.q\.", ".attention.self.query."),
    Split(r"\.attn\.kv\.", ((".attention.self.key.", 1), (".attention.self.value.", 1))),
    Rename(r"\.attn\.kv_downsample\.conv\.", ".attention.self.sr."),
    Rename(r"\.attn\.kv_downsample\.norm\.", ".attention.self.layer_norm."),
    Rename(r"\.attn\.proj\.", ".attention.output.dense."),
    Rename(r"\.mlp\.fc([12])\.", r".mlp.dense\1."),
    Rename(r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
)
_SEGFORMER_RULES = (
    Prefixed("encoder.", "segformer.encoder.", _ENCODER_RULES),
    Rename(r"^decoder\.projections\.(\d)\.", r"decode_head.linear_c.\1.proj."),
    Rename(r"^decoder\.fuse\.conv\.", "decode_head.linear_fuse."),
    Rename(r"^decoder\.fuse\.bn\.", "decode_head.batch_norm."),
    Rename(r"^decoder\.classifier\.", "decode_head.classifier."),
)
_MIT_RULES = (
    Rename(r"^stages\.", "encoder.stages."),
    Prefixed("encoder.", "segformer.encoder.", _ENCODER_RULES),
    Rename(r"^head\.", "classifier."),
)


def to_transformers_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a SegFormer or MiT in the names that transformers keeps on the Hub.

    Raises:
        SegzooError: any other model, Segformer++'s decoder or a folded model, which transformers cannot hold.
    """
    model = _checked(model)
    rules = _SEGFORMER_RULES if isinstance(model, SegFormer) else _MIT_RULES
    return {name: tensor.contiguous() for name, tensor in apply_rules(model.state_dict(), rules).items()}


def to_transformers_config(model: nn.Module) -> dict[str, Any]:
    """What transformers' `SegformerConfig` needs to build the same model; class names are those of the weights row."""
    model = _checked(model)
    cfg = model.cfg
    encoder: MiTConfig = cfg.encoder if isinstance(model, SegFormer) else cfg
    names = (label_set(model.pretrained_cfg, model.num_classes) or generic_labels(model.num_classes)).classes
    config = {
        "model_type": "segformer",
        "architectures": ["SegformerForImageClassification"],
        "num_channels": model.in_chans,
        "num_encoder_blocks": len(encoder.depths),
        "depths": list(encoder.depths),
        "sr_ratios": list(encoder.kv_stride),
        "hidden_sizes": list(encoder.embed_dims),
        "patch_sizes": [7] + [3] * (len(encoder.depths) - 1),
        "strides": [4] + [2] * (len(encoder.depths) - 1),
        "num_attention_heads": list(encoder.num_heads),
        "mlp_ratios": [encoder.mlp_ratio] * len(encoder.depths),
        "hidden_act": "gelu",
        "drop_path_rate": encoder.drop_path_rate,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if isinstance(model, SegFormer):
        config["architectures"] = ["SegformerForSemanticSegmentation"]
        config["decoder_hidden_size"] = cfg.decoder_dim
        config["classifier_dropout_prob"] = cfg.dropout
    return config


def save_for_transformers(model: nn.Module, directory: str | Path) -> Path:
    """Write `config.json` and `model.safetensors`, which transformers' `from_pretrained(directory)` loads."""
    config, state = to_transformers_config(model), to_transformers_state_dict(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _checked(model: nn.Module) -> SegFormer | MiT:
    if isinstance(model, SegFormer) and isinstance(model.encoder, MiT) and isinstance(model.decoder, AllMLPDecoder):
        if isinstance(model.decoder.fuse, FuseLevels) and model.score_kind == "logits":  # not folded, no heatmaps
            return model
    if isinstance(model, MiT) and model.num_classes > 0:
        return model
    name = getattr(model, "name", "") or type(model).__name__
    raise SegzooError(
        f"transformers cannot hold {name}: it needs a SegFormer with decoder='segformer', or a MiT with its ImageNet "
        "head, neither of them folded nor a keypoint model"
    )
