"""Deliberate faults, one at a time: does a test find each? `make mutants`, or `python tests/mutants.py [WORD ...]`.

`mutants.toml` lists the faults: a file of the package, a line of it, what that becomes, and the tests that must find
it. Each is applied to a copy of the package in a temporary folder, never in place. Whatever takes long to import
(torch, timm, ...) is imported once, and each fault gets a fork of that process, which imports the changed package and
runs its tests until one fails. Before all that the same tests must pass without a fault. Exit status 1 if a fault is
missed. With words, only faults whose file or text contains one of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings where Python has none

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LIST = TESTS / "mutants.toml"
SECONDS = 180  # of one fault's tests; a fault that hangs is found, too
# Slow to import, and free of segzoo.
SHARED = ("torch", "timm", "numpy", "PIL.Image", "safetensors.torch", "huggingface_hub", "pytest", "hypothesis")
SHARED += ("torchmetrics.functional.classification", "segmentation_models_pytorch", "transformers.models.segformer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A fault: `old`, which stands once in `file`, becomes `new`; one of `tests` must fail."""

    file: str  # below segzoo/
    old: str
    new: str
    tests: tuple[str, ...]  # below tests/, as pytest takes them

    def __post_init__(self) -> None:
        if self.old == self.new or not self.tests:
            raise ValueError(f"{self.file}: {self.old!r} changes nothing, or names no test")

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip() or 'nothing'}"

    def apply(self, package: Path) -> None:
        """Change the file in a copy of the package.

        Raises:
            ValueError: the old text is not there exactly once.
        """
        path = package / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} times, not once: {self.old!r}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def read_list(path: Path = LIST) -> list[Mutant]:
    """The faults of the list, in its order."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Mutant(file=file, old=fault["old"], new=fault["new"], tests=tuple(fault["tests"]))
        for file, faults in table.items()
        for fault in faults
    ]


def run(tests: Sequence[str], mutant: Mutant | None = None) -> int:
    """pytest's exit status for tests on a copy of the package, with a fault in it if one is given."""
    with tempfile.TemporaryDirectory(prefix="segzoo-mutant-") as folder:
        shutil.copytree(ROOT / "segzoo", Path(folder) / "segzoo", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            mutant.apply(Path(folder) / "segzoo")
        return _run_in_fork(Path(folder), tests, quiet=mutant is not None)


def is_found(mutant: Mutant) -> bool:
    """Whether one of a fault's tests fails.

    Raises:
        RuntimeError: there are no such tests.
    """
    status = run(mutant.tests, mutant)
    if status not in (0, 1, 2):  # pytest's: passed, failed, interrupted by what a module raised when imported
        raise RuntimeError(f"pytest ended with {status} on {', '.join(mutant.tests)}; are there such tests?")
    return status != 0


def _run_in_fork(folder: Path, tests: Sequence[str], *, quiet: bool) -> int:
    """pytest's exit status, with the package in `folder` in place of the repository's; 1 if a signal ended it."""
    output = folder / "output.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            _become(folder, output)
            import pytest

            options = ["-q", *(["-x"] if quiet else []), "-m", "", "-p", "pytest_timeout", f"--timeout={SECONDS}"]
            options += ["-p", "no:cacheprovider"]
            status = int(pytest.main([*options, *(str(TESTS / test) for test in tests)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, code = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(code)
    if status not in (0, 1) or (status and not quiet):
        print(output.read_text(errors="replace")[-3000:])
    return 1 if status < 0 else status


def _become(folder: Path, output: Path) -> None:
    """Turn this fork into a process that sees the package in `folder` only, and is silent."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    assert "segzoo" not in sys.modules
    sys.path[:] = [str(folder), str(TESTS), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(TESTS)])
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # hypothesis and others, which no test here needs as plugins
    sys.dont_write_bytecode = True
    # An editable install finds the repository by a finder of its own.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
    import segzoo

    assert Path(segzoo.__file__).parent == folder / "segzoo", segzoo.__file__


def main(words: Sequence[str]) -> int:
    mutants = [m for m in read_list() if not words or any(word in f"{m.file} {m.old}" for word in words)]
    for name in SHARED:
        importlib.import_module(name)
    start, missed = time.monotonic(), []
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    if run(tests) != 0:
        print("the tests of the list do not pass without a fault: mend that first")
        return 1
    print(f"{len(tests)} tests pass without a fault", flush=True)
    for number, mutant in enumerate(mutants, 1):
        found = is_found(mutant)
        missed += [] if found else [mutant]
        print(f"{number}/{len(mutants)} {'found' if found else 'MISSED'} {mutant}", flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(mutants) - len(missed)} of {len(mutants)} faults found in {minutes:.1f} minutes")
    for mutant in missed:
        print(f"missed: {mutant}\n  by {', '.join(mutant.tests)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
