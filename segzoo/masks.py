"""From scores to a class map without ever holding the full-size scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Full-size scores held at a time. One class is the smallest chunk, whatever its size.
CHUNK_BYTES = 64 * 2**20


def class_map(model: nn.Module, head_output: Any, size: tuple[int, int], chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Class of every pixel: exactly `model.to_size(head_output, size).argmax(1)`, with little memory.

    Args:
        head_output: what `model.forward_head` returned for B images.
        size: (H, W) of the map.
        chunk_bytes: bound of the full-size scores held at a time.

    Returns:
        (B, H, W) in the smallest unsigned dtype that holds the classes (uint8, else int32).
    """
    if not (isinstance(head_output, Tensor) and model.score_kind == "logits"):
        scores_BKHW = model.to_size(head_output, size)
        return scores_BKHW.argmax(dim=1).to(mask_dtype(scores_BKHW.shape[1]))
    B, K = head_output.shape[:2]
    class_bytes = B * size[0] * size[1] * head_output.element_size()
    step = max(1, chunk_bytes // class_bytes)
    best_BHW = winner_BHW = None
    # Each class is resized on its own, so a chunk of classes has the very same scores as all of them together.
    for first in range(0, K, step):
        score_BHW, index_BHW = model.to_size(head_output[:, first : first + step], size).max(dim=1)
        index_BHW = (index_BHW + first).to(mask_dtype(K))
        if best_BHW is None:
            best_BHW, winner_BHW = score_BHW, index_BHW
            continue
        better_BHW = score_BHW > best_BHW  # on a tie the lower class stays, as in argmax
        winner_BHW = torch.where(better_BHW, index_BHW, winner_BHW)
        best_BHW = torch.maximum(best_BHW, score_BHW)
    return winner_BHW


def mask_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int32
