"""docs/finetune.md: its options exist, its recipes are all there are, and its commands run one after the other in an
empty folder, the upload against a stand-in of the Hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn

from segzoo.cli import build_parser
from segzoo.training.recipes import list_recipes

DOCUMENT = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def test_options_and_recipes_are_known():
    (verbs,) = (action for action in build_parser()._actions if action.dest == "verb")
    known = "".join(verbs.choices[verb].format_help() for verb in ("train", "data", "eval", "predict", "publish"))
    for option in re.findall(r"(?<=[ `])(--[a-z][a-z-]*)", DOCUMENT.replace("--nproc-per-node", "")):
        assert option in known, option
    named = re.findall(r"`([a-z]+)`", re.search(r"\| recipe \|.*?\n\n", DOCUMENT, re.DOTALL)[0])
    assert sorted(set(named)) == list_recipes()


@pytest.mark.slow
def test_a_new_users_path(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/segzoo"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m segzoo "$@"\n')
    program.chmod(0o755)
    work = tmp_path / "empty"
    work.mkdir()
    with HubStandIn() as hub:
        environ = hub.environment(tmp_path / "cache", token=HubStandIn.token, OMP_NUM_THREADS="1")
        environ["PATH"] = f"{program.parent}{os.pathsep}{environ['PATH']}"
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        said = ""
        for block in blocks("sh"):
            done = subprocess.run(["sh", "-e", "-c", block], cwd=work, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, block + done.stderr
            said += done.stdout
        uploaded = hub.repositories["you/street"]
        assert uploaded.private
        files = uploaded.commits[uploaded.refs["main"]]
        assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
        assert b"| sky |" in files["README.md"] and b"hf-hub:you/street" in files["README.md"]
        (code,) = blocks("python")
        again = 'segzoo.create_model("hf-hub:you/street")\n'
        subprocess.run([sys.executable, "-c", code + again], cwd=work, env=environ, check=True)
    assert "no fault found" in said
    # Trained, and found finished by the same command.
    assert len(re.findall("^the model of step [0-9]+ is local-dir:runs/street$", said, re.MULTILINE)) == 2
    assert (work / "results/results.csv").is_file() and (work / "masks/00000.png").is_file()
