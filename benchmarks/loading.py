"""How long `create_model(pretrained=True)` takes from a filled cache, in paired runs.

    python benchmarks/loading.py segformer_b5 --rounds 15

Compared, on one file of random weights as transformers saves it: reading the file's tensors and copying them to memory
(the floor for anybody who keeps a copy); segzoo from its pinned, checked cache, without a network; and transformers'
`from_pretrained` of the same file. Mapped tensors cost when they are first touched, so that each is also timed with
every value touched once. The page cache is warm: what is measured is the work, not the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from recording import RESULTS, conditions, write_table

COMMIT = "0" * 39 + "1"


def fill_cache(weights: Path, hub_cache: Path) -> dict[str, object]:
    """Put a file where the Hub client keeps that of a pinned commit; returns the overlay that names it."""
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    repository = hub_cache / "models--bench--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    os.link(weights, repository / "blobs" / sha256)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / sha256)
    return {
        "hf_hub_id": "bench/model",
        "hf_revision": COMMIT,
        "hf_hub_filename": "model.safetensors",
        "sha256": sha256,
        "size": weights.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="segformer_b5", help="a SegFormer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Both are read when huggingface_hub and segzoo are imported or first used.
        os.environ.update(HF_HOME=f"{folder}/hf", SEGZOO_CACHE=f"{folder}/segzoo", HF_HUB_OFFLINE="1")
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    import torch
    import transformers
    from peers import transformers_segformer
    from safetensors.torch import load_file

    import segzoo

    torch.set_num_threads(args.threads)
    transformers_segformer(args.model).save_pretrained(folder / "saved")
    weights = folder / "saved" / "model.safetensors"
    overlay = fill_cache(weights, folder / "hf" / "hub")

    def touch(tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.detach().sum()

    def read_and_copy() -> list[torch.Tensor]:
        return [tensor.clone() for tensor in load_file(weights).values()]

    def create() -> torch.nn.Module:
        return segzoo.create_model(args.model, pretrained=True, pretrained_cfg_overlay=overlay)

    def from_pretrained() -> torch.nn.Module:
        return transformers.SegformerForSemanticSegmentation.from_pretrained(folder / "saved")

    forms: dict[str, Callable[[], object]] = {
        "read and copy": read_and_copy,
        "segzoo create_model": create,
        "transformers from_pretrained": from_pretrained,
        "read and copy, touched": lambda: touch(read_and_copy()),
        "segzoo create_model, touched": lambda: touch(create().parameters()),
        "transformers from_pretrained, touched": lambda: touch(from_pretrained().parameters()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(args.rounds + 1):  # the first warms up, and checks the hash once
        for name, form in forms.items():
            start = time.perf_counter()
            result = form()
            if number:
                seconds[name].append(time.perf_counter() - start)
            del result

    rows = []
    for name, times in seconds.items():
        floor = seconds["read and copy, touched" if name.endswith("touched") else "read and copy"]
        ratios = sorted(own / other for own, other in zip(times, floor, strict=True))
        rows.append(
            {
                "model": args.model,
                "form": name,
                "ratio_to_read_and_copy": f"{statistics.median(ratios):.3f}",
                "ratio_min": f"{ratios[0]:.3f}",
                "ratio_max": f"{ratios[-1]:.3f}",
                "seconds_median": f"{statistics.median(times):.4f}",
                "file_bytes": weights.stat().st_size,
                "threads": args.threads,
                "rounds": args.rounds,
                **conditions(torch, segzoo, transformers),
            }
        )
    for row in rows:
        print(f"{row['form']:40} {row['ratio_to_read_and_copy']:>8} x  {row['seconds_median']:>8} s")
    write_table(rows, RESULTS / f"loading_{args.model}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
