"""`segzoo publish`: a folder of `segzoo convert` goes to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .output import print_json

SUMMARY = "upload a folder of `segzoo convert` to the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of a saved model")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="only to a private repository")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch; made if it does not exist (default: the main one)"
    )


def run(args: argparse.Namespace) -> int:
    from ..sharing import publish
    from ..zoo.config import read_config

    row = read_config(args.directory).pretrained_cfg
    if row is None or row.license == "unknown":
        print(
            "segzoo: note: no licence is stated for these weights; publish them only if you may pass them on",
            file=sys.stderr,
        )
    done = publish(args.directory, args.repository, private=args.private or None, revision=args.revision)
    if args.json:
        print_json({"repository": done.repo_id, "commit": done.commit, "url": done.url})
    else:
        print(f'{done.url}\nsegzoo.create_model("hf-hub:{done.repo_id}@{done.commit}")')
    return 0
