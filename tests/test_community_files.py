"""The files around the code say what is so: citation, templates, hooks, changelog."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import segzoo

ROOT = Path(__file__).parents[1]


def read(file: str) -> object:
    return yaml.safe_load((ROOT / file).read_text())


def test_the_citation_names_the_paper_of_every_family():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    cited = {re.search(r"abs/([\d.]+)$", reference["url"])[1] for reference in citation["references"]}
    assert len(cited) == len(citation["references"]) == 5
    table = (ROOT / "README.md").read_text()
    assert cited == set(re.findall(r"arxiv\.org/abs/([\d.]+)", table))
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_templates_have_what_the_form_needs(file):
    form = read(f".github/ISSUE_TEMPLATE/{file}")
    if file == "config.yml":
        return
    assert {"name", "description", "body"} <= form.keys()
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_hook_runs_what_make_knows():
    (hook,) = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    program, target = hook["entry"].split()
    assert program == "make" and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_a_release_needs_no_secret_and_proves_its_tag():
    workflow = read(".github/workflows/release.yml")
    assert workflow[True]["push"] == {"tags": ["v*"]}  # YAML reads "on" as true
    assert workflow["permissions"] == {}
    text = (ROOT / ".github/workflows/release.yml").read_text()
    assert "secrets." not in text
    build, publish = (workflow["jobs"][job] for job in ("build", "publish"))
    assert publish["needs"] == "build" and publish["permissions"]["id-token"] == "write"
    assert build["permissions"] == {"contents": "read"}
    uses = [step["uses"].partition("@")[0] for step in publish["steps"] if "uses" in step]
    assert uses.index("actions/attest-sbom") < uses.index("pypa/gh-action-pypi-publish")
    (proof,) = [step["run"] for step in build["steps"] if "the tag is the version" in step.get("name", "")]
    for tag, code in ((f"v{segzoo.__version__}", 0), (segzoo.__version__, 1), ("v9.9.9", 1)):
        env = {**os.environ, "GITHUB_REF_NAME": tag}
        assert subprocess.run(["bash", "-ec", proof], cwd=ROOT, env=env, capture_output=True).returncode == code, tag
    targets = re.findall(r"make ([a-z -]+)$", text, flags=re.MULTILINE)
    for target in " ".join(targets).split():
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


def test_the_changelog_begins_with_unreleased_and_has_this_version():
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert sections[1].rstrip(",") == segzoo.__version__
