"""How far colour alone gets on the synthetic scenes: a per-pixel classifier as a floor for segmentation models.

The classifier knows one thing: the class seen most often in each cell of a coarse RGB histogram. If it scored well,
the scenes would be a colour-matching exercise and say nothing about a model's use of shape and context.

    python benchmarks/scene_colour_baseline.py --csv benchmarks/results/scenes_colour_baseline.csv

Fit scenes have the seeds 0, 1, ...; evaluation scenes start at `EVAL_SEED`, so the two never meet.
"""

import argparse
from pathlib import Path

import numpy as np
import PIL
from recording import conditions, write_table

from segzoo.data.scenes import CLASSES, render

EVAL_SEED = 1_000_000


def colour_cells(image: np.ndarray, bins: int) -> np.ndarray:
    """Histogram cell of each pixel, int64 (H * W,), of an image uint8 (H, W, 3); `bins` cells a channel."""
    channels = (image.reshape(-1, 3).astype(np.int64) * bins) // 256
    return (channels[:, 0] * bins + channels[:, 1]) * bins + channels[:, 2]


def fit(seeds: range, size: tuple[int, int], bins: int) -> np.ndarray:
    """The most frequent class of each cell, int64 (bins ** 3,); cells never seen get the most frequent class of all."""
    counts = np.zeros((bins**3, len(CLASSES)), dtype=np.int64)
    for seed in seeds:
        image, labels = render(seed=seed, size=size)
        pairs = colour_cells(image, bins) * len(CLASSES) + labels.ravel()
        counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), counts.sum(axis=0).argmax())


def evaluate(table: np.ndarray, seeds: range, size: tuple[int, int], bins: int) -> dict[str, np.ndarray]:
    """Confusion matrix (true, predicted), int64 (classes, classes), and in how many scenes each class appears."""
    n = len(CLASSES)
    confusion = np.zeros((n, n), dtype=np.int64)
    present = np.zeros(n, dtype=np.int64)
    for seed in seeds:
        image, labels = render(seed=seed, size=size)
        predicted = table[colour_cells(image, bins)]
        scene = np.bincount(labels.ravel().astype(np.int64) * n + predicted, minlength=n * n).reshape(n, n)
        confusion += scene
        present += scene.any(axis=1)
    return {"confusion": confusion, "present": present}


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64 (classes,)."""
    hit = np.diag(confusion)
    return hit / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1) - hit, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-scenes", type=int, default=200)
    parser.add_argument("--eval-scenes", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"))
    parser.add_argument("--bins", type=int, default=32, help="histogram cells a channel")
    parser.add_argument("--csv", type=Path, default=None, help="write the result here, one row")
    args = parser.parse_args()
    size = (args.size[0], args.size[1])

    table = fit(range(args.fit_scenes), size, args.bins)
    result = evaluate(table, range(EVAL_SEED, EVAL_SEED + args.eval_scenes), size, args.bins)
    iou = class_iou(result["confusion"])
    frequency = result["confusion"].sum(axis=1) / result["confusion"].sum()
    present = result["present"] / args.eval_scenes

    print(f"mIoU {iou.mean():.4f}  ({args.fit_scenes} scenes to fit, {args.eval_scenes} to evaluate)")
    print(f"{'class':14s} {'IoU':>6s} {'pixels':>8s} {'scenes':>7s}")
    for name, *values in zip(CLASSES, iou, frequency, present, strict=True):
        print(f"{name:14s} {values[0]:6.3f} {values[1]:8.2%} {values[2]:7.0%}")

    if args.csv is not None:
        row = {
            "height": size[0],
            "width": size[1],
            "bins": args.bins,
            "fit_scenes": args.fit_scenes,
            "eval_scenes": args.eval_scenes,
            "miou": f"{iou.mean():.4f}",
        }
        for prefix, values in (("iou", iou), ("pixels", frequency), ("scenes", present)):
            row |= {f"{prefix}_{c.replace(' ', '_')}": f"{v:.4f}" for c, v in zip(CLASSES, values, strict=True)}
        write_table([row | conditions(np, PIL)], args.csv)


if __name__ == "__main__":
    main()
