"""The `segzoo` command.

Each verb is a file with a `SUMMARY`, `add_arguments(parser)` and `run(args)`, which returns the exit code. It imports
torch only in `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .._errors import SegzooError
from .._version import __version__
from . import (
    app,
    archive,
    certify,
    convert,
    data,
    demo,
    eval,
    explain,
    export,
    info,
    list,
    predict,
    publish,
    train,
    tune,
)
from .output import say_error

VERBS = {
    "list": list,
    "info": info,
    "predict": predict,
    "demo": demo,
    "archive": archive,
    "eval": eval,
    "data": data,
    "train": train,
    "tune": tune,
    "explain": explain,
    "export": export,
    "certify": certify,
    "convert": convert,
    "publish": publish,
    "app": app,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for what the user can mend."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except SegzooError as error:
        say_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `segzoo list | head`
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="segzoo", description="A model zoo of efficient transformers for semantic segmentation."
    )
    parser.add_argument("--version", action="version", version=f"segzoo {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        text = verb.SUMMARY
        verb_parser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        verb_parser.add_argument("--json", action="store_true", help="print the results as JSON")
        verb.add_arguments(verb_parser)
        verb_parser.set_defaults(run=verb.run)
    return parser
