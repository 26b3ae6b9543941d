"""What a weights row records: where the weights come from, how images must be prepared, what they reached.

Its attributes are segzoo's. As a mapping (`row["mean"]`, `row.get(...)`, `dict(row)`) it answers in timm's fields and
with timm's meanings, so that timm's own functions can read it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .._errors import SegzooError, shown
from ..labels import LabelSet, generic_labels, list_labels, load_labels
from .fields import describe, fits, type_hints

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Of the fields of a row that have few values, these values.
CHOICES = {
    "state": ("bundled", "hub", "url", "drive", "unpublished"),
    "resize": ("keep_ratio", "exact", "none"),
    "test_mode": ("whole", "slide"),
}
METRICS = {"miou": "mIoU", "miou_small": "mIoU of the small classes", "top1": "ImageNet top-1"}

# Of those that are whole numbers or pairs of them, the least and the most that can be meant.
RANGES = {
    "size": (0, 2**40),
    "num_classes": (0, 2**16 - 1),
    **dict.fromkeys(("input_size", "test_size", "test_min_side", "crop", "stride"), (1, 2**16)),
    "size_divisor": (1, 2**10),
}
MAX_CHANS = 2**10  # for which mean and std are given
MAX_STATISTIC = 1e6  # in units of the largest value of a pixel

OWN_MEASUREMENT = "segzoo's own measurement"  # as what confirms a figure

WHOLE = "single scale, whole image"
SLIDE_1024 = "single scale, sliding window 1024 stride 768"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """An accuracy that was published for the weights of a row, or for others that differ as `training` says.

    Raises:
        SegzooError: a metric that `METRICS` does not list, or a value that is no percentage.
    """

    value: float  # percent
    metric: str = "miou"  # of METRICS
    reduction: str = "base"  # in force when it was measured: a preset, or the paper's words for what is none
    protocol: str = ""  # how images were shown to the model; "" = not stated
    source: str = ""  # where it stands: a paper and its table, a README, a benchmark
    confirmed_by: str = ""  # where else it was read when it was recorded; "" = it could not be confirmed
    training: str = ""  # of weights other than the row's: how they were trained

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise SegzooError(f"metric of a published score must be one of {', '.join(METRICS)}, not {self.metric!r}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not 0 <= self.value <= 100:
            raise SegzooError(f"value of a published score must be in percent, not {self.value!r}")

    @classmethod
    def of(cls, value: PublishedScore | Mapping[str, Any]) -> PublishedScore:
        """From itself, or from its fields: {"value": 71.2}."""
        if isinstance(value, PublishedScore):
            return value
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or "value" not in value or not set(value) <= set(fields):
            raise SegzooError(f"a published score must be given by its fields {', '.join(fields)}, not as {value!r}")
        return cls(**value)


def scores(values: Mapping[str, float], **common: str) -> tuple[PublishedScore, ...]:
    """A figure for each reduction; the other fields are theirs in common."""
    return tuple(PublishedScore(value=value, reduction=reduction, **common) for reduction, value in values.items())


# ImageNet's data set and protocol, in the fields of a row.
IMAGENET: Mapping[str, Any] = {
    "dataset": "imagenet",
    "input_size": (224, 224),
    "resize": "exact",
    "test_size": (224, 224),
}


@dataclasses.dataclass(frozen=True)
class PretrainedCfg:
    """One row of weights, and the preprocessing and test protocol that belong to them.

    Raises:
        SegzooError: a value of another type, that `CHOICES` does not list or that is out of range, statistics that
            normalise nothing, an unknown label set, or two classes of one name; names the field.
    """

    # Where the weights are.
    state: str = "unpublished"  # one of CHOICES, as `resize` and `test_mode` are
    # bundled: file name in segzoo/weights; url: name in the cache where the URL has none; drive: path in the folder, in
    # place of what `drive_files` finds, or a file on this machine.
    file: str | None = None
    hf_hub_id: str | None = None  # hub: repository, "org/name"
    hf_hub_filename: str | None = None  # hub: file in the repository; None = model.safetensors, then older formats
    hf_revision: str | None = None  # hub: full commit id (40 hex digits), or a branch or tag; None follows "main"
    url: str | None = None  # url: official direct link
    drive_folder: str | None = None  # drive: id of a public Google Drive folder, or its URL
    drive_files: str | None = None  # drive: regular expression, in any case, of the path in the folder
    sha256: str | None = None  # of the file, where known
    size: int | None = None  # of the file in bytes, where known
    how_to_get: str = ""  # unpublished and drive: what has to be done by hand
    # What they were trained on.
    dataset: str = ""  # "ade20k", "cityscapes", ...
    label_set: str | None = None  # name for segzoo.labels.load_labels; None for ImageNet
    label_names: tuple[str, ...] | None = None  # names of the classes, where they are in no label set
    num_classes: int = 1000
    cfg_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the variant's config
    # Preprocessing: RGB in [0, 1], then (x - mean) / std.
    input_size: tuple[int, int] = (512, 512)  # training crop (H, W) in pixels
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "keep_ratio"  # "keep_ratio": into test_size, "exact": to test_size, "none"
    test_size: tuple[int, int] = (512, 2048)  # keep_ratio: (short side, long side) in pixels; exact: (H, W)
    test_min_side: int = 1  # keep_ratio: both sides have so many pixels, even beyond test_size, up to a ratio of 16:1
    size_divisor: int = 1  # both sides are rounded up to a multiple of it
    test_mode: str = "whole"
    crop: tuple[int, int] | None = None  # slide: window (H, W)
    stride: tuple[int, int] | None = None  # slide: step (H, W)
    # What they reached; of several figures at one reduction the first is the one to show alone.
    published: tuple[PublishedScore, ...] = ()  # their fields as a dict are taken, too
    recommended_reduction: str | None = None  # never applied silently
    # Terms.
    license: str = "unknown"  # SPDX identifier in lower case, else the licence's own name, or "unknown"
    license_url: str | None = None
    commercial_use: bool | None = None  # None = unknown
    origin: str = ""  # paper or repository
    advice: str = ""  # what they are not for, and what is; said before they are used

    def __post_init__(self) -> None:
        object.__setattr__(self, "published", tuple(map(PublishedScore.of, self.published)))
        for field, hint in type_hints(PretrainedCfg).items():
            value = getattr(self, field)
            self._require(fits(value, hint), field, f"must be {describe(hint)}")
        for field, choices in CHOICES.items():
            self._require(getattr(self, field) in choices, field, f"must be one of {', '.join(choices)}")
        for field, (least, most) in RANGES.items():
            value = getattr(self, field)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            within = all(least <= number <= most for number in numbers)
            self._require(within, field, f"must be from {least} to {most}")
        self._check_statistics()
        names = self.label_names
        if names is not None and len(set(names)) != len(names):
            raise SegzooError(f"label_names must be {len(names)} different names, one a class, not {shown(names)}")
        self._require(_is_pattern(self.drive_files), "drive_files", "must be a regular expression")
        known = list_labels()
        self._require(self.label_set in (None, *known), "label_set", f"must be one of {', '.join(known)}")

    def _check_statistics(self) -> None:
        """Refuses what no image can be normalised with."""
        for field in ("mean", "std"):
            value = getattr(self, field)
            finite = 1 <= len(value) <= MAX_CHANS and all(abs(number) < MAX_STATISTIC for number in value)
            self._require(finite, field, "must be a finite number a channel")
        self._require(len(self.std) == len(self.mean), "std", f"must have {len(self.mean)} numbers, as mean has")
        self._require(all(number > 0 for number in self.std), "std", "must be positive")

    def _require(self, holds: bool, field: str, what: str) -> None:
        if not holds:
            raise SegzooError(f"{field} of a weights row {what}, not {shown(getattr(self, field))}")

    def score(self, reduction: str = "base") -> PublishedScore | None:
        """The figure to show alone: what these weights reached at a reduction, over all classes."""
        return next(
            (
                score
                for score in self.published
                if score.reduction == reduction and not score.training and score.metric != "miou_small"
            ),
            None,
        )

    @property
    def miou(self) -> float | None:
        """The mIoU published for these weights without reduction, in percent."""
        score = self.score()
        return score.value if score and score.metric == "miou" else None

    @property
    def loadable(self) -> bool:
        return self.state != "unpublished"

    def __bool__(self) -> bool:
        """False for a row that records nothing, as the one of a model without weights."""
        return self != PretrainedCfg(num_classes=self.num_classes)

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that timm and a weights row have in common."""
        return tuple(self._timm_fields())

    def __getitem__(self, field: str) -> Any:
        """A field of timm's PretrainedCfg: `input_size` is (channels, height, width)."""
        return self._timm_fields()[field]

    def get(self, field: str, default: Any = None) -> Any:
        return self._timm_fields().get(field, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._timm_fields())

    def _timm_fields(self) -> dict[str, Any]:
        # The usual protocol of ImageNet; where there is one class a pixel, nothing may be cut off.
        imagenet = self.dataset == "imagenet"
        return {
            "input_size": (len(self.mean), *self.input_size),
            "fixed_input_size": False,
            "interpolation": "bicubic" if imagenet else "bilinear",
            "crop_pct": 0.875 if imagenet else 1.0,
            "mean": self.mean,
            "std": self.std,
            "num_classes": self.num_classes,
            "license": self.license,
            "origin_url": self.origin,
        }

    @property
    def from_text(self) -> str:
        """Where the file is, in short: "org/name@1234567" (or @main, which may move), a host, or nothing."""
        if self.state == "hub":
            return f"{self.hf_hub_id}@{(self.hf_revision or 'main')[:7]}"
        if self.state == "drive":
            return "drive.google.com"
        return self.url.split("/")[2] if self.state == "url" and self.url else ""


def _is_pattern(text: str | None) -> bool:
    try:
        re.compile(text or "")
    except re.error:
        return False
    return True


# The test protocols of mmseg's configurations for two data sets, which more than one family follows.
MMSEG_ADE20K = PretrainedCfg(
    dataset="ade20k",
    label_set="ade20k",
    num_classes=150,
    test_size=(512, 2048),
    size_divisor=32,
)
MMSEG_CITYSCAPES = PretrainedCfg(
    dataset="cityscapes",
    label_set="cityscapes",
    num_classes=19,
    input_size=(1024, 1024),
    test_size=(1024, 2048),
    size_divisor=32,
    test_mode="slide",
    crop=(1024, 1024),
    stride=(768, 768),
)


def label_set(row: PretrainedCfg | None, num_classes: int) -> LabelSet | None:
    """Names and colours of the classes of a row's weights; None if it names no such number of classes."""
    labels = load_labels(row.label_set) if row and row.label_set else None
    if labels is not None and len(labels) == num_classes:
        return labels
    if row and row.label_names and len(row.label_names) == num_classes:
        return dataclasses.replace(
            generic_labels(num_classes),
            title=f"{num_classes} classes",
            classes=tuple(row.label_names),
            source="the weights row",
            notes="The names are those of the weights; the colours carry no meaning.",
        )
    return None


def label_names(row: PretrainedCfg | None, num_classes: int) -> dict[str, Any] | None:
    """{"palette": name of the label set or None, "names": [...]}; None if the row names no such number of classes."""
    labels = label_set(row, num_classes)
    if row is None or labels is None:
        return None
    return {"palette": labels.name if labels.name == row.label_set else None, "names": list(labels.classes)}
