"""Drawn pictures as a folder of files, in the layout of a data set of one's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .._errors import SaveError
from .segmentation import RECORD, SceneData, open_data


def write_drawn(
    name: str,
    folder: Path,
    *,
    counts: Mapping[str, int],
    size: tuple[int, int] = (256, 512),
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> int:
    """Write `images/SPLIT/NUMBER.png`, `masks/SPLIT/NUMBER.png` and "dataset.json"; returns how many pictures.

    Args:
        name: of `segmentation.DRAWN`.
        folder: new or empty.
        counts: split, "train" or "val" -> number of pictures.
        size: (H, W) in pixels.
        progress: wraps the pictures, as tqdm does.

    Raises:
        SaveError: the folder holds something, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SaveError(f"{folder} exists and is not empty; choose another place")
    jobs = []
    for split, count in counts.items():
        data = open_data(name, split=split)
        assert isinstance(data, SceneData)
        data = dataclasses.replace(data, count=count, size=size)
        jobs += [(data, split, index) for index in range(count)]
    try:
        for data, split, index in progress(jobs):
            sample = data[index]
            for kind, array in (("images", sample.image), ("masks", sample.labels)):
                path = folder / kind / split / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
        (folder / RECORD).write_text(json.dumps({"label_set": name}) + "\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{folder} cannot be written ({error.strerror or error}); choose another place") from error
    return len(jobs)
