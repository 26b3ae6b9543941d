"""docs/timm.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = (Path(__file__).parents[1] / "docs" / "timm.md").read_text()


def test_the_examples_run(capsys):
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert capsys.readouterr().out == (
        "a model takes images (B, 3, H, W) in float32, not (160, 160, 3) in uint8: one image needs a batch axis, "
        "x[None]\n"
    )
