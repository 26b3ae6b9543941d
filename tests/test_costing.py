"""Cost of modules that segzoo did not make, and of the reduction sites of one that it did."""

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


# test_eft at 64x64, a row a stage: blocks, channels, query tokens, side of the trained pool on a grid of that width
STAGES = [(1, 8, 16 * 16, 2 * 2), (1, 16, 8 * 8, 2 * 2), (2, 24, 4 * 4, 2 * 2), (1, 32, 2 * 2, 2 * 2)]


def attention_macs(dim: int, tokens: int, pooled: int) -> int:
    """Keys and values in one Linear, scores, their sum over the values, and the output projection."""
    return pooled * dim * dim + 2 * tokens * pooled * dim + tokens * dim * dim


def test_a_site_is_the_attention_of_all_its_blocks():
    model = segzoo.create_model("test_eft")
    by_hand = {
        f"encoder.{i}": blocks * attention_macs(dim, tokens, pooled)
        for i, (blocks, dim, tokens, pooled) in enumerate(STAGES)
    }
    sites = segzoo.cost(model, (64, 64)).sites
    assert {site: macs for site, macs in sites.items() if not site.endswith(".q")} == by_hand
    assert {site.removesuffix(".q"): macs for site, macs in sites.items() if site.endswith(".q")} == by_hand
    model.set_inference_reduction({"encoder": 2})  # every trained window doubled: one token is left
    by_hand = [blocks * attention_macs(dim, tokens, 1) for blocks, dim, tokens, _ in STAGES]
    assert [segzoo.cost(model, (64, 64)).sites[f"encoder.{i}"] for i in range(4)] == by_hand
