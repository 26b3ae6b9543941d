"""The `segzoo` command. Imports of torch wait until a verb needs them, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import ImageError, SegzooError
from .._version import __version__

if TYPE_CHECKING:
    from ..models.base import SegmentationModel
    from ..results import Segmentation

DEFAULT_MODEL = "edaformer_t.scenes"
DEMO_SEEDS = (2_000_001, 2_000_002, 2_000_003)  # far from the training seeds
DEMO_SIZE = (256, 512)
DEMO_PRESETS = ("base", "decoder", "optimal", "fast")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except SegzooError as error:
        print(f"segzoo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `segzoo list | head`
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="segzoo", description="A model zoo of efficient transformers for semantic segmentation."
    )
    parser.add_argument("--version", action="version", version=f"segzoo {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _add(verbs, "list", run_list, "list models, or with --pretrained every row of weights")
    verb.add_argument("filter", nargs="*", default=["*"], help="wildcards, for example 'edaformer*'")
    verb.add_argument("--pretrained", action="store_true", help="list weights (name.tag) instead of models")
    verb.add_argument(
        "--source", choices=("bundled", "hub", "url", "unpublished"), help="with --pretrained: only these"
    )
    verb.add_argument("--license", metavar="ID", help="with --pretrained: only this licence, such as apache-2.0")
    verb.add_argument(
        "--commercial", action="store_true", help="with --pretrained: only where commercial use is allowed"
    )
    verb.add_argument("--dataset", metavar="NAME", help="with --pretrained: only this data set")

    verb = _add(verbs, "info", run_info, "parameters, cost per stage and reduction site, weights, licence")
    verb.add_argument("model", help="name or name.tag")
    verb.add_argument("--size", type=_positive, nargs=2, metavar=("H", "W"), help="input in pixels (default: 512 512)")
    verb.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    verb.add_argument("--num-classes", type=_positive, metavar="K")

    verb = _add(verbs, "predict", run_predict, "write a mask and an overlay for each image")
    verb.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    verb.add_argument("--model", default=DEFAULT_MODEL, help="name or name.tag (default: %(default)s)")
    verb.add_argument("--checkpoint", metavar="FILE", help="weights to load instead of the published ones")
    verb.add_argument("--num-classes", type=_positive, metavar="K", help="classes of the checkpoint")
    verb.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    verb.add_argument("--resize", type=_positive, nargs=2, metavar=("H", "W"), help="exact size that the model sees")
    verb.add_argument("--mode", choices=("whole", "slide"), help="whole image or sliding window")
    verb.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over these scales")
    verb.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    verb.add_argument("--alpha", type=float, default=0.5, help="strength of the overlay's colours, 0 to 1")
    verb.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")

    verb = _add(verbs, "demo", run_demo, "segment three unseen synthetic street scenes, with and without reduction")
    verb.add_argument("-o", "--output", type=Path, default=Path("segzoo_demo"), metavar="DIR", help="(%(default)s)")

    verb = _add(
        verbs, "convert", run_convert, "turn an official checkpoint into a folder with its config and model card"
    )
    verb.add_argument("file", metavar="OFFICIAL_FILE", help="checkpoint as its authors published it")
    verb.add_argument("name", metavar="NAME.TAG", help="weights that the file is; `segzoo list --pretrained` shows all")
    verb.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the result")

    verb = _add(verbs, "publish", run_publish, "upload a folder of `segzoo convert` to the Hugging Face Hub")
    verb.add_argument("directory", type=Path, metavar="DIR", help="folder of a saved model")
    verb.add_argument("repository", metavar="REPO", help="OWNER/NAME; made if it does not exist")
    verb.add_argument("--private", action="store_true", help="only to a private repository")
    verb.add_argument("--revision", metavar="BRANCH", help="branch; made if it does not exist (default: the main one)")
    return parser


def _add(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.add_argument("--json", action="store_true", help="print the results as JSON")
    verb.set_defaults(run=run)
    return verb


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


# --- list ---------------------------------------------------------------------------------------------------------


def run_list(args: argparse.Namespace) -> int:
    from ..zoo.index import known_models, known_rows, list_models, list_pretrained

    if args.pretrained:
        rows, known = [], known_rows()
        names = list_pretrained(
            args.filter,
            source=args.source,
            license=args.license,
            commercial=True if args.commercial else None,
            dataset=args.dataset,
        )
        for name in names:
            row = known[name]
            rows.append(
                {
                    "name": name,
                    "source": row.state,
                    "from": row.from_text,
                    "dataset": row.dataset,
                    "classes": row.num_classes,
                    "miou": row.miou,
                    "license": row.license,
                    "commercial_use": row.commercial_use,
                }
            )
    elif args.source or args.license or args.commercial or args.dataset:
        raise SegzooError("--source, --license, --commercial and --dataset select weights; add --pretrained")
    else:
        rows, known = [], known_models()
        for name in list_models(args.filter):
            model = known[name]
            rows.append({"name": name, "family": model.family, "params": model.params, "tags": list(model.rows)})
    if not rows:
        raise SegzooError(f"no name matches {' '.join(args.filter)}; `segzoo list` shows all")
    _print_rows(rows, args.json)
    if not args.json and any(row.get("source") == "unpublished" for row in rows):
        print("\nunpublished: `segzoo info NAME.TAG` says how to get the weights")
    return 0


# --- info ---------------------------------------------------------------------------------------------------------


def run_info(args: argparse.Namespace) -> int:
    from ..zoo.index import check_name

    check_name(args.model)  # before torch is loaded
    import torch

    from ..costing import cost
    from ..zoo import create_model, model_info

    info = model_info(args.model)
    with torch.device("meta"):
        model = create_model(args.model, num_classes=args.num_classes)
    if args.reduction:
        model.set_inference_reduction(args.reduction)
    size = tuple(args.size or (512, 512))
    result = cost(model, size)
    published = [
        figure
        for figure in info.published
        if figure.size == size
        and (figure.num_classes in (None, model.num_classes))
        and figure.reduction == (args.reduction or "base")
    ]
    row = info.pretrained_cfg
    if args.json:
        _print_json(
            {
                "name": args.model,
                "family": info.family,
                "num_classes": model.num_classes,
                "size": size,
                "params": result.params,
                "macs": result.macs,
                "published_gmacs": published[0].gmacs if published else None,
                "stages": result.stages,
                "sites": result.sites,
                "reduction": json.loads(result.plan.to_json()),
                "presets": list(model.reduction_presets),
                "tags": list(info.tags),
                "license": row.license if row else None,
                "commercial_use": row.commercial_use if row else None,
            }
        )
        return 0
    print(f"{args.model} ({info.family}), {model.num_classes} classes")
    print(result)
    for figure in published:
        params = f", {figure.params_m} M parameters" if figure.params_m else ""
        print(f"published: {figure.gmacs} GMACs{params}")
    if not published:
        print("published: no figure for this size, number of classes and reduction")
    print(f"presets: {', '.join(model.reduction_presets) or 'none'}")
    print(f"weights: {', '.join(info.tags) or 'none'}")
    if row:
        allowed = {True: "allowed", False: "not allowed", None: "unknown"}[row.commercial_use]
        print(f"default weights: {info.tag} ({row.state}), licence {row.license}, commercial use {allowed}")
        if not row.loadable:
            print(f"how to get them: {row.how_to_get}")
    return 0


# --- predict --------------------------------------------------------------------------------------------------------


def run_predict(args: argparse.Namespace) -> int:
    from ..zoo.index import check_name

    if not 0 <= args.alpha <= 1:
        raise SegzooError(f"--alpha must be between 0 and 1, not {args.alpha}")
    paths = _output_paths(args.images, args.output)
    check_name(args.model)  # before torch is loaded
    from ..prediction import predict

    model = _trained_model(args).eval().to(_device(args.device))
    if args.reduction:
        model.set_inference_reduction(args.reduction)
    resize = tuple(args.resize) if args.resize else None
    done, errors = [], []
    for source, path in _progress(list(zip(args.images, paths, strict=True)), args):
        try:
            result = predict(model, source, resize=resize, mode=args.mode, scales=args.scales, flip=args.flip)
        except ImageError as error:
            errors.append(str(error))
            print(f"segzoo: error: {error}", file=sys.stderr)
            continue
        mask_path, overlay_path = result.save(path, alpha=args.alpha)
        done.append(_describe(result, mask_path, overlay_path))
    if args.json:
        _print_json({"model": args.model, "images": done, "errors": errors})
    else:
        for item in done:
            pixels = item["size"][0] * item["size"][1]
            labels = ", ".join(
                f"{label['name']} {100 * label['pixels'] / pixels:.0f} %" for label in item["labels"][:6]
            )
            print(f"{item['image']} -> {item['mask']}: {labels}")
    return 2 if errors else 0


def _output_paths(images: Sequence[str], folder: Path) -> list[Path]:
    """One mask file per image; where its name or that of its overlay is taken, it gets a number.

    Raises:
        SegzooError: a mask or an overlay would take the place of an image.
    """
    inputs = {os.path.realpath(image) for image in images}
    used: set[Path] = set()
    paths = []
    for image in images:
        name, number = Path(image).stem, 2
        while used.intersection(outputs := (folder / f"{name}.png", folder / f"{name}_overlay.png")):
            name, number = f"{Path(image).stem}-{number}", number + 1
        for output in outputs:
            if os.path.realpath(output) in inputs:
                raise SegzooError(f"{output} is one of the images and would be overwritten; give another folder as -o")
        used.update(outputs)
        paths.append(outputs[0])
    return paths


def _trained_model(args: argparse.Namespace) -> SegmentationModel:
    """The model with all its weights: a fresh classifier, which `create_model` makes for training, would only guess."""
    from ..zoo import create_model, load_weights

    if args.checkpoint is None:
        model = create_model(args.model, pretrained=True)
        if args.num_classes not in (None, model.num_classes):
            raise SegzooError(
                f"--num-classes {args.num_classes}: the weights of {model.name} have {model.num_classes} classes; "
                "leave it out, or name a file that has so many with --checkpoint"
            )
        return model
    model = create_model(args.model, num_classes=args.num_classes)
    load_weights(model, args.checkpoint, adapt_in_chans=True)
    return model


def _describe(result: Segmentation, mask_path: Path, overlay_path: Path) -> dict[str, Any]:
    return {
        "image": result.source,
        "mask": str(mask_path),
        "overlay": str(overlay_path),
        "size": list(result.mask.shape),
        "labels": [label._asdict() for label in result.labels],
        "reduction": json.loads(result.plan.to_json()),
    }


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SegzooError(f"--device {name}: {str(error).splitlines()[0]}; use cpu") from None
    return device


# --- demo -----------------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> int:
    from ..costing import cost
    from ..data import scenes
    from ..zoo import create_model

    model = create_model(DEFAULT_MODEL, pretrained=True).eval()
    rendered = [scenes.render(seed=seed, size=DEMO_SIZE) for seed in DEMO_SEEDS]
    results: dict[str, list[Segmentation]] = {}
    rows = []
    for preset in _progress(DEMO_PRESETS, args):
        model.set_inference_reduction(preset)
        results[preset], miou, seconds = _segment(model, rendered)
        rows.append(
            {
                "reduction": preset,
                "mIoU": round(miou, 4),
                "GMACs": round(cost(model, DEMO_SIZE).macs / 1e9, 3),
                "ms/image": round(1000 * seconds, 1),
            }
        )
    files = []
    for i, (image, truth) in enumerate(rendered):
        path = args.output / f"scene_{i + 1}.png"
        _demo_panel(image, truth, {preset: results[preset][i] for preset in ("base", "optimal")}, path)
        files.append(str(path))
    if args.json:
        _print_json({"model": DEFAULT_MODEL, "table": rows, "files": files})
        return 0
    print(f"{DEFAULT_MODEL} on {len(rendered)} scenes never seen in training, {DEMO_SIZE[0]}x{DEMO_SIZE[1]}:\n")
    _print_rows(rows, False)
    print("\nImage, truth, mask and overlay side by side:")
    print("\n".join(f"  {file}" for file in files))
    return 0


def _segment(model: SegmentationModel, rendered: Sequence[tuple[Any, Any]]) -> tuple[list[Segmentation], float, float]:
    """Predictions, their mIoU, and the fastest time of an image in seconds."""
    from ..prediction import predict
    from ..training.metrics import ConfusionMatrix

    confusion = ConfusionMatrix(model.num_classes)
    predict(model, rendered[0][0])  # the first call pays for set-up that later ones do not
    predictions, seconds = [], []
    for image, truth in rendered:
        start = time.perf_counter()
        predictions.append(predict(model, image))
        seconds.append(time.perf_counter() - start)
        confusion.update(predictions[-1].mask, truth)
    return predictions, confusion.miou(), min(seconds)


def _demo_panel(image: Any, truth: Any, predictions: dict[str, Segmentation], path: Path) -> None:
    import numpy as np
    from PIL import Image

    from ..results import write_png
    from ..visualize import colour_mask, legend, panel

    labels = next(iter(predictions.values())).label_set
    rows = []
    for preset, result in predictions.items():
        rows.append(
            [
                ("image", Image.fromarray(image)),
                ("truth", Image.fromarray(colour_mask(truth, labels))),
                (f"mask, reduction {preset}", Image.fromarray(colour_mask(result.mask, labels))),
                (f"overlay, reduction {preset}", result.overlay()),
            ]
        )
    present = [int(index) for index in np.unique(truth)]
    write_png(panel(rows, legend(labels, present, 4 * image.shape[1])), path)


# --- convert and publish ----------------------------------------------------------------------------------------------


def run_convert(args: argparse.Namespace) -> int:
    from ..sharing import convert

    report = convert(args.file, args.name, args.output)
    _print_json(report.to_dict()) if args.json else print(report)
    return 0


def run_publish(args: argparse.Namespace) -> int:
    from ..sharing import publish
    from ..zoo.config import read_config

    row = read_config(args.directory).pretrained_cfg
    if row is None or row.license == "unknown":
        print(
            "segzoo: note: no licence is stated for these weights; publish them only if you may pass them on",
            file=sys.stderr,
        )
    done = publish(args.directory, args.repository, private=args.private or None, revision=args.revision)
    if args.json:
        _print_json({"repository": done.repo_id, "commit": done.commit, "url": done.url})
    else:
        print(f'{done.url}\nsegzoo.create_model("hf-hub:{done.repo_id}@{done.commit}")')
    return 0


# --- output -----------------------------------------------------------------------------------------------------------


def _progress(items: Sequence[Any], args: argparse.Namespace) -> Any:
    """A progress bar on a terminal, nothing where the output is read by a program."""
    from tqdm import tqdm  # comes with huggingface-hub

    hidden = len(items) < 2 or args.json or not sys.stderr.isatty()
    return tqdm(items, disable=hidden, leave=False, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """A list of equal dicts as JSON or as a table with aligned columns."""
    if as_json:
        _print_json(list(rows))
        return

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "-"
        return f"{value:,}" if isinstance(value, int) else str(value)

    table = [list(rows[0]), *[[text(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
