"""Accuracy and cost of a model's reductions on held-out synthetic street scenes.

    python benchmarks/scene_accuracy.py edaformer_t.scenes --reductions base decoder optimal fast

Prints a table of mIoU, small-class mIoU (pole, traffic light, traffic sign, fence), exact multiply-accumulates and
the time of a forward pass relative to the first reduction (all reductions timed in turn, round by round, so that a
busy machine hits them alike), and writes it to benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from recording import RESULTS, conditions, write_table

import segzoo
from segzoo.data import scenes
from segzoo.preprocess import to_input
from segzoo.training.metrics import ConfusionMatrix

FIRST_HELD_OUT_SEED = 1_000_000
SMALL = [scenes.CLASSES.index(name) for name in scenes.SMALL_CLASSES]


def load(name: str, checkpoint: str | None) -> torch.nn.Module:
    if checkpoint is None:
        return segzoo.create_model(name, pretrained=True).eval()
    return segzoo.create_model(name, checkpoint_path=checkpoint, num_classes=len(scenes.CLASSES)).eval()


@torch.inference_mode()
def accuracy(
    model: torch.nn.Module, reductions: list[str], count: int, size: tuple[int, int], scale: float
) -> dict[str, ConfusionMatrix]:
    """Confusion of every reduction over the same scenes; `scale` shrinks the input, the other way to save cost."""
    row = segzoo.models.PretrainedCfg()
    seen = (round(size[0] * scale), round(size[1] * scale))
    confusion = {reduction: ConfusionMatrix(len(scenes.CLASSES)) for reduction in reductions}
    for i in range(count):
        image, truth = scenes.render(seed=FIRST_HELD_OUT_SEED + i, size=size)
        x = to_input(image, seen, row, torch.zeros(1))
        for reduction in reductions:
            model.set_inference_reduction(plan(reduction))
            scores = model.to_size(model.forward_head(model.forward_features(x)), size)
            confusion[reduction].update(scores.argmax(1)[0].numpy().astype(np.int64), truth)
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{count} scenes", end="", file=sys.stderr)
    return confusion


def plan(reduction: str) -> object:
    return None if reduction == "none" else reduction


@torch.inference_mode()
def relative_times(model: torch.nn.Module, reductions: list[str], size: tuple[int, int], rounds: int) -> list[float]:
    """Median over rounds of each reduction's time over the first one's in the same round."""
    x = torch.randn(1, 3, *size)
    ratios = []
    for round_ in range(rounds + 1):
        times = []
        for reduction in reductions:
            model.set_inference_reduction(plan(reduction))
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
        if round_:  # the first round warms up
            ratios.append([value / times[0] for value in times])
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name.tag, or a name with --checkpoint")
    parser.add_argument("--checkpoint", help="weights trained on the scenes")
    parser.add_argument("--reductions", nargs="+", default=["base"], help="presets, ints, JSON plans, or 'none'")
    parser.add_argument("--scenes", type=int, default=200, help="number of held-out scenes")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"))
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the input instead of the tokens")
    parser.add_argument("--rounds", type=int, default=15, help="paired timing rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="file of the table (default: in benchmarks/results)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    size = tuple(args.size)
    model = load(args.model, args.checkpoint)
    confusion = accuracy(model, args.reductions, args.scenes, size, args.scale)
    seen = (round(size[0] * args.scale), round(size[1] * args.scale))
    times = relative_times(model, args.reductions, seen, args.rounds)
    rows = []
    for reduction, ratio in zip(args.reductions, times, strict=True):
        model.set_inference_reduction(plan(reduction))
        rows.append(
            {
                "model": args.model,
                "reduction": reduction,
                "scenes": args.scenes,
                "size": f"{size[0]}x{size[1]}",
                "seen_size": f"{seen[0]}x{seen[1]}",
                "miou": round(confusion[reduction].miou(), 4),
                "small_class_miou": round(confusion[reduction].miou(SMALL), 4),
                "gmacs": round(segzoo.cost(model, seen).macs / 1e9, 4),
                "time_ratio": round(ratio, 3),
                "threads": args.threads,
                **conditions(torch, segzoo),
            }
        )
    print(f"\n{'reduction':<44}{'mIoU':>8}{'small':>8}{'GMACs':>9}{'time':>7}")
    for row in rows:
        print(
            f"{row['reduction'][:43]:<44}{row['miou']:>8.4f}{row['small_class_miou']:>8.4f}"
            f"{row['gmacs']:>9.3f}{row['time_ratio']:>7.2f}"
        )
    for name, iou in zip(scenes.CLASSES, confusion[args.reductions[0]].iou(), strict=True):
        print(f"  {name:<16}{iou:.3f}")
    write_table(rows, args.csv or RESULTS / f"scenes_{args.model}_{size[0]}x{size[1]}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
