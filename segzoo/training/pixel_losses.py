"""Cross-entropy of pixels or images, of all or the hardest, with dice and auxiliary scores.

A training step may be spread over processes and over parts of a batch. Cross-entropy is then divided by the labelled
pixels of the whole step, not by those of the part, so that the step is the same however it is spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.shapes import resize


class PixelLoss(nn.Module):
    """Cross-entropy of "scores", plus that of every entry of "aux", plus dice, of `forward_train`'s dict.

    Of a classifier, whose scores are (B, K), an image is what a pixel is here, and labels may be shares (B, K).

    Args:
        ignore_index: label of pixels without truth.
        class_weights: (K,) factors of the classes, or None.
        label_smoothing: share of the truth that is spread over all classes.
        aux_weight: of every auxiliary score.
        dice_weight: of dice on "scores": mean over the images, and over the classes that an image has.
        ohem: whether only hard pixels count: those whose class has a probability below `ohem_threshold`, and at least
            the `ohem_min_kept` hardest of the part. Their mean is over what counts in the part.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
        dice_weight: float = 0.0,
        ohem: bool = False,
        ohem_threshold: float = 0.7,
        ohem_min_kept: int = 100_000,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.aux_weight = aux_weight
        self.dice_weight = dice_weight
        self.ohem = ohem
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def mass(self, labels: Tensor) -> Tensor:
        """What a sum of cross-entropies over these labels is divided by for their mean: a float64 scalar."""
        if labels.is_floating_point():
            return labels.sum(dtype=torch.float64)
        valid = labels != self.ignore_index
        if self.class_weights is None:
            return valid.sum(dtype=torch.float64)
        return self.class_weights.to(labels.device)[labels[valid]].sum(dtype=torch.float64)

    def forward(
        self, outputs: Mapping[str, Any], labels: Tensor, *, mass: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """`forward_train`'s dict and labels (B, H, W), or (B,) or (B, K) of a classifier -> a scalar to minimise.

        Args:
            mass: what sums are divided by: `mass` of the whole step's labels, a process; None: of these.
            share: of the step that this part is, for what is a mean over the part.

        Raises:
            SegzooError: labels of another shape than the scores.
        """
        scores = outputs["scores"]
        if not labels.is_floating_point() and scores.shape[2:] != labels.shape[1:]:
            raise SegzooError(f"labels must be {tuple(scores.shape[2:])} a score, not {tuple(labels.shape[1:])}")
        mass = self.mass(labels) if mass is None else mass
        loss = self._cross_entropy(scores, labels, mass, share)
        for auxiliary in outputs.get("aux", ()):
            full = auxiliary if auxiliary.shape[2:] == scores.shape[2:] else resize(auxiliary, tuple(scores.shape[2:]))
            loss = loss + self.aux_weight * self._cross_entropy(full, labels, mass, share)
        if self.dice_weight:
            loss = loss + self.dice_weight * share * self._dice(scores, labels)
        return loss

    def _cross_entropy(self, scores: Tensor, labels: Tensor, mass: Tensor, share: float) -> Tensor:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = None if self.class_weights is None else self.class_weights.to(scores)
        options: dict[str, Any] = {"weight": weights, "label_smoothing": self.label_smoothing}
        if not labels.is_floating_point():
            options["ignore_index"] = self.ignore_index
        else:
            labels = labels.to(scores)
        if not self.ohem:
            total = F.cross_entropy(scores, labels, reduction="sum", **options)
            return total / mass.clamp(min=torch.finfo(torch.float32).tiny).to(total)
        losses = F.cross_entropy(scores, labels, reduction="none", **options)
        hard = self._hard(scores, labels)
        return share * losses[hard].sum() / hard.sum().clamp(min=1)

    @torch.no_grad()
    def _hard(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Which pixels count, as a mask like `labels`."""
        valid = labels != self.ignore_index
        probability = scores.softmax(1).gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
        probability = torch.where(valid, probability, torch.inf)
        kept = min(self.ohem_min_kept, int(valid.sum()))
        if kept == 0:
            return valid
        at_least = probability.flatten().kthvalue(kept).values  # of the hardest, the easiest that must count
        return valid & (probability <= at_least.clamp(min=self.ohem_threshold))

    def _dice(self, scores: Tensor, labels: Tensor) -> Tensor:
        """1 - dice coefficient of probabilities and truth, of every class that an image has."""
        valid = labels != self.ignore_index
        classes = scores.shape[1]
        probability = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(1) * valid.unsqueeze(1)
        truth = F.one_hot(torch.where(valid, labels, 0), classes).movedim(-1, 1) * valid.unsqueeze(1)
        overlap_BK = (probability * truth).flatten(2).sum(2)
        total_BK = (probability + truth).flatten(2).sum(2)
        present_BK = truth.flatten(2).sum(2) > 0
        dice_BK = 1 - (2 * overlap_BK + 1) / (total_BK + 1)
        return (dice_BK * present_BK).sum() / present_BK.sum().clamp(min=1)

    def extra_repr(self) -> str:
        kind = f"ohem below {self.ohem_threshold:g}" if self.ohem else "all pixels"
        return f"{kind}, aux={self.aux_weight:g}, dice={self.dice_weight:g}, smoothing={self.label_smoothing:g}"
