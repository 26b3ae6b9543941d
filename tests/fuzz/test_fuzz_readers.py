"""Every reader against hostile files: nothing but SegzooError comes out, in little time and memory.

The slow tier tries 50 cases a reader, always the same; `make fuzz N=5000` as many as you like, other ones each time. A
case that breaks the promise is kept, and its file named.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_cases import CASES
from fuzz_child import READERS, SECONDS
from hypothesis import HealthCheck, Phase, given, settings

N = int(os.environ.get("SEGZOO_FUZZ_CASES") or "0")


class Child:
    """The process that reads; a new one after each that a case has ended."""

    def __init__(self, reader: str):
        self.reader = reader
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fuzz_child.py")), self.reader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        assert process.stdout is not None and json.loads(process.stdout.readline()) == "ready"
        return process

    def judge(self, path: Path) -> dict:
        process = self.process = self.process or self.start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(str(path)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self.process = None
            return {"outcome": "ended", "error": f"the process ended with {process.wait()}", "seconds": 0.0}
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_but_a_refusal_comes_out(reader, tmp_path):
    make, write = CASES[reader]
    child, outcomes = Child(reader), collections.Counter()
    broken: dict[str, Path] = {}  # what went wrong -> the first case of it
    folder = tmp_path / "case"
    folder.mkdir()

    @settings(
        max_examples=N or 50,
        derandomize=not N,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(make())
    def try_case(case: bytes) -> None:
        path = write(folder, case)
        answer = child.judge(path)
        outcome = "slow" if answer["seconds"] > SECONDS else answer["outcome"]
        outcomes[outcome] += 1
        if outcome in ("read", "refused"):
            return
        what = f"{outcome}: {answer['error'].partition(': ')[0]} ({answer['seconds']:.1f} s)"
        if what not in broken:
            kept = tmp_path / f"broken-{len(broken)}"
            shutil.copytree(folder, kept)
            broken[what] = kept
            print(f"{reader}: {outcome}: {answer['error']}\n  {kept}", flush=True)

    try:
        try_case()
    finally:
        child.close()
    print(f"{reader}: {sum(outcomes.values())} cases: {dict(outcomes)}")
    assert not broken, "\n".join(f"{what}\n  {path}" for what, path in broken.items())


def test_every_reader_has_cases():
    assert list(READERS) == list(CASES)
