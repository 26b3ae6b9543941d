"""Read paddle's `.pdparams` without paddle and without running anything that is in the file.

A `.pdparams` is a pickle of {name: numpy array}, plus "StructuredToParameterName@@" (paddle's own names, of no use
here) and, below pickle protocol 4, "UnpackBigParamInfor@@": how arrays of 2**30 bytes or more were cut into slices.
A pickle is a program; this reader offers it five names, each a stand-in made for one load that only notes its
arguments, and builds the arrays afterwards. Not even numpy sees anything that has not been checked.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .._errors import WeightsError

NAMES = "StructuredToParameterName@@"
SLICES = "UnpackBigParamInfor@@"  # spelled as in paddle
DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "b1")


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a `.pdparams` file, or of the one `.pdparams` in a zip archive; raises WeightsError."""
    try:
        if path.suffix != ".zip":
            with path.open("rb") as file:
                return _read(file, str(path))
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".pdparams")]
            if len(members) != 1:
                what = ", ".join(info.filename for info in members) or "none"
                raise WeightsError(f"{path} must hold exactly one .pdparams file, not {what}; unpack and name the file")
            with archive.open(members[0]) as file:
                return _read(file, f"{path} ({members[0].filename})")
    except WeightsError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise WeightsError(f"{path} is damaged or no weights archive ({error}); download or copy it again") from error


def _read(file: IO[bytes], source: str) -> dict[str, Tensor]:
    try:
        content = _Unpickler(file, encoding="latin1").load()
    except _ForbiddenError as error:
        raise WeightsError(
            f"{source} asks for {error}, which a .pdparams of arrays never needs, so it was not unpickled and nothing "
            "in it was run; get the file from its official source"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise WeightsError(
            f"{source} is damaged or no .pdparams file ({type(error).__name__}: {error}); download or copy it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{source} holds a {type(content).__name__}, not a dict of arrays; save layer.state_dict()")
    content = dict(content)
    content.pop(NAMES, None)
    slices = content.pop(SLICES, {})
    try:
        arrays = {key: _array(value) for key, value in content.items()}
        return {_name(key): _tensor(array) for key, array in _join(arrays, slices).items()}
    except _ArrayError as error:
        raise WeightsError(f"{source} holds more than arrays of numbers: {error}") from error


class _ForbiddenError(Exception):
    """A name that the file has no business with."""


class _ArrayError(Exception):
    """A value that is no array of numbers."""


class _Dtype:
    """What a pickled numpy dtype says: a letter and size such as "f4", and its byte order."""

    def __init__(self, code: object, *flags: object):
        self.code = code
        self.order = "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]
        if any(part is not None for part in state[2:5]):  # sub-array, field names, fields
            raise _ForbiddenError("a structured dtype")

    def checked(self) -> np.dtype:
        if self.code not in DTYPES or self.order not in ("<", ">", "|", "="):
            raise _ArrayError(f"dtype {self.code!r}; only numbers and booleans are read")
        return np.dtype(self.order + self.code)


class _Array:
    """What a pickled numpy array says: shape, dtype, memory order and bytes."""

    state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], *, encoding: str):
        super().__init__(file, encoding=encoding)
        # Made anew for each load, so that nothing that a file does to them outlives it. The two classes come as
        # functions for the same reason.
        self.names: dict[tuple[str, str], object] = {
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): lambda *args: _Dtype(*args),
            ("_codecs", "encode"): _latin1(),
            ("collections", "OrderedDict"): OrderedDict,
        }
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self.names[module, "_reconstruct"] = lambda *args: _Array()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise _ForbiddenError(f"{module}.{name}")
        return self.names[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise _ForbiddenError("an object outside the file")


def _latin1() -> Callable[[str, str], bytes]:
    def encode(text: str, encoding: str) -> bytes:  # how protocol 2 spells bytes
        if encoding != "latin1":
            raise _ForbiddenError(f"codec {encoding!r}")
        return text.encode("latin1")

    return encode


def _array(value: object) -> np.ndarray:
    if not isinstance(value, _Array):
        raise _ArrayError(f"a {type(value).__name__}")
    try:
        _, shape, dtype, fortran, data = value.state
    except ValueError:
        raise _ArrayError("an array without content") from None
    if not isinstance(dtype, _Dtype) or not _is_shape(shape):
        raise _ArrayError(f"an array with the shape {shape!r}")
    if isinstance(data, str):  # Python 2's bytes, read as latin1
        data = data.encode("latin1")
    expected = math.prod(shape) * dtype.checked().itemsize
    if not isinstance(data, (bytes, bytearray)) or len(data) != expected:
        raise _ArrayError(f"an array whose bytes do not fill its shape {shape}")
    return np.frombuffer(data, dtype.checked()).reshape(shape, order="F" if fortran else "C")


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)


def _join(arrays: dict[str, np.ndarray], slices: object) -> dict[str, np.ndarray]:
    """Put arrays together that paddle has cut; `slices` is {name: {"OriginShape": shape, "slices": [part names]}}."""
    if not isinstance(slices, Mapping):
        raise _ArrayError(f"{SLICES} is no dict")
    for key, info in slices.items():
        try:
            parts, shape = [arrays.pop(part) for part in info["slices"]], tuple(info["OriginShape"])
            arrays[key] = np.concatenate(parts).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise _ArrayError(f"the slices of {key!r} do not fit together ({type(error).__name__}: {error})") from error
    return arrays


def _tensor(array: np.ndarray) -> Tensor:
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")  # owned, writable, native
    if array.dtype == np.uint16:  # numpy has no bfloat16: paddle stores the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise _ArrayError(f"the name {key!r}")
    return key
