"""RTFormer here and in PaddleSeg, the official implementation: the same weights, the same answer, and the time of both.

    pip install segzoo[bench]
    python benchmarks/rtformer_paddle.py

Paddle runs in a second process, so that the two libraries share no thread pool; it may be another environment's
(`--peer-python`). Both sides load one `.pdparams` file with random weights, must agree within 5e-5, and are then timed
in turn on one thread each, one run of every kind after the other, so that a busy machine slows all of them alike. The
CSV with the conditions in its name goes to benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from recording import RESULTS, conditions, write_table

TOLERANCE = 5e-5
# name -> (segzoo name, options of PaddleSeg's class)
MODELS = {
    "slim": (
        "rtformer_slim.cityscapes",
        {"base_channels": 32, "head_channels": 64, "use_injection": [True, True], "cross_size": 12},
    ),
    "base": (
        "rtformer_base.cityscapes",
        {"base_channels": 64, "head_channels": 128, "use_injection": [True, False], "cross_size": 12},
    ),
}


def random_array(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that depend only on their name: norms near one, variances positive, the rest by fan-in."""
    value = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if key.endswith("_variance"):
        value = 0.5 + np.abs(value) * 0.5
    elif key.endswith("_mean"):
        value = 0.1 * value
    elif len(shape) <= 1:
        value = 1 + 0.1 * value if key.endswith("weight") else 0.05 * value
    else:
        value = value / math.sqrt(math.prod(shape[1:]))
    return value.astype(np.float32)


def peer(model: str, weights: Path, image: Path, output: Path) -> None:
    """The paddle side: write the weights and the scores, then time one run for every line on standard input."""
    import paddle
    from paddleseg.models import RTFormer

    paddle.device.set_device("cpu")
    network = RTFormer(num_classes=19, **MODELS[model][1])
    network.eval()
    arrays = {key: random_array(key, tuple(value.shape)) for key, value in network.state_dict().items()}
    weights.write_bytes(pickle.dumps(arrays, protocol=4))
    network.set_state_dict(paddle.load(str(weights)))
    x = paddle.to_tensor(np.load(image))
    with paddle.no_grad():
        np.save(output, network(x)[0].numpy())
        print("ready", paddle.__version__, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            network(x)[0].numpy()
            print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="slim")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with paddlepaddle and paddleseg")
    parser.add_argument("--peer", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(args.model, *args.peer)
        return

    import torch

    import segzoo

    torch.set_num_threads(1)
    height, width = args.size
    with tempfile.TemporaryDirectory() as folder:
        weights, image, output = (Path(folder) / name for name in ("model.pdparams", "image.npy", "scores.npy"))
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, height, width)).astype(np.float32))
        np.save(image, x.numpy())
        process = subprocess.Popen(
            [args.peer_python, __file__, "--model", args.model, "--peer", str(weights), str(image), str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        for line in process.stdout:
            if line.startswith("ready"):
                break
        else:
            sys.exit("the paddle process has ended; see its message above")
        paddle_version = line.split()[1]
        model = segzoo.create_model(MODELS[args.model][0], checkpoint_path=weights).eval()
        runs = {"segzoo": model, "segzoo folded": segzoo.fold(model)}
        expected = torch.from_numpy(np.load(output))

        def peer_run() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        seconds: dict[str, list[float]] = {"paddleseg": [], **{name: [] for name in runs}}
        difference = {"paddleseg": 0.0}
        with torch.inference_mode():
            for name, run in runs.items():
                difference[name] = (run(x) - expected).abs().max().item()
                if difference[name] > TOLERANCE:
                    sys.exit(f"{name} differs from paddleseg by {difference[name]:.1e}, more than {TOLERANCE:.0e}")
            peer_run()
            for _ in range(args.rounds):
                seconds["paddleseg"].append(peer_run())
                for name, run in runs.items():
                    start = time.perf_counter()
                    run(x)
                    seconds[name].append(time.perf_counter() - start)
        process.stdin.close()
        process.wait()

    name = (
        f"rtformer_{args.model}_{height}x{width}_fp32_1thread_{platform.machine()}"
        f"_torch{torch.__version__.split('+')[0]}_paddle{paddle_version}"
    )
    rows = []
    for implementation, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["paddleseg"], values, strict=True)]
        row = {
            "implementation": implementation,
            "median_ms": f"{1e3 * statistics.median(values):.1f}",
            "fastest_ms": f"{1e3 * min(values):.1f}",
            "speedup_median_of_rounds": f"{statistics.median(ratios):.2f}",
            "max_abs_difference": f"{difference[implementation]:.1e}",
            "rounds": args.rounds,
        }
        print(*row.values(), sep="\t")
        rows.append(row | {"paddle": paddle_version} | conditions(torch, segzoo))
    write_table(rows, RESULTS / f"{name}.csv")


if __name__ == "__main__":
    main()
