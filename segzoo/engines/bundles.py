"""Export bundles: a folded, reduced model in one file, with everything that a reader has to know beside it.

The file's first output is `scores` at input size, and the tensors of the head follow, from which `segzoo.predict`
makes the same mask as with the model; or with a mask it is an image in and a class map out. What is known about the
model is JSON under the key "segzoo" (`metadata`): in the metadata properties of ONNX, in the runtime information of
OpenVINO's .xml, in `segzoo.json` of a .pt2.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ImageError, SegzooError
from .._version import __version__
from ..labels import generic_labels
from ..layers.reduction import entry_to_json
from ..models.family import VARIANTS
from ..models.rows import PretrainedCfg, label_set
from ..models.segmenter import SegmentationModel
from ..plans import current_plan
from ..zoo.config import config_to_dict, read_config
from .compiling import segmenter_of
from .engine import Engine, Runner, check_engine
from .forms import MaskForm, Program, ScoresForm, dynamic_program, plain_twin, unguarded
from .runners import (
    GraphRunner,
    OnnxRunner,
    OpenVINOCompiler,
    SizedOpenVINO,
    need,
    onnx_bytes,
    openvino_model,
    without_warnings,
)

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2"}  # by the end of the file's name
ENGINE_OF = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "eager"}
VERSION = 1  # raised when a reader of the old form would misunderstand the new one
KEY = "segzoo"
PT2_FILE = "segzoo.json"


# --- writing --------------------------------------------------------------------------------------------------------


def export(
    model: nn.Module, path: str | Path, *, format: str | None = None, with_mask: bool = False, overwrite: bool = False
) -> Path:
    """Write a model for inference elsewhere: folded, with the reduction that is in force, for images of any size.

    Args:
        model: a segmentation model of `create_model`, in float32 on the CPU, in any mode; it is never touched.
        path: of the file. OpenVINO writes the weights beside it, with the ending .bin.
        format: "onnx", "openvino" or "pt2" (torch.export); default: by the ending .onnx, .xml or .pt2.
        with_mask: take uint8 images (B, H, W, C) at the size that the model sees, and a uint8 `canvas` whose shape is
            the size of the map, and give class maps; default: normalised images in, scores out.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        SegzooError: a model that no file can hold (the message names why and the way out), or a place that cannot be
            written, or has a file already.
    """
    path = Path(path)
    format = _format_of(path, format)
    files = [path, path.with_suffix(".bin")] if format == "openvino" else [path]
    existing = [str(file) for file in files if file.exists()]
    if existing and not overwrite:
        raise SegzooError(f"{existing[0]} exists; choose another name, or pass overwrite=True (--overwrite)")
    need_writer(format)
    source = segmenter_of(model)
    if with_mask and source.score_kind == "heatmap":
        raise SegzooError(f"{source.name} gives heatmaps of keypoints and no mask; export it without with_mask")
    config = config_to_dict(source)
    plain = plain_twin(source)
    row = source.pretrained_cfg or PretrainedCfg()
    form = MaskForm(plain, mean=row.mean, std=row.std) if with_mask else ScoresForm(plain)
    program = dynamic_program(form)
    text = json.dumps(metadata(source, program, config, with_mask=with_mask), allow_nan=False)
    with _moved_whole(files) as folder:
        WRITERS[format](program, folder / path.name, text)
    return path


def need_writer(format: str) -> None:
    """Raises SegzooError where the packages of a format are not installed."""
    for module in {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",), "pt2": ()}[format]:
        need(module)


def metadata(
    model: SegmentationModel, program: Program, config: dict[str, Any], *, with_mask: bool = False
) -> dict[str, Any]:
    """What a bundle says about itself; `config` is that of `local-dir:` folders, from which segzoo reads it back."""
    row, plan = model.pretrained_cfg or PretrainedCfg(), current_plan(model)
    labels = label_set(row, model.num_classes) or generic_labels(model.num_classes)
    of_what = "the model" if plan.is_neutral else "the model with this reduction, which approximates the one without"
    return {
        "bundle": VERSION,
        "name": model.name,
        "form": "mask" if with_mask else "scores",
        "inputs": list(program.input_names),
        "outputs": list(program.output_names),
        "score_kind": model.score_kind,
        "labels": list(labels.classes),
        "palette": [list(colour) for colour in labels.palette],
        "channels": model.in_chans,
        "mean": list(row.mean),  # of values in 0..1: (image / 255 - mean) / std; a mask's bundle does it itself
        "std": list(row.std),
        "resize": row.resize,
        "test_size": list(row.test_size),
        "test_min_side": row.test_min_side,
        "size_divisor": row.size_divisor,
        "smallest_side": program.smallest,
        "reduction": {site: entry_to_json(entry) for site, entry in plan.items()},
        "precision": "float32",
        "exactness": f"the scores of {of_what}, to rounding",
        "license": row.license,
        "versions": {"segzoo": __version__, "torch": torch.__version__},
        "config": config,
    }


def _write_onnx(program: Program, path: Path, text: str) -> None:
    onnx = need("onnx")
    proto = onnx_bytes(program)
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, text
    if proto.ByteSize() >= 2**31:
        raise SegzooError("an ONNX file holds less than 2 GiB, which this model has not; use format='openvino'")
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def _write_openvino(program: Program, path: Path, text: str) -> None:
    model = openvino_model(program)
    model.set_rt_info(text, [KEY])
    need("openvino").save_model(model, path, compress_to_fp16=False)


def _write_pt2(program: Program, path: Path, text: str) -> None:
    with without_warnings():
        torch.export.save(program.exported, path, extra_files={PT2_FILE: text})


WRITERS: dict[str, Callable[[Program, Path, str], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
}


@contextlib.contextmanager
def _moved_whole(files: list[Path]) -> Iterator[Path]:
    """A folder beside the first file; what was written there moves to its place, the first file last."""
    target = files[0].parent
    try:
        target.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".segzoo-", dir=target))
        try:
            yield folder
            for file in reversed(files):
                (folder / file.name).replace(file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise SegzooError(f"{files[0]} cannot be written ({error.strerror or error}); choose another place") from error


def _format_of(path: Path, format: str | None) -> str:
    by_name = FORMATS.get(path.suffix)
    if format is None and by_name is None:
        raise SegzooError(f"{path}: the name ends in none of {', '.join(FORMATS)}; choose one of these")
    if format not in (None, *FORMATS.values()):
        raise SegzooError(f"format must be one of {', '.join(FORMATS.values())}, not {format!r}")
    ending = next(suffix for suffix, name in FORMATS.items() if name == (format or by_name))
    if path.suffix != ending:
        raise SegzooError(f"{path}: a file of format {format!r} has the ending {ending}, by which it is read again")
    return FORMATS[ending]


# --- reading --------------------------------------------------------------------------------------------------------


def load_engine(
    path: str | Path, *, precision: str = "f32", threads: int | None = None, trust_code: bool = False
) -> Engine:
    """A bundle of `export` as an engine, which `segzoo.predict` takes in place of a model.

    Args:
        path: .onnx (run by onnxruntime), .xml with its .bin (by OpenVINO), or .pt2 (by torch).
        precision, threads: as for `compile`.
        trust_code: a .pt2 file holds code that torch runs; True says that you know where it comes from. The other
            formats hold no code.

    Raises:
        SegzooError: no bundle, one with a mask (which needs no segzoo), or one of a later segzoo.
    """
    path = Path(path)
    format = _format_of(path, None)
    check_engine(ENGINE_OF[format], precision, threads)
    if not path.is_file():
        raise SegzooError(f"{path}: no such file; `segzoo export` makes one")
    if format == "pt2" and not trust_code:
        raise SegzooError(
            f"{path}: a .pt2 file holds code that would be run; pass trust_code=True (--trust-code) if you know where "
            "it comes from, or use an .onnx or OpenVINO bundle"
        )
    if format == "pt2" and precision != "f32":
        raise SegzooError(f"{path}: a .pt2 file is run as it was recorded, in f32, not {precision}")
    if format == "onnx":
        text, make = _read_onnx(path, threads)
    elif format == "openvino":
        text, make = _read_openvino(path, precision, threads)
    else:
        text, make = _read_pt2(path)
    about = _parsed(path, text)
    model = _described(about, path)
    runner = BundleRunner(make(tuple(model.head_names)), path, smallest=int(about.get("smallest_side", 1)))
    return Engine(model, runner, engine=ENGINE_OF[format], precision=precision)


class BundleRunner:
    """The runner of a file, which says so when an image is too small for it."""

    def __init__(self, runner: Runner, path: Path, *, smallest: int):
        self.runner = runner
        self.path = path
        self.smallest = smallest

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        H, W = x_BCHW.shape[2:]
        if min(H, W) < self.smallest:
            raise ImageError(
                f"{self.path} takes images from {self.smallest} pixels a side, not {H} x {W}; give resize=, or use the "
                "model itself"
            )
        return self.runner(x_BCHW)


MakeRunner = Callable[[tuple[str, ...]], Runner]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SegzooError:
        raise
    except Exception as error:  # each runtime has its own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise SegzooError(f"{path} cannot be read ({reason}); export or copy it again") from error


def _read_onnx(path: Path, threads: int | None) -> tuple[str | None, MakeRunner]:
    need("onnxruntime")
    with _reading(path):
        runner = OnnxRunner(str(path), (), threads=threads)
        text = runner.session.get_modelmeta().custom_metadata_map.get(KEY)

    def make(names: tuple[str, ...]) -> Runner:
        runner.names = list(names)
        return runner

    return text, make


def _read_openvino(path: Path, precision: str, threads: int | None) -> tuple[str | None, MakeRunner]:
    compiler = OpenVINOCompiler(precision=precision, threads=threads)
    with _reading(path):
        whole = compiler.core.read_model(path)
        text = whole.get_rt_info([KEY]).value if whole.has_rt_info([KEY]) else None

    def make(names: tuple[str, ...]) -> Runner:
        # The graph without the scores of full size.
        results = [result for result in whole.get_results() if result.get_output_tensor(0).names & set(names)]
        return SizedOpenVINO(compiler.openvino.Model(results, whole.get_parameters(), path.stem), compiler, len(names))

    return text, make


def _read_pt2(path: Path) -> tuple[str | None, MakeRunner]:
    extra = {PT2_FILE: ""}
    with _reading(path), torch.inference_mode(False), without_warnings():
        graph = unguarded(torch.export.load(path, extra_files=extra))
    return extra[PT2_FILE] or None, lambda names: GraphRunner(graph, len(names))


def _parsed(path: Path, text: str | None) -> dict[str, Any]:
    try:
        about = json.loads(text or "null")
    except ValueError:
        about = None
    if not isinstance(about, dict) or "bundle" not in about:
        raise SegzooError(f"{path} is no bundle of segzoo: it does not say what it is; make one with `segzoo export`")
    versions = about.get("versions")
    writer = versions.get("segzoo", "unknown") if isinstance(versions, dict) else "unknown"
    if about["bundle"] != VERSION:
        raise SegzooError(
            f"{path} has version {about['bundle']!r} and was written by segzoo {writer}; this is segzoo {__version__}, "
            f"which reads version {VERSION}: export it again"
        )
    if about.get("form") != "scores":
        raise SegzooError(
            f"{path} gives masks by itself and is run without segzoo (docs/deploy.md); for predict export without "
            "--with-mask"
        )
    if not isinstance(about.get("config"), dict) or not isinstance(about.get("smallest_side"), int):
        raise SegzooError(f"{path} is damaged: it lacks its config; export it again")
    return about


def _described(about: dict[str, Any], path: Path) -> SegmentationModel:
    """The model that the file was made of, without its parameters."""
    saved = read_config(about["config"])
    try:
        with torch.device("meta"):
            model = VARIANTS[saved.variant].build(saved.cfg).eval()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise SegzooError(f"{path} describes no model that can be built: {error}") from error
    if not isinstance(model, SegmentationModel):
        raise SegzooError(f"{path} describes {saved.name}, which is no segmentation model")
    model.name = saved.name
    model.pretrained_cfg = saved.pretrained_cfg
    model.weights_state = saved.weights_state
    model.set_inference_reduction(saved.reduction)
    return model
