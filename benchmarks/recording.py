"""What every benchmark records beside its figures, and where: one CSV file a measurement, in `results/`."""

from __future__ import annotations

import csv
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).parent / "results"


def conditions(*packages: ModuleType) -> dict[str, str]:
    """Versions of the packages, the processor's kind, and the command that this process was started with."""
    versions = {package.__name__: package.__version__ for package in packages}
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {**versions, "machine": platform.machine(), "command": command}


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of the same columns as CSV, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    print(f"written to {path}")
