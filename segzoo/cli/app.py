"""`segzoo app`: a page on this machine to try models and reductions in."""

from __future__ import annotations

import argparse
import sys

from ..zoo.index import check_name
from .output import say, say_json

SUMMARY = "serve a page to try models and reductions in a browser"

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to offer first, fetched if need be (always offered: what comes with the package or is in a cache)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, which is this machine alone)"
    )
    parser.add_argument("--port", type=port, default=7860, help="port to listen at (default: %(default)s)")


def port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 1 to 65535")
    return value


def run(args: argparse.Namespace) -> int:
    for name in args.model:
        check_name(name)  # before torch is loaded
    from ..app.bench import Bench
    from ..app.page import check_installed, serve
    from ..app.shelf import fetch, names_here, offer

    check_installed()  # before anything is fetched
    for name in args.model:
        fetch(name)
    bench = Bench(offer(args.model, names_here()))

    def tell(address: str) -> None:
        if args.json:
            say_json({"address": address, "models": bench.names})
            return
        say(f"{address} is the page, with {len(bench.names)} of the models; Ctrl-C ends it")
        if args.host not in LOOPBACK:
            say("Whoever reaches this address may use it: there is no password.", sys.stderr)

    serve(bench, host=args.host, port=args.port, on_ready=tell)
    return 0
