"""mIoU by mmsegmentation's definition, on cases counted by hand and against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from segzoo.labels import load_labels
from segzoo.training.metrics import SMALL_CLASSES, ConfusionMatrix


def counted(predicted, truth, num_classes, ignore_index=255):
    matrix = ConfusionMatrix(num_classes, ignore_index)
    matrix.update(np.array(predicted, np.uint8), np.array(truth, np.uint8))
    return matrix


def test_by_hand():
    matrix = counted([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 2, 2]], 3)
    assert matrix.counts_TP.tolist() == [[1, 0, 0], [1, 2, 0], [0, 1, 1]]
    assert matrix.counts_TP.dtype == np.int64
    assert matrix.iou().tolist() == [1 / 2, 2 / 4, 1 / 2]
    assert matrix.miou() == 0.5
    assert matrix.miou([1, 2]) == 0.5
    assert matrix.pixel_accuracy() == pytest.approx(4 / 6)
    assert matrix.class_accuracy().tolist() == pytest.approx([1, 2 / 3, 1 / 2])
    assert matrix.mean_accuracy() == pytest.approx(13 / 18)


def test_an_absent_class_is_left_out():
    """mmsegmentation averages with nanmean: class 2 is in neither map, and class 3 only predicted counts as 0."""
    matrix = counted([[0, 0], [1, 3]], [[0, 0], [1, 1]], 4)
    np.testing.assert_array_equal(matrix.iou(), [1, 0.5, math.nan, 0])
    assert matrix.miou() == 0.5
    assert math.isnan(matrix.miou([2]))
    np.testing.assert_array_equal(matrix.class_accuracy(), [1, 0.5, math.nan, math.nan])


def test_ignored_pixels_count_nowhere():
    matrix = counted([[0, 1], [1, 1]], [[0, 255], [255, 1]], 2)
    assert matrix.counts_TP.tolist() == [[1, 0], [0, 1]]
    assert matrix.miou() == 1
    assert counted([[0, 1]], [[0, 99]], 2, ignore_index=99).counts_TP.sum() == 1


def test_all_ignored():
    matrix = counted([[0, 1]], [[255, 255]], 2)
    assert math.isnan(matrix.miou()) and math.isnan(matrix.pixel_accuracy())


@pytest.mark.parametrize("seed", range(4))
def test_torchmetrics_agrees(seed):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(6, size=(2, 40, 50))
    truth = np.where(rng.random(truth.shape) < 0.2, 255, truth)
    matrix = counted(predicted, truth, 6)
    tensors = torch.from_numpy(predicted), torch.from_numpy(truth)
    counts = multiclass_confusion_matrix(*tensors, 6, ignore_index=255)
    assert counts.tolist() == matrix.counts_TP.tolist()
    theirs = multiclass_jaccard_index(*tensors, 6, average=None, ignore_index=255)
    np.testing.assert_allclose(matrix.iou(), theirs.numpy(), rtol=1e-6)


def test_counts_of_something_else():
    counts = np.array([[2**40, 1], [0, 3]])
    assert ConfusionMatrix.of(counts).counts_TP.tolist() == counts.tolist()
    assert ConfusionMatrix.of(counts).iou()[1] == 0.75


def test_small_classes_are_classes():
    for name, classes in SMALL_CLASSES.items():
        assert set(classes) < set(load_labels(name).classes)
