"""How one call looks at each of its images, decided and checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .._errors import SegzooError
from ..models.rows import PretrainedCfg
from ..preprocess import pixel_pair

MAX_SCALE = 64


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one call looks at each of its images, every option decided and checked."""

    resize: tuple[int, int] | None  # (H, W) in pixels at which the model sees an image; None = the row's rule
    mode: str  # "whole" or "slide"
    crop: tuple[int, int]  # slide: window (H, W) in pixels
    stride: tuple[int, int]  # slide: step (H, W) in pixels
    scales: tuple[float, ...]  # factors on the size at which the model sees the image, one view each
    flip: bool  # the mirror image of each view, too

    @property
    def num_views(self) -> int:
        return len(self.scales) * (2 if self.flip else 1)

    @property
    def in_one_look(self) -> bool:
        """One view of the whole image, whose scores need no averaging."""
        return self.mode == "whole" and self.num_views == 1


def protocol_of(
    row: PretrainedCfg,
    *,
    resize: tuple[int, int] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Protocol:
    """The protocol of a call: its options where given, else those of the weights row.

    Raises:
        SegzooError: an option that is none, or two that contradict each other.
    """
    mode = mode or row.test_mode
    if mode not in ("whole", "slide"):
        raise SegzooError(f"mode must be 'whole' or 'slide', not {mode!r}")
    if mode == "whole" and (crop is not None or stride is not None):
        raise SegzooError("crop and stride belong to mode='slide'")
    window, step = _window_and_step(row, crop, stride)
    _check_scales(scales)
    return Protocol(resize=resize, mode=mode, crop=window, stride=step, scales=tuple(scales), flip=bool(flip))


def _window_and_step(
    row: PretrainedCfg, crop: tuple[int, int] | None, stride: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Crop and stride of a sliding window: as given, else the row's; SegzooError if windows would leave gaps."""
    window = (row.crop or row.input_size) if crop is None else pixel_pair("crop", crop)
    two_thirds = (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
    step = (row.stride or two_thirds) if stride is None else pixel_pair("stride", stride)
    if any(s > c for s, c in zip(step, window, strict=True)):
        whose = "" if stride is not None else " (the stride of the weights row; give stride=, too)"
        raise SegzooError(f"a window of {window} cannot move by {step}{whose}: stride <= crop is needed")
    return window, step


def _check_scales(scales: object) -> None:
    if not isinstance(scales, (list, tuple)) or not scales or not all(_is_positive(scale) for scale in scales):
        raise SegzooError(
            f"scales must be a list of positive factors, such as (0.75, 1.0, 1.25), of at most {MAX_SCALE}, "
            f"not {scales!r}"
        )


def _is_positive(scale: object) -> bool:
    return isinstance(scale, (int, float)) and 0 < scale <= MAX_SCALE
