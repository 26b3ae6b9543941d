"""`segzoo demo`: the bundled model on scenes that it has never seen."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import DEFAULT_MODEL
from .output import print_json, print_table, progress

if TYPE_CHECKING:
    import numpy as np

    from ..models.base import Model
    from ..results import Segmentation

SUMMARY = "segment three unseen synthetic street scenes, with and without reduction"

SEEDS = (2_000_001, 2_000_002, 2_000_003)  # far from the training seeds
SIZE = (256, 512)  # (H, W) in pixels
PRESETS = ("base", "decoder", "optimal", "fast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path("segzoo_demo"), metavar="DIR", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..costing import cost
    from ..data import scenes
    from ..zoo import create_model

    model = create_model(DEFAULT_MODEL, pretrained=True).eval()
    rendered = [scenes.render(seed=seed, size=SIZE) for seed in SEEDS]
    results: dict[str, list[Segmentation]] = {}
    rows = []
    for preset in progress(PRESETS, as_json=args.json):
        model.set_inference_reduction(preset)
        results[preset], miou, seconds = _segment(model, rendered)
        rows.append(
            {
                "reduction": preset,
                "mIoU": round(miou, 4),
                "GMACs": round(cost(model, SIZE).macs / 1e9, 3),
                "ms/image": round(1000 * seconds, 1),
            }
        )
    files = []
    for i, (image, truth) in enumerate(rendered):
        path = args.output / f"scene_{i + 1}.png"
        _draw_panel(image, truth, {preset: results[preset][i] for preset in ("base", "optimal")}, path)
        files.append(str(path))
    if args.json:
        print_json({"model": DEFAULT_MODEL, "table": rows, "files": files})
        return 0
    print(f"{DEFAULT_MODEL} on {len(rendered)} scenes never seen in training, {SIZE[0]}x{SIZE[1]}:\n")
    print_table(rows)
    print("\nImage, truth, mask and overlay side by side:")
    print("\n".join(f"  {file}" for file in files))
    return 0


def _segment(
    model: Model, rendered: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[Segmentation], float, float]:
    """Predictions, their mIoU, and the fastest time of an image in seconds."""
    from ..prediction import predict
    from ..training.metrics import ConfusionMatrix

    confusion = ConfusionMatrix(model.num_classes)
    predict(model, rendered[0][0])  # the first call pays for set-up that later ones do not
    predictions, seconds = [], []
    for image, truth in rendered:
        start = time.perf_counter()
        predictions.append(predict(model, image))
        seconds.append(time.perf_counter() - start)
        confusion.update(predictions[-1].mask, truth)
    return predictions, confusion.miou(), min(seconds)


def _draw_panel(image: np.ndarray, truth: np.ndarray, predictions: Mapping[str, Segmentation], path: Path) -> None:
    """Image, truth, mask and overlay, a row a reduction, over the legend of the classes in the truth."""
    import numpy as np
    from PIL import Image

    from ..results import write_png
    from ..visualize import colour_mask, legend, panel

    labels = next(iter(predictions.values())).label_set
    rows = []
    for preset, result in predictions.items():
        rows.append(
            [
                ("image", Image.fromarray(image)),
                ("truth", Image.fromarray(colour_mask(truth, labels))),
                (f"mask, reduction {preset}", Image.fromarray(colour_mask(result.mask, labels))),
                (f"overlay, reduction {preset}", result.overlay()),
            ]
        )
    present = [int(index) for index in np.unique(truth)]
    write_png(panel(rows, legend(labels, present, 4 * image.shape[1])), path)
