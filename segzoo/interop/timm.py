"""EFT and MiT as models of timm, and so as backbones of whatever builds its encoders with timm.

    import segzoo.interop.timm

registers `eft_t`, `eft_b` and `segzoo_mit_b0` to `segzoo_mit_b5`. After it, in the same process,
`timm.create_model("eft_t", features_only=True)`, `smp.Unet("tu-eft_t")`, transformers' `TimmBackbone` and timm's
training script know them. Importing it again changes nothing, and a name that belongs to somebody else is never
replaced. The parameters have segzoo's names, so that a checkpoint fits both ways.

Shape suffixes as in `segzoo.layers`: B batch, C channels, H, W map, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    register_notrace_function,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .._errors import SegzooError, WeightsError
from ..layers.init import init_weights
from ..models import eft, mit
from ..models.base import BlockSequence, PyramidEncoder, pyramid_groups
from ..models.features import check_images, take_indices
from ..models.keys import Layout
from ..models.rows import PretrainedCfg as WeightsRow
from ..plans import Plan, set_inference_reduction
from ..zoo.checkpoint import to_own_layout
from ..zoo.recipe import create_model

__all__ = ["MODELS", "TimmEncoder"]  # timm adds the names that it registers

# Name in timm -> name in segzoo.
MODELS = {"eft_t": "eft_t", "eft_b": "eft_b", **{f"segzoo_mit_b{i}": f"mit_b{i}" for i in range(6)}}

# Segzoo's weights rows, by its name and tag.
_ROWS = {**eft.PRETRAINED, **mit.PRETRAINED}

# torch.fx takes an attention as one node: its leaves may choose, look at sizes and return a function.
register_notrace_module(eft.EmbeddingFreeAttention)
register_notrace_module(mit.EfficientSelfAttention)
register_notrace_function(check_images)

_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


class TimmEncoder(nn.Module):
    """The stages and the head of a `PyramidEncoder` with the methods that timm expects of a model.

    It differs from segzoo's own contract where timm does: `forward_features` gives the last map alone, and
    `forward_intermediates` the pyramid.

    Args:
        encoder: gives its stages, its head and its description; not to be used by itself any more.
        global_pool: "avg" for the mean of the last map, "" for the map itself, which needs a model without classes.
        drop_rate: dropout before the classifier.

    Shape: (B, in_chans, H, W) -> (B, K) logits; without classes (B, C), or with `global_pool=""` (B, C, H/32, W/32).
    """

    def __init__(self, *, encoder: PyramidEncoder, global_pool: str = "avg", drop_rate: float = 0.0):
        super().__init__()
        self.encoder_class = type(encoder)
        self.in_chans = encoder.in_chans
        self.num_classes = encoder.num_classes
        self.num_features = self.head_hidden_size = encoder.num_features
        self.feature_info = encoder.feature_info
        self.stages = encoder.stages
        self.head_drop = nn.Dropout(drop_rate)
        self.head = encoder.head
        self.global_pool = _check_pool(global_pool, encoder.num_classes)

    @property
    def reduction_presets(self) -> Mapping[str, Mapping[str, Any]]:
        return self.encoder_class.reduction_presets

    @property
    def key_layouts(self) -> Sequence[Layout]:
        return self.encoder_class.key_layouts

    def forward_intermediates(
        self,
        x_BCHW: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the chosen stages, fine to coarse, and before them the last map.

        Args:
            x_BCHW: normalised images.
            indices: which stages; a number n means the last n, None all of them.
            norm: every stage ends in its own norm anyway.
            stop_early: leave out the stages after the last chosen one.
            output_fmt: "NCHW"; there is no other.
            intermediates_only: only the list of maps.
        """
        if output_fmt != "NCHW":
            raise SegzooError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        check_images(x_BCHW, in_chans=self.in_chans, dtype=next(self.parameters()).dtype)
        chosen = take_indices(indices, len(self.stages))
        stages = self.stages[: max(chosen) + 1] if stop_early else self.stages
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)  # as PyramidEncoder.forward_features
        maps = []
        for stage in stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        intermediates = [maps[i] for i in chosen]
        return intermediates if intermediates_only else (x_BCHW, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last chosen one, and the head; returns the chosen indices, none negative."""
        chosen = take_indices(indices, len(self.stages))
        is_cut = max(chosen) + 1 < len(self.stages)
        self.stages = self.stages[: max(chosen) + 1]
        self.num_features = self.head_hidden_size = self.feature_info[len(self.stages) - 1]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_chans, H, W) normalised images -> the last map (B, C, H/32, W/32)."""
        return cast(list[Tensor], self.forward_intermediates(x_BCHW, indices=1, intermediates_only=True))[-1]

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits, or with `pre_logits` what the classifier would get."""
        x = self.head_drop(x_BCHW.mean(dim=(2, 3)) if self.global_pool else x_BCHW)
        return x if pre_logits else self.head(x)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes (0: none), with the pooling as it is if None."""
        self.global_pool = _check_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(init_weights).to(next(self.parameters())).train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates: the stem, then stages (`coarse`) or blocks."""
        return pyramid_groups(coarse)

    def no_weight_decay(self) -> set[str]:
        return set()  # norms and biases are timm's to leave out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.checkpointing = enable

    def set_inference_reduction(self, plan: object, *, during_training: bool = False) -> Plan:
        """See `segzoo.set_inference_reduction`; a string may name a preset of the encoder's family."""
        return set_inference_reduction(self, plan, during_training=during_training)

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """timm's; nothing in these encoders is made for one size."""


class TimmFeatures(FeatureGetterNet):
    """What `timm.create_model(..., features_only=True)` gives: the chosen maps, and reduction."""

    model: TimmEncoder

    @property
    def reduction_presets(self) -> Mapping[str, Mapping[str, Any]]:
        return cast(TimmEncoder, self.model).reduction_presets

    def set_inference_reduction(self, plan: object, *, during_training: bool = False) -> Plan:
        """See `segzoo.set_inference_reduction`; a string may name a preset of the encoder's family."""
        return set_inference_reduction(self, plan, during_training=during_training)


def _check_pool(global_pool: str, num_classes: int) -> str:
    if global_pool not in ("avg", ""):
        raise SegzooError(f"global_pool must be 'avg' or '', not {global_pool!r}")
    if not global_pool and num_classes > 0:
        raise SegzooError("global_pool='' gives a map, which a classifier cannot take; use num_classes=0 or 'avg'")
    return global_pool


def _timm_cfg(row: WeightsRow) -> dict[str, Any]:
    """A weights row of segzoo in timm's fields."""
    height, width = row.input_size
    cfg = {
        **row,
        "pool_size": (height // 32, width // 32),
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "origin_url": row.license_url,
    }
    if row.state == "hub":
        revision = f"@{row.hf_revision}" if row.hf_revision else ""
        cfg.update(hf_hub_id=f"{row.hf_hub_id}{revision}", hf_hub_filename=row.hf_hub_filename)
    if row.state == "url":
        cfg.update(url=row.url)
    if row.state == "drive":  # what timm shows; segzoo is who finds the file there
        cfg.update(url=f"https://drive.google.com/drive/folders/{row.drive_folder}")
    return cfg


default_cfgs = generate_default_cfgs(
    {f"{theirs}.{tag}": _timm_cfg(row) for theirs, ours in MODELS.items() for tag, row in _ROWS[ours].items()}
)


def _own_tag(name: str, cfg: PretrainedCfg) -> str | None:
    """The tag whose weights `cfg` asks for, or None if the caller put another file, repository or mapping there."""
    registered = default_cfgs[name].cfgs.get(cfg.tag) if cfg.tag is not None else None
    is_own = registered is not None and all(getattr(cfg, key) == getattr(registered, key) for key in _SOURCES)
    return cfg.tag if is_own else None


def _create(
    name: str,
    pretrained: bool,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None,
    pretrained_cfg_overlay: dict[str, Any] | None,
    **kwargs: Any,
) -> nn.Module:
    """Build `name` as timm's factory asks for it.

    The weights of segzoo's own rows are loaded by segzoo, with its checks and its refusals. What the caller names
    instead (`pretrained_cfg_overlay={"file": ...}`, "hf-hub:...", "local-dir:...") is loaded by timm.
    """
    named: Any = pretrained_cfg  # timm's hints leave out what its own factory passes
    cfg: Any = resolve_pretrained_cfg(name, pretrained_cfg=named, pretrained_cfg_overlay=pretrained_cfg_overlay)
    tag = _own_tag(name, cfg) if pretrained else None
    cache_dir = kwargs.pop("cache_dir", None) if tag is not None else None

    def build(
        *, global_pool: str = "avg", drop_rate: float = 0.0, device: Any = None, dtype: Any = None, **options: Any
    ):
        ours = f"{MODELS[name]}.{tag}" if tag else MODELS[name]
        try:
            encoder = create_model(ours, pretrained=tag is not None, cache_dir=cache_dir, **options)
            encoder = encoder.to(device=device, dtype=dtype)
        except WeightsError as error:
            own_file = "pretrained=True, pretrained_cfg_overlay={'file': PATH}"
            raise WeightsError(f"{error}. In timm, a file of your own is loaded by {own_file}") from error
        return TimmEncoder(encoder=encoder, global_pool=global_pool, drop_rate=drop_rate)

    return build_model_with_cfg(
        build,
        name,
        pretrained and tag is None,
        pretrained_cfg=cfg,
        pretrained_filter_fn=_fit_keys,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": TimmFeatures},
        **kwargs,
    )


def _fit_keys(state: Mapping[str, Tensor], model: TimmEncoder) -> dict[str, Tensor]:
    """For timm's loader, which forgives missing keys where the number of classes differs: only the head's may."""
    state = to_own_layout(cast(Any, model), dict(state))  # read for its `key_layouts` alone
    own = model.state_dict().keys()
    wrong = sorted(key for key in own ^ state.keys() if not key.startswith("head."))
    if wrong:
        raise WeightsError(
            f"the weights do not fit {type(model).__name__}: {', '.join(wrong[:4])} missing or left over"
        )
    return state


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def entry_point(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        return _create(name, pretrained, pretrained_cfg, pretrained_cfg_overlay, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name  # timm registers a function under its name
    return entry_point


def _register() -> None:
    is_ours = {name: is_model(name) and model_entrypoint(name).__module__ == __name__ for name in MODELS}
    taken = [f"{name} ({model_entrypoint(name).__module__})" for name in MODELS if is_model(name) and not is_ours[name]]
    if taken:
        raise SegzooError(
            f"timm already has {', '.join(taken)}, which segzoo does not replace; import segzoo.interop.timm in a "
            "process without the package that registered it"
        )
    for name in MODELS:
        if not is_ours[name]:
            globals()[name] = register_model(_entry_point(name))


_register()
