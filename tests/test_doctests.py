"""The examples in the docstrings of the public names run and print what they say."""

from __future__ import annotations

import doctest

import pytest

import segzoo

NAMES = [
    *("create_model", "list_models", "list_pretrained", "model_info", "save_pretrained", "predict"),
    *("set_inference_reduction", "inference_reduction", "reduction_sites", "Pool", "Bipartite", "fold", "cost"),
    *("Window", "LocalGlobal", "EnergyProtected", "GridMerge", "fit_reduction"),
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(getattr(segzoo, name), name, globs={})
    examples = [test for test in found if test.examples]
    assert examples, f"segzoo.{name} has no example"
    output: list[str] = []
    for test in examples:
        results = doctest.DocTestRunner().run(test, out=output.append)
        assert results.failed == 0, "".join(output)
