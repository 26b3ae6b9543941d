"""docs/predict.md runs as it stands, beside a picture `street.jpg`; its command lines name options that there are."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from segzoo.cli import build_parser
from segzoo.data import scenes

DOCUMENT = (Path(__file__).parents[1] / "docs" / "predict.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    street = Image.fromarray(scenes.render(seed=4_000_000, size=(128, 256))[0])
    street.save("street.jpg")
    street.save("scene.tif")
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.S))
    exec(compile(code, "docs/predict.md", "exec"), {})
    assert "<Segmentation of street.jpg (128x256) by edaformer_t.scenes: road" in capsys.readouterr().out
    assert {path.name for path in Path("masks").iterdir()} == {
        *("street.png", "street_overlay.png", "street_classes.json")
    }
    assert {path.name for path in Path("maps").iterdir()} == {"scene.tif", "scene_classes.json"}
    assert {path.name for path in Path("poses").iterdir()} == {"street.png", "street_keypoints.json"}


def test_options_are_known():
    block = "".join(re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S))
    (predict,) = (action for action in build_parser()._actions if action.dest == "verb")
    known = predict.choices["predict"].format_help()
    for option in re.findall(r"(?<=[ `])(--?[a-z][a-z-]*)", block.replace("-name", "").replace("-print0", "")):
        assert option in known
    for option in re.findall(r"`(--[a-z-]+)", DOCUMENT):
        assert option in known
