"""Trainings in processes of their own, for tests that kill one or run two together.

python tests/training_child.py kill DATA FOLDER SEED      prints how often it was killed
torchrun --nproc-per-node 2 tests/training_child.py spread DATA FOLDER      each process leaves result_RANK.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import segzoo
from segzoo.data.segmentation import open_data
from segzoo.training.engine import train
from segzoo.training.recipes import Recipe

SMALL = {"crop": (32, 32), "size": None, "log_every": 1, "lr": 1e-3, "evaluations": 4}
# Dropout, drop path, augmentation and a moving average: all that has a state of its own.
KILLED = Recipe(steps=24, batch_size=2, save_every=1, ema_decay=0.9, **SMALL)
SPREAD = Recipe(
    steps=6,
    batch_size=4,
    optimizer="sgd",
    freeze_batch_norm=True,
    scale=(0.7, 1.5),
    **{**SMALL, "lr": 0.05, "evaluations": 2},
)
KILLS = 10


def killed_training(data: str, folder: str, report: object = None) -> None:
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=13)
    train(
        model,
        open_data(data, split="train"),
        validation=open_data(data, split="val"),
        recipe=KILLED,
        folder=folder,
        cpu=True,
        watch=report,
    )


def tell(pipe: int, row: object) -> None:
    os.write(pipe, b".")


def kill_until_done(data: str, folder: str, seed: int) -> int:
    """Train in children that are killed after a few steps at any moment; how often that was."""
    draw = random.Random(seed)
    kills = 0
    while True:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            killed_training(data, folder, functools.partial(tell, write))
            os._exit(0)
        os.close(write)
        if kills < KILLS:
            for _ in range(draw.randint(1, 3)):
                os.read(read, 1)
            time.sleep(draw.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            kills += 1
        _, status = os.waitpid(child, 0)
        os.close(read)
        last = Path(folder, "last.pt")
        if last.exists():
            torch.load(last, weights_only=True)  # whole
        if Path(folder, "config.json").exists():
            segzoo.create_model(f"local-dir:{folder}")
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills


def spread_training(data: str, folder: str) -> None:
    torch.manual_seed(0)
    model = segzoo.create_model(
        "test_edaformer", num_classes=13, drop_path_rate=0.0, decoder_drop_path=0.0, dropout=0.0
    ).double()
    trained = train(
        model,
        open_data(data, split="train"),
        validation=open_data(data, split="val").first(3),  # one process has more of them
        recipe=SPREAD,
        folder=folder,
        cpu=True,
    )
    result = {**dataclasses.asdict(trained), "folder": str(trained.folder)}
    Path(folder, f"result_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    what, data, folder, *rest = sys.argv[1:]
    if what == "kill":
        print(kill_until_done(data, folder, int(rest[0])))
    elif what == "whole":
        killed_training(data, folder)
    else:
        spread_training(data, folder)
