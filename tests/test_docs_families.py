"""The pages and figures of docs/families: made of the registry and the measurements as they are now."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest

import segzoo
from segzoo.cli import main
from segzoo.models.family import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import draw_families  # noqa: E402

PAGES = draw_families.pages()
PICTURES = draw_families.pictures()
AGAIN = "run: python docs/draw_families.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_fresh(path):
    assert path.read_text(encoding="utf-8") == PAGES[path], AGAIN


def test_figures_are_fresh_and_small():
    for path, panels in PICTURES.items():
        text = path.read_text(encoding="utf-8")
        shown = {title: {name: [list(p) for p in points] for name, points in s.items()} for title, s in panels.items()}
        assert draw_families.drawn(text) == shown, f"{path.name}: {AGAIN}"
        assert len(text) < 200_000
    assert set(draw_families.FOLDER.glob("*.svg")) == set(PICTURES), AGAIN


def test_every_family_has_a_page_in_the_site():
    named = re.findall(r": families/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted([*segzoo.list_modules(), "index"])
    assert {path.stem for path in PAGES} == set(named)


def test_every_variant_is_on_its_page():
    for name in segzoo.list_models():
        family = next(family for family in FAMILIES.values() if name in family.variants)
        assert f"`{name}`" in PAGES[draw_families.FOLDER / f"{family.name}.md"]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_commands_of_a_page_run(family, capsys):
    (block,) = re.findall(r"```sh\n(.*?)```", PAGES[draw_families.FOLDER / f"{family}.md"], flags=re.DOTALL)
    for line in block.splitlines():
        program, *words = line.split()
        assert program == "segzoo" and main(words) == 0
        assert family.partition("_")[0] in capsys.readouterr().out


SMALLEST = [min(draw_families.own_variants(f).items(), key=lambda item: item[1].params)[0] for f in FAMILIES.values()]


def test_costs_are_of_every_variant():
    counted = {row.model for row in draw_families.costs()}
    assert counted == {name for family in FAMILIES.values() for name in draw_families.own_variants(family)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_costs_are_what_is_counted(name):
    written = [row for row in draw_families.costs() if row.model == name]
    assert written == list(draw_families.count(name)), "run: python docs/draw_families.py --count"


def table(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_files_of_any_kind_are_taken(tmp_path):
    """One of `arena.py`, one of a shrunk image, and one that is no table of accuracy."""
    fixed = {"model": "eft_t.here", "data": "scenes", "size": "8x16"}
    columns = ("kind", "side", "macs_share", "gmacs", "miou", "changed", "time_fused")
    plans = [
        ("preset", "base", "", 2.0, 0.9, 0, 1.0),
        ("preset", "fast", "", 1.5, 0.88, 0.012, 0.9),
        ("Pool", "kv", 0.9, 1.8, 0.87, 0.02, 0.95),
        ("Pool", "q", 0.9, 1.7, 0.89, 0.02, 0.95),
        ("Pool", "kv+q", 0.6, 1.3, "", "", ""),  # its floor: nothing was measured
    ]
    table(tmp_path, "arena_x.csv", [{**fixed, **dict(zip(columns, plan, strict=True))} for plan in plans])
    shrunk = {"model": "eft_t", "reduction": "none", "size": "8x16", "seen_size": "4x8", "gmacs": 0.5, "miou": 0.4}
    table(tmp_path, "scenes_x.csv", [shrunk])
    table(tmp_path, "latency_x.csv", [{"model": "eft_t", "seconds": 1}])
    arena, small = draw_families.tables(tmp_path)
    assert draw_families.measured_table(arena).splitlines()[2:] == [
        "| base | 2.000 | 0.9000 | 0.00% | 1.0 |",
        "| fast | 1.500 | 0.8800 | 1.20% | 0.9 |",
        "| Pool at q, at most 0.9 of the MACs | 1.700 | 0.8900 | 2.00% | 0.95 |",
    ]
    assert small.series == "eft_t, image shrunk to 4x8"
    assert draw_families.index_series([arena, small]) == {"eft_t.here": [(1.0, 0.0), (0.75, -2.0)]}
    assert draw_families.family_panels(FAMILIES["eft"], [arena, small]) == {
        "street scenes": {
            "eft_t.here, base": [(2.0, 0.9)],
            "eft_t.here, fast": [(1.5, 0.88)],
            "eft_t.here, Pool": [(1.8, 0.87), (1.7, 0.89)],
            "eft_t, image shrunk to 4x8": [(0.5, 0.4)],
        }
    }


@pytest.mark.parametrize(
    ("reduction", "text"),
    [
        ("fast", "fast"),
        ("2", "factor 2"),
        ('{"encoder": [4, 4, 2, 1], "decoder": 4}', "encoder 4/4/2/1, decoder 4"),
        ('{"encoder": {"type": "Bipartite", "ratio": 0.5, "stride": 2}}', "encoder Bipartite 0.5 2"),
    ],
)
def test_a_plan_in_few_words(reduction, text):
    assert draw_families.short(reduction) == text
