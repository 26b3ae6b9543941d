"""From a checkpoint file or mapping to a model's parameters: safe reading, renaming, strict loading.

Nothing is unpickled except through torch's `weights_only=True` and the restricted reader of `.pdparams`. No failure is
swallowed: it ends in a WeightsError that names the file and the way out, and the model is unchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._errors import SegzooError, WeightsError
from ..models.base import FeaturePyramid, Model
from ..models.keys import Drop, Layout, StateDict, apply_rules
from .pdparams import read_pdparams

# Where a training script puts the parameters in its checkpoint; a moving average of them is what it evaluates.
WRAPPERS = ("state_dict_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of (Distributed)DataParallel and of torch.compile

_log = logging.getLogger("segzoo")


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A file on this machine, and how its tensors may become a model's."""

    path: str | Path
    by_hand: bool = False  # the user's own, read into a model as drawn, whose classifier may stay
    keep_mapped: bool = False  # see `build_with_weights`
    origin: str | None = None  # where it was downloaded from, which a refusal names


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
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    renewed = any(state[name] is own[name] for name in target.classifier_parameters())
    if not any(tensor.is_meta for tensor in own.values()):
        target.mark_loaded("fresh classifier" if renewed else "pretrained")
    if any(tensor.is_meta and not state[name].is_meta for name, tensor in own.items()):
        _log.warning(
            "%s is on the meta device: names and shapes fit, but nothing could be loaded; create it outside "
            'torch.device("meta")',
            target.name or type(target).__name__,
        )


def build_with_weights(build: Callable[[], Model], path: Path, *, keep_mapped: bool) -> Model:
    """A model whose parameters are the file's tensors: built without memory, then assigned.

    With `keep_mapped` they stay mapped from the file (private, copied page by page when written to), which is only
    safe where nobody writes into the file: in a cache, whose files are replaced as a whole.
    """
    with _Empty():
        model = build()
    persistent = model.state_dict()
    if any(name not in persistent for name, _ in model.named_buffers()):
        model = build()  # buffers that the constructor computes and no file holds
        load_weights(model, path, adapt_in_chans=True)
        return model
    state = _fitted_state(model, persistent, path, adapt_in_chans=True)
    device = torch.get_default_device()
    seen: set[int] = set()
    # By hand, because load_state_dict(assign=True) filters the whole state once for every module.
    for prefix, module in model.named_modules():
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for name, empty in list(tensors):
                tensor = state[f"{prefix}.{name}" if prefix else name]
                if tensor.is_meta:  # a batch counter that the file lacks
                    tensor = torch.zeros_like(tensor, device=device)
                fitted = tensor.to(device, empty.dtype).contiguous()
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


def _fitted_state(
    target: Model,
    own: Mapping[str, Tensor],
    weights: str | Path | Mapping[str, Any],
    *,
    renew_classifier: bool = False,
    adapt_in_chans: bool = False,
) -> StateDict:
    """The tensors of `weights` under the names and in the shapes of `own`, the model's state dict; not its dtypes."""
    source = weights if isinstance(weights, (str, Path)) else "the given mapping"
    state = read_state_dict(weights) if isinstance(weights, (str, Path)) else dict(weights)
    state = _tensors(_unwrap(state), source)
    state = target.fit_state(to_own_layout(target, state))
    if target.num_classes == 0:
        state = Drop(r"^head\.", "an encoder without classes has no classifier")(state)
    if renew_classifier:
        names = target.classifier_parameters()
        if any(name in state and state[name].shape != own[name].shape for name in names):
            state.update({name: own[name] for name in names})
    if adapt_in_chans and target.first_conv in state:
        state[target.first_conv] = _adapt_in_chans(state[target.first_conv], target.in_chans)
    _check(state, own, source, target)
    return state


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
    return _tensors(_unwrap(read_state_dict(path)), path)


def read_state_dict(path: str | Path) -> StateDict:
    """Read a checkpoint file without executing anything in it; raises WeightsError naming the file."""
    path = Path(path)
    try:
        if not path.exists():
            raise WeightsError(f"{path}: no such file; check the path, or use pretrained=True for published weights")
        if path.is_dir():
            raise WeightsError(f"{path} is a directory; name the weights file in it")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from error
    if empty:
        raise WeightsError(f"{path} is empty; download or copy it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in (".pdparams", ".zip"):
            return read_pdparams(path)
        # timm's script saves its options beside the weights, in a Namespace: it holds values, no code. It stays
        # allowed, since undoing that is global, too: it would take away what the user or another thread has allowed.
        torch.serialization.add_safe_globals([argparse.Namespace])
        # Mapped, so that what is not used (an optimizer's state) is never read; the old format cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (safetensors.SafetensorError, EOFError, OSError) as error:
        raise WeightsError(f"{path} is damaged or no weights file ({error}); download or copy it again") from error
    # The warning is torch's, of pickle protocols that it then refuses; raised where warnings are errors.
    except (pickle.UnpicklingError, UserWarning) as error:
        raise WeightsError(
            f"{path} holds more than tensors or is damaged, so it was not unpickled and nothing in it was run; "
            f"get it as .safetensors, or re-save only its state dict with torch.save ({first_line(error)})"
        ) from error
    except RuntimeError as error:
        raise WeightsError(f"{path} is damaged ({first_line(error)}); download or copy it again") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a state dict; save model.state_dict() instead")
    return dict(state)


def _unwrap(state: StateDict) -> StateDict:
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = dict(state[wrapper])
    while state and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _tensors(state: StateDict, source: object) -> StateDict:
    wrong = [key for key, value in state.items() if not isinstance(value, (Tensor, np.ndarray, np.generic))]
    if wrong or not state:
        what = f"{wrong[0]!r} is no tensor" if wrong else "it is empty"
        raise WeightsError(f"{source} is no state dict: {what}")
    return {key: torch.as_tensor(value) for key, value in state.items()}


def _adapt_in_chans(weight_OIHW: Tensor, in_chans: int) -> Tensor:
    """Fit a convolution to other input channels so that grey or repeated channels give the same response."""
    trained = weight_OIHW.shape[1]
    if trained == in_chans:
        return weight_OIHW
    if in_chans == 1:
        return weight_OIHW.sum(dim=1, keepdim=True)
    repeats = -(-in_chans // trained)
    return weight_OIHW.repeat(1, repeats, 1, 1)[:, :in_chans] * (trained / in_chans)


def _check(state: StateDict, own: Mapping[str, Tensor], source: object, model: nn.Module) -> None:
    # Old checkpoints lack the batch counter, which is a statistic of training and not of the function.
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    problems = []
    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own]
    mis_shaped = [
        f"{name} is {tuple(state[name].shape)}, needs {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for title, names in (("missing", missing), ("left over", left_over), ("mis-shaped", mis_shaped)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{title}: {', '.join(names[:4])}{more}")
    if problems:
        classes = ""
        if mis_shaped and not missing and not left_over:
            classes = (
                "; if only the classifier differs, give the file's number of classes: num_classes= of create_model, or "
                "--num-classes"
            )
        name = getattr(model, "name", "") or type(model).__name__
        raise WeightsError(f"{source} does not fit {name}: {'; '.join(problems)}{classes}")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
