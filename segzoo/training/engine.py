"""Training on Hugging Face Accelerate: one process, several GPUs, several machines; stopped and gone on with exactly.

    data, held_out = open_data("street", split="train"), open_data("street", split="val")
    model = create_model("edaformer_t.scenes", pretrained=True, num_classes=data.num_classes)
    train(model, data, validation=held_out, recipe=load_recipe("scenes"), folder="runs/street")

A step is the same however it is spread: its images and their augmentation depend on the seed and the step alone, and
cross-entropy is divided by the labelled pixels of all processes (see `batches` and `pixel_losses`). What goes into a
checkpoint is everything that the next step depends on, so that a training that was killed ends with the weights of one
that was not; on GPUs as far as their own operators are deterministic.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import SegzooError
from ..data.classification import ClassificationData
from ..data.segmentation import SegmentationData
from ..models.base import Encoder, Model
from ..models.rows import PretrainedCfg
from ..plans import inference_reduction
from .batches import Batch, Data, Parts, Share, check_data, check_same_classes, class_frequencies, loader
from .evaluation import evaluate
from .losses import ATMLoss
from .pixel_losses import PixelLoss
from .recipes import Recipe
from .records import card_sections, conditions, describe, figures, plan_text, run_row, with_figures
from .reports import Evaluation
from .runs import RunFolder
from .schedules import make_optimizer, set_learning_rate

Watch = Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a training."""

    folder: Path  # `create_model(f"local-dir:{folder}")` loads the model
    step: int  # of the exported weights
    metrics: Mapping[str, float]  # on the validation data, in [0, 1]; empty without any
    class_rows: Sequence[Mapping[str, Any]]  # a class, of segmentation


def train(
    model: Model,
    data: Data,
    *,
    recipe: Recipe,
    folder: str | Path,
    validation: Data | None = None,
    reduction: object = None,
    during_training: bool = False,
    start: str = "",
    workers: int = 0,
    cpu: bool = False,
    command: str = "",
    tensorboard: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
    watch: Watch | None = None,
) -> Trained:
    """Train a model, or go on with the training in `folder`.

    Args:
        model: of `create_model`, for the classes of the data; it is changed, and without its tag's name afterwards.
        recipe: its `drop_path_rate` is an option to build the model with, and changes nothing here.
        validation: of the same classes; the weights that are best on it are exported. None: the last ones are.
        reduction: a plan for the evaluations, or with `during_training` for the training and the exported model, too.
        start: what the weights are at the beginning, for the record and the card.
        workers: processes that prepare images beside each training process.
        cpu: train on the processor even if there is a GPU.
        command: for the record.
        tensorboard: write the log for it, too.
        progress: wraps the steps, as tqdm does.
        watch: called with each row of the log.

    Raises:
        SegzooError: data of other classes, values of the recipe that would be left out, labels that are no class, a
            batch that cannot be shared out, a loss that is no number any more, a folder that holds something else, or a
            library that is missing.
        SaveError: no room; what was saved before is whole.
        ImageError: an image that cannot be read.
    """
    _refuse_unfit(model, data, recipe)
    for part in (data, validation):
        if part is not None:
            check_data(part, model.num_classes)
    if validation is not None:
        check_same_classes(data, validation)
    accelerator = _accelerator(recipe, cpu)
    share = Share(accelerator.process_index, accelerator.num_processes, recipe.accumulation)
    share.check(recipe)
    if reduction is not None and during_training:
        model.set_inference_reduction(reduction, during_training=True)
    elif reduction is not None:
        with inference_reduction(model, reduction):
            pass  # refused now rather than after hours
    row = run_row(model, data, recipe, start)
    record = {
        "model": model.name,
        "start": start,
        "data": describe(data),
        "validation": None if validation is None else describe(validation),
        "reduction": plan_text(reduction),
        "during_training": during_training,
        "command": command,
        "conditions": conditions(accelerator),
    }
    model.name = model.name.partition(".")[0]
    model.pretrained_cfg = row
    run = _Run(
        model=model,
        data=data,
        validation=validation,
        recipe=recipe,
        folder=RunFolder(Path(folder), ("lr", "loss", *figures(data), "seconds")),
        record=record,
        accelerator=accelerator,
        share=share,
        reduction=None if during_training else reduction,
        make_writer=_summary_writer() if tensorboard else None,
        watch=watch or (lambda row: None),
    )
    return run.all(workers, progress)


class _Run:
    """The state of a training, and its steps."""

    def __init__(
        self,
        *,
        model: Model,
        data: Data,
        validation: Data | None,
        recipe: Recipe,
        folder: RunFolder,
        record: Mapping[str, Any],
        accelerator: Any,
        share: Share,
        reduction: object,
        make_writer: Callable[[str], Any] | None,
        watch: Watch,
    ):
        self.model, self.data, self.validation = model, data, validation
        self.recipe, self.folder, self.record = recipe, folder, record
        self.accelerator, self.share, self.reduction = accelerator, share, reduction
        self.make_writer, self.watch = make_writer, watch
        self.writer: Any = None
        self.row = model.pretrained_cfg or PretrainedCfg()
        self.dtype = next(model.parameters()).dtype
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] = {"step": 0, "score": -math.inf, "metrics": {}, "classes": []}
        torch.manual_seed(recipe.seed + accelerator.process_index)
        model.set_grad_checkpointing(recipe.grad_checkpointing)
        self.average = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema_decay is not None else None
        if recipe.sync_batch_norm and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.loss = make_loss(model, data, recipe)
        self.optimizer = make_optimizer(model, recipe)

    # --- the walk

    def all(self, workers: int, progress: Callable[[range], Iterable[int]]) -> Trained:
        main = self.accelerator.is_main_process
        if main:
            self.folder.begin(self.record, self.recipe)
        self.accelerator.wait_for_everyone()
        saved = self.folder.load_last()
        self._load_weights(saved)
        module = _Step(self.model, self.loss, compiled=self.recipe.compile)
        self.module, self.optimizer = self.accelerator.prepare(module, self.optimizer)
        if self.average is not None:
            self.average.to(self.accelerator.device)
            if saved is None:  # every process has the first one's weights since they are wrapped
                self.average.load_state_dict(self.model.state_dict())
        self._load_rest(saved)
        if main:
            self.folder.cut_log(self.step)
            if self.make_writer is not None:
                self.writer = self.make_writer(os.fspath(self.folder.folder / "tensorboard"))
        self._train(workers, progress)
        if not self.best["step"]:  # no evaluation found anything to count
            self.best["step"] = self.step
            self._export(None)
        if self.writer is not None:
            self.writer.close()
        self.accelerator.wait_for_everyone()
        return Trained(self.folder.folder, self.best["step"], self.best["metrics"], self.best["classes"])

    def _train(self, workers: int, progress: Callable[[range], Iterable[int]]) -> None:
        row = self.row
        parts = Parts(
            self.data,
            self.recipe,
            share=self.share,
            num_classes=self.model.num_classes,
            mean=row.mean,
            std=row.std,
            first_step=self.step,
        )
        batches = loader(parts, workers=workers, pin=self.accelerator.device.type == "cuda")
        self._train_mode()
        start, before = time.perf_counter(), self.seconds
        for step in progress(range(self.step, self.recipe.steps)):
            loss, rate = self._take_step(step, [next(batches) for _ in range(self.share.parts)])
            self.step = step + 1
            self.seconds = before + time.perf_counter() - start
            self._account(loss, rate)

    def _take_step(self, step: int, parts: Sequence[Batch]) -> tuple[Tensor, float]:
        """One step of the optimizer; returns this process's part of the loss, and the learning rate."""
        rate = set_learning_rate(self.optimizer, self.recipe, step)
        mass = self._mass(parts)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.accelerator.device)
        for i, (images_BCHW, labels) in enumerate(parts):
            waits = i < len(parts) - 1  # gradients are exchanged once a step
            with self.accelerator.no_sync(self.module) if waits else contextlib.nullcontext():
                x_BCHW = images_BCHW.to(self.accelerator.device, self.dtype, non_blocking=True)
                loss = self.module(x_BCHW, labels.to(self.accelerator.device, non_blocking=True), mass, 1 / len(parts))
                self.accelerator.backward(loss)
            total = total + loss.detach()
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        if self.average is not None and self.recipe.ema_decay is not None:
            update_average(self.average, self.model, min(self.recipe.ema_decay, (1 + step) / (10 + step)))
        return total, rate

    def _mass(self, parts: Sequence[Batch]) -> Tensor:
        """What sums over this process's parts are divided by, so that the mean over processes is that of the step."""
        if not isinstance(self.loss, PixelLoss):
            return torch.ones((), device=self.accelerator.device)
        mass = torch.stack([self.loss.mass(labels) for _, labels in parts]).sum()
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return self._mean(mass.to(self.accelerator.device, dtype))

    def _mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="sum") / self.accelerator.num_processes

    # --- accounts

    def _account(self, loss: Tensor, rate: float) -> None:
        """What is due after a step: evaluate, log, save."""
        recipe, step = self.recipe, self.step
        evaluates = self.validation is not None and step in evaluation_steps(recipe)
        saves = step % recipe.save_every == 0 or evaluates or step == recipe.steps
        logs = step % recipe.log_every == 0 or saves  # no checkpoint of a loss that is no number
        if logs:
            values = {"step": step, "lr": rate, "loss": float(self._mean(loss))}
            if not math.isfinite(values["loss"]):
                raise SegzooError(
                    f"the loss of step {step} is {values['loss']}: take a smaller --lr or a longer warm-up, set "
                    "clip_grad, or leave out 16-bit precision"
                )
            measured = self._evaluate() if evaluates else {}
            if self.accelerator.is_main_process:
                self._log({**values, **measured, "seconds": round(self.seconds, 2)})
        if saves:
            self._save()

    def _log(self, values: Mapping[str, Any]) -> None:
        self.folder.log(values)
        if self.writer is not None:
            for name, value in values.items():
                if name != "step":
                    self.writer.add_scalar(name, value, values["step"])
        self.watch(values)

    def _subject(self) -> Model:
        """What is evaluated and exported."""
        subject = self.model if self.average is None else self.average
        subject.mark_loaded()
        return subject

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, and export what is better than before; the figures of the log."""
        from accelerate.utils import broadcast

        assert self.validation is not None
        subject = self._subject()
        if self.accelerator.num_processes > 1:  # each has seen other images in its BatchNorms
            for buffer in subject.buffers():
                broadcast(buffer)
        result = evaluate(subject, self.validation, reduction=self.reduction)
        self._train_mode()
        score = result.metrics[result.main]
        if not math.isnan(score) and score > self.best["score"]:
            self.best = {
                "step": self.step,
                "score": score,
                "metrics": dict(result.metrics),
                "classes": result.class_rows(),
            }
            self._export(result)
        return {name: result.metrics[name] for name in figures(self.data)}

    def _export(self, result: Evaluation | None) -> None:
        if not self.accelerator.is_main_process:
            return
        row = self.row if result is None else with_figures(self.row, result, self.step, self.record["reduction"])
        self.folder.export(self._subject(), row, card_sections(self.record, self.recipe, self.step, result), self.step)

    def _save(self) -> None:
        random_states = self._random_states()
        if self.validation is None:
            self.best["step"] = self.step
            self._export(None)
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "best": self.best,
            "random": random_states,
        }
        self.folder.save_last(state, self.step)

    def _random_states(self) -> list[dict[str, Any]]:
        """Of every process, in order."""
        from accelerate.utils import gather_object

        return gather_object([random_state(self.accelerator.device)])

    def _load_weights(self, saved: Mapping[str, Any] | None) -> None:
        """Before the model is wrapped."""
        if saved is None:
            return
        try:
            self.model.load_state_dict(saved["model"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
        except RuntimeError as error:
            raise SegzooError(
                f"{self.folder.folder} holds the training of a model of other options than this {self.model.name}; "
                "choose another place with -o, or build the model as it was"
            ) from error

    def _load_rest(self, saved: Mapping[str, Any] | None) -> None:
        """Once everything is on its device."""
        if saved is None:
            return
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step, self.seconds, self.best = saved["step"], saved["seconds"], saved["best"]
        if len(saved["random"]) == self.accelerator.num_processes:
            set_random_state(saved["random"][self.accelerator.process_index], self.accelerator.device)

    def _train_mode(self) -> None:
        self.module.train()
        if self.recipe.freeze_batch_norm:
            for part in self.model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()


class _Step(nn.Module):
    """What is wrapped for several processes: images and labels -> this process's part of the loss."""

    outputs_of: Callable[[Tensor], Any]

    def __init__(self, model: Model, loss: nn.Module, *, compiled: bool):
        super().__init__()
        self.model = model
        self.loss = loss
        forward_train = cast(Any, model).forward_train  # which encoders and segmentation models have
        self.outputs_of = torch.compile(forward_train) if compiled else forward_train

    def forward(self, x_BCHW: Tensor, labels: Tensor, mass: Tensor, share: float) -> Tensor:
        outputs = self.outputs_of(x_BCHW)
        if isinstance(self.loss, PixelLoss):
            return self.loss(outputs, labels, mass=mass, share=share)
        return share * self.loss(outputs, labels)


def make_loss(model: Model, data: Data, recipe: Recipe) -> PixelLoss | ATMLoss:
    """The loss of a recipe for a model: SegViT's own where its scores are products.

    Raises:
        SegzooError: a loss that the family's outputs are not made for.
    """
    ignore_index = data.ignore_index if isinstance(data, SegmentationData) else -1
    product = getattr(model, "score_kind", "logits") == "product"
    if product != (recipe.loss == "atm"):
        raise SegzooError(
            f"{model.name} is trained with loss {'atm' if product else 'ce or ohem'}, not {recipe.loss}: add --set "
            f"loss={'atm' if product else 'ce'}"
        )
    _refuse_unused(data, recipe)
    if recipe.loss == "atm":
        return ATMLoss(ignore_index=ignore_index)
    weights = None
    if recipe.class_balance and isinstance(data, SegmentationData):
        balanced = (class_frequencies(data, model.num_classes) + 1e-4) ** -recipe.class_balance
        weights = (balanced / balanced.mean()).tolist()
    return PixelLoss(
        ignore_index=ignore_index,
        class_weights=weights,
        label_smoothing=recipe.label_smoothing,
        aux_weight=recipe.aux_weight,
        dice_weight=recipe.dice_weight,
        ohem=recipe.loss == "ohem",
        ohem_threshold=recipe.ohem_threshold,
        ohem_min_kept=recipe.ohem_min_kept,
    )


def _refuse_unused(data: Data, recipe: Recipe) -> None:
    """Raises SegzooError for values that this kind of data or this loss would silently leave out."""
    if isinstance(data, ClassificationData):
        kind, unused = "of a classifier", ("dice_weight", "class_balance")
        if recipe.loss == "ohem":
            raise SegzooError("loss ohem is of pixels, and this is a classifier: add --set loss=ce")
    elif recipe.loss == "atm":
        kind, unused = "with loss atm", ("dice_weight", "class_balance", "label_smoothing", "mixup")
    else:
        kind, unused = "of masks", ("mixup",)
    for name in unused:
        if getattr(recipe, name):
            raise SegzooError(f"{name} has no meaning in a training {kind}: add --set {name}=0")


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, of every parameter and every statistic; counts are copied."""
    values = model.state_dict()
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(values[name], 1 - decay)
        else:
            tensor.copy_(values[name])


@functools.lru_cache(maxsize=8)
def evaluation_steps(recipe: Recipe) -> frozenset[int]:
    """After how many steps the model is evaluated; the last is the end."""
    count = min(recipe.evaluations, recipe.steps)
    return frozenset(round(recipe.steps * (i + 1) / count) for i in range(count))


# --- the random state of a process


def random_state(device: torch.device) -> dict[str, Any]:
    """As plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """What `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


# --- what is needed


def _refuse_unfit(model: Model, data: Data, recipe: Recipe) -> None:
    kind = getattr(model, "score_kind", "classifier")
    if kind == "heatmap":
        raise SegzooError(f"{model.name} finds keypoints, which this trains not; see benchmarks/train_keypoints.py")
    if isinstance(model, Encoder) != isinstance(data, ClassificationData):
        needs = "folders of classes, as ImageNet's" if isinstance(model, Encoder) else "images with masks"
        raise SegzooError(f"{model.name} is trained on {needs}, which these data are not")
    if model.num_classes == 0:
        raise SegzooError(f"{model.name} has no classifier; say how many classes it is for")
    if recipe.precision != "no" and next(model.parameters()).dtype != torch.float32:
        raise SegzooError(f"precision {recipe.precision} is for a model in float32; leave it out")


def _accelerator(recipe: Recipe, cpu: bool) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise SegzooError("training needs accelerate: pip install 'segzoo[train]'") from None
    cpu = cpu or not _has_gpu()
    if cpu and recipe.precision == "fp16":
        raise SegzooError("fp16 is for GPUs; a processor takes --precision bf16 or no")
    try:
        return Accelerator(mixed_precision=recipe.precision, cpu=cpu)
    except ValueError as error:  # it keeps one setting a process
        raise SegzooError(
            f"{str(error).splitlines()[0]}; one process trains with one precision: start another for precision "
            f"{recipe.precision}"
        ) from error


def _has_gpu() -> bool:
    return torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()


def _summary_writer() -> Callable[[str], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SegzooError("--tensorboard needs tensorboard: pip install 'segzoo[tensorboard]'") from None
    return SummaryWriter
