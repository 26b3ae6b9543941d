"""What far sight is worth: a convolutional net that sees 64 pixels against attention, on the paired landscapes.

    python benchmarks/context_scenes.py --out runs/context

trains both on the same pictures of 128x256 with the same number of steps, then measures both, and the attention model
with each of its reductions, on held-out pictures. There a cue is at least 36 pixels from what it decides, and the
net's field reaches 28: it cannot know, and its mean IoU on the paired classes is at most about 1/3
(`segzoo.data.scenes.context` says why). A checkpoint is written every 100 steps; the same command continues it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from recording import RESULTS, conditions, write_table
from torch import Tensor, nn

import segzoo
from segzoo.data.scenes import context
from segzoo.models.rows import IMAGENET_MEAN, IMAGENET_STD
from segzoo.training.metrics import ConfusionMatrix

SIZE = (128, 256)
FIRST_HELD_OUT_SEED = 1_000_000
PAIRED = [context.CLASSES.index(name) for name in context.PAIRED_CLASSES]
OTHERS = [i for i in range(len(context.CLASSES)) if i not in PAIRED]
ATTENTION = "edaformer_t"


class NearSighted(nn.Module):
    """Plain convolutions at stride 4 that see at most 64 x 64 pixels.

    The stem sees 7 pixels, each 3x3 convolution at stride 4 adds 8, the resize a cell on each side: 57, with rounding.
    """

    def __init__(self, *, num_classes: int, width: int = 64, depth: int = 5):
        super().__init__()
        self.stem = nn.Sequential(_conv(3, width // 2, stride=2), _conv(width // 2, width, stride=2))
        self.body = nn.ModuleList(_conv(width, width) for _ in range(depth))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.stem(x_BCHW)
        for conv in self.body:
            y_BCHW = y_BCHW + conv(y_BCHW)
        return F.interpolate(self.classifier(y_BCHW), x_BCHW.shape[2:], mode="bilinear")


def _conv(in_chans: int, out_chans: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_chans), nn.ReLU())


def field(model: nn.Module, size: tuple[int, int] = SIZE) -> int:
    """Side in pixels of the square around a pixel that can change its scores in eval mode, by the gradient."""
    model = model.eval()
    reach = 0
    for y, x in ((size[0] // 2, size[1] // 2), (size[0] // 2 + 1, size[1] // 2 + 2)):
        image_BCHW = torch.randn(1, 3, *size, requires_grad=True)
        (gradient_BCHW,) = torch.autograd.grad(model(image_BCHW)[0, :, y, x].square().sum(), image_BCHW)
        ys, xs = gradient_BCHW[0].abs().sum(0).nonzero(as_tuple=True)
        reach = max(reach, int((ys - y).abs().max()), int((xs - x).abs().max()))
    return 2 * reach + 1


def drawn(count: int, folder: Path) -> np.ndarray:
    """(count, H, W, 4) uint8, RGB and label of each picture; kept in `folder`."""
    path = folder / f"context_{count}_{SIZE[0]}x{SIZE[1]}.npy"
    if not path.exists():
        pairs = np.stack([np.dstack(context.render(seed=seed, size=SIZE)) for seed in range(count)])
        with path.with_suffix(".partial").open("wb") as file:
            np.save(file, pairs)
        path.with_suffix(".partial").rename(path)
    return np.load(path, mmap_mode="r")


def batches(data: np.ndarray, batch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole pictures, mirrored or not, of step `first` on; a step's pictures depend on nothing but its number."""
    for step in range(first, 1 << 30):
        rng = np.random.default_rng(step)
        pairs = np.stack([data[i, :, :: int(rng.choice((-1, 1)))] for i in rng.integers(len(data), size=batch)])
        light = rng.uniform(0.85, 1.15, (batch, 1, 1, 1)).astype(np.float32)
        yield normalised(pairs[..., :3] * light), torch.from_numpy(pairs[..., 3].astype(np.int64))


def normalised(images_BHWC: np.ndarray) -> Tensor:
    x_BHWC = (torch.from_numpy(images_BHWC).float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return x_BHWC.permute(0, 3, 1, 2)


def class_weights(data: np.ndarray) -> Tensor:
    """Mild balance: frequency ** -0.3, mean 1, so that flags and cars are not drowned by sky and forest."""
    counts = np.bincount(np.asarray(data[:200, ..., 3]).ravel(), minlength=len(context.CLASSES))
    weights = (counts / counts.sum() + 1e-4) ** -0.3
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)


def train(model: nn.Module, data: np.ndarray, checkpoint: Path, *, steps: int, batch: int, lr: float) -> nn.Module:
    """AdamW with warm-up and cosine; goes on where `checkpoint` stopped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.03)
    weights, first = class_weights(data), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    start = time.perf_counter()
    for step, (x_BCHW, labels_BHW) in zip(range(first, steps), batches(data, batch, first), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = F.cross_entropy(model(x_BCHW), labels_BHW, weights)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
        if (step + 1) % 25 == 0:
            minutes = (time.perf_counter() - start) / 60
            print(f"{checkpoint.stem}: step {step + 1}/{steps}  {minutes:.1f} min  loss {loss.item():.4f}", flush=True)
    return model.eval()


@torch.inference_mode()
def measure(model: nn.Module, reductions: Sequence[str | None], count: int) -> list[ConfusionMatrix]:
    """Confusion of every reduction over the same held-out pictures; None leaves the model as it is."""
    found = [ConfusionMatrix(len(context.CLASSES)) for _ in reductions]
    for seed in range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + count):
        image_HWC, labels_HW = context.render(seed=seed, size=SIZE)
        for reduction, confusion in zip(reductions, found, strict=True):
            if reduction is not None:
                segzoo.set_inference_reduction(model, reduction)
            confusion.update(model(normalised(image_HWC[None]))[0].argmax(0).numpy(), labels_HW)
    return found


def figures(confusion: ConfusionMatrix) -> dict[str, float]:
    """mIoU in [0, 1] of all classes, the paired ones, each pair of them, and the others."""
    pairs = {
        f"{first} or {second}": confusion.miou([context.CLASSES.index(name) for name in (first, second)])
        for first, second in context.PAIRS
    }
    values = {"miou": confusion.miou(), "paired_miou": confusion.miou(PAIRED), "other_miou": confusion.miou(OTHERS)}
    return {name: round(value, 4) for name, value in (values | pairs).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures and checkpoints")
    parser.add_argument("--steps", type=int, default=450, help="of each training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=1500, help="number of training pictures")
    parser.add_argument("--held-out", type=int, default=200, help="number of pictures to measure on")
    parser.add_argument("--reductions", nargs="+", default=["base", "decoder", "optimal", "fast"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS / f"context_{ATTENTION}_{SIZE[0]}x{SIZE[1]}_cpu1.csv")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    data = drawn(args.pictures, args.out)
    classes = len(context.CLASSES)
    torch.manual_seed(0)
    near = NearSighted(num_classes=classes)
    seen = field(near)
    torch.manual_seed(0)
    far = segzoo.create_model(f"{ATTENTION}.scenes", pretrained=True, num_classes=classes, drop_path_rate=0.0)
    models = (
        (f"{ATTENTION} from {ATTENTION}.scenes", far, args.reductions, "whole picture", "attention.pt", 1e-3),
        ("7 convolutions", near, [None], str(seen), "near.pt", 2e-3),
    )
    rows = []
    for name, model, reductions, sees, file, lr in models:
        train(model, data, args.out / file, steps=args.steps, batch=args.batch, lr=lr)
        found = measure(model, reductions, args.held_out)
        for reduction, confusion in zip(reductions, found, strict=True):
            if reduction is not None:
                segzoo.set_inference_reduction(model, reduction)
            rows.append(
                {
                    "model": name,
                    "reduction": reduction or "none",
                    "field": sees,
                    "params": sum(parameter.numel() for parameter in model.parameters()),
                    "gmacs": round(segzoo.cost(model, SIZE).macs / 1e9, 4),
                    **figures(confusion),
                    "held_out": args.held_out,
                    "steps": args.steps,
                    "batch": args.batch,
                    "training_pictures": args.pictures,
                    "size": f"{SIZE[0]}x{SIZE[1]}",
                    **conditions(torch, segzoo),
                }
            )
            print(
                {key: rows[-1][key] for key in ("model", "reduction", "miou", "paired_miou", "other_miou")}, flush=True
            )
    write_table(rows, args.csv)


if __name__ == "__main__":
    main()
