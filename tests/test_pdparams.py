"""The `.pdparams` reader reads what paddle writes, refuses everything else, and never runs anything."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from segzoo.zoo.checkpoint import WeightsError, read_state_dict
from segzoo.zoo.pdparams import _Unpickler, read_pdparams

RAN = "ran"  # file name that a malicious pickle would create


def write(folder: Path, content: object, protocol: int = 4, name: str = "model.pdparams") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


STATE = {
    "weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
    "big_endian": np.arange(5, dtype=">f4"),
    "half": np.array([0.5, -2.0], dtype=np.float16),
    "counter": np.array(7, dtype=np.int64),
    "flags": np.array([True, False]),
    "bytes": np.arange(256, dtype=np.uint8),
}


@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy 2's names", "numpy 1's names"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_arrays(tmp_path, protocol, numpy_1):
    data = pickle.dumps({**STATE, "StructuredToParameterName@@": {"weight": "conv_0.w_0"}}, protocol=protocol)
    if protocol < 4:  # names are lines of text there; protocol 4 has their length before them
        assert b"cnumpy._core.multiarray\n_reconstruct\n" in data
        if numpy_1:
            data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    elif numpy_1:
        new, old = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
        frame = int.from_bytes(data[3:11], "little")
        assert new in data
        data = data[:3] + (frame - 1).to_bytes(8, "little") + data[11:].replace(new, old)
    state = read_pdparams(write(tmp_path, data))
    assert list(state) == list(STATE)
    for key, array in STATE.items():
        assert state[key].shape == array.shape
        assert np.array_equal(state[key].numpy(), array)
        assert state[key].is_contiguous()
        state[key].zero_()  # own memory


def test_reads_ordered_dicts(tmp_path):
    state = read_pdparams(write(tmp_path, OrderedDict(STATE), protocol=2))
    assert torch.equal(state["weight"], torch.from_numpy(STATE["weight"]))


def test_reads_bfloat16_bits(tmp_path):
    values = torch.tensor([[1.0, -2.5], [3.0e38, 0.0]]).bfloat16()
    bits = values.view(torch.int16).numpy().view(np.uint16)
    state = read_pdparams(write(tmp_path, {"weight": bits}))
    assert state["weight"].dtype == torch.bfloat16
    assert torch.equal(state["weight"], values)


def test_reads_python_2_strings_as_bytes(tmp_path):
    # What Python 2 wrote: text opcodes (U) for the array's raw bytes and for the dtype's letters.
    array = np.array([1.5, -2.0], dtype="<f4")
    data = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + array.tobytes() + b"tbs."
    )
    assert np.array_equal(read_pdparams(write(tmp_path, data))["w"].numpy(), array)


def test_joins_the_slices_of_big_arrays(tmp_path):
    whole = np.arange(60, dtype=np.float32)
    content = {
        "first": np.ones(3, dtype=np.float32),
        "big@@.0": whole[:25],
        "big@@.1": whole[25:50],
        "big@@.2": whole[50:],
        "UnpackBigParamInfor@@": {
            "big": {"OriginShape": (3, 4, 5), "slices": ["big@@.0", "big@@.1", "big@@.2"]},
        },
        "StructuredToParameterName@@": {},
    }
    state = read_pdparams(write(tmp_path, content, protocol=2))
    assert set(state) == {"first", "big"}
    assert np.array_equal(state["big"].numpy(), whole.reshape(3, 4, 5))


@pytest.mark.parametrize(
    "info",
    [
        {"big": {"OriginShape": (3, 4, 5), "slices": ["missing"]}},
        {"big": {"OriginShape": (7,), "slices": ["w"]}},
        {"big": {"slices": ["w"]}},
        {"big": None},
        ["big"],
    ],
    ids=str,
)
def test_slices_that_do_not_fit_are_refused(tmp_path, info):
    with pytest.raises(WeightsError, match="UnpackBigParamInfor@@|slices of 'big'"):
        read_pdparams(write(tmp_path, {"w": np.zeros(3, dtype=np.float32), "UnpackBigParamInfor@@": info}))


# ---- archives


def archive(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "weights.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_reads_the_one_pdparams_of_an_archive(tmp_path):
    path = archive(tmp_path, {"backbone/model.pdparams": pickle.dumps(STATE), "backbone/readme.txt": b"hello"})
    assert torch.equal(read_state_dict(path)["weight"], torch.from_numpy(STATE["weight"]))


def test_other_archives_are_refused(tmp_path):
    data = pickle.dumps(STATE)
    with pytest.raises(WeightsError, match="exactly one .pdparams file, not none"):
        read_state_dict(archive(tmp_path, {"readme.txt": b"hello"}))
    with pytest.raises(WeightsError, match="not a.pdparams, b.pdparams"):
        read_state_dict(archive(tmp_path, {"a.pdparams": data, "b.pdparams": data}))
    with pytest.raises(WeightsError, match="damaged"):
        read_state_dict(write(tmp_path, b"PK\x03\x04 not really", name="broken.zip"))
    path = archive(tmp_path, {"model.pdparams": data})
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match="damaged"):
        read_state_dict(path)


# ---- what must not be read


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("where", ["top", "value", "key", "names", "array"])
def test_a_file_that_calls_something_is_refused_and_nothing_runs(tmp_path, protocol, where):
    ran = tmp_path / RAN
    bad = Call(touch, str(ran))
    content = {
        "top": bad,
        "value": {"weight": bad},
        "key": {(bad, 1): 1},
        "names": {"StructuredToParameterName@@": bad},
        "array": {"weight": np.array([bad, None], dtype=object)},
    }[where]
    with pytest.raises(WeightsError, match="nothing in it was run") as error:
        read_state_dict(write(tmp_path, content, protocol))
    assert "touch" in str(error.value)
    assert not ran.exists()
    # The same file does run when it is trusted: the test could fail.
    pickle.loads((tmp_path / "model.pdparams").read_bytes())
    assert ran.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "os.system",
        "posix.system",
        "numpy.load",
        "numpy.core.multiarray.scalar",
        "numpy.f2py.main",
        "torch.load",
        "collections.OrderedDict.fromkeys",
        "collections.namedtuple",
        "_codecs.decode",
        "_codecs.lookup",
        "pickle.loads",
        "copyreg._reconstructor",
    ],
)
def test_no_other_name_is_resolved(tmp_path, name):
    module, _, function = name.rpartition(".")
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(function)])
    with pytest.raises(WeightsError, match="nothing in it was run") as error:
        read_pdparams(write(tmp_path, data + function.encode() + b"\x93."))
    assert name in str(error.value)
    with pytest.raises(WeightsError, match="nothing in it was run"):
        read_pdparams(write(tmp_path, f"c{module}\n{function}\n.".encode()))


def test_other_tricks_are_refused(tmp_path):
    tricks = {
        "persistent id": b"\x80\x02U\x01xQ.",
        "extension code": b"\x80\x02\x82\x01.",
        "codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        "attribute of a function": b"\x80\x02cnumpy\ndtype\n}X\x08\x00\x00\x00__code__K\x01sb.",
        "attribute of a class": b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00xK\x01s\x86b.",
    }
    for name, data in tricks.items():
        with pytest.raises(WeightsError):
            read_pdparams(write(tmp_path, data))
            pytest.fail(f"{name} was accepted")


def test_what_a_file_does_to_the_readers_names_ends_with_it(tmp_path):
    # BUILD with (None, {"__doc__": 1}) sets an attribute of the stand-in for numpy.dtype.
    path = write(tmp_path, b"\x80\x02cnumpy\ndtype\nN}X\x07\x00\x00\x00__doc__K\x01s\x86b0}.")
    assert read_pdparams(path) == {}
    fresh = _Unpickler(io.BytesIO(b"N."), encoding="latin1")
    assert fresh.names["numpy", "dtype"].__doc__ is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([{}, 1], dtype=object), "dtype 'O8'"),
        (np.array(["text"]), "dtype 'U4'"),
        (np.array([b"text"]), "dtype 'S4'"),
        (np.array([1 + 2j]), "dtype 'c16'"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "dtype 'M8'"),
        (3.0, "a float"),
        ({"LR_Scheduler": 1}, "a dict"),
        (None, "a NoneType"),
    ],
    ids=str,
)
def test_values_that_are_no_numbers_are_refused(tmp_path, value, words):
    with pytest.raises(WeightsError) as error:
        read_pdparams(write(tmp_path, {"weight": np.zeros(2), "other": value}))
    assert words in str(error.value)
    assert "model.pdparams" in str(error.value)


def test_structured_dtypes_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="structured dtype"):
        read_pdparams(write(tmp_path, {"weight": np.zeros(2, dtype=[("a", "f4"), ("b", "O")])}))


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds a list"), (np.zeros(3), "holds a"), ({1: np.zeros(3)}, "the name 1")],
    ids=["list", "array", "number as name"],
)
def test_other_contents_are_refused(tmp_path, content, words):
    with pytest.raises(WeightsError, match=words):
        read_pdparams(write(tmp_path, content))


def test_an_array_that_lies_about_its_size_is_refused(tmp_path):
    data = pickle.dumps({"w": np.arange(4, dtype=np.float32)}, protocol=2)
    assert data.count(b"K\x04\x85") == 1
    with pytest.raises(WeightsError, match="do not fill its shape"):
        read_pdparams(write(tmp_path, data.replace(b"K\x04\x85", b"K\x05\x85")))


def test_an_array_of_negative_sides_is_refused(tmp_path):
    """(-2, -2) has four elements, as the bytes have, and is no shape."""
    data = pickle.dumps({"w": np.arange(4, dtype=np.float32).reshape(2, 2)}, protocol=2)
    two, minus_two = b"K\x02K\x02\x86", b"J\xfe\xff\xff\xffJ\xfe\xff\xff\xff\x86"
    assert data.count(two) == 1
    with pytest.raises(WeightsError, match=r"an array with the shape \(-2, -2\)"):
        read_pdparams(write(tmp_path, data.replace(two, minus_two)))


@pytest.mark.parametrize("protocol", [2, 4])
def test_truncated_files_are_refused(tmp_path, protocol):
    data = pickle.dumps(STATE, protocol=protocol)
    for end in range(1, len(data), max(1, len(data) // 60)):
        with pytest.raises(WeightsError, match="model.pdparams"):
            read_state_dict(write(tmp_path, data[:end]))
    with pytest.raises(WeightsError, match="empty"):
        read_state_dict(write(tmp_path, b""))


def test_damaged_files_are_refused_or_read_but_nothing_else(tmp_path):
    data = pickle.dumps(STATE, protocol=4)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            damaged[position] = rng.integers(0, 256)
        try:
            state = read_pdparams(write(tmp_path, bytes(damaged)))
        except WeightsError:
            continue
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
