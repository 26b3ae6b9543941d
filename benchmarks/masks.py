"""The class map against resize + argmax, in interleaved rounds.

    python benchmarks/masks.py --classes 150 --low 128 128 --size 480 640 --threads 1

Scores are smooth random fields whose share of cells with one class at all four corners is searched for, and noise.
Both forms run in turn on the very same scores, so that a busy machine hits both alike. What counts is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recording import RESULTS, conditions, write_table
from torch import Tensor

import segzoo
from segzoo.masks import class_map


class Logits:
    """A model as far as its class map is concerned."""

    score_kind = "logits"

    @staticmethod
    def to_size(scores_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(scores_BKHW, size=size, mode="bilinear")


def agreement(scores_BKHW: Tensor) -> float:
    """Share of the cells whose four corners have the same best class."""
    best_B1HW = scores_BKHW.argmax(1, keepdim=True).float()
    highest = F.max_pool2d(best_B1HW, 2, stride=1)
    lowest = -F.max_pool2d(-best_B1HW, 2, stride=1)
    return (highest == lowest).float().mean().item()


def smooth_scores(classes: int, low: tuple[int, int], share: float) -> Tensor:
    """(1, classes, *low) whose agreement is about `share`, by the number of random values a side."""
    few, many = 2.0, float(min(low))
    while many - few > 0.5:
        cells = (few + many) / 2
        coarse = torch.randn(1, classes, round(cells), round(cells), generator=torch.Generator().manual_seed(0))
        scores_BKHW = 6 * F.interpolate(coarse, size=low, mode="bicubic")
        few, many = (cells, many) if agreement(scores_BKHW) > share else (few, cells)
    return scores_BKHW


def seconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--low", type=int, nargs=2, default=(128, 128), metavar=("H", "W"), help="of the scores")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of the class map")
    parser.add_argument("--agreements", type=float, nargs="*", default=(0.75, 0.86))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    low, size = tuple(args.low), tuple(args.size)
    scores = [smooth_scores(args.classes, low, share) for share in args.agreements]
    scores += [torch.randn(1, args.classes, *low)]
    rows = []
    for scores_BKHW in scores:
        for layout, memory_format in (("last", torch.channels_last), ("first", torch.contiguous_format)):
            x = scores_BKHW.contiguous(memory_format=memory_format)
            plain, own = (lambda x=x: Logits.to_size(x, size).argmax(1)), (lambda x=x: class_map(Logits(), x, size))
            differing = int((plain() != own()).sum())
            times = [(seconds(plain), seconds(own)) for _ in range(args.rounds + 1)][1:]  # the first warms up
            ratios = [a / b for a, b in times]
            rows.append(
                {
                    "agreeing_cells": round(agreement(scores_BKHW), 3),
                    "channels": layout,
                    "classes": args.classes,
                    "low": f"{low[0]}x{low[1]}",
                    "size": f"{size[0]}x{size[1]}",
                    "threads": args.threads,
                    "plain_ms_median": round(1e3 * statistics.median(a for a, _ in times), 2),
                    "own_ms_median": round(1e3 * statistics.median(b for _, b in times), 2),
                    "speed_up_median": round(statistics.median(ratios), 3),
                    "speed_up_min": round(min(ratios), 3),
                    "speed_up_max": round(max(ratios), 3),
                    "differing_pixels": differing,
                    "rounds": args.rounds,
                    **conditions(torch, segzoo),
                }
            )
            print({key: rows[-1][key] for key in ("agreeing_cells", "channels", "speed_up_median", "differing_pixels")})
    write_table(
        rows,
        RESULTS / f"masks_{args.classes}_{low[0]}x{low[1]}_{size[0]}x{size[1]}_cpu{args.threads}.csv",
    )


if __name__ == "__main__":
    main()
