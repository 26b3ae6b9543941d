"""The README's promises: its Python blocks run in order, its commands exist, its numbers are those of the tables."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from segzoo.data import scenes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def measured(name: str) -> list[dict[str, str]]:
    with open(ROOT / f"benchmarks/results/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scenes.render(seed=4_000_000, size=(128, 256))[0]).save("street.jpg")
    namespace: dict = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    written = sorted(path.name for path in (tmp_path / "masks").iterdir())
    assert written == ["street.png", "street_classes.json", "street_overlay.png"]


def test_shell_blocks_name_real_commands():
    from segzoo.cli import build_parser

    commands = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines() if line]
    assert commands
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *arguments in commands:
        if program == "make":
            assert arguments[0] in targets
        else:
            assert program == "segzoo"
            build_parser().parse_args(arguments)


@pytest.mark.parametrize("file", re.findall(r"\]\((benchmarks/results/[^)]+|[A-Z]+\.md)\)", README))
def test_links_lead_somewhere(file):
    assert (ROOT / file).is_file()


def test_accuracy_table_is_the_measured_one():
    rows = {row["reduction"]: row for row in measured("scenes_edaformer_t.scenes_256x512_cpu1")}
    for preset in ("base", "decoder", "optimal", "fast"):
        row = rows[preset]
        values = f"{float(row['miou']):.4f} | {float(row['small_class_miou']):.4f} | {float(row['gmacs']):.3f}"
        assert f"| {preset} | {values} | {float(row['time_ratio']):.2f} |" in README


def test_merging_table_is_the_measured_one():
    forms = [("materialised", "hq"), ("materialised", "fast"), ("fused", "none"), ("fused", "fast")]
    forms += [("fused folded", "none"), ("fused folded", "hq"), ("fused folded", "fast")]
    lines = re.findall(r"^\| (B\d), (\d+x\d+) \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(lines) >= 5
    for size, pixels, values in lines:
        table = measured(f"merging_segformer_{size.lower()}_{pixels}_infer_cpu1")
        rows = {(row["implementation"], row["reduction"]): row for row in table}
        assert values.split(" | ") == [f"{float(rows[form]['speed_up_over_materialised']):.2f}" for form in forms]


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("SegFormer-B0", "scenes_segformer_b0_256x512_cpu1"),
        ("the same, input shrunk instead", "scenes_segformer_b0_256x512_x0.7_cpu1"),
        ("the same, input shrunk instead", "scenes_segformer_b0_256x512_x0.5_cpu1"),
        ("RTFormer-Slim, grid 12", "scenes_rtformer_slim_256x512_cpu1"),
        ("SegViT-Small", "scenes_segvit_small_256x512_cpu1"),
        ("the same, one third of the blocks", "scenes_segvit_small_256x512_cpu1"),
    ],
)
def test_accuracies_of_short_trainings_are_the_measured_ones(line, file):
    found = {f"{float(row['miou']):.4f}" for row in measured(file)}
    written = set(re.findall(r"0\.\d{4}", re.search(rf"^\| {line} \| (.*) \|$", README, flags=re.MULTILINE)[1]))
    assert found <= written or written <= found
