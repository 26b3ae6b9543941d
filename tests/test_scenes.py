"""The synthetic scenes: reproducible at any size, every class drawn, and not solvable by colour."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segzoo.data.scenes import CLASSES, SMALL_CLASSES, render, render_with_boxes


@pytest.fixture(scope="module")
def label_maps() -> list[np.ndarray]:
    return [render(seed=seed)[1] for seed in range(40)]


def median_run(labels: np.ndarray, cls: int) -> float:
    """Median length of the horizontal runs of one class."""
    inside = np.pad((labels == cls).astype(np.int8), ((0, 0), (1, 1)))
    step = np.diff(inside, axis=1)
    starts, ends = np.argwhere(step == 1)[:, 1], np.argwhere(step == -1)[:, 1]
    return float(np.median(ends - starts))


def test_a_seed_always_gives_the_same_scene():
    first, second, other = render(seed=7), render(seed=7), render(seed=8)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("size", [(256, 512), (1, 1), (1, 40), (17, 23), (96, 64)])
def test_shapes_and_types(size):
    image, labels, cars = render_with_boxes(seed=3, size=size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert labels.shape == size and labels.dtype == np.uint8 and labels.max() < len(CLASSES)
    assert cars.shape[1:] == (4,) and cars.dtype == np.float32


@pytest.mark.parametrize("other", [(128, 256), (200, 300)])
def test_the_layout_does_not_depend_on_the_size(other):
    for seed in range(8):
        large, small = render(seed=seed)[1], render(seed=seed, size=other)[1]
        resized = Image.fromarray(large).resize((other[1], other[0]), Image.Resampling.NEAREST)
        assert (np.asarray(resized) == small).mean() >= 0.9


def test_every_class_is_frequent(label_maps):
    present = np.array([np.bincount(labels.ravel(), minlength=len(CLASSES)) > 0 for labels in label_maps])
    assert (present.mean(axis=0) >= 0.6).all(), dict(zip(CLASSES, present.mean(axis=0), strict=True))
    pixels = np.bincount(np.concatenate([labels.ravel() for labels in label_maps]), minlength=len(CLASSES))
    shares = dict(zip(CLASSES, pixels / pixels.sum(), strict=True))
    assert all(shares[name] >= 0.007 for name in SMALL_CLASSES), shares


def test_thin_classes_are_wide_enough_for_a_coarse_decoder(label_maps):
    stacked = np.concatenate(label_maps)
    least = 0.025 * label_maps[0].shape[0]
    for name in ("pole", "traffic light", "traffic sign"):
        assert median_run(stacked, CLASSES.index(name)) >= least
    columns = np.concatenate([labels.T for labels in label_maps])
    assert median_run(columns, CLASSES.index("fence")) >= least


def test_car_boxes_hold_the_cars():
    inside = total = boxes = 0
    for seed in range(10):
        _, labels, cars = render_with_boxes(seed=seed)
        assert (cars[:, :2] >= 0).all() and (cars[:, 2:] <= [512, 256]).all() and (cars[:, 2:] > cars[:, :2]).all()
        assert (np.diff(cars[:, 3]) <= 0).all(), "nearest car first"
        is_car, covered = labels == CLASSES.index("car"), np.zeros(labels.shape, dtype=bool)
        for x0, y0, x1, y1 in np.round(cars).astype(int):
            covered[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = True
        inside, total, boxes = inside + (is_car & covered).sum(), total + is_car.sum(), boxes + len(cars)
    assert boxes >= 10 and inside == total


@pytest.mark.parametrize("seed", [-1, 1.5, True, None])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer >= 0"):
        render(seed=seed)


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4.0, 8), (4,), 8, (True, 4)])
def test_bad_size_is_refused(size):
    with pytest.raises(ValueError, match="size must be"):
        render(seed=0, size=size)


def test_colour_does_not_give_the_class_away(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    baseline = importlib.import_module("scene_colour_baseline")
    table = baseline.fit(range(60), (128, 256), 32)
    result = baseline.evaluate(table, range(baseline.EVAL_SEED, baseline.EVAL_SEED + 20), (128, 256), 32)
    assert 0.03 < baseline.class_iou(result["confusion"]).mean() < 0.45
