"""Cost of modules that segzoo did not make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import segzoo


class PatchEmbedding(nn.Module):
    """Linear, of patches of 4 x 4 pixels in `in_chans` channels: nothing says how many these are."""

    def __init__(self, in_chans: int):
        super().__init__()
        self.proj = nn.Linear(16 * in_chans, 8)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.proj(nn.functional.unfold(x_BCHW, 4, stride=4).transpose(1, 2))


def test_the_channels_of_a_foreign_model():
    convolutions = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    assert segzoo.cost(convolutions, (10, 12)).macs == 10 * 12 * (4 * 8 * 9 + 8 * 2)
    assert segzoo.cost(PatchEmbedding(3), (8, 12)).macs == 6 * 48 * 8
    assert segzoo.cost(PatchEmbedding(5), (8, 12), in_chans=5).macs == 6 * 80 * 8


@pytest.mark.parametrize("in_chans", [1, 4])
def test_the_channels_of_a_segzoo_model(in_chans):
    model = segzoo.create_model("test_mit", in_chans=in_chans)
    assert segzoo.cost(model, (64, 64)).macs == segzoo.cost(model, (64, 64), in_chans=in_chans).macs
