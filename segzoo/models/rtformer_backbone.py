"""RTFormer's dual-resolution backbone (Wang et al., NeurIPS 2022, arXiv 2210.07124).

What the released code computes (github.com/PaddlePaddle/PaddleSeg @d7975e7, `rtformer.py`): a residual stem down to
stride 16, then a high branch at stride 8 beside a low branch at stride 32 in two RTFormer blocks. Where it differs
from the paper: RTFormer-Slim for Cityscapes has a 12 x 12 cross-resolution grid and injects high into low in both
blocks (paper: 8 x 8, first block only), and the scale of the cross-resolution attention follows the grid's side
(paper: the channels). Its BatchNorm moves 90 % of the way to the batch statistics in every step, with the biased
variance.

What segzoo changed: the cross-resolution attention is a batched matmul through the fused kernel instead of
batch-grouped convolutions, so that any batch size works; maps are channels-last throughout. Ours is the ImageNet head
(mean pool of the low branch + Linear: none was released). What the paper compares its parts with is in
`rtformer_baselines.py`, the weights in `rtformer_weights.py`.

B batch, C channels, H, W map, N its tokens, M learned keys or cells of the cross-resolution grid, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.batch_norm import BatchNorm, conv_norm, norm_act_conv
from ..layers.init import init_weights
from ..layers.norm_folding import absorb, scale_and_shift
from ..layers.reduction import GridReduction
from ..layers.shapes import resize, to_channels_first, to_channels_last
from .base import JOINS_PREVIOUS, NOT_MEASURED, BlockSequence, Encoder, Pyramid
from .config import EncoderConfig
from .family import Family, PublishedCost, Variant, register_family
from .features import FeatureInfo
from .rtformer_baselines import (
    ExternalAttention,
    LinformerAttention,
    MixFeedForward,
    MultiHeadAttention,
    NystromAttention,
)
from .rtformer_weights import BACKBONE_LAYOUTS, BACKBONE_PRETRAINED

BASELINES = ("external", "self", "linformer", "nystrom")
ATTENTION = ("gfa+ca", "gfa+gfa", *BASELINES)
FEED_FORWARD = ("conv3x3", "mix")


def by_branch(value: int | tuple[int, int]) -> tuple[int, int]:
    """An option of the (low, high) branch; one number is for both."""
    return value if isinstance(value, tuple) else (value, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTFormerBackboneConfig(EncoderConfig):
    """Configuration of the backbone. From `injection` to `mlp_ratio` it spans the paper's ablations (Table 5)."""

    base_chans: int = 32  # channels C at stride 4; the high branch has 2C, the low branch 8C
    depths: tuple[int, int, int] = (2, 2, 2)  # residual blocks at strides 4, 8 and 16
    injection: tuple[bool, bool] = (True, True)  # high branch into the low one at the end of the two RTFormer blocks
    attention: str = "gfa+ca"  # low branch + high branch, or "gfa+gfa"; or one of BASELINES in both
    groups: int | tuple[int, int] = 8  # normalisation groups of gfa, heads of the baselines; two: (low, high) branch
    cross_size: int = 12  # side of the cross-resolution grid; also sets the scale of that attention
    external_ratio: float = 1.0  # external: memory units = ratio * channels, shared by the heads
    spatial_reduction: int | tuple[int, int] = 1  # self: stride of keys and values; two: (low, high) branch
    linformer_rank: int = 256  # linformer: sums of keys and of values
    linformer_size: tuple[int, int] = (512, 512)  # linformer: image (H, W) in pixels that its sums are trained for
    landmark_side: int = 8  # nystrom: side of the grid of landmarks
    feed_forward: str = "conv3x3"  # "conv3x3": two of them; "mix": Linear, depthwise 3x3, Linear
    mlp_ratio: float = 4.0  # mix: hidden width / channels
    bn_momentum: float = 0.9  # share of the batch statistics in the running ones (paddle calls this 0.1)
    drop_path_rate: float = 0.2  # the same in every place

    @property
    def high_chans(self) -> int:
        return 2 * self.base_chans

    @property
    def low_chans(self) -> int:
        return 8 * self.base_chans

    @property
    def map_chans(self) -> tuple[int, ...]:
        return (self.base_chans, self.high_chans, 4 * self.base_chans, self.low_chans)

    def check(self) -> None:
        super().check()
        self.require_choice("attention", ATTENTION)
        self.require_choice("feed_forward", FEED_FORWARD)
        self.require_positive("base_chans", "depths", "cross_size", "groups", "external_ratio", "spatial_reduction")
        self.require_positive("linformer_rank", "linformer_size", "landmark_side", "mlp_ratio")
        widths = {"low branch": self.low_chans, "high branch": self.high_chans}
        for (branch, width), groups in zip(widths.items(), by_branch(self.groups), strict=True):
            has_none = branch == "high branch" and self.attention == "gfa+ca"
            divides = width % groups == 0 or has_none
            self.require(divides, f"groups={self.groups} must divide the channels of the {branch} ({width})")

    def build(self) -> RTFormerBackbone:
        return RTFormerBackbone(self)


# --- residual blocks ------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, *, in_chans: int, chans: int, stride: int, final_act: bool):
        super().__init__()
        self.conv1 = conv_norm(in_chans, chans, 3, stride, act=True)
        self.conv2 = conv_norm(chans, chans, 3)
        keeps_shape = stride == 1 and in_chans == chans
        self.shortcut = nn.Identity() if keeps_shape else conv_norm(in_chans, chans, 1, stride)
        self.act = nn.ReLU(inplace=True) if final_act else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.act(self.conv2(self.conv1(x_BCHW)) + self.shortcut(x_BCHW))


def residual_layer(in_chans: int, chans: int, depth: int, stride: int) -> BlockSequence:
    """Residual blocks; the last of several leaves its ReLU to whoever reads the map."""
    return BlockSequence(
        *(
            ResidualBlock(
                in_chans=chans if i else in_chans,
                chans=chans,
                stride=1 if i else stride,
                final_act=i == 0 or i < depth - 1,
            )
            for i in range(depth)
        )
    )


# --- attention ------------------------------------------------------------------------------------------------------
# Each takes (own map, other branch's map), both (B, C, H, W), and returns a map like its own at its stride.


class GPUFriendlyAttention(nn.Module):
    """Attention to learned keys and values with grouped double normalisation instead of heads (section 3.1).

    Scores are soft-maxed over space, then divided by their sum over the channels of each group. One matrix product
    each for all groups.

    Args:
        inner: number of learned keys; `groups` divides it.
    """

    def __init__(self, *, in_chans: int, chans: int, inner: int, groups: int, stride: int = 1):
        super().__init__()
        self.groups = groups
        # The learned keys are a 1x1 convolution, so that the norm before them folds like any other.
        keys = nn.Conv2d(in_chans, inner, 1, stride, bias=False)
        self.keys = nn.Sequential(OrderedDict(bn=BatchNorm(in_chans), conv=keys))
        self.values = nn.Linear(inner, chans, bias=False)
        for weight in (keys.weight, self.values.weight):
            nn.init.normal_(weight, std=0.001)

    def forward(self, x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        score_BHWM = to_channels_last(self.keys(x_BCHW))
        score_BNM = score_BHWM.flatten(1, 2).softmax(dim=1)
        score_BNGM = score_BNM.unflatten(-1, (self.groups, -1))
        score_BNGM = score_BNGM / (score_BNGM.sum(dim=-1, keepdim=True) + 1e-6)
        out_BNC = self.values(score_BNGM.flatten(2))
        return to_channels_first(out_BNC.unflatten(1, score_BHWM.shape[1:3]))


class CrossResolutionAttention(nn.Module):
    """High-resolution queries attend to a small grid of the low-resolution map, without heads (section 3.2).

    The grid's side is the inference-reduction leaf's; the scale of the scores stays at the trained side.
    """

    def __init__(self, *, chans: int, low_chans: int, cross_size: int):
        super().__init__()
        self.scale = 1 / cross_size
        self.norm = BatchNorm(chans)
        self.grid = GridReduction(part="encoder", trained=cross_size)
        self.kv_norm: nn.Module = BatchNorm(low_chans)
        self.kv = nn.Conv2d(low_chans, 2 * chans, 1, bias=False)
        nn.init.trunc_normal_(self.kv.weight, std=0.02)

    def forward(self, x_BCHW: Tensor, low_BCHW: Tensor) -> Tensor:
        q_BHWC = to_channels_last(self.norm(x_BCHW))
        kv_BCHW = self.kv(F.adaptive_max_pool2d(self.kv_norm(low_BCHW), self.grid()))
        k_BMC, v_BMC = to_channels_last(kv_BCHW).flatten(1, 2).chunk(2, dim=-1)
        out_BNC = attend(q_BHWC.flatten(1, 2), k_BMC, v_BMC, num_heads=1, scale=self.scale)
        return to_channels_first(out_BNC.unflatten(1, q_BHWC.shape[1:3]))

    def folded(self) -> nn.Module:
        # A maximum commutes with an increasing map, so the norm moves behind the pool unless a scale is negative.
        if isinstance(self.kv_norm, BatchNorm) and bool((scale_and_shift(self.kv_norm)[0] >= 0).all()):
            self.kv, self.kv_norm = absorb(self.kv_norm, self.kv), nn.Identity()
        return self


def make_attention(cfg: RTFormerBackboneConfig, *, in_chans: int, chans: int, high: bool) -> nn.Module:
    """The attention of the high or the low branch; one that widens its map also halves it."""
    shape: dict[str, int] = {"in_chans": in_chans, "chans": chans, "stride": 1 if in_chans == chans else 2}
    groups = by_branch(cfg.groups)[high]
    if cfg.attention == "external":
        memory = max(1, int(cfg.external_ratio * chans))
        return ExternalAttention(**shape, memory=memory, num_heads=groups)
    if cfg.attention == "self":
        return MultiHeadAttention(**shape, num_heads=groups, reduction=by_branch(cfg.spatial_reduction)[high])
    if cfg.attention == "linformer":
        in_stride = 8 if high else 32 // shape["stride"]
        H, W = (-(-side // in_stride) for side in cfg.linformer_size)
        return LinformerAttention(**shape, num_heads=groups, rank=cfg.linformer_rank, grid=(H, W))
    if cfg.attention == "nystrom":
        return NystromAttention(**shape, num_heads=groups, side=cfg.landmark_side)
    if cfg.attention == "gfa+ca" and high:
        return CrossResolutionAttention(chans=chans, low_chans=cfg.low_chans, cross_size=cfg.cross_size)
    return GPUFriendlyAttention(**shape, inner=chans, groups=groups)


# --- the RTFormer block ---------------------------------------------------------------------------------------------


class ConvFeedForward(nn.Module):
    """Two 3x3 convolutions without expansion, cheap on GPUs (section 3.2): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, *, chans: int):
        super().__init__()
        self.norm = BatchNorm(chans, eps=1e-6)
        self.conv1 = nn.Conv2d(chans, chans, 3, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(chans, chans, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(self.norm(x_BCHW))))


def make_feed_forward(cfg: RTFormerBackboneConfig, chans: int) -> nn.Module:
    if cfg.feed_forward == "mix":
        return MixFeedForward(chans=chans, mlp_ratio=cfg.mlp_ratio)
    return ConvFeedForward(chans=chans)


class RTFormerBlock(nn.Module):
    """(high, low) -> (high, low): the low branch first, then the high branch, which attends to it (Figure 2).

    Shape: high (B, 2C, H, W) keeps its shape; low (B, C_low, h, w) -> (B, 8C, h, w), halved if it gets wider.

    Args:
        shortcut_low: around the low attention, with its stride and channels.
        compress: low map -> channels of the high one.
        inject: high map -> a map like the low one, or None.
    """

    def __init__(
        self,
        *,
        shortcut_low: nn.Module,
        attn_low: nn.Module,
        mlp_low: nn.Module,
        compress: nn.Module,
        attn_high: nn.Module,
        mlp_high: nn.Module,
        inject: nn.Module | None,
        drop_path_rate: float,
    ):
        super().__init__()
        self.shortcut_low = shortcut_low
        self.attn_low = attn_low
        self.mlp_low = mlp_low
        self.compress = compress
        self.attn_high = attn_high
        self.mlp_high = mlp_high
        self.inject = inject
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        high_BCHW, low_BCHW = (F.relu(map_BCHW) for map_BCHW in maps)
        low_BCHW = self.shortcut_low(low_BCHW) + self.drop_path(self.attn_low(low_BCHW, high_BCHW))
        low_BCHW = low_BCHW + self.drop_path(self.mlp_low(low_BCHW))
        high_BCHW = high_BCHW + resize(self.compress(low_BCHW), high_BCHW.shape[2:])
        high_BCHW = high_BCHW + self.drop_path(self.attn_high(high_BCHW, low_BCHW))
        high_BCHW = high_BCHW + self.drop_path(self.mlp_high(high_BCHW))
        if self.inject is not None:
            low_BCHW = low_BCHW + self.inject(high_BCHW)
        return high_BCHW, low_BCHW


def make_shortcut(in_chans: int, chans: int) -> nn.Module:
    """Around an attention, with its stride: as the attention, one that widens its map also halves it."""
    if in_chans == chans:
        return nn.Identity()
    conv = nn.Conv2d(in_chans, chans, 1, 2, bias=False)
    return nn.Sequential(OrderedDict(bn=BatchNorm(in_chans), conv=conv))


def make_block(cfg: RTFormerBackboneConfig, *, low_in_chans: int, injection: bool) -> RTFormerBlock:
    """A block of the parts that the config names."""
    chans, low_chans = cfg.high_chans, cfg.low_chans
    return RTFormerBlock(
        shortcut_low=make_shortcut(low_in_chans, low_chans),
        attn_low=make_attention(cfg, in_chans=low_in_chans, chans=low_chans, high=False),
        mlp_low=make_feed_forward(cfg, low_chans),
        compress=norm_act_conv(low_chans, chans),
        attn_high=make_attention(cfg, in_chans=chans, chans=chans, high=True),
        mlp_high=make_feed_forward(cfg, chans),
        inject=nn.Sequential(
            *norm_act_conv(chans, low_chans // 2, 3, 2), *norm_act_conv(low_chans // 2, low_chans, 3, 2)
        )
        if injection
        else None,
        drop_path_rate=cfg.drop_path_rate,
    )


def init_kaiming(module: nn.Module) -> None:
    """For `module.apply`: convolutions by fan-in, biases zero; the rest keeps its own initialisation."""
    if isinstance(module, nn.Conv2d):
        fan_in = math.prod(module.kernel_size) * module.in_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise(model: nn.Module, bn_momentum: float) -> None:
    """As the official code: attention has small weights of its own, everything else is by fan-in."""
    blocks = [module for module in model.modules() if isinstance(module, RTFormerBlock)]
    attention = [attn for block in blocks for attn in (block.attn_low, block.attn_high)]
    keeps_own = {id(part) for attn in attention for part in attn.modules()}
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = bn_momentum
        if id(module) not in keeps_own:
            init_kaiming(module)


# --- encoder --------------------------------------------------------------------------------------------------------


class RTFormerBackbone(Encoder):
    """The dual-resolution backbone: maps at strides 4, 8 (the high branch), 16, 32 (the low branch), before any ReLU.

    The ImageNet head (mean pool of the low branch + Linear) is ours: the official backbones come without one.
    """

    key_layouts = BACKBONE_LAYOUTS
    first_conv = "stem.0.conv.weight"
    # Of the side of the cross-resolution grid; the paper has no such presets.
    reduction_presets = {"base": {}, "optimal": {"encoder.grid": 2}, "fast": {"encoder.grid": 4}}
    preset_accuracy = {"base": "as trained", "optimal": NOT_MEASURED, "fast": NOT_MEASURED}

    def __init__(self, cfg: RTFormerBackboneConfig):
        super().__init__(cfg=cfg)
        chans = cfg.base_chans
        self.stem = nn.Sequential(
            conv_norm(cfg.in_chans, chans, 3, 2, bias=True, act=True),
            conv_norm(chans, chans, 3, 2, bias=True, act=True),
        )
        self.layer1 = residual_layer(chans, chans, cfg.depths[0], 1)
        self.layer2 = residual_layer(chans, 2 * chans, cfg.depths[1], 2)
        self.layer3 = residual_layer(2 * chans, 4 * chans, cfg.depths[2], 2)
        self.compress3 = norm_act_conv(4 * chans, 2 * chans)
        self.layer3_high = residual_layer(2 * chans, 2 * chans, 1, 1)
        self.blocks = BlockSequence(
            make_block(cfg, low_in_chans=4 * chans, injection=cfg.injection[0]),
            make_block(cfg, low_in_chans=8 * chans, injection=cfg.injection[1]),
        )
        self.feature_info = FeatureInfo(
            (
                {"num_chs": chans, "reduction": 4, "module": "layer1"},
                {"num_chs": 2 * chans, "reduction": 8, "module": "blocks"},
                {"num_chs": 4 * chans, "reduction": 16, "module": "layer3"},
                {"num_chs": 8 * chans, "reduction": 32, "module": "blocks"},
            )
        )
        self.make_head(8 * chans)
        self.head.apply(init_weights)
        initialise(self, cfg.bn_momentum)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        index = "" if coarse else r"\.(\d+)"
        layer3 = [(rf"^layer3{index or '.'}", None), (r"^(?:compress3|layer3_high)", JOINS_PREVIOUS)]
        layers = {f"layer{i}": rf"^layer{i}{index}" for i in (1, 2)}
        return {"stem": r"^stem", **layers, "layer3": layer3, "blocks": r"^blocks\.(\d+)"}

    def forward_branches(self, x_BCHW: Tensor) -> tuple[Pyramid, Tensor]:
        """(B, in_chans, H, W) -> the maps of `forward_features`, and the high branch before the RTFormer blocks."""
        self.check_images(x_BCHW)
        # Channels-last from the start, which convolutions prefer and which makes every token view free of copies.
        image_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        stride4_BCHW = self.layer1(self.stem(image_BCHW))
        stride8_BCHW = self.layer2(F.relu(stride4_BCHW))
        stride16_BCHW = self.layer3(F.relu(stride8_BCHW))
        high_BCHW = stride8_BCHW + resize(self.compress3(stride16_BCHW), stride8_BCHW.shape[2:])
        entry_BCHW = self.layer3_high(F.relu(high_BCHW))
        high_BCHW, low_BCHW = self.blocks((entry_BCHW, stride16_BCHW))
        return self.pyramid((stride4_BCHW, high_BCHW, stride16_BCHW, low_BCHW), x_BCHW, x_BCHW), entry_BCHW

    def forward_features(self, x_BCHW: Tensor) -> Pyramid:
        return self.forward_branches(x_BCHW)[0]


# --- variants -------------------------------------------------------------------------------------------------------

RTFORMER_SLIM_BACKBONE = RTFormerBackboneConfig()
RTFORMER_BASE_BACKBONE = RTFormerBackboneConfig(base_chans=64)
TEST_RTFORMER_BACKBONE = RTFormerBackboneConfig(base_chans=8, depths=(1, 2, 1), cross_size=4, groups=4)

_WHY = (
    "the paper counts its own ImageNet head, which was not released (ours is a mean and one Linear), and leaves out "
    "both attentions' matmuls and the learned keys and values"
)
VARIANTS = {
    "rtformer_slim_backbone": Variant(
        RTFORMER_SLIM_BACKBONE,
        params=4_655_240,
        published=(PublishedCost((224, 224), gmacs=0.8, params_m=5.3, why=_WHY),),
    ),
    "rtformer_base_backbone": Variant(
        RTFORMER_BASE_BACKBONE,
        params=18_085_160,
        published=(PublishedCost((224, 224), gmacs=3.0, params_m=20.5, why=_WHY),),
    ),
}

register_family(
    Family(name="rtformer_backbone", build=RTFormerBackbone, variants=VARIANTS, pretrained=BACKBONE_PRETRAINED)
)
