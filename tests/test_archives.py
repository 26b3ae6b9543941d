"""`segzoo archive`: every image once, whoever is killed when; what is wrong is a row, or a sentence before any work.

Fast tests have the work done in this process. The slow ones are Ray's: `IMAGES` on a cluster of two nodes with workers
and a node killed, and a leading process that is killed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import segzoo
from segzoo.cli import main
from segzoo.data import scenes
from segzoo.scale import BatchSegmenter, archives, segment_archive
from segzoo.scale.manifest import ResultFolder, put_file
from segzoo.scale.sources import find_items

IMAGES = int(os.environ.get("SEGZOO_ARCHIVE_IMAGES", "300"))
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny = segzoo.create_model("test_edaformer", num_classes=5)
    tiny.weights_state = "pretrained"
    segzoo.save_pretrained(tiny, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def segmenter(model) -> BatchSegmenter:
    return BatchSegmenter(model=model, reduction="fast")


@pytest.fixture
def here(monkeypatch):
    """Ray's part is played by this process."""

    def work(worker, tasks, workers, progress):
        doer = archives._Worker(*worker)
        for task in tasks:
            batch = {name: np.array([value]) for name, value in task._asdict().items()}
            (images,), (error,) = doer(batch).values()
            if error:
                raise segzoo.SegzooError(error)
            progress.add(int(images))

    monkeypatch.setattr(archives, "_work", work)
    monkeypatch.setattr(archives, "_ray", lambda address, workers: contextlib.nullcontext())


def picture(number: int) -> bytes:
    """PNG file of an image like no other."""
    image_HWC = scenes.render(seed=5_000_000 + number % 10, size=SIZE)[0].copy()
    image_HWC[:8, :8] = np.random.default_rng(number).integers(0, 256, (8, 8, 3))
    stream = io.BytesIO()
    Image.fromarray(image_HWC).save(stream, format="PNG")
    return stream.getvalue()


def write_pictures(folder: Path, count: int) -> Path:
    for number in range(count):
        file = folder / f"part{number % 3}" / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    return folder


def manifest(folder: Path) -> dict[str, dict]:
    """Image -> its row, of which there is one."""
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    found = {row["image"]: row for row in rows}
    assert len(found) == len(rows), "an image has two rows"
    return found


def predicted(model: str, data: bytes, plan: str | None = "fast") -> np.ndarray:
    made = segzoo.create_model(model)
    made.set_inference_reduction(plan)
    return segzoo.predict(made, data).mask


def read_mask(file: Path | bytes) -> np.ndarray:
    return np.asarray(Image.open(file if isinstance(file, Path) else io.BytesIO(file)))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_masks(folder: Path, source: Path, model: str, count: int) -> None:
    """Every picture of `write_pictures` once, with the mask of `predict`; no other file."""
    rows = manifest(folder)
    names = [f"part{number % 3}/{number:05d}.png" for number in range(count)]
    assert rows.keys() == set(names)
    made = segzoo.create_model(model)
    made.set_inference_reduction("fast")
    for name in names:
        mask_HW = segzoo.predict(made, source / name).mask
        assert rows[name] == {
            "image": name,
            "mask": f"masks/{name}",
            "areas": np.bincount(mask_HW.ravel(), minlength=5).tolist(),
            "error": "",
        }
        assert np.array_equal(read_mask(folder / "masks" / name), mask_HW)
    assert files_of(folder) == {*rows_files(rows), "manifest.parquet", "failed.csv", "archive.json"}


def rows_files(rows: dict[str, dict]) -> set[str]:
    return {row["mask"] for row in rows.values() if row["mask"]}


# --- what is done -----------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_tree_of_masks(here, segmenter, model, tmp_path):
    source = write_pictures(tmp_path / "in", 7)
    seen: list[tuple[int, int]] = []
    report = segment_archive(
        segmenter, source, tmp_path / "out", part_size=3, on_images=lambda *counts: seen.append(counts)
    )
    check_masks(tmp_path / "out", source, model, 7)
    assert (report.images, report.failed, report.done, report.skipped) == (7, 0, 7, 0)
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)]
    with Image.open(tmp_path / "out/masks/part0/00000.png") as mask:
        assert mask.mode == "P"
    assert json.loads((tmp_path / "out/archive.json").read_text())["classes"] == list(segmenter.classes)


def test_bad_images_are_rows_and_stop_nothing(here, segmenter, model, tmp_path):
    source = write_pictures(tmp_path / "in", 2)
    (source / "a,b.jpg").write_bytes(b"no image")
    (source / "cut.png").write_bytes(picture(1)[:100])
    report = segment_archive(segmenter, source, tmp_path / "out")
    assert (report.images, report.failed) == (4, 2)
    with (tmp_path / "out/failed.csv").open(newline="") as file:
        failed = {row["image"]: row["error"] for row in csv.DictReader(file)}
    assert failed.keys() == {"a,b.jpg", "cut.png"} and "no image" in failed["a,b.jpg"]
    rows = manifest(tmp_path / "out")
    assert rows["cut.png"]["mask"] == "" and rows["cut.png"]["error"] == failed["cut.png"]
    assert sum(rows["cut.png"]["areas"]) == 0
    assert np.array_equal(read_mask(tmp_path / "out/masks/part1/00001.png"), predicted(model, picture(1)))


@pytest.mark.parametrize("masks", ["png", "rle"])
def test_shards_out(here, model, tmp_path, masks):
    source = write_pictures(tmp_path / "in", 5)
    (source / "bad.jpg").write_bytes(b"no image")
    segmenter = BatchSegmenter(model=model, reduction="fast", masks=masks)
    segment_archive(segmenter, source, tmp_path / "out", format="parquet", part_size=4)
    rows = manifest(tmp_path / "out")
    assert len(rows) == 6 and rows["bad.jpg"]["mask"] == ""
    for name, row in rows.items():
        if not row["error"]:
            shard = {found["image"]: found for found in pq.read_table(tmp_path / "out" / row["mask"]).to_pylist()}
            assert shard[name]["areas"] == row["areas"]
            value = shard[name][f"mask_{masks}"]
            expected_HW = predicted(model, (source / name).read_bytes())
            if masks == "png":
                assert np.array_equal(read_mask(value), expected_HW)
            else:
                assert json.loads(value).keys() == {segmenter.classes[i] for i in np.unique(expected_HW)}
    assert len(rows_files(rows)) == 2
    assert files_of(tmp_path / "out") == {*rows_files(rows), "manifest.parquet", "failed.csv", "archive.json"}


def test_it_goes_on_with_what_is_new(here, segmenter, model, tmp_path):
    source = write_pictures(tmp_path / "in", 4)
    segment_archive(segmenter, source, tmp_path / "out")
    before = (tmp_path / "out/masks/part0/00000.png").stat().st_mtime_ns
    write_pictures(source, 6)
    report = segment_archive(segmenter, source, tmp_path / "out")
    assert (report.images, report.done, report.skipped) == (6, 2, 4)
    check_masks(tmp_path / "out", source, model, 6)
    assert (tmp_path / "out/masks/part0/00000.png").stat().st_mtime_ns == before
    assert segment_archive(segmenter, source, tmp_path / "out").done == 0
    check_masks(tmp_path / "out", source, model, 6)


def test_images_of_one_stem_have_masks_of_their_own(here, segmenter, model, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["a.jpg.bmp", "a.bmp", "a.jpg", "a.png"]
    for number, name in enumerate(names):
        Image.open(io.BytesIO(picture(number))).save(tmp_path / "in" / name)
    (tmp_path / "in/list").write_text("\n".join(names))
    segment_archive(segmenter, tmp_path / "in/list", tmp_path / "out")
    rows = manifest(tmp_path / "out")
    assert [rows[name]["mask"] for name in names] == [f"masks/{name}.png" for name in ("a.jpg", "a", "a-2", "a.png")]
    for name, row in rows.items():
        expected_HW = predicted(model, (tmp_path / "in" / name).read_bytes())
        assert np.array_equal(read_mask(tmp_path / "out" / row["mask"]), expected_HW)


# --- being stopped ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more: nothing is written, moved or removed after it."""


def die_at(monkeypatch, step: int) -> None:
    """Each renaming, replacing, making and removing of files is a step; those from this one on are not made."""
    left = step

    def dying(real):
        def act(*args, **kwargs):
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return real(*args, **kwargs)

        return act

    for name in ("rename", "replace", "mkdir", "rmdir", "touch"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))


@pytest.mark.parametrize(
    ("format", "stride"),
    [
        ("parquet", 8),
        pytest.param("parquet", 1, marks=pytest.mark.slow),
        pytest.param("png", 1, marks=pytest.mark.slow),
    ],
)
def test_stopped_at_any_step_the_result_is_the_same(here, segmenter, model, tmp_path, format, stride):
    source = write_pictures(tmp_path / "in", 4)
    (source / "bad.jpg").write_bytes(b"no image")
    masks = {f"part{n % 3}/{n:05d}.png": predicted(model, picture(n)) for n in range(4)}
    stopped = 0
    for step in range(1, 100, stride):
        folder = tmp_path / f"out{step}"
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, step)
            try:
                segment_archive(segmenter, source, folder, format=format, part_size=2)
            except Killed:
                stopped += 1
            else:
                break
        segment_archive(segmenter, source, folder, format=format, part_size=2)
        rows = manifest(folder)
        assert rows.keys() == {*masks, "bad.jpg"} and rows["bad.jpg"]["error"]
        assert files_of(folder) == {*rows_files(rows), "manifest.parquet", "failed.csv", "archive.json"}
        if format == "png":
            assert all(np.array_equal(read_mask(folder / "masks" / name), mask) for name, mask in masks.items())
        else:
            shards = [row for file in rows_files(rows) for row in pq.read_table(folder / file).to_pylist()]
            assert len(shards) == 5
            found = {row["image"]: row["mask_png"] for row in shards if not row["error"]}
            assert found.keys() == masks.keys()
            assert all(np.array_equal(read_mask(found[name]), mask) for name, mask in masks.items())
    assert stopped > 15 // stride


def test_a_file_is_whole_or_as_it_was(tmp_path):
    def half(partial: Path) -> None:
        partial.write_text("ha")
        raise Killed

    place = tmp_path / "masks/a.png"
    for before in (None, "whole"):
        with pytest.raises(Killed):
            put_file(tmp_path, place, half)
        assert (place.read_text() if place.exists() else None) == before
        put_file(tmp_path, place, lambda partial: partial.write_text("whole"))
    with place.open() as reader:
        put_file(tmp_path, place, lambda partial: partial.write_text("new"))
        assert (reader.read(), place.read_text()) == ("whole", "new")  # who reads it meanwhile has one or the other


def test_a_run_that_is_closed_takes_no_more(here, segmenter, tmp_path, monkeypatch):
    """A worker that has outlived its leading process writes no row beside that of the next one."""
    source = write_pictures(tmp_path / "in", 2)
    workers = []

    def stay(worker, tasks, workers_, progress):
        workers.append((archives._Worker(*worker), tasks))
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "_work", stay)
        patch.setattr(ResultFolder, "commit", lambda self: None)
        with pytest.raises(Killed):
            segment_archive(segmenter, source, tmp_path / "out", format="parquet")
    (left_over, (task,)) = workers[0]
    rows = left_over._rows(task)  # it was in the midst of this
    table = left_over._segment(rows)
    segment_archive(segmenter, source, tmp_path / "out", format="parquet")
    with pytest.raises(segzoo.SegzooError, match="cannot be written"):
        left_over._write(left_over.run / "00000000.parquet", [table])
    with pytest.raises(segzoo.SegzooError, match="not seen by all machines"):
        left_over._do(task)
    rows = manifest(tmp_path / "out")
    assert len(rows) == 2
    assert files_of(tmp_path / "out") == {*rows_files(rows), "manifest.parquet", "failed.csv", "archive.json"}


def test_an_image_that_kills_workers_is_given_up_and_no_other(here, model, tmp_path, monkeypatch):
    source = write_pictures(tmp_path / "in", 5)
    (source / "part0/00003.png").write_bytes(b"deadly")
    real, deaths = BatchSegmenter.__call__, 0

    def call(self, batch):
        nonlocal deaths
        if any(str(value).endswith("00003.png") for value in batch["image"]):
            deaths += 1
            raise Killed
        return real(self, batch)

    def work(worker, tasks, workers, progress):
        """As Ray does, with a new worker for a dead one."""
        for task in tasks:
            while True:
                try:
                    progress.add(archives._Worker(*worker)._do(task))
                    break
                except Killed:
                    continue

    monkeypatch.setattr(BatchSegmenter, "__call__", call)
    monkeypatch.setattr(archives, "_work", work)
    segment_archive(BatchSegmenter(model=model, batch_size=2), source, tmp_path / "out")
    rows = manifest(tmp_path / "out")
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == {
        "part0/00003.png": "part0/00003.png: workers died at it"
    }
    assert len(rows) == 5 and deaths == 4


# --- what is given ----------------------------------------------------------------------------------------------------


def names_of(source: Path | str, column: str | None = None) -> list[str]:
    return [item.image for item in find_items(source, column)]


def add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as shard:
        for name, data in members.items():
            add(shard, name, data)
    return file


def test_tar_shards(here, segmenter, model, tmp_path):
    shard = write_tar(
        tmp_path / "0.tar",
        {"a.png": picture(0), "a.json": b"{}", "x/b.png": picture(1), "../c.png": picture(2), "a.seg.png": picture(3)},
    )
    assert names_of(shard, "seg.png") == ["0.tar/a.seg.png"]
    cut = tmp_path / "1.tar"
    cut.write_bytes(write_tar(tmp_path / "whole.tar", {"d.png": picture(4), "e.png": picture(5)}).read_bytes()[:2000])
    (tmp_path / "whole.tar").unlink()
    segment_archive(segmenter, str(tmp_path / "*.tar"), tmp_path / "out/masks of tar")
    rows = manifest(tmp_path / "out/masks of tar")
    good = {"0.tar/a.png": 0, "0.tar/x/b.png": 1, "0.tar/../c.png": 2, "0.tar/a.seg.png": 3}
    for name, number in good.items():
        mask_HW = read_mask(tmp_path / "out/masks of tar" / rows[name]["mask"])
        assert np.array_equal(mask_HW, predicted(model, picture(number))), name
    assert rows["0.tar/../c.png"]["mask"] == "masks/0.tar/c.png"
    bad = rows.keys() - good.keys()
    assert bad == {"1.tar", "1.tar/d.png"}
    assert "the shard ends within it" in rows["1.tar/d.png"]["error"] and "to its end" in rows["1.tar"]["error"]


def test_parquet_shards(here, segmenter, model, tmp_path):
    data = [picture(number) for number in range(5)]
    as_datasets = [{"bytes": one, "path": None} for one in data]
    for name, columns in {
        "bytes.parquet": {"bytes": data, "path": ["x"] * 5},
        "image.parquet": {"image": as_datasets, "label": [1] * 5},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / name, row_group_size=2)
    (tmp_path / "one.png").write_bytes(data[4])
    pq.write_table(pa.table({"path": ["one.png", "no.png", None]}), tmp_path / "paths.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "bytes.parquet").read_bytes()[:100])
    (tmp_path / "list.txt").write_text("bytes.parquet\nimage.parquet\npaths.parquet\ntorn.parquet\n")
    segment_archive(segmenter, tmp_path / "list.txt", tmp_path / "out", part_size=3)
    rows = manifest(tmp_path / "out")
    for shard in ("bytes", "image"):
        for number in range(5):
            mask_HW = read_mask(tmp_path / "out" / rows[f"{shard}.parquet/{number}"]["mask"])
            assert np.array_equal(mask_HW, predicted(model, data[number]))
    assert np.array_equal(read_mask(tmp_path / "out/masks/paths.parquet/0.png"), predicted(model, data[4]))
    failed = {name for name, row in rows.items() if row["error"]}
    assert failed == {"paths.parquet/1", "paths.parquet/2", "torn.parquet"} and len(rows) == 14


def test_lists(tmp_path):
    write_pictures(tmp_path / "in", 3)
    odd = os.fsdecode(b"caf\xe9.png")
    lines = ["in/part1/00001.png", "", "./in/part0/00000.png", "in/part1/00001.png", "/else/where.png", odd]
    (tmp_path / "list").write_bytes(os.fsencode("\n".join([*lines, "https://host/a/b.jpg?x=1"])))
    items = list(find_items(tmp_path / "list"))
    assert [item.image for item in items] == [
        *("in/part1/00001.png", "in/part0/00000.png", "else/where.png", "caf\\xe9.png", "https://host/a/b.jpg?x=1")
    ]
    assert [str(item.place) for item in items][2:] == ["else/where.png", "caf\\xe9.png", "host/a/b.png"]
    assert items[3].file == str(tmp_path / odd)
    assert names_of(str(tmp_path / "in/*/00002.png")) == ["part2/00002.png"]
    assert names_of(tmp_path / "in/part0/00000.png") == ["00000.png"]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(*words: str) -> None:
    assert main(["archive", *words]) == 2


def test_refusals_are_one_sentence_and_leave_nothing(here, tmp_path, model, capsys):
    source = write_pictures(tmp_path / "in", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\0\1")
    (tmp_path / "list").write_text("in/part0/00000.png\nout/masks/x.png\n")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    pq.write_table(pa.table({"number": [1], "path": [2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"picture": [b""], "bytes": [b""], "image": [b""]}), tmp_path / "two.parquet")
    before = files_of(tmp_path)
    out = str(tmp_path / "out")
    model_words = ["--model", model]
    for words, sentence in [
        ([str(tmp_path / "no"), "-o", out], "no such folder, list file, Parquet file or tar shard"),
        ([str(tmp_path / "no*.tar"), "-o", out], "has no images"),
        ([str(tmp_path / "empty"), "-o", out], "has no images"),
        ([str(tmp_path / "zero"), "-o", out], "has no images"),
        ([str(tmp_path / "binary"), "-o", out], "is no list of images"),
        ([str(tmp_path / "a.tar.gz"), "-o", out], "is compressed; unpack it"),
        ([str(tmp_path / "numbers.parquet"), "-o", out], "column path is int64"),
        ([str(tmp_path / "two.parquet"), "-o", out], "one column of images"),
        ([str(tmp_path / "two.parquet"), "-o", out, "--column", "img"], "its columns are picture, bytes, image"),
        ([str(source), "-o", str(source / "masks")], "give a folder elsewhere"),
        ([str(source), "-o", str(source)], "give a folder elsewhere"),
        ([str(source), "-o", str(tmp_path)], "masks could overwrite it"),
        ([str(source), "-o", str(tmp_path / "mine")], "holds other files"),
        ([str(source), "-o", str(tmp_path / "mine/notes.txt")], "is a file"),
        ([str(tmp_path / "list"), "-o", str(tmp_path / "out")], "lies in the folder of results"),
        ([str(source), "-o", out, "--reduction", "bogus"], "bogus"),
        ([str(source), "-o", out, "--precision", "bf16"], "are of an engine"),
    ]:
        refused(*words, *model_words)
        said = capsys.readouterr()
        assert sentence in said.err and said.err.count("\n") == 1 and said.out == "", said.err
        assert files_of(tmp_path) == before and not (tmp_path / "out").exists(), words


@pytest.mark.slow
def test_what_a_worker_cannot_write_is_one_sentence(segmenter, tmp_path, monkeypatch):
    """Through Ray, on this machine."""
    begin = ResultFolder.begin

    def beginning(self, settings):
        begin(self, settings)
        (self.folder / "masks").write_text("in the way")

    monkeypatch.setattr(ResultFolder, "begin", beginning)
    with pytest.raises(segzoo.SegzooError, match=r"masks/part0/00000\.png cannot be written \(.*\); the same command"):
        segment_archive(segmenter, write_pictures(tmp_path / "in", 1), tmp_path / "out", workers=1)


def test_a_wrong_column_that_comes_late_leaves_nothing(here, tmp_path, segmenter):
    write_pictures(tmp_path / "in", 2)
    pq.write_table(pa.table({"number": [1]}), tmp_path / "in/z.parquet")
    with pytest.raises(segzoo.SegzooError, match=r"z\.parquet has not the one column of images"):
        segment_archive(segmenter, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_to_its_options(here, tmp_path, model, capsys):
    source = write_pictures(tmp_path / "in", 1)
    words = ["archive", str(source), "-o", str(tmp_path / "out"), "--model", model]
    assert main([*words, "--reduction", "fast"]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "1 images, 1 masks, 0 failed" in said.err
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_of(tmp_path / "out")}
    for more, sentence in [
        ([], 'was begun with reduction "fast", not null'),
        (["--reduction", "fast", "--format", "parquet"], 'with format "png", not "parquet"'),
        (["--reduction", "fast", "--engine", "eager"], 'with engine null, not "eager"'),
    ]:
        refused(*words[1:], *more)
        assert sentence in capsys.readouterr().err
    other = write_pictures(tmp_path / "other", 1)
    refused(str(other), *words[2:], "--reduction", "fast")
    assert "was begun with source" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_of(tmp_path / "out")} == before
    assert main([*words, "--reduction", "fast", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["done"], told["skipped"], told["folder"]) == (1, 0, 1, str(tmp_path / "out"))


def test_two_at_once_are_refused(here, tmp_path, segmenter):
    source = write_pictures(tmp_path / "in", 1)

    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(segzoo.SegzooError, match="another process is at work"):
            segment_archive(segmenter, source, tmp_path / "out")

    assert segment_archive(segmenter, source, tmp_path / "out", on_images=meanwhile).images == 1


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    refused(str(write_pictures(tmp_path / "in", 1)), "-o", str(tmp_path / "out"))
    assert "pip install 'segzoo[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"format": "jpeg"}, {"workers": 0}, {"part_size": True}])
def test_options_that_are_none(segmenter, tmp_path, options):
    with pytest.raises(segzoo.SegzooError, match="must be"):
        segment_archive(segmenter, write_pictures(tmp_path / "in", 1), tmp_path / "out", **options)


# --- Ray --------------------------------------------------------------------------------------------------------------


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    """Ray's workers that segment, among the descendants."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes with one processor each, which this process leads."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        nodes.add_node(**node)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="CRITICAL")
        yield nodes, node
    finally:
        left = psutil.Process().children(recursive=True)
        ray.shutdown()
        nodes.shutdown()
        assert gone(left)


@pytest.mark.slow
def test_workers_and_a_node_are_killed_on_a_cluster(cluster, model, tmp_path):
    """As many workers as the cluster has processors, too: nothing may wait for one that is never free."""
    nodes, node = cluster
    source = write_pictures(tmp_path / "in", IMAGES)
    chance, killed = random.Random(0), 0
    (second,) = (each for each in nodes.list_all_nodes() if each is not nodes.head_node)

    def harm(done: int, total: int) -> None:
        """A worker with every eighth of the images, and a node with the fourth eighth."""
        nonlocal killed
        if done < total * (killed + 1) / 8 or not (victims := workers_below(psutil.Process())):
            return
        chance.choice(victims).kill()
        killed += 1
        if killed == 4:
            nodes.remove_node(second)
            nodes.add_node(**node)

    segmenter = BatchSegmenter(model=model, reduction="fast")
    part = max(1, IMAGES // 50)
    report = segment_archive(segmenter, source, tmp_path / "out", workers=2, part_size=part, on_images=harm)
    assert killed >= 5
    assert (report.images, report.failed, report.done) == (IMAGES, 0, IMAGES)
    check_masks(tmp_path / "out", source, model, IMAGES)

    few = write_pictures(tmp_path / "few", 6)  # another process finds the cluster by its address
    words = ["archive", str(few), "-o", "by_address", "--model", model, "--reduction", "fast", "--workers", "1"]
    process = run_segzoo(tmp_path, *words, "--address", nodes.address)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    check_masks(tmp_path / "by_address", few, model, 6)


@pytest.mark.slow
def test_a_cluster_that_is_not_there(segmenter, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = write_pictures(tmp_path / "in", 1)
    with pytest.raises(segzoo.SegzooError, match=f"cluster at 127.0.0.1:{port} cannot be reached .nothing answers"):
        segment_archive(segmenter, source, tmp_path / "out", address=f"127.0.0.1:{port}")
    assert not list((tmp_path / "out").rglob("*.png"))


def run_segzoo(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "segzoo", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "80"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_leading_process_is_killed_and_started_again(model, tmp_path):
    count = IMAGES // 2
    source = write_pictures(tmp_path / "in", count)
    words = ["archive", "in", "-o", "out", "--model", model, "--reduction", "fast"]
    words += ["--workers", "2", "--part-size", str(count // 25)]
    first = run_segzoo(tmp_path, *words)
    while len(list((tmp_path / "out").rglob("*.png"))) < count // 3:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    left = psutil.Process(first.pid).children(recursive=True)
    assert any("MapWorker" in " ".join(process.cmdline()) for process in left)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert gone(left), "Ray outlives the process that started it"
    assert not (tmp_path / "out/manifest.parquet").exists()

    second = run_segzoo(tmp_path, *words)
    said, told = second.communicate()
    assert second.returncode == 0, told
    check_masks(tmp_path / "out", source, model, count)
    # Of Ray not a word.
    assert said == ""
    first_line, second_line = told.splitlines()
    assert first_line == f"{tmp_path / 'out'}: {count} images, {count} masks, 0 failed"
    done, before = re.fullmatch(r"now (\d+) in \d+ s, [\d.]+ images/s; before (\d+)", second_line).groups()
    assert int(done) + int(before) == count and int(before) > 0
