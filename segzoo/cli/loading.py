"""The model and the device that a verb runs on, from its arguments."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from .._errors import SegzooError, WeightsError

if TYPE_CHECKING:
    import torch

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
            raise WeightsError(str(error).replace("checkpoint_path=", "--checkpoint FILE")) from error
        if args.num_classes not in (None, model.num_classes):
            raise SegzooError(
                f"--num-classes {args.num_classes}: the weights of {model.name} have {model.num_classes} classes; "
                "leave it out, or name a file that has so many with --checkpoint"
            )
        return model
    model = create_model(args.model, num_classes=args.num_classes)
    load_weights(model, args.checkpoint, adapt_in_chans=True)
    return model


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
