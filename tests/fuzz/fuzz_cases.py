"""What the readers are given: whole files changed byte by byte, and files that are whole but mean something odd."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

import segzoo

Bytes = st.SearchStrategy[bytes]
Write = Callable[[Path, bytes], Path]  # (folder, case) -> what the reader is given

# Where formats keep sizes, offsets and counts.
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
ODD = st.sampled_from(
    [0, -1, 1, 2, 7, 255, 256, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None]
)
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["", "\x00", "../x", "a" * 5000, "\ud800", "é", "%s", "{}"]))
JSON = st.recursive(
    ODD | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=12,
)


# --- bytes ----------------------------------------------------------------------------------------------------------


@st.composite
def places(draw: st.DrawFn, size: int) -> int:
    """A position in a file: near its beginning or end, where headers and directories are, or anywhere."""
    where = draw(st.sampled_from(["head", "tail", "any"]))
    near = draw(st.integers(0, min(300, size)))
    return draw(st.integers(0, size)) if where == "any" else near if where == "head" else size - near


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds after a few changes of bytes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(places(len(data)))
        length = draw(st.sampled_from([1, 2, 4, 8, 40]))
        match draw(st.sampled_from(["bit", "byte", "number", "insert", "delete", "repeat", "cut", "swap"])):
            case "bit" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "number":
                width, order = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from("<>"))
                number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * width)
                data[at : at + width] = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[width], number)
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=length))
            case "delete":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 3, 1000]))
            case "cut":
                del data[at:]
            case "swap":
                other = draw(places(len(data)))
                data[at : at + length], data[other : other + length] = (
                    data[other : other + length],
                    data[at : at + length],
                )
    return bytes(data)


# --- weights --------------------------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return segzoo.create_model("test_eft").state_dict()


def small() -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 3) for name in ("head.weight", "head.bias")}


def torch_save(value: object, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def to_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any kind that torch can save."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    match draw(st.sampled_from(["plain", "nan", "sparse", "meta", "strided", "quantised", "nested"])):
        case "plain":
            kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
            return torch.ones(shape).to(draw(st.sampled_from([*kinds, torch.complex64, torch.float8_e4m3fn])))
        case "nan":
            return torch.full(shape, draw(st.sampled_from([float("nan"), float("inf"), -1e38])))
        case "sparse":
            return torch.eye(3).to_sparse()
        case "meta":
            return torch.empty(draw(st.sampled_from([[3], [2**40], [2**20, 2**20]])), device="meta")
        case "strided":
            return torch.ones(1).expand(draw(st.sampled_from([[4], [2**20], [2**16, 2**16]])))
        case _:
            return torch.zeros(shape, requires_grad=draw(st.booleans()))


@st.composite
def altered(draw: st.DrawFn, whole: dict[str, torch.Tensor], odd: st.SearchStrategy) -> dict:
    """A whole state dict of which a few entries are odd, and perhaps its wrapping."""
    content: dict = dict(whole)
    keys = st.sampled_from([*whole, "state_dict", "model", "module.x"]) | TEXTS.filter(_is_utf8) | st.integers(-2, 2)
    for _ in range(draw(st.integers(1, 3))):
        content[draw(keys)] = draw(odd)
    match draw(st.sampled_from(["as it is", "state_dict", "model", "nested"])):
        case "state_dict":
            return {"state_dict": content, "epoch": 3}
        case "model":
            return {"model": content}
        case "nested":
            return {"state_dict": {"model": {"state_dict": content}}}
    return content


def _is_utf8(text: str) -> bool:
    return "\ud800" not in text


def plain_values() -> st.SearchStrategy:
    leaf = ODD | TEXTS.filter(_is_utf8) | st.binary(max_size=8)
    return st.recursive(leaf, lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(st.text(), x))


def pth(*, old: bool) -> Bytes:
    seeds = [torch_save(content, old=old) for content in (state(), small(), {"state_dict": state(), "epoch": 3})]
    odd = tensors() | plain_values()
    whole = altered(state(), odd).map(lambda content: torch_save(content, old=old))
    return mutated(seeds) | whole | whole.flatmap(lambda data: mutated([data])) | programs()


def safetensors() -> Bytes:
    seeds = [save(state()), save(small())]
    field = st.one_of(
        JSON,
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "C64", "F8_E4M3", "F4", "X", ""]),
                "shape": st.lists(st.sampled_from([0, 1, 2, -1, 2**32, 2**63, 2**64]), max_size=70),
                "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, -1, 2**63, 2**64]), min_size=1, max_size=3),
            }
        ),
    )
    header = st.dictionaries(st.sampled_from([*state()][:4]) | TEXTS.filter(_is_utf8), field, max_size=4)
    return mutated(seeds) | header.map(_with_header)


def _with_header(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def programs() -> Bytes:
    """Pickles that no pickler writes: opcodes with arguments, in any order."""
    opcodes = [bytes([code]) for code in b"(.0122}]){aesubtlNIiFGKMJjrpqgRobQ\x80\x85\x86\x87\x88\x89\x93\x94\x95\x96"]
    argument = st.binary(max_size=6) | st.sampled_from(
        [b"\x04", b"\xff\xff\xff\x7f", b"numpy\nndarray\n", b"collections\nOrderedDict\n", b"torch\nTensor\n"]
    )
    steps = st.lists(st.tuples(st.sampled_from(opcodes), argument).map(b"".join), max_size=60).map(b"".join)
    # A memo that doubles, as in the bombs of old.
    doubled = st.integers(1, 5000).map(lambda n: b"]" + b"q\x00h\x00h\x00\x86" * n)
    return st.builds(
        lambda head, body: head + body + b".", st.sampled_from([b"\x80\x02", b"\x80\x04"]), steps | doubled
    )


def pdparams() -> Bytes:
    arrays = to_arrays(state())
    seeds = [pickle.dumps(arrays, protocol=protocol) for protocol in (2, 4)]
    seeds.append(pickle.dumps({**to_arrays(small()), "StructuredToParameterName@@": {}}, protocol=2))
    array = st.sampled_from(
        [np.ones(3, dtype) for dtype in ("f2", "f4", "f8", "c8", "u2", "b1", "S3", "O", "M8[s]", "i4,f4")]
    )
    odd = array | plain_values() | st.builds(np.zeros, st.lists(st.integers(0, 3), max_size=5))
    slices = st.dictionaries(
        st.sampled_from(["head.weight", "a"]),
        st.fixed_dictionaries({"OriginShape": plain_values(), "slices": st.lists(st.text(max_size=3), max_size=3)}),
        max_size=2,
    )
    whole = st.builds(
        lambda content, cut, protocol: pickle.dumps({**content, **cut}, protocol=protocol),
        altered(arrays, odd),
        st.just({}) | slices.map(lambda info: {"UnpackBigParamInfor@@": info}),
        st.sampled_from([2, 3, 4, 5]),
    )
    return mutated(seeds) | whole | programs()


# --- JSON -----------------------------------------------------------------------------------------------------------


@st.composite
def edited(draw: st.DrawFn, whole: object) -> object:
    """A JSON value with one of its parts replaced by something odd, left out, or beside a new one."""
    if not isinstance(whole, (dict, list)) or not whole or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    keys = list(whole) if isinstance(whole, dict) else list(range(len(whole)))
    key = draw(st.sampled_from(keys))
    copy = dict(whole) if isinstance(whole, dict) else list(whole)
    match draw(st.sampled_from(["replace", "replace", "leave out", "add"])):
        case "leave out":
            del copy[key]
        case "add" if isinstance(copy, dict):
            copy[draw(TEXTS)] = draw(JSON)
        case _:
            copy[key] = draw(edited(whole[key]))
    return copy


def documents(whole: object) -> Bytes:
    """A JSON document with odd parts, or with changed bytes, or nested without end."""
    text = json.dumps(whole).encode()
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b'{"segzoo":' * 2000, b"9" * 5000, b"\xff\xfe{}", b""])
    return st.one_of(edited(whole).map(lambda value: json.dumps(value).encode()), mutated([text]), deep)


SITES = ["encoder", "decoder", "encoder.q", "decoder.q", "encoder.0", "encoder.2.q", "decoder.1", "encoder.grid", "x"]


def plans() -> Bytes:
    numbers = st.integers(-2, 6) | ODD
    kinds = st.sampled_from(["Pool", "OverlapPool", "Neighbour2d", "Neighbour1d", "Bipartite", "x"])
    fields = st.sampled_from(["factor", "stride", "ratio", "y"])
    entry = st.one_of(
        numbers,
        JSON,
        st.builds(lambda kind, name, n: {"type": kind, name: n}, kinds, fields, numbers),
        st.builds(lambda ratio, stride: {"type": "Bipartite", "ratio": ratio, "stride": stride}, numbers, numbers),
        st.builds(lambda n, how: {"type": "Pool", "factor": n, "kind": how}, numbers, st.sampled_from(["avg", "max"])),
    )
    plan = entry | st.dictionaries(st.sampled_from(SITES) | TEXTS, entry | st.lists(entry, max_size=5), max_size=4)
    spelt = plan.map(json.dumps)
    text = TEXTS.filter(_is_utf8) | st.sampled_from(
        ["fast", "optimal", "2", "0", "9" * 5000, "{" * 3000, '{"a":' * 5000]
    )
    return st.one_of(spelt, spelt.map(lambda plan: f"={plan}"), text.filter(lambda t: t[:1] != "=")).map(str.encode)


# --- images ---------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    """A small picture in every format and mode that people have."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (23, 31, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [(colour, {"format": name}) for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")]
    files += [(colour, {"format": "JPEG", "progressive": True, "exif": exif})]
    files += [(colour, {"format": "TIFF", "compression": name}) for name in ("tiff_lzw", "tiff_deflate")]
    files += [(colour.convert(mode), {"format": "PNG"}) for mode in ("L", "P", "1", "RGBA", "LA")]
    files += [
        (Image.fromarray(rng.integers(0, 65536, (9, 7), np.uint16)), {"format": name}) for name in ("PNG", "TIFF")
    ]
    files += [(colour.convert("CMYK"), {"format": "JPEG"}), (colour.convert("F"), {"format": "TIFF"})]
    encoded = []
    for image, options in files:
        buffer = io.BytesIO()
        image.save(buffer, **options)
        encoded.append(buffer.getvalue())
    return encoded


# --- each reader ----------------------------------------------------------------------------------------------------


def as_file(name: str) -> Write:
    def write(folder: Path, case: bytes) -> Path:
        path = folder / name
        path.write_bytes(case)
        return path

    return write


def in_saved_model(folder: Path, case: bytes) -> Path:
    if not (folder / "model.safetensors").exists():
        segzoo.save_pretrained(segzoo.create_model("test_edaformer"), folder)
    (folder / "config.json").write_bytes(case)
    return folder


def in_data_set(folder: Path, case: bytes) -> Path:
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (folder / kind).mkdir(exist_ok=True)
        Image.new(mode, (8, 6)).save(folder / kind / "a.png")
    (folder / "dataset.json").write_bytes(case)
    return folder


def as_list_file(folder: Path, case: bytes) -> Path:
    for name, mode in (("a.png", "RGB"), ("b.png", "L")):
        Image.new(mode, (8, 6)).save(folder / name)
    return as_file("list.txt")(folder, case)


def config() -> object:
    from segzoo.zoo.config import config_to_dict

    model = segzoo.create_model("test_edaformer")
    model.set_inference_reduction("fast")
    return config_to_dict(model)


RECORD = {"classes": ["road", "car"], "ignore_index": 255, "reduce_zero_label": False}

CASES: dict[str, tuple[Callable[[], Bytes], Write]] = {
    "image": (lambda: mutated(pictures()), as_file("image.png")),
    "safetensors": (safetensors, as_file("weights.safetensors")),
    "pth": (lambda: pth(old=False), as_file("weights.pth")),
    "old pth": (lambda: pth(old=True), as_file("weights.pth")),
    "pdparams": (pdparams, as_file("weights.pdparams")),
    "config": (lambda: documents(config()), in_saved_model),
    "plan": (plans, as_file("plan.json")),
    "mask": (lambda: mutated(pictures()), as_file("mask.png")),
    "classes": (lambda: documents(RECORD) | documents({"label_set": "cityscapes"}), in_data_set),
    "list file": (lambda: mutated([b"a.png b.png\n" * 3, b"a.png\tb.png\n"]), as_list_file),
}
