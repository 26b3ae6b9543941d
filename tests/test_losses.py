"""The attention-to-mask loss against its definition; the official numbers are in test_segvit.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import segzoo
from segzoo.models.segvit import MaskOutput
from segzoo.training.losses import ATMLoss

K = 4


def made_up(size=(32, 48), batch: int = 2, seed: int = 0) -> dict:
    """Outputs of a model with 4 classes, one auxiliary prediction, and masks on a grid of 2x3."""
    generator = torch.Generator().manual_seed(seed)

    def output() -> MaskOutput:
        return MaskOutput(
            class_logits=torch.randn(batch, K, K + 1, generator=generator, dtype=torch.float64),
            mask_logits=torch.randn(batch, K, 2, 3, generator=generator, dtype=torch.float64),
            image_size=size,
            padded_size=(32, 48),
        )

    return {"output": output(), "auxiliary": [output()]}


def some_labels(size=(32, 48), batch: int = 2, ignored: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 3, (batch, *size), generator=generator)  # class 3 never occurs
    return torch.where(torch.rand(labels.shape, generator=generator) < ignored, 255, labels)


def by_definition(output: MaskOutput, labels: torch.Tensor, *, exclude: bool) -> dict[str, float]:
    """One pixel and one query at a time, in plain Python on top of the resized masks."""
    size = labels.shape[1:]
    masks = torch.nn.functional.interpolate(output.mask_logits, size=output.padded_size, mode="bilinear")
    masks = masks[:, :, : size[0], : size[1]]
    class_sum = weight_sum = focal = dice = pairs = 0.0
    for b in range(len(labels)):
        truth = labels[b].flatten().tolist()
        if exclude and all(label == 255 for label in truth):
            continue
        for k in range(K):
            present = k in truth
            weight = 1.0 if present else 0.1
            log_probability = output.class_logits[b, k].log_softmax(0)[k if present else K].item()
            class_sum -= weight * log_probability
            weight_sum += weight
            if not present:
                continue
            pairs += 1
            terms, overlap, total = [], 0.0, 0.0
            for label, logit in zip(truth, masks[b, k].flatten().tolist(), strict=True):
                if exclude and label == 255:
                    continue
                p = 1 / (1 + math.exp(-logit))
                hit = label == k
                p_true = p if hit else 1 - p
                terms.append((0.25 if hit else 0.75) * (1 - p_true) ** 2 * -math.log(p_true))
                overlap += p * hit
                total += p + hit
            focal += sum(terms) / len(terms)
            dice += 1 - (2 * overlap + 1) / (total + 1)
    return {
        "class": class_sum / weight_sum,
        "focal": 20 * focal / max(pairs, 1),
        "dice": dice / max(pairs, 1),
    }


@pytest.mark.parametrize("size", [(32, 48), (30, 41)])
@pytest.mark.parametrize("ignored", ["negative", "exclude"])
def test_terms_are_as_defined(ignored, size):
    outputs, labels = made_up(size), some_labels(size)
    labels[1] = labels[1].where(labels[1] != 2, 0)  # the images differ in their classes
    terms = ATMLoss(ignored=ignored).terms(outputs, labels)
    for prefix, output in (("", outputs["output"]), ("auxiliary.0.", outputs["auxiliary"][0])):
        for kind, value in by_definition(output, labels, exclude=ignored == "exclude").items():
            assert terms[prefix + kind].item() == pytest.approx(value, rel=1e-9), prefix + kind
    assert ATMLoss(ignored=ignored)(outputs, labels).item() == pytest.approx(sum(t.item() for t in terms.values()))


def test_excluded_pixels_cannot_change_the_loss():
    model = segzoo.create_model("test_segvit").double().eval()
    labels = some_labels((64, 64))
    labels[labels == 255] = 1
    labels[:, :, 32:] = 255
    outputs = model.forward_train(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    moved = outputs["output"].mask_logits.clone()
    moved[..., 3:] += 5  # cells whose interpolation reaches ignored pixels only
    changed = {**outputs, "output": outputs["output"]._replace(mask_logits=moved)}
    assert ATMLoss(ignored="exclude")(changed, labels) == ATMLoss(ignored="exclude")(outputs, labels)
    assert ATMLoss()(changed, labels) > ATMLoss()(outputs, labels)


@pytest.mark.parametrize("ignored", ["negative", "exclude"])
def test_an_image_without_labels(ignored):
    outputs, labels = made_up(), some_labels()
    labels[0] = 255
    terms = ATMLoss(ignored=ignored).terms(outputs, labels)
    expected = by_definition(outputs["output"], labels, exclude=ignored == "exclude")
    for kind, value in expected.items():
        assert terms[kind].item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("ignored", ["negative", "exclude"])
def test_a_batch_without_labels_has_finite_gradients(ignored):
    model = segzoo.create_model("test_segvit").train()
    loss = ATMLoss(ignored=ignored)(
        model.forward_train(torch.randn(2, 3, 64, 64)), torch.full((2, 64, 64), 255, dtype=torch.long)
    )
    loss.backward()
    assert loss.item() == 0 if ignored == "exclude" else loss.item() > 0
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]


def test_weights_of_the_terms():
    outputs, labels = made_up(), some_labels()
    plain = ATMLoss().terms(outputs, labels)
    weighted = ATMLoss(class_weight=2, focal_weight=10, dice_weight=3).terms(outputs, labels)
    for kind, factor in (("class", 2.0), ("focal", 0.5), ("dice", 3.0)):
        assert weighted[kind].item() == pytest.approx(factor * plain[kind].item())


def test_low_precision_outputs_are_summed_in_float32():
    outputs, labels = made_up(), some_labels()

    def half(output: MaskOutput) -> MaskOutput:
        return output._replace(class_logits=output.class_logits.half(), mask_logits=output.mask_logits.half())

    low = {"output": half(outputs["output"]), "auxiliary": [half(outputs["auxiliary"][0])]}
    loss = ATMLoss()(low, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ATMLoss()(outputs, labels).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("ignored", ["negative", "exclude"])
def test_labels_of_any_integer_dtype(ignored, dtype):
    outputs, labels = made_up(), some_labels()
    loss = ATMLoss(ignored=ignored)
    assert loss(outputs, labels.to(dtype)) == loss(outputs, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(1, 32, 48, dtype=torch.long), r"labels must be \(2, H, W\), not \(1, 32, 48\)"),
        (torch.zeros(2, 1, 32, 48, dtype=torch.long), r"labels must be \(2, H, W\)"),
        (torch.full((2, 32, 48), 4), "0 to 3 or 255"),
        (torch.full((2, 32, 48), -1), "0 to 3 or 255"),
        (torch.zeros(2, 32, 48), "labels must be integers, not torch.float32"),
        (torch.zeros(2, 32, 48, dtype=torch.bool), "labels must be integers, not torch.bool"),
    ],
)
def test_refused_labels(labels, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        ATMLoss()(made_up(), labels)


def test_refused_option():
    with pytest.raises(segzoo.SegzooError, match="'negative' or 'exclude'"):
        ATMLoss(ignored="skip")


def _train_on_half(rank: int, rendezvous: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    terms = ATMLoss().terms(*_half_of_a_batch(rank))
    results[rank] = {kind: terms[kind].item() for kind in ("focal", "dice")}
    dist.destroy_process_group()


def _half_of_a_batch(rank: int) -> tuple[dict, torch.Tensor]:
    """Three classes in the first image, one in the second: their own means differ from the mean of both."""
    outputs, labels = made_up(), some_labels()
    labels[1] = 0
    image = slice(rank, rank + 1)

    def take(output: MaskOutput) -> MaskOutput:
        return output._replace(class_logits=output.class_logits[image], mask_logits=output.mask_logits[image])

    return {"output": take(outputs["output"]), "auxiliary": [take(outputs["auxiliary"][0])]}, labels[image]


@pytest.mark.slow
def test_masks_are_normalised_over_the_batch_of_all_processes(tmp_path):
    """Averaging over two processes, as DistributedDataParallel does, gives the loss of the whole batch."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_train_on_half, args=(str(tmp_path / "rendezvous"), results), nprocs=2)
        mean = {kind: (results[0][kind] + results[1][kind]) / 2 for kind in ("focal", "dice")}
    outputs, labels = made_up(), some_labels()
    labels[1] = 0
    whole = ATMLoss().terms(outputs, labels)
    alone = [ATMLoss().terms(*_half_of_a_batch(rank)) for rank in range(2)]
    for kind in ("focal", "dice"):
        assert mean[kind] == pytest.approx(whole[kind].item(), rel=1e-9)
        assert (alone[0][kind] + alone[1][kind]).item() / 2 != pytest.approx(whole[kind].item(), rel=1e-3)
