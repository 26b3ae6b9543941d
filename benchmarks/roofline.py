"""Which share of the processor's matrix rate each engine reaches.

    python benchmarks/roofline.py segformer_b0 edaformer_t --size 512 512 --threads 1

The rate is measured in the same process, in turn with the models: the best of a few large products by torch's own
linear layer, by oneDNN's where torch has its operator, and by OpenVINO, in float32 and bfloat16. A model's operations
are exact (`segzoo.cost`, two a multiply-accumulate), and those of the head's output alone.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import torch
import torch.nn.functional as F
from recording import RESULTS, conditions, write_table
from timing import interleaved

import segzoo

N, K, M = 4096, 1024, 1024  # a product of N x K by K x M, in cache by tiles
FORMS = (("eager", "f32"), ("openvino", "f32"), ("openvino", "bf16"))


def openvino_product(precision: str, threads: int) -> Callable[[], object]:
    ops: Any = openvino.opset13
    a = ops.parameter([N, K], np.float32)
    weight = ops.constant(np.random.default_rng(0).standard_normal((M, K), dtype=np.float32))
    model = openvino.Model([ops.matmul(a, weight, False, True)], [a])
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    array = np.random.default_rng(1).standard_normal((N, K), dtype=np.float32)
    return lambda: request.infer({0: array})


def products(threads: int) -> dict[tuple[str, str], Callable[[], object]]:
    """(operator, precision) -> a large product."""
    made: dict[tuple[str, str], Callable[[], object]] = {}
    for precision, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        x, weight = torch.randn(N, K).to(dtype), torch.randn(M, K).to(dtype)
        made["F.linear", precision] = functools.partial(F.linear, x, weight)
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            made["oneDNN", precision] = functools.partial(
                torch.ops.mkldnn._linear_pointwise, x, weight, None, "none", [], ""
            )
        made["OpenVINO", precision] = openvino_product(precision, threads)
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["segformer_b0", "edaformer_t", "segvit_base", "rtformer_slim"])
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x_BCHW = torch.randn(1, 3, *args.size)
    forms: dict[Any, Callable[[], object]] = dict(products(args.threads))
    flops: dict[Any, float] = dict.fromkeys(forms, 2.0 * N * K * M)
    for name in args.models:
        model = segzoo.create_model(name).eval()
        folded = segzoo.fold(model)
        head_macs = segzoo.cost(segzoo.fold(model, fast=False), tuple(args.size)).macs
        for engine, precision in FORMS:
            key = (name, engine, precision)
            if engine == "eager":
                forms[key] = lambda folded=folded: folded.forward_head(folded.forward_features(x_BCHW))
            else:
                runner = segzoo.compile(model, engine=engine, precision=precision, threads=args.threads).runner
                forms[key] = lambda runner=runner: runner(x_BCHW)
            flops[key] = 2.0 * head_macs
    times = interleaved(forms, args.rounds)
    rates = {key: flops[key] / statistics.median(seconds) / 1e9 for key, seconds in times.items()}
    roof = {
        precision: max(rate for key, rate in rates.items() if len(key) == 2 and key[1] == precision)
        for precision in ("f32", "bf16")
    }
    rows = []
    for key, rate in rates.items():
        what, by, precision = key if len(key) == 3 else ("product", *key)
        rows.append(
            {
                "what": what,
                "by": by,
                "precision": precision,
                "size": f"{args.size[0]}x{args.size[1]}" if len(key) == 3 else f"{N}x{K}x{M}",
                "threads": args.threads,
                "share_of_rate": round(rate / roof[precision], 3),
                "gflops_per_s": round(rate, 1),
                "ms_min": round(1e3 * min(times[key]), 2),
                "ms_median": round(1e3 * statistics.median(times[key]), 2),
                "ms_max": round(1e3 * max(times[key]), 2),
                "rounds": args.rounds,
                **conditions(torch, segzoo),
            }
        )
        print(f"{what:<16} {by:<10} {precision:<5} {rate:8.1f} GFLOP/s  {rows[-1]['share_of_rate']:.2f}")
    write_table(rows, RESULTS / f"roofline_{args.size[0]}x{args.size[1]}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
