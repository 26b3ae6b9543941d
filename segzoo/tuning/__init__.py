"""Which reduction for a budget: measured on a user's own images, without labels.

The files in the order of the walk: `candidates` (what may be set where), `macs` (what it saves, on the meta device),
`changes` (how many mask pixels it changes), `search` (plans out of both), `resources` (time and memory, measured),
`record` (what came out), and `fitting`, the walk itself.
"""

from .fitting import fit_reduction
from .record import Point, ReductionFit

__all__ = ["Point", "ReductionFit", "fit_reduction"]
