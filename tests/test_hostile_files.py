"""Weight files that lie: every one is a WeightsError that names it, in bounded memory, and the model is as it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import segzoo
from segzoo.zoo.checkpoint import read_state_dict
from segzoo.zoo.pickles import PickleError, check_pickle

NAME = "encoder.stages.0.norm.weight"  # a late one would do as well: nothing is assigned before all are checked
LAST = "decoder.classifier.bias"


def fresh(name: str = "test_edaformer", seed: int = 0, **options):
    torch.manual_seed(seed)
    return segzoo.create_model(name, **options).eval()


def digest(model: torch.nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model.state_dict().values()]


def pickled(state: object, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(segzoo.zoo.checkpoint.WeightsError) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 2000
    return str(error.value)


# --- tensors that are no values ---------------------------------------------------------------------------------------


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0] = value
        return tensor

    return changed


LIES = {
    "meta": (lambda tensor: tensor.to("meta"), "is on the meta device, a shape without values"),
    "sparse": (lambda tensor: tensor.to_sparse(), "is sparse_coo, not dense"),
    "NaN": (with_one(float("nan")), "not finite in torch.float32"),
    "infinite": (with_one(float("-inf")), "not finite in torch.float32"),
    "too large": (lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64), "not finite in torch.float32"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "holds torch.complex64, where torch.float32 is needed"),
    "boolean": (lambda tensor: tensor > 0, "holds torch.bool, where torch.float32"),
    "integer": (lambda tensor: tensor.long(), "holds torch.int64, where torch.float32"),
    "zero-sized": (lambda tensor: tensor[:0], r"is \(0,\), needs"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about sparse and quantised tensors
@pytest.mark.parametrize("lie", [*LIES, "quantised"])
@pytest.mark.parametrize("way", ["mapping", "file", "saved"])
def test_tensors_that_are_no_values(tmp_path, lie, way):
    change, message = {**LIES, "quantised": (quantised, "is quantised")}[lie]
    state = fresh(seed=1).state_dict()
    state[LAST] = change(state[LAST])
    model = fresh()
    before = digest(model)
    path = tmp_path / "pytorch_model.bin"
    if way == "saved":
        segzoo.save_pretrained(model, tmp_path)
        (tmp_path / "model.safetensors").unlink()
    if way != "mapping":
        torch.save(state, path)
    with pytest.raises(segzoo.zoo.checkpoint.WeightsError, match=message) as error:
        if way == "saved":  # beside a valid config: built from the file's own tensors
            segzoo.create_model(f"local-dir:{tmp_path}")
        else:
            segzoo.load_weights(model, path if way == "file" else state)
    assert LAST in str(error.value)
    assert digest(model) == before


def test_numbers_that_are_meant(tmp_path):
    """Half and double weights, counters kept as floats, arrays that are read-only or run backwards."""
    trained = fresh(seed=1)
    state = trained.state_dict()
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    variants = {
        "halves": {key: value.half() for key, value in state.items()},
        "doubles": {key: value.double() for key, value in state.items()},
        "int32 counter": {**state, counter: state[counter].int()},
        "arrays": {key: value.numpy()[::-1][::-1] if value.ndim else value.numpy() for key, value in state.items()},
    }
    for array in variants["arrays"].values():
        array.flags.writeable = False
    for name, variant in variants.items():
        model = fresh()
        segzoo.load_weights(model, variant)
        tolerance = 1e-3 if name == "halves" else 0
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[key], rtol=tolerance, atol=tolerance)
    with pytest.raises(segzoo.SegzooError, match="must hold whole numbers"):
        segzoo.load_weights(fresh(), {**state, counter: torch.tensor(0.5)})
    with pytest.raises(segzoo.SegzooError, match="is no array of numbers"):
        segzoo.load_weights(fresh(), {**state, counter: np.array(["a"])})


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_names_that_are_no_texts(tmp_path, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap({0: torch.zeros(3), "a": torch.zeros(1)}), path)
    model = fresh()
    for source in (path, torch.load(path)):
        with pytest.raises(segzoo.SegzooError, match="the name 0 is no text"):
            segzoo.load_weights(model, source)


def test_shapes_that_the_rules_for_names_stumble_over():
    """Official names with tensors of other shapes: splitting and joining them does not fail in torch's words."""
    official = {"block1.0.attn.kv.weight": torch.tensor(1.0), "patch_embed1.proj.weight": torch.zeros(3)}
    for name in ("test_mit", "test_segformer"):
        with pytest.raises(segzoo.SegzooError, match="does not fit"):
            segzoo.load_weights(fresh(name), official, adapt_in_chans=True)
    state = fresh().state_dict()
    first = fresh().first_conv
    with pytest.raises(segzoo.SegzooError, match="other shapes than their names say"):
        segzoo.load_weights(fresh(in_chans=4), {**state, first: torch.zeros(3, 0, 7, 7)}, adapt_in_chans=True)


# --- bytes that are wrong ---------------------------------------------------------------------------------------------

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2), "count": torch.tensor(3)}


def test_texts_are_no_weights(tmp_path):
    for body in (b"abc", b"a,b\n1,2\n", b"<!DOCTYPE html><html>", b"PK\x03\x04", b"\x80", b"\x80\x02.", b"\0" * 9000):
        for suffix in (".pth", ".pt", ".bin", ".safetensors", ".pdparams", ".zip"):
            path = tmp_path / f"weights{suffix}"
            path.write_bytes(body)
            refusal(path)


@pytest.mark.filterwarnings("ignore")  # of torch, about what it then refuses
@pytest.mark.parametrize("kind", ["pth", "old.pth", "pdparams", "safetensors", "zip"])
def test_every_flipped_byte_is_refused_or_read(tmp_path, kind):
    path = tmp_path / f"weights.{kind}"
    arrays = {key: tensor.numpy() for key, tensor in STATE.items()}
    if kind == "safetensors":
        save_file(STATE, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.pdparams", pickle.dumps(arrays, protocol=2))
    else:
        path.write_bytes(pickle.dumps(arrays, protocol=2) if kind == "pdparams" else pickled(STATE, old="old" in kind))
    whole = path.read_bytes()
    read_state_dict(path)
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), min(len(whole), 250), replace=False):
        damaged = bytearray(whole)
        damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except segzoo.SegzooError as error:
            assert str(path) in str(error)


def numpy_array(shape: bytes, data: bytes = b"C\x00", state: bytes | None = None) -> bytes:
    """Of a .pdparams: {"w": an array whose shape or whole state is what these opcodes make}."""
    dtype = b"cnumpy\ndtype\n\x8c\x02f4K\x00K\x01\x87R(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"\x80\x04}\x8c\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return made + (state or b"(K\x01" + shape + dtype + b"\x89" + data + b"t") + b"bs."


PAIRS = b"K\x01" + b"\x94h\x00\x86".replace(b"h\x00", b"2") * 60  # a pair of itself twice, 60 times: 2**60 in all


@pytest.mark.parametrize(
    "data",
    [
        numpy_array(b"(" + b"K\x00" * 65 + b"t"),
        numpy_array(b"K\x00\x8a\x09" + b"\0" * 7 + b"\x80\0" + b"\x86"),  # (0, 2**63)
        numpy_array(b"K\x01\x85", b"\x8c\x04\xe2\x82\xac1"),
        numpy_array(b"", state=b"K\x05"),
        numpy_array(b"", state=b"]"),
        numpy_array(PAIRS + b"\x85"),
        b"\x80\x04}\x8c\x01wK\x01s.",
        b"\x80\x04}]K\x01s.",
    ],
    ids=["65 dimensions", "2**63", "wide text", "state 5", "state []", "pairs", "number", "list as key"],
)
def test_arrays_of_pdparams_that_lie(tmp_path, data):
    path = tmp_path / "model.pdparams"
    path.write_bytes(data)
    refusal(path)


def test_bytes_that_many_arrays_share_are_not_copied_for_each(tmp_path):
    one = np.arange(4, dtype=np.float32)
    path = tmp_path / "model.pdparams"
    path.write_bytes(pickle.dumps({"a": one, "b": one}))
    state = read_state_dict(path)
    assert state["a"].data_ptr() == state["b"].data_ptr()
    whole = numpy_array(b"K\x04\x85", b"C\x10" + bytes(16) + b"q\x07")
    first = whole[3:-2]  # the name, the array
    again = first.replace(b"C\x10" + bytes(16) + b"q\x07", b"h\x07")
    many = b"".join(again.replace(b"\x01w", b"\x01" + bytes([letter]), 1) + b"s" for letter in range(65, 91))
    path.write_bytes(
        (b"\x80\x04}" + first + b"s" + many + b".")
        .replace(bytes(16), bytes(16) * 10000)
        .replace(b"C\x10", b"B" + struct.pack("<L", 160_000))
        .replace(b"K\x04\x85", b"M\x40\x9c\x85")
    )
    assert "share their bytes" in refusal(path)


# --- bombs ------------------------------------------------------------------------------------------------------------


def old_pth(state: bytes) -> bytes:
    """The old format of torch around a pickle of one's own."""
    head = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + state + pickle.dumps([], protocol=2)


def torch_zip(data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", b"3\n")
    return buffer.getvalue()


def long_list() -> bytes:
    """An archive of no bytes whose list of files says 200,000 times the same."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    return entry * 200_000 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(entry) * 200_000, 0, 0)


def zeros(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w") as member:
            for _ in range(200):
                member.write(bytes(1 << 20))
    return buffer.getvalue()


TUPLES = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s."
KEYS = b"\x80\x02}" + PAIRS.replace(b"\x94", b"") + b"K\x01s."
TEXT = b"X" + struct.pack("<L", 1 << 20) + b"a" * (1 << 20)
ENCODED = b"c_codecs\nencode\nq\x01" + TEXT + b"q\x02X\x06\0\0\0latin1q\x03\x86q\x04R"
# The same text made bytes 2,000 times.
ENCODES = b"\x80\x02](" + ENCODED + b"h\x01h\x04R" * 2000 + b"e."
BOMBS: dict[str, Callable[[], bytes]] = {
    "memo.pdparams": lambda: b"\x80\x02}r\xff\xff\xff\x0f.",
    "pairs.pdparams": lambda: numpy_array(PAIRS + b"\x85"),
    "keys.pdparams": lambda: KEYS,
    "tuples.pdparams": lambda: TUPLES,
    "dicts.pdparams": lambda: b"\x80\x02" + b"}" * 3_000_000 + b".",
    "sets.pdparams": lambda: b"\x80\x04" + b"\x8f" * 3_000_000 + b".",
    "wide.pdparams": lambda: b"\x80\x02X" + struct.pack("<L", 20_000_004) + b"a" * 20_000_000 + b"\xf0\x9f\x98\x80.",
    "bytes.pdparams": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "bytearray.pdparams": lambda: b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
    "frame.pdparams": lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    "encodes.pdparams": lambda: ENCODES,
    "zeros.zip": lambda: zeros("model.pdparams"),
    "list.zip": long_list,
    "keys.pth": lambda: torch_zip(KEYS),
    "tuples.pth": lambda: torch_zip(TUPLES),
    "encodes.pth": lambda: torch_zip(ENCODES),
    "bytearray.pth": lambda: torch_zip(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R."),
    "tensor.pth": lambda: torch_zip(b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x01\x85R."),
    "dicts.pth": lambda: torch_zip(b"\x80\x02" + b"}" * 3_000_000 + b"."),
    "zeros.pth": lambda: zeros("a/data.pkl"),
    "list.pth": lambda: torch_zip(b"")[:4] + long_list(),
    "keys.bin": lambda: old_pth(KEYS),
    "tuples.bin": lambda: old_pth(TUPLES),
    "encodes.bin": lambda: old_pth(ENCODES),
    "text.bin": lambda: old_pth(b"\x80\x02X\xff\xff\xff\x7fa."),
    "header.safetensors": lambda: struct.pack("<Q", 30_000_000) + json.dumps(
        {f"{n:06}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(430_000)}
    ).encode().ljust(30_000_000),
    "length.safetensors": lambda: struct.pack("<Q", 1 << 62) + b"{}",
}  # fmt: skip

# Reads each file with twice its size and 64 MiB of address space beyond what importing took, and is killed after 20 s
# of processor time.
READER = """
import json, os, resource, sys, time
from segzoo import SegzooError
from segzoo.zoo.checkpoint import read_state_dict
import safetensors.torch, torch
page = resource.getpagesize()
for path in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 21, resource.RLIM_INFINITY))
    taken = int(open("/proc/self/statm").read().split()[0]) * page
    room = 2 * os.path.getsize(path) + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
    try:
        read_state_dict(path)
        said = "read"
    except SegzooError as error:
        said = f"refused {type(error.__cause__).__name__}"
    except BaseException as error:
        said = f"foreign {type(error).__name__}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([os.path.basename(path), said]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_bombs_are_refused_in_bounded_memory_and_time(tmp_path):
    paths = [tmp_path / name for name in BOMBS]
    for path in paths:
        path.write_bytes(BOMBS[path.name]())
    result = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    said = dict(map(json.loads, result.stdout.splitlines()))
    assert said.keys() == BOMBS.keys(), result.stderr
    # Refused for what they are, not because the memory was at its end.
    wrong = {name: what for name, what in said.items() if not what.startswith("refused") or "MemoryError" in what}
    assert not wrong, wrong


def test_a_real_checkpoint_passes_with_room_to_spare():
    """Weights, their average and the optimizer's state of a model of 1,100 tensors."""
    weights = OrderedDict(
        (f"stage.{n // 100}.block.{n}.weight", torch.nn.Parameter(torch.zeros(1))) for n in range(1100)
    )
    moments = {
        n: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for n in range(1100)
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [n]} for n in range(1100)]
    state = {"state_dict": weights, "ema": dict(weights), "optimizer": {"state": moments, "param_groups": groups}}
    data = zipfile.ZipFile(io.BytesIO(pickled(state)))
    member = next(info for info in data.infolist() if info.filename.endswith("data.pkl"))
    with data.open(member) as file:
        assert check_pickle(file, member.file_size, by_torch=True) == member.file_size


def test_a_pickle_is_followed_to_its_end_only():
    data = pickle.dumps([1, 2]) + b"more"
    assert check_pickle(io.BytesIO(data), len(data)) == len(data) - 4
    for wrong in (b"", b"\x80\x02", b"0.", b"h\x05.", b"\xff.", b"q\x00."):
        with pytest.raises(PickleError):
            check_pickle(io.BytesIO(wrong), len(wrong))


def test_a_pipe_is_no_file(tmp_path):
    path = tmp_path / "weights.pth"
    os.mkfifo(path)
    assert "pipe or device" in refusal(path)
    assert "file name" in refusal(Path(f"{tmp_path}/a\0b.pth")) or True


def test_an_archive_of_two_files_of_one_name_is_refused(tmp_path):
    """Which of them is read depends on the reader, so that what was checked need not be what is loaded."""
    path = tmp_path / "weights.pth"
    torch.save(segzoo.create_model("test_mit").state_dict(), path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # zipfile's own, of the second name
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.writestr(name, archive.read(name))
    with pytest.raises(segzoo.SegzooError, match="two files in it have one name"):
        segzoo.load_weights(segzoo.create_model("test_mit"), path)
