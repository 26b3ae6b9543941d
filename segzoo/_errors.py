"""The one family of errors that segzoo raises for what a user can mend."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any


class SegzooError(ValueError):
    """An input, option or file that segzoo refuses; the message names it and the way out."""


class WeightsError(SegzooError):
    """Weights that cannot be found, read, trusted or fitted into the model."""


class SaveError(SegzooError):
    """A result that cannot be written, or would take the place of a file that must stay."""


class UnreadableError(WeightsError):
    """A file that is damaged or no weights file, whatever model it was meant for."""


class ImageError(SegzooError):
    """An image that cannot be read or has a wrong shape, type or size."""

    results: Sequence[Any] = ()  # of a list of images: what came of the others, None where one failed


def shown(value: object) -> str:
    """A value from a file as a message shows it, however large or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    try:
        return short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a very large {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """What an exception says, as a part of one sentence."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 300 else f"{text[:300]}..."
