"""SegViT: attention-to-mask on plain vision transformers, and its Shrunk structure (Zhang et al., NeurIPS 2022,
arXiv 2210.05844).

What the released code computes (github.com/zbwxp/SegVit @763137e): the cascade runs deepest stage first, class queries
flow from stage to stage, mask logits are the scaled pre-softmax scores of a stage's last cross-attention, averaged
over heads and summed over the stages, and class logits come from the last stage. A score is the sum over all queries of
class probability x sigmoid mask, so that it may exceed 1. With a single stage, every decoder layer's masks are
supervised and they are not summed. In the Shrunk structure the spatial queries meet the fine features first.

What segzoo changed: any image size and shape (the official code scrambles non-square grids and always answers at the
training size), masks resized straight to the asked size with only the image's part of the padded input, the learned
spatial queries keep their grid, (H, W, C), and are interpolated. Swin has no released code: its four maps go
through one Linear each, deepest first, and their masks are resized to the finest map.

The parts of the decoder are in `segvit_decoder.py`, the weights in `segvit_weights.py`. Licence of the published
weights: non-commercial (University of Adelaide).

Shape letters: B batch, C channels, H, W map, Q queries, one a class, K classes, R rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.grids import fit_grid, grid_of
from ..layers.shapes import resize_image_part
from .base import Encoder, Pyramid
from .config import EncoderConfig, SegmenterConfig
from .family import Family, PublishedCost, Variant, register_family
from .keys import StateDict
from .segmenter import SegmentationModel
from .segvit_baselines import SETR, LinearDecoder
from .segvit_decoder import AttentionToMask, QueryUpsampling
from .segvit_weights import LAYOUTS, PRETRAINED
from .swin import SWIN_TINY
from .vit import ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegViTConfig(SegmenterConfig):
    """Configuration of SegViT."""

    encoder: EncoderConfig = ViTConfig()  # any encoder's; its maps feed the decoder (Table 5)
    decoder: str = "atm"  # or "setr", a linear classifier of the last map, to compare with (Tables 4 and 8)
    upsample: bool = False  # spatial queries bring a ViT's features back to the full grid; then a single-stage cascade
    decoder_dim: int = 384  # channels
    decoder_num_heads: int = 12
    decoder_layers: int = 3  # layers a stage
    dropout: float = 0.1  # in the decoder's layers

    def check(self) -> None:
        super().check()
        self.require_positive("decoder_dim", "decoder_layers")
        self.require_rate("dropout")
        dim = self.decoder_dim
        self.require_heads("decoder_num_heads", (self.decoder_num_heads,), f"decoder_dim={dim}", (dim,))
        self.require_choice("decoder", ("atm", "setr"))
        self.require(not self.upsample or self.decoder == "atm", "upsample=True belongs to decoder='atm'")
        self.require(
            not self.upsample or isinstance(self.encoder, ViTConfig),
            "upsample=True needs a ViT as encoder, since the spatial queries are made for its img_size",
        )


class SegViTDecoder(nn.Module):
    """Optional query up-sampling, then the ATM cascade.

    Args:
        upsample: a QueryUpsampling, or nn.Identity to give the cascade the encoder's own maps.
        atm: an AttentionToMask made for what `upsample` returns.
    """

    def __init__(self, *, upsample: nn.Module, atm: AttentionToMask):
        super().__init__()
        self.upsample = upsample
        self.atm = atm

    def forward(self, features: Sequence[Tensor], *, auxiliary: bool = False) -> list[tuple[Tensor, Tensor]]:
        return self.atm(self.upsample(features), auxiliary=auxiliary)


class MaskOutput(NamedTuple):
    """What SegViT's head knows before anything is of full size."""

    class_logits: Tensor  # (B, Q, K + 1), the last class is "no object"; query q was taught class q
    mask_logits: Tensor  # (B, Q, h, w)
    image_size: tuple[int, int]  # (H, W) in pixels of the image
    padded_size: tuple[int, int]  # (H, W) in pixels that the masks cover


class SegViT(SegmentationModel):
    """An encoder and the attention-to-mask decoder; scores are sums of class probability x sigmoid mask.

    Args:
        encoder: any encoder whose `feature_info` lists the maps that the decoder was made for.
        decoder: a SegViTDecoder.
    """

    key_layouts = LAYOUTS
    score_kind = "product"

    def __init__(self, *, encoder: Encoder, decoder: SegViTDecoder, cfg: Any):
        super().__init__(cfg=cfg)
        self.encoder = encoder
        self.decoder = decoder

    def fit_state(self, state: StateDict) -> StateDict:
        """Flat position embeddings and spatial queries get their grid; those of another `img_size` are resized."""
        for name, parameter in self.named_parameters():
            if name in ("encoder.pos_embed", "decoder.upsample.queries"):
                state = fit_grid(state, name, parameter)
        return state

    def forward_head(self, features: Pyramid) -> MaskOutput:
        """Maps -> class logits and mask logits on the first map's grid, with the sizes that `to_size` needs."""
        return self._outputs(features)[-1]

    head_names = ("class_logits", "mask_logits")

    def head_tensors(self, head_output: MaskOutput) -> tuple[Tensor, ...]:
        return head_output.class_logits, head_output.mask_logits

    def head_output_of(self, tensors: Sequence[Tensor], image_size: tuple[int, int]) -> MaskOutput:
        multiple = self.encoder.size_multiple
        rows, columns = grid_of(image_size, multiple)
        return MaskOutput(tensors[0], tensors[1], image_size, (rows * multiple, columns * multiple))

    def to_size(self, head_output: MaskOutput, size: Sequence[int]) -> Tensor:
        """Scores (B, K, *size): mask logits resized bilinearly, sigmoid, weighted by class probability and summed.

        The edges of the image become the edges of `size`; the zero padding beyond them is cut off. At the image's own
        size this is: resize to the padded size, product, crop.
        """
        return self.score_rows(head_output, size, 0, size[0])

    def product_parts(self, head_output: MaskOutput, size: Sequence[int]) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """What the scores of `to_size` are made of, for a class map that needs only some of them.

        Returns:
            class probabilities (B, Q, K), mask logits (B, Q, h, w) and the step (in rows, in columns) on their grid
            from one pixel of `size` to the next. A score is the sum over q of probability x sigmoid of the mask logit
            that is read bilinearly at (y + 0.5) * step - 0.5, and so for x.
        """
        image_size = head_output.image_size
        grid = head_output.mask_logits.shape[2:]
        rows, columns = (
            side / padded * image / out
            for side, padded, image, out in zip(grid, head_output.padded_size, image_size, size, strict=True)
        )
        return head_output.class_logits.softmax(dim=-1)[..., :-1], head_output.mask_logits, (rows, columns)

    def score_rows(self, head_output: MaskOutput, size: Sequence[int], start: int, stop: int) -> Tensor:
        """The rows start <= y < stop of `to_size`, (B, K, stop - start, W), with memory for these rows only."""
        masks_BQRW = resize_image_part(
            head_output.mask_logits,
            (size[0], size[1]),
            image_size=head_output.image_size,
            padded_size=head_output.padded_size,
            rows=(start, stop),
        ).sigmoid()
        probability_BQK = head_output.class_logits.softmax(dim=-1)[..., :-1]
        return torch.einsum("bqk,bqrw->bkrw", probability_BQK, masks_BQRW)

    def forward_train(self, x_BCHW: Tensor) -> dict[str, Any]:
        """One pass for training.

        Returns:
            {"scores": (B, K, H, W), "output": the prediction's MaskOutput, "auxiliary": the supervised ones before it}
        """
        *auxiliary, output = self._outputs(self.forward_features(x_BCHW), auxiliary=True)
        return {"scores": self.to_size(output, x_BCHW.shape[2:]), "output": output, "auxiliary": auxiliary}

    def get_classifier(self) -> nn.Linear:
        return self.decoder.atm.class_embed

    def classifier_parameters(self) -> set[str]:
        return {f"decoder.atm.{name}" for name in ("class_queries", "class_embed.weight", "class_embed.bias")}

    def renew_classifier(self, num_classes: int) -> None:
        """Fresh class queries and class logits."""
        atm = self.decoder.atm
        atm.make_classifier(num_classes, like=atm.class_queries, dim=atm.class_queries.shape[1])

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """The encoder's position embedding, and the spatial queries, to the grid of images of this many pixels."""
        super().set_input_size(img_size)
        upsample = self.decoder.upsample
        if isinstance(upsample, QueryUpsampling):
            upsample.set_grid(grid_of(self.cfg.encoder.img_size, self.feature_info[0]["reduction"]))

    def _outputs(self, features: Pyramid, *, auxiliary: bool = False) -> list[MaskOutput]:
        return [
            MaskOutput(class_logits, mask_logits, features.image_size, features.padded_size)
            for class_logits, mask_logits in self.decoder(features.maps, auxiliary=auxiliary)
        ]


def build(cfg: SegViTConfig) -> SegViT | SETR:
    encoder = cfg.build_encoder()
    if cfg.decoder == "setr":
        decoder = LinearDecoder(in_chans=encoder.num_features, num_classes=cfg.num_classes)
        return SETR(encoder=encoder, decoder=decoder, cfg=cfg)
    upsample, in_chans = _upsample(cfg, encoder)
    atm = AttentionToMask(
        in_chans=in_chans,
        dim=cfg.decoder_dim,
        num_heads=cfg.decoder_num_heads,
        num_layers=cfg.decoder_layers,
        dropout=cfg.dropout,
        num_classes=cfg.num_classes,
    )
    return SegViT(encoder=encoder, decoder=SegViTDecoder(upsample=upsample, atm=atm), cfg=cfg)


def _upsample(cfg: SegViTConfig, encoder: Encoder) -> tuple[nn.Module, Sequence[int | None]]:
    """The query up-sampling of a config, or the identity, and the channels that the cascade then gets."""
    in_chans = [info["num_chs"] for info in encoder.feature_info]
    if not (cfg.upsample and isinstance(cfg.encoder, ViTConfig)):
        return nn.Identity(), in_chans
    upsample = QueryUpsampling(
        grid=grid_of(cfg.encoder.img_size, encoder.feature_info[0]["reduction"]),
        in_chans=in_chans,
        dim=cfg.decoder_dim,
        num_heads=cfg.decoder_num_heads,
        num_layers=cfg.decoder_layers,
        dropout=cfg.dropout,
    )
    return upsample, (None,)


VIT_BASE_SHRUNK = ViTConfig(stages=(5, 11), downsample_block=6)
VIT_LARGE = ViTConfig(
    img_size=(640, 640), embed_dim=1024, depth=24, num_heads=16, stages=(7, 15, 23), drop_path_rate=0.3
)
VIT_LARGE_SHRUNK = dataclasses.replace(VIT_LARGE, stages=(7, 23), downsample_block=8)
TEST_VIT = ViTConfig(img_size=(64, 64), embed_dim=24, depth=4, num_heads=2, stages=(1, 2, 3))
TEST_VIT_SHRUNK = dataclasses.replace(TEST_VIT, stages=(1, 3), downsample_block=2)

SEGVIT_BASE = SegViTConfig()
SEGVIT_SMALL = SegViTConfig(encoder=ViTConfig(embed_dim=384, num_heads=6), decoder_dim=192, decoder_num_heads=6)
SEGVIT_LARGE = SegViTConfig(encoder=VIT_LARGE, decoder_dim=512, decoder_num_heads=16)
SEGVIT_BASE_SHRUNK = SegViTConfig(encoder=VIT_BASE_SHRUNK, upsample=True)
SEGVIT_LARGE_SHRUNK = dataclasses.replace(SEGVIT_LARGE, encoder=VIT_LARGE_SHRUNK, upsample=True)
SEGVIT_SWIN_TINY = SegViTConfig(encoder=SWIN_TINY, decoder_dim=256, decoder_num_heads=8)  # Table 6
TEST_SEGVIT = SegViTConfig(encoder=TEST_VIT, decoder_dim=16, decoder_num_heads=2, decoder_layers=2, num_classes=13)
TEST_SEGVIT_SHRUNK = dataclasses.replace(TEST_SEGVIT, encoder=TEST_VIT_SHRUNK, upsample=True)


def _published(rows: Iterable[tuple[int, float, int]]) -> tuple[PublishedCost, ...]:
    return tuple(PublishedCost((side, side), gmacs, num_classes=classes) for side, gmacs, classes in rows)


VARIANTS = {
    "segvit_small": Variant(SEGVIT_SMALL, params=27_604_183),
    "segvit_base": Variant(SEGVIT_BASE, params=108_734_743, published=_published([(512, 120.9, 150)])),
    "segvit_large": Variant(
        SEGVIT_LARGE,
        params=344_303_255,
        published=_published([(640, 637.9, 150), (512, 383.9, 171), (480, 321.6, 59)]),
    ),
    "segvit_base_shrunk": Variant(SEGVIT_BASE_SHRUNK, params=108_831_895, published=_published([(512, 97.1, 150)])),
    "segvit_large_shrunk": Variant(
        SEGVIT_LARGE_SHRUNK,
        params=344_596_631,
        published=_published([(640, 373.5, 150), (512, 224.8, 171), (480, 186.9, 59)]),
    ),
    "segvit_swin_tiny": Variant(SEGVIT_SWIN_TINY, params=40_608_017, published=_published([(512, 48.0, 150)])),
    "test_segvit": Variant(TEST_SEGVIT),
    "test_segvit_shrunk": Variant(TEST_SEGVIT_SHRUNK),
}

register_family(Family(name="segvit", build=build, variants=VARIANTS, pretrained=PRETRAINED))
