"""The contract of a segmentation model: image -> scores at input size.

Shape letters: B batch, C channels, H, W rows and columns of a map, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.grids import grid_of
from ..layers.init import init_weights
from ..layers.shapes import resize, resize_image_part
from .base import Encoder, Model, Pyramid
from .features import FeatureInfo


def _inside_encoder(matcher: Any) -> Any:
    """A pattern of an encoder's `group_matcher`, or a list of (pattern, suffix), for a model that holds it."""
    if isinstance(matcher, str):
        return rf"^encoder\.{matcher.removeprefix('^')}"
    return [(_inside_encoder(pattern), suffix) for pattern, suffix in matcher]


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
    def num_features(self) -> int:
        """Channels of the encoder's last map."""
        return self.encoder.num_features

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier takes."""
        weight = self.get_classifier().weight
        assert isinstance(weight, Tensor)
        return weight.shape[1]

    @property
    def first_conv(self) -> str:
        return f"encoder.{self.encoder.first_conv}"

    @property
    def reduction_presets(self) -> Mapping[str, Mapping[str, Any]]:
        """The encoder's, for the families whose decoder has no sites."""
        return self.encoder.reduction_presets

    @property
    def preset_accuracy(self) -> Mapping[str, str]:
        return self.encoder.preset_accuracy

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's groups, and the decoder as the last one."""
        return {name: _inside_encoder(matcher) for name, matcher in self.encoder.group_matcher(coarse).items()}

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        before = self.encoder.cfg
        self.encoder.set_input_size(img_size)
        if self.encoder.cfg != before:
            encoder = dataclasses.replace(self.cfg.encoder, img_size=self.encoder.cfg.img_size)
            self.cfg = dataclasses.replace(self.cfg, encoder=encoder)

    def forward_intermediates(self, x_BCHW: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Encoder.forward_intermediates`, whose arguments these are: the decoder is not run."""
        return self.encoder.forward_intermediates(x_BCHW, *args, **kwargs)

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
    def feature_info(self) -> FeatureInfo:
        return self.encoder.feature_info

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes` >= 1 classes; encoder and decoder are untouched.

        Args:
            global_pool: timm's; None, since a class a pixel pools nothing.
        """
        if num_classes < 1:
            raise SegzooError(
                f"a segmentation model needs at least one class, not {num_classes}; features_only=True gives the "
                "encoder's maps"
            )
        if global_pool:
            raise SegzooError(f"a segmentation model pools nothing: leave out global_pool={global_pool!r}")
        self.renew_classifier(num_classes)
        self.num_classes = num_classes

    def renew_classifier(self, num_classes: int) -> None:
        """What `reset_classifier` does to the parameters; `num_classes` is at least 1."""
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

    def get_classifier(self) -> nn.Module:
        classifier = self.decoder.classifier
        assert isinstance(classifier, nn.Module)
        return classifier

    def renew_classifier(self, num_classes: int) -> None:
        classifier = self.get_classifier()
        if not isinstance(classifier, nn.Conv2d):
            raise SegzooError("a folded copy gets no new classifier; reset that of the model and fold it again")
        self.decoder.classifier = fresh_conv_classifier(classifier, num_classes)


def fresh_conv_classifier(classifier: nn.Conv2d, num_classes: int) -> nn.Conv2d:
    """A newly initialised 1x1 classifier like `classifier`, for other classes: its device, dtype and mode."""
    fresh = nn.Conv2d(classifier.in_channels, num_classes, 1, bias=classifier.bias is not None)
    return fresh.apply(init_weights).to(classifier.weight).train(classifier.training)
