"""What RTFormer's paper (arXiv 2210.07124) compares its attention and its feed-forward layer with (Tables 5 and 8).

None of these is a model of the zoo, and no weights of them were released. The official code has none of them either:
where the paper is silent, the choices are ours, and the docstrings say which.

B batch, C channels, H, W map, N its tokens, M keys or memory units, h heads.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..layers.attention import attend
from ..layers.batch_norm import BatchNorm
from ..layers.mlp import ConvMlp
from ..layers.norm_folding import fold_norm_before
from ..layers.shapes import to_channels_first, to_channels_last

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
