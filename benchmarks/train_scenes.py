"""Train a model on the synthetic street scenes: plain, restartable, on one machine.

    python benchmarks/train_scenes.py edaformer_t --minutes 50 --out runs/edaformer_t

Scenes are rendered once into OUT/../scenes_*.npy. The learning rate follows the share of `--minutes` that has been
used, so that a run ends annealed on a machine of any speed. A checkpoint is written every two minutes; the same
command continues it. At the end OUT/model.safetensors holds the moving average of the weights in fp16.
"""

from __future__ import annotations

import argparse
import math
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import segzoo
from segzoo.data import scenes
from segzoo.models.rows import IMAGENET_MEAN, IMAGENET_STD
from segzoo.training.losses import ATMLoss

SIZE = (256, 512)
FIRST_HELD_OUT_SEED = 1_000_000  # training seeds stay below, evaluation seeds at or above


def render_pair(seed: int) -> np.ndarray:
    """RGB and label of one scene as (H, W, 4) uint8."""
    image, labels = scenes.render(seed=seed, size=SIZE)
    return np.dstack([image, labels])


def rendered_scenes(count: int, folder: Path) -> np.ndarray:
    """(count, H, W, 4) uint8, memory-mapped; rendered by all cores on the first call."""
    path = folder / f"scenes_{count}_{SIZE[0]}x{SIZE[1]}.npy"
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        array = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(count, *SIZE, 4))
        with Pool() as pool:
            for i, pair in enumerate(pool.imap(render_pair, range(count), chunksize=16)):
                array[i] = pair
        array.flush()
        unfinished.rename(path)
    return np.load(path, mmap_mode="r")


def make_batch(
    data: np.ndarray, rng: np.random.Generator, batch: int, crop: tuple[int, int], *, half_size: bool
) -> tuple[Tensor, Tensor]:
    """Random flips and crops with a little colour jitter: (B, 3, h, w) normalised images, (B, h, w) labels.

    With `half_size` both sides of a crop are halved: colours by averaging, labels by taking every other pixel.
    """
    h, w = crop
    images, labels = [], []
    for i in rng.integers(len(data), size=batch):
        y, x = rng.integers(SIZE[0] - h + 1), rng.integers(SIZE[1] - w + 1)
        pair = np.array(data[i, y : y + h, x : x + w])
        if half_size:
            colours = pair[..., :3].reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))
            pair = np.dstack([colours, pair[::2, ::2, 3]])
        if rng.random() < 0.5:
            pair = pair[:, ::-1]
        images.append(pair[..., :3].astype(np.float32) * rng.uniform(0.85, 1.15) / 255)
        labels.append(pair[..., 3].astype(np.int64))
    x = torch.from_numpy(np.stack(images))
    x = (x - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return x.permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels))


def class_weights(data: np.ndarray) -> Tensor:
    """Mild balance: frequency ** -0.3, mean 1, so that thin classes are not drowned by sky and road."""
    counts = np.bincount(np.asarray(data[:200, ..., 3]).ravel(), minlength=len(scenes.CLASSES))
    weights = (counts / counts.sum() + 1e-4) ** -0.3
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)


def make_loss(model: nn.Module, weights: Tensor):
    """Cross-entropy, with the auxiliary heads at 0.4 where a family has them; SegViT's own loss for products."""
    if model.score_kind == "product":
        return ATMLoss()

    def loss(output: dict, labels: Tensor) -> Tensor:
        total = F.cross_entropy(output["scores"].float(), labels, weights)
        for scores in output.get("aux", ()):
            if scores.shape[2:] != labels.shape[1:]:
                scores = F.interpolate(scores.float(), size=labels.shape[1:], mode="bilinear")
            total = total + 0.4 * F.cross_entropy(scores.float(), labels, weights)
        return total

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="registry name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the result")
    parser.add_argument("--minutes", type=float, default=50, help="length of the training, of all runs together")
    parser.add_argument("--scenes", type=int, default=4000, help="number of training scenes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument(
        "--half-size",
        action="store_true",
        help="begin with whole scenes at half size instead of crops: an encoder with a position embedding learns where "
        "things are, at the same cost",
    )
    parser.add_argument(
        "--full-size-from", type=float, default=0.6, help="share of the time after which whole scenes are seen"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.03)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    if args.scenes > FIRST_HELD_OUT_SEED:
        parser.error(f"--scenes {args.scenes}: from {FIRST_HELD_OUT_SEED} on they are held out for the evaluation")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    data = rendered_scenes(args.scenes, args.out.parent)
    model = segzoo.create_model(args.model, num_classes=len(scenes.CLASSES), drop_path_rate=0.05).train()
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.param_groups(lr=1.0, weight_decay=args.weight_decay))
    loss_of = make_loss(model, class_weights(data))
    step, used = 0, 0.0

    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, used = saved["average"], saved["step"], saved["used"]
        print(f"continuing at step {step} after {used / 60:.1f} min", flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        torch.save({**state, "step": step, "used": used}, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)

    rng = np.random.default_rng(step)
    last_save = used
    while used < args.minutes * 60:
        start = time.perf_counter()
        share = used / (args.minutes * 60)
        rate = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        beginning = share < args.full_size_from
        crop = tuple(args.crop) if beginning and not args.half_size else SIZE
        batch = args.batch if beginning else args.batch // 2
        images, labels = make_batch(data, rng, batch, crop, half_size=beginning and args.half_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            output = model.forward_train(images)
        loss = loss_of(output, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    average[name].lerp_(tensor, 1 - decay)
                else:
                    average[name].copy_(tensor)
        used += time.perf_counter() - start
        if step % 50 == 0:
            print(f"{used / 60:6.1f} min  step {step}  lr {rate:.2e}  loss {loss.item():.4f}", flush=True)
        if used - last_save > 120:
            save()
            last_save = used
    save()
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous() for name, tensor in average.items()
    }
    save_file(half, args.out / "model.safetensors")
    print(f"done: {args.out / 'model.safetensors'}", flush=True)


if __name__ == "__main__":
    main()
