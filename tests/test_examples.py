"""examples/quickstart.ipynb is a notebook without outputs, and its cells run in their order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "quickstart.ipynb").read_text())


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_kept():
    assert NOTEBOOK["nbformat"] == 4
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell.get("outputs", []) == [] for cell in NOTEBOOK["cells"])


def test_cells_are_python():
    for i, cell in enumerate(code_cells()):
        compile(cell, f"cell {i}", "exec")


@pytest.mark.slow
def test_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict = {}
    for i, cell in enumerate(code_cells()):
        exec(compile(cell, f"cell {i}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "base     2.282 GMACs, 0.00% of the pixels changed" in printed
    assert "fast     1.872 GMACs" in printed
    assert "fresh classifier" in printed
    assert sorted(path.name for path in Path("masks").iterdir()) == [
        *("scene.png", "scene_classes.json", "scene_overlay.png")
    ]
    assert namespace["result"]._repr_png_().startswith(b"\x89PNG")
