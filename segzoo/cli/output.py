"""How the verbs speak: progress, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

WIDTH_WITHOUT_TERMINAL = 120


def progress(items: Iterable[T], *, as_json: bool, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """A progress bar on a terminal, nothing where the output is read by a program.

    Args:
        total: number of items, where they do not know it themselves.
        unit: what they are; the bar shows how many a second, and the time that is left.
    """
    from tqdm import tqdm  # comes with huggingface-hub

    total = len(items) if isinstance(items, Sized) else total
    hidden = total == 1 or not _has_bars(as_json)
    return tqdm(items, total=total, unit=unit, disable=hidden, leave=False, file=sys.stderr, dynamic_ncols=True)


def _has_bars(as_json: bool) -> bool:
    return not as_json and sys.stderr.isatty()


class Steps:
    """A bar for the steps of one item at a time, such as the windows of an image, below that of `progress`; it is there
    while the item is worked on. Call it with the steps done (0 first) and their number."""

    def __init__(self, *, as_json: bool, unit: str):
        self.hidden, self.unit = not _has_bars(as_json), unit
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.hidden or total == 1:
            return
        if done == 0:
            self.close()  # of an item that was given up
            self.bar = tqdm(total=total, unit=self.unit, leave=False, file=sys.stderr, dynamic_ncols=True)
            return
        self.bar.update(done - self.bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def terminal_width() -> int:
    return shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns


def in_lines(text: str, indent: str = "  ") -> str:
    """A paragraph broken between words to the width of the terminal, all lines but the first indented."""
    return textwrap.fill(
        text,
        terminal_width(),
        subsequent_indent=indent,
        replace_whitespace=False,
        expand_tabs=False,
        break_long_words=False,
        break_on_hyphens=False,
    )


def say(text: str, file: TextIO | None = None) -> None:
    """Print a sentence above a progress bar, if there is one; broken into lines on a terminal only."""
    stream = sys.stdout if file is None else file
    _write(in_lines(text) if stream.isatty() else text, stream)


def say_json(value: Any) -> None:
    """Print a value as one line, likewise."""
    _write(json.dumps(value), sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    """What the stream cannot take, such as a file name that is no text, is escaped."""
    from tqdm import tqdm

    encoding = stream.encoding or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()


def say_error(error: object) -> None:
    say(f"segzoo: error: {error}", sys.stderr)


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
