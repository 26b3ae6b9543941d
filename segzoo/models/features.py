"""What an encoder says of its maps and asks of its images: their description, which of them are meant, and refusals.

Shape letters: B batch, C channels, H, W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._errors import SegzooError


class FeatureInfo(list[dict[str, Any]]):
    """One description a map, fine to coarse, with the questions that timm's own FeatureInfo answers.

    `idx` is the number of a map, or several of them; None means all.
    """

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Strides in pixels."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """A field of one map, or the list of it of several."""
        if isinstance(idx, int):
            return self[idx][key]
        return [info[key] for info in self.get_dicts(idx=idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """The description of one map, or those of several, reduced to `keys`."""
        if isinstance(idx, int):
            return self[idx] if keys is None else {key: self[idx][key] for key in keys}
        return [self.get_dicts(keys, i) for i in (range(len(self)) if idx is None else idx)]

    @property
    def out_indices(self) -> tuple[int, ...]:
        return tuple(range(len(self)))


def take_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of `count` maps are meant, none negative: a number n means the last n, None all, as in timm.

    Raises:
        SegzooError: none, or one that there is not.
    """
    wanted: Any = count if indices is None else indices
    if isinstance(wanted, int) and 1 <= wanted <= count:
        return list(range(count - wanted, count))
    if isinstance(wanted, Sequence) and wanted and all(isinstance(i, int) and -count <= i < count for i in wanted):
        return [i % count for i in wanted]
    raise SegzooError(
        f"out_indices must be from {-count} to {count - 1}, or one number from 1 to {count} for so many of the last, "
        f"not {indices!r}"
    )


def pair(size: int | Sequence[int]) -> Any:
    """One number for both sides; what is neither a number nor a list passes, for the config to refuse."""
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, list) else size


def check_images(x_BCHW: Tensor, *, in_chans: int, dtype: torch.dtype) -> None:
    """Refuse what is no batch of normalised images, by shape and dtype alone.

    Args:
        in_chans, dtype: what the model takes; under autocast any floating dtype.

    Raises:
        SegzooError: one sentence with shape, dtype, what is expected and the way there.
    """
    # In a trace sizes are tensors, and no refusal is recorded.
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return
    if not isinstance(x_BCHW, Tensor):
        raise SegzooError(
            f"a model takes a tensor of images (B, {in_chans}, H, W), not {type(x_BCHW).__name__}; segzoo.predict "
            "takes files and arrays"
        )
    hint = _mismatch(x_BCHW, in_chans, dtype)
    if hint is not None:
        raise SegzooError(
            f"a model takes images (B, {in_chans}, H, W) in {_text(dtype)}, not {tuple(x_BCHW.shape)} in "
            f"{_text(x_BCHW.dtype)}: {hint}"
        )


def _mismatch(x: Tensor, in_chans: int, dtype: torch.dtype) -> str | None:
    """What to do about a tensor that does not fit; None if it fits."""
    if x.ndim == 3:
        return "one image needs a batch axis, x[None]"
    if x.ndim != 4:
        return "it must have the four axes batch, channels, rows and columns"
    if x.shape[1] != in_chans:
        if x.shape[3] == in_chans:
            return "its channels must come before rows and columns, x.permute(0, 3, 1, 2)"
        return f"create_model(..., in_chans={x.shape[1]}) makes a model for its channels"
    if x.shape[2] == 0 or x.shape[3] == 0:
        return "its images have no pixels"
    if x.dtype == dtype:
        return None
    if not x.is_floating_point():
        return "pixels must be divided by 255 and normalised by mean and std, which segzoo.predict does"
    if torch.is_autocast_enabled(x.device.type):
        return None
    return f"x.to(torch.{_text(dtype)}) converts it"


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
