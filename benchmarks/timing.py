"""Forms of the same work timed in turn, round by round, so that a busy machine hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(forms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def faster(seconds: list[float], than: list[float]) -> dict[str, float]:
    """How many times as fast as another form, over the rounds: median, lowest, highest."""
    ratios = [other / own for own, other in zip(seconds, than, strict=True)]
    return {
        "speed_up_median": round(statistics.median(ratios), 3),
        "speed_up_min": round(min(ratios), 3),
        "speed_up_max": round(max(ratios), 3),
    }
