"""The contract of a model: what every encoder and every segmentation model of the zoo promises.

Shape letters: B batch, C channels, H, W map, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.block import BlockSequence, Stage
from ..layers.grids import grid_of
from ..layers.init import init_weights
from ..layers.shapes import resize, resize_image_part
from ..plans import Plan, set_inference_reduction

if TYPE_CHECKING:
    from .keys import Layout
    from .rows import PretrainedCfg


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


torch.export.register_dataclass(Pyramid, serialized_type_name="segzoo.Pyramid")


class Model(nn.Module):
    """What encoders and segmentation models share. `cfg` is the family's frozen config, all of it plain data; it always
    describes the model as it is, also after `reset_classifier`."""

    key_layouts: ClassVar[Sequence[Layout]] = ()  # official layouts of checkpoints that load_weights understands
    reduction_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # plans by name
    pretrained_cfg: PretrainedCfg | None = None  # the weights row, set by create_model
    name: str = ""  # registry name, set by create_model
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
        self.cfg = dataclasses.replace(self.cfg, num_classes=num_classes)

    @property
    def in_chans(self) -> int:
        return self.cfg.in_chans

    def set_inference_reduction(self, plan: object, *, during_training: bool = False) -> Plan:
        """See `segzoo.set_inference_reduction`; a string may name a preset of this family."""
        return set_inference_reduction(self, plan, during_training=during_training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for module in self.modules():
            if isinstance(module, BlockSequence):
                module.checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer, whose outputs are the classes."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
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
    """A classifier in timm's sense over a pyramid of maps. Subclasses define `forward_features`.

    `feature_info[i]` describes map i: {"num_chs": channels, "reduction": stride, "module": its module's name}.
    """

    feature_info: list[dict[str, Any]]
    any_size_graph: ClassVar[bool] = True  # whether torch.export can record it with dynamic sides
    size_multiple: int = 1  # forward_features pads images to whole multiples of this many pixels

    def make_head(self, num_features: int) -> None:
        """Mean pool + Linear, as PVT v2's; with 0 classes the pooled features come out."""
        self.num_features = num_features
        self.head = nn.Linear(num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for `num_classes` classes (0: none); the encoder is untouched."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.make_head(self.num_features)
        self.head.apply(init_weights).to(like).train(self.training)

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        """(B, in_chans, H, W) normalised images -> maps (B, C_i, H_i, W_i), fine to coarse."""
        raise NotImplementedError

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
        self.feature_info = [
            {"num_chs": stage.patch_embed.proj.out_channels, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, stage in enumerate(stages)
        ]
        self.make_head(self.feature_info[-1]["num_chs"])
        self.apply(init_weights)

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        # Channels-last from the start: every later token view and depthwise convolution is then free of copies.
        map_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            map_BCHW = stage(map_BCHW)
            maps.append(map_BCHW)
        return self.pyramid(maps, x_BCHW, x_BCHW)


class FeaturePyramid(nn.Module):
    """`create_model(..., features_only=True)`: an encoder whose forward returns the chosen maps.

    `feature_info` describes the returned maps.
    """

    def __init__(self, *, encoder: Encoder, out_indices: Sequence[int] | None = None):
        super().__init__()
        count = len(encoder.feature_info)
        indices = tuple(range(count)) if out_indices is None else tuple(out_indices)
        if not indices or any(not isinstance(i, int) or not -count <= i < count for i in indices):
            raise SegzooError(f"out_indices must be whole numbers from 0 to {count - 1}, not {out_indices!r}")
        self.encoder = encoder
        self.out_indices = tuple(i % count for i in indices)
        self.feature_info = [encoder.feature_info[i] for i in self.out_indices]

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


class SegmentationModel(Model):
    """Image -> scores at input size, one Tensor, in train and eval. Subclasses define the head.

    `forward(x) == to_size(forward_head(forward_features(x)), x.shape[2:])`.
    """

    # "logits", "product" = class probability x sigmoid mask, or "heatmap" = one a keypoint, which no mask comes from
    score_kind: str = "logits"
    head_names: ClassVar[tuple[str, ...]] = ("head",)  # of what `head_tensors` gives
    head_prefix = "decoder."
    encoder: Encoder

    @property
    def in_chans(self) -> int:
        return self.encoder.in_chans

    @property
    def first_conv(self) -> str:
        return f"encoder.{self.encoder.first_conv}"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.encoder.set_grad_checkpointing(enable)  # which may have blocks of its own kind

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        """(B, in_chans, H, W) normalised images -> the encoder's maps, fine to coarse, as in `feature_info`."""
        return self.encoder.forward_features(x_BCHW)

    def no_weight_decay(self) -> set[str]:
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward_head(self, features: Pyramid) -> Any:
        """Maps -> scores at the decoder's own resolution, before any resize."""
        raise NotImplementedError

    def head_tensors(self, head_output: Any) -> tuple[Tensor, ...]:
        """The tensors of what `forward_head` returned, for an engine, which knows nothing else."""
        return (head_output,)

    def head_output_of(self, tensors: Sequence[Tensor], image_size: tuple[int, int]) -> Any:
        """What `forward_head` returned for images of (H, W) pixels, from its tensors."""
        return tensors[0]

    def to_size(self, head_output: Any, size: Sequence[int]) -> Tensor:
        """What `forward_head` returned -> scores (B, K, *size), the family's own way to full size."""
        return resize(head_output, tuple(size))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.to_size(self.forward_head(self.forward_features(x_BCHW)), x_BCHW.shape[2:])

    def forward_train(self, x_BCHW: Tensor) -> dict[str, Any]:
        """One pass for training: {"scores": (B, K, H, W) at input size, and every auxiliary output}."""
        return {"scores": self(x_BCHW)}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return self.encoder.feature_info

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` >= 1 classes; encoder and decoder are untouched."""
        raise NotImplementedError


class EncoderDecoder(SegmentationModel):
    """A segmentation model of an encoder and a decoder whose last layer is its `classifier` (EDAFormer, SegFormer).

    The scores of an encoder that pads (ViT, Swin) are brought from the padded grid to the image's own.

    Args:
        encoder: any encoder whose `feature_info` describes the maps that the decoder was made for.
        decoder: maps, fine to coarse -> scores at its own resolution; has `classifier`, a 1x1 convolution.
    """

    def __init__(self, *, encoder: Encoder, decoder: nn.Module, cfg: Any):
        super().__init__(cfg=cfg)
        self.encoder = encoder
        self.decoder = decoder

    def forward_head(self, features: Pyramid) -> Tensor:
        """Maps -> scores (B, K, H / s, W / s) of the image, at the decoder's stride s."""
        scores_BKHW = self.decoder(features.maps)
        image, padded = features.image_size, features.padded_size
        if image == padded:
            return scores_BKHW
        size = grid_of(image, padded[0] // scores_BKHW.shape[2])
        return resize_image_part(scores_BKHW, size, image_size=image, padded_size=padded)

    def get_classifier(self) -> nn.Conv2d:
        classifier = self.decoder.classifier
        assert isinstance(classifier, nn.Conv2d)  # as the class demands of its decoder
        return classifier

    def reset_classifier(self, num_classes: int) -> None:
        self.decoder.classifier = fresh_conv_classifier(self.get_classifier(), num_classes)
        self.num_classes = num_classes


def fresh_conv_classifier(classifier: nn.Conv2d, num_classes: int) -> nn.Conv2d:
    """A newly initialised 1x1 classifier like `classifier`, for other classes: its device, dtype and mode."""
    if num_classes < 1:
        raise SegzooError(f"a segmentation model needs at least one class, not {num_classes}")
    fresh = nn.Conv2d(classifier.in_channels, num_classes, 1, bias=classifier.bias is not None)
    return fresh.apply(init_weights).to(classifier.weight).train(classifier.training)
