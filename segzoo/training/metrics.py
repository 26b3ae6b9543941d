"""Figures of a segmentation from its confusion matrix: mean intersection over union as mmsegmentation defines it.

NumPy only, so that the demo needs no extra; `segzoo.training.evaluation` counts through torchmetrics and takes its
figures from here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..data import scenes
from ..data.scenes import context

# Small or thin classes by label set. Cityscapes': of Segformer++'s "small classes" (arXiv 2405.14467, Table II) the
# thin ones of street furniture, as the scenes have them; its own list was not at hand to check this one against.
SMALL_CLASSES: Mapping[str, tuple[str, ...]] = {
    "cityscapes": ("fence", "pole", "traffic light", "traffic sign"),
    "scenes": scenes.SMALL_CLASSES,
    "context": context.SMALL_CLASSES,
}

# Classes that look like another one nearby, by label set.
PAIRED_CLASSES: Mapping[str, tuple[str, ...]] = {"context": context.PAIRED_CLASSES}


class ConfusionMatrix:
    """Counts of pixels by (true class, predicted class), in int64 over any number of images."""

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts_TP = np.zeros((num_classes, num_classes), dtype=np.int64)

    @classmethod
    def of(cls, counts_TP: np.ndarray) -> ConfusionMatrix:
        """One with the counts (K, K) that something else has made."""
        matrix = cls(len(counts_TP))
        matrix.counts_TP += counts_TP
        return matrix

    def update(self, predicted_HW: np.ndarray, truth_HW: np.ndarray) -> None:
        """Add one image; pixels whose truth is `ignore_index` do not count."""
        valid = truth_HW != self.ignore_index
        pairs = truth_HW[valid].astype(np.int64) * self.num_classes + predicted_HW[valid]
        self.counts_TP += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.counts_TP.shape)

    def iou(self) -> np.ndarray:
        """(K,) intersection over union in [0, 1]; NaN for a class that neither truth nor prediction has."""
        hits = self.counts_TP.diagonal()
        return _ratio(hits, self.counts_TP.sum(0) + self.counts_TP.sum(1) - hits)

    def miou(self, classes: Sequence[int] | None = None) -> float:
        """Mean over `classes` (default: all) that occur, in [0, 1]; NaN if none does."""
        return _mean(self.iou() if classes is None else self.iou()[list(classes)])

    def class_accuracy(self) -> np.ndarray:
        """(K,) share of a class's pixels that were found, in [0, 1]; NaN for a class that the truth has not."""
        return _ratio(self.counts_TP.diagonal(), self.counts_TP.sum(1))

    def mean_accuracy(self) -> float:
        """Mean of `class_accuracy` over the classes that the truth has, in [0, 1]; NaN if it has none."""
        return _mean(self.class_accuracy())

    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that are right, in [0, 1]; NaN if there is none."""
        return float(_ratio(np.trace(self.counts_TP), self.counts_TP.sum()))


def _ratio(part: np.ndarray | np.int64, whole: np.ndarray | np.int64) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
