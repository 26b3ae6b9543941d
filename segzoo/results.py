"""What came out: the mask of an image, with names and colours of its classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ._errors import SegzooError
from .labels import LabelSet
from .plans import Plan
from .visualize import overlay, palette_image


class PresentLabel(NamedTuple):
    """A class that occurs in a mask."""

    index: int
    name: str
    pixels: int


@dataclasses.dataclass(frozen=True, eq=False)
class Segmentation:
    """A predicted mask of one image, at the image's own size."""

    mask: np.ndarray  # (H, W) class indices, uint8 up to 256 classes, else uint16
    label_set: LabelSet  # names and colours of the classes
    image: np.ndarray  # (H, W, 3) uint8, the upright image that the mask belongs to
    source: str  # file name, or the kind of object given
    plan: Plan  # inference reduction that was in force
    _full_scores: Callable[[], Tensor] | None = dataclasses.field(repr=False)  # None in a copy

    @property
    def labels(self) -> list[PresentLabel]:
        """Classes present, most pixels first."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.label_set))
        present = sorted(np.flatnonzero(counts), key=lambda index: -counts[index])
        return [PresentLabel(int(i), self.label_set.classes[i], int(counts[i])) for i in present]

    def scores(self) -> Tensor:
        """(K, H, W) float32 on the CPU, made on request: logits, or for SegViT products of probabilities; of several
        views (`scales`, `flip`) the mean probabilities of any model."""
        if self._full_scores is None:
            raise SegzooError("a copied or pickled Segmentation has no scores; take scores() of the original")
        with torch.inference_mode():
            scores_KHW = self._full_scores()[0]
        return scores_KHW.float().clone()  # an ordinary tensor of the caller's own

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_full_scores": None}

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image with the classes' colours over it; alpha from 0 (image) to 1 (colours)."""
        if not 0 <= alpha <= 1:
            raise SegzooError(f"alpha must be between 0 and 1, not {alpha!r}")
        return overlay(self.image, self.mask, self.label_set, alpha)

    def save(self, path: str | Path, *, alpha: float = 0.5) -> tuple[Path, Path]:
        """Write the mask (PNG in palette mode, pixel value = class) and the overlay `<name>_overlay.png`.

        Each file appears whole or not at all. Returns both paths.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise SegzooError(f"{path}: masks are saved as .png, because lossy formats would change classes")
        overlay_path = path.with_name(f"{path.stem}_overlay.png")
        write_png(palette_image(self.mask, self.label_set), path)
        write_png(self.overlay(alpha), overlay_path)
        return path, overlay_path


def write_png(image: Image.Image, path: Path) -> None:
    """Write a PNG that appears whole or not at all, with the folders that it needs."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(partial, format="PNG")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SegzooError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
