"""The folder of a training: what was asked, how far it is, and the best model so far.

    recipe.json       the recipe as run; `--recipe` takes it
    run.json          model, data, command, versions, commit
    log.csv           loss, learning rate and accuracy by step
    last.pt           everything to go on from
    config.json, model.safetensors, README.md    the model to use, as `create_model("local-dir:...")` loads it

Every file is replaced in one step, so that each is whole whenever a process is killed or a disk is full.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from .._errors import SaveError, SegzooError, first_line, shown
from .._files import write_files
from ..models.base import Model
from ..models.rows import PretrainedCfg
from ..sharing.card import CARD_NAME, model_card
from ..zoo.config import CONFIG_NAME, WEIGHTS_NAME, config_to_dict
from .recipes import Recipe

PARTIALS = ".*.partial"  # of a process that was killed
RECIPE_NAME, RUN_NAME, LOG_NAME, LAST_NAME = "recipe.json", "run.json", "log.csv", "last.pt"
MUST_AGREE = ("model", "start", "data", "validation", "reduction", "during_training", "recipe")  # to go on with a run


class RunFolder:
    """A folder of `train`.

    Args:
        folder: new, empty, or of a training; it is made by `begin`.
        columns: of the log, beside "step".
    """

    def __init__(self, folder: Path, columns: Sequence[str]):
        self.folder = folder
        self.columns = ("step", *columns)
        self.rows: list[dict[str, str]] = []

    def begin(self, record: Mapping[str, Any], recipe: Recipe) -> None:
        """Say what is run, or check that the folder is of the same run.

        Raises:
            SegzooError: the folder holds something else, or cannot be written.
        """
        record = json.loads(json.dumps({**record, "recipe": recipe.to_dict()}))
        path = self.folder / RUN_NAME
        if path.is_file():
            self._check_same(_read_json(path), record)
        elif self.folder.exists() and not self._is_free():
            raise SegzooError(f"{self.folder} exists and is no folder of a training; choose another place with -o")
        # The run first: with it alone, as where a process is killed between the two, the folder is known again.
        texts = {path: json.dumps(record, indent=1), self.folder / RECIPE_NAME: json.dumps(recipe.to_dict(), indent=1)}
        missing = {place: _text_writer(text + "\n") for place, text in texts.items() if not place.is_file()}
        if missing:
            self._write(missing, "the run's record", 0)
        for partial in self.folder.glob(PARTIALS):
            partial.unlink(missing_ok=True)

    def _is_free(self) -> bool:
        return self.folder.is_dir() and all(place.match(PARTIALS) for place in self.folder.iterdir())

    def _check_same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        defaults = json.loads(json.dumps(Recipe().to_dict()))  # of values that recipes did not have then
        old = {**old, "recipe": {**defaults, **old.get("recipe", {})}}
        for name in MUST_AGREE:
            before, now = old.get(name), new.get(name)
            if before == now:
                continue
            if isinstance(before, dict) and isinstance(now, dict):
                name, before, now = next(
                    (f"{name}.{key}", before.get(key), now.get(key))
                    for key in {**before, **now}
                    if before.get(key) != now.get(key)
                )
            raise SegzooError(
                f"{self.folder} holds another training: {name} was {shown(before)} and is now {shown(now)}; choose "
                "another place with -o, or give the options of that training to go on with it"
            )

    # --- checkpoints

    def load_last(self) -> dict[str, Any] | None:
        """What `save_last` wrote; None where nothing has been saved yet.

        Raises:
            SegzooError: a file that something else has damaged.
        """
        path = self.folder / LAST_NAME
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise SegzooError(
                f"{path} is damaged ({first_line(error)}); delete the folder and start again, or begin from the "
                f"weights in it with local-dir:{self.folder}"
            ) from error

    def save_last(self, state: Mapping[str, Any], step: int) -> None:
        """Raises SaveError, with what was there before still whole."""
        self._write({self.folder / LAST_NAME: lambda path: torch.save(dict(state), path)}, "the checkpoint", step)

    def export(self, model: Model, row: PretrainedCfg, sections: Sequence[str], step: int) -> None:
        """The model to use, as `save_pretrained` writes it, its card with further sections.

        The weights come before the config, so that the config never describes weights that are not there.
        """
        config = json.dumps(config_to_dict(model, row), indent=2) + "\n"
        card = model_card(model, row) + "".join(f"\n{section}\n" for section in sections)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        self._write(
            {
                self.folder / WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
                self.folder / CARD_NAME: _text_writer(card),
                self.folder / CONFIG_NAME: _text_writer(config),
            },
            "the model",
            step,
        )

    def _write(self, writers: Mapping[Path, Callable[[Path], object]], what: str, step: int) -> None:
        try:
            write_files({path: _surely(write) for path, write in writers.items()}, overwrite=True)
        except SaveError as error:
            reason = first_line(error.__cause__ or error)
            if not step:
                raise SaveError(
                    f"{self.folder}: {what} cannot be written ({reason}); make room, or choose another place with -o"
                ) from error
            raise SaveError(
                f"{self.folder}: {what} of step {step} cannot be written ({reason}); what was saved before is whole: "
                "make room, and give the same command again to go on from there"
            ) from error

    # --- the log

    def cut_log(self, step: int) -> None:
        """Keep the rows up to a step, from which the training goes on."""
        path = self.folder / LOG_NAME
        if path.exists():
            with contextlib.suppress(OSError, ValueError, csv.Error), path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if None in row.values() or not (row.get("step") or "").isdigit() or int(row["step"]) > step:
                        break
                    self.rows.append({name: row.get(name) or "" for name in self.columns})
        text = io.StringIO()
        table = csv.DictWriter(text, self.columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        self._write({path: _text_writer(text.getvalue())}, "the log", step)

    def log(self, values: Mapping[str, float | int | None]) -> None:
        """Add a row."""
        row = {name: "" if values.get(name) is None else repr(values[name]) for name in self.columns}
        self.rows.append(row)
        try:
            with (self.folder / LOG_NAME).open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        except OSError as error:
            raise SaveError(
                f"{self.folder / LOG_NAME} cannot be written ({error.strerror}); make room, and give the same command "
                "again to go on from the last checkpoint"
            ) from error


def _surely(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """The content is on the disk before the file takes its place, and a full disk is an OSError whoever finds it."""

    def wrapped(path: Path) -> None:
        try:
            write(path)
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise OSError(first_line(error)) from error
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return wrapped


def _text_writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SegzooError(f"{path} cannot be read ({first_line(error)}); choose another place with -o") from error
    if not isinstance(value, dict):
        raise SegzooError(f"{path} is no record of a training; choose another place with -o")
    return value
