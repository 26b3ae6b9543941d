"""What an archive's folder of results holds, so that every image is in it once, whoever is stopped when.

    archive.json      what was asked for; other options are refused in the same folder
    manifest.parquet  a row an image: image, mask (its file, below this folder), areas, error
    failed.csv        those with an error
    masks/            PNG files, or Parquet shards
    .work/0003/       what the third run has done so far

A run has a folder of its own. Its parts, rows of some images each, appear there whole under the number of the part, so
that a part done twice takes its own place. Before its parts are added to the manifest the folder is renamed, after
which a worker that nobody told to stop can no longer write: what it holds open is thrown away. The manifest is replaced
in one step and says which runs it has, so that being stopped between any two steps changes nothing.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._errors import SaveError, SegzooError

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST, REPORT, SETTINGS, MASKS, WORK = "manifest.parquet", "failed.csv", "archive.json", "masks", ".work"
COLUMNS = ("image", "mask", "areas", "error")  # of the manifest
LAST_RUN = b"segzoo_last_run"  # metadata of the manifest
GROUP_ROWS = 10_000


class Counts(NamedTuple):
    """Of a manifest: its images, and those of them that failed."""

    images: int
    failed: int


def manifest_schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return pa.schema([("image", text), ("mask", text), ("areas", pa.list_(pa.int64())), ("error", text)])


def part_name(part: int) -> str:
    return f"{part:08d}.parquet"


def put_file(run: Path, place: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, in the place of one that is there, as long as the run is open.

    Raises:
        SaveError: it cannot be written, or the run is closed.
    """
    partial = run / f"partial-{uuid.uuid4().hex}"
    try:
        write(partial)
        if not place.parent.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise SaveError(f"{place} cannot be written ({error.strerror or error}); the same command goes on") from error


class ResultFolder:
    """The folder of results of one archive, as the process that leads the work sees it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.abspath(folder))
        self.work, self.manifest = self.folder / WORK, self.folder / MANIFEST

    @contextlib.contextmanager
    def opened(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Take the folder, keep others from it, and bring the manifest up to date; of a new one nothing stays unless
        `begin` is called.

        Raises:
            SegzooError: other settings, or files that are no archive's; another process works in it.
            SaveError: it cannot be written.
        """
        from filelock import FileLock, Timeout  # a dependency of torch

        self.check(settings)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / "lock", timeout=0):
                self.check(settings)  # another may have taken it meanwhile
                if self.begun:
                    self.commit()
                else:  # one that was stopped before there was any work
                    for run in self._runs(""):
                        shutil.rmtree(run)
                try:
                    yield
                finally:
                    if not self.begun:
                        self.remove_work()
                        self.folder.rmdir()
        except Timeout:
            raise SegzooError(f"{self.folder}: another process is at work there; wait for it, or stop it") from None
        except OSError as error:
            reason = error.strerror or error
            raise SaveError(f"{self.folder} cannot be written ({reason}); choose another place") from error

    @property
    def begun(self) -> bool:
        return (self.folder / SETTINGS).exists()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """From now on the folder is an archive's, of these settings."""
        if not self.begun:
            text = json.dumps(settings, indent=1) + "\n"
            self._put(SETTINGS, lambda partial: partial.write_text(text))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises SegzooError if the folder holds anything but an archive of these settings, or its beginning."""
        if self.folder.exists() and not self.folder.is_dir():
            raise SegzooError(f"{self.folder} is a file; choose a folder")
        try:
            old = json.loads((self.folder / SETTINGS).read_text())
        except FileNotFoundError:
            if self.folder.is_dir() and any(name != WORK for name in os.listdir(self.folder)):
                raise SegzooError(f"{self.folder} holds other files; choose a new folder") from None
            return
        except (OSError, ValueError) as error:
            raise SegzooError(f"{self.folder / SETTINGS} cannot be read ({error}); choose a new folder") from None
        for name, value in settings.items():
            if not isinstance(old, dict) or old.get(name) != value:
                was = json.dumps(old.get(name) if isinstance(old, dict) else old)
                raise SegzooError(
                    f"{self.folder} was begun with {name} {was}, not {json.dumps(value)}; "
                    "choose another folder, or the same options to go on"
                )

    def done(self) -> Iterator[tuple[str, str]]:
        """(image, mask) of every row of the manifest."""
        for table in self._tables(columns=["image", "mask"]):
            yield from zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True)

    def new_run(self) -> Path:
        """An empty folder for a run; call it after `commit`."""
        run = self.work / f"{self._last_run() + 1:04d}"
        run.mkdir()
        return run

    def commit(self) -> Counts:
        """Close all runs and add what they have done to the manifest; without any it is written all the same."""
        for run in self._runs(""):
            run.rename(run.with_name(f"{run.name}.closed"))
        closed, last = self._runs(".closed"), self._last_run()
        new = [part for run in closed if _number(run) > last for part in _parts(run)]
        if new or not self.manifest.exists():
            self._write_manifest(new, max([last, *map(_number, closed)]))
        for run in closed:
            for part in _parts(run):
                shard = self.folder / shard_place(run.stem, part.stem)
                if "mask" not in _columns_of(part):  # a shard: it has masks, where a part of PNG files has their places
                    shard.parent.mkdir(exist_ok=True)
                    part.replace(shard)
            shutil.rmtree(run)
        return self._report()

    def remove_work(self) -> None:
        """Of a finished archive the folder of runs, which is empty."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _runs(self, ending: str) -> list[Path]:
        found = (path for path in self.work.iterdir() if path.is_dir() and path.suffix == ending)
        return sorted(found, key=_number)

    def _last_run(self) -> int:
        import pyarrow.parquet as pq

        if not self.manifest.exists():
            return 0
        return int((pq.read_schema(self.manifest).metadata or {}).get(LAST_RUN, b"0"))

    def _tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        import pyarrow.parquet as pq

        if self.manifest.exists():
            with pq.ParquetFile(self.manifest) as parquet:
                for group in range(parquet.metadata.num_row_groups):
                    yield parquet.read_row_group(group, columns=columns)

    def _write_manifest(self, parts: Iterable[Path], last_run: int) -> None:
        import pyarrow.parquet as pq

        schema = manifest_schema().with_metadata({LAST_RUN: str(last_run).encode()})

        def write(partial: Path) -> None:
            with pq.ParquetWriter(partial, schema) as writer:
                for table in _joined(itertools.chain(self._tables(), map(_rows_of, parts))):
                    writer.write_table(table.cast(schema))

        self._put(MANIFEST, write)

    def _report(self) -> Counts:
        images = failed = 0

        def write(partial: Path) -> None:
            nonlocal images, failed
            with partial.open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(("image", "error"))
                for table in self._tables(columns=["image", "error"]):
                    bad = [row for row in table.to_pylist() if row["error"]]
                    rows.writerows((row["image"], row["error"]) for row in bad)
                    images, failed = images + len(table), failed + len(bad)

        self._put(REPORT, write)
        return Counts(images, failed)

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        put_file(self.work, self.folder / name, write)


def shard_place(run: str, part: str) -> str:
    """Of a part that holds its masks, once it is in the manifest; below the folder of results."""
    return f"{MASKS}/{run}-{part}.parquet"


def _number(run: Path) -> int:
    return int(run.stem)


def _parts(run: Path) -> list[Path]:
    return sorted(run.glob("[0-9]*.parquet"))


def _columns_of(part: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_schema(part).names


def _rows_of(part: Path) -> pa.Table:
    """What the manifest says of a part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = _columns_of(part)
    table = pq.read_table(part, columns=[name for name in COLUMNS if name in names])
    if "mask" not in names:
        shard = shard_place(part.parent.stem, part.stem)
        places = ["" if error else shard for error in table.column("error").to_pylist()]
        table = table.append_column("mask", pa.array(places, pa.string()))
    return table.select(list(COLUMNS))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about `GROUP_ROWS`."""
    import pyarrow as pa

    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= GROUP_ROWS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)
