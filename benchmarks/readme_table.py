"""README's table of models and presets, from the files that `arena.py` wrote: `python benchmarks/readme_table.py`.

Prints Markdown: a row for each model and preset with its multiply-accumulates, the time of a forward pass relative to
no reduction, and the mIoU on street scenes and on the landscapes of "context", where it was measured.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from recording import RESULTS

HEAD = ("model", "preset", "GMACs", "time", "mIoU, scenes", "mIoU, context")
NOT_MEASURED = "–"


def rows_in(files: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of presets in arena tables."""
    rows = []
    for path in files:
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["kind"] == "preset"]
    return rows


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Markdown. A model is its name without the tag of its weights, which differ between the two kinds of scenes."""
    found: dict[tuple[str, str], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["model"].partition(".")[0], row["side"]), {})[row["data"]] = row
    lines = [HEAD, ("---",) * len(HEAD)]
    for (model, preset), by_data in found.items():
        cost = by_data.get("scenes") or by_data["context"]
        accuracy = [by_data[data]["miou"] if data in by_data else NOT_MEASURED for data in ("scenes", "context")]
        lines.append((model, preset, f"{float(cost['gmacs']):.2f}", f"{float(cost['time_fused']):.2f}", *accuracy))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="tables of arena.py (default: those in benchmarks/results)")
    files = parser.parse_args().files or sorted(RESULTS.glob("arena_*.csv"))
    if not files:
        raise SystemExit(f"no arena_*.csv in {RESULTS}; benchmarks/arena.py makes them")
    print(table(rows_in(files)))


if __name__ == "__main__":
    main()
