"""Views between maps and tokens, and the bilinear resize of the field.

Shape letters: B batch, C channels, H, W rows and columns of a map, R rows of a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def to_channels_first(x_BHWC: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view; channels-last in memory if the input is contiguous."""
    return x_BHWC.permute(0, 3, 1, 2)


def to_channels_last(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view; contiguous if the input is channels-last in memory."""
    return x_BCHW.permute(0, 2, 3, 1)


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor` rounded up, both positive. The usual -(-a // b) goes wrong in ONNX, which rounds to zero."""
    return (value + divisor - 1) // divisor


def resize(map_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize to `size` = (H, W) with half-pixel centres (`align_corners=False`, no antialias)."""
    H, W = size
    if map_BCHW.shape[2:] == (H, W):
        return map_BCHW
    return F.interpolate(map_BCHW, size=(H, W), mode="bilinear", align_corners=False)


def resize_image_part(
    map_BCHW: Tensor,
    size: tuple[int, int],
    *,
    image_size: tuple[int, int],
    padded_size: tuple[int, int],
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Bilinear resize that brings only the image's part of a padded map to `size`.

    The map covers `padded_size` pixels, whose first `image_size` rows and columns are the image. At `size ==
    image_size` this is the resize to `padded_size`, cropped; at any other size the image's edges, which need not
    lie on the map's grid, become the edges of the result. Values beyond the image take part, as they do in a crop.

    Args:
        map_BCHW: (B, C, H, W).
        size: (H, W) of the whole result.
        rows: (start, stop), to make only these rows of the result.

    Returns:
        (B, C, stop - start, size[1]).
    """
    if torch.compiler.is_compiling():
        return _resize_image_part_of_any_size(map_BCHW, size, image_size, padded_size, rows or (0, size[0]))
    scale_H, scale_W = (
        side / padded * image / out
        for side, padded, image, out in zip(map_BCHW.shape[2:], padded_size, image_size, size, strict=True)
    )
    # Rows first and by hand, because only here the map is small and a strip needs an offset.
    start, stop = rows or (0, size[0])
    map_BCRW = _blend_rows(map_BCHW, start, stop, scale_H)
    if size[1] < 2 * map_BCHW.shape[3]:  # torch takes a resize to as many columns for a copy, whatever its scale
        return _blend_rows(map_BCRW.transpose(2, 3), 0, size[1], scale_W).transpose(2, 3)
    # A repeated last column changes no value and guarantees that there are at least size[1] to keep.
    map_BCRW = torch.cat((map_BCRW, map_BCRW[..., -1:]), dim=-1)
    return F.interpolate(map_BCRW, scale_factor=(1.0, 1 / scale_W), mode="bilinear")[..., : size[1]]


def _resize_image_part_of_any_size(
    map_BCHW: Tensor,
    size: tuple[int, int],
    image_size: tuple[int, int],
    padded_size: tuple[int, int],
    rows: tuple[int, int],
) -> Tensor:
    """The same for recording with dynamic sides, where scales that are no whole numbers would become constants."""
    (scale_H, divisor_H), (scale_W, divisor_W) = (
        (side * image, padded * out)
        for side, padded, image, out in zip(map_BCHW.shape[2:], padded_size, image_size, size, strict=True)
    )
    map_BCRW = _blend_rows(map_BCHW, *rows, scale_H, divisor_H)
    return _blend_rows(map_BCRW.transpose(2, 3), 0, size[1], scale_W, divisor_W).transpose(2, 3)


def _blend_rows(map_BCHW: Tensor, start: int, stop: int, scale: float, divisor: int = 1) -> Tensor:
    """Rows start <= y < stop of a bilinear resize of the rows alone, `scale / divisor` rows of the map apart."""
    dtype = torch.promote_types(map_BCHW.dtype, torch.float32)
    y_R = (torch.arange(start, stop, device=map_BCHW.device, dtype=dtype) + 0.5) * scale / divisor - 0.5
    y_R = y_R.clamp(0, map_BCHW.shape[2] - 1)
    above_R = y_R.long()
    below_R = (above_R + 1).clamp(max=map_BCHW.shape[2] - 1)
    weight_R1 = (y_R - above_R).to(map_BCHW.dtype)[:, None]
    return torch.lerp(map_BCHW[:, :, above_R], map_BCHW[:, :, below_R], weight_R1)
