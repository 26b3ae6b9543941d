"""Cross-entropy, its hard pixels, dice and auxiliary scores, by hand and against torch's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from segzoo._errors import SegzooError
from segzoo.training.pixel_losses import PixelLoss

LABELS = torch.tensor([[[0, 1], [255, 2]], [[2, 255], [255, 255]]])


def some_scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_torchs_mean_over_labelled_pixels():
    scores = some_scores()
    assert PixelLoss()({"scores": scores}, LABELS) == pytest.approx(F.cross_entropy(scores, LABELS, ignore_index=255))
    weights = [1.0, 2.0, 0.5]
    found = PixelLoss(class_weights=weights, label_smoothing=0.1)({"scores": scores}, LABELS)
    options = {"weight": torch.tensor(weights, dtype=torch.float64), "ignore_index": 255, "label_smoothing": 0.1}
    assert found == pytest.approx(F.cross_entropy(scores, LABELS, **options).item())


def test_parts_add_up_to_the_whole():
    loss, scores = PixelLoss(class_weights=[1.0, 2.0, 0.5]), some_scores()
    mass = loss.mass(LABELS)
    assert mass == 1 + 2 + 0.5 + 0.5
    parts = [loss({"scores": scores[i : i + 1]}, LABELS[i : i + 1], mass=mass, share=0.5) for i in range(2)]
    assert sum(parts) == pytest.approx(loss({"scores": scores}, LABELS).item())


def test_auxiliary_scores_are_resized():
    scores, small = some_scores(), some_scores(1)[:, :, :1, :1]
    expected = F.cross_entropy(scores, LABELS, ignore_index=255)
    expected = expected + 0.4 * F.cross_entropy(small.expand(-1, -1, 2, 2), LABELS, ignore_index=255)
    assert PixelLoss()({"scores": scores, "aux": [small]}, LABELS) == pytest.approx(expected.item())


def test_hard_pixels_by_hand():
    """Probabilities of the truth 0.9, 0.6, 0.2 and 0.95; the fifth pixel is ignored."""
    truth = torch.tensor([0.9, 0.6, 0.2, 0.95, 0.5])
    scores = torch.stack([truth, 1 - truth]).log().view(1, 2, 1, 5)
    labels = torch.tensor([[[0, 0, 0, 0, 255]]])

    def found(threshold: float, kept: int) -> float:
        loss = PixelLoss(ohem=True, ohem_threshold=threshold, ohem_min_kept=kept)
        return loss({"scores": scores}, labels).item()

    assert found(0.7, 1) == pytest.approx(-(math.log(0.6) + math.log(0.2)) / 2)
    assert found(0.1, 1) == pytest.approx(-math.log(0.2))
    assert found(0.1, 3) == pytest.approx(-(math.log(0.9) + math.log(0.6) + math.log(0.2)) / 3)
    assert found(0.1, 100) == pytest.approx(-(math.log(0.9) + math.log(0.6) + math.log(0.2) + math.log(0.95)) / 4)


def test_dice_by_hand():
    """Class 0 has probabilities 0.8 and 0.4 where it is and is not, class 1 the rest; class 2 never occurs."""
    first = torch.tensor([0.8, 0.4])
    scores = torch.stack([first, 1 - first, torch.full((2,), 1e-12)]).log().view(1, 3, 1, 2)
    labels = torch.tensor([[[0, 1]]])
    dice = [1 - (2 * 0.8 + 1) / (0.8 + 0.4 + 1 + 1), 1 - (2 * 0.6 + 1) / (0.2 + 0.6 + 1 + 1)]
    ce = -(math.log(0.8) + math.log(0.6)) / 2
    found = PixelLoss(dice_weight=0.5)({"scores": scores}, labels)
    assert found == pytest.approx(ce + 0.5 * sum(dice) / 2, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"ohem": True}, {"dice_weight": 1.0}, {"class_weights": [1.0, 1.0, 1.0]}])
def test_nothing_labelled_teaches_nothing(options):
    scores = some_scores().requires_grad_()
    loss = PixelLoss(**options)({"scores": scores}, torch.full_like(LABELS, 255))
    loss.backward()
    assert loss == 0 and scores.grad is not None and not scores.grad.any()


def test_classifiers():
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    loss = PixelLoss(ignore_index=-1)
    assert loss({"scores": scores}, labels) == pytest.approx(F.cross_entropy(scores, labels).item())
    shares = torch.softmax(torch.randn(4, 3), 1)
    assert loss({"scores": scores}, shares) == pytest.approx(F.cross_entropy(scores, shares).item())


def test_refuses_labels_of_another_size():
    with pytest.raises(SegzooError, match=r"labels must be \(2, 2\) a score, not \(1, 2\)"):
        PixelLoss()({"scores": some_scores()}, LABELS[:, :1])
