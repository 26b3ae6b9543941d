"""The README's promises: its Python blocks run in order, its commands exist, and its numbers, with those of
docs/measurements.md, are those of the tables."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

import segzoo
from segzoo.cli import demo
from segzoo.data import scenes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIGURES = README + (ROOT / "docs/measurements.md").read_text()  # all that was measured


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


@pytest.mark.parametrize("file", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(file):
    assert (ROOT / file).is_file()


def figure(line: str) -> list[str]:
    """The cells of the one line that begins with `line`."""
    rows = [row for head, rows in tables().items() if head != "| GMACs" for row in rows]  # it has presets, too
    found = re.findall(rf"^\| {re.escape(line)} \| (.*) \|$", "\n".join(rows), flags=re.MULTILINE)
    assert len(found) == 1, line
    return found[0].split(" | ")


def pairs(text: str) -> list[tuple[str, str]]:
    """(label, 0.1234) of "label 0.1234, another: 0.5678", in their order."""
    found = re.findall(r"(?:^|, |; )([^,;]+?):? (0\.\d{4})", text)
    assert len(found) == len(re.findall(r"0\.\d{4}", text)), text
    return found


def tables() -> dict[str, list[str]]:
    """The body rows of every table, by the first cells of its head."""
    found = re.findall(r"^\| (.*?) \| .*\|\n\|[-|]+\|\n((?:^\|.*\|\n)+)", "\n" + FIGURES, flags=re.MULTILINE)
    return {head: rows.splitlines() for head, rows in found}


def test_every_table_is_compared_here():
    """Families, accuracy and speed; in docs/measurements.md the short trainings, far sight, and the merging."""
    lengths = {head: len(rows) for head, rows in tables().items()}
    assert lengths == {"family": 4, "reduction": 4, "form": 4, "model": 5, "| GMACs": 9, "| original, hq": 6}


def test_accuracy_table_is_the_measured_one():
    presets = ("base", "decoder", "optimal", "fast")
    rows = {row["reduction"]: row for row in measured("scenes_edaformer_t.scenes_256x512_cpu1")}
    for preset in presets:
        row = rows[preset]
        values = [f"{float(row['miou']):.4f}", f"{float(row['small_class_miou']):.4f}", f"{float(row['gmacs']):.3f}"]
        assert figure(preset) == [*values, f"{float(row['time_ratio']):.2f}"]
    assert [line.split(" | ")[0] for line in tables()["reduction"]] == [f"| {preset}" for preset in presets]


def gmacs(size: tuple[int, int]) -> dict[str, float]:
    model = segzoo.create_model("edaformer_t.scenes")
    found = {}
    for preset in demo.PRESETS:
        model.set_inference_reduction(preset)
        found[preset] = segzoo.cost(model, size).macs / 1e9
    return found


def test_costs_are_those_of_the_bundled_model():
    """At the demo's size, as the demo prints them, and at 1024x2048."""
    macs = gmacs(demo.SIZE)
    printed = re.findall(r"^(\w+) +0\.\d{4}  \S+ +(\d\.\d{3} \(\d+%\))  ", README, flags=re.MULTILINE)
    assert printed == [(preset, f"{macs[preset]:.3f} ({macs[preset] / macs['base']:.0%})") for preset in demo.PRESETS]
    assert f'"fast" does {100 * macs["fast"] / macs["base"]:.0f} % of the work' in README
    large = gmacs((1024, 2048))
    line = f'"optimal" takes {large["optimal"]:.2f} of {large["base"]:.2f} GMACs, "fast" {large["fast"]:.2f}.'
    assert line in README


@pytest.mark.parametrize(
    ("name", "license", "commercial"),
    [("rtformer_slim.cityscapes", "apache-2.0", True), ("segformer_b0.nvidia_ade20k_512", None, False)],
)
def test_weights_for_photographs_are_what_they_are_said_to_be(name, license, commercial):
    info = segzoo.model_info(name)
    row = segzoo.get_pretrained_cfg(name)
    assert name in README and row.commercial_use is commercial
    assert license in (None, row.license)
    size = f"{info.params / 1e6:.1f} M"
    assert re.search(rf"`{re.escape(name)}` has {size}[^;]*\({4 * info.params / 1e6:.0f} MB\)", README)


def test_every_extra_is_named():
    text = (ROOT / "pyproject.toml").read_text()
    (table,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, flags=re.MULTILINE | re.DOTALL)
    extras = re.findall(r"^(\w+) = \[", table, flags=re.MULTILINE)
    assert len(extras) >= 5
    for extra in extras:
        assert re.search(rf"`(segzoo)?\[{extra}\]`", README), extra


def test_the_picture_is_small():
    with Image.open(ROOT / "docs/demo.jpg") as picture:
        assert picture.width >= 1200
    assert (ROOT / "docs/demo.jpg").stat().st_size <= 300_000
    assert README.index("docs/demo.jpg") < README.index("##")


LATENCY = {
    "segzoo": "segzoo",
    "segzoo, folded": "segzoo folded",
    "segzoo, folded, optimal": "segzoo folded, optimal",
    "segzoo, folded, fast": "segzoo folded, fast",
}


def test_speed_table_is_the_measured_one():
    rows = {row["form"]: row for row in measured("latency_edaformer_t_512x512_cpu1")}
    written = [tuple(line.strip("| ").split(" | ")) for line in tables()["form"]]
    assert written == [(label, f"{float(rows[form]['speed_up_median']):.2f}") for label, form in LATENCY.items()]


FORMS = [("materialised", "hq"), ("materialised", "fast"), ("fused", "none"), ("fused", "fast")]
FORMS += [("fused folded", "none"), ("fused folded", "hq"), ("fused folded", "fast")]


def merging(size: str, pixels: str, mode: str) -> dict[tuple[str, str], dict[str, str]]:
    table = measured(f"merging_segformer_{size.lower()}_{pixels}_{mode}_cpu1")
    return {(row["implementation"], row["reduction"]): row for row in table}


def test_merging_table_is_the_measured_one():
    header = "| | original, hq | original, fast | segzoo | segzoo, fast | folded | folded, hq | folded, fast |"
    assert header in FIGURES
    lines = re.findall(r"^\| (B\d), (\d+x\d+) \| (.*) \|$", FIGURES, flags=re.MULTILINE)
    assert len(lines) == len(tables()["| original, hq"]) == 6
    for size, pixels, values in lines:
        rows = merging(size, pixels, "infer")
        assert values.split(" | ") == [f"{float(rows[form]['speed_up_over_materialised']):.2f}" for form in FORMS]


def test_figures_of_a_training_step_are_the_measured_ones():
    large, small = merging("B2", "1024x1024", "train"), merging("B2", "512x512", "train")
    gib = [f"{float(large[form, 'none']['peak_mib']) / 1024:.1f} GiB" for form in ("materialised", "fused")]
    speeds = [
        f"{float(rows['fused', reduction]['speed_up_over_materialised']):.2f}"
        for rows in (large, small)
        for reduction in ("none", "fast")
    ]
    text = " ".join(FIGURES.split())
    assert (
        f"takes {gib[0]} with the original's attention and {gib[1]} with segzoo's, which is {speeds[0]} times as fast, "
        f'with "fast" in place {speeds[1]} times; at 512x512 {speeds[2]} and {speeds[3]} times.' in text
    )


HALF_MERGED = '{"encoder": {"type": "Bipartite", "ratio": 0.5, "stride": 2}}'
# Line -> of each of its figures, in their order: the label, the file, and the reduction there.
SHORT_TRAININGS = {
    "SegFormer-B0": [
        *((label, "scenes_segformer_b0_256x512_cpu1", label) for label in ("none", "hq", "fast", "n2d", "isr")),
        ("keys and values pooled by 2", "scenes_segformer_b0_256x512_cpu1", '{"encoder": 2}'),
    ],
    "the same, input shrunk instead": [
        ("to 0.7 of its sides", "scenes_segformer_b0_256x512_x0.7_cpu1", "none"),
        ("to 0.5", "scenes_segformer_b0_256x512_x0.5_cpu1", "none"),
    ],
    "RTFormer-Slim, grid 12": [(n, "scenes_rtformer_slim_256x512_cpu1", n) for n in ("1", "2", "3", "4", "8")],
    "SegViT-Small": [
        ("none", "scenes_segvit_small_256x512_cpu1", "none"),
        ("pooled by 2", "scenes_segvit_small_256x512_cpu1", "2"),
        ("by 4", "scenes_segvit_small_256x512_cpu1", "4"),
        ("half of the tokens merged", "scenes_segvit_small_256x512_cpu1", HALF_MERGED),
    ],
    "the same, one third of the blocks": [
        ("pooled by 2 in the first third", "scenes_segvit_small_256x512_cpu1", '{"encoder": [2, 1, 1]}'),
        ("in the last", "scenes_segvit_small_256x512_cpu1", '{"encoder": [1, 1, 2]}'),
    ],
}


@pytest.mark.parametrize("line", SHORT_TRAININGS)
def test_accuracies_of_short_trainings_are_the_measured_ones(line):
    expected = []
    for label, file, reduction in SHORT_TRAININGS[line]:
        (row,) = (row for row in measured(file) if row["reduction"] == reduction)
        expected.append((label, f"{float(row['miou']):.4f}"))
    assert pairs(figure(line)[0]) == expected


def test_times_of_segvit_are_the_measured_ones():
    rows = {row["reduction"]: row for row in measured("scenes_segvit_small_256x512_cpu1")}
    by_2, by_4 = (f"{float(rows[n]['time_ratio']):.2f}" for n in ("2", "4"))
    text = " ".join(FIGURES.split())
    assert f"takes {by_2} of its time with keys and values pooled by 2, {by_4} by 4." in text


def test_what_far_sight_is_worth_is_the_measured():
    rows = {row["reduction"]: row for row in measured("context_edaformer_t_128x256_cpu1")}
    kinds = (
        "paired_miou",
        "wheat or barley",
        "hill pasture or lowland pasture",
        "red convoy or blue convoy",
        "other_miou",
    )
    labels = {
        "base": "EDAFormer-T, base",
        '{"encoder": [2, 2, 1, 1]}': "encoder alone reduced",
        '{"decoder.0": 2}': "decoder, 1/32 alone",
        '{"decoder.1": 2}': "decoder, 1/16 alone",
        '{"decoder.2": 2}': "decoder, 1/8 alone",
        "none": "seven convolutions",
    }
    for reduction, row in rows.items():
        cells = [f"{float(row['gmacs']):.3f}", *(f"{float(row[kind]):.4f}" for kind in kinds)]
        assert f"| {labels.get(reduction, reduction)} | {' | '.join(cells)} |" in FIGURES
    base, near = (float(rows[name]["paired_miou"]) for name in ("base", "none"))
    assert near < 1 / 3 < base - 0.15, "what the landscapes are for"
    lost = {name: 100 * (base - float(rows[name]["paired_miou"])) for name in ("decoder", "optimal", "fast")}
    assert f"lose {min(lost.values()):.0f} to {max(lost.values()):.0f} points" in " ".join(FIGURES.split())
    harmless = [base - float(rows[name]["paired_miou"]) for name in labels if name not in ("none", '{"decoder.1": 2}')]
    assert max(harmless) < 0.005, "half a point"
