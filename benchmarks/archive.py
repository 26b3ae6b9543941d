"""Images per second of an archive against the model alone in as many processes, in turn, round by round.

    python benchmarks/archive.py edaformer_t.scenes --reduction fast --images 600 --size 256 512 --workers 2

Alone means `segzoo.predict` of the same files in processes of one thread, each with its share of them, which read,
decode and make masks, and write nothing. The archive does that and encodes and writes masks and manifest. Both are
measured from when their models are at work: alone from a common start, the archive from the first finished part to the
last. What counts is the ratio; it needs a quiet machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from recording import RESULTS, conditions, write_table

import segzoo
from segzoo.data import scenes
from segzoo.scale import BatchSegmenter, segment_archive


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """JPEG files of a few scenes, each moved by another distance."""
    drawn = [scenes.render(seed=6_000_000 + i, size=size)[0] for i in range(8)]
    files = [folder / f"{i:06d}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        Image.fromarray(np.roll(drawn[i % 8], i, axis=1)).save(file, quality=90)
    return files


def predict_share(model: str, reduction: str | None, files: list[Path], start: Barrier) -> None:
    torch.set_num_threads(1)
    made = segzoo.create_model(model, pretrained=True)
    made.set_inference_reduction(reduction)
    segzoo.predict(made, files[0])
    start.wait()
    for result in segzoo.predict(made, iter(files)):
        assert result.mask.size
    start.wait()


def rate_alone(model: str, reduction: str | None, files: list[Path], workers: int) -> float:
    """Images per second."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    shares = [files[i::workers] for i in range(workers)]
    processes = [context.Process(target=predict_share, args=(model, reduction, share, barrier)) for share in shares]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return len(files) / seconds


def rate_of_archive(segmenter: BatchSegmenter, folder: Path, workers: int, part_size: int) -> float:
    """Images per second."""
    seen: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as place:
        segment_archive(
            segmenter,
            folder,
            Path(place) / "out",
            workers=workers,
            part_size=part_size,
            on_images=lambda done, total: seen.append((time.perf_counter(), done)),
        )
    (first_time, first), (last_time, last) = seen[1], seen[-1]
    return (last - first) / (last_time - first_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="edaformer_t.scenes")
    parser.add_argument("--reduction")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table (default: %(default)s)")
    args = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"
    segmenter = BatchSegmenter(model=args.model, reduction=args.reduction)
    rates: dict[str, list[float]] = {"alone": [], "archive": []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_pictures(Path(folder), args.images, tuple(args.size))
        for _ in range(args.rounds):
            rates["alone"].append(rate_alone(args.model, args.reduction, files, args.workers))
            rates["archive"].append(rate_of_archive(segmenter, Path(folder), args.workers, args.part_size))
    ratios = [own / other for own, other in zip(rates["archive"], rates["alone"], strict=True)]
    row: dict[str, Any] = {
        "model": args.model,
        "reduction": args.reduction or "none",
        "size": f"{args.size[0]}x{args.size[1]}",
        "images": args.images,
        "workers": args.workers,
        "part_size": args.part_size,
        "rounds": args.rounds,
        **{f"{name}_images_per_second": round(statistics.median(rates[name]), 2) for name in rates},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        **conditions(torch, ray),
    }
    print(row)
    write_table([row], args.results / f"archive_{args.model}_{row['size']}_cpu{args.workers}.csv")


if __name__ == "__main__":
    main()
