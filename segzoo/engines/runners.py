"""The runners: images in, tensors of the head out, by torch, onnxruntime or OpenVINO.

One compiled for a single size is faster than a dynamic one (OpenVINO: about twice), so a few sizes have their own, and
what comes beyond them takes the dynamic one.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import SegzooError
from .engine import Runner
from .forms import HeadForm, Program, dynamic_program, fixed_program, why_fixed

T = TypeVar("T")

MAX_SIZES = 8  # shapes (B, H, W) with a compiled form of their own
EXTRAS = {"onnxruntime": "onnx", "onnx": "onnx", "onnxscript": "onnx", "openvino": "openvino"}


def need(module: str) -> ModuleType:
    """A package of an extra. Raises SegzooError, naming the extra, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SegzooError(
            f"this needs the package {module} ({error}); install it with pip install 'segzoo[{EXTRAS[module]}]'"
        ) from None


class BySize(Generic[T]):
    """Something made once for each of a few keys. Once it is full, a new key takes the fallback; one that comes again
    drives out the key that was used longest ago.

    Args:
        make: key -> the thing; called by one thread at a time.
        fallback: for any key, or None: every new key drives one out.
    """

    def __init__(self, make: Callable[[Any], T], fallback: Callable[[], T] | None, *, most: int = MAX_SIZES):
        self._make = make
        self._fallback = fallback
        self._most = most
        self._made: OrderedDict[Hashable, T] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()  # keys that took the fallback last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._made

    def __getitem__(self, key: Hashable) -> T:
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            if self._fallback is not None and len(self._made) >= self._most and key not in self._met:
                self._met[key] = None
                while len(self._met) > self._most:
                    self._met.popitem(last=False)
                return self._fallback()
            while len(self._made) >= self._most:
                self._made.popitem(last=False)
            self._met.pop(key, None)
            made = self._made[key] = self._make(key)
            return made


class Programs:
    """The programs of a form: the dynamic one, made once, or of a plan or a size that it cannot be, a fixed one."""

    def __init__(self, form: HeadForm, dynamic: Program | None):
        self.form = form
        self.dynamic = dynamic

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether the dynamic program takes images of (H, W) pixels."""
        return self.dynamic is not None and min(size) >= self.dynamic.smallest

    def of(self, shape: tuple[int, ...]) -> Program:
        """A program that takes images of this (B, C, H, W)."""
        if self.dynamic is not None and self.fits((shape[2], shape[3])):
            return self.dynamic
        return fixed_program(self.form, shape)


def programs(form: HeadForm) -> Programs:
    return Programs(form, None if why_fixed(form.model) else dynamic_program(form))


# --- torch ----------------------------------------------------------------------------------------------------------


def eager_runner(form: HeadForm, *, dtype: torch.dtype) -> Runner:
    form = form.to(dtype).eval()

    @torch.no_grad()
    def run(x_BCHW: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.float() for tensor in form(x_BCHW.to(dtype)))

    return run


class InductorRunner:
    """Each size compiled by torch's inductor, from a program of its own, so that they share no limit of recompiling."""

    def __init__(self, form: HeadForm, *, dtype: torch.dtype):
        self.dtype = dtype
        self.form = form.to(dtype).eval()
        self.compiled: BySize[Callable[[Tensor], tuple[Tensor, ...]]] = BySize(self._compile, None)

    def _compile(self, shape: tuple[int, ...]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        example = torch.zeros(shape, dtype=self.dtype)
        with torch.inference_mode(False), torch.no_grad():
            graph = torch.export.export(self.form, (example,), strict=False).module()
            compiled: Any = torch.compile(graph, dynamic=False)
            try:
                compiled(example)
            except Exception as error:  # of many kinds
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                raise SegzooError(
                    f"inductor cannot compile this ({reason}); it needs a C++ compiler: install one, or use "
                    "engine='openvino'"
                ) from error
        return compiled

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        compiled = self.compiled[tuple(x_BCHW.shape)]
        with torch.inference_mode(False), torch.no_grad():
            # A copy that is no inference tensor, since for those everything would be compiled once more.
            return tuple(
                tensor.float() for tensor in compiled(torch.empty_like(x_BCHW, dtype=self.dtype).copy_(x_BCHW))
            )


class GraphRunner:
    """A graph of torch.export of any size."""

    def __init__(self, graph: nn.Module, count: int):
        self.graph = graph
        self.count = count  # outputs, the last of all, that are the head's

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.graph(x_BCHW))[-self.count :]


# --- onnxruntime ----------------------------------------------------------------------------------------------------


class OnnxRunner:
    """A session of onnxruntime, which runs any size that its graph takes, from any thread."""

    def __init__(self, model: bytes | str, names: tuple[str, ...], *, threads: int | None):
        onnxruntime = need("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        if threads is not None:
            options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.names = list(names)
        self.run_options = onnxruntime.RunOptions()
        self.run_options.only_execute_path_to_fetches = True  # not the scores of full size

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        arrays = self.session.run(self.names, {"image": x_BCHW.numpy()}, self.run_options)
        return tuple(torch.from_numpy(array) for array in arrays)


def onnx_bytes(program: Program) -> Any:
    """The program as an onnx.ModelProto."""
    need("onnxscript")
    with torch.inference_mode(False), without_warnings():
        converted = torch.onnx.export(
            program.exported,
            (),
            dynamo=True,
            verbose=False,
            input_names=list(program.input_names),
            output_names=list(program.output_names),
            custom_translation_table={torch.ops.aten.sort.stable: _sort_stable},
        )
    assert converted is not None
    return converted.model_proto


def _sort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort(stable=True) in ONNX, which torch's exporter leaves out: TopK of all, where of equal values the one
    with the lower index comes first."""
    op = need("onnxscript").opset20
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Without those of converters about their own insides, some of which are logged with a traceback."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxRunners:
    """Sessions of a form: one for every size, or where the form has no dynamic program one a size."""

    def __init__(self, form: HeadForm, *, threads: int | None):
        need("onnxruntime")
        self.programs = programs(form)
        self.threads = threads
        self.fixed = BySize(lambda shape: self._runner(self.programs.of(shape)), None)
        self.dynamic = self._runner(self.programs.dynamic) if self.programs.dynamic else None

    def _runner(self, program: Program) -> OnnxRunner:
        return OnnxRunner(onnx_bytes(program).SerializeToString(), program.output_names, threads=self.threads)

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        if self.dynamic is not None and self.programs.fits((x_BCHW.shape[2], x_BCHW.shape[3])):
            return self.dynamic(x_BCHW)
        return self.fixed[tuple(x_BCHW.shape)](x_BCHW)


# --- OpenVINO -------------------------------------------------------------------------------------------------------


class OpenVINORunner:
    """A compiled model of OpenVINO. Each thread that runs at once has a request of its own."""

    def __init__(self, compiled: Any, count: int):
        self.compiled = compiled
        self.count = count  # outputs, the last of all, that are the head's
        self.idle: list[Any] = []

    @contextlib.contextmanager
    def _request(self) -> Iterator[Any]:
        try:
            request = self.idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        yield request
        self.idle.append(request)

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        with self._request() as request:
            request.infer({0: np.ascontiguousarray(x_BCHW.numpy())})
            outputs = range(len(self.compiled.outputs))[-self.count :]
            return tuple(torch.from_numpy(request.get_output_tensor(i).data.astype(np.float32)) for i in outputs)


class OpenVINOCompiler:
    """OpenVINO's compiler with the hints that are always set: its own default precision may be bf16."""

    def __init__(self, *, precision: str, threads: int | None):
        self.openvino = need("openvino")
        self.core = self.openvino.Core()
        self.hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            self.hints["INFERENCE_NUM_THREADS"] = threads

    def __call__(self, model: Any, count: int, shape: tuple[int, ...] | None = None) -> OpenVINORunner:
        """Compile for one shape of images, or as dynamic as the model is."""
        if shape is not None:
            model = model.clone()
            model.reshape({0: list(shape)})
        return OpenVINORunner(self.core.compile_model(model, "CPU", self.hints), count)


def openvino_model(program: Program) -> Any:
    """The program as an openvino.Model whose inputs and outputs have its names."""
    need("openvino")
    from openvino.frontend import FrontEndManager, OpConversionFailure
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    # What openvino.convert_model does, without its report to the vendor.
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.inference_mode(False), without_warnings():
        exported = program.exported
        if any(node.target is torch.ops.aten.index_add.default for node in exported.graph.nodes):
            exported = exported.run_decompositions({torch.ops.aten.index_add.default: _index_add})
        decoder = TorchFXPythonDecoder.from_exported_program(exported)  # kept: the frontend does not own it
        try:
            model = frontend.convert(frontend.load(decoder))
        except OpConversionFailure as error:
            missing = ", ".join(re.findall(r"aten\.\w+", str(error)))
            raise SegzooError(
                f"OpenVINO cannot convert this model ({missing or error}), as where the reduction is LocalGlobal, "
                "EnergyProtected or GridMerge; use engine='onnxruntime', or another reduction"
            ) from error
    for port, name in zip((*model.inputs, *model.outputs), (*program.input_names, *program.output_names), strict=True):
        port.get_tensor().set_names({name})
    return model


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """torch.index_add for OpenVINO, whose frontend cannot read that of torch.export."""
    at = index.view(-1, *[1] * (x.ndim - dim % x.ndim - 1)).expand_as(source)
    return x.scatter_add(dim, at, source * alpha)


class OpenVINORunners:
    """A model compiled for each of a few sizes; others take the dynamic one where there is one."""

    def __init__(self, form: HeadForm, *, precision: str, threads: int | None):
        self.compiler = OpenVINOCompiler(precision=precision, threads=threads)
        self.programs = programs(form)
        self.count = len(form.output_names)
        self.model = openvino_model(self.programs.dynamic) if self.programs.dynamic else None
        self.sizes = SizedOpenVINO(self.model, self.compiler, self.count)
        self.fixed = BySize(self._fixed, None)

    def _fixed(self, shape: tuple[int, ...]) -> OpenVINORunner:
        return self.compiler(openvino_model(self.programs.of(shape)), self.count)

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        if self.programs.fits((x_BCHW.shape[2], x_BCHW.shape[3])):
            return self.sizes(x_BCHW)
        return self.fixed[tuple(x_BCHW.shape)](x_BCHW)


class SizedOpenVINO:
    """A dynamic model of OpenVINO, compiled anew for each of a few sizes."""

    def __init__(self, model: Any, compiler: OpenVINOCompiler, count: int):
        self.model = model
        self.compiler = compiler
        self.count = count
        self.dynamic: OpenVINORunner | None = None
        self.by_size = BySize(lambda shape: compiler(model, count, shape), self._any)

    def _any(self) -> OpenVINORunner:
        if self.dynamic is None:
            self.dynamic = self.compiler(self.model, self.count)
        return self.dynamic

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        return self.by_size[tuple(x_BCHW.shape)](x_BCHW)
