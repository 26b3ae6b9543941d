"""What several verbs take."""

from __future__ import annotations

import argparse

DEFAULT_MODEL = "edaformer_t.scenes"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value
