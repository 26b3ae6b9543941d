"""The papers' test protocols by name: how an image is resized, seen whole or through a window, at which scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._errors import SegzooError
from ..models.rows import MMSEG_ADE20K, MMSEG_CITYSCAPES, PretrainedCfg

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # with flip: mmsegmentation's test-time augmentation
_ROW_FIELDS = ("resize", "test_size", "test_min_side", "size_divisor", "test_mode", "crop", "stride")


def _of_row(row: PretrainedCfg, **fields: Any) -> dict[str, Any]:
    return {**{field: getattr(row, field) for field in _ROW_FIELDS}, **fields}


def _segvit(short: int, long: int, min_side: int, crop: int, stride: int) -> dict[str, Any]:
    window = {"test_mode": "slide", "crop": (crop, crop), "stride": (stride, stride)}
    return _of_row(PretrainedCfg(), test_size=(short, long), test_min_side=min_side, **window)


# By name, what each replaces in the weights row; "+ms" and "+flip" may follow a name.
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "row": {},  # as the row says, which is the protocol of the published figure
    "whole": {"test_mode": "whole"},
    "slide": {"test_mode": "slide"},
    "ade20k": _of_row(MMSEG_ADE20K),  # SegFormer-B0 to B4 and EDAFormer, also on COCO-Stuff
    "ade20k-640": _of_row(MMSEG_ADE20K, test_size=(640, 2048)),  # SegFormer-B5
    "cityscapes": _of_row(MMSEG_CITYSCAPES),  # SegFormer and EDAFormer
    "rtformer-ade20k": _of_row(PretrainedCfg(), test_size=(512, 2048)),
    "rtformer-cityscapes": _of_row(PretrainedCfg(), test_size=(1024, 2048)),
    "rtformer-camvid": _of_row(PretrainedCfg(), test_size=(720, 960)),
    "rtformer-coco-stuff10k": _of_row(PretrainedCfg(), resize="exact", test_size=(640, 640)),
    "segvit-ade20k-512": _segvit(512, 2048, 512, 512, 341),  # SegViT-B
    "segvit-ade20k-640": _segvit(640, 2048, 1, 640, 608),  # SegViT-L
    "segvit-coco-stuff10k": _segvit(512, 2048, 512, 512, 341),
    "segvit-pascal-context": _segvit(520, 520, 480, 480, 320),
    "transformers-512": _of_row(PretrainedCfg(), resize="exact", test_size=(512, 512)),  # no paper's, but in wide use
}


@dataclasses.dataclass(frozen=True)
class NamedProtocol:
    """How a data set is shown to a segmentation model."""

    name: str
    row: PretrainedCfg  # resize rule, mode and window
    scales: tuple[float, ...]
    flip: bool

    @classmethod
    def of(cls, name: str, row: PretrainedCfg | None) -> NamedProtocol:
        """The protocol of that name, for weights of that row.

        Raises:
            SegzooError: no such name; lists those that there are.
        """
        base, _, views = name.partition("+")
        if base not in PROTOCOLS or views not in ("", "ms", "flip"):
            raise SegzooError(
                f"no protocol is called {name!r}; protocols: {', '.join(PROTOCOLS)}; each also with +ms (scales "
                f"{', '.join(map(str, MULTI_SCALE))} and flip) or +flip"
            )
        return cls(
            name=name,
            row=dataclasses.replace(row or PretrainedCfg(), **PROTOCOLS[base]),
            scales=MULTI_SCALE if views == "ms" else (1.0,),
            flip=views != "",
        )

    def __str__(self) -> str:
        row = self.row
        if row.resize == "keep_ratio":
            at_least = f", both sides at least {row.test_min_side}" if row.test_min_side > 1 else ""
            size = f"short side up to {row.test_size[0]}, long side up to {row.test_size[1]}{at_least}"
        else:
            size = f"resized to {row.test_size[0]}x{row.test_size[1]}" if row.resize == "exact" else "own size"
        if row.size_divisor > 1:
            size += f", sides rounded up to multiples of {row.size_divisor}"
        mode = "whole image"
        if row.test_mode == "slide":
            crop = row.crop or row.input_size
            stride = row.stride or tuple(max(1, side * 2 // 3) for side in crop)
            mode = f"window {crop[0]}x{crop[1]} stride {stride[0]}x{stride[1]}"
        views = f"scales {', '.join(map(str, self.scales))}" if len(self.scales) > 1 else "single scale"
        return f"{size}; {mode}; {views}{' and flip' if self.flip else ''}"
