"""What several verbs take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from .._errors import SegzooError

DEFAULT_MODEL = "edaformer_t.scenes"
WORDS = {"none": None, "true": True, "false": False}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def named_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where the value is JSON, none, true or false in any case, or a text that needs no quotes."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    if value.lower() in WORDS:
        return name, WORDS[value.lower()]
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights a model gets; `loading.trained_model` reads it."""
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to load instead of the published ones")
    parser.add_argument("--force-download", action="store_true", help="fetch the weights anew")
    parser.add_argument("--num-classes", type=positive, metavar="K", help="classes of the checkpoint")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What a model is run by; `loading.score_maker_of` reads it."""
    add_compiled(parser)
    parser.add_argument("--engine-file", metavar="FILE", help="file of `segzoo export`, in place of a model")
    parser.add_argument("--trust-code", action="store_true", help="run a .pt2 file, which holds code")


def add_compiled(parser: argparse.ArgumentParser, threads: str = "all cores") -> None:
    """The engine that is made of a model; `loading.model_for_engine` checks it.

    Args:
        threads: how many there are by default, as the help says it.
    """
    parser.add_argument(
        "--engine", metavar="NAME", help="openvino, onnxruntime, inductor or eager (default: the model)"
    )
    parser.add_argument("--precision", choices=("f32", "bf16"), help="of the engine (default: f32)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help=f"of onnxruntime and openvino (default: {threads})"
    )


def refuse_given(options: Mapping[str, object], why: str) -> None:
    """Raises SegzooError at the first option whose value says that it was given."""
    for option, given in options.items():
        if given:
            raise SegzooError(f"{option} {why}; leave it out")


def refuse_beside(option: str, args: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Raises SegzooError where one of the options `names` is given, too."""
    given = {name: getattr(args, name.lstrip("-").replace("-", "_"), None) for name in names}
    refuse_given(given, f"does not go with {option}: what it sets is fixed there")
