"""What is wrong with the masks of a data set, said before a training starts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .._errors import ImageError
from ..preprocess import load_image
from .layouts import Pair
from .segmentation import LOSSY, FileData, class_labels, out_of_range, read_mask

NAMED_FILES = 5  # of a finding, in a report


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault, and the files that have it."""

    kind: str  # "missing", "unreadable", "colours", "size", "range", "off by one", "ignored", "lossy" or "empty class"
    error: bool  # False: worth knowing, but training works
    text: str  # what it is and the way out
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(self.files[:NAMED_FILES])
        more = f" and {len(self.files) - NAMED_FILES} more" if len(self.files) > NAMED_FILES else ""
        return f"{'error' if self.error else 'note'}: {self.text}" + (f"\n    {names}{more}" if names else "")


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The findings of `check_data`, errors first, and how often every class occurs."""

    data: str  # layout and split
    images: int
    findings: tuple[Finding, ...]
    class_names: tuple[str, ...]
    pixels: tuple[int, ...]  # a class
    images_with: tuple[int, ...]  # a class
    ignored_pixels: int
    ignore_index: int
    reduce_zero_label: bool

    @property
    def ok(self) -> bool:
        return not any(finding.error for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def histogram(self, width: int = 40) -> str:
        """Share of the labelled pixels a class, one line each, with a bar."""
        total = max(1, sum(self.pixels))
        most = max(1, *self.pixels) if self.pixels else 1
        name_width = max(map(len, self.class_names), default=0)
        lines = [
            f"{i:4d}  {name:<{name_width}}  {100 * pixels / total:6.2f} %  {images:6d} images  "
            f"{'#' * round(width * pixels / most)}".rstrip()
            for i, (name, pixels, images) in enumerate(
                zip(self.class_names, self.pixels, self.images_with, strict=True)
            )
        ]
        everything = max(1, total + self.ignored_pixels)
        return "\n".join([*lines, f"ignored ({self.ignore_index}): {100 * self.ignored_pixels / everything:.2f} %"])

    def __str__(self) -> str:
        state = "no fault found" if self.ok else "faults found"
        head = f"{self.data}: {self.images} images, {len(self.class_names)} classes, {state}"
        return "\n".join([head, *map(str, self.findings), "", self.histogram()])


def check_data(data: FileData, *, progress: Callable[[Sequence[Pair]], Any] = iter) -> CheckReport:
    """Read every mask, and of every image its size, and say what is wrong.

    Args:
        data: of `open_data`.
        progress: wraps the sequence of pairs, as tqdm does.
    """
    tally = _Tally(data)
    for pair in progress(data.pairs):
        tally.add(pair)
    return tally.report()


class _Tally:
    def __init__(self, data: FileData):
        self.data = data
        self.files: dict[str, list[str]] = {}  # kind of fault -> files
        self.stored: Counter[int] = Counter()  # stored value -> pixels
        self.labels: Counter[int] = Counter()  # label -> pixels
        self.present: Counter[int] = Counter()  # label -> images
        self.most_colours = 0  # different ones in a mask of colours

    def add(self, pair: Pair) -> None:
        if pair.mask is None:
            self._fault("missing", pair.image)
            return
        try:
            size = load_image(pair.image).shape[:2]
        except ImageError:
            self._fault("unreadable", pair.image)
            return
        try:
            stored_HW = read_mask(pair.mask)
        except ImageError:
            self._unread(pair.mask)
            return
        if stored_HW.shape != size:
            self._fault("size", pair.mask)
        labels_HW = class_labels(stored_HW, pair.form, self.data.ignore_index)
        for counter, array in ((self.stored, stored_HW), (self.labels, labels_HW)):
            values, counts = np.unique(array, return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        here = np.unique(labels_HW).tolist()
        self.present.update(here)
        if here == [self.data.ignore_index]:
            self._fault("ignored", pair.mask)
        if out_of_range(labels_HW, self.data.num_classes, self.data.ignore_index):
            self._fault("range", pair.mask)

    def _fault(self, kind: str, path: Path) -> None:
        self.files.setdefault(kind, []).append(str(path))

    def _unread(self, path: Path) -> None:
        """A mask that is damaged, in a lossy format, or one of colours."""
        try:
            with Image.open(path) as image:
                lossy, array = image.format in LOSSY, np.asarray(image)
        except Exception:  # whatever a decoder stumbles over
            self._fault("unreadable", path)
            return
        self._fault("lossy" if lossy else "colours", path)
        if not lossy:
            self.most_colours = max(self.most_colours, len(np.unique(array.reshape(-1, array.shape[-1]), axis=0)))

    def report(self) -> CheckReport:
        names = self._class_names()
        findings = [*self._file_findings(), *self._value_findings(names)]
        ignored = self.data.ignore_index
        return CheckReport(
            data=f"{self.data.name}, split {self.data.split}",
            images=len(self.data),
            findings=tuple(sorted(findings, key=lambda finding: not finding.error)),
            class_names=names,
            pixels=tuple(self.labels[i] for i in range(len(names))),
            images_with=tuple(self.present[i] for i in range(len(names))),
            ignored_pixels=self.labels[ignored],
            ignore_index=ignored,
            reduce_zero_label=self.data.reduce_zero_label,
        )

    def _class_names(self) -> tuple[str, ...]:
        if self.data.labels is not None:
            return self.data.labels.classes
        highest = max((value for value in self.labels if value != self.data.ignore_index), default=-1)
        return tuple(f"class {i}" for i in range(highest + 1))

    def _file_findings(self) -> list[Finding]:
        K, ignored = self.data.num_classes, self.data.ignore_index
        texts = {
            "missing": (True, "images without a mask: add the masks, or move the images away"),
            "lossy": (True, "masks in a format that changes labels: make them anew as PNG"),
            "unreadable": (True, "files that cannot be read: save or download them again"),
            "colours": (
                True,
                f"masks of colours (up to {self.most_colours} in one), not of labels: write the index of its class "
                "into every pixel (mode L or P)",
            ),
            "size": (True, "masks of another size than their image: make them of the image's size, without smoothing"),
            "ignored": (False, f"masks that hold nothing but {ignored} (ignored): they teach nothing"),
        }
        findings = [
            Finding(kind, error, text, tuple(self.files[kind]))
            for kind, (error, text) in texts.items()
            if kind in self.files
        ]
        if "range" in self.files and not self._one_too_high():
            wrong = sorted(v for v in self.labels if v != ignored and not 0 <= v < (K or 0))
            findings.append(
                Finding(
                    "range",
                    True,
                    f"labels {_listed(wrong)} are no classes of 0 to {(K or 0) - 1} nor {ignored} (ignored): give the "
                    "right number of classes, or write 255 where a pixel has none",
                    tuple(self.files["range"]),
                )
            )
        return findings

    def _one_too_high(self) -> bool:
        """The highest stored value is one more than the last class, as where 0 means "no class"."""
        K = self.data.num_classes
        wrong = [v for v in self.labels if v != self.data.ignore_index and K is not None and v >= K]
        return wrong == [K] and not self.data.reduce_zero_label

    def _value_findings(self, names: Sequence[str]) -> list[Finding]:
        findings = []
        K = len(names)
        if self._one_too_high():
            findings.append(
                Finding(
                    "off by one",
                    True,
                    f"labels go to {K}, one more than the last class: the masks count from 1 and 0 is no class: set "
                    "reduce_zero_label (--reduce-zero-label, or in dataset.json)",
                    tuple(self.files["range"]),
                )
            )
        elif self.data.reduce_zero_label and self.stored[0] and not self.stored[K] and self.labels:
            findings.append(
                Finding(
                    "off by one",
                    False,
                    f"no mask stores {K}, which is {names[-1]!r} with reduce_zero_label, but some store 0: if the "
                    "masks count from 0, do not set reduce_zero_label, for it ignores class 0 and shifts all others",
                )
            )
        empty = [name for i, name in enumerate(names) if not self.labels[i]]
        if empty:
            findings.append(Finding("empty class", False, f"{len(empty)} of {K} classes never occur: {_listed(empty)}"))
        if self.data.labels is None and names:
            findings.append(
                Finding(
                    "classes",
                    False,
                    f"nothing says how many classes there are; the labels go to {K - 1}. Name them in dataset.json: "
                    '{"classes": ["road", "car"]}',
                )
            )
        return findings


def _listed(values: Sequence[object]) -> str:
    more = f" and {len(values) - 10} more" if len(values) > 10 else ""
    return ", ".join(map(str, values[:10])) + more
