"""benchmarks/arena.py keeps to its shares and measures what it says; benchmarks/readme_table.py joins its tables."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import segzoo


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.mark.slow
def test_plans_of_a_kind_keep_to_their_share(benchmark, monkeypatch):
    arena = benchmark("arena")
    monkeypatch.setattr(arena, "SHARES", (0.97, 0.5))  # one that a tiny model reaches
    torch.manual_seed(0)
    model = segzoo.create_model("test_segformer").eval()
    model.mark_loaded()
    image, size = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8), (96, 128)
    base = segzoo.cost(model, size).macs
    field = arena.of_kind(model, [image], size, "Pool", "kv+q", [2, 4])
    assert [contestant.share for contestant in field] == list(arena.SHARES)
    assert [contestant.plan is None for contestant in field] == [False, True]
    for contestant in field:
        if contestant.plan is None:
            assert contestant.macs > contestant.share
            continue
        with segzoo.inference_reduction(model, contestant.plan):
            assert segzoo.cost(model, size).macs == round(contestant.macs * base)
        assert contestant.macs <= contestant.share
    assert arena.of_kind(model, [image], size, "Window", "q", arena.KINDS["Window"]) == []
    data = arena.Data(lambda seed, size: (image, np.zeros(size, dtype=np.uint8)), ("a",) * 8, ())
    plans = [segzoo.set_inference_reduction(model, None), segzoo.set_inference_reduction(model, 4)]
    _, changed = arena.accuracy(model, plans, data, 1, size)
    assert changed[0, 0] == 0


def test_the_table_joins_both_kinds_of_scenes(benchmark, tmp_path):
    readme_table = benchmark("readme_table")
    head = "model,data,kind,side,gmacs,time_fused,miou\n"
    (tmp_path / "a.csv").write_text(
        f"{head}eft.scenes,scenes,preset,base,2.2822,1.0,0.8904\neft.scenes,scenes,Pool,kv,1.9,0.9,0.88\n"
        "vit,scenes,preset,base,14,1.0,0.6\n"
    )
    (tmp_path / "b.csv").write_text(f"{head}eft,context,preset,base,2.2822,1.0,0.71\n")
    rows = readme_table.rows_in([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert readme_table.table(rows).splitlines()[2:] == [
        "| eft | base | 2.28 | 1.00 | 0.8904 | 0.71 |",
        "| vit | base | 14.00 | 1.00 | 0.6 | – |",
    ]
