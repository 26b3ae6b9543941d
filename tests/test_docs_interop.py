"""docs/interop.md runs as it stands: its Python blocks in order, its commands against a stand-in for timm's script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segzoo.interop import timm as bridge

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "interop.md").read_text()
SMALL = "--epochs 2 --warmup-epochs 0 --batch-size 4 --workers 0 --input-size 3 32 32"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the script and a tiny imagenet of dark and bright images."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parent / "timm_train_standin.py", "train.py")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for level, name in ((40, "dark"), (200, "bright")):
            folder = Path("imagenet") / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (level + generator.integers(0, 30, (48, 48, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return tmp_path


def run(command: str) -> None:
    """With the folder of this Python first on the path, so that `python` and `torchrun` are its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_every_block_runs(workplace):
    single, _ = blocks("sh")
    run(f"{single.strip()} {SMALL}")
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/interop.md", "exec"), namespace)
    saved = torch.load("output/eft_t/model_best.pth.tar", weights_only=False)  # written a moment ago
    assert saved["args"].model == "eft_t"
    trained = namespace["encoder"].state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in saved["state_dict"].items())
    inside = namespace["backbone"].model.state_dict()
    assert inside.keys() == {name for name in trained if not name.startswith("head.")}
    assert all(torch.equal(trained[name], tensor) for name, tensor in inside.items())


@pytest.mark.slow
def test_several_processes_and_other_options(workplace):
    _, several = blocks("sh")
    prepare, launch = several.strip().splitlines()
    run(prepare)
    launch = launch.replace("--nproc_per_node=8", "--nproc_per_node=1")  # the stand-in is not distributed
    assert launch.startswith("torchrun --nproc_per_node=1 train_segzoo.py")
    run(f'{launch} {SMALL} --layer-decay 0.8 --grad-checkpointing --model-kwargs depths="(1,1,1,1)"')
    saved = torch.load("output/eft_t/last.pth.tar", weights_only=False)
    assert "stages.2.blocks.1.norm1.weight" not in saved["state_dict"]


def test_the_table_names_what_is_registered():
    table = [line for line in DOCUMENT.splitlines() if line.startswith("| `")]
    names = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert names <= bridge.MODELS.keys()
    assert {name.rstrip("012345") for name in names} == {name.rstrip("012345") for name in bridge.MODELS}
