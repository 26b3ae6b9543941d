"""Draw the figure that opens README: `python docs/draw_demo.py` writes docs/demo.jpg, the demo's first scene."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from segzoo import cost, create_model
from segzoo.cli import demo
from segzoo.cli.arguments import DEFAULT_MODEL

PICTURE = Path(__file__).with_name("demo.jpg")
WIDTH = 1440  # pixels
QUALITY = 85  # of the JPEG; a PNG of few colours would show others
MOST_BYTES = 300_000


def draw() -> Image.Image:
    model = create_model(DEFAULT_MODEL, pretrained=True, pretrained_cfg_overlay={"test_size": demo.SIZE}).eval()
    image, truth = demo.render_scenes()[0]
    results = demo.segment(model, [(image, truth)], as_json=False)
    gmacs = {}
    for preset in results:
        model.set_inference_reduction(preset)
        gmacs[preset] = cost(model, demo.SIZE).macs / 1e9
    sheet = demo.draw_sheet(image, truth, {preset: result for preset, (result,) in results.items()}, gmacs)
    return sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)), Image.Resampling.LANCZOS)


def main() -> None:
    stream = io.BytesIO()
    draw().save(stream, format="JPEG", quality=QUALITY, subsampling=0, optimize=True)
    data = stream.getvalue()
    if len(data) > MOST_BYTES:
        raise SystemExit(f"{len(data)} bytes are more than {MOST_BYTES}; lower QUALITY or WIDTH")
    PICTURE.write_bytes(data)
    print(f"{PICTURE}: {len(data)} bytes")


if __name__ == "__main__":
    main()
