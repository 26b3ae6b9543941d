"""What of a model is handed to an engine: modules whose inputs and outputs are plain tensors, and their program.

A program is what `torch.export` records of a form, with dynamic batch, height and width where the model allows it.

Shape letters: B batch, K classes, C channels, H, W rows and columns.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .._errors import SegzooError
from ..folding import fold
from ..layers.reduction import Bipartite, EnergyProtected, GridMerge, LocalGlobal
from ..models.segmenter import SegmentationModel
from ..plans import current_plan
from ..preprocess import per_channel
from ..twins import eval_twin

# Sides in pixels at which dynamic forms are recorded. Large enough that no window of a trained or reduced pool is cut,
# and different, so that no equality of sides becomes a condition.
EXAMPLE_SIZE = (288, 352)
STEP = 32  # pixels from one side that is tried to the next
ANY = Dim.AUTO
NO_LIMIT = 2**31  # a bound below it on a side is a real one
# Entries that choose among tokens, as many as the size says: torch.export makes constants of their numbers.
MATCHING = (Bipartite, LocalGlobal, EnergyProtected, GridMerge)
OLDEST_TORCH = (2, 13)  # whose exporter was tried and does it; 2.6's does not


def plain_twin(model: SegmentationModel) -> SegmentationModel:
    """A folded copy in eval mode, in force with the model's plan, of operators that every engine knows."""
    return fold(eval_twin(model), fast=False)


class HeadForm(nn.Module):
    """Normalised images (B, C, H, W) -> the tensors of the head's output."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("image",)

    @property
    def output_names(self) -> tuple[str, ...]:
        return self.model.head_names

    @property
    def dynamic_axes(self) -> dict[str, dict[int, Any]]:
        """Of every input, the axes that may have any length."""
        return {"image": {0: ANY, 2: ANY, 3: ANY}}

    def example(self, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Inputs for two images of (H, W) pixels."""
        return (torch.randn(2, self.model.in_chans, *size, generator=generator),)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.model.head_tensors(self.model.forward_head(self.model.forward_features(image)))


class StageForm(HeadForm):
    """Normalised images -> the encoder's maps, fine to coarse, then the tensors of the head's output."""

    @property
    def output_names(self) -> tuple[str, ...]:
        return (*(f"map_{i}" for i in range(len(self.model.feature_info))), *self.model.head_names)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.forward_features(image)
        return (*features.maps, *self.model.head_tensors(self.model.forward_head(features)))


class ScoresForm(HeadForm):
    """Normalised images -> scores (B, K, H, W) at input size, then the tensors of the head's output."""

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("scores", *self.model.head_names)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        head_output = self.model.forward_head(self.model.forward_features(image))
        return (self.model.to_size(head_output, image.shape[2:]), *self.model.head_tensors(head_output))


class MaskForm(HeadForm):
    """Images (B, H, W, C) uint8 in 0..255 at the size that the model sees, and a canvas (H', W') uint8 whose shape is
    the size of the map -> the class of every pixel (B, H', W') uint8, or int32 beyond 256 classes."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: SegmentationModel, *, mean: Sequence[float], std: Sequence[float]):
        super().__init__(model)
        self.register_buffer("mean", per_channel(tuple(mean), model.in_chans))
        self.register_buffer("std", per_channel(tuple(std), model.in_chans))

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("image", "canvas")

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("mask",)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, Any]]:
        return {"image": {0: ANY, 1: ANY, 2: ANY}, "canvas": {0: ANY, 1: ANY}}

    def example(self, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        image_BHWC = torch.randint(256, (2, *size, self.model.in_chans), generator=generator).to(torch.uint8)
        return image_BHWC, torch.zeros(2 * size[0] + 5, 2 * size[1] + 9, dtype=torch.uint8)

    def forward(self, image: Tensor, canvas: Tensor) -> tuple[Tensor, ...]:
        x_BCHW = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        head_output = self.model.forward_head(self.model.forward_features(x_BCHW))
        scores_BKHW = self.model.to_size(head_output, (canvas.shape[0], canvas.shape[1]))
        dtype = torch.uint8 if scores_BKHW.shape[1] <= 256 else torch.int32
        return (scores_BKHW.argmax(dim=1).to(dtype),)


@dataclasses.dataclass(frozen=True)
class Program:
    """A recorded form."""

    exported: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    smallest: int  # side in pixels of the smallest image that it takes; of a fixed program its smaller side


def why_fixed(model: SegmentationModel) -> str | None:
    """What ties a program of the model to one size of image, and the way out; None: nothing does."""
    merging = {site: type(entry).__name__ for site, entry in current_plan(model).items() if isinstance(entry, MATCHING)}
    way_out = "segzoo.compile records every size for itself"
    if merging:
        return (
            f"the reduction merges by likeness ({', '.join(dict.fromkeys(merging.values()))}) at {', '.join(merging)}, "
            f"which no file of dynamic size can hold; use Neighbour2d (preset 'n2d') or Pool there, or {way_out}"
        )
    if not model.encoder.any_size_graph:
        return (
            f"torch cannot record the windows of {type(model.encoder).__name__} for images of any size in a file; take "
            f"another encoder, or {way_out}"
        )
    return None


def dynamic_program(form: HeadForm) -> Program:
    """A form with dynamic batch, height and width.

    Raises:
        SegzooError: a plan or an encoder that fixes the size.
    """
    reason = why_fixed(form.model)
    if reason is not None:
        raise SegzooError(reason)
    exported = _recorded(form, form.example(EXAMPLE_SIZE, torch.Generator().manual_seed(0)), form.dynamic_axes)
    return Program(exported, form.input_names, form.output_names, smallest=_smallest(form, exported))


def fixed_program(form: HeadForm, shape: Sequence[int]) -> Program:
    """A form for images of this (B, C, H, W) alone, whatever the plan."""
    exported = _recorded(form, (torch.zeros(*shape),), None)
    return Program(exported, form.input_names, form.output_names, smallest=min(shape[2:]))


def _recorded(form: HeadForm, examples: tuple[Tensor, ...], dims: Mapping[str, Any] | None) -> ExportedProgram:
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SegzooError(
            f"recording a model for an engine or into a file needs torch {oldest} or newer, not {torch.__version__}"
        )
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter, about itself
        return torch.export.export(form.eval(), examples, dynamic_shapes=dims, strict=False)


def _smallest(form: HeadForm, exported: ExportedProgram) -> int:
    """The smallest side of an image in pixels for which the program computes what the form does.

    What torch assumed on the way is a bound, but often a needless one: that no side is 1 anywhere, say. So smaller
    sides are tried, all from a smallest one up to that bound.
    """
    image = next(node.meta["val"] for node in exported.graph.nodes if node.name == "image")
    ranges = [exported.range_constraints[side.node.expr] for side in image.shape if not isinstance(side, int)]
    if len(ranges) < 3 or any(bool(found.upper < NO_LIMIT) for found in ranges):
        raise SegzooError(f"torch.export made a constant of a side of the image: {exported.range_constraints}")
    bound = max(int(found.lower) for found in ranges)
    graph = unguarded(exported)
    smallest = bound
    for side in reversed(range(STEP, bound, STEP)):
        if not all(_agrees(form, graph, size) for size in ((side, side), (side + 1, side + STEP - 3))):
            break
        smallest = side
    return smallest


def unguarded(exported: ExportedProgram) -> nn.Module:
    """The program as a module that takes every size that its operators take: what torch assumed is not checked."""
    graph = exported.module(check_guards=False)
    graph._forward_pre_hooks.clear()  # where the ranges of sides are checked
    return graph


def _agrees(form: HeadForm, graph: nn.Module, size: tuple[int, int]) -> bool:
    inputs = form.example(size, torch.Generator().manual_seed(0))
    with torch.inference_mode(False), torch.no_grad():
        expected = form(*inputs)
        try:
            found = graph(*inputs)
        except RuntimeError:  # the program has no such size
            return False
    return all(
        a.shape == b.shape and bool((a.float() - b.float()).abs().max() <= 1e-4 * a.abs().max())
        for a, b in zip(expected, found, strict=True)
    )
