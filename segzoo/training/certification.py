"""How far every engine, precision and reduction is from the exact model, measured on images.

The exact model is the model itself, unfolded, in float32 and without reduction. Times are those of the whole walk from
image to mask, in interleaved rounds, as shares of eager's (folded, float32, no reduction); they hold for the machine,
its threads and what else it was doing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import SegzooError
from .._version import __version__
from ..data import scenes
from ..data.segmentation import FIRST_HELD_OUT_SEED
from ..engines import ENGINES, PRECISIONS, Engine, compile
from ..engines.compiling import make_runner, segmenter_of
from ..engines.engine import PACKAGES, UNSUPPORTED, missing_packages
from ..engines.forms import StageForm
from ..models.base import Model
from ..models.segmenter import SegmentationModel
from ..plans import inference_reduction
from ..prediction import predict, score_maker
from ..preprocess import ImageSource, load_image, model_size, to_input
from ..twins import eval_twin
from .metrics import ConfusionMatrix

ROUNDS = 3  # of times, after one that is not counted

Pair = tuple[ImageSource, np.ndarray | None]  # an image, and its labels (H, W) where they are known
Case = tuple[str, str, str]  # engine, precision, reduction


@dataclasses.dataclass(frozen=True)
class CertificateRow:
    """One engine, precision and reduction."""

    engine: str
    precision: str
    reduction: str  # a plan, or "none"
    agreement: float  # share of pixels with the exact model's class
    miou: float | None  # where there is truth
    time: float  # median, as a share of eager's
    first_stage: str | None  # the first that is off by more than the tolerance
    deviation: float  # of the head's output, as a share of its largest value; infinite where it is not a number

    def to_dict(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "precision": self.precision,
            "reduction": self.reduction,
            "agreement": round(self.agreement, 6),
            "mIoU": None if self.miou is None else round(self.miou, 4),
            "time / eager": round(self.time, 3),
            "first stage off": self.first_stage,
            "off at the head": float(f"{self.deviation:.1e}") if math.isfinite(self.deviation) else None,
        }


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The rows, and what they hold for."""

    model: str
    images: int
    tolerance: float
    threads: int
    versions: Mapping[str, str]
    rows: tuple[CertificateRow, ...]
    left_out: tuple[str, ...]  # what could not be measured, each with its reason

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "rows": [row.to_dict() for row in self.rows]}

    def text(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.model} on {self.images} images against the exact model, {self.threads} threads, {versions}; "
            f"a stage is off beyond {self.tolerance:g} of its largest value"
        )


def scene_pairs(count: int, size: tuple[int, int] = (256, 512)) -> list[Pair]:
    """Synthetic street scenes that no training has seen, with their truth."""
    return [scenes.render(seed=FIRST_HELD_OUT_SEED + i, size=size) for i in range(count)]


def certify(
    model: Model,
    pairs: Sequence[Pair],
    *,
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    reductions: Sequence[str] | None = None,
    tolerance: float = 0.01,
    threads: int | None = None,
    progress: Callable[[Sequence[Case]], Iterable[Case]] = iter,
) -> Certificate:
    """Measure engines, precisions and reductions of a model.

    Args:
        model: a segmentation model in float32 on the CPU, in any mode; it is never touched.
        pairs: images, each with its labels or None.
        engines: default: all whose packages are installed; the others are named as left out.
        precisions: default: both.
        reductions: plans beside none; default: the model's presets.
        tolerance: beyond which share of its largest value a stage counts as off.
        threads: of onnxruntime and openvino; default: as many as torch has.
        progress: wraps the cases, as tqdm does.

    Raises:
        SegzooError: no image, or an engine that was asked for and is not there.
    """
    if not pairs:
        raise SegzooError("there is no image to measure on")
    source = eval_twin(segmenter_of(model))
    source.set_inference_reduction(None)
    threads = threads or torch.get_num_threads()
    left_out: list[str] = []
    cases = _cases(source, engines, precisions, reductions, left_out)
    measure = _Measure(source, pairs, tolerance=tolerance, threads=threads)
    rows = []
    for case in progress(cases):
        try:
            rows.append(measure.row(case))
        except SegzooError as error:
            if engines is not None:
                raise
            left_out.append(f"{' '.join(case)}: {error}")
    return Certificate(
        model=source.name,
        images=len(pairs),
        tolerance=tolerance,
        threads=threads,
        versions={"segzoo": __version__, "torch": torch.__version__, **_versions()},
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


def _cases(
    model: SegmentationModel,
    engines: Sequence[str] | None,
    precisions: Sequence[str] | None,
    reductions: Sequence[str] | None,
    left_out: list[str],
) -> list[Case]:
    """What there is to measure, eager in float32 without reduction first; what there is not goes into `left_out`."""
    plans = reductions if reductions is not None else [name for name, plan in model.reduction_presets.items() if plan]
    cases: list[Case] = []
    for engine in engines or ENGINES:
        missing = missing_packages(engine)
        if engines is None and missing:
            left_out.append(f"{engine}: {', '.join(missing)} not installed")
            continue
        for precision in precisions or PRECISIONS:
            if (engine, precision) in UNSUPPORTED:
                left_out.append(f"{engine} {precision}: {UNSUPPORTED[engine, precision]}")
            else:
                cases += [(engine, precision, plan) for plan in ("none", *plans)]
    return cases


class _Measure:
    """What every case is compared with, made once."""

    def __init__(self, model: SegmentationModel, pairs: Sequence[Pair], *, tolerance: float, threads: int):
        self.model = model
        self.pairs = pairs
        self.tolerance = tolerance
        self.threads = threads
        self.exact = [predict(model, image).mask for image, _ in pairs]
        self.eager = compile(model, engine="eager")
        maker = score_maker(model)
        image_HWC = load_image(pairs[0][0], maker.in_chans)
        size = model_size((image_HWC.shape[0], image_HWC.shape[1]), maker.row, None)
        self.x_BCHW = to_input(image_HWC, size, maker.row, maker.like)
        self.stage_names = StageForm(model).output_names
        with torch.inference_mode():
            self.stages = StageForm(model)(self.x_BCHW)

    def row(self, case: Case) -> CertificateRow:
        engine, precision, reduction = case
        threads = self.threads if engine in PACKAGES else None
        with inference_reduction(self.model, None if reduction == "none" else reduction):
            made = compile(self.model, engine, precision, threads)
            runner = make_runner(self.model, engine, precision, threads, StageForm)
        masks = [predict(made, image).mask for image, _ in self.pairs]
        first, deviation = self.divergence(runner(self.x_BCHW))
        return CertificateRow(
            engine=engine,
            precision=precision,
            reduction=reduction,
            agreement=float(np.mean([np.mean(a == b) for a, b in zip(masks, self.exact, strict=True)])),
            miou=self.miou(masks),
            time=self.time(made),
            first_stage=first,
            deviation=deviation,
        )

    def divergence(self, found: Sequence[Tensor]) -> tuple[str | None, float]:
        """The first stage that is off by more than the tolerance, and how far the head's output is off."""
        shares = [_deviation(a, b) for a, b in zip(self.stages, found, strict=True)]
        off = [name for name, share in zip(self.stage_names, shares, strict=True) if share > self.tolerance]
        head = len(self.model.head_names)
        return (off[0] if off else None), max(shares[-head:])

    def miou(self, masks: Sequence[np.ndarray]) -> float | None:
        confusion = ConfusionMatrix(self.model.num_classes)
        truths = [truth for _, truth in self.pairs]
        if all(truth is None for truth in truths):
            return None
        for mask, truth in zip(masks, truths, strict=True):
            if truth is not None:
                confusion.update(mask, truth)
        return confusion.miou()

    def time(self, engine: Engine) -> float:
        """Median over interleaved rounds of this engine's time over eager's, on the first image."""
        shares = []
        for _ in range(ROUNDS + 1):
            eager, own = (_seconds(maker, self.pairs[0][0]) for maker in (self.eager, engine))
            shares.append(own / eager)
        return statistics.median(shares[1:])


def _deviation(expected: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where something found is not a number."""
    difference = (expected - found).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.max() / expected.abs().max().clamp(min=1e-12))


def _seconds(maker: Engine, image: ImageSource) -> float:
    start = time.perf_counter()
    predict(maker, image)
    return time.perf_counter() - start


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("onnxruntime", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
