"""Colours: every class its own, what is no class black, and overlays that do not depend on how they are made."""

from __future__ import annotations

import numpy as np
import pytest

from segzoo import visualize
from segzoo.labels import generic_labels
from segzoo.visualize import colour_mask, overlay


@pytest.mark.parametrize(
    ("num_classes", "values", "dtype"),
    [
        (5, (0, 4, 5, 255), np.uint8),
        (256, (0, 255), np.uint8),
        (300, (0, 299, 300, 65535), np.uint16),
        (300, (0, 299, 300, -1), np.int64),
    ],
)
def test_what_is_no_class_is_black(num_classes, values, dtype):
    labels = generic_labels(num_classes)
    colours = colour_mask(np.array([values], dtype=dtype), labels)
    assert colours.dtype == np.uint8
    expected = [labels.palette[value] if 0 <= value < num_classes else (0, 0, 0) for value in values]
    assert colours[0].tolist() == [list(colour) for colour in expected]


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_overlay_is_the_rounded_mix(alpha, monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    mask = rng.integers(0, 7, (37, 53), dtype=np.uint8)
    labels = generic_labels(6)
    expected = (image * (1 - alpha) + colour_mask(mask, labels) * alpha).round().astype(np.uint8)
    for block in (1, 500, 10**6):
        monkeypatch.setattr(visualize, "BLOCK_PIXELS", block)
        assert np.array_equal(np.asarray(overlay(image, mask, labels, alpha)), expected)


def test_overlay_needs_little_memory():
    import tracemalloc

    image, mask = np.zeros((1000, 1000, 3), np.uint8), np.zeros((1000, 1000), np.uint8)
    tracemalloc.start()
    overlay(image, mask, generic_labels(3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * mask.size  # the result alone has 3 bytes a pixel
