"""`segzoo convert`: an official checkpoint becomes a folder that can be published."""

from __future__ import annotations

import argparse
from pathlib import Path

from .output import print_json

SUMMARY = "turn an official checkpoint into a folder with its config and model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="OFFICIAL_FILE", help="checkpoint as its authors published it")
    parser.add_argument(
        "name", metavar="NAME.TAG", help="weights that the file is; `segzoo list --pretrained` shows all"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the result")


def run(args: argparse.Namespace) -> int:
    from ..sharing import convert

    report = convert(args.file, args.name, args.output)
    print_json(report.to_dict()) if args.json else print(report)
    return 0
