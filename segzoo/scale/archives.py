"""An archive of images segmented by Ray Data, on one machine or many; stopped anywhere, the same call goes on.

The images are named first and cut into parts, which lie in a file that the workers read; Ray hands out the numbers of
parts alone, so that neither it nor the process that leads holds a picture.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .._errors import ImageError, SegzooError, first_line
from .batches import BatchSegmenter
from .manifest import MASKS, ResultFolder, manifest_schema, part_name, put_file
from .sources import Item, find_items, read_image, root_of

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("png", "parquet")
TASKS = "parts.jsonl"  # in the folder of a run: a line a part, its images with the places of their masks
STORE_BYTES = 128 * 2**20  # of Ray's object store on one machine; it holds numbers of parts
MAX_BLOCKS = 10_000  # of Ray Data; of more parts several go together
# Environment of Ray when it starts: no statistics of use, of its own log only what ends it, and a warning less.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
DEATHS = 2  # of workers at one part before its images are taken singly, and then at one image before it is given up

OnImages = Callable[[int, int], object]  # is told how many images are done, and of how many; 0 first


class ArchiveReport(NamedTuple):
    """What became of an archive."""

    images: int  # in the manifest
    failed: int  # of these
    done: int  # in this call, failed ones included
    skipped: int  # done before
    seconds: float  # of this call
    folder: Path


class Task(NamedTuple):
    """A part of the work: a line of the file of tasks."""

    part: int
    offset: int
    size: int


def segment_archive(
    segmenter: BatchSegmenter,
    source: str | Path,
    folder: str | Path,
    *,
    format: str = "png",
    column: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    part_size: int = 64,
    on_images: OnImages | None = None,
) -> ArchiveReport:
    """Segment every image of a folder, list, tar or Parquet shards, each once; call it again to go on.

    Args:
        segmenter: what each worker runs, its `batch_size` images at a time.
        source: as `sources.find_items` takes it: a folder, a list file, `.tar` or `.parquet` shards, a wildcard.
        folder: of the results (`manifest.py` says what is in it); on a cluster all machines see it, and the images,
            under the same path.
        format: "png": a PNG file an image in the folders of the source; "parquet": shards with the masks of a part.
        column: of Parquet files, the one of images; of tar shards, the ending of the images.
        workers: processes, each with the model; default: one a core but one of a cluster, or one a GPU.
        address: of a Ray cluster; None: where Ray is initialised already that one, else Ray on this machine alone.
        part_size: images that are done again after a stop, and rows of a Parquet shard.
        on_images: is told of the progress.

    Raises:
        SegzooError: an option; a source without images; a folder of results with other contents, or that was begun
            with other options; Ray is missing or cannot be reached.
    """
    check_installed()
    _check_options(segmenter, format, workers, part_size)
    _check_apart(source, folder)
    items = find_items(source, column)
    first = next(items, None)
    if first is None:
        raise SegzooError(f"{source} has no images, nor tar or Parquet shards; check the path")
    results = ResultFolder(folder)
    settings = {"source": os.path.abspath(source), "format": format, "column": column, **_asked(segmenter)}
    results.check(settings)
    settings["classes"] = _classes(segmenter)
    start = time.monotonic()
    with results.opened(settings):
        run = results.new_run()
        tasks, todo, skipped = _plan(itertools.chain([first], items), results, run, part_size)
        results.begin(settings)
        try:
            if tasks:
                done = _Progress(todo, on_images)
                with _ray(address, workers or _local_workers(segmenter.device)):
                    _work((segmenter, root_of(source), run, results.folder, format), tasks, workers, done)
        finally:
            counts = results.commit()
        results.remove_work()
    return ArchiveReport(*counts, done=todo, skipped=skipped, seconds=time.monotonic() - start, folder=results.folder)


def check_installed() -> None:
    """Raises SegzooError if Ray Data is missing."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise SegzooError(f"archives need Ray Data ({first_line(error)}): pip install 'segzoo[ray]'") from None


def _check_options(segmenter: BatchSegmenter, format: str, workers: int | None, part_size: int) -> None:
    if format not in FORMATS:
        raise SegzooError(f"format must be 'png' or 'parquet', not {format!r}")
    if format == "png" and segmenter.masks != "png":
        raise SegzooError(f"format 'png' takes a segmenter with masks='png', not {segmenter.masks!r}")
    for name, value in (("workers", 1 if workers is None else workers), ("part_size", part_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SegzooError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_apart(source: str | Path, folder: str | Path) -> None:
    """Raises SegzooError where masks would be taken for images, or images could be overwritten."""
    results, images = Path(os.path.realpath(folder)), Path(os.path.realpath(root_of(source)))
    if os.path.isdir(source) and results.is_relative_to(images):
        raise SegzooError(f"{folder} lies in {source}, where masks would be taken for images; give a folder elsewhere")
    if images.is_relative_to(results):
        raise SegzooError(f"{source} lies in {folder}, where masks could overwrite it; give a folder elsewhere")


def _asked(segmenter: BatchSegmenter) -> dict[str, Any]:
    """What a mask depends on, as JSON holds it."""
    return {
        "model": segmenter.model,
        "reduction": json.loads(json.dumps(segmenter.reduction, default=repr)),
        "engine": segmenter.engine,
        "precision": segmenter.precision,
        "masks": segmenter.masks,
    }


def _classes(segmenter: BatchSegmenter) -> list[str]:
    """Of the model, which is built here, too, so that what is wrong with it is said before any work; it may be that
    workers alone have a GPU."""
    if segmenter.device != "cpu":
        segmenter = copy.copy(segmenter)
        segmenter.device = "cpu"
    return list(segmenter.classes)


# --- the leading process ----------------------------------------------------------------------------------------------


def _plan(items: Iterable[Item], results: ResultFolder, run: Path, part_size: int) -> tuple[list[Task], int, int]:
    """Write the file of tasks for what the manifest has not; returns tasks, images to do, and images done before.

    Of two images whose masks would have one place (`a.jpg` and `a.png`), the second's keeps its suffix.
    """
    done, places = set(), set()
    for image, mask in results.done():
        done.add(image)
        places.add(mask)
    tasks, todo, skipped = [], 0, 0
    inside = os.path.join(results.folder, "")

    def wanted() -> Iterator[tuple[Item, str]]:
        nonlocal skipped
        for item in items:
            if item.image in done:
                skipped += 1
                continue
            if item.file.startswith(inside):
                raise SegzooError(f"{item.file} lies in the folder of results; give another folder")
            yield item, _free_place(item, places)

    with open(run / TASKS, "wb") as file:
        for part, rows in enumerate(_cut(wanted(), part_size)):
            line = json.dumps(rows).encode() + b"\n"
            tasks.append(Task(part, file.tell(), len(line)))
            file.write(line)
            todo += len(rows)
    return tasks, todo, skipped


def _free_place(item: Item, places: set[str]) -> str:
    place = f"{MASKS}/{item.place}"
    if place in places:
        folder, stem = place.rpartition("/")[0], item.place.stem
        names = itertools.chain([PurePosixPath(item.image).name], (f"{stem}-{n}" for n in itertools.count(2)))
        place = next(free for name in names if (free := f"{folder}/{name}.png") not in places)
    places.add(place)
    return place


def _cut(rows: Iterable[tuple[Item, str]], size: int) -> Iterator[list[tuple[Item, str]]]:
    rows = iter(rows)
    while some := list(itertools.islice(rows, size)):
        yield some


class _Progress:
    """Adds up what the workers report."""

    def __init__(self, total: int, on_images: OnImages | None):
        self.done, self.total, self.on_images = 0, total, on_images
        self.add(0)

    def add(self, images: int) -> None:
        self.done += images
        if self.on_images is not None:
            self.on_images(self.done, self.total)


def _local_workers(device: str) -> int:
    return torch.cuda.device_count() if device.startswith("cuda") else os.cpu_count() or 1


@contextlib.contextmanager
def _ray(address: str | None, workers: int) -> Iterator[None]:
    """Ray, in silence: the one at the address, the one that runs in this process, or one for this block.

    Ray counts processors as it is told: on one machine it gets one more than there are workers, which stays free for
    what else Ray Data starts.
    """
    import ray
    from ray.exceptions import RayError

    with _quiet():
        ours = not ray.is_initialized()
        if ours:
            try:
                with _no_stderr():
                    _start_ray(address, workers)
            except (RayError, RuntimeError, ValueError, OSError) as error:
                where = f"the cluster at {address} cannot be reached" if address else "Ray cannot be started"
                raise SegzooError(f"{where} ({first_line(error)})") from error
        try:
            yield
        finally:
            if ours:
                ray.shutdown()


def _start_ray(address: str | None, workers: int) -> None:
    import ray

    if address is not None:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        return
    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=workers + 1,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
    )


def _check_reachable(address: str) -> None:
    """ConnectionError where no cluster answers at HOST:PORT within a minute; Ray itself asks on for many."""
    if address == "auto" or "://" in address:
        return
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    if subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True).returncode:
        raise ConnectionError("nothing answers there")


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Without what Ray's part in C++ writes when it starts; what goes wrong is raised all the same."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own progress, logs and statistics of use; all is restored."""
    import ray.data

    variables = {name: os.environ.get(name) for name in QUIET}
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    os.environ.update(QUIET)
    context.enable_progress_bars = False
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)
        for name, value in variables.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(worker: tuple[Any, ...], tasks: Sequence[Task], workers: int | None, progress: _Progress) -> None:
    """Have all tasks done by Ray; one whose worker dies is given to another.

    Args:
        worker: arguments of `_Worker`.
    """
    import ray.data
    from ray.exceptions import RayError

    processes, cpus, gpus = _actors(workers, worker[0].device)
    rows = [task._asdict() for task in tasks]
    parts = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
        _Worker,
        fn_constructor_args=worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(processes, len(rows))),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        for row in parts.iter_rows():
            if row["error"]:
                raise SegzooError(row["error"])
            progress.add(int(row["images"]))
    except RayError as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise SegzooError(f"Ray gave up ({why}); the same command goes on where it stopped") from error


def _actors(workers: int | None, device: str) -> tuple[int, float, float]:
    """How many, and the processors and GPUs that Ray counts for each, so that they never take all processors."""
    import ray

    has = ray.cluster_resources()
    if device.startswith("cuda"):
        if not (gpus := has.get("GPU", 0)):
            raise SegzooError(f"device {device!r}: Ray finds no GPU; leave it out")
        count = workers or max(1, int(gpus))
        return count, 0.5, min(1, gpus / count)
    processors = has.get("CPU", 1)
    count = workers or max(1, int(processors) - 1)
    return count, 1 if count < processors else 0.9 * processors / count, 0


# --- a worker ---------------------------------------------------------------------------------------------------------


class _Worker:
    """What Ray Data calls: does the parts that it is given, each once, whoever has tried them before.

    A part at which workers died twice is done image by image, and an image at which they then die twice, too, is given
    up: else a picture that no memory holds would stop the archive.
    """

    def __init__(self, segmenter: BatchSegmenter, root: str, run: Path, folder: Path, format: str):
        self.segmenter, self.root, self.run, self.folder, self.format = segmenter, root, run, folder, format
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tasks = [Task(*(int(batch[name][i]) for name in Task._fields)) for i in range(len(batch["part"]))]
        try:
            return {"images": np.array([self._do(task) for task in tasks]), "error": np.array([""] * len(tasks))}
        except SegzooError as error:  # as a value, because Ray wraps what is raised beyond recognition
            return {"images": np.array([0]), "error": np.array([str(error)])}

    def _do(self, task: Task) -> int:
        """Returns the number of images."""
        rows = self._rows(task)
        part = self.run / part_name(task.part)
        if part.exists():  # its worker died after it, before Ray heard of it
            return len(rows)
        singly = _mark(part, "begun") == DEATHS
        size = 1 if singly else self.segmenter.batch_size
        tables = []
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            if singly and _mark(part, f"image-{first}") == DEATHS:
                tables.append(self._given_up(some))
                continue
            tables.append(self._segment(some))
            _unmark(part, f"image-{first}")
        self._write(part, tables)
        return len(rows)

    def _rows(self, task: Task) -> list[tuple[Item, str]]:
        """The images of a part, and the places of their masks."""
        if not os.path.isdir(self.root):
            raise SegzooError(f"{self.root} is not seen by all machines of the cluster; use a folder that they share")
        try:
            with open(self.run / TASKS, "rb") as file:
                file.seek(task.offset)
                return [(Item(*item), place) for item, place in json.loads(file.read(task.size))]
        except FileNotFoundError:
            raise SegzooError(
                f"{self.folder} is not seen by all machines of the cluster; use a folder that they share"
            ) from None

    def _segment(self, rows: Sequence[tuple[Item, str]]) -> pa.Table:
        sources = [_source_of(item) for item, _ in rows]
        own = [str(source) if isinstance(source, ImageError) else "" for source in sources]
        out = self.segmenter({"image": [b"" if isinstance(source, ImageError) else source for source in sources]})
        errors = [
            mine or error.replace("<bytes>", item.image, 1)
            for (item, _), mine, error in zip(rows, own, out["error"], strict=True)
        ]
        return self._table(rows, out, errors)

    def _given_up(self, rows: Sequence[tuple[Item, str]]) -> pa.Table:
        out = self.segmenter({"image": [b""] * len(rows)})
        return self._table(rows, out, [f"{item.image}: workers died at it" for item, _ in rows])

    def _table(self, rows: Sequence[tuple[Item, str]], out: Mapping[str, Any], errors: Sequence[str]) -> pa.Table:
        """Rows of a part; of PNG files, which are written, they have the places, else the masks themselves."""
        import pyarrow as pa

        masks = f"mask_{self.segmenter.masks}"
        columns: dict[str, Any] = {"image": [item.image for item, _ in rows]}
        if self.format == "png":
            columns["mask"] = ["" if error else place for (_, place), error in zip(rows, errors, strict=True)]
            for place, data in zip(columns["mask"], out[masks], strict=True):
                if place:
                    put_file(self.run, self.folder / place, functools.partial(Path.write_bytes, data=data))
        else:
            columns[masks] = out[masks]
        columns |= {"areas": list(out["areas"]), "error": errors}
        kinds = {field.name: field.type for field in manifest_schema()}
        kinds |= {"mask_png": pa.binary(), "mask_rle": pa.string()}
        return pa.table(columns, schema=pa.schema([(name, kinds[name]) for name in columns]))

    def _write(self, part: Path, tables: Sequence[pa.Table]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.concat_tables(tables)
        put_file(self.run, part, lambda partial: pq.write_table(table, partial))


def _source_of(item: Item) -> str | bytes | ImageError:
    try:
        return read_image(item)
    except ImageError as error:
        return error


def _mark(part: Path, what: str) -> int:
    """How many times it was begun before and not finished, at most `DEATHS`; now it is begun once more."""
    for times in range(DEATHS):
        mark = part.with_name(f"{part.stem}-{what}-{times}")
        if not mark.exists():
            mark.touch()
            return times
    return DEATHS


def _unmark(part: Path, what: str) -> None:
    for times in range(DEATHS):
        part.with_name(f"{part.stem}-{what}-{times}").unlink(missing_ok=True)
