"""From a JPEG file to a mask of its size: segzoo.predict against transformers' pipeline, in interleaved rounds.

    python benchmarks/pipeline.py segformer_b0 --image 480 640 --threads 1

Both have the same random weights, and both models see the picture at 512x512. The peer's own export to OpenVINO is fed
by transformers' image processor and followed by its post-processing. Of random weights neighbouring cells agree less
often than of trained ones; their share is recorded, since the mask step lives on it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from masks import agreement
from peers import OpenVINOExport, transformers_segformer, with_its_weights
from PIL import Image
from recording import RESULTS, conditions, write_table
from timing import faster, interleaved
from torch import Tensor, nn

import segzoo
from segzoo.data import scenes

BASE = "transformers pipeline"
SIZE = (512, 512)
Mask = Callable[[], np.ndarray]


def picture(path: Path, size: tuple[int, int]) -> None:
    """A scene as a JPEG of (H, W) pixels."""
    image_HWC, _ = scenes.render(seed=0)
    Image.fromarray(image_HWC).resize(size[::-1], Image.Resampling.BICUBIC).save(path, quality=92)


def processor() -> transformers.SegformerImageProcessor:
    return transformers.SegformerImageProcessor(size={"height": SIZE[0], "width": SIZE[1]})


def pipeline_mask(peer: nn.Module, path: Path) -> Mask:
    pipeline = transformers.pipeline("image-segmentation", model=peer, image_processor=processor(), device="cpu")
    return lambda: pipeline(str(path))


def export_mask(export: OpenVINOExport, path: Path) -> Mask:
    """What a user of transformers writes around the exported model."""
    prepare = processor()

    def mask() -> np.ndarray:
        image = Image.open(path).convert("RGB")
        inputs = prepare(images=image, return_tensors="pt")
        output = SimpleNamespace(logits=export(inputs["pixel_values"]))
        return prepare.post_process_semantic_segmentation(output, target_sizes=[image.size[::-1]])[0].numpy()

    return mask


def segzoo_mask(model: object, path: Path) -> Mask:
    return lambda: segzoo.predict(model, path, resize=SIZE).mask  # type: ignore[arg-type]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="segformer_b0", help="a SegFormer (default: %(default)s)")
    parser.add_argument("--image", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        picture(path, tuple(args.image))
        peer = transformers_segformer(args.model)
        model = with_its_weights(args.model, peer, Path(folder))
        shape = (1, 3, *SIZE)
        inputs = processor()(images=Image.open(path), return_tensors="pt")
        agreeing = agreement(peer(**inputs).logits)
        engines = {
            f"segzoo openvino {precision}": segzoo.compile(model, precision=precision, threads=args.threads)
            for precision in ("f32", "bf16")
        }
        forms: dict[str, Mask] = {
            BASE: pipeline_mask(peer, path),
            "segzoo eager": segzoo_mask(segzoo.fold(model), path),
        }
        for name, engine in engines.items():
            forms[name] = segzoo_mask(engine, path)
        for name, precision in (("f32", "f32"), ("default", None)):
            export = OpenVINOExport(peer, shape, precision=precision, threads=args.threads)
            forms[f"transformers openvino {name}"] = export_mask(export, path)
        head_alone = segzoo.compile(model, threads=args.threads).runner
        normalised: Tensor = torch.randn(shape)
        forms["segzoo openvino f32, head's output alone"] = lambda: head_alone(normalised)  # type: ignore[assignment]
        masks = {name: forms[name]() for name in forms if name.startswith(("segzoo", "transformers openvino"))}
        times = interleaved(forms, args.rounds)

    expected = masks["segzoo eager"]
    rows = []
    for name, seconds in times.items():
        found = masks.get(name)
        same = isinstance(found, np.ndarray) and found.shape == expected.shape
        rows.append(
            {
                "model": args.model,
                "image": f"{args.image[0]}x{args.image[1]}",
                "seen_at": f"{SIZE[0]}x{SIZE[1]}",
                "threads": args.threads,
                "form": name,
                **faster(seconds, times[BASE]),
                "ms_median": round(1e3 * statistics.median(seconds), 2),
                "same_pixels_as_segzoo_eager": round(float((found == expected).mean()), 5) if same else "",
                "agreeing_cells": round(agreeing, 3),
                "rounds": args.rounds,
                **conditions(torch, segzoo, transformers),
            }
        )
        print(f"{name:<42} {rows[-1]['speed_up_median']:6.2f}x  {rows[-1]['ms_median']:9.1f} ms")
    write_table(rows, RESULTS / f"pipeline_{args.model}_{args.image[0]}x{args.image[1]}_cpu{args.threads}.csv")


if __name__ == "__main__":
    main()
