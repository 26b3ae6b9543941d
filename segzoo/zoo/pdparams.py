"""Read paddle's `.pdparams` without paddle and without running anything that is in the file.

A `.pdparams` is a pickle of {name: numpy array}, plus "StructuredToParameterName@@" (paddle's own names, of no use
here) and, below pickle protocol 4, "UnpackBigParamInfor@@": how arrays of 2**30 bytes or more were cut into slices.
A pickle is a program; this reader offers it five names, each a stand-in made for one load that only notes its
arguments, and builds the arrays afterwards. Not even numpy sees anything that has not been checked. What the program
costs is known before it is followed (`pickles`), and its arrays have no more bytes than the file.
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

from .._errors import UnreadableError, WeightsError, first_line, shown
from .archives import open_archive
from .pickles import check_pickle

NAMES = "StructuredToParameterName@@"
SLICES = "UnpackBigParamInfor@@"  # spelled as in paddle
DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "b1")
MAX_DIMS = 64  # numpy's own limit
# Of a .pdparams in a zip archive, which deflate makes smaller by a tenth: how much larger than the archive it may be.
MAX_RATIO, SMALL = 1.25, 16 << 20


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a `.pdparams` file, or of the one `.pdparams` in a zip archive; raises WeightsError."""
    try:
        if path.suffix != ".zip":
            return _read(path.open, path.stat().st_size, str(path))
        with open_archive(path) as archive:
            info = _member(archive, path)
            return _read(lambda *_: archive.open(info), info.file_size, f"{path} ({info.filename[:200]})")
    except WeightsError:
        raise
    except (
        Exception
    ) as error:  # beside what zipfile and the disk are known to raise: a damaged archive may raise anything
        raise UnreadableError(
            f"{path} is damaged or no weights archive ({first_line(error)}); download or copy it again"
        ) from error


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """The archive's one .pdparams, whose size is that of numbers and not of a bomb."""
    members = [info for info in archive.infolist() if info.filename.endswith(".pdparams")]
    if len(members) != 1:
        what = ", ".join(info.filename for info in members)[:200] or "none"
        raise WeightsError(f"{path} must hold exactly one .pdparams file, not {what}; unpack and name the file")
    (info,) = members
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WeightsError(f"{path} is compressed in an unusual way; unpack it and name the .pdparams file")
    if info.file_size > path.stat().st_size * MAX_RATIO + SMALL:
        raise WeightsError(
            f"{path} unpacks to {info.file_size:,} bytes, which weights of its size never do, so it was not unpacked; "
            "get the file from its official source"
        )
    return info


def _read(open_file: Callable[..., IO[bytes]], size: int, source: str) -> dict[str, Tensor]:
    """`open_file("rb")` gives the pickle of `size` bytes, each time from its beginning."""
    try:
        with open_file("rb") as file:
            check_pickle(file, size)
        with open_file("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except _ForbiddenError as error:
        raise WeightsError(
            f"{source} asks for {first_line(error)}, which a .pdparams of arrays never needs, so it was not unpickled "
            "and nothing in it was run; get the file from its official source"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise UnreadableError(
            f"{source} is damaged or no .pdparams file ({type(error).__name__}: {first_line(error)}); download or copy "
            "it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{source} holds a {type(content).__name__}, not a dict of arrays; save layer.state_dict()")
    try:
        return _tensors(content, size)
    except Exception as error:  # whatever values the file gave to what is no array of numbers
        said = first_line(error) if isinstance(error, _ArrayError) else type(error).__name__
        raise UnreadableError(f"{source} holds more than arrays of numbers: {said}") from error


def _tensors(content: dict[Any, Any], size: int) -> dict[str, Tensor]:
    """Arrays become tensors one by one, so that no more than one is there twice; empties `content`."""
    content.pop(NAMES, None)
    slices = content.pop(SLICES, {})
    made: dict[int, tuple[_Array, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for key in list(content):
        value = content.pop(key)
        if not isinstance(value, _Array):
            raise _ArrayError(f"a {type(value).__name__}")
        if id(value) not in made:  # two names of one array stay one
            array = _array(value)
            size -= array.nbytes
            if size < 0:
                raise _ArrayError("arrays that share their bytes")
            made[id(value)] = value, _tensor(array)
        tensors[_name(key)] = made[id(value)][1]
    made.clear()
    return _join(tensors, slices)


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
            raise _ArrayError(f"dtype {shown(self.code)}; only numbers and booleans are read")
        return np.dtype(self.order + self.code)


class _Array:
    """What a pickled numpy array says: shape, dtype, memory order and bytes."""

    state: object = ()

    def __setstate__(self, state: object) -> None:
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


def _latin1() -> Callable[[str, str], str]:
    def encode(text: str, encoding: str) -> str:  # how protocol 2 spells bytes
        if encoding != "latin1":
            raise _ForbiddenError(f"codec {shown(encoding)}")
        return text  # made bytes where an array needs them, or few bytes of a file could ask for very many

    return encode


def _array(value: _Array) -> np.ndarray:
    """The array that was pickled, over the bytes in `value`, which gives them up."""
    state, value.state = value.state, ()
    if not isinstance(state, tuple) or len(state) != 5:
        raise _ArrayError("an array without content")
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, _Dtype) or not _is_shape(shape):
        raise _ArrayError(f"an array with the shape {shown(shape)}")
    if isinstance(data, str):  # bytes, read as latin1
        data = data.encode("latin1")
    expected = math.prod(shape) * dtype.checked().itemsize
    if not isinstance(data, (bytes, bytearray)) or len(data) != expected:
        raise _ArrayError(f"an array whose bytes do not fill its shape {shown(shape)}")
    return np.frombuffer(data, dtype.checked()).reshape(shape, order="F" if fortran else "C")


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, tuple)
        and len(shape) <= MAX_DIMS
        and all(type(side) is int and 0 <= side < 2**63 for side in shape)
    )


def _join(tensors: dict[str, Tensor], slices: object) -> dict[str, Tensor]:
    """Put arrays together that paddle has cut; `slices` is {name: {"OriginShape": shape, "slices": [part names]}}."""
    if not isinstance(slices, Mapping):
        raise _ArrayError(f"{SLICES} is no dict")
    for key, info in slices.items():
        try:
            parts, shape = [tensors.pop(part) for part in info["slices"]], tuple(info["OriginShape"])
            tensors[_name(key)] = torch.cat(parts).reshape(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _ArrayError(
                f"the slices of {shown(key)} do not fit together ({type(error).__name__}: {first_line(error)})"
            ) from error
    return tensors


def _tensor(array: np.ndarray) -> Tensor:
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")  # owned, writable, native
    if array.dtype == np.uint16:  # numpy has no bfloat16: paddle stores the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise _ArrayError(f"the name {shown(key)}")
    return key
