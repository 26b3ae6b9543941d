"""Draw the pictures of docs/idea.md: `python docs/draw_idea.py` writes tokens.jpg, merged.jpg and attention.jpg.

They are what `segzoo explain` draws of the bundled model on the demo's first scene.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

import segzoo
from segzoo.cli import demo
from segzoo.cli.arguments import DEFAULT_MODEL

FOLDER = Path(__file__).resolve().parent
SITE = "encoder.1"
CAR = (200, 215)  # (row, column) in the scene
QUALITY = 85
MOST_BYTES = 200_000

# File -> the picture of `segzoo explain` and the reduction that it is of.
PICTURES = {
    "tokens": ("tokens", {SITE: 2}),
    "merged": ("tokens", {SITE: segzoo.Bipartite(0.75, 2)}),
    "attention": ("attention", {SITE: 2}),
}


def draw() -> dict[Path, bytes]:
    model = segzoo.create_model(DEFAULT_MODEL, pretrained=True, pretrained_cfg_overlay={"test_size": demo.SIZE}).eval()
    image, _ = demo.render_scenes()[0]
    drawn = {}
    for name, (picture, reduction) in PICTURES.items():
        shown = segzoo.explain(model, image, site=SITE, reduction=reduction, queries=[CAR])
        with tempfile.TemporaryDirectory() as folder:
            shown.save(folder)
            stream = io.BytesIO()
            Image.open(f"{folder}/{picture}.png").convert("RGB").save(stream, "JPEG", quality=QUALITY, optimize=True)
        drawn[FOLDER / f"{name}.jpg"] = stream.getvalue()
    return drawn


def main() -> None:
    for path, data in draw().items():
        if len(data) > MOST_BYTES:
            raise SystemExit(f"{path.name}: {len(data)} bytes are more than {MOST_BYTES}")
        path.write_bytes(data)
        print(f"{path.name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
