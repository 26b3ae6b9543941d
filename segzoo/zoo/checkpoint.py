"""From a checkpoint file or mapping to a model's parameters: safe reading, renaming, strict loading.

Nothing is unpickled except through torch's `weights_only=True` and the restricted reader of `.pdparams`, and only after
`pickles` has found what that will cost. No failure is swallowed: it ends in a WeightsError that names the file and the
way out, and the model is unchanged: every tensor is checked and converted before the first is assigned.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._errors import SegzooError, UnreadableError, WeightsError, first_line, shown
from ..models.base import FeaturePyramid, Model
from ..models.keys import Drop, Layout, StateDict, apply_rules
from .archives import open_archive
from .pdparams import read_pdparams
from .pickles import PickleError, check_pickle

# Where a training script puts the parameters in its checkpoint; a moving average of them is what it evaluates.
WRAPPERS = ("state_dict_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of (Distributed)DataParallel and of torch.compile
ZIP = b"PK\x03\x04"  # how a .pth begins that torch takes for an archive
MAX_HEADER = 2 << 20  # bytes of a .safetensors file's header; that of a thousand tensors has about 130,000

_log = logging.getLogger("segzoo")


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file on this machine, and how its tensors may become a model's."""

    path: str | Path
    by_hand: bool = False  # the user's own, read into a model as drawn, whose classifier may stay
    keep_mapped: bool = False  # see `build_with_weights`
    origin: str | None = None  # where it was downloaded from, which a refusal names
    # Given the file and why it cannot be read, a fresh download of it; None: it would be the same, or is none.
    again: Callable[[Path, Exception], Path | None] | None = None


def load_weights(
    model: Model | FeaturePyramid,
    weights: str | Path | Mapping[str, Any],
    *,
    renew_classifier: bool = False,
    adapt_in_chans: bool = False,
) -> None:
    """Load a checkpoint strictly: every parameter and buffer is set, and nothing in the file is left over.

    Args:
        model: from `create_model`; tensors are converted to its dtype and device.
        weights: a file (.safetensors, .pth, .pt, .bin, .pdparams or a .zip with one .pdparams) or a mapping of names
            to tensors or arrays; segzoo's own names or an official layout that the family knows; may be wrapped as
            {"state_dict": ...}, {"model": ...} or timm's {"state_dict_ema": ...} (which wins over "state_dict"), and
            prefixed with "module." or "_orig_mod.".
        renew_classifier: leave the classifier as it is if the checkpoint's has another number of classes.
        adapt_in_chans: fit the first convolution to the model's input channels: summed for one channel, else
            tiled and rescaled.

    Raises:
        SegzooError: a wrapped model, or weights that are neither a file nor a mapping.
        WeightsError: names the file and the missing, left-over or mis-shaped keys; the model is unchanged.
    """
    if not isinstance(weights, (str, Path, Mapping)):
        raise SegzooError(f"weights must be a file or a mapping of names to tensors, not a {type(weights).__name__}")
    model = getattr(model, "_orig_mod", model)  # of a compiled model, which shares its parameters
    target = model.encoder if isinstance(model, FeaturePyramid) else model
    if not isinstance(target, Model):
        inner = "; pass its .module" if isinstance(getattr(model, "module", None), Model) else ""
        raise SegzooError(f"load_weights takes a model from create_model, not a {type(model).__name__}{inner}")
    own = target.state_dict()
    state = _fitted_state(target, own, weights, renew_classifier=renew_classifier, adapt_in_chans=adapt_in_chans)
    _copy(state, own)
    renewed = any(state[name] is own[name] for name in target.classifier_parameters())
    if not any(tensor.is_meta for tensor in own.values()):
        target.mark_loaded("fresh classifier" if renewed else "pretrained")
    if any(tensor.is_meta and not state[name].is_meta for name, tensor in own.items()):
        _log.warning(
            "%s is on the meta device: names and shapes fit, but nothing could be loaded; create it outside "
            'torch.device("meta")',
            _name_of(target),
        )


def build_with_weights(build: Callable[[], Model], path: Path, *, keep_mapped: bool) -> Model:
    """A model whose parameters are the file's tensors: built without memory, then assigned.

    With `keep_mapped` they stay mapped from the file (private, copied page by page when written to), which is only
    safe where nobody writes into the file: in a cache, whose files are replaced as a whole.
    """
    with _Empty():
        model = build()
    persistent = model.state_dict()
    state = _fitted_state(model, persistent, path, adapt_in_chans=True)
    if any(name not in persistent for name, _ in model.named_buffers()):
        model = build()  # buffers that the constructor computes and no file holds
        _copy(state, model.state_dict())
        return model
    device = torch.get_default_device()
    seen: set[int] = set()
    # By hand, because load_state_dict(assign=True) filters the whole state once for every module.
    for prefix, module in model.named_modules():
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for name, empty in list(tensors):
                tensor = state[f"{prefix}.{name}" if prefix else name]
                if tensor.is_meta:  # a batch counter that the file lacks
                    tensor = torch.zeros_like(tensor, device=device)
                fitted = tensor.to(device).contiguous()
                # Two names for one tensor in the file are two parameters here.
                if fitted.data_ptr() in seen or (fitted is tensor and not keep_mapped):
                    fitted = fitted.clone()
                seen.add(fitted.data_ptr())
                is_parameter = isinstance(empty, nn.Parameter)
                setattr(module, name, nn.Parameter(fitted, empty.requires_grad) if is_parameter else fitted)
    return model


class _Empty(TorchFunctionMode):
    """Makes tensors on the meta device, as torch.device("meta") does, and skips their filling, which costs more."""

    FACTORIES = frozenset(
        (torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn)
        + (torch.tensor, torch.zeros)
    )
    FILLING = frozenset(("zero_", "fill_", "uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES:
            if kwargs.get("device") is None:
                kwargs["device"] = "meta"
        elif getattr(func, "__name__", None) in self.FILLING or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@torch.no_grad()
def _copy(state: StateDict, own: Mapping[str, Tensor]) -> None:
    """Nothing here can fail any more, so that no model is left with some of its tensors replaced."""
    for name, tensor in own.items():
        if not (state[name].is_meta and not tensor.is_meta):  # a batch counter that the file lacks
            tensor.copy_(state[name])


def _fitted_state(
    target: Model,
    own: Mapping[str, Tensor],
    weights: str | Path | Mapping[str, Any],
    *,
    renew_classifier: bool = False,
    adapt_in_chans: bool = False,
) -> StateDict:
    """The tensors of `weights` under the names and in the shapes and dtypes of `own`, the model's state dict."""
    by_file = isinstance(weights, (str, Path))
    source = weights if by_file else "the given mapping"
    state = read_state_dict(weights) if isinstance(weights, (str, Path)) else dict(weights)
    on_meta = not by_file and all(tensor.is_meta for tensor in own.values())  # shapes for shapes
    state = _tensors(_unwrap(state, source), source, by_file=by_file, on_meta=on_meta)
    try:
        state = _renamed_and_reshaped(
            target, own, state, renew_classifier=renew_classifier, adapt_in_chans=adapt_in_chans
        )
    except SegzooError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{source} does not fit {_name_of(target)}: its tensors have other shapes than their names say "
            f"({first_line(error)})"
        ) from error
    _check(state, own, source, target)
    return {name: _converted(state[name], tensor, name, source) for name, tensor in own.items()}


def _renamed_and_reshaped(
    target: Model, own: Mapping[str, Tensor], state: StateDict, *, renew_classifier: bool, adapt_in_chans: bool
) -> StateDict:
    """Under the model's names and in its shapes, as far as they can be made to fit; raises anything where not."""
    state = target.fit_state(to_own_layout(target, state))
    if target.num_classes == 0:
        state = Drop(r"^head\.", "an encoder without classes has no classifier")(state)
    if renew_classifier:
        names = target.classifier_parameters()
        if any(name in state and state[name].shape != own[name].shape for name in names):
            state.update({name: own[name] for name in names})
    if adapt_in_chans and target.first_conv in state:
        state[target.first_conv] = _adapt_in_chans(state[target.first_conv], target.in_chans)
    return state


def _converted(tensor: Tensor, own: Tensor, name: str, source: object) -> Tensor:
    """In the dtype of the model's own tensor.

    Raises:
        WeightsError: another kind of number, or one that is none.
    """
    if tensor is own or tensor.is_meta:
        return tensor
    kinds = (tensor.is_floating_point(), own.is_floating_point())
    wrong = tensor.dtype == torch.bool or tensor.is_complex() or kinds == (False, True)
    if wrong and tensor.dtype != own.dtype:
        raise WeightsError(f"{source}: {name} holds {tensor.dtype}, where {own.dtype} is needed; convert the file")
    converted = tensor.to(own.dtype)
    if not _is_finite(tensor if kinds == (True, False) else converted):
        raise WeightsError(
            f"{source}: {name} has values that are not finite in {converted.dtype}; take a checkpoint from before the "
            "training diverged, or a wider dtype"
        )
    if kinds == (True, False) and not torch.equal(converted.to(tensor.dtype), tensor):
        raise WeightsError(f"{source}: {name} must hold whole numbers")
    return converted


def _is_finite(tensor: Tensor) -> bool:
    """By the sum, in one pass without memory; only where that is not finite, value by value."""
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float32 if tensor.element_size() < 4 else tensor.dtype)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def to_own_layout(model: Model, state: StateDict) -> StateDict:
    """Rename an official checkpoint's keys to the model's own; a segzoo state dict passes unchanged."""
    layout = find_layout(model, state)
    return apply_rules(state, layout.rules) if layout else state


def find_layout(model: Model, state: StateDict) -> Layout | None:
    """The official layout that a checkpoint is in; None if its keys are the model's own, or unknown."""
    layout = next((layout for layout in model.key_layouts if layout.matches(state)), None)
    if layout is None or state.keys() <= model.state_dict().keys():
        return None
    return layout


def read_tensors(path: str | Path) -> StateDict:
    """The tensors of a checkpoint file under the file's own keys, out of what they are wrapped in."""
    return _tensors(_unwrap(read_state_dict(path), path), path)


def read_state_dict(path: str | Path) -> StateDict:
    """Read a checkpoint file without executing anything in it, in memory and time that its size explains.

    Raises:
        WeightsError: names the file.
    """
    path = Path(path)
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix in (".pdparams", ".zip"):
            return read_pdparams(path)
        state = _read_pth(path)
    except WeightsError:
        raise
    except PickleError as error:
        raise WeightsError(
            f"{path} is damaged or made to do harm ({first_line(error)}); download or copy it again"
        ) from (error)
    # The warning is torch's, of pickle protocols that it then refuses; raised where warnings are errors.
    except (pickle.UnpicklingError, UserWarning) as error:
        raise WeightsError(
            f"{path} holds more than tensors or is damaged, so it was not unpickled and nothing in it was run; "
            f"get it as .safetensors, or re-save only its state dict with torch.save ({first_line(error)})"
        ) from error
    except Exception as error:  # a damaged file makes torch and safetensors raise anything
        raise UnreadableError(
            f"{path} is damaged or no weights file ({type(error).__name__}: {first_line(error)}); download or copy it "
            "again"
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a state dict; save model.state_dict() instead")
    return dict(state)


def _check_file(path: Path) -> None:
    try:
        if not path.exists():
            raise WeightsError(f"{path}: no such file; check the path, or use pretrained=True for published weights")
        if path.is_dir():
            raise WeightsError(f"{path} is a directory; name the weights file in it")
        if not path.is_file():
            raise WeightsError(f"{path} is no ordinary file but a pipe or device; save the weights to a file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from error
    except ValueError as error:  # a zero byte
        raise WeightsError(f"{shown(str(path))} is no file name ({error})") from error
    if empty:
        raise UnreadableError(f"{path} is empty; download or copy it again")


def _read_safetensors(path: Path) -> StateDict:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < header < path.stat().st_size:
        raise WeightsError(f"{path} has a header of {header:,} bytes, which no weights need; get it from its source")
    return load_file(path)


def _read_pth(path: Path) -> Any:
    """What `torch.save` wrote, once its pickles are known to be harmless and its tensors to be no larger than it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(len(ZIP)) == ZIP
        if not is_archive:
            file.seek(0)
            _check_old_pickles(file, size)
    if is_archive:
        _check_archive(path, size)
    # timm's script saves its options beside the weights, in a Namespace: it holds values, no code. It stays
    # allowed, since undoing that is global, too: it would take away what the user or another thread has allowed.
    torch.serialization.add_safe_globals([argparse.Namespace])
    # Mapped, so that what is not used (an optimizer's state) is never read; the old format cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _check_archive(path: Path, size: int) -> None:
    with open_archive(path) as archive:
        files = archive.infolist()
        # torch stores without compression; what says otherwise unpacks to more than the file, or is not read rightly.
        if any(info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size for info in files):
            raise zipfile.BadZipFile("it is compressed, which torch.save never does; unpack and save it again")
        if sum(info.file_size for info in files) > size:
            raise zipfile.BadZipFile("its files share their bytes")
        for info in files:
            if info.filename.endswith(".pkl"):
                with archive.open(info) as member:
                    check_pickle(member, info.file_size, by_torch=True)


def _check_old_pickles(file: IO[bytes], size: int) -> None:
    """The old format's five pickles: a magic number, its version, the machine, the object, the keys of its storages."""
    for _ in range(5):
        size -= check_pickle(file, size, by_torch=True)


def _unwrap(state: Mapping[Any, Any], source: object) -> StateDict:
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    wrong = next((key for key in state if not isinstance(key, str)), None)
    if wrong is not None:
        raise WeightsError(f"{source} is no state dict: the name {shown(wrong)} is no text")
    while state and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return dict(state)


def _tensors(state: StateDict, source: object, *, by_file: bool = True, on_meta: bool = False) -> StateDict:
    """Every value as a plain dense tensor; one on the meta device only if `on_meta`."""
    wrong = [key for key, value in state.items() if not isinstance(value, (Tensor, np.ndarray, np.generic))]
    if wrong or not state:
        what = f"{shown(wrong[0])} is no tensor" if wrong else "it is empty"
        raise WeightsError(f"{source} is no state dict: {what}")
    tensors: StateDict = {}
    for key, value in state.items():
        try:
            tensor = _as_tensor(value)
        except (TypeError, ValueError) as error:  # an array of texts, or of a dtype that torch lacks
            raise WeightsError(f"{source}: {shown(key)} is no array of numbers ({first_line(error)})") from error
        problem = _problem_of(tensor, on_meta)
        if problem is None and by_file and tensor.nbytes > tensor.untyped_storage().nbytes():
            problem = "has more values than the file holds; save it with tensor.contiguous()"
        if problem is not None:
            raise WeightsError(f"{source}: {shown(key)} {problem}")
        tensors[key] = tensor
    return tensors


def _as_tensor(value: Any) -> Tensor:
    """An array that may not be written to, or that runs backwards, is copied: torch takes neither."""
    return torch.as_tensor(np.require(value, requirements=["C", "W"]) if isinstance(value, np.ndarray) else value)


def _problem_of(tensor: Tensor, on_meta: bool) -> str | None:
    """What keeps a tensor from being a parameter's values."""
    if tensor.is_meta:
        return None if on_meta else "is on the meta device, a shape without values; save the model's real weights"
    if tensor.is_quantized:
        return "is quantised; save the weights from before the quantisation, or tensor.dequantize()"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"is {str(tensor.layout).removeprefix('torch.')}, not dense; save tensor.to_dense()"
    return None


def _adapt_in_chans(weight_OIHW: Tensor, in_chans: int) -> Tensor:
    """Fit a convolution to other input channels so that grey or repeated channels give the same response."""
    trained = weight_OIHW.shape[1]
    if trained == in_chans:
        return weight_OIHW
    if in_chans == 1:
        return weight_OIHW.sum(dim=1, keepdim=True)
    repeats = -(-in_chans // trained)
    return weight_OIHW.repeat(1, repeats, 1, 1)[:, :in_chans] * (trained / in_chans)


def _check(state: StateDict, own: Mapping[str, Tensor], source: object, model: Model) -> None:
    # Old checkpoints lack the batch counter, which is a statistic of training and not of the function.
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    misfits = _misfits(state, own)
    if misfits:
        classes = ""
        if misfits.keys() == {"mis-shaped"}:
            classes = (
                "; if only the classifier differs, give the file's number of classes: num_classes= of create_model, or "
                "--num-classes"
            )
        problems = "; ".join(f"{title}: {_first_few(names)}" for title, names in misfits.items())
        raise WeightsError(f"{source} does not fit {_name_of(model)}: {problems}{classes}")


def _misfits(state: StateDict, own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What differs between the two, by the kind of difference; a kind without any is left out."""
    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own]
    mis_shaped = [
        f"{name} is {tuple(state[name].shape)}, needs {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "left over": left_over, "mis-shaped": mis_shaped}
    return {title: names for title, names in kinds.items() if names}


def _first_few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(name[:200] for name in names[:4])}{more}"


def _name_of(model: Model) -> str:
    return model.name or type(model).__name__
