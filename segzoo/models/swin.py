"""Swin, the shifted-window transformer, as a pyramid encoder (Liu et al., ICCV 2021, arXiv 2103.14030).

What timm's code computes (`swin_transformer.py`, whose weights load): patches of 4x4 pixels with a norm; between stages
2x2 tokens are concatenated, normed and projected to twice the channels; a map is moved first and then padded with zeros
to whole windows, so that the padding takes part in attention; parts that the move brought together are kept apart by
-100. Outputs of stages are taken without a final norm.

What segzoo changed: any image size is taken (zero-padded at the bottom and right to whole cells of the coarsest map),
windows are moved in all stages, as at sizes larger than the 224 pixels of the published weights, and each window may
have fewer keys and values (its position bias is averaged over the cells). Biases of other windows are resized
bicubically when weights are loaded. The ImageNet head is ours: timm's sits on the final norm.

Licence of the published weights (timm, Microsoft): MIT.

Shape letters: B batch, C channels, H, W map, S side of a window, G windows of a map, V windows of a batch, N query
tokens and M key and value tokens of a window, L heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.block import BlockSequence
from ..layers.grids import fit_grid, pad_to_multiple
from ..layers.init import init_weights
from ..layers.reduction import WindowReduction
from ..layers.shapes import ceil_div, to_channels_first, to_channels_last
from .base import NOT_MEASURED, Encoder, Pyramid, pyramid_groups
from .config import EncoderConfig
from .family import Family, Variant, register_family
from .features import FeatureInfo
from .keys import StateDict
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


class PatchEmbed(nn.Module):
    """Linear embedding of 4x4 pixels, and its norm: (B, C_in, H, W) -> (B, H / 4, W / 4, C)."""

    def __init__(self, *, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, 4, 4)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(to_channels_last(self.proj(x_BCHW)))


class PatchMerging(nn.Module):
    """2x2 tokens become one of twice the channels: (B, C, H, W) -> (B, H / 2, W / 2, 2 C), both sides being even."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        cells_BHhWwC = to_channels_last(x_BCHW).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # Upper left, lower left, upper right, lower right.
        return self.proj(self.norm(cells_BHhWwC.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class ShiftedWindowAttention(nn.Module):
    """Multi-head attention inside windows of S x S tokens, with a learned bias for each relative position.

    Owns a leaf that gives each window fewer keys and values.

    Shape: (B, H, W, C) -> (B, H, W, C).

    Args:
        side: of a window, in tokens.
        shift: tokens by which the windows are moved, down and to the right; 0 for none.
    """

    def __init__(self, *, dim: int, num_heads: int, side: int, shift: int, level: int):
        super().__init__()
        self.num_heads = num_heads
        self.side = side
        self.shift = shift
        self.position_bias = nn.Parameter(torch.empty(2 * side - 1, 2 * side - 1, num_heads))
        self.kv_reduction = WindowReduction(part="encoder", level=level)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # keys, then values
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        H, W = x_BHWC.shape[1:3]
        if self.shift:
            x_BHWC = torch.roll(x_BHWC, (-self.shift, -self.shift), (1, 2))
        rows, columns = ceil_div(H, self.side), ceil_div(W, self.side)
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns * self.side - W, 0, rows * self.side - H))
        x_VSSC = to_windows(x_BHWC, self.side)
        k_VMC, v_VMC = self.kv(self.kv_reduction(x_VSSC)).chunk(2, dim=-1)
        q_VNC = self.q(x_VSSC.flatten(1, 2))
        mask_GNSS = shift_mask((rows, columns), side=self.side, shift=self.shift, like=q_VNC) if self.shift else None
        bias = self.kv_reduction.bias(self.bias_of_windows(), mask_GNSS, windows=len(q_VNC)).to(q_VNC.dtype)
        out_VNC = self.proj(attend(q_VNC, k_VMC, v_VMC, num_heads=self.num_heads, bias=bias))
        x_BHWC = from_windows(out_VNC.unflatten(1, (self.side, self.side)), (rows, columns))[:, :H, :W]
        return torch.roll(x_BHWC, (self.shift, self.shift), (1, 2)) if self.shift else x_BHWC

    def bias_of_windows(self) -> Tensor:
        """The learned bias of each query and key of a window: (L, N, S, S)."""
        step_S = torch.arange(self.side, device=self.position_bias.device)
        away_SS = step_S[:, None] - step_S + self.side - 1  # from key to query, at least 0
        bias_SSSSL = self.position_bias[away_SS[:, None, :, None], away_SS[None, :, None, :]]
        return bias_SSSSL.permute(4, 0, 1, 2, 3).flatten(1, 2)


def to_windows(x_BHWC: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (V, S, S, C), image by image and row by row; both sides of the map are multiples of S."""
    cells_BHSWSC = x_BHWC.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return cells_BHSWSC.transpose(2, 3).flatten(0, 2)


def from_windows(x_VSSC: Tensor, windows: tuple[int, int]) -> Tensor:
    """The way back: (V, S, S, C) -> (B, H, W, C), of `windows` = (rows, columns) of windows an image."""
    cells_BHWSSC = x_VSSC.unflatten(0, (-1, *windows))
    return cells_BHWSSC.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(windows: tuple[int, int], *, side: int, shift: int, like: Tensor) -> Tensor:
    """-100 between tokens that only the move by `shift` brought into one window, else 0: (G, N, S, S)."""

    def region(count: int) -> Tensor:
        """0, 1 or 2 for each row, or column: before the last window, in it, and in its part that came round."""
        row_H = torch.arange(count * side, device=like.device)
        return (row_H >= (count - 1) * side).int() + (row_H >= count * side - shift)

    rows, columns = windows
    region_HW = 3 * region(rows)[:, None] + region(columns)
    region_GSS = to_windows(region_HW[None, :, :, None], side)[..., 0]
    apart_GNSS = region_GSS.flatten(1)[:, :, None, None] != region_GSS[:, None]
    return -100 * apart_GNSS.to(like.dtype)


class SwinBlock(nn.Module):
    """Pre-norm attention and feed-forward on a (B, H, W, C) map."""

    def __init__(self, *, dim: int, num_heads: int, side: int, shift: int, level: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ShiftedWindowAttention(dim=dim, num_heads=num_heads, side=side, shift=shift, level=level)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(self.attn(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.mlp(self.norm2(x_BHWC)))


class SwinStage(nn.Module):
    """Fewer and wider tokens, then blocks, of which every second one moves its windows by half their side.

    Shape: (B, C_in, H, W) -> (B, C, H', W').

    Args:
        patch_embed: (B, C_in, H, W) -> (B, H', W', C).
        drop_path: rate of each block.
    """

    def __init__(
        self, *, patch_embed: nn.Module, dim: int, num_heads: int, side: int, level: int, drop_path: Sequence[float]
    ):
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = BlockSequence(
            *(
                SwinBlock(
                    dim=dim,
                    num_heads=num_heads,
                    side=side,
                    shift=side // 2 if i % 2 else 0,
                    level=level,
                    drop_path=rate,
                )
                for i, rate in enumerate(drop_path)
            )
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return to_channels_first(self.blocks(self.patch_embed(x_BCHW)))


class Swin(Encoder):
    """Swin transformer of any image size: maps at strides 4, 8, 16 and 32, without a final norm.

    Compile it with `dynamic=False`: torch's symbolic shapes do not get through the windows in reasonable time.
    """

    key_layouts = LAYOUTS
    any_size_graph = False
    first_conv = "stages.0.patch_embed.proj.weight"
    # Of the keys and values in each window, stage by stage; the paper has no such presets.
    reduction_presets = {"base": {}, "optimal": {"encoder.0": 2, "encoder.1": 2}, "fast": {"encoder": 2}}
    preset_accuracy = {"base": "as trained", "optimal": NOT_MEASURED, "fast": NOT_MEASURED}

    def __init__(self, cfg: SwinConfig):
        super().__init__(cfg=cfg)
        drop_path = cast(
            list[list[float]], calculate_drop_path_rates(cfg.drop_path_rate, list(cfg.depths), stagewise=True)
        )
        dims = [cfg.embed_dim * 2**i for i in range(len(cfg.depths))]
        self.stages = nn.ModuleList(
            SwinStage(
                patch_embed=PatchMerging(dim=dims[i - 1])
                if i
                else PatchEmbed(in_chans=cfg.in_chans, embed_dim=cfg.embed_dim),
                dim=dims[i],
                num_heads=cfg.num_heads[i],
                side=cfg.window_size,
                level=i,
                drop_path=drop_path[i],
            )
            for i in range(len(cfg.depths))
        )
        self.feature_info = FeatureInfo(
            {"num_chs": dims[i], "reduction": 4 * 2**i, "module": f"stages.{i}"} for i in cfg.stages
        )
        # With whole cells of the coarsest map, every map covers the same pixels.
        self.size_multiple = self.feature_info[-1]["reduction"]
        self.make_head(self.feature_info[-1]["num_chs"])
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".position_bias")}  # as timm

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return pyramid_groups(coarse)

    def fit_state(self, state: StateDict) -> StateDict:
        """Position biases get their grid, and those made for another window are resized."""
        for name in self.no_weight_decay():
            state = fit_grid(state, name, self.get_parameter(name))
        return state

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        """(B, in_chans, H, W) normalised images -> maps of the padded image at strides 4, 8, 16 and 32."""
        self.check_images(x_BCHW)
        padded_BCHW = pad_to_multiple(x_BCHW, self.size_multiple)
        map_BCHW = padded_BCHW.contiguous(memory_format=torch.channels_last)
        maps = []
        for i in range(self.cfg.stages[-1] + 1):
            map_BCHW = self.stages[i](map_BCHW)
            if i in self.cfg.stages:
                maps.append(map_BCHW)
        return self.pyramid(maps, x_BCHW, padded_BCHW)


SWIN_TINY = SwinConfig()
TEST_SWIN = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=4, num_classes=10)

VARIANTS = {
    "swin_tiny": Variant(SWIN_TINY, params=27_517_818),
    "test_swin": Variant(TEST_SWIN),
}

register_family(Family(name="swin", build=Swin, variants=VARIANTS, pretrained=PRETRAINED))
