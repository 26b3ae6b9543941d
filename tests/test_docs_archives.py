"""docs/archives.md: its blocks run in their order, beside a folder `photos` and a shard, and give the masks of
`predict`; its options exist."""

from __future__ import annotations

import io
import os
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

import segzoo
from segzoo.cli import build_parser, main
from segzoo.data import scenes

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "archives.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def test_commands_and_options_are_known():
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    for program, *words in lines:
        if program == "segzoo":
            build_parser().parse_args(words)
    (verbs,) = (action for action in build_parser()._actions if action.dest == "verb")
    known = verbs.choices["archive"].format_help()
    for option in re.findall(r"`(--[a-z-]+)", DOCUMENT):
        assert option in known, option
    example = (ROOT / "examples/serve.py").read_text()
    for line in blocks("sh")[-1].splitlines():
        assert line in example


@pytest.fixture
def photos(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """Name -> the mask of each picture of the folder; one more is none."""
    monkeypatch.chdir(tmp_path)
    model = segzoo.create_model("edaformer_t.scenes", pretrained=True)
    model.set_inference_reduction("fast")
    expected = {}
    Path("photos").mkdir()
    Path("shards").mkdir()
    with tarfile.open("shards/0.tar", "w") as shard:
        for i in range(3):
            picture = Image.fromarray(scenes.render(seed=5_000_000 + i, size=(48, 64))[0])
            picture.save(f"photos/{i}.png")
            expected[f"{i}.png"] = segzoo.predict(model, picture).mask
            shard.add(f"photos/{i}.png", f"{i}.jpg")
    Path("photos/bad.png").write_bytes(b"no image")
    return expected


@pytest.fixture
def two_processors(monkeypatch):
    """A Ray of two processors, which the page's blocks use."""
    import ray

    for name, value in (("DO_NOT_TRACK", "true"), ("DAFT_ANALYTICS_ENABLED", "0"), ("RAY_USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name, value)
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(address="local", num_cpus=2, **options)
        left = psutil.Process().children(recursive=True)
        yield
    finally:
        ray.shutdown()
    assert not psutil.wait_procs(left, timeout=60)[1]


def mask_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.slow
def test_blocks_run(photos, two_processors, capsys):
    for line in blocks("sh")[0].splitlines():
        program, *words = shlex.split(line)
        assert program == "segzoo" and main(words) == 0
    for name, mask_HW in photos.items():
        assert np.array_equal(np.asarray(Image.open(Path("masks/masks") / name)), mask_HW)
    (shard,) = (pq.read_table(file).to_pylist() for file in Path("shard_masks/masks").iterdir())
    found = {row["image"].removeprefix("0.tar/").replace("jpg", "png"): mask_of(row["mask_png"]) for row in shard}
    assert all(np.array_equal(found[name], mask_HW) for name, mask_HW in photos.items())
    capsys.readouterr()

    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/archives.md", "exec"), namespace)
    said = capsys.readouterr().out
    road = (photos["0.png"] == namespace["classes"].index("road")).sum()
    assert re.search(rf"^0\.png masks/0\.png  {road}$", said, re.MULTILINE) and "\n4 1 4\n" in said
    for table in ("ray_table", "daft_table"):
        check_table([row for file in Path(table).rglob("*.parquet") for row in pq.read_table(file).to_pylist()], photos)
    check_table(list(namespace["rows"]), photos)


def check_table(rows: list[dict], expected: dict[str, np.ndarray]) -> None:
    assert len(rows) == 4
    for row in rows:
        name = os.path.basename(row["path"])
        if name == "bad.png":
            assert row["error"] and row["mask_png"] == b""
        else:
            assert np.array_equal(mask_of(row["mask_png"]), expected[name]) and row["error"] == ""
            assert sum(row["areas"]) == expected[name].size
