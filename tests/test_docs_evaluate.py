"""docs/evaluate.md runs as it stands, beside a small folder `street`, and names every layout and protocol."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from segzoo.cli import main
from segzoo.data import scenes
from segzoo.data.layouts import LAYOUTS
from segzoo.training.protocols import PROTOCOLS

DOCUMENT = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def street(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        for folder, array in zip(("images", "masks"), scenes.render(seed=1_000_000 + i, size=(64, 128)), strict=True):
            Path("street", folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(f"street/{folder}/{i}.png")
    Path("street/dataset.json").write_text('{"label_set": "scenes"}')


def test_commands(street, capsys):
    for line in "".join(blocks("sh")).splitlines():
        program, *words = shlex.split(line)
        assert program == "segzoo" and main(words) == 0, line
    assert "no fault found" in capsys.readouterr().out
    assert Path("classes.png").is_file()
    names = {path.name for path in Path("results").iterdir()}
    assert names == {"results.json", "results.csv", "classes.csv", "classes.png"}


def test_python(street):
    (code,) = blocks("python")
    exec(compile(code, "docs/evaluate.md", "exec"), {})


@pytest.mark.parametrize("name", [*LAYOUTS, *PROTOCOLS])
def test_every_layout_and_protocol_is_named(name):
    assert f"`{name}`" in DOCUMENT
