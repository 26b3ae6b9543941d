"""What a call does with a list of images, of any kind of result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from .._errors import ImageError, SegzooError
from ..preprocess import ImageSource

Result = TypeVar("Result")


def in_batches(sources: Sequence[ImageSource], batch_size: int) -> Iterator[Sequence[ImageSource]]:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise SegzooError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
    for first in range(0, len(sources), batch_size):
        yield sources[first : first + batch_size]


def all_or_raise(outcomes: Sequence[Result | ImageError], kind: type[Result]) -> list[Result]:
    """What became of a list of images, if none failed; else one error that names all that did, with the others."""
    failures = [str(outcome) for outcome in outcomes if isinstance(outcome, ImageError)]
    if failures:
        error = ImageError("; ".join(failures))
        error.results = [None if isinstance(outcome, ImageError) else outcome for outcome in outcomes]
        raise error
    return [outcome for outcome in outcomes if isinstance(outcome, kind)]
