"""From scores to a class map without ever holding the full-size scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

# Full-size scores held at a time. One class is the smallest chunk, whatever its size.
CHUNK_BYTES = 64 * 2**20


class Upscaler(Protocol):
    """Brings what a model's `forward_head` returned to full size, and says what kind of scores they are then."""

    @property
    def score_kind(self) -> str:
        """ "logits", "product" or "heatmap"."""
        ...

    def to_size(self, head_output: Any, size: Sequence[int], /) -> Tensor:
        """Scores (B, K, *size)."""
        ...


class RowUpscaler(Upscaler, Protocol):
    """One of products, which makes single rows as well."""

    def score_rows(self, head_output: Any, size: tuple[int, int], start: int, stop: int, /) -> Tensor:
        """The rows start <= y < stop of `to_size`."""
        ...


def class_map(model: Upscaler, head_output: Any, size: tuple[int, int], chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Class of every pixel, `model.to_size(head_output, size).argmax(1)`, with little memory.

    Exactly that for logits; for products up to rounding, which can only turn pixels whose best scores are equal.

    Args:
        head_output: what `model.forward_head` returned for B images.
        size: (H, W) of the map.
        chunk_bytes: bound of the full-size scores held at a time.

    Returns:
        (B, H, W) in the smallest unsigned dtype that holds the classes (uint8, else int32).
    """
    if model.score_kind == "product":
        return _class_map_by_rows(cast(RowUpscaler, model), head_output, size, chunk_bytes)
    B, K = head_output.shape[:2]
    class_bytes = B * size[0] * size[1] * head_output.element_size()
    step = max(1, chunk_bytes // class_bytes)

    def best_of_chunk(first: int) -> tuple[Tensor, Tensor]:
        score_BHW, index_BHW = model.to_size(head_output[:, first : first + step], size).max(dim=1)
        return score_BHW, (index_BHW + first).to(mask_dtype(K))

    # Each class is resized on its own, so a chunk of classes has the very same scores as all of them together.
    best_BHW, winner_BHW = best_of_chunk(0)
    for first in range(step, K, step):
        score_BHW, index_BHW = best_of_chunk(first)
        better_BHW = score_BHW > best_BHW  # on a tie the lower class stays, as in argmax
        winner_BHW = torch.where(better_BHW, index_BHW, winner_BHW)
        best_BHW = torch.maximum(best_BHW, score_BHW)
    return winner_BHW


def _class_map_by_rows(model: RowUpscaler, head_output: Any, size: tuple[int, int], chunk_bytes: int) -> Tensor:
    """Products sum over all queries, so they are made in strips of rows; each query has a mask besides its score."""
    strip = model.score_rows(head_output, size, 0, 1)
    row_bytes = 2 * strip.numel() * strip.element_size()
    step = max(1, chunk_bytes // row_bytes)
    strips = [
        model.score_rows(head_output, size, start, min(start + step, size[0])).argmax(dim=1)
        for start in range(0, size[0], step)
    ]
    return torch.cat(strips, dim=1).to(mask_dtype(strip.shape[1]))


def mask_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int32
