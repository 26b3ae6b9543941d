"""docs/architecture.md names what exists, and its picture is that of the imports."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rooms import LEAVES, PACKAGE, ROOMS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import draw_rooms  # noqa: E402

DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()
WALKS = DOCUMENT.split("\n## ")[2:]


def test_the_picture_is_fresh():
    assert draw_rooms.PICTURE.read_text() == draw_rooms.picture(PACKAGE), "run: python docs/draw_rooms.py"


def test_the_picture_is_an_image_of_every_room():
    picture = draw_rooms.picture(PACKAGE)
    texts = {element.text for element in ElementTree.fromstring(picture).iter() if element.tag.endswith("text")}
    there = {room for floor in ROOMS for room in floor if room and room not in LEAVES}
    assert {
        room for room in there if any(PACKAGE.glob(f"{room}.py")) or (PACKAGE / room / "__init__.py").exists()
    } <= texts


def test_arrows_that_follow_from_others_are_left_out():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert draw_rooms.without_shortcuts(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}


def test_four_walks_of_ten_lines():
    assert len(WALKS) == 4
    for walk in WALKS:
        assert re.findall(r"^(\d+)\. ", walk, flags=re.MULTILINE) == [str(i) for i in range(1, 11)]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.py(?:::[\w.]+)?)`", DOCUMENT))))
def test_what_is_named_exists(name):
    file, _, symbol = name.partition("::")
    path = ROOT / file if (ROOT / file).exists() else PACKAGE / file
    assert path.is_file(), f"{file} is no file"
    body = ast.parse(path.read_text()).body
    for part in symbol.split(".") if symbol else ():
        defined = {target.id: node for node in body for target in targets_of(node)}
        assert part in defined, f"{file} defines no {symbol}"
        body = getattr(defined[part], "body", [])


def targets_of(node: ast.stmt) -> list[ast.Name]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [ast.Name(node.name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target] if isinstance(node.target, ast.Name) else []
    return [target for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else []
