"""A folded, reduced model run by something else: engines in this process, and export bundles in files.

`compile` and `load_engine` give an `Engine`, which `segzoo.predict` takes in place of a model; `export` writes a file.
"""

from .bundles import export, load_engine
from .compiling import compile
from .engine import ENGINES, PRECISIONS, Engine

__all__ = ["ENGINES", "PRECISIONS", "Engine", "compile", "export", "load_engine"]
