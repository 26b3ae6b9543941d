"""Swin, the shifted-window transformer, as a pyramid encoder (Liu et al., ICCV 2021, arXiv 2103.14030).

It is timm's model, without its final norm, and will be until it is written here. What segzoo changed: any image size is
taken (zero-padded at the bottom and right to whole cells of the coarsest map), and windows are shifted in all stages,
as at sizes larger than the 224 pixels of the published weights. The ImageNet head is ours: timm's sits on the final
norm.

Licence of the published weights (timm, Microsoft): MIT.

Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
from torch import Tensor, nn

from ..layers.grids import pad_to_multiple
from ..layers.init import init_weights
from .base import Encoder, Pyramid
from .config import EncoderConfig
from .family import Family, Variant, register_family
from .features import FeatureInfo
from .swin_weights import LAYOUTS, PRETRAINED


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwinConfig(EncoderConfig):
    """Configuration of a Swin encoder."""

    embed_dim: int = 96  # channels of the first stage; each stage has twice as many as the one before
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # of each stage
    window_size: int = 7  # side of a window in tokens
    stages: tuple[int, ...] = (0, 1, 2, 3)  # stages, from 0, whose outputs are the features
    drop_path_rate: float = 0.1  # of the last block; grows linearly from 0
    num_classes: int = 0  # 0: pooled features

    def build(self) -> Swin:
        return Swin(self)

    @property
    def map_chans(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * 2**stage for stage in self.stages)

    def check(self) -> None:
        super().check()
        self.require_positive("embed_dim", "depths", "window_size")
        self.require_lengths(len(self.depths), "a stage", "num_heads")
        dims = [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        self.require_heads("num_heads", self.num_heads, f"the channels {dims} of the stages", dims)
        self.require_rising("stages", len(self.depths), "stage")


class Swin(Encoder):
    """timm's Swin transformer as an encoder of any image size; it owns no reduction leaf: its windows are small.

    Compile it with `dynamic=False`: torch's symbolic shapes do not get through the windows in reasonable time.
    """

    key_layouts = LAYOUTS
    any_size_graph = False
    first_conv = "body.patch_embed.proj.weight"

    def __init__(self, cfg: SwinConfig):
        super().__init__(cfg=cfg)
        self.body: Any = timm.create_model(
            "swin_tiny_patch4_window7_224",
            embed_dim=cfg.embed_dim,
            depths=cfg.depths,
            num_heads=cfg.num_heads,
            window_size=cfg.window_size,
            in_chans=cfg.in_chans,
            num_classes=0,
            drop_path_rate=cfg.drop_path_rate,
            strict_img_size=False,
            always_partition=True,
        )
        self.body.norm = nn.Identity()
        info = self.body.feature_info
        self.feature_info = FeatureInfo(
            {"num_chs": info[i]["num_chs"], "reduction": info[i]["reduction"], "module": f"body.layers.{i}"}
            for i in cfg.stages
        )
        # With whole cells of the coarsest map, every map covers the same pixels.
        self.size_multiple = self.feature_info[-1]["reduction"]
        self.make_head(self.feature_info[-1]["num_chs"])
        self.head.apply(init_weights)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        by_block = [(r"^body\.layers\.(\d+)\.downsample", (0,)), (r"^body\.layers\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^body\.patch_embed", "blocks": r"^body\.layers\.(\d+)" if coarse else by_block}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.body.set_grad_checkpointing(enable)

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        """(B, in_chans, H, W) normalised images -> maps of the padded image at strides 4, 8, 16 and 32."""
        self.check_images(x_BCHW)
        padded_BCHW = pad_to_multiple(x_BCHW, self.size_multiple)
        maps = self.body.forward_intermediates(padded_BCHW, indices=list(self.cfg.stages), intermediates_only=True)
        return self.pyramid(maps, x_BCHW, padded_BCHW)


SWIN_TINY = SwinConfig()
TEST_SWIN = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=4, num_classes=10)

VARIANTS = {
    "swin_tiny": Variant(SWIN_TINY, params=27_517_818),
    "test_swin": Variant(TEST_SWIN),
}

register_family(Family(name="swin", build=Swin, variants=VARIANTS, pretrained=PRETRAINED))
