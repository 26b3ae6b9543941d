"""The pyramid that encoders return: its sizes, and its way through torch's compilers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import segzoo
from segzoo.models import Pyramid

# Of an image of 50 x 71 pixels: the first map's cells, and the pixels that the maps cover.
SIZES = {
    "test_eft": ((13, 18), (50, 71)),
    "test_mit": ((13, 18), (50, 71)),
    "test_swin": ((16, 24), (64, 96)),
    "test_segvit": ((4, 5), (64, 80)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model = segzoo.create_model(name).eval()
    with torch.no_grad():
        pyramid = model.forward_features(torch.randn(1, 3, 50, 71))
    cells, padded = SIZES[name]
    assert isinstance(pyramid, Pyramid)
    assert tuple(pyramid.maps[0].shape[2:]) == cells
    assert (pyramid.image_size, pyramid.padded_size) == ((50, 71), padded)
    assert pyramid.strides == tuple(info["reduction"] for info in model.feature_info)


def test_it_reads_as_its_maps():
    maps = (torch.zeros(1, 2, 8, 8), torch.ones(1, 4, 4, 4))
    pyramid = Pyramid(maps, (4, 8), (32, 32), (32, 32))
    assert len(pyramid) == 2
    assert pyramid[-1] is maps[1]
    assert all(a is b for a, b in zip(pyramid, maps, strict=True))


class Features(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Pyramid:
        return self.model.forward_features(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_it_survives_compilers(name):
    model = Features(segzoo.create_model(name).eval()).eval()
    x = torch.randn(1, 3, 50, 71)
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    for pyramid in (compiled, exported):
        assert isinstance(pyramid, Pyramid)
        assert all(torch.equal(a, b) for a, b in zip(pyramid.maps, expected.maps, strict=True))
        assert (pyramid.strides, pyramid.image_size) == (expected.strides, expected.image_size)
        assert pyramid.padded_size == expected.padded_size


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["test_eft", "test_edaformer", "test_segformer"])
def test_a_trace_gives_the_same_scores(name):
    model, x = segzoo.create_model(name).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
