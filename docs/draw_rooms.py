"""Draw the rooms of the package from its imports: `python docs/draw_rooms.py` writes docs/rooms.svg.

A room is a line with the first sentence of its docstring, floors from top to bottom as in `tests/rooms.py`. An arc on
the right leads down from a room to one that it imports; what follows from two arcs in a row is left out,
and so are the tiny leaves that every room may use.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from rooms import LEAVES, PACKAGE, ROOMS, arrows, room_of  # noqa: E402

PICTURE = ROOT / "docs" / "rooms.svg"
LINE, NAME, TEXT, RIGHT = 26, 120, 640, 1000  # pixels: height of a line, width of names, right end of texts, width


def room_arrows(root: Path) -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, targets in arrows(root).items():
        room = room_of(module)
        if room:
            others = {room_of(target) for target in targets} - {room, "", None, *LEAVES}
            found.setdefault(room, set()).update(others)
    return {room: targets for room, targets in found.items() if room not in LEAVES}


def without_shortcuts(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same graph without the arrows that follow from others."""

    def reached(room: str) -> set[str]:
        return graph.get(room, set()).union(*(reached(target) for target in graph.get(room, set())))

    return {
        room: {target for target in targets if not any(target in reached(other) for other in targets)}
        for room, targets in graph.items()
    }


def summary(room: str) -> str:
    """The first line of a room's docstring, up to its first full stop."""
    path = PACKAGE / f"{room}.py"
    path = path if path.exists() else PACKAGE / room / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    sentence = (text or "data files").splitlines()[0].split(". ")[0].rstrip(".")
    return sentence if len(sentence) <= 84 else f"{sentence[:82].rsplit(' ', 1)[0]} ..."


def picture(root: Path) -> str:
    graph = without_shortcuts(room_arrows(root))
    floors = [[room for room in floor if room in graph] for floor in ROOMS]
    rows = {room: index for index, room in enumerate(room for floor in floors for room in floor)}
    height = LINE * len(rows) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{RIGHT}" height="{height}" font-family="sans-serif">',
        f'<rect width="{RIGHT}" height="{height}" fill="white"/>',
    ]
    for index, floor in enumerate(floor for floor in floors if floor):
        fill = "#eef3f8" if index % 2 else "#dde7f1"
        top = 10 + LINE * rows[floor[0]]
        lines.append(f'<rect x="10" y="{top}" width="{TEXT}" height="{LINE * len(floor)}" fill="{fill}"/>')
    for room, row in rows.items():
        y = 10 + LINE * row + 17
        lines.append(f'<text x="18" y="{y}" font-size="13" font-weight="bold">{escape(room)}</text>')
        lines.append(f'<text x="{NAME}" y="{y}" font-size="11">{escape(summary(room))}</text>')
    for room, row in rows.items():
        for target in sorted(graph[room], key=rows.__getitem__):
            start, end = 10 + LINE * row + 16, 10 + LINE * rows[target] + 10
            bend = TEXT + 20 + (RIGHT - TEXT - 30) * (rows[target] - row) // len(rows) * 4 // 3
            lines.append(
                f'<path d="M{TEXT + 10} {start} C{bend} {start} {bend} {end} {TEXT + 10} {end}" fill="none" '
                f'stroke="#446688" stroke-width="1.2"><title>{room} imports {target}</title></path>'
            )
            lines.append(f'<path d="M{TEXT + 10} {end} l7 -3 v6 z" fill="#446688"/>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(PACKAGE), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(PICTURE.read_bytes()) / 1000:.0f} kB")
