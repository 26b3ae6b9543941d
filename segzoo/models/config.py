"""What every family's config does on its own: each field is checked against its type hint when a config is made.

A config says what a model is, as plain data; an encoder's also builds it. A segmenter's holds its encoder's config and
copies none of its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._errors import SegzooError, shown
from .fields import describe, fits, type_hints

if TYPE_CHECKING:
    from .base import Encoder

# Of every config, what no model that was meant has: a larger whole number, and more blocks or layers in a row.
MAX_NUMBER = 2**16
MAX_DEPTH = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the frozen configs. A subclass says what else must hold in `check`.

    Raises:
        SegzooError: a field of a wrong type or a value that `check` refuses; names the config and the field.
    """

    def __post_init__(self) -> None:
        for name, hint in type_hints(type(self)).items():
            if not fits(value := getattr(self, name), hint):
                raise SegzooError(f"{type(self).__name__}: {name} must be {describe(hint)}, not {shown(value)}")
            self._require_bearable(name, value)
        self.check()

    def _require_bearable(self, name: str, value: Any) -> None:
        """Sizes at which building the model would not end or not fit into memory."""
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, (int, float))]
        self.require(
            all(abs(number) <= MAX_NUMBER for number in numbers),  # NaN is not
            f"{name} must be finite and at most {MAX_NUMBER}, not {shown(value)}",
        )
        if "depth" in name or "layers" in name:
            self.require(sum(numbers) <= MAX_DEPTH, f"{name} must be at most {MAX_DEPTH} in all, not {shown(value)}")

    def check(self) -> None:
        """Raises SegzooError for values that contradict each other or are out of range."""

    def require(self, holds: bool, sentence: str) -> None:
        """Raises SegzooError with the sentence, which names the field, unless it `holds`."""
        if not holds:
            raise SegzooError(f"{type(self).__name__}: {sentence}")

    def require_positive(self, *fields: str) -> None:
        """Numbers, or tuples of them, that are above zero; None passes."""
        for name in fields:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            self.require(all(number > 0 for number in numbers), f"{name} must be positive, not {value!r}")

    def require_rate(self, *fields: str) -> None:
        """Probabilities with which something is dropped."""
        for name in fields:
            value = getattr(self, name)
            self.require(0 <= value < 1, f"{name} must be from 0 to less than 1, not {value!r}")

    def require_choice(self, field: str, valid: Sequence[str]) -> None:
        value = getattr(self, field)
        self.require(value in valid, f"{field} must be {' or '.join(map(repr, valid))}, not {value!r}")

    def require_lengths(self, count: int, what: str, *fields: str) -> None:
        """Tuples with one entry for each of `count` things."""
        for name in fields:
            value = getattr(self, name)
            self.require(len(value) == count, f"{name} must have {count} entries, one {what}, not {value!r}")

    def require_heads(self, field: str, heads: Sequence[int], what: str, dims: Sequence[int]) -> None:
        """Numbers of heads, those of `field`, that divide the channels; `what` tells these with their values."""
        fits = all(head > 0 and dim % head == 0 for head, dim in zip(heads, dims, strict=True))
        self.require(fits, f"{field}={getattr(self, field)!r} must divide {what}")

    def require_rising(self, field: str, count: int, what: str) -> None:
        """At least one number, rising, each from 0 to count - 1."""
        value = getattr(self, field)
        rising = len(value) > 0 and list(value) == sorted(set(value)) and 0 <= value[0] <= value[-1] < count
        self.require(rising, f"{field}={value!r} must be rising {what} numbers from 0 to {count - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """Base of the encoders' configs: what any segmenter may ask of the config of its encoder."""

    in_chans: int = 3  # channels of the image
    num_classes: int = 1000  # 0: pooled features
    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0

    def build(self) -> Encoder:
        """The encoder that this config describes, freshly initialised."""
        raise NotImplementedError

    @property
    def map_chans(self) -> tuple[int, ...]:
        """Channels of the encoder's maps, fine to coarse."""
        raise NotImplementedError

    def check(self) -> None:
        self.require_positive("in_chans")
        self.require(self.num_classes >= 0, f"num_classes must be at least 0, not {self.num_classes}")
        self.require_rate("drop_path_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmenterConfig(Config):
    """Base of the segmenters' configs. An option that only the encoder has stands in `encoder` alone."""

    encoder: EncoderConfig  # any encoder's; its own classes do not count
    num_classes: int = 150

    @property
    def in_chans(self) -> int:
        return self.encoder.in_chans

    def build_encoder(self) -> Encoder:
        """The encoder as a segmenter takes it: without a head."""
        return dataclasses.replace(self.encoder, num_classes=0).build()

    def check(self) -> None:
        self.require_positive("num_classes")
