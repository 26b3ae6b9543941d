"""A keypoint model learns where the corners of a car are: `segzoo.data.car_corners`, from scratch, in minutes.

    python benchmarks/train_keypoints.py segformer_b0_keypoints --steps 400

Recorded is PCK@0.05, 0.1 and 0.2 (the length is the longer side of the car's box) on crops of held-out scenes: of the
best constant answer (every corner at its mean position in the training crops), of the untrained model, and of the
trained model with every reduction preset, its weights being the same.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from recording import RESULTS, conditions, write_table
from torch import Tensor, nn

import segzoo
from segzoo.data.car_corners import KEYPOINTS, car_crops
from segzoo.keypoints import decode_heatmaps, pck
from segzoo.models.rows import IMAGENET_MEAN, IMAGENET_STD
from segzoo.training.losses import HeatmapLoss

FIRST_HELD_OUT_SEED = 1_000_000  # training seeds stay below, evaluation seeds at or above
THRESHOLDS = (0.05, 0.1, 0.2)


def load_crops(count: int, first_seed: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised images (N, 3, side, side), corners (N, 4, 2) in pixels, which are visible (N, 4), lengths (N,)."""
    crops = list(car_crops(count, first_seed=first_seed, side=side))
    images = torch.from_numpy(np.stack([crop.image for crop in crops])).float() / 255
    images = ((images - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 3, 1, 2)
    xy = torch.from_numpy(np.stack([crop.xy for crop in crops]))
    visible = torch.from_numpy(np.stack([crop.visible for crop in crops]))
    return images, xy, visible, torch.tensor([crop.length for crop in crops], dtype=torch.float32)


@torch.inference_mode()
def find(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 4, 2) positions in pixels."""
    model.eval()
    maps = [model.forward_head(model.forward_features(batch)) for batch in images.split(32)]
    return decode_heatmaps(torch.cat(maps), tuple(images.shape[2:])).xy


def train(model: nn.Module, data: tuple[Tensor, ...], args: argparse.Namespace) -> None:
    images, xy, visible, _ = data
    loss_of = HeatmapLoss(sigma=args.sigma)
    optimizer = torch.optim.AdamW(model.param_groups(lr=args.lr, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    model.train()
    for step in range(args.steps):
        chosen = torch.randint(len(images), (args.batch,))
        loss = loss_of(model.forward_train(images[chosen]), xy[chosen], visible[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="segformer_b0_keypoints")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=96, help="side of a crop in pixels")
    parser.add_argument("--train-crops", type=int, default=1000)
    parser.add_argument("--test-crops", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sigma", type=float, default=1.5, help="of the target heatmaps, in cells")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    train_data = load_crops(args.train_crops, 0, args.side)
    images, truth, visible, length = load_crops(args.test_crops, FIRST_HELD_OUT_SEED, args.side)
    model = segzoo.create_model(args.model, num_classes=len(KEYPOINTS), drop_path_rate=0.0, dropout=0.0)
    known = train_data[2][..., None]
    found = {
        "mean position": ((train_data[1] * known).sum(0) / known.sum(0)).expand(args.test_crops, -1, -1),
        "untrained": find(model, images),
    }
    train(model, train_data, args)
    for preset in model.reduction_presets:
        model.set_inference_reduction(preset)
        found[f"trained, reduction {preset}"] = find(model, images)

    rows = []
    for form, xy in found.items():
        row = {"form": form}
        row |= {f"pck@{t}": round(pck(xy, truth, visible, length, t=t), 4) for t in THRESHOLDS}
        print("  ".join(f"{value:<32}" if key == "form" else f"{key} {value:.3f}" for key, value in row.items()))
        row |= {"model": args.model, "steps": args.steps, "batch": args.batch, "size": f"{args.side}x{args.side}"}
        row |= {"train_crops": args.train_crops, "test_crops": args.test_crops, "visible": int(visible.sum())}
        rows.append(row | conditions(torch, segzoo))
    write_table(rows, RESULTS / f"keypoints_{args.model}_{args.side}x{args.side}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
