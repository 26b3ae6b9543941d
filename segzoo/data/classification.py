"""ImageNet's folders, for classifiers: a folder a split, in it a folder a class."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .._errors import SegzooError
from .layouts import IMAGE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Image files with the index of their class."""

    split: str
    classes: tuple[str, ...]  # folder names in sorted order, as ImageNet counts its classes
    items: tuple[tuple[Path, int], ...] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        return self.items[index]

    def first(self, count: int | None) -> ClassificationData:
        """The first `count` images (None: all)."""
        return dataclasses.replace(self, items=self.items[:count])


def open_classification(root: str | Path, *, split: str | None = None) -> ClassificationData:
    """Open a folder such as ImageNet's: `val/n01440764/*.JPEG`.

    Args:
        split: "train", "val" or another folder of `root`; default: "val" where there is one, else `root` itself.

    Raises:
        SegzooError: no such folder, or no class folder with images in it.
    """
    root = Path(root)
    folder = root / (split or ("val" if (root / "val").is_dir() else ""))
    if not folder.is_dir():
        raise SegzooError(f"--data {root}: there is no folder {folder}; ImageNet's layout is val/CLASS/*.JPEG")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    items = tuple(
        (path, index)
        for index, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not items:
        raise SegzooError(f"{folder} has no CLASS/*.JPEG; ImageNet's images lie in a folder a class")
    return ClassificationData(split=split or folder.name, classes=tuple(names), items=items)
