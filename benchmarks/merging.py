"""What token merging buys on SegFormer: time and peak memory, against the original's attention and the fused one.

    python benchmarks/merging.py --model segformer_b2 --size 512 512 --rounds 3
    python benchmarks/merging.py --model segformer_b2 --size 512 512 --mode train
    python benchmarks/merging.py --model segformer_b5 --size 2160 3840 --device cuda

Every form is the same network with the same random weights, one image, 19 classes, float32:

- "materialised": the attention of the original written out plainly, the matrix of scores in memory;
- "fused": segzoo's attention, which never holds that matrix; the only difference to the first;
- "fused folded" (inference only): that after `segzoo.fold`, which makes the decoder cheaper.

Each with the reductions none, hq, fast, n2d (Segformer++) and isr (EDAFormer's pooling of keys and values), and with
the input downsampled to 0.7 and 0.5 of its sides instead. Inference ends at the decoder's scores at stride 4 of the
full input (so a downsampled input pays for resizing them); a training step is forward pass, cross-entropy at input
size, backward pass and AdamW, with the reduction in place (`during_training=True`).

A round runs all forms in turn, in a process of its own; recorded are the ratios of times within a round. With one CPU
thread these are times of the processor, which other work on the machine disturbs least; else wall times. Peak memory is
that of one run in one process, above what the process held before (the model included). Both attentions have to give
the same scores in float64 first. What is finished is kept in --work, so that the same command continues a run.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from recording import RESULTS, conditions, write_table
from torch import Tensor, nn

import segzoo
from segzoo.layers.spatial_reduction import EfficientSelfAttention

NUM_CLASSES = 19
TOLERANCE = 1e-9  # float64, relative to the largest score
REDUCTIONS = ("none", "hq", "fast", "n2d", "isr")
DOWNSAMPLED = {"input x 0.7": 0.7, "input x 0.5": 0.5}
IMPLEMENTATIONS = {"infer": ("materialised", "fused", "fused folded"), "train": ("materialised", "fused")}


class MaterialisedAttention(nn.Module):
    """SegFormer's attention as the original computes it, on the weights and reduction leaves of segzoo's."""

    def __init__(self, attn: EfficientSelfAttention):
        super().__init__()
        self.attn = attn

    def forward(self, x_BHWC: Tensor) -> Tensor:
        attn = self.attn
        q_BNC, restore = attn.q_reduction(x_BHWC)
        kv_BMC = attn.kv(attn.kv_reduction(attn.kv_downsample(x_BHWC)))
        q = attn.q(q_BNC).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        k, v = kv_BMC.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        weights = weights.softmax(dim=-1)
        return restore(attn.proj((weights @ v).transpose(1, 2).flatten(2)))


def materialised(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for stage in model.encoder.stages:
        for block in stage.blocks:
            block.attn = MaterialisedAttention(block.attn)
    return model


def forms_of(mode: str) -> list[tuple[str, str]]:
    """(implementation, reduction) in the order in which a round runs them; folding adds nothing to downsampling."""
    return [
        (implementation, reduction)
        for implementation in IMPLEMENTATIONS[mode]
        for reduction in (*REDUCTIONS, *DOWNSAMPLED)
        if implementation != "fused folded" or reduction in REDUCTIONS
    ]


def make_model(name: str, implementation: str, mode: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = segzoo.create_model(name, num_classes=NUM_CLASSES).to(dtype).train(mode == "train")
    if implementation == "fused folded":
        return segzoo.fold(model)
    return materialised(model) if implementation == "materialised" else model


def make_run(model: nn.Module, reduction: str, mode: str) -> Callable[[Tensor], Tensor]:
    """One forward pass, or one training step, of a form on images (B, 3, H, W)."""
    scale = DOWNSAMPLED.get(reduction, 1.0)
    plan = reduction if reduction in REDUCTIONS and reduction != "none" else None

    def shrink(x_BCHW: Tensor) -> Tensor:
        if scale == 1:
            return x_BCHW
        size = [round(side * scale) for side in x_BCHW.shape[2:]]
        return F.interpolate(x_BCHW, size=size, mode="bilinear", antialias=True)

    @torch.inference_mode()
    def infer(x_BCHW: Tensor) -> Tensor:
        model.set_inference_reduction(plan)
        scores = model.forward_head(model.forward_features(shrink(x_BCHW)))
        return scores if scale == 1 else model.to_size(scores, [-(-side // 4) for side in x_BCHW.shape[2:]])

    if mode == "infer":
        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def train(x_BCHW: Tensor) -> Tensor:
        model.set_inference_reduction(plan, during_training=True)
        x = shrink(x_BCHW)
        labels = torch.zeros(len(x), *x.shape[2:], dtype=torch.long, device=x.device)
        loss = F.cross_entropy(model.forward_train(x)["scores"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return train


# --- cases: each runs in a process of its own and prints one line of JSON ---------------------------------------------


def image(size: tuple[int, int], device: str) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)


def check_case(args: argparse.Namespace) -> dict:
    """Largest difference of the scores, relative to the largest score, over all reductions."""
    worst = 0.0
    models = {name: make_model(args.model, name, "infer", torch.float64) for name in IMPLEMENTATIONS["infer"]}
    x = image((160, 224), "cpu").double()
    for reduction in REDUCTIONS:
        scores = {name: make_run(model, reduction, "infer")(x) for name, model in models.items()}
        expected = scores["fused"]
        for other in scores.values():
            worst = max(worst, ((other - expected).abs().max() / expected.abs().max()).item())
    if worst > TOLERANCE:
        sys.exit(f"the forms differ by {worst:.1e} of the largest score, more than {TOLERANCE:.0e}")
    return {"difference": worst}


def time_case(args: argparse.Namespace) -> dict:
    """Seconds of every form, run once in turn, after a run of each on a small image and of the first at full size."""
    seconds = []
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    models = {name: make_model(args.model, name, args.mode).to(args.device) for name in IMPLEMENTATIONS[args.mode]}
    small, x = image((64, 64), args.device), image(args.size, args.device)
    runs = [make_run(models[implementation], reduction, args.mode) for implementation, reduction in args.forms]
    for run in runs:
        run(small)
    # The process's first run at full size also pays for its memory; a GPU chooses kernels by size, for every form.
    for run in runs if args.device != "cpu" else runs[:1]:
        run(x)
    for run in runs:
        synchronise(args.device)
        start = clock()
        run(x)
        synchronise(args.device)
        seconds.append(clock() - start)
    return {"seconds": seconds}


def memory_case(args: argparse.Namespace) -> dict:
    """Peak of one run above what the process held before, in MiB."""
    (implementation, reduction) = args.forms[0]
    run = make_run(make_model(args.model, implementation, args.mode).to(args.device), reduction, args.mode)
    run(image((64, 64), args.device))
    x = image(args.size, args.device)
    if args.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x)
        torch.cuda.synchronize()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    ctypes.CDLL(None).malloc_trim(0)  # what building the model left in the heap would hide a small peak (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now (Linux)
    before = resident("VmRSS")
    run(x)
    return {"peak_mib": (resident("VmHWM") - before) / 2**10}


def resident(field: str) -> int:
    """A figure of the process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# --- the leader -------------------------------------------------------------------------------------------------------


class Journal:
    """Finished cases of one table, one line of JSON each; a case that is in it is not run again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {json.loads(line)["case"]: json.loads(line)["result"] for line in lines}

    def result(self, case: str, args: argparse.Namespace, *options: str) -> dict:
        if case not in self.done:
            command = [sys.executable, __file__, "--model", args.model, "--mode", args.mode, "--device", args.device]
            command += ["--size", *map(str, args.size), "--threads", str(args.threads), *options]
            start = time.perf_counter()
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if finished.returncode:
                sys.exit(f"{case}: the process ended with {finished.returncode}; its message is above")
            self.done[case] = json.loads(finished.stdout.splitlines()[-1])
            with self.path.open("a") as file:
                file.write(json.dumps({"case": case, "result": self.done[case]}) + "\n")
            print(f"{case}: {time.perf_counter() - start:.0f} s", flush=True)
        return self.done[case]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="segformer_b2", help="segformer_b0 to b5")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--mode", choices=IMPLEMENTATIONS, default="infer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, default=Path("runs/merging"), help="folder of what is finished")
    parser.add_argument("--case", choices=("check", "time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--form", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = tuple(args.size)
    args.forms = forms_of(args.mode)

    if args.case:
        torch.set_num_threads(args.threads)
        if args.form is not None:
            args.forms = [args.forms[args.form]]
        print(json.dumps({"check": check_case, "time": time_case, "memory": memory_case}[args.case](args)))
        return

    device = f"cpu{args.threads}" if args.device == "cpu" else args.device
    name = f"merging_{args.model}_{args.size[0]}x{args.size[1]}_{args.mode}_{device}"
    checks = Journal(args.work / f"merging_{args.model}_check.jsonl")
    difference = checks.result("check", args, "--case", "check")["difference"]
    journal = Journal(args.work / f"{name}.jsonl")
    rounds = [journal.result(f"round {i}", args, "--case", "time")["seconds"] for i in range(args.rounds)]
    peaks = [
        journal.result(f"memory of {', '.join(form)}", args, "--case", "memory", "--form", str(i))["peak_mib"]
        for i, form in enumerate(args.forms)
    ]

    rows = []
    for i, (implementation, reduction) in enumerate(args.forms):
        row = {"implementation": implementation, "reduction": reduction}
        for baseline in ("materialised", "fused"):
            j = args.forms.index((baseline, "none"))
            ratios = [seconds[j] / seconds[i] for seconds in rounds]
            row[f"speed_up_over_{baseline}"] = round(statistics.median(ratios), 3)
            row[f"over_{baseline}_min"], row[f"over_{baseline}_max"] = round(min(ratios), 3), round(max(ratios), 3)
        row |= {
            "peak_mib": round(peaks[i], 1),
            "model": args.model,
            "size": f"{args.size[0]}x{args.size[1]}",
            "mode": args.mode,
            "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
            "threads": args.threads,
            "rounds": args.rounds,
            "float64_difference": f"{difference:.1e}",
            **conditions(torch, segzoo),
        }
        rows.append(row)
        print(
            f"{implementation:<13} {reduction:<12} {row['speed_up_over_materialised']:6.2f}x materialised "
            f"{row['speed_up_over_fused']:6.2f}x fused {row['peak_mib']:9.1f} MiB"
        )
    write_table(rows, RESULTS / f"{name}.csv")


if __name__ == "__main__":
    main()
