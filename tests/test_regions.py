"""Shapes of classes: run lengths against pycocotools, polygons against a filling rule of their own and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from segzoo.regions import to_polygons, to_rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

MASKS = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 3))


def filled(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The even-odd rule: a pixel is inside if an odd number of vertical sides lie to its left in its row."""
    crossings_HW = np.zeros((shape[0], shape[1] + 1), dtype=int)
    for ring_N2 in rings:
        for (x0, y0), (x1, y1) in zip(ring_N2, np.roll(ring_N2, -1, axis=0), strict=True):
            assert (x0 == x1) != (y0 == y1)  # along the edges of pixels, and no corner twice
            if x0 == x1:
                crossings_HW[min(y0, y1) : max(y0, y1), x0] += 1
    return crossings_HW.cumsum(axis=1)[:, :-1] % 2 == 1


def signed_area(ring_N2: np.ndarray) -> float:
    """Positive if clockwise on a screen, where y points down."""
    (x, y), (x1, y1) = ring_N2.T.astype(float), np.roll(ring_N2, -1, axis=0).T
    return float((x * y1 - x1 * y).sum() / 2)


@given(MASKS)
@settings(deadline=None, max_examples=200)
def test_run_lengths_are_pycocotools_own(mask):
    rles = to_rle(mask)
    assert sorted(rles) == np.unique(mask).tolist()
    for index, rle in rles.items():
        expected = coco.encode(np.asfortranarray((mask == index).astype(np.uint8)))
        assert rle == {"size": list(expected["size"]), "counts": expected["counts"].decode()}


def test_long_runs_and_many_classes():
    rng = np.random.default_rng(0)
    mask = np.zeros((700, 900), np.uint16)  # runs of up to 630,000 pixels take several characters
    mask[rng.integers(0, 700, 50), rng.integers(0, 900, 50)] = rng.integers(1, 300, 50)
    for index, rle in to_rle(mask).items():
        assert np.array_equal(coco.decode(rle), mask == index)


@given(MASKS)
@settings(deadline=None, max_examples=200)
def test_polygons_cover_their_class(mask):
    polygons = to_polygons(mask)
    assert sorted(polygons) == np.unique(mask).tolist()
    for index, rings in polygons.items():
        assert np.array_equal(filled(rings, mask.shape), mask == index)
        assert sum(map(signed_area, rings)) == (mask == index).sum()  # outer rings less holes


def test_a_ring_around_a_hole_and_a_corner():
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    outer, hole, apart = to_polygons(mask)[1]
    assert outer.tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]
    assert hole.tolist() == [[1, 2], [2, 2], [2, 1], [1, 1]]
    assert apart.tolist() == [[3, 3], [4, 3], [4, 4], [3, 4]]  # touches the first at a corner only
    assert [signed_area(ring) for ring in (outer, hole, apart)] == [9, -1, 1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_a_mask_of_one_class(shape):
    mask = np.full(shape, 7, np.uint8)
    H, W = shape
    assert [ring.tolist() for ring in to_polygons(mask)[7]] == [[[0, 0], [W, 0], [W, H], [0, H]]]
    assert coco.decode(to_rle(mask)[7]).all()
