"""Augmentation: image and mask stay together, crops are varied, and every parameter does what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from segzoo._errors import SegzooError
from segzoo.data.transforms import (
    PadTo,
    RandomScale,
    VariedCrop,
    classification_transform,
    mixup,
    segmentation_transform,
    to_tv,
)


def sample(h=40, w=60, seed=0):
    """Labels 0 to 4 in blocks of ten pixels; the image's red channel is 40 times the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, size=(h // 10, w // 10), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    return np.dstack([labels * 40, labels * 0, labels * 0 + 255]).astype(np.uint8), labels


def test_image_and_mask_stay_together():
    torch.manual_seed(0)
    transform = segmentation_transform(
        crop=(24, 32), scale=(1.0, 1.0), distort=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    flipped = set()
    for _ in range(20):
        x, labels = transform(*to_tv(*sample()))
        assert type(x) is torch.Tensor and x.shape == (3, 24, 32) and x.dtype == torch.float32
        assert type(labels) is torch.Tensor and labels.shape == (24, 32) and labels.dtype == torch.int64
        torch.testing.assert_close(x[0] * 255, labels * 40.0)
        flipped.add(bool((labels[:, 0] == labels[:, 0]).all()))
    assert flipped


def test_flips_half_of_the_time():
    torch.manual_seed(0)
    image, labels = sample(20, 20)
    labels[:, :10], labels[:, 10:] = 1, 2
    transform = segmentation_transform(crop=(20, 20), scale=(1.0, 1.0))
    left = [int(transform(*to_tv(image, labels))[1][0, 0]) for _ in range(60)]
    assert set(left) == {1, 2} and 15 < left.count(1) < 45


def test_labels_are_never_mixed():
    torch.manual_seed(1)
    image, labels = sample()
    labels = np.where(labels == 4, 255, labels * 60).astype(np.uint8)  # a mean of two would be another value
    transform = segmentation_transform(crop=(48, 48))
    for _ in range(20):
        assert set(transform(*to_tv(image, labels))[1].unique().tolist()) <= {0, 60, 120, 180, 255}


def test_normalised_and_padded_with_the_mean_colour():
    torch.manual_seed(0)
    transform = segmentation_transform(crop=(50, 70), scale=(1.0, 1.0), distort=False, ignore_index=99)
    x, labels = transform(*to_tv(*sample()))
    assert (labels[40:] == 99).all() and (labels[:, 60:] == 99).all() and (labels[:40, :60] < 5).all()
    assert (x[:, 40:] == 0).all() and (x[:, :, 60:] == 0).all()
    torch.testing.assert_close(x[2, :40, :60], torch.full((40, 60), (1 - 0.406) / 0.225))


@pytest.mark.parametrize(("base", "expected"), [(None, (40, 60)), ((400, 30), (30, 45)), ((20, 24), (16, 24))])
def test_scale(base, expected):
    image, labels = to_tv(*sample())
    torch.manual_seed(0)
    sides = []
    for _ in range(50):
        scaled, mask = RandomScale(base=base, scale=(0.5, 2.0))(image, labels)
        assert scaled.shape[1:] == mask.shape
        assert scaled.shape[2] / scaled.shape[1] == pytest.approx(1.5, rel=0.06)
        sides.append(scaled.shape[1] / expected[0])
    assert 0.49 <= min(sides) < 0.7 and 1.7 < max(sides) <= 2.01
    torch.manual_seed(0)
    assert tuple(RandomScale(base=base, scale=(1.0, 1.0))(image)[0].shape) == expected


def test_no_class_dominates_a_crop():
    torch.manual_seed(0)
    labels = np.zeros((100, 100), np.uint8)
    labels[40:60, 40:60] = 1  # 4 % of the whole: most crops show class 0 alone
    labels[:5] = 255
    image = tv_tensors.Mask(torch.from_numpy(labels))

    def share(limit):
        crop = VariedCrop(size=(25, 25), max_class_share=limit, ignore_index=255)
        parts = [crop(image) for _ in range(80)]
        assert all(part.shape == (25, 25) for part in parts)
        return sum((part == 0).sum() / (part != 255).sum() < 0.75 for part in parts) / len(parts)

    assert share(1.0) < 0.35
    assert share(0.75) > 0.65


def test_a_crop_of_ignored_pixels_is_drawn_anew():
    torch.manual_seed(0)
    labels = torch.full((10, 100), 255)
    labels[:, 50:60:2], labels[:, 51:60:2] = 1, 2
    crop = VariedCrop(size=(10, 30), max_class_share=0.75, ignore_index=255)
    parts = [crop(tv_tensors.Mask(labels)) for _ in range(40)]
    assert sum(bool((part != 255).any()) for part in parts) > 36


def test_ignored_pixels_have_no_share_of_a_crop():
    """On the left nine tenths are ignored and the rest is even: as good a place for a crop as the right."""
    torch.manual_seed(0)
    labels = torch.full((20, 100), 255)
    labels[18, :50], labels[19, :50] = 1, 2
    labels[:10, 50:], labels[10:, 50:] = 1, 2
    crop = VariedCrop(size=(20, 30), max_class_share=0.75, ignore_index=255)
    ignored = [(crop(tv_tensors.Mask(labels)) == 255).float().mean() for _ in range(80)]
    assert sum(share > 0.89 for share in ignored) > 12


def test_small_images_are_kept_whole():
    labels = tv_tensors.Mask(torch.arange(12).reshape(3, 4))
    assert torch.equal(VariedCrop(size=(10, 10), max_class_share=0.75, ignore_index=255)(labels), labels)
    assert PadTo(size=(3, 4), ignore_index=255)(labels) is labels


def test_distortion_changes_colours_only():
    torch.manual_seed(0)
    image, labels = to_tv(*sample())
    transform = segmentation_transform(crop=(40, 60), scale=(1.0, 1.0), mean=(0, 0, 0), std=(1, 1, 1))
    plain = image / 255
    changed = 0
    for _ in range(10):
        x, mask = transform(image, labels)
        same_way = torch.equal(mask, torch.as_tensor(labels))
        assert same_way or torch.equal(mask.flip(-1), torch.as_tensor(labels))
        changed += not torch.allclose(x if same_way else x.flip(-1), torch.as_tensor(plain), atol=1e-3)
    assert changed > 5


def test_classifiers():
    torch.manual_seed(0)
    image, _ = to_tv(*sample())
    x = classification_transform(size=(16, 24))(image)
    assert type(x) is torch.Tensor and x.shape == (3, 16, 24)
    images, shares = mixup(3)(torch.stack([x, x * 0]), torch.tensor([0, 2]))
    assert images.shape == (2, 3, 16, 24) and shares.shape == (2, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    torch.testing.assert_close(images[0], x * shares[0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomScale(base=None, scale=(2.0, 0.5)), "smallest, largest"),
        (lambda: VariedCrop(size=(4, 4), max_class_share=0, ignore_index=255), "max_class_share"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(SegzooError, match=message):
        make()
