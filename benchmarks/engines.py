"""Every engine on one model to the head's output, in interleaved rounds.

    python benchmarks/engines.py segformer_b0 --size 512 512 --threads 1

All forms have the same weights and are given the same normalised image; their scores are compared first. Of a SegFormer
transformers' own model and its export to OpenVINO run beside, in float32 and as OpenVINO runs it by default. What
counts is the ratio to segzoo's model folded without the fast operators ("folded"). Peak memory is of a process of its
own a form: the highest resident size of three runs over that before the first, compiling included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peers import OpenVINOExport, transformers_segformer, with_its_weights
from recording import RESULTS, conditions, write_table
from timing import faster, interleaved
from torch import Tensor

import segzoo

BASE = "folded"
OWN = {
    "onnxruntime": ("onnxruntime", "f32"),
    "openvino f32": ("openvino", "f32"),
    "openvino bf16": ("openvino", "bf16"),
    "inductor": ("inductor", "f32"),
}
PEERS = ("transformers", "transformers openvino f32", "transformers openvino default")
Run = Callable[[Tensor], Tensor]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def make_forms(args: argparse.Namespace, names: list[str]) -> dict[str, Run]:
    """Functions from a normalised image to the first tensor of the head's output."""
    torch.manual_seed(0)
    peer = transformers_segformer(args.model) if args.model.startswith("segformer_") else None
    with tempfile.TemporaryDirectory() as folder:
        if peer is None:
            model = segzoo.create_model(args.model).eval()
        else:
            model = with_its_weights(args.model, peer, Path(folder))
    model.set_inference_reduction(args.reduction)
    shape = (args.batch, 3, *args.size)
    forms: dict[str, Run] = {}
    for name in names:
        if name in OWN:
            engine, precision = OWN[name]
            threads = None if engine == "inductor" else args.threads
            runner = segzoo.compile(model, engine=engine, precision=precision, threads=threads).runner
            forms[name] = lambda x, runner=runner: runner(x)[0]
        elif name in PEERS:
            if peer is None:
                continue
            if name == "transformers":
                forms[name] = lambda x: peer(pixel_values=x).logits
            else:
                precision = "f32" if name.endswith("f32") else None
                forms[name] = OpenVINOExport(peer, shape, precision=precision, threads=args.threads)
        else:
            folded = segzoo.fold(model, fast=name == "fast")
            forms[name] = lambda x, folded=folded: first(folded.forward_head(folded.forward_features(x)))
    return forms


def first(scores: object) -> Tensor:
    """The first tensor of a head's output."""
    return scores if isinstance(scores, Tensor) else next(iter(scores))  # type: ignore[arg-type]


def peak_bytes(args: argparse.Namespace, name: str, found: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        x_BCHW = torch.randn(args.batch, 3, *args.size)
        before = resident_bytes()
        forms = make_forms(args, [name])
        for _ in range(3):
            for form in forms.values():
                form(x_BCHW)
    found.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def peak_of(args: argparse.Namespace, name: str) -> int:
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    child = context.Process(target=peak_bytes, args=(args, name, found))
    child.start()
    child.join()
    return found.get()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="segformer_b0")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--reduction", default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--forms", nargs="*", default=[BASE, "fast", *list(OWN)[:3], *PEERS], help="default: %(default)s"
    )
    parser.add_argument("--memory", action="store_true", help="also the peak memory of every form")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    x_BCHW = torch.randn(args.batch, 3, *args.size)
    forms = make_forms(args, [BASE, *(name for name in args.forms if name != BASE)])
    expected = forms[BASE](x_BCHW)
    scale = expected.abs().max()
    errors = {name: float((form(x_BCHW) - expected).abs().max() / scale) for name, form in forms.items()}
    times = interleaved({name: lambda form=form: form(x_BCHW) for name, form in forms.items()}, args.rounds)
    rows = []
    for name, seconds in times.items():
        rows.append(
            {
                "model": args.model,
                "reduction": args.reduction or "base",
                "size": f"{args.size[0]}x{args.size[1]}",
                "batch": args.batch,
                "threads": args.threads,
                "form": name,
                **faster(seconds, times[BASE]),
                "ms_median": round(1e3 * statistics.median(seconds), 2),
                "largest_error": f"{errors[name]:.1e}",
                "peak_mib": round(peak_of(args, name) / 2**20) if args.memory else "",
                "rounds": args.rounds,
                **conditions(torch, segzoo),
            }
        )
        print(f"{name:<30} {rows[-1]['speed_up_median']:6.2f}x  {rows[-1]['ms_median']:9.1f} ms  {errors[name]:.1e}")
    reduction = f"_{args.reduction}" if args.reduction else ""
    write_table(rows, RESULTS / f"engines_{args.model}{reduction}_{args.size[0]}x{args.size[1]}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
