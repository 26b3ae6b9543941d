"""Trainings that are killed, and trainings in two processes, give what one that nothing disturbed gives."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_child import KILLS

from segzoo.data.drawing import write_drawn

CHILD = str(Path(__file__).with_name("training_child.py"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "street"
    write_drawn("scenes", folder, counts={"train": 6, "val": 4}, size=(48, 96))
    return str(folder)


def run(*words: str) -> str:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_killed_ten_times(street, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(CHILD, "whole", street, str(whole))
    assert run(CHILD, "kill", street, str(killed), "7").strip() == str(KILLS)
    assert log_of(killed) == log_of(whole)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    before, after = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, killed))
    for part in ("model", "average"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])
    for index, state in before["optimizer"]["state"].items():
        assert all(torch.equal(state[name], after["optimizer"]["state"][index][name]) for name in state)
    assert not list(killed.glob(".*.partial"))


def test_two_processes_are_one(street, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(CHILD, "spread", street, str(one))
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", CHILD, "spread", street, str(two))
    alone, together = log_of(one), log_of(two)
    assert len(alone) == 6
    for a, b in zip(alone, together, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)
        assert a["lr"] == b["lr"] and a["mIoU"] == b["mIoU"] and a["pixel accuracy"] == b["pixel accuracy"]
    weights, others = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (one, two))
    assert weights["decoder.classifier.weight"].dtype == torch.float64
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=1e-5, atol=1e-8)
    results = [json.loads((two / f"result_{rank}.json").read_text()) for rank in range(2)]
    expected = json.loads((one / "result_0.json").read_text())
    for result in results:
        assert result["metrics"] == expected["metrics"] and result["class_rows"] == expected["class_rows"]
    assert sum(row["pixels"] for row in expected["class_rows"]) == 3 * 48 * 96  # none twice
