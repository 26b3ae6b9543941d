"""EDAFormer against the paper's formulation written out plainly, in paired runs.

    python benchmarks/latency.py edaformer_t --size 512 512 --threads 1

The plain form shares the very same weights. It materialises the attention matrix and keeps tokens as (B, N, C), with
a transposing copy on each side of every depthwise convolution and pooling, as the released code does. Both are
checked to give the same scores, then run in turn, so that a busy machine hits both alike. What counts is the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from recording import RESULTS, conditions, write_table
from torch import Tensor, nn

import segzoo


def tokens_to_map(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    return x_BNC.transpose(1, 2).reshape(x_BNC.shape[0], -1, *grid).contiguous()


def map_to_tokens(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(2).transpose(1, 2).contiguous()


class PlainEDAFormer(nn.Module):
    """The forward pass of the paper over the modules of a segzoo EDAFormer without reduction."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def attention(self, attn: nn.Module, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x_BNC.shape
        heads = attn.num_heads
        q = x_BNC.reshape(B, N, heads, C // heads).permute(0, 2, 1, 3)
        pooled = F.avg_pool2d(tokens_to_map(x_BNC, grid), attn.kv_reduction.trained)
        kv = map_to_tokens(F.conv2d(pooled, attn.kv.weight[:, :, None, None], attn.kv.bias))
        kv = attn.kv_act(attn.kv_norm(kv)).reshape(B, -1, heads, C // heads).permute(0, 2, 1, 3)
        scores = (q @ kv.transpose(-2, -1)) * (C // heads) ** -0.5
        out = (scores.softmax(dim=-1) @ kv).transpose(1, 2).reshape(B, N, C)
        return attn.proj(out)

    def block(self, block: nn.Module, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        x_BNC = x_BNC + self.attention(block.attn, block.norm1(x_BNC), grid)
        mlp = block.mlp
        hidden = mlp.act1(mlp.fc1(block.norm2(x_BNC)))
        hidden = map_to_tokens(mlp.dwconv(tokens_to_map(hidden, grid)))
        return x_BNC + mlp.fc2(mlp.act2(hidden))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features = []
        for stage in self.model.encoder.stages:
            x_BCHW = stage.patch_embed.proj(x_BCHW)
            grid = x_BCHW.shape[2:]
            x_BNC = stage.patch_embed.norm(map_to_tokens(x_BCHW))
            for block in stage.blocks:
                x_BNC = self.block(block, x_BNC, grid)
            x_BCHW = tokens_to_map(stage.norm(x_BNC), grid)
            features.append(x_BCHW)
        maps = []
        decoder = self.model.decoder
        for blocks, map_BCHW in zip(decoder.levels, reversed(features[1:]), strict=True):
            grid = map_BCHW.shape[2:]
            x_BNC = map_to_tokens(map_BCHW)
            for block in blocks:
                x_BNC = self.block(block, x_BNC, grid)
            map_BCHW = tokens_to_map(x_BNC, grid)
            maps.append(F.interpolate(map_BCHW, size=features[1].shape[2:], mode="bilinear", align_corners=False))
        fuse = decoder.fuse
        return decoder.classifier(fuse.act(fuse.bn(fuse.conv(torch.cat(maps, dim=1)))))


def decoder_scores(model: nn.Module):
    return lambda x: model.forward_head(model.forward_features(x))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="edaformer_t")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--reductions", nargs="*", default=("decoder", "optimal", "fast"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = segzoo.create_model(args.model).eval()
    plain = PlainEDAFormer(model).eval()
    x = torch.randn(1, 3, *args.size)
    torch.testing.assert_close(plain(x), decoder_scores(model)(x), rtol=1e-4, atol=1e-4)

    folded = segzoo.fold(model)
    torch.testing.assert_close(decoder_scores(folded)(x), decoder_scores(model)(x), rtol=1e-4, atol=1e-4)
    forms = [("plain", None, plain), ("segzoo", None, decoder_scores(model))]
    forms += [("segzoo folded", None, decoder_scores(folded))]
    forms += [(f"segzoo folded, {preset}", preset, decoder_scores(folded)) for preset in args.reductions]
    times: dict[str, list[float]] = {name: [] for name, _, _ in forms}
    for round_ in range(args.rounds + 1):
        for name, preset, function in forms:
            folded.set_inference_reduction(preset)
            start = time.perf_counter()
            function(x)
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)

    rows = []
    for name, values in times.items():
        speed_up = [a / b for a, b in zip(times["plain"], values, strict=True)]
        rows.append(
            {
                "form": name,
                "model": args.model,
                "size": f"{args.size[0]}x{args.size[1]}",
                "threads": args.threads,
                "speed_up_median": round(statistics.median(speed_up), 3),
                "speed_up_min": round(min(speed_up), 3),
                "speed_up_max": round(max(speed_up), 3),
                "rounds": args.rounds,
                **conditions(torch, segzoo),
            }
        )
        print(f"{name:<26} {rows[-1]['speed_up_median']:.2f}x  ({min(speed_up):.2f} to {max(speed_up):.2f})")
    write_table(rows, RESULTS / f"latency_{args.model}_{args.size[0]}x{args.size[1]}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
