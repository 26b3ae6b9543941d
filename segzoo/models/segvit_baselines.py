"""What SegViT's paper (arXiv 2210.05844, Tables 4 and 8) compares its decoder with: SETR (arXiv 2012.15840).

A 1x1 convolution gives the classes of the last map's cells, whose scores are resized to the image. With ViT-B at
512x512 and 150 classes that is the cost which the paper prints, 107.3 G. No weights of it were released.

Shape letters: B batch, C channels, H, W rows and columns of a map, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.grids import fit_grid
from ..layers.init import init_weights
from .keys import StateDict
from .segmenter import EncoderDecoder


class LinearDecoder(nn.Module):
    """Maps -> scores (B, K, H, W) of the last one's cells."""

    def __init__(self, *, in_chans: int, num_classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(in_chans, num_classes, 1)
        self.apply(init_weights)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(features[-1])


class SETR(EncoderDecoder):
    """An encoder and a LinearDecoder; its scores are logits."""

    def fit_state(self, state: StateDict) -> StateDict:
        """A position embedding without its grid or of another `img_size` is fitted, as SegViT's."""
        for name, parameter in self.named_parameters():
            if name == "encoder.pos_embed":
                state = fit_grid(state, name, parameter)
        return state
