"""What segzoo covers of its papers, as a page: `python docs/draw_coverage.py` makes coverage.md of coverage.toml.

With `--check`, every cost is counted anew, and those that coverage.toml has otherwise are printed.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent
DATA = FOLDER / "coverage.toml"
PAGE = FOLDER / "coverage.md"
NEAR = 0.03  # a cost within this share of the paper's is reproduced

STATES = {
    "reproduced in cost": "the cost is the paper's within 3 %, or the table says why not",
    "measured on scenes": "the paper's comparison was made here on rendered scenes, or what the row names",
    "configurable": "a name and options build it and tests check it; nobody has trained it",
    "built": "what a picture shows is code here, tested against the official one",
    "not done": "the row says why",
    "not read": "what it shows could not be read when this page was written",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostRow:
    """A command `segzoo info` and what it says."""

    run: str  # without "segzoo info"
    gmacs: float  # multiply-accumulates in units of 1e9 by segzoo's count
    paper: float | None = None
    why: str = ""  # of a paper's figure that is not near

    @property
    def command(self) -> str:
        return f"segzoo info {self.run}"

    @property
    def off(self) -> float:
        """How far it is from the paper's figure, as a share of that."""
        return 0.0 if self.paper is None else self.gmacs / self.paper - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A table or figure of a paper, or several."""

    item: str
    state: str  # one of STATES
    shows: str = ""
    note: str = ""
    runs: tuple[str, ...] = ()  # commands of segzoo
    small: str = ""  # what is added to the commands where only their running counts
    files: tuple[str, ...] = ()  # measurements, from the root of the repository
    costs: tuple[CostRow, ...] = ()

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Item:
        costs = tuple(CostRow(**row) for row in fields.pop("costs", ()))
        return cls(runs=tuple(fields.pop("runs", ())), files=tuple(fields.pop("files", ())), costs=costs, **fields)

    def commands(self) -> Iterator[list[str]]:
        """Every command as the shell would split it, without "segzoo"."""
        for run in self.runs:
            yield shlex.split(f"{run} {self.small}")[1:]
        for row in self.costs:
            yield shlex.split(row.command)[1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    name: str
    arxiv: str
    read: str  # what of it was read
    items: tuple[Item, ...]


def read() -> list[Paper]:
    papers = tomllib.loads(DATA.read_text(encoding="utf-8"))["paper"]
    return [Paper(items=tuple(map(Item.of, paper.pop("item"))), **paper) for paper in papers]


def page(papers: Sequence[Paper]) -> str:
    states = Counter(item.state for paper in papers for item in paper.items)
    lines = [
        "# What segzoo covers of its papers",
        "",
        "Every table and figure, as far as known, what in segzoo gives it, and how far that goes. Made of",
        "[coverage.toml](coverage.toml) by `python docs/draw_coverage.py`; the slow tests run every command.",
        "",
        "| state | meaning | rows |",
        "|---|---|---|",
        *(f"| {state} | {meaning} | {states[state]} |" for state, meaning in STATES.items()),
    ]
    for paper in papers:
        lines += ["", f"## {paper.name} ([{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))", "", paper.read, ""]
        lines += ["| what | shows | state | commands and remarks |", "|---|---|---|---|"]
        lines += [item_line(item) for item in paper.items]
        rows = [(item, row) for item in paper.items for row in item.costs]
        if rows:
            lines += ["", "| of | command | GMACs | paper | difference |", "|---|---|---|---|---|"]
            lines += [cost_line(item, row) for item, row in rows]
    return "\n".join(lines) + "\n"


def item_line(item: Item) -> str:
    parts = [f"`{run.strip()}`" for run in item.runs]
    parts += [item.note] if item.note else []
    parts += [f"[{Path(file).name}](../{file})" for file in item.files]
    parts += ["costs below"] if item.costs else []
    return f"| {item.item} | {item.shows} | {item.state} | {'<br>'.join(parts)} |"


def cost_line(item: Item, row: CostRow) -> str:
    paper = "" if row.paper is None else f"{row.paper:g}"
    difference = "" if row.paper is None else f"{row.off:+.1%}" + (f": {row.why}" if row.why else "")
    return f"| {item.item} | `{row.command}` | {row.gmacs:.3f} | {paper} | {difference} |"


def count(row: CostRow) -> float:
    """The GMACs that the command says now."""
    import contextlib
    import io
    import json

    from segzoo.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as text:
        if main([*shlex.split(row.command)[1:], "--json"]) != 0:
            raise RuntimeError(f"{row.command} failed")
    return json.loads(text.getvalue())["macs"] / 1e9


def check(papers: Sequence[Paper]) -> None:
    for row in (row for paper in papers for item in paper.items for row in item.costs):
        if abs((now := count(row)) - row.gmacs) > 6e-4:
            print(f"{row.command}: {now:.3f}, not {row.gmacs:.3f}")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        check(read())
    else:
        PAGE.write_text(page(read()), encoding="utf-8")
