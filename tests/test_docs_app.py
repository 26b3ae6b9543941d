"""docs/app.md runs as it stands, its command lines are known, and what it says of limits is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from segzoo.app import bench
from segzoo.cli import build_parser

DOCUMENT = (Path(__file__).parents[1] / "docs" / "app.md").read_text()


@pytest.mark.slow
def test_python_block_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    exec(compile(block, "docs/app.md", "exec"), {})
    share, code = capsys.readouterr().out.split("\n", 1)
    assert share.endswith("82% of the work")  # README's table: 1.872 of 2.282 GMACs
    assert "model.set_inference_reduction('fast')" in code


def test_command_lines_are_known():
    commands = [line.split("#")[0].split() for line in re.findall(r"^segzoo .*", DOCUMENT, re.M)]
    assert len(commands) == 3
    for _, *arguments in commands:
        build_parser().parse_args(arguments)
    args = build_parser().parse_args(["app"])
    assert f"http://{args.host}:{args.port}," in DOCUMENT


def test_limits_are_those_of_the_page():
    assert f"more than {bench.MAX_BYTES // 2**20} MiB or {bench.MAX_PIXELS:,} pixels" in DOCUMENT
