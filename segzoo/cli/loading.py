"""The model and the device that a verb runs on, from its arguments."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from .._errors import SegzooError, WeightsError
from .arguments import refuse_beside

if TYPE_CHECKING:
    import torch

    from ..engines import Engine
    from ..models.base import Model


def trained_model(args: argparse.Namespace) -> Model:
    """The model of `args.model` with all its weights, or those of `args.checkpoint` for `args.num_classes`.

    A fresh classifier, which `create_model` makes for training, would only guess.
    """
    from ..zoo import create_model, load_weights

    if args.checkpoint is None:
        try:
            model = create_model(args.model, pretrained=True, force_download=args.force_download)
        except WeightsError as error:
            text = str(error).removesuffix(", or leave out pretrained=True")
            raise WeightsError(text.replace("checkpoint_path=", "--checkpoint FILE")) from error
        if args.num_classes not in (None, model.num_classes):
            raise SegzooError(
                f"--num-classes {args.num_classes}: the weights of {model.name} have {model.num_classes} classes; "
                "leave it out, or name a file that has so many with --checkpoint"
            )
        return model
    model = create_model(args.model, num_classes=args.num_classes)
    load_weights(model, args.checkpoint, adapt_in_chans=True)
    return model


def score_maker_of(args: argparse.Namespace, dtype: torch.dtype | None = None) -> Model | Engine:
    """What runs the images: the engine of --engine-file or --engine, else the model; with its --reduction.

    Args:
        dtype: of the model; None leaves it as it is.
    """
    if args.engine_file is not None:
        return engine_in_file(args)
    model = model_for_engine(args, dtype)
    if args.reduction:
        model.set_inference_reduction(args.reduction)
    return run_by_engine(model, args)


def engine_in_file(args: argparse.Namespace) -> Engine:
    """The engine of --engine-file, beside which nothing may be given that the file fixes."""
    from ..engines import load_engine

    refuse_beside("--engine-file", args, ("--engine", "--checkpoint", "--num-classes", "--reduction"))
    return load_engine(
        args.engine_file, precision=args.precision or "f32", threads=args.threads, trust_code=args.trust_code
    )


def model_for_engine(args: argparse.Namespace, dtype: torch.dtype | None = None) -> Model:
    """`trained_model` in eval mode on its device, where the options of an engine allow it."""
    _check_engine_options(args, dtype)
    return trained_model(args).eval().to(find_device(args.device), dtype)


def run_by_engine(model: Model, args: argparse.Namespace) -> Model | Engine:
    """The model with its reduction as the engine of --engine; without one, the model."""
    if args.engine is None:
        return model
    from ..engines import compile

    return compile(model, args.engine, args.precision or "f32", args.threads)


def _check_engine_options(args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """Refuse what is only of an engine without --engine, and with it what is only of the model."""
    import torch

    if args.engine is None and (args.precision or args.threads):
        raise SegzooError("--precision and --threads are of an engine; add --engine openvino, for example")
    if args.engine is not None and args.device != "cpu":
        raise SegzooError(f"--engine {args.engine} runs on the processor; leave out --device {args.device}")
    if args.engine is not None and dtype not in (None, torch.float32):
        raise SegzooError("--dtype is the model's; of an engine say --precision bf16")


def find_device(name: str) -> torch.device:
    """The device of `--device`, if this machine has it."""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", name):
        raise SegzooError(f"--device {name}: use cpu, cuda (one of several: cuda:1), mps or xpu")
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SegzooError(f"--device {name}: {str(error).splitlines()[0]}; use cpu") from None
    return device
