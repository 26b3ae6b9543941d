"""How the verbs speak: progress, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], *, as_json: bool) -> Iterable[T]:
    """A progress bar on a terminal, nothing where the output is read by a program."""
    from tqdm import tqdm  # comes with huggingface-hub

    hidden = len(items) < 2 or as_json or not sys.stderr.isatty()
    return tqdm(items, disable=hidden, leave=False, file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same keys, at least one, under aligned headings."""
    table = [list(rows[0]), *[[_text(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@dataclasses.dataclass
class Group:
    """A table with its heading; a row of one cell is a sentence that takes the whole line."""

    head: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)

    def widths(self) -> list[int]:
        table = [self.head, *(row for row in self.rows if len(row) > 1)]
        return [max(len(row[i]) for row in table) for i in range(len(self.head))]


def print_groups(groups: Sequence[Group], *, width: int) -> None:
    """Tables of the same columns, an empty line between; all leave out the last columns that some have no room for."""
    count = len(groups[0].head)
    while count > 1 and any(sum(group.widths()[:count]) + 2 * (count - 1) > width for group in groups):
        count -= 1
    for i, group in enumerate(groups):
        if i:
            print()
        for row in (group.head, *group.rows):
            cells = zip(row[:count], group.widths(), strict=False)
            print("  ".join(cell.ljust(size) for cell, size in cells).rstrip() if len(row) > 1 else row[0])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
