"""What RTFormer's paper (arXiv 2210.07124) compares its attention and its feed-forward layer with (Tables 5 and 8).

None of these is a model of the zoo, no weights of them were released, and the official code has none of them: where
the paper is silent, the choices are ours, and the docstrings say which. The query projections of `ExternalAttention`
and every stride are.

Cost of RTFormer-Slim as in the paper (8 x 8 grid, injection in the first block) at 512x2048 with ADE20K's 150 classes
and 8 + 2 groups or heads, by segzoo's count: gfa+ca and gfa+gfa 18.2 G, external 18.3, 18.4 and 18.8 G for r = 0.125,
0.25 and 1, self 23.0 G with a spatial reduction of 4 and 90.3 G without, linformer 22.0 G (256 sums), nystrom 19.9 G
(64 landmarks); feed_forward="mix" 15.6 G. The figures of the paper's two tables are not confirmed, so none is given.

B batch, C channels, H, W map, N its tokens, M keys, sums, landmarks or memory units, h heads, D channels of one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.batch_norm import BatchNorm
from ..layers.mlp import ConvMlp
from ..layers.norm_folding import absorb
from ..layers.shapes import resize, to_channels_first, to_channels_last
from ..layers.spatial_reduction import StridedConvNorm

# Every attention takes (own map, other branch's map), both (B, C, H, W), and returns a map like its own at its stride.


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
    """Multi-head self-attention whose keys and values are taken from a smaller map, as SegFormer's.

    Args:
        reduction: side of the strided convolution + LayerNorm before the keys and values; 1: none.
        stride: queries are taken at every so many tokens of both axes, keys and values at all (ours).
    """

    def __init__(self, *, in_chans: int, chans: int, num_heads: int, reduction: int = 1, stride: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.stride = stride
        self.norm: nn.Module = BatchNorm(in_chans)
        self.q = nn.Linear(in_chans, chans)
        self.kv_downsample = (
            StridedConvNorm(dim=in_chans, stride=reduction, norm_eps=1e-5) if reduction > 1 else nn.Identity()
        )
        self.kv = nn.Linear(in_chans, 2 * chans)
        self.proj = nn.Linear(chans, chans)

    def forward(self, x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        x_BHWC = to_channels_last(self.norm(x_BCHW))
        q_BHWC = self.q(x_BHWC[:, :: self.stride, :: self.stride])
        k_BMC, v_BMC = self.kv(self.kv_downsample(x_BHWC).flatten(1, 2)).chunk(2, dim=-1)
        out_BNC = self.proj(attend(q_BHWC.flatten(1, 2), k_BMC, v_BMC, num_heads=self.num_heads))
        return to_channels_first(out_BNC.unflatten(1, q_BHWC.shape[1:3]))

    def folded(self) -> nn.Module:
        if isinstance(self.norm, BatchNorm):
            self.q = absorb(self.norm, self.q)
            if isinstance(self.kv_downsample, StridedConvNorm):
                self.kv_downsample.conv = absorb(self.norm, self.kv_downsample.conv)
            else:
                self.kv = absorb(self.norm, self.kv)
            self.norm = nn.Identity()
        return self


class LinformerAttention(nn.Module):
    """Self-attention to learned sums of the keys and of the values over the map (Wang et al., arXiv 2006.04768).

    The heads share the sums. Ours is what happens on another map than the trained one: the weights of the sums are
    resized like a picture of it, and scaled so that a constant map keeps its sums.

    Args:
        rank: number of sums.
        grid: (H, W) of the trained map.
        stride: as MultiHeadAttention.
    """

    def __init__(self, *, in_chans: int, chans: int, num_heads: int, rank: int, grid: tuple[int, int], stride: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.stride = stride
        self.norm: nn.Module = BatchNorm(in_chans)
        self.q = nn.Linear(in_chans, chans)
        self.kv = nn.Linear(in_chans, 2 * chans)
        self.sums = nn.Parameter(torch.empty(2, rank, *grid))  # of the keys, of the values
        self.proj = nn.Linear(chans, chans)
        nn.init.normal_(self.sums, std=math.prod(grid) ** -0.5)

    def weights_for(self, size: tuple[int, int]) -> Tensor:
        """(2, M, H * W) for a map of `size`."""
        grid = self.sums.shape[2:]
        return (resize(self.sums, size) * (math.prod(grid) / math.prod(size))).flatten(2)

    def forward(self, x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        x_BHWC = to_channels_last(self.norm(x_BCHW))
        q_BHWC = self.q(x_BHWC[:, :: self.stride, :: self.stride])
        k_BNC, v_BNC = self.kv(x_BHWC.flatten(1, 2)).chunk(2, dim=-1)
        keys_MN, values_MN = self.weights_for((x_BHWC.shape[1], x_BHWC.shape[2]))
        k_BMC, v_BMC = keys_MN @ k_BNC, values_MN @ v_BNC
        out_BNC = self.proj(attend(q_BHWC.flatten(1, 2), k_BMC, v_BMC, num_heads=self.num_heads))
        return to_channels_first(out_BNC.unflatten(1, q_BHWC.shape[1:3]))

    def folded(self) -> nn.Module:
        if isinstance(self.norm, BatchNorm):
            self.q, self.kv, self.norm = absorb(self.norm, self.q), absorb(self.norm, self.kv), nn.Identity()
        return self


class NystromAttention(nn.Module):
    """Self-attention by way of landmarks, the Nystroem method (Xiong et al., arXiv 2102.03902).

    softmax(Q K~') pinv(softmax(Q~ K~')) softmax(Q~ K') V + a convolution of V along the tokens, one kernel a head. The
    landmarks Q~, K~ are the means of the cells of a grid over the map; theirs are of runs of a sequence.

    Args:
        side: of the grid of landmarks; M = side ** 2.
        stride: as MultiHeadAttention; also of the convolution's output.
    """

    KERNEL = 33  # tokens
    ITERATIONS = 6  # towards the pseudo-inverse

    def __init__(self, *, in_chans: int, chans: int, num_heads: int, side: int, stride: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.side = side
        self.stride = stride
        self.norm: nn.Module = BatchNorm(in_chans)
        self.q = nn.Linear(in_chans, chans)
        self.kv = nn.Linear(in_chans, 2 * chans)
        kernel = (self.KERNEL, 1)
        self.conv = nn.Conv2d(num_heads, num_heads, kernel, padding=(self.KERNEL // 2, 0), groups=num_heads, bias=False)
        self.proj = nn.Linear(chans, chans)

    def forward(self, x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        x_BHWC = to_channels_last(self.norm(x_BCHW))
        q_BHWC = self.q(x_BHWC[:, :: self.stride, :: self.stride])
        k_BHWC, v_BHWC = self.kv(x_BHWC).chunk(2, dim=-1)
        q_BhND, k_BhND, v_BhND = (self.split(map_BHWC) for map_BHWC in (q_BHWC, k_BHWC, v_BHWC))
        q_BhMD, k_BhMD = self.split(self.landmarks(q_BHWC)), self.split(self.landmarks(k_BHWC))

        near_BhNM = scores(q_BhND, k_BhMD)
        core_BhMM = pseudo_inverse(scores(q_BhMD, k_BhMD), self.ITERATIONS)
        far_BhMD = F.scaled_dot_product_attention(q_BhMD, k_BhND, v_BhND)
        out_BHWC = self.join(near_BhNM @ (core_BhMM @ far_BhMD), q_BHWC.shape[1:3])
        local_BHWC = self.join(self.conv(v_BhND), v_BHWC.shape[1:3])[:, :: self.stride, :: self.stride]
        return to_channels_first(self.proj(out_BHWC + local_BHWC))

    def split(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def join(self, x_BhND: Tensor, grid: Sequence[int]) -> Tensor:
        return x_BhND.transpose(1, 2).flatten(2).unflatten(1, grid)

    def landmarks(self, x_BHWC: Tensor) -> Tensor:
        return to_channels_last(F.adaptive_avg_pool2d(to_channels_first(x_BHWC), self.side))

    def folded(self) -> nn.Module:
        if isinstance(self.norm, BatchNorm):
            self.q, self.kv, self.norm = absorb(self.norm, self.q), absorb(self.norm, self.kv), nn.Identity()
        return self


def scores(q_BhND: Tensor, k_BhMD: Tensor) -> Tensor:
    """Attention weights of every query over the keys: (B, h, N, M)."""
    return (q_BhND @ k_BhMD.mT * q_BhND.shape[-1] ** -0.5).softmax(dim=-1)


def pseudo_inverse(x_BhMM: Tensor, iterations: int) -> Tensor:
    """The third-order iteration of the Nystroemformer's section 3.2 towards the Moore-Penrose inverse."""
    identity_MM = torch.eye(x_BhMM.shape[-1], dtype=x_BhMM.dtype, device=x_BhMM.device)
    largest_Bh11 = x_BhMM.sum(dim=-2).amax(dim=-1)[..., None, None] * x_BhMM.sum(dim=-1).amax(dim=-1)[..., None, None]
    y_BhMM = x_BhMM.mT / largest_Bh11
    for _ in range(iterations):
        xy_BhMM = x_BhMM @ y_BhMM
        inner_BhMM = 15 * identity_MM - xy_BhMM @ (7 * identity_MM - xy_BhMM)
        y_BhMM = 0.25 * y_BhMM @ (13 * identity_MM - xy_BhMM @ inner_BhMM)
    return y_BhMM


class MixFeedForward(nn.Module):
    """The usual feed-forward layer with a depthwise convolution, for comparison: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, *, chans: int, mlp_ratio: float):
        super().__init__()
        self.norm: nn.Module = BatchNorm(chans, eps=1e-6)
        self.mlp = ConvMlp(dim=chans, hidden_dim=int(chans * mlp_ratio))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return to_channels_first(self.mlp(to_channels_last(self.norm(x_BCHW))))

    def folded(self) -> nn.Module:
        if isinstance(self.norm, BatchNorm):
            self.mlp.fc1, self.norm = absorb(self.norm, self.mlp.fc1), nn.Identity()
        return self
