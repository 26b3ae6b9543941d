"""The list of deliberate faults: that each can be applied, and that every file of the mathematics has one.

Whether the tests find them is for `make mutants`, which takes minutes.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from mutants import ROOT, TESTS, Mutant, read_list

MUTANTS = read_list()
ROOMS = ("models", "layers", "zoo", "zoo/download")
# Nothing in them can go wrong in silence: names, texts and records that a generated index or a golden file proves.
WITHOUT = {"models/__init__.py", "layers/__init__.py", "zoo/__init__.py", "zoo/download/__init__.py"}


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    return shutil.copytree(ROOT / "segzoo", folder / "segzoo")


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_fault_can_be_applied(mutant, package):
    path = package / mutant.file
    before = path.read_text()
    mutant.apply(package)
    try:
        compile(path.read_text(), str(path), "exec") if path.suffix == ".py" else None
        assert path.read_text() != before
        for test in mutant.tests:
            file, _, name = test.partition("::")
            names = re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), flags=re.MULTILINE)
            assert not name or name.partition("[")[0] in names, test
    finally:
        path.write_text(before)


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_of_a_room_has_a_fault(room):
    files = {f"{room}/{path.name}" for path in (ROOT / "segzoo" / room).glob("*.py")} - WITHOUT
    assert files - {mutant.file for mutant in MUTANTS} == set()


def test_no_fault_twice_and_none_without_effect():
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    with pytest.raises(ValueError, match="changes nothing"):
        Mutant(file="x.py", old="a", new="a", tests=("test_x.py",))


def test_a_text_that_is_not_there_once_is_refused(package):
    for old in ("there is no such line", "import"):
        with pytest.raises(ValueError, match="not once"):
            Mutant(file="models/mit.py", old=old, new="", tests=("test_mit.py",)).apply(package)
