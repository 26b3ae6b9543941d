"""`segzoo demo`: forms take turns, a busy machine is named as one, and the pictures show what a reduction changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from segzoo.cli import demo, main
from segzoo.cli.demo import Timing, compare_times
from segzoo.visualize import CHANGES, changed_pixels

SIDES = (256, 512)


class Machine:
    """A clock, and forms that take so many seconds of it; `slow_down` says how much longer everything takes by now."""

    def __init__(self, slow_down=lambda now: 1.0):
        self.now, self.slow_down, self.order = 0.0, slow_down, []

    def form(self, name: str, seconds: float):
        def run(turn: int) -> None:
            self.order.append((turn, name))
            self.now += seconds * self.slow_down(self.now)

        return run

    def clock(self) -> float:
        return self.now


def timed(machine: Machine, rounds: int) -> dict[str, Timing]:
    forms = {"base": machine.form("base", 2.0), "fast": machine.form("fast", 1.0)}
    return compare_times(forms, rounds, as_json=True, clock=machine.clock)


def test_forms_take_turns():
    machine = Machine()
    timings = timed(machine, 3)
    assert [name for turn, name in machine.order if turn == 0] == ["base", "fast", "base"]
    assert [turn for turn, _ in machine.order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert timings == {"base": Timing(2.0, 1.0, 1.0, 1.0), "fast": Timing(1.0, 0.5, 0.5, 0.5)}


def test_every_second_round_runs_backwards():
    machine = Machine()
    forms = {name: machine.form(name, 1.0) for name in "abc"}
    compare_times(forms, 2, as_json=True, clock=machine.clock)
    assert "".join(name for _, name in machine.order) == "abca" + "acba"


def test_a_machine_that_slows_down_leaves_the_ratio():
    """Five times slower over the run, which a form after the other would take for a difference of forms."""
    machine = Machine(lambda now: 1 + now / 50)
    timings = timed(machine, 12)
    assert machine.slow_down(machine.now) > 3
    assert timings["fast"].ratio == pytest.approx(0.5, rel=0.01)
    assert timings["base"].low > 1  # the second of two equal runs took longer, and the table shows it


def test_spread_is_the_middle_half():
    steps = iter([2, 1, 2] * 3 + [2, 9, 2] + [2, 3, 2])  # seconds; ratios 0.5, 0.5, 0.5, 4.5, 1.5
    machine = Machine()

    def run(turn: int) -> None:
        machine.now += next(steps)

    timing = compare_times({"base": run, "fast": run}, 5, as_json=True, clock=machine.clock)["fast"]
    assert (timing.low, timing.ratio, timing.high) == (0.5, 0.5, 1.5)


def test_what_changed_is_coloured_by_what_came_of_it():
    before, after, truth = (np.zeros((9, 30), np.uint8) for _ in range(3))
    after[4, [4, 14, 24]] = 1  # three pixels change: to the right class, to a wrong one, and from wrong to wrong
    truth[4, [4, 24]] = [1, 2]
    image = np.full((9, 30, 3), 90, np.uint8)
    drawn = np.asarray(changed_pixels(image, before, after, truth))
    colours = dict(zip(CHANGES.classes, CHANGES.palette, strict=True))
    assert tuple(drawn[4, 4]) == colours["changed: right now"]
    assert tuple(drawn[4, 14]) == colours["changed: wrong now"]
    assert tuple(drawn[4, 24]) == colours["changed: wrong before and now"]
    assert tuple(drawn[3, 3]) == colours["changed: right now"]  # with its neighbours
    assert (drawn == (190, 190, 190)).all(axis=2).sum() == 9 * 30 - 3 * 9


def test_worse_lies_on_top():
    before, after, truth = (np.zeros((3, 4), np.uint8) for _ in range(3))
    after[1, 1:3], truth[1, 1] = 1, 1
    drawn = np.asarray(changed_pixels(np.zeros((3, 4, 3), np.uint8), before, after, truth))
    assert tuple(drawn[1, 1]) == tuple(drawn[1, 2]) == CHANGES.palette[CHANGES.classes.index("changed: wrong now")]
    assert tuple(drawn[1, 0]) == CHANGES.palette[CHANGES.classes.index("changed: right now")]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "SIZE", SIDES)
    monkeypatch.setattr(demo, "SEEDS", demo.SEEDS[:1])
    monkeypatch.setattr(demo, "ROUNDS", 2)


def test_report(tmp_path, capsys, small):
    (tmp_path / "scene_1.png").write_text("of the last run")
    assert main(["demo", "-o", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    table = {row["reduction"]: row for row in report["table"]}
    assert list(table) == ["base", "decoder", "optimal", "fast"]
    assert table["base"]["mIoU"] > 0.7
    assert table["fast"]["mIoU"] == pytest.approx(table["base"]["mIoU"], abs=0.02)
    assert table["base"]["GMACs"] > table["decoder"]["GMACs"] > table["optimal"]["GMACs"] > table["fast"]["GMACs"]
    assert table["base"]["changed"] == 0 < table["fast"]["changed"] < 0.05
    assert all(len(row["spread"]) == 2 and row["time"] > 0 for row in report["table"])
    assert isinstance(report["noisy"], bool)
    assert [path.name for path in tmp_path.iterdir()] == ["scene_1.png"]
    with Image.open(report["files"][0]) as sheet:
        assert sheet.width == 3 * SIDES[1] and sheet.height > 3 * SIDES[0]


QUIET_120 = """\
edaformer_t.scenes on 1 scenes never seen in training, 256x512:

reduction  mIoU    changed  GMACs         ms/image  time against base
base       0.8762  -        3.986 (100%)  100.0     1.00 (0.98 to 1.02)
decoder    0.8762  0.12%    3.782 (95%)   100.0     1.00 (0.98 to 1.02)
fast       0.8789  0.32%    3.030 (76%)   100.0     1.00 (0.98 to 1.02)

Times: medians of 2 rounds in which all take turns, in brackets the middle half of the rounds; base is compared with
itself. Changed: pixels of another class than base gives them.

Image, truth and masks, and what each reduction changed:
  out/scene_1.png

The weights have seen synthetic scenes alone: not for photographs, for which `segzoo predict --model
segformer_b0.nvidia_ade20k_512` (anything; not commercial) or `--model rtformer_slim.cityscapes` (streets; Apache-2.0)
gets weights.
"""

BUSY_80 = """\
edaformer_t.scenes on 1 scenes never seen in training, 256x512:

reduction  mIoU    changed  GMACs         ms/image  time against base
base       0.8762  -        3.986 (100%)  100.0     1.00 (0.70 to 1.40)
decoder    0.8762  0.12%    3.782 (95%)   100.0     1.00 (0.70 to 1.40)
fast       0.8789  0.32%    3.030 (76%)   100.0     1.00 (0.70 to 1.40)

Times: medians of 2 rounds in which all take turns, in brackets the middle half
of the rounds; base is compared with itself. Changed: pixels of another class
than base gives them.
This machine is busy: base takes 0.70 to 1.40 times its own time, so no time
here is to be trusted. The other columns do not depend on it.

Image, truth and masks, and what each reduction changed:
  out/scene_1.png

The weights have seen synthetic scenes alone: not for photographs, for which
`segzoo predict --model segformer_b0.nvidia_ade20k_512` (anything; not
commercial) or `--model rtformer_slim.cityscapes` (streets; Apache-2.0) gets
weights.
"""


@pytest.mark.parametrize(
    ("low", "high", "width", "expected"), [(0.98, 1.02, 120, QUIET_120), (0.7, 1.4, 80, BUSY_80)], ids=["quiet", "busy"]
)
def test_what_is_printed(tmp_path, capsys, monkeypatch, small, low, high, width, expected):
    timings = {preset: Timing(0.1, 1.0, low, high) for preset in demo.PRESETS}
    figures = {"base": (0.8762, 0, 3.986), "decoder": (0.8762, 0.0012, 3.782), "fast": (0.8789, 0.0032, 3.03)}
    table = [
        {"reduction": name, "mIoU": miou, "changed": changed, "GMACs": gmacs, "ms/image": 100.0, "time": 1.0}
        | {"spread": [low, high]}
        for name, (miou, changed, gmacs) in figures.items()
    ]
    monkeypatch.setattr(demo, "compare_times", lambda *args, **options: timings)
    monkeypatch.setattr(demo, "_table", lambda *args: table)
    monkeypatch.setattr(demo, "draw_sheet", lambda *args: Image.new("RGB", (1, 1)))
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "-o", "out"]) == 0
    assert capsys.readouterr().out == expected
