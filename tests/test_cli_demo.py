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


@pytest.mark.parametrize(("low", "high"), [(0.98, 1.02), (0.7, 1.4)])
def test_a_busy_machine_is_named_as_one(tmp_path, capsys, monkeypatch, small, low, high):
    timings = {preset: Timing(0.1, 1.0, low, high) for preset in demo.PRESETS}
    monkeypatch.setattr(demo, "compare_times", lambda *args, **options: timings)
    assert main(["demo", "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "never seen in training, 256x512" in text and f"1.00 ({low:.2f} to {high:.2f})" in text
    assert ("This machine is busy: base takes 0.70 to 1.40 times its own time" in text) == (high > 1.1)
    assert "not for photographs" in text and "rtformer_slim.cityscapes" in text
    assert max(map(len, text.split("The weights have seen")[0].splitlines())) <= 120
