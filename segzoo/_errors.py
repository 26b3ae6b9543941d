"""The one family of errors that segzoo raises for what a user can mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SegzooError(ValueError):
    """An input, option or file that segzoo refuses; the message names it and the way out."""


class WeightsError(SegzooError):
    """Weights that cannot be found, read, trusted or fitted into the model."""


class SaveError(SegzooError):
    """A result that cannot be written, or would take the place of a file that must stay."""


class ImageError(SegzooError):
    """An image that cannot be read or has a wrong shape, type or size."""

    results: Sequence[Any] = ()  # of a list of images: what came of the others, None where one failed
