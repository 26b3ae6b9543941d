"""RTFormer: a real-time dual-resolution transformer (Wang et al., NeurIPS 2022, arXiv 2210.07124).

What the released code computes (github.com/PaddlePaddle/PaddleSeg @d7975e7, `rtformer.py`): a residual stem down to
stride 16; a high branch at stride 8 beside a low branch at stride 32 in two RTFormer blocks; DAPPM on the low branch;
a head on both branches at stride 8 and an auxiliary head on the high branch before the blocks. Where it differs from
the paper: RTFormer-Slim for Cityscapes has a 12 x 12 cross-resolution grid and injects high into low in both blocks
(paper: 8 x 8, first block only), and the scale of the cross-resolution attention follows the grid's side (paper: the
channels). Its BatchNorm moves 90 % of the way to the batch statistics in every step, with the biased variance.

What segzoo changed: the cross-resolution attention is a batched matmul through the fused kernel instead of
batch-grouped convolutions, so that any batch size works; maps are channels-last throughout; the auxiliary head is in
`forward_train` only. Ours are the ImageNet head of the backbones (mean pool of the low branch + Linear: none was
released) and the query projections and strides of the `external` and `multi_head` ablations, where the paper is silent.

Licence of the published weights: Apache-2.0 (PaddleSeg).
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.attention import attend
from ..layers.init import init_weights
from ..layers.mlp import ConvMlp
from ..layers.norm_folding import fold_norm_before, scale_and_shift
from ..layers.reduction import GridReduction
from ..layers.shapes import resize, to_channels_first, to_channels_last
from .base import BlockSequence, Encoder, SegmentationModel, fresh_conv_classifier
from .family import Family, PublishedCost, Variant, register_family
from .keys import Drop, Layout, Rename, Squeeze
from .rows import PretrainedCfg

LOW_ATTENTION = ("gpu_friendly", "external", "multi_head")
HIGH_ATTENTION = ("cross", *LOW_ATTENTION)
FEED_FORWARD = ("conv3x3", "mix")


@dataclasses.dataclass(frozen=True)
class RTFormerBackboneConfig:
    """Configuration of the backbone. From `injection` to `mlp_ratio` it spans the paper's ablations (Table 5)."""

    base_chans: int = 32  # channels C at stride 4; the high branch has 2C, the low branch 8C
    depths: tuple[int, int, int] = (2, 2, 2)  # residual blocks at strides 4, 8 and 16
    injection: tuple[bool, bool] = (True, True)  # high branch into the low one at the end of the two RTFormer blocks
    attention_low: str = "gpu_friendly"  # "gpu_friendly" | "external" | "multi_head"
    attention_high: str = "cross"  # "cross" or one of the kinds of the low branch
    groups: int = 8  # normalisation groups of gpu_friendly, heads of external and multi_head
    cross_size: int = 12  # side of the cross-resolution grid; also sets the scale of that attention
    external_ratio: float = 1.0  # external: memory units = ratio * channels, shared by the heads
    feed_forward: str = "conv3x3"  # "conv3x3": two of them; "mix": Linear, depthwise 3x3, Linear
    mlp_ratio: float = 4.0  # mix: hidden width / channels
    bn_momentum: float = 0.9  # share of the batch statistics in the running ones (paddle calls this 0.1)
    drop_path_rate: float = 0.2  # the same in every place
    in_chans: int = 3
    num_classes: int = 1000  # 0: pooled features

    def __post_init__(self) -> None:
        kinds = (
            ("attention_low", LOW_ATTENTION),
            ("attention_high", HIGH_ATTENTION),
            ("feed_forward", FEED_FORWARD),
        )
        for name, valid in kinds:
            if getattr(self, name) not in valid:
                raise SegzooError(f"{name} must be one of {', '.join(valid)}, not {getattr(self, name)!r}")
        if isinstance(self.cross_size, bool) or not isinstance(self.cross_size, int) or self.cross_size < 1:
            raise SegzooError(f"cross_size must be a whole number of at least 1, not {self.cross_size!r}")
        if len(self.injection) != 2 or len(self.depths) != 3:
            raise SegzooError(
                f"injection takes two entries and depths three, not {self.injection!r} and {self.depths!r}"
            )
        widths = {
            "channels of the low branch": (self.attention_low, 8 * self.base_chans),
            "channels of the high branch": (self.attention_high, 2 * self.base_chans),
            "cross_size ** 2": (self.attention_high, self.cross_size**2),
        }
        for what, (kind, width) in widths.items():
            uses_groups = kind == "gpu_friendly" if what.startswith("cross") else kind in LOW_ATTENTION
            if uses_groups and width % self.groups:
                raise SegzooError(f"groups={self.groups} must divide the {what} ({width}) for {kind} attention")


@dataclasses.dataclass(frozen=True)
class RTFormerConfig(RTFormerBackboneConfig):
    """Configuration of the segmentation model: the backbone's fields and the decoder's."""

    context_chans: int = 128  # inner channels of DAPPM
    head_chans: int = 64  # width of the auxiliary head; the main head has twice as many
    aux_head: bool = True  # auxiliary scores in forward_train
    num_classes: int = 19


# --- small parts --------------------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose running variance is that of the batch itself, as paddle's, not the unbiased estimate."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        self.num_batches_tracked.add_(1)
        mean_C, variance_C = self.running_mean.clone(), self.running_var.clone()
        out = F.batch_norm(x_BCHW, mean_C, variance_C, self.weight, self.bias, True, self.momentum, self.eps)
        with torch.no_grad():
            kept_C = (1 - self.momentum) * self.running_var
            count = x_BCHW.shape[0] * x_BCHW.shape[2] * x_BCHW.shape[3]
            self.running_var.copy_(kept_C + (variance_C - kept_C) * ((count - 1) / count))
            self.running_mean.copy_(mean_C)
        return out


def conv_norm(
    in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, *, bias: bool = False, act: bool = False
) -> nn.Sequential:
    """Convolution -> BatchNorm (-> ReLU)."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=bias)
    parts = OrderedDict(conv=conv, bn=BatchNorm(out_chans))
    return nn.Sequential(OrderedDict(parts, act=nn.ReLU(inplace=True)) if act else parts)


def norm_act_conv(in_chans: int, out_chans: int, kernel_size: int = 1, stride: int = 1) -> nn.Sequential:
    """BatchNorm -> ReLU -> convolution without bias."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(bn=BatchNorm(in_chans), act=nn.ReLU(inplace=True), conv=conv))


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


# --- attention ----------------------------------------------------------------------------------------------------
# Every kind takes (own map, other branch's map), both (B, C, H, W), and returns a map like its own at its stride.


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
        self.kv_norm = BatchNorm(low_chans)
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
        if bool((scale_and_shift(self.kv_norm)[0] >= 0).all()):
            self.kv, self.kv_norm = fold_norm_before(self.kv_norm, self.kv), nn.Identity()
        return self


class ExternalAttention(nn.Module):
    """Multi-head external attention (Guo et al., arXiv 2105.02358), the paper's baseline: a memory shared by the heads.

    Scores are soft-maxed over space, then divided by their sum over the memory.
    """

    def __init__(self, *, in_chans: int, chans: int, memory: int, num_heads: int, stride: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Sequential(
            OrderedDict(bn=BatchNorm(in_chans), conv=nn.Conv2d(in_chans, chans, 1, stride, bias=False))
        )
        self.keys = nn.Linear(chans // num_heads, memory, bias=False)
        self.values = nn.Linear(memory, chans // num_heads, bias=False)
        self.proj = nn.Linear(chans, chans)

    def forward(self, x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        q_BHWC = to_channels_last(self.q(x_BCHW))
        score_BNhM = self.keys(q_BHWC.flatten(1, 2).unflatten(-1, (self.num_heads, -1))).softmax(dim=1)
        score_BNhM = score_BNhM / (score_BNhM.sum(dim=-1, keepdim=True) + 1e-6)
        out_BNC = self.proj(self.values(score_BNhM).flatten(2))
        return to_channels_first(out_BNC.unflatten(1, q_BHWC.shape[1:3]))


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention; with a stride, queries are taken at every second token, keys and values at all."""

    def __init__(self, *, in_chans: int, chans: int, num_heads: int, stride: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.stride = stride
        self.norm = BatchNorm(in_chans)
        self.q = nn.Linear(in_chans, chans)
        self.kv = nn.Linear(in_chans, 2 * chans)
        self.proj = nn.Linear(chans, chans)

    def forward(self, x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        x_BHWC = to_channels_last(self.norm(x_BCHW))
        q_BHWC = self.q(x_BHWC[:, :: self.stride, :: self.stride])
        k_BMC, v_BMC = self.kv(x_BHWC.flatten(1, 2)).chunk(2, dim=-1)
        out_BNC = self.proj(attend(q_BHWC.flatten(1, 2), k_BMC, v_BMC, num_heads=self.num_heads))
        return to_channels_first(out_BNC.unflatten(1, q_BHWC.shape[1:3]))

    def folded(self) -> nn.Module:
        self.q, self.kv = fold_norm_before(self.norm, self.q), fold_norm_before(self.norm, self.kv)
        self.norm = nn.Identity()
        return self


def make_attention(cfg: RTFormerBackboneConfig, kind: str, *, in_chans: int, chans: int, inner: int) -> nn.Module:
    """An attention of `kind`; one that widens its map also halves it."""
    shape: dict[str, int] = {"in_chans": in_chans, "chans": chans, "stride": 1 if in_chans == chans else 2}
    if kind == "gpu_friendly":
        return GPUFriendlyAttention(**shape, inner=inner, groups=cfg.groups)
    if kind == "external":
        return ExternalAttention(**shape, memory=max(1, int(cfg.external_ratio * chans)), num_heads=cfg.groups)
    if kind == "multi_head":
        return MultiHeadAttention(**shape, num_heads=cfg.groups)
    return CrossResolutionAttention(chans=chans, low_chans=8 * cfg.base_chans, cross_size=cfg.cross_size)


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


class MixFeedForward(nn.Module):
    """The usual feed-forward layer with a depthwise convolution, for comparison: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, *, chans: int, mlp_ratio: float):
        super().__init__()
        self.norm = BatchNorm(chans, eps=1e-6)
        self.mlp = ConvMlp(dim=chans, hidden_dim=int(chans * mlp_ratio))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return to_channels_first(self.mlp(to_channels_last(self.norm(x_BCHW))))

    def folded(self) -> nn.Module:
        self.mlp.fc1, self.norm = fold_norm_before(self.norm, self.mlp.fc1), nn.Identity()
        return self


def make_feed_forward(cfg: RTFormerBackboneConfig, chans: int) -> nn.Module:
    if cfg.feed_forward == "mix":
        return MixFeedForward(chans=chans, mlp_ratio=cfg.mlp_ratio)
    return ConvFeedForward(chans=chans)


class RTFormerBlock(nn.Module):
    """(high, low) -> (high, low): the low branch first, then the high branch, which attends to it (Figure 3).

    Shape: high (B, 2C, H, W) keeps its shape; low (B, C_low, h, w) -> (B, 8C, h, w), halved if it gets wider.
    """

    def __init__(self, *, cfg: RTFormerBackboneConfig, low_in_chans: int, injection: bool):
        super().__init__()
        chans, low_chans = 2 * cfg.base_chans, 8 * cfg.base_chans
        widens = low_in_chans != low_chans
        self.shortcut_low = (
            nn.Sequential(
                OrderedDict(bn=BatchNorm(low_in_chans), conv=nn.Conv2d(low_in_chans, low_chans, 1, 2, bias=False))
            )
            if widens
            else nn.Identity()
        )
        self.attn_low = make_attention(cfg, cfg.attention_low, in_chans=low_in_chans, chans=low_chans, inner=low_chans)
        self.mlp_low = make_feed_forward(cfg, low_chans)
        self.compress = norm_act_conv(low_chans, chans)
        self.attn_high = make_attention(cfg, cfg.attention_high, in_chans=chans, chans=chans, inner=cfg.cross_size**2)
        self.mlp_high = make_feed_forward(cfg, chans)
        self.inject = (
            nn.Sequential(*norm_act_conv(chans, low_chans // 2, 3, 2), *norm_act_conv(low_chans // 2, low_chans, 3, 2))
            if injection
            else None
        )
        self.drop_path = DropPath(cfg.drop_path_rate)

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


def init_kaiming(module: nn.Module) -> None:
    """For `module.apply`: convolutions by fan-in, biases zero; the rest keeps its own initialisation."""
    if isinstance(module, nn.Conv2d):
        fan_in = math.prod(module.kernel_size) * module.in_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise(model: nn.Module, bn_momentum: float) -> None:
    """As the official code: attention has small weights of its own, everything else is by fan-in."""
    keeps_own = (GPUFriendlyAttention, CrossResolutionAttention, ExternalAttention, MultiHeadAttention)
    inside = {id(part) for module in model.modules() if isinstance(module, keeps_own) for part in module.modules()}
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = bn_momentum
        if id(module) not in inside:
            init_kaiming(module)


# --- encoder --------------------------------------------------------------------------------------------------------

# The backbone's keys: official -> ours, both without prefix.
ENCODER_RULES = (
    Rename(r"\._mean$", ".running_mean"),
    Rename(r"\._variance$", ".running_var"),
    Rename(r"^conv1\.(0|3)\.", lambda m: f"stem.{int(m[1]) // 3}.conv."),
    Rename(r"^conv1\.(1|4)\.", lambda m: f"stem.{int(m[1]) // 3}.bn."),
    Rename(r"^layer3_\.", "layer3_high."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.conv([12])\.", r"\1.conv\2.conv."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.bn([12])\.", r"\1.conv\2.bn."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    Rename(r"^(layer[123](?:_high)?\.\d+)\.downsample\.1\.", r"\1.shortcut.bn."),
    Rename(r"^(compression3|layer[45]\.compression)\.0\.", r"\1.bn."),
    Rename(r"^(compression3|layer[45]\.compression)\.2\.", r"\1.conv."),
    Rename(r"^layer([45])\.", lambda m: f"blocks.{int(m[1]) - 4}."),
    Rename(r"^(blocks\.\d\.)compression\.", r"\1compress."),
    Rename(r"^compression3\.", "compress3."),
    Rename(r"\.attn_shortcut_l\.0\.", ".shortcut_low.bn."),
    Rename(r"\.attn_shortcut_l\.1\.", ".shortcut_low.conv."),
    Rename(r"\.attn_l\.norm\.", ".attn_low.keys.bn."),
    Rename(r"\.attn_l\.k$", ".attn_low.keys.conv.weight"),
    Rename(r"\.attn_l\.v$", ".attn_low.values.weight"),
    Squeeze(r"\.attn_low\.values\.weight$"),
    Rename(r"\.attn_h\.norm\.", ".attn_high.norm."),
    Rename(r"\.cross_kv\.0\.", ".attn_high.kv_norm."),
    Rename(r"\.cross_kv\.2\.", ".attn_high.kv."),
    Rename(r"\.mlp_l\.", ".mlp_low."),
    Rename(r"\.mlp_h\.", ".mlp_high."),
    Rename(r"\.down\.", ".inject."),
)
SIGNATURE = r"^layer4\.attn_l\.k$"


class RTFormerBackbone(Encoder):
    """The dual-resolution backbone: maps at strides 4, 8 (the high branch), 16, 32 (the low branch), before any ReLU.

    The ImageNet head (mean pool of the low branch + Linear) is ours: the official backbones come without one.
    """

    key_layouts = (
        Layout(
            "official",
            SIGNATURE,
            (
                Drop(r"^(spp|seghead|seghead_extra)\.", "the segmentation decoder, no part of the encoder"),
                *ENCODER_RULES,
            ),
        ),
    )
    first_conv = "stem.0.conv.weight"

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
            RTFormerBlock(cfg=cfg, low_in_chans=4 * chans, injection=cfg.injection[0]),
            RTFormerBlock(cfg=cfg, low_in_chans=8 * chans, injection=cfg.injection[1]),
        )
        self.feature_info = [
            {"num_chs": chans, "reduction": 4, "module": "layer1"},
            {"num_chs": 2 * chans, "reduction": 8, "module": "blocks"},
            {"num_chs": 4 * chans, "reduction": 16, "module": "layer3"},
            {"num_chs": 8 * chans, "reduction": 32, "module": "blocks"},
        ]
        self.make_head(8 * chans)
        self.head.apply(init_weights)
        initialise(self, cfg.bn_momentum)

    def forward_branches(self, x_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, in_chans, H, W) -> the maps of `forward_features`, and the high branch before the RTFormer blocks."""
        # Channels-last from the start, which convolutions prefer and which makes every token view free of copies.
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        stride4_BCHW = self.layer1(self.stem(x_BCHW))
        stride8_BCHW = self.layer2(F.relu(stride4_BCHW))
        stride16_BCHW = self.layer3(F.relu(stride8_BCHW))
        high_BCHW = stride8_BCHW + resize(self.compress3(stride16_BCHW), stride8_BCHW.shape[2:])
        entry_BCHW = self.layer3_high(F.relu(high_BCHW))
        high_BCHW, low_BCHW = self.blocks((entry_BCHW, stride16_BCHW))
        return [stride4_BCHW, high_BCHW, stride16_BCHW, low_BCHW], entry_BCHW

    def forward_features(self, x_BCHW: Tensor) -> list[Tensor]:
        return self.forward_branches(x_BCHW)[0]


# --- decoder --------------------------------------------------------------------------------------------------------


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling (Hong et al., arXiv 2101.06085): (B, C_in, h, w) -> (B, C_out, h, w).

    Average pools of growing size, each added to the level before it.
    """

    def __init__(self, *, in_chans: int, inner_chans: int, out_chans: int):
        super().__init__()
        pools = [nn.AvgPool2d(2 * stride + 1, stride, padding=stride) for stride in (2, 4, 8)]
        self.point = norm_act_conv(in_chans, inner_chans)
        self.scales = nn.ModuleList(
            nn.Sequential(OrderedDict([("pool", pool), *norm_act_conv(in_chans, inner_chans).named_children()]))
            for pool in (*pools, nn.AdaptiveAvgPool2d(1))
        )
        self.process = nn.ModuleList(norm_act_conv(inner_chans, inner_chans, 3) for _ in self.scales)
        self.compress = norm_act_conv(inner_chans * (1 + len(self.scales)), out_chans)
        self.shortcut = norm_act_conv(in_chans, out_chans)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        levels = [self.point(x_BCHW)]
        for scale, process in zip(self.scales, self.process, strict=True):
            levels.append(process(resize(scale(x_BCHW), x_BCHW.shape[2:]) + levels[-1]))
        return self.compress(torch.cat(levels, dim=1)) + self.shortcut(x_BCHW)


class SegmentationHead(nn.Sequential):
    """BatchNorm -> ReLU -> 3x3 convolution -> BatchNorm -> ReLU -> 1x1 classifier."""

    def __init__(self, *, in_chans: int, inner_chans: int, num_classes: int):
        super().__init__(
            OrderedDict(
                bn1=BatchNorm(in_chans),
                act1=nn.ReLU(inplace=True),
                conv=nn.Conv2d(in_chans, inner_chans, 3, padding=1, bias=False),
                bn2=BatchNorm(inner_chans),
                act2=nn.ReLU(inplace=True),
                classifier=nn.Conv2d(inner_chans, num_classes, 1),
            )
        )


class RTFormerDecoder(nn.Module):
    """Context of the low branch joins the high branch: (high, low) -> scores (B, K, H, W) at the high branch's grid."""

    def __init__(self, *, cfg: RTFormerConfig):
        super().__init__()
        chans, low_chans = 2 * cfg.base_chans, 8 * cfg.base_chans
        self.context = DAPPM(in_chans=low_chans, inner_chans=cfg.context_chans, out_chans=chans)
        self.head = SegmentationHead(in_chans=2 * chans, inner_chans=2 * cfg.head_chans, num_classes=cfg.num_classes)
        self.aux_heads = nn.ModuleList(
            [SegmentationHead(in_chans=chans, inner_chans=cfg.head_chans, num_classes=cfg.num_classes)]
            if cfg.aux_head
            else []
        )
        initialise(self, cfg.bn_momentum)

    def forward(self, high_BCHW: Tensor, low_BCHW: Tensor) -> Tensor:
        context_BCHW = resize(self.context(low_BCHW), high_BCHW.shape[2:])
        return self.head(torch.cat([high_BCHW, context_BCHW], dim=1))


DECODER_RULES = (
    Rename(r"^spp\.scale0\.(\d)\.", lambda m: f"decoder.context.point.{m[1]}."),
    Rename(r"^spp\.scale([1-4])\.(\d)\.", lambda m: f"decoder.context.scales.{int(m[1]) - 1}.{int(m[2]) - 1}."),
    Rename(r"^spp\.process([1-4])\.(\d)\.", lambda m: f"decoder.context.process.{int(m[1]) - 1}.{m[2]}."),
    Rename(r"^spp\.(compression|shortcut)\.(\d)\.", lambda m: f"decoder.context.{m[1]}.{m[2]}."),
    Rename(r"^(decoder\.context\..*?)\.0\.(?=[a-z_]+$)", r"\1.bn."),
    Rename(r"^(decoder\.context\..*?)\.2\.(?=[a-z_]+$)", r"\1.conv."),
    Rename(r"^decoder\.context\.compression\.", "decoder.context.compress."),
    Rename(r"^seghead\.", "decoder.head."),
    Rename(r"^seghead_extra\.", "decoder.aux_heads.0."),
    Rename(r"^(decoder\.(?:head|aux_heads\.0))\.conv1\.", r"\1.conv."),
    Rename(r"^(decoder\.(?:head|aux_heads\.0))\.conv2\.", r"\1.classifier."),
)


class RTFormer(SegmentationModel):
    """The backbone and its decoder; scores at stride 8.

    Args:
        encoder: a RTFormerBackbone.
        decoder: a RTFormerDecoder made for its channels.
    """

    key_layouts = (
        Layout(
            "official",
            SIGNATURE,
            (
                *ENCODER_RULES,
                *DECODER_RULES,
                Rename(r"^(stem|layer[123]|layer3_high|compress3|blocks)\.", r"encoder.\1."),
            ),
        ),
    )
    first_conv = f"encoder.{RTFormerBackbone.first_conv}"

    def __init__(self, *, encoder: RTFormerBackbone, decoder: RTFormerDecoder, cfg: RTFormerConfig):
        super().__init__(cfg=cfg)
        self.encoder = encoder
        self.decoder = decoder

    def forward_head(self, features: Sequence[Tensor]) -> Tensor:
        """Maps -> logits (B, K, H / 8, W / 8); reads the high and the low branch."""
        return self.decoder(features[1], features[3])

    def forward_train(self, x_BCHW: Tensor) -> dict[str, Any]:
        """{"scores": (B, K, H, W), "aux": [the auxiliary head's scores (B, K, H, W)], empty without that head}."""
        features, entry_BCHW = self.encoder.forward_branches(x_BCHW)
        size = x_BCHW.shape[2:]
        return {
            "scores": self.to_size(self.forward_head(features), size),
            "aux": [self.to_size(head(entry_BCHW), size) for head in self.decoder.aux_heads],
        }

    def get_classifier(self) -> nn.Conv2d:
        return self.decoder.head.classifier

    def classifier_parameters(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if ".classifier." in name}

    def reset_classifier(self, num_classes: int) -> None:
        for head in (self.decoder.head, *self.decoder.aux_heads):
            head.classifier = fresh_conv_classifier(head.classifier, num_classes)
        self.num_classes = num_classes

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.decoder.aux_heads:
            return state
        return Drop(r"^decoder\.aux_heads\.", "this model was made without the auxiliary head")(state)


# --- variants -------------------------------------------------------------------------------------------------------


def build(cfg: RTFormerConfig) -> RTFormer:
    shared = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(RTFormerBackboneConfig)}
    encoder = RTFormerBackbone(RTFormerBackboneConfig(**{**shared, "num_classes": 0}))
    return RTFormer(encoder=encoder, decoder=RTFormerDecoder(cfg=cfg), cfg=cfg)


RTFORMER_SLIM = RTFormerConfig()
RTFORMER_BASE = RTFormerConfig(base_chans=64, head_chans=128, injection=(True, False))
TEST_RTFORMER = RTFormerConfig(
    base_chans=8, depths=(1, 2, 1), head_chans=8, context_chans=16, cross_size=4, groups=4, num_classes=7
)
RTFORMER_SLIM_BACKBONE = RTFormerBackboneConfig()
RTFORMER_BASE_BACKBONE = RTFormerBackboneConfig(base_chans=64)

# The paper leaves out of its figures what is no convolution module (both attentions' matmuls, the learned keys and
# values) and the auxiliary head, and counts both sizes with an injection in the first block only.
VARIANTS = {
    "rtformer_slim": Variant(
        RTFORMER_SLIM,
        params=5_403_398,
        published=(PublishedCost((512, 2048), gmacs=17.5, params_m=4.8, num_classes=19),),
    ),
    "rtformer_base": Variant(
        RTFORMER_BASE,
        params=17_916_390,
        published=(
            PublishedCost((512, 2048), gmacs=67.4, params_m=16.8, num_classes=19),
            PublishedCost((640, 640), gmacs=26.6, params_m=16.8, num_classes=150),
            PublishedCost((640, 640), gmacs=26.6, params_m=16.8, num_classes=171),
        ),
    ),
    "test_rtformer": Variant(TEST_RTFORMER),
}
BACKBONE_VARIANTS = {
    "rtformer_slim_backbone": Variant(
        RTFORMER_SLIM_BACKBONE,
        params=4_655_240,
        published=(PublishedCost((224, 224), gmacs=0.8, params_m=5.3),),
    ),
    "rtformer_base_backbone": Variant(
        RTFORMER_BASE_BACKBONE,
        params=18_085_160,
        published=(PublishedCost((224, 224), gmacs=3.0, params_m=20.5),),
    ),
}

# --- weights --------------------------------------------------------------------------------------------------------

_ORIGIN = "https://github.com/PaddlePaddle/PaddleSeg (configs/rtformer; arXiv 2210.07124)"
_STORE = "https://paddleseg.bj.bcebos.com/dygraph"

_CITYSCAPES = PretrainedCfg(
    dataset="cityscapes",
    label_set="cityscapes",
    num_classes=19,
    input_size=(512, 1024),
    resize="keep_ratio",
    test_size=(1024, 2048),
    miou_protocol="single scale, whole image",
    license="apache-2.0",
    commercial_use=True,
    origin=_ORIGIN,
)
_ADE20K = dataclasses.replace(
    _CITYSCAPES,
    dataset="ade20k",
    label_set="ade20k",
    num_classes=150,
    input_size=(512, 512),
    test_size=(512, 2048),
)
# No weights were released for these two; the options are the paper's.
_CAMVID = dataclasses.replace(
    _CITYSCAPES,
    dataset="camvid",
    label_set="camvid",
    num_classes=11,
    input_size=(720, 960),
    test_size=(720, 960),
    license="unknown",
    commercial_use=None,
    how_to_get="nobody has released these weights; train from the Cityscapes weights and pass checkpoint_path=",
)
_COCO_STUFF = dataclasses.replace(
    _CAMVID,
    dataset="coco_stuff",
    label_set="coco_stuff",
    num_classes=171,
    input_size=(640, 640),
    resize="exact",
    test_size=(640, 640),
    how_to_get="nobody has released these weights; train the model and pass checkpoint_path=",
)
_IMAGENET = PretrainedCfg(
    state="url",
    dataset="imagenet",
    num_classes=0,  # the archives hold no classifier
    input_size=(224, 224),
    resize="exact",
    test_size=(224, 224),
    license="apache-2.0",
    commercial_use=True,
    origin=_ORIGIN,
)


def _released(row: PretrainedCfg, file: str, miou: float, **options: Any) -> PretrainedCfg:
    return dataclasses.replace(
        row, state="url", url=f"{_STORE}/{row.dataset}/{file}/model.pdparams", miou=miou, cfg_overrides=options
    )


def _paper(row: PretrainedCfg, **options: Any) -> PretrainedCfg:
    return dataclasses.replace(row, cfg_overrides=options)


PRETRAINED = {
    "rtformer_slim": {
        "cityscapes": _released(
            _CITYSCAPES,
            "rtformer_slim_cityscapes_1024x512_120k",
            76.31,
            cross_size=12,
            injection=(True, True),
            drop_path_rate=0.2,
        ),
        "ade20k": _released(
            _ADE20K,
            "rtformer_slim_ade20k_512x512_160k",
            36.67,
            cross_size=8,
            injection=(True, False),
            drop_path_rate=0.1,
        ),
        "camvid": _paper(_CAMVID, cross_size=8, injection=(True, False), drop_path_rate=0.2),
        "coco_stuff": _paper(_COCO_STUFF, cross_size=8, injection=(True, False), drop_path_rate=0.1),
    },
    "rtformer_base": {
        "cityscapes": _released(
            _CITYSCAPES,
            "rtformer_base_cityscapes_1024x512_120k",
            79.24,
            cross_size=12,
            injection=(True, False),
            drop_path_rate=0.2,
        ),
        "ade20k": _released(
            _ADE20K,
            "rtformer_base_ade20k_512x512_160k",
            42.02,
            cross_size=12,
            injection=(True, False),
            drop_path_rate=0.1,
        ),
        "camvid": _paper(_CAMVID, cross_size=12, injection=(True, False), drop_path_rate=0.2),
        "coco_stuff": _paper(_COCO_STUFF, cross_size=12, injection=(True, False), drop_path_rate=0.1),
    },
}
BACKBONE_PRETRAINED = {
    f"rtformer_{size}_backbone": {
        "imagenet": dataclasses.replace(
            _IMAGENET, url=f"{_STORE}/backbone/rtformer_{size}_backbone_imagenet_pretrained.zip"
        )
    }
    for size in ("slim", "base")
}

register_family(Family(name="rtformer", build=build, variants=VARIANTS, pretrained=PRETRAINED))
register_family(
    Family(name="rtformer_backbone", build=RTFormerBackbone, variants=BACKBONE_VARIANTS, pretrained=BACKBONE_PRETRAINED)
)
