"""The contract of a model: what every encoder and every segmentation model of the zoo promises.

Shape letters: B batch, C channels, H, W map, K classes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.block import BlockSequence, Stage
from ..layers.grids import grid_of
from ..layers.init import init_weights
from ..plans import Plan, set_inference_reduction
from .features import FeatureInfo, check_images, take_indices

if TYPE_CHECKING:
    from .keys import Layout
    from .rows import PretrainedCfg

# What `preset_accuracy` may say, beside "as trained".
PUBLISHED_IN_ROWS = "published, in the weights rows"
NOT_MEASURED = "not measured"

JOINS_PREVIOUS = (99999,)  # timm's mark in a `group_matcher`: no group of its own


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """What an encoder knows of an image: its maps, fine to coarse, and where the image lies in them.

    As a sequence it is its maps.
    """

    maps: tuple[Tensor, ...]  # (B, C_i, H_i, W_i)
    strides: tuple[int, ...]  # pixels a cell of each map
    image_size: tuple[int, int]  # (H, W) in pixels
    padded_size: tuple[int, int]  # (H, W) in pixels that every map covers; the image is its upper left part

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.maps)

    def __getitem__(self, index: int) -> Tensor:
        return self.maps[index]


with warnings.catch_warnings():  # torch 2.6 warns of what it does itself here
    warnings.simplefilter("ignore", FutureWarning)
    torch.export.register_dataclass(Pyramid, serialized_type_name="segzoo.Pyramid")


# "fresh classifier": everything but the last layer is trained.
WeightsState = Literal["pretrained", "fresh classifier", "untrained"]
WEIGHTS_STATES: tuple[WeightsState, ...] = get_args(WeightsState)


class Model(nn.Module):
    """What encoders and segmentation models share. `cfg` is the family's frozen config, all of it plain data; it always
    describes the model as it is, also after `reset_classifier`."""

    key_layouts: ClassVar[Sequence[Layout]] = ()  # official layouts of checkpoints that load_weights understands
    reduction_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # plans by name
    preset_accuracy: ClassVar[Mapping[str, str]] = {}  # what is known of what each preset costs in accuracy
    pretrained_cfg: PretrainedCfg | None = None  # the weights row, set by create_model
    name: str = ""  # registry name, set by create_model
    weights_state: WeightsState = "untrained"  # whoever trains a model says "pretrained" when it is done
    head_prefix: ClassVar[str] = "head."  # parameters that learn the task; the rest is the encoder
    feature_info: list[dict[str, Any]]  # of each map: {"num_chs": channels, "reduction": stride, "module": its name}
    first_conv: ClassVar[str] = ""  # parameter whose input channels are the image's

    def __init__(self, *, cfg: Any):
        super().__init__()
        self.cfg = cfg

    @property
    def num_classes(self) -> int:
        return self.cfg.num_classes

    @num_classes.setter
    def num_classes(self, num_classes: int) -> None:
        """Set by `reset_classifier`, whose classifier nobody has trained; an encoder of 0 classes has none."""
        self.cfg = dataclasses.replace(self.cfg, num_classes=num_classes)
        if self.weights_state != "untrained":
            self.weights_state = "fresh classifier" if num_classes else "pretrained"

    @property
    def in_chans(self) -> int:
        return self.cfg.in_chans

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The weights row in timm's fields, completed by what only the model knows. A new dict each time."""
        classifier = self.get_classifier()
        row = dict(self.pretrained_cfg) if self.pretrained_cfg is not None else {}
        if row:
            row["input_size"] = (self.in_chans, *row["input_size"][1:])
        return {
            **row,
            "architecture": self.name.partition(".")[0],
            "tag": self.name.partition(".")[2] or None,
            "num_classes": self.num_classes,
            "pool_size": None,
            "first_conv": self.first_conv.removesuffix(".weight"),
            "classifier": next(name for name, module in self.named_modules() if module is classifier),
        }

    def set_inference_reduction(self, plan: object, *, during_training: bool = False) -> Plan:
        """See `segzoo.set_inference_reduction`; a string may name a preset of this family."""
        return set_inference_reduction(self, plan, during_training=during_training)

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Fit to images of this many pixels what is learned once a position, as timm's models do.

        Every model takes every size anyway, and most have nothing to fit. Parameters may be new ones: make the
        optimizer afterwards.
        """

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth in timm's notation, for layer-wise learning rates; what is not matched comes last.

        Args:
            coarse: stages instead of blocks.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.checkpointing = enable

    def mark_loaded(self, state: WeightsState = "pretrained") -> None:
        """Say what its parameters are now; an encoder in it has no classifier that could be fresh."""
        for part in self.modules():
            if isinstance(part, Model):
                part.weights_state = "untrained" if state == "untrained" else "pretrained"
        self.weights_state = state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's own; a model that got every parameter counts as pretrained."""
        result = super().load_state_dict(state_dict, strict, assign)
        if not result.missing_keys:
            self.mark_loaded()
        return result

    def get_classifier(self) -> nn.Module:
        """The last layer, whose outputs are the classes."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh parameters for other classes; everything else is untouched."""
        raise NotImplementedError

    def classifier_parameters(self) -> set[str]:
        """Names of the parameters that exist once a class."""
        classes = {id(parameter) for parameter in self.get_classifier().parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in classes}

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in segzoo's names, made for other options of this model, fitted to its own where that is sound.

        Called by `load_weights` before the strict check; most models have nothing to fit.
        """
        return state

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, beyond norms and biases."""
        return set()

    def param_groups(self, *, lr: float, weight_decay: float, head_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer.

        The encoder's norms and biases are not decayed, nor what `no_weight_decay` names. Head parameters learn
        `head_lr_multiplier` times faster and keep weight decay on their norms too, as the official recipes do, where
        "head" wins over "norm".
        """
        skip = self.no_weight_decay()
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            is_head = name.startswith(self.head_prefix)
            decayed = name not in skip and (is_head or parameter.ndim > 1)
            key = ("head" if is_head else "encoder") + ("" if decayed else "_no_decay")
            group = groups.setdefault(
                key,
                {
                    "name": key,
                    "params": [],
                    "lr": lr * (head_lr_multiplier if is_head else 1.0),
                    "weight_decay": weight_decay if decayed else 0.0,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())


class Encoder(Model):
    """A classifier in timm's sense over a pyramid of maps. Subclasses define `forward_features`, which begins with
    `check_images`.

    `feature_info[i]` describes map i: {"num_chs": channels, "reduction": stride, "module": its module's name}.
    """

    feature_info: FeatureInfo
    num_features: int  # channels of the last map
    any_size_graph: ClassVar[bool] = True  # whether torch.export can record it with dynamic sides
    size_multiple: int = 1  # forward_features pads images to whole multiples of this many pixels

    def make_head(self, num_features: int) -> None:
        """Mean pool + Linear, as PVT v2's; with 0 classes the pooled features come out."""
        self.num_features = num_features
        self.head = nn.Linear(num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes (0: none); the encoder is untouched.

        Args:
            global_pool: timm's; the head pools by the mean, so "avg" or None.
        """
        if global_pool not in (None, "avg"):
            raise SegzooError(f"global_pool must be 'avg', not {global_pool!r}; forward_features gives the maps")
        like = next(self.parameters())
        self.num_classes = num_classes
        self.make_head(self.num_features)
        self.head.apply(init_weights).to(like).train(self.training)

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier takes, or would take."""
        return self.num_features

    @property
    def default_cfg(self) -> dict[str, Any]:
        cfg = super().default_cfg
        if "input_size" in cfg:
            cfg["pool_size"] = grid_of(cfg["input_size"][1:], self.feature_info[-1]["reduction"])
        return cfg

    def check_images(self, x_BCHW: Tensor) -> None:
        """Raises SegzooError for what is no batch of images for this model; see `features.check_images`."""
        check_images(x_BCHW, in_chans=self.in_chans, dtype=next(self.parameters()).dtype)

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        """(B, in_chans, H, W) normalised images -> maps (B, C_i, H_i, W_i), fine to coarse.

        Raises:
            SegzooError: a tensor of another rank, dtype or number of channels.
        """
        raise NotImplementedError

    def forward_intermediates(
        self,
        x_BCHW: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Pyramid, list[Tensor]]:
        """The chosen maps, and before them what `forward_features` gives. The arguments are timm's.

        Args:
            indices: which maps, 0 the finest; a number n means the last n, None all.
            norm: accepted; every map is as the decoders get it, which is with the norm that belongs to it.
            stop_early: accepted; what is made beyond the chosen maps is made all the same.
            output_fmt: "NCHW", or "NLC" for tokens (B, H * W, C) in row-major order.
            intermediates_only: only the list of maps.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise SegzooError(f"output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}")
        features = self.forward_features(x_BCHW)
        maps = [features[i] for i in take_indices(indices, len(self.feature_info))]
        if output_fmt == "NLC":
            maps = [map_BCHW.flatten(2).transpose(1, 2) for map_BCHW in maps]
        return maps if intermediates_only else (features, maps)

    def pyramid(self, maps: Sequence[Tensor], x_BCHW: Tensor, padded_BCHW: Tensor) -> Pyramid:
        """The maps of an image, fine to coarse, made from it as it was padded."""
        # One tuple where nothing is padded, so that even a trace, whose sizes are tensors, finds the two sizes equal.
        size = (x_BCHW.shape[2], x_BCHW.shape[3])
        padded = size if padded_BCHW is x_BCHW else (padded_BCHW.shape[2], padded_BCHW.shape[3])
        strides = tuple(info["reduction"] for info in self.feature_info)
        return Pyramid(tuple(maps), strides, image_size=size, padded_size=padded)

    def forward_head(self, features: Pyramid, pre_logits: bool = False) -> Tensor:
        """Maps -> (B, K) class logits, or with `pre_logits` the (B, C) mean of the last map."""
        pooled_BC = features[-1].mean(dim=(2, 3))
        return pooled_BC if pre_logits else self.head(pooled_BC)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))

    def forward_train(self, x_BCHW: Tensor) -> dict[str, Any]:
        return {"scores": self(x_BCHW)}


class PyramidEncoder(Encoder):
    """Hierarchical transformer of stages at strides 4, 8, 16 and 32 (EFT, MiT)."""

    first_conv = "stages.0.patch_embed.proj.weight"

    def __init__(self, *, cfg: Any, stages: Sequence[Stage]):
        super().__init__(cfg=cfg)
        self.stages = nn.ModuleList(stages)
        self.feature_info = FeatureInfo(
            {"num_chs": stage.patch_embed.proj.out_channels, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        )
        self.make_head(self.feature_info[-1]["num_chs"])
        self.apply(init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return pyramid_groups(coarse)

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        self.check_images(x_BCHW)
        # Channels-last from the start: every later token view and depthwise convolution is then free of copies.
        map_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            map_BCHW = stage(map_BCHW)
            maps.append(map_BCHW)
        return self.pyramid(maps, x_BCHW, x_BCHW)


def pyramid_groups(coarse: bool) -> dict[str, Any]:
    """The `group_matcher` of a chain of stages."""
    by_block = [
        (r"^stages\.(\d+)\.patch_embed", (0,)),
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (r"^stages\.(\d+)\.norm", JOINS_PREVIOUS),
    ]
    return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else by_block}


class FeaturePyramid(nn.Module):
    """`create_model(..., features_only=True)`: an encoder whose forward returns the chosen maps.

    `feature_info` describes the returned maps.
    """

    def __init__(self, *, encoder: Encoder, out_indices: int | Sequence[int] | None = None):
        super().__init__()
        self.encoder = encoder
        self.out_indices = tuple(take_indices(out_indices, len(encoder.feature_info)))
        self.feature_info = FeatureInfo(encoder.feature_info[i] for i in self.out_indices)

    @property
    def pretrained_cfg(self) -> PretrainedCfg | None:
        return self.encoder.pretrained_cfg

    @property
    def reduction_presets(self) -> Mapping[str, Mapping[str, Any]]:
        return self.encoder.reduction_presets

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        features = self.encoder.forward_features(x_BCHW)
        return [features[i] for i in self.out_indices]

    def set_inference_reduction(self, plan: object, *, during_training: bool = False) -> Plan:
        """See `segzoo.set_inference_reduction`."""
        return set_inference_reduction(self, plan, during_training=during_training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.set_grad_checkpointing(enable)
