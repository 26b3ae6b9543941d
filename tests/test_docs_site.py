"""The site: its hooks, its reading of docstrings, that nothing public or written is missing in it, and that the blocks
of its own pages run."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import segzoo
from segzoo.cli import build_parser
from segzoo.data import scenes
from segzoo.models import family
from segzoo.plans import current_plan

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CONFIG = (ROOT / "mkdocs.yml").read_text()
sys.path.insert(0, str(DOCS))
import docstrings  # noqa: E402
import site_hooks  # noqa: E402


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


# --- nothing is missing -----------------------------------------------------------------------------------------------


def test_every_page_stands_in_the_site_once():
    named = re.findall(r": ([\w/.-]+\.md)$", CONFIG, flags=re.MULTILINE)
    own = [page for page in named if not page.startswith(site_hooks.TAKEN_IN)]
    assert sorted(own) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def documented() -> list[str]:
    """What the pages of the API name."""
    return re.findall(r"^::: (\S+)$", "".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.MULTILINE)


def test_every_public_name_is_in_the_api_once():
    names = documented()
    assert len(set(names)) == len(names)
    assert {f"segzoo.{name}" for name in segzoo.__all__ if name != "__version__"} <= set(names)


@pytest.mark.parametrize("package", ["engines", "explaining", "labels", "scale", "sharing", "tuning"])
def test_public_names_of_packages_are_in_the_api(package):
    """Themselves, or the whole package, or under a name of segzoo's."""
    public = importlib.import_module(f"segzoo.{package}").__all__
    names = documented()
    for name in public:
        known = {f"segzoo.{package}", f"segzoo.{package}.{name}", f"segzoo.{name}"} & set(names)
        assert known or name.isupper(), f"segzoo.{package}.{name}"


def test_names_of_the_api_exist():
    for name in documented():
        path, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(path), last), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_some_test_runs_the_blocks_of_a_page(page):
    name = page.relative_to(DOCS).as_posix()
    if not re.search(r"^```(python|sh)\b", page.read_text(), flags=re.MULTILINE):
        return
    tests = [file.read_text() for file in (ROOT / "tests").glob("test_*.py")]
    written = (f'"docs" / "{name}"', f'"docs/{name}", "exec"', f'run("{name}"')
    run = any(any(form in text for form in written) for text in tests)
    assert run or name.startswith("families/"), f"no test reads {name}"  # tests/test_docs_families.py


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    """On GitHub; in the site the build sees to it."""
    for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / link).exists(), link


# --- the hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("threads.md", "predict.md#rasters", "predict.md#rasters"),
        ("threads.md", "../SECURITY.md", "repository/SECURITY.md"),
        ("families/eft.md", "../../benchmarks/README.md#x", "../repository/benchmarks/README.md#x"),
        ("threads.md", "../segzoo/training/recipes", "repository/segzoo/training/recipes/index.md"),
        ("threads.md", "../tests/rooms.py", "repository/tests/rooms.py.md"),
        ("repository/CONTRIBUTING.md", "docs/threads.md", "../threads.md"),
        ("threads.md", "../nowhere.md", "../nowhere.md"),  # left for mkdocs to refuse
        ("threads.md", "https://example.org/../SECURITY.md", "https://example.org/../SECURITY.md"),
    ],
)
def test_links_out_of_the_folder(uri, link, expected):
    assert site_hooks.rewritten(f"see [it]({link}), a[i](x)", uri) == f"see [it]({expected}), a[i](x)"


def test_what_is_linked_to_is_taken_in_with_what_it_links_to(tmp_path, monkeypatch):
    monkeypatch.setattr(site_hooks, "ROOT", tmp_path)
    monkeypatch.setattr(site_hooks, "DOCS", tmp_path / "docs")
    for name, text in {
        "docs/a.md": "[b](../b.md) [self](a.md) [code](../code.py)",
        "b.md": "[d](folder) [a](docs/a.md) [gone](gone.md)",
        "code.py": "x = 1  # [e](e.md)\n",
        "e.md": "",
        "folder/c.csv": "1",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = site_hooks.taken_in(["a.md"])
    assert sorted(found) == [
        *("repository/b.md", "repository/code.py.md", "repository/folder/c.csv", "repository/folder/index.md")
    ]
    assert site_hooks.text_of(found["repository/folder/index.md"]) == "# `folder`\n\n- [c.csv](c.csv)\n"
    assert "````python\nx = 1" in str(site_hooks.text_of(found["repository/code.py.md"]))
    assert site_hooks.text_of(found["repository/folder/c.csv"]) is None


@pytest.mark.parametrize(
    ("html", "addresses"),
    [
        ('<a href="https://arxiv.org/abs/1">paper</a> <img src="a.png">', []),
        ('<script async src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ("<img alt=x src=//cdn.example/x.png>", ["//cdn.example/x.png"]),
        ('<link href="https://fonts.example/f.css" rel="stylesheet">', ["https://fonts.example/f.css"]),
        ('<link rel="next" href="https://example.org/">', []),
        ("@font-face{src:url(https://fonts.example/f.woff2)}", ["https://fonts.example/f.woff2"]),
        ('@import "http://cdn.example/x.css";', ["http://cdn.example/x.css"]),
    ],
)
def test_what_a_page_would_fetch_is_found(html, addresses):
    assert site_hooks.foreign(html) == addresses


def test_examples_become_blocks():
    text = "One line.\n\n>>> 1 + 1\n2\n\nArgs:\n    x: [0, 1]\n"
    assert docstrings.with_blocks(text) == "One line.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nArgs:\n    x: [0, 1]\n"


def test_arguments_described_together_are_described_each():
    text = "Args:\n    crop, stride: (H, W),\n        in pixels.\n    x: y.\n\nOne, two: three"
    each = "    crop: (H, W),\n        in pixels.\n    stride: (H, W),\n        in pixels.\n"
    expected = f"Args:\n{each}    x: y.\n\nOne, two: three"
    assert docstrings.one_by_one(text, {"crop", "stride", "x"}) == expected
    assert docstrings.one_by_one(text, {"crop", "x"}) == text


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scenes.render(seed=4_000_000, size=(128, 256))[0]).save("photo.jpg")
    return tmp_path


def run(page: str, **names: object) -> None:
    """Its blocks of Python, one after the other, with these names known."""
    for block in blocks(page, "python"):
        exec(compile(block, f"docs/{page}", "exec"), names)


def test_the_start(folder):
    run("index.md")
    assert {path.name for path in Path("masks").iterdir()} == {"photo.png", "photo_overlay.png", "photo_classes.json"}
    lines = "".join(blocks("index.md", "sh")).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["pip", "segzoo"], "a first mask takes two commands"
    for line in lines[1:]:
        build_parser().parse_args(line.split()[1:])


@pytest.mark.slow
def test_the_idea(capsys):
    run("idea.md")
    assert "encoder.1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokens", "merged", "attention"])
def test_pictures_of_the_idea_are_small(name):
    assert f"({name}.jpg)" in (DOCS / "idea.md").read_text()
    assert (DOCS / f"{name}.jpg").stat().st_size < 200_000


def test_threads(folder, capsys):
    model = segzoo.create_model("test_edaformer")
    run("threads.md", model=model, segzoo=segzoo)
    assert current_plan(model).is_neutral


@pytest.mark.slow
def test_choosing_a_reduction(folder):
    """With a tiny model in the place of the trained one."""
    for i in range(2):
        Image.fromarray(scenes.render(seed=i, size=(128, 256))[0]).save(f"street{i + 1}.png")
    smaller = {
        '"edaformer_t", pretrained=True': '"test_edaformer", pretrained_cfg_overlay={"test_size": (64, 128)}',
        "macs=0.85": "macs=0.95",
    }
    code = "".join(blocks("choose-a-reduction.md", "python"))
    for real, other in smaller.items():
        assert real in code
        code = code.replace(real, other)
    exec(compile(code, "docs/choose-a-reduction.md", "exec"), {})
    names = {"reduction.json", "reduction.png", "attention.png", "features.png", "tokens.png"}
    assert {path.name for path in folder.rglob("*.*")} >= names
    commands = re.findall(r"^```\n(segzoo .*)\n```", (DOCS / "choose-a-reduction.md").read_text(), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


def test_robustness(folder, capsys):
    run("robustness.md")
    assert "weights.pth" in capsys.readouterr().out


@pytest.fixture
def registry():
    """As it was, afterwards."""
    families, variants = dict(family.FAMILIES), dict(family.VARIANTS)
    yield
    for known, before in ((family.FAMILIES, families), (family.VARIANTS, variants)):
        known.clear()
        known.update(before)
    sys.modules.pop("little", None)


def test_a_family_is_added(folder, registry, monkeypatch, capsys):
    module, use = blocks("add-a-family.md", "python")
    Path("little.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    exec(compile(use, "docs/add-a-family.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'encoder.3', 'decoder.0" in printed and "untrained" in printed
    model = segzoo.create_model("little_t", num_classes=5).eval()
    assert model(torch.zeros(1, 3, 33, 1)).shape == (1, 5)
