"""Mean intersection over union from a confusion matrix; NumPy only, so that the demo needs no extra."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ConfusionMatrix:
    """Counts of pixels by (true class, predicted class), in int64 over any number of images."""

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts_TP = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, predicted_HW: np.ndarray, truth_HW: np.ndarray) -> None:
        """Add one image; pixels whose truth is `ignore_index` do not count."""
        valid = truth_HW != self.ignore_index
        pairs = truth_HW[valid].astype(np.int64) * self.num_classes + predicted_HW[valid]
        self.counts_TP += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.counts_TP.shape)

    def iou(self) -> np.ndarray:
        """(K,) intersection over union in [0, 1]; NaN for a class that neither truth nor prediction has."""
        hits = self.counts_TP.diagonal()
        union = self.counts_TP.sum(0) + self.counts_TP.sum(1) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def miou(self, classes: Sequence[int] | None = None) -> float:
        """Mean over `classes` (default: all) that occur, in [0, 1]; NaN if none does."""
        iou = self.iou() if classes is None else self.iou()[list(classes)]
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")
