"""One callable that segments the batches of whatever runs an archive: Ray Data, Daft, `datasets`, or a loop."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .. import visualize
from .._errors import ImageError, SegzooError
from ..engines import compile
from ..engines.engine import check_engine
from ..prediction import ScoreMaker, mask_maker, protocol_of, segment_many
from ..results import Segmentation
from ..zoo import create_model
from ..zoo.index import check_name

COLUMNS = ("image", "bytes", "path")  # that hold images; a batch has one of them
FORMS = ("png", "rle")


class BatchSegmenter:
    """A batch of images in, masks, areas and errors out.

    >>> import numpy as np
    >>> from segzoo.scale import BatchSegmenter
    >>> segment = BatchSegmenter(model="edaformer_t.scenes", reduction="fast")
    >>> out = segment({"id": [7, 8], "image": [np.zeros((64, 96, 3), np.uint8), b"no image"]})
    >>> sorted(out), out["id"], out["mask_png"][0][:4], out["areas"].sum(axis=1).tolist()
    (['areas', 'error', 'id', 'mask_png'], [7, 8], b'\\x89PNG', [6144, 0])

    It is plain data until it is called: pickled, it goes to other processes without a model, and each of them builds
    the model at its first batch. Any number of threads may call one.

    Args:
        model: name, as `segzoo.create_model` takes it, with weights.
        reduction: plan of inference reduction, as `set_inference_reduction` takes it.
        engine, precision, threads: what runs the model, as for `segzoo.compile`; None: torch.
        device: of the model, where there is no engine: "cpu", "cuda", ...
        masks: "png": column `mask_png`, bytes of PNG files in palette mode, pixel value = class; "rle": column
            `mask_rle`, JSON of class name -> COCO's compressed run lengths.
        batch_size: so many images that the model sees at one size go through it together, as for `predict`.

    Raises:
        SegzooError: an option that is none.
    """

    def __init__(
        self,
        *,
        model: str,
        reduction: Any = None,
        engine: str | None = None,
        precision: str = "f32",
        threads: int | None = None,
        device: str = "cpu",
        masks: str = "png",
        batch_size: int = 1,
    ):
        check_name(model)
        if engine is not None:
            check_engine(engine, precision, threads)
            if device != "cpu":
                raise SegzooError(f"engine={engine!r} runs on the processor; leave out device={device!r}")
        elif precision != "f32" or threads is not None:
            raise SegzooError("precision and threads are of an engine; give engine='openvino', for example")
        if masks not in FORMS:
            raise SegzooError(f"masks must be 'png' or 'rle', not {masks!r}")
        self.model, self.reduction = model, reduction
        self.engine, self.precision, self.threads, self.device = engine, precision, threads, device
        self.masks, self.batch_size = masks, batch_size
        self._maker: ScoreMaker | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maker": None}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `areas`; builds the model."""
        return self._score_maker().label_set.classes

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Segment a batch.

        Args:
            batch: column name -> N values. One column holds images: "image" (uint8 arrays (H, W, C), or all else that
                `predict` takes), "bytes" (of image files) or "path".

        Returns:
            The other columns and "path" as they came, and `mask_png` or `mask_rle` (empty for an image that failed),
            `areas` ((N, K) pixels of each class, int64) and `error` (empty for an image that did not fail). The types
            of columns do not depend on what failed.

        Raises:
            SegzooError: a batch without one column of images.
        """
        column = _image_column(batch)
        maker = self._score_maker()
        outcomes = list(segment_many(maker, list(batch[column]), protocol_of(maker.row), self.batch_size))
        classes = len(maker.label_set)
        rows = [self._row(outcome, classes) for outcome in outcomes]
        mask_column = f"mask_{self.masks}"
        return {
            **{name: values for name, values in batch.items() if name == "path" or name != column},
            mask_column: [mask for mask, _, _ in rows],
            "areas": np.array([areas_K for _, areas_K, _ in rows], dtype=np.int64).reshape(len(rows), classes),
            "error": [error for _, _, error in rows],
        }

    def _row(self, outcome: Segmentation | ImageError, classes: int) -> tuple[bytes | str, np.ndarray, str]:
        if isinstance(outcome, ImageError):
            return b"" if self.masks == "png" else "", np.zeros(classes, np.int64), str(outcome)
        areas_K = np.bincount(outcome.mask.ravel(), minlength=classes)
        if self.masks == "rle":
            return json.dumps(outcome.to_rle()), areas_K, ""
        stream = io.BytesIO()
        visualize.palette_image(outcome.mask, outcome.label_set).save(stream, format="PNG")
        return stream.getvalue(), areas_K, ""

    def _score_maker(self) -> ScoreMaker:
        if self._maker is None:
            model = create_model(self.model, pretrained=True).eval().to(torch.device(self.device))
            if self.reduction is not None:
                model.set_inference_reduction(self.reduction)
            if self.engine is not None:
                model = compile(model, self.engine, self.precision, self.threads)
            self._maker = mask_maker(model)
        return self._maker


def image_columns(names: Iterable[str]) -> list[str]:
    """Those of a table's columns that hold images; a path beside one of them only says where the image is from."""
    found = [name for name in COLUMNS if name in names]
    if "path" in found and len(found) == 2:
        found.remove("path")
    return found


def _image_column(batch: Mapping[str, Sequence[Any]]) -> str:
    found = image_columns(batch)
    if len(found) != 1:
        raise SegzooError(f"a batch needs one column of images: image, bytes or path; this one has {', '.join(batch)}")
    return found[0]
