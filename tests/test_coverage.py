"""docs/coverage.md: that it is made of its data, that these hold together, and that every command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from segzoo.cli import VERBS, main
from segzoo.zoo.index import is_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import draw_coverage  # noqa: E402

PAPERS = draw_coverage.read()
ITEMS = [item for paper in PAPERS for item in paper.items]
COSTS = {row.command: row for item in ITEMS for row in item.costs}  # one that stands in two tables runs once


def commands_of(item: draw_coverage.Item) -> list[list[str]]:
    return list(item.commands())


def test_the_page_is_fresh():
    assert draw_coverage.PAGE.read_text() == draw_coverage.page(PAPERS), "run: python docs/draw_coverage.py"


def test_there_are_the_papers():
    assert [paper.name for paper in PAPERS][:5] == ["EDAFormer", "SegFormer", "Segformer++", "RTFormer", "SegViT"]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.item)
def test_an_item_says_what_it_is(item):
    assert item.state in draw_coverage.STATES
    assert all((ROOT / file).is_file() for file in item.files)
    if item.state == "not read":
        assert not commands_of(item)
    elif item.state == "not done":
        assert item.note
    else:
        assert item.shows
        assert commands_of(item)
    if item.state == "measured on scenes":
        assert item.files or item.note
    for verb, *arguments in commands_of(item):
        assert verb in VERBS
        if verb in ("info", "eval"):
            assert is_model(arguments[0])


def test_costs_are_near_or_say_why():
    for item in ITEMS:
        if item.state == "reproduced in cost":
            assert any(row.paper for row in item.costs), item.item
    for row in COSTS.values():
        assert abs(row.off) <= draw_coverage.NEAR or row.why, row.command


@pytest.mark.slow
@pytest.mark.parametrize("command", COSTS)
def test_a_cost_is_what_the_command_says(command, capsys):
    row = COSTS[command]
    assert draw_coverage.count(row) == pytest.approx(row.gmacs, abs=6e-4)


RUNS = {
    f"{paper.name}, {item.item}": commands_of(item)[: len(item.runs)]
    for paper in PAPERS
    for item in paper.items
    if item.runs
}


@pytest.mark.slow
@pytest.mark.parametrize("item", RUNS)
def test_the_commands_run(item, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segzoo.cli.demo.ROUNDS", 2)
    for command in RUNS[item]:
        assert main([*command, "--json"]) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)
