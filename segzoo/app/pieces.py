"""What the page shows of an answer: pictures, and HTML in which every name is escaped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from ..labels import LabelSet, load_labels
from ..models.rows import PretrainedCfg
from ..results import SHOWN_PIXELS, Segmentation
from ..visualize import CHANGES, changed_pixels
from .bench import Answer, Reduction

CHANGED = 0  # what `visualize.changed_pixels` takes a changed pixel for, where what was before counts as true


def overlay(result: Segmentation) -> Image.Image:
    """The classes' colours over the picture, at most SHOWN_PIXELS on the long side."""
    H, W = result.mask.shape
    scale = min(1.0, SHOWN_PIXELS / max(H, W))
    size = (max(1, round(W * scale)), max(1, round(H * scale)))
    if scale < 1:
        mask_HW = Image.fromarray(result.mask).resize(size, Image.Resampling.NEAREST)
        image_HWC = Image.fromarray(result.image).resize(size, Image.Resampling.BILINEAR)
        result = dataclasses.replace(result, mask=np.asarray(mask_HW), image=np.asarray(image_HWC))
    return result.overlay()


def changes(answer: Answer) -> Image.Image:
    """The picture in pale grey, on it in one colour the pixels whose class the reduction changed."""
    before_HW = answer.trained.result.mask
    picture = changed_pixels(answer.trained.result.image, before_HW, answer.reduced.result.mask, before_HW)
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    return picture


def problem(text: str) -> str:
    """A refusal, as a sentence."""
    return f'<p class="sz-problem" role="alert">{with_code(sentence(text))}</p>'


def sentence(text: str) -> str:
    """With a full stop, and a capital unless it begins with a name."""
    text = text.strip()
    begin = text[:1].upper() + text[1:] if text.partition(" ")[0].isalpha() else text
    return begin if begin.endswith((".", "!", "?")) else f"{begin}."


def called(reduction: Reduction) -> str:
    """What a reduction is called on the page."""
    return reduction if isinstance(reduction, str) else "your factors" if reduction else "no reduction"


def summary(answer: Answer) -> str:
    """The answer in one sentence, and the cost of both forms as a table."""
    trained, reduced = answer.trained, answer.reduced
    name = escape(called(answer.choice.reduction))
    work = f"{100 * reduced.macs / trained.macs:.0f} %"
    time = f"{100 * reduced.seconds / trained.seconds:.0f} %"
    rows = [
        ("GMACs", gmacs(trained.macs), gmacs(reduced.macs), work),
        ("milliseconds", f"{1000 * trained.seconds:.1f}", f"{1000 * reduced.seconds:.1f}", time),
    ]
    return (
        f'<p class="sz-headline">With <b>{name}</b> the model does {work} of the work and changes '
        f"{percent(answer.changed)} of the pixels.</p>"
        + table(("", "as trained", name, "share"), rows)
        + note(what_was_measured(answer))
    )


def what_was_measured(answer: Answer) -> str:
    sizes = ", ".join(
        f"{H}x{W}" + (f" ({times} windows)" if times > 1 else "") for (H, W), times in answer.sizes.items()
    )
    folded = "" if answer.choice.engine == "torch" else "; the engine runs a folded form, which has fewer still"
    return (
        f"GMACs: exact, of the model, which sees the picture as {sizes} pixels{folded}. Milliseconds: measured here "
        "just now, both in turns, from the decoded picture to the mask; a busy machine shows in them."
    )


def legend(result: Segmentation) -> str:
    """Swatch and name of every class that occurs, the largest first."""
    chips = (
        f'<span class="sz-chip">{swatch(result.label_set, label.index)}{escape(label.name)}</span>'
        for label in result.labels
    )
    return f'<div class="sz-legend">{"".join(chips)}</div>'


def changes_legend(answer: Answer) -> str:
    total = answer.reduced.result.mask.size
    return (
        f'<div class="sz-legend"><span class="sz-chip">{swatch(CHANGES, CHANGED)}'
        f"another class than without reduction: {answer.changed_pixels:,} of {total:,} pixels "
        f"({percent(answer.changed)})</span></div>"
    )


def areas(answer: Answer) -> str:
    """How much of the picture each class covers, with the reduction and without."""
    trained, reduced = answer.trained.result, answer.reduced.result
    before, after = trained.areas(), reduced.areas()
    index_of = {label.name: label.index for label in (*trained.labels, *reduced.labels)}
    rows = []
    for name in (*after, *(name for name in before if name not in after)):
        shares = [found[name].share if name in found else 0.0 for found in (before, after)]
        points = round(100 * (shares[1] - shares[0]), 2)
        head = swatch(reduced.label_set, index_of[name]) + escape(name)
        rows.append((head, percent(shares[0]), percent(shares[1]), f"{points:+.2f}" if points else "0"))
    return table(("class", "as trained", escape(called(answer.choice.reduction)), "points"), rows)


def about(name: str, row: PretrainedCfg) -> str:
    """Which weights, trained on what, under which terms, and what they are not for."""
    data = load_labels(row.label_set).title if row.label_set else row.dataset
    terms = ", not for commercial use" if row.commercial_use is False else ""
    parts = [f"{name}: trained on {data}" if data else f"{name} does not say what it was trained on"]
    parts += [f"licence of the weights: {row.license}{terms}"]
    parts += [row.advice] if row.advice else []
    return note(sentence("; ".join(parts)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; the first of a row is its head."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += [f"<th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) for first, *rest in rows]
    return f'<table class="sz-table">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def note(text: str) -> str:
    """Small print."""
    return f'<p class="sz-note">{with_code(text)}</p>'


def with_code(text: str) -> str:
    """Text as HTML; what stands between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def swatch(labels: LabelSet, index: int) -> str:
    colour = ",".join(map(str, labels.palette[index]))
    return f'<i class="sz-swatch" style="background:rgb({colour})"></i>'


def gmacs(macs: int) -> str:
    """Three digits behind the point, and of a tiny model the first three that count."""
    return f"{macs / 1e9:.3f}" if macs >= 1e8 else f"{macs / 1e9:.3g}"


def percent(share: float) -> str:
    """Two digits behind the point, and never 0.00 % of what is there."""
    return "<0.01 %" if 0 < share < 0.00005 else f"{100 * share:.2f} %"
