"""`segzoo demo`: the bundled model on scenes that it has never seen, as trained and with every reduction."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DEFAULT_MODEL
from .output import in_lines, print_json, print_table, progress

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..models.base import Model
    from ..results import Segmentation

SUMMARY = "segment three unseen synthetic street scenes, with and without reduction"

SEEDS = (2_000_001, 2_000_002, 2_000_003)  # far from the training seeds
SIZE = (320, 640)  # (H, W) in pixels; the weights, trained at 256x512, lose accuracy beyond
PRESETS = ("base", "decoder", "optimal", "fast")
ROUNDS = 6
NOISE = 0.1  # spread of base against itself, as a share of its time, above which times say little


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of an image over rounds in which every form takes its turn."""

    seconds: float  # median
    ratio: float  # to the first form in the same round, median
    low: float  # quartiles of the ratio
    high: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path("segzoo_demo"), metavar="DIR", help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..results import write_png
    from ..zoo import create_model

    model = create_model(DEFAULT_MODEL, pretrained=True, pretrained_cfg_overlay={"test_size": SIZE}).eval()
    rendered = render_scenes()
    results = segment(model, rendered, as_json=args.json)
    timings = compare_times(_forms(model, [image for image, _ in rendered]), ROUNDS, as_json=args.json)
    rows = _table(model, rendered, results, timings)
    files = []
    for i, (image, truth) in enumerate(rendered):
        files.append(args.output / f"scene_{i + 1}.png")
        write_png(draw_sheet(image, truth, {preset: results[preset][i] for preset in PRESETS}, _gmacs(rows)), files[-1])
    noisy = timings["base"].high - timings["base"].low > NOISE
    if args.json:
        print_json({"model": DEFAULT_MODEL, "table": rows, "noisy": noisy, "files": [str(file) for file in files]})
    else:
        _print_report(
            rows, timings["base"] if noisy else None, model.pretrained_cfg.advice if model.pretrained_cfg else "", files
        )
    return 0


def render_scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    """Image and truth of each scene."""
    from ..data import scenes

    return [scenes.render(seed=seed, size=SIZE) for seed in SEEDS]


def segment(
    model: Model, rendered: Sequence[tuple[np.ndarray, np.ndarray]], *, as_json: bool
) -> dict[str, list[Segmentation]]:
    """The predictions of every preset, a scene after the other."""
    from ..prediction import predict

    results = {}
    for preset in progress(PRESETS, as_json=as_json):
        model.set_inference_reduction(preset)
        results[preset] = [predict(model, image) for image, _ in rendered]
    return results


def _forms(model: Model, images: Sequence[np.ndarray]) -> dict[str, Callable[[int], object]]:
    """Preset -> what segments the image of a round with it."""
    from ..prediction import predict
    from ..twins import eval_twin

    def form(preset: str) -> Callable[[int], object]:
        twin = eval_twin(model)
        twin.set_inference_reduction(preset)
        return lambda turn: predict(twin, images[turn % len(images)])

    return {preset: form(preset) for preset in PRESETS}


def compare_times(
    forms: Mapping[str, Callable[[int], object]],
    rounds: int,
    *,
    as_json: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the forms round by round, so that all of them meet whatever else the machine does.

    A round begins and ends with the first form, and every second round runs backwards. A form's ratio is that to the
    mean of both times of the first form in the same round; the first form's own is that of its second time to its
    first one, so that its spread is what the machine alone makes of equal work.

    Args:
        forms: called with the number of the round.
        clock: gives seconds.
    """
    first = next(iter(forms))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    ratios: dict[str, list[float]] = {name: [] for name in forms}
    for turn in progress(range(rounds), as_json=as_json, unit="round"):
        order = [*forms, first]
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for name in order if turn % 2 == 0 else reversed(order):
            start = clock()
            forms[name](turn)
            taken[name].append(clock() - start)
        before, after = taken[first]
        for name, times in taken.items():
            seconds[name].extend(times)
            ratios[name].append(after / before if name == first else times[0] / statistics.mean(taken[first]))
    return {name: _timing(seconds[name], ratios[name]) for name in forms}


def _timing(seconds: Sequence[float], ratios: Sequence[float]) -> Timing:
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(statistics.median(seconds), statistics.median(ratios), low, high)


def _table(
    model: Model,
    rendered: Sequence[tuple[np.ndarray, np.ndarray]],
    results: Mapping[str, Sequence[Segmentation]],
    timings: Mapping[str, Timing],
) -> list[dict[str, Any]]:
    """A row a preset; changed pixels and times are against base."""
    from ..costing import cost

    rows = []
    for preset, predictions in results.items():
        model.set_inference_reduction(preset)
        changed = [(a.mask != b.mask).mean() for a, b in zip(results["base"], predictions, strict=True)]
        timing = timings[preset]
        rows.append(
            {
                "reduction": preset,
                "mIoU": round(miou(predictions, [truth for _, truth in rendered]), 4),
                "changed": round(float(statistics.mean(changed)), 5),
                "GMACs": round(cost(model, SIZE).macs / 1e9, 3),
                "ms/image": round(1000 * timing.seconds, 1),
                "time": round(timing.ratio, 2),
                "spread": [round(timing.low, 2), round(timing.high, 2)],
            }
        )
    return rows


def miou(predictions: Sequence[Segmentation], truths: Sequence[np.ndarray]) -> float:
    """Of all scenes together, 0 to 1."""
    from ..training.metrics import ConfusionMatrix

    confusion = ConfusionMatrix(len(predictions[0].label_set))
    for prediction, truth in zip(predictions, truths, strict=True):
        confusion.update(prediction.mask, truth)
    return confusion.miou()


def _gmacs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {row["reduction"]: row["GMACs"] for row in rows}


def draw_sheet(
    image: np.ndarray, truth: np.ndarray, results: Mapping[str, Segmentation], gmacs: Mapping[str, float]
) -> Image.Image:
    """Three rows over a legend: image, truth and base's mask; the mask of each reduction; the pixels that it changed.

    Args:
        results, gmacs: by preset, base first; results of this scene.
    """
    import numpy as np
    from PIL import Image

    from ..visualize import CHANGES, changed_pixels, colour_mask, legend, panel, stack

    base = results["base"]
    labels = base.label_set
    letters = max(11, image.shape[1] // 32)

    def titled(preset: str) -> tuple[str, Image.Image]:
        share = "" if preset == "base" else f" ({gmacs[preset] / gmacs['base']:.0%})"
        title = f"{preset}: mIoU {miou([results[preset]], [truth]):.4f}, {gmacs[preset]:.2f} GMACs{share}"
        return title, Image.fromarray(colour_mask(results[preset].mask, labels))

    reduced = [preset for preset in results if preset != "base"]
    rows = [
        [("image", Image.fromarray(image)), ("truth", Image.fromarray(colour_mask(truth, labels))), titled("base")],
        [titled(preset) for preset in reduced],
        [
            (
                f"changed by {preset}: {(results[preset].mask != base.mask).mean():.2%} of the pixels",
                changed_pixels(image, base.mask, results[preset].mask, truth),
            )
            for preset in reduced
        ],
    ]
    width = 3 * image.shape[1]
    classes = legend(labels, [int(index) for index in np.unique(truth)], width, size=letters)
    footer = stack(classes, legend(CHANGES, range(len(CHANGES)), width, size=letters))
    return panel(rows, footer, size=letters)


def _print_report(
    rows: Sequence[Mapping[str, Any]], noisy_base: Timing | None, advice: str, files: Sequence[Path]
) -> None:
    print(f"{DEFAULT_MODEL} on {len(files)} scenes never seen in training, {SIZE[0]}x{SIZE[1]}:\n")
    base = rows[0]
    print_table(
        [
            {
                "reduction": row["reduction"],
                "mIoU": f"{row['mIoU']:.4f}",
                "changed": "-" if row is base else f"{row['changed']:.2%}",
                "GMACs": f"{row['GMACs']:.3f} ({row['GMACs'] / base['GMACs']:.0%})",
                "ms/image": row["ms/image"],
                "time against base": f"{row['time']:.2f} ({row['spread'][0]:.2f} to {row['spread'][1]:.2f})",
            }
            for row in rows
        ]
    )
    notes = [
        f"Times: medians of {ROUNDS} rounds in which all take turns, in brackets the middle half of the rounds; base "
        "is compared with itself. Changed: pixels of another class than base gives them."
    ]
    if noisy_base is not None:
        notes.append(
            f"This machine is busy: base takes {noisy_base.low:.2f} to {noisy_base.high:.2f} times its own time, so no "
            "time here is to be trusted. The other columns do not depend on it."
        )
    print("\n" + "\n".join(in_lines(note, indent="") for note in notes))
    print("\nImage, truth and masks, and what each reduction changed:")
    print("\n".join(f"  {file}" for file in files))
    print("\n" + in_lines(f"The weights have seen synthetic scenes alone: {advice}.", indent=""))
