"""Grids of patches: padding an image to whole patches, and resizing what is learned once a grid position.

Shape letters: B batch, C channels, H, W rows and columns, N positions of a grid in row-major order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import WeightsError
from .shapes import ceil_div, to_channels_first, to_channels_last


def pad_to_multiple(x_BCHW: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and right until both sides are multiples of `multiple`."""
    H, W = x_BCHW.shape[2:]
    # Said as target minus side, symbolic sides cancel and a dynamic compilation stays quick; `-H % multiple` does not.
    return F.pad(x_BCHW, (0, ceil_div(W, multiple) * multiple - W, 0, ceil_div(H, multiple) * multiple - H))


def grid_of(img_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that cover an image of (H, W) pixels."""
    return ceil_div(img_size[0], patch_size), ceil_div(img_size[1], patch_size)


def resize_grid(grid_BHWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize, without antialias, of something learned once a grid position: (B, H, W, C) -> (B, *size, C)."""
    if grid_BHWC.shape[1:3] == tuple(size):
        return grid_BHWC
    return to_channels_last(F.interpolate(to_channels_first(grid_BHWC), size=tuple(size), mode="bicubic"))


def max_pool_to_grid(map_BCHW: Tensor, side: int) -> Tensor:
    """Adaptive max pool to a square grid: (B, C, H, W) -> (B, C, side, side); a smaller map is enlarged.

    Cell i covers the rows from floor(i * H / side) to ceil((i + 1) * H / side), and so for columns.
    """
    if not torch.compiler.is_compiling():
        return F.adaptive_max_pool2d(map_BCHW, side)
    # The same by operators of any size: the adaptive pool makes constants of the sides, and ONNX has none.
    rows_BCGW = _max_of_cells(map_BCHW, side)
    grid_BCGG = _max_of_cells(rows_BCGW.transpose(2, 3), side).transpose(2, 3)
    return grid_BCGG.contiguous(memory_format=torch.channels_last)  # as the pool gives it: sums in the same order


def _max_of_cells(map_BCHW: Tensor, count: int) -> Tensor:
    """The maximum of each of `count` cells of rows; a cell with fewer rows than the largest repeats its last."""
    H = map_BCHW.shape[2]
    cell_G1 = torch.arange(count, device=map_BCHW.device)[:, None]
    first_G1 = cell_G1 * H // count
    last_G1 = ((cell_G1 + 1) * H + count - 1) // count - 1
    row_GR = torch.minimum(first_G1 + torch.arange(H // count + 2, device=map_BCHW.device), last_G1)
    return map_BCHW[:, :, row_GR].amax(dim=3)


def fit_grid(state: dict[str, Any], name: str, own: Tensor) -> dict[str, Any]:
    """Fit what is learned once a grid position, (..., H, W, C) here and (..., N, C) in official files, to `own`.

    A flat one with as many positions as `own` is taken to have its grid, any other to be square; a grid other than
    `own`'s is resized bicubically.

    Args:
        state: a state dict; returned as it is if it has no such name, or a tensor of other channels under it.
        name: of the learned tensor in it.
        own: the model's parameter of that name.

    Raises:
        WeightsError: positions that form no square.
    """
    if name not in state or state[name].shape == own.shape or state[name].shape[-1] != own.shape[-1]:
        return state
    learned = state[name]
    H, W = own.shape[-3:-1]
    if learned.ndim == own.ndim - 1:
        positions = learned.shape[-2]
        side = math.isqrt(positions)
        if positions != H * W and side * side != positions:
            raise WeightsError(
                f"{name} has {positions} positions, which is no square grid; set img_size= to the size in pixels that "
                "it was trained for"
            )
        learned = learned.unflatten(-2, (H, W) if positions == H * W else (side, side))
    if learned.ndim != own.ndim:
        return state
    grid_BHWC = learned.reshape(-1, *learned.shape[-3:])
    return {**state, name: resize_grid(grid_BHWC, (H, W)).reshape(own.shape)}
