"""The script that proves a change of structure to change no number: does it see a change of any kind?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_data import GOLDEN
from score_hashes import GOLDENS, differences, digest, variant_hashes

import segzoo


@pytest.mark.parametrize(
    "other",
    [
        [torch.tensor([1.0, 2.0]), torch.tensor([3])],  # the same numbers
        [torch.tensor([1.0, float(np.nextafter(np.float32(2), np.float32(3)))]), torch.tensor([3])],
        [torch.tensor([[1.0, 2.0]]), torch.tensor([3])],
        [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3])],
        [torch.tensor([3]), torch.tensor([1.0, 2.0])],
        [torch.tensor([1.0, 2.0])],
    ],
)
def test_a_digest_is_that_of_bits_shapes_types_and_order(other):
    value = [torch.tensor([1.0, 2.0]), torch.tensor([3])]
    same = len(other) == 2 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(value, other, strict=True))
    assert (digest(value) == digest(other)) == same
    assert digest({"b": value, "a": other}) == digest({"a": other, "b": tuple(value)})


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        digest(torch.nn.Linear(1, 1))


def test_differences():
    before = {"same": "1", "changed": "2", "lost": "3"}
    assert differences(before, {"same": "1", "changed": "4", "new": "5"}) == ["changed: differs", "lost: is gone"]


def test_hashes_repeat_and_cover_every_preset():
    first = dict(variant_hashes("test_eft"))
    assert first == dict(variant_hashes("test_eft"))
    presets = segzoo.create_model("test_eft").reduction_presets
    assert {f"test_eft/{dtype}/preset:{name}/64x96" for dtype in ("float64", "float32") for name in presets} <= set(
        first
    )


def test_every_golden_file_with_arrays_is_covered():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(GOLDENS)
