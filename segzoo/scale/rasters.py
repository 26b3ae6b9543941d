"""Rasters: georeferenced pictures, and TIFFs too large to be an image, read in windows and written as tiled class maps.

The model sees a raster at its own pixels, in the windows of `predict(mode="slide")`; nothing of full size is in
memory. Scores are summed in parts so narrow that `SCORE_BYTES` hold them; a window that touches two is looked at twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, ImageFileDirectory_v2
from torch import Tensor, nn

from .._errors import ImageError, SaveError, SegzooError, first_line
from .._files import write_files
from ..labels import LabelSet
from ..masks import class_map
from ..models.base import WeightsState
from ..plans import Plan
from ..prediction import (
    AVERAGED,
    OnLook,
    Protocol,
    ScoreMaker,
    mask_maker,
    protocol_of,
    slide_strips,
    strip_windows,
)
from ..preprocess import check_pixels, per_channel, to_input
from ..results import Area, class_records

if TYPE_CHECKING:
    from rasterio.io import DatasetReader, DatasetWriter

SCORE_BYTES = 96 * 2**20  # of the scores that are summed at a time
CHUNK_PIXELS = 2**19  # whose classes are made at a time
CACHE_MIB = 32  # of blocks that GDAL keeps decoded, or not yet written
TILE = 512  # side in pixels of the blocks of a class map
# How files begin, and GDAL's name of what they are then; none of them can point to a file elsewhere, as a VRT can.
DRIVERS = {
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "GTiff"),
    **dict.fromkeys((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "JP2OpenJPEG"),
    b"EHFA_HEADER_TAG": "HFA",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
}
# Tags of a TIFF that say where on earth it lies: scale of a pixel, transformation, keys of the coordinate system.
GEO_TAGS = (33550, 34264, 34735)


class SavedRaster(NamedTuple):
    """Where the result of a raster is on disk."""

    mask: Path  # GeoTIFF: the class of every pixel, 255 (of more than 255 classes 65535) where there is no data
    classes: Path  # JSON: `RasterMap.to_dict`

    @classmethod
    def of(cls, mask: Path) -> SavedRaster:
        """The places of both files of a result; the mask's name ends in .tif whatever it is here."""
        return cls(mask.with_name(f"{mask.stem}.tif"), mask.with_name(f"{mask.stem}_classes.json"))


@dataclasses.dataclass(frozen=True)
class RasterMap:
    """A class map on disk, and what it is of."""

    files: SavedRaster
    size: tuple[int, int]  # (H, W) in pixels
    pixels: tuple[int, ...]  # of each class
    no_data: int  # pixels
    crs: str | None  # coordinate system, as WKT; None where the raster has none
    transform: tuple[float, ...]  # (a, b, c, d, e, f): x = a column + b row + c, y = d column + e row + f
    bands: tuple[int, ...]  # that the model saw, from 1
    label_set: LabelSet
    source: str
    model: str
    weights_state: WeightsState
    plan: Plan

    def areas(self) -> dict[str, Area]:
        """Class name -> its pixels and its share of those with data, of the classes present, the largest first."""
        records = class_records(self.label_set, np.array(self.pixels))
        return {record["name"]: Area(record["pixels"], record["share"]) for record in records}

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: the raster, the model with its reduction, and the classes present, the largest first."""
        return {
            "image": self.source,
            "size": list(self.size),
            "bands": list(self.bands),
            "crs": self.crs,
            "transform": list(self.transform),
            "model": self.model,
            "weights_state": self.weights_state,
            "reduction": json.loads(self.plan.to_json()),
            "no_data": self.no_data,
            "classes": class_records(self.label_set, np.array(self.pixels)),
        }


def is_raster(path: str | Path) -> bool:
    """Whether a file is a TIFF that says where on earth it lies, or one of more pixels than SEGZOO_MAX_PIXELS.

    Only its header is read; what cannot be read is no raster.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged header, which whoever reads the image will report
            header = file.read(8)
            if header[:2] not in (b"II", b"MM"):
                return False
            if 43 in header[2:4]:  # BigTIFF
                header += file.read(8)
            tags = ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            size = int(tags[IMAGELENGTH]), int(tags[IMAGEWIDTH])
    except Exception:  # Pillow lets through what it stumbles over
        return False
    try:
        check_pixels(str(path), size)
    except ImageError:
        return True
    return any(tag in tags for tag in GEO_TAGS)


@torch.inference_mode()
def segment_raster(
    model: nn.Module | ScoreMaker,
    source: str | Path,
    mask: str | Path,
    *,
    bands: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    overwrite: bool = False,
    on_look: OnLook | None = None,
) -> RasterMap:
    """Segment a raster of any size and write its class map in the same coordinates, tiled and compressed.

    The mask is that of `predict(model, pixels, mode="slide", resize=(H, W))`, pixel for pixel: nothing is resized.
    Pixels without data in every band that is looked at (the raster's nodata value, mask or alpha) are 255 in the mask,
    its own nodata value; the model sees them in the mean colour of its training.

    Args:
        model: as for `predict`.
        source: a file: GeoTIFF, JPEG 2000, Erdas Imagine, PNG or JPEG.
        mask: GeoTIFF to write; its name ends in .tif. `<name>_classes.json` is written beside it. Both appear whole or
            not at all.
        bands: which of the raster's are the model's channels, counted from 1, such as (4, 3, 2); default: all but
            opacity, where there are as many as channels.
        value_range: (low, high) that become 0 and 255, values beyond being clipped; needed where they are no uint8.
        crop, stride: (H, W) in pixels of the window and of its step, as for `predict`.
        overwrite: take the place of files that exist.
        on_look: is told how many windows are done, and of how many.

    Raises:
        ImageError: a file that cannot be read, or of whose bands and values it has to be said what they are.
        SaveError: a result exists or cannot be written.
        SegzooError: rasterio is missing, or an option that is none.
    """
    maker = mask_maker(model)
    protocol = protocol_of(maker.row, mode="slide", crop=crop, stride=stride)
    if Path(mask).suffix.lower() not in (".tif", ".tiff"):
        raise SaveError(f"{mask}: class maps of rasters are saved as .tif")
    files = SavedRaster(Path(mask), SavedRaster.of(Path(mask)).classes)
    if any(os.path.realpath(file) == os.path.realpath(source) for file in files):
        raise SaveError(f"{mask} is the raster itself; choose another place")
    with _environment(), _opened(source) as dataset:
        raster = _Raster(dataset, maker, bands, value_range)
        done: list[RasterMap] = []
        write_files(
            {
                files.mask: lambda place: done.append(_write_map(maker, raster, protocol, files, place, on_look)),
                files.classes: lambda place: place.write_text(json.dumps(done[0].to_dict(), indent=1) + "\n"),
            },
            overwrite=overwrite,
        )
    return done[0]


def check_installed() -> None:
    """Raises SegzooError if rasterio is missing."""
    try:
        import rasterio  # noqa: F401
    except ImportError as error:
        raise SegzooError(
            f"rasters need rasterio ({error}): pip install 'segzoo[geo]'; on the command line, --no-raster takes a "
            "small one for an image"
        ) from None


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    check_installed()
    from rasterio.env import Env
    from rasterio.errors import NotGeoreferencedWarning

    with Env(GDAL_CACHEMAX=CACHE_MIB), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextlib.contextmanager
def _opened(source: str | Path) -> Iterator[DatasetReader]:
    import rasterio
    from rasterio.errors import RasterioError

    path = os.path.abspath(source)  # no URL and no other name that GDAL has a meaning for
    if not os.path.isfile(path):
        raise ImageError(f"{source}: no such file; check the path")
    try:
        with open(path, "rb") as file:
            header = file.read(16)
        driver = next((driver for magic, driver in DRIVERS.items() if header.startswith(magic)), None)
        if driver is None:
            raise ImageError(f"{source} cannot be read as a raster (of no known format); write it as a GeoTIFF")
        dataset = rasterio.open(path, driver=driver)
    except (RasterioError, OSError) as error:
        raise ImageError(f"{source} cannot be read as a raster ({first_line(error)}); write it as a GeoTIFF") from None
    with dataset:
        yield dataset


class _Raster:
    """A raster as the model takes it.

    Raises:
        ImageError: bands or values that it has to be said of what they are.
    """

    def __init__(
        self,
        dataset: DatasetReader,
        maker: ScoreMaker,
        bands: Sequence[int] | None,
        value_range: tuple[float, float] | None,
    ):
        self.dataset, self.name = dataset, dataset.name
        self.size: tuple[int, int] = dataset.height, dataset.width
        self.bands = _bands(dataset, maker.in_chans) if bands is None else tuple(bands)
        _check_bands(dataset, self.bands, maker.in_chans)
        self.range = _checked_range(dataset, self.bands, value_range)
        self.all_valid = all("all_valid" in (flag.name for flag in dataset.mask_flag_enums[b - 1]) for b in self.bands)
        self.row, self.like = maker.row, maker.like
        self.fill_C = (per_channel(self.row.mean, len(self.bands)).flatten() * 255).round().to(torch.uint8).numpy()

    def read(self, rows: slice, columns: slice) -> Tensor:
        """(1, C, h, w), normalised."""
        image_HWC = self.pixels(rows, columns)
        return to_input(image_HWC, image_HWC.shape[:2], self.row, self.like)

    def pixels(self, rows: slice, columns: slice) -> np.ndarray:
        """(h, w, C) uint8; what has no data is the mean colour."""
        values_CHW = self._read("read", rows, columns)
        if self.range is not None:
            low, high = self.range
            scaled_CHW = (values_CHW.astype(np.float64) - low) * (255 / (high - low))
            values_CHW = np.nan_to_num(scaled_CHW.clip(0, 255)).round().astype(np.uint8)
        image_HWC = np.ascontiguousarray(values_CHW.transpose(1, 2, 0))
        valid_HW = self.valid(rows, columns)
        if valid_HW is not None:
            image_HWC[~valid_HW] = self.fill_C
        return image_HWC

    def valid(self, rows: slice, columns: slice) -> np.ndarray | None:
        """(h, w): whether a pixel has data in any band; NaN is none. None where all have."""
        is_float = self.dataset.dtypes[self.bands[0] - 1].startswith("float")
        if self.all_valid and not is_float:
            return None
        valid_CHW = self._read("read_masks", rows, columns) > 0
        if is_float:
            valid_CHW &= np.isfinite(self._read("read", rows, columns))
        return np.any(valid_CHW, axis=0)

    def _read(self, how: str, rows: slice, columns: slice) -> np.ndarray:
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window.from_slices(rows, columns)
        try:
            read = self.dataset.read if how == "read" else self.dataset.read_masks
            return read(indexes=list(self.bands), window=window)
        except RasterioError as error:
            raise ImageError(f"{self.name} is truncated or damaged ({first_line(error)}); download it again") from None


def _bands(dataset: DatasetReader, channels: int) -> tuple[int, ...]:
    """All bands but opacity, where they are as many as the model's channels; a grey one serves for all."""
    from rasterio.enums import ColorInterp

    bands = [band for band, kind in enumerate(dataset.colorinterp, 1) if kind != ColorInterp.alpha]
    if len(bands) == 1:
        return (bands[0],) * channels
    if len(bands) != channels:
        raise ImageError(
            f"{dataset.name} has {len(bands)} bands and the model takes {channels}; say which, in the order of red, "
            "green, blue: --bands 1 2 3 (bands=)"
        )
    return tuple(bands)


def _check_bands(dataset: DatasetReader, bands: Sequence[int], channels: int) -> None:
    from rasterio.enums import ColorInterp

    if len(bands) != channels:
        raise ImageError(f"{dataset.name}: the model takes {channels} bands, not {len(bands)}; see --bands (bands=)")
    for band in bands:
        if band not in dataset.indexes:
            raise ImageError(f"{dataset.name} has no band {band}, but 1 to {dataset.count}; see --bands (bands=)")
        if dataset.colorinterp[band - 1] == ColorInterp.palette:
            raise ImageError(
                f"{dataset.name}: the values of band {band} are numbers of colours in a table; write the colours "
                "themselves (gdal_translate -expand rgb)"
            )


def _checked_range(
    dataset: DatasetReader, bands: Sequence[int], value_range: tuple[float, float] | None
) -> tuple[float, float] | None:
    """The range that becomes 0..255; None for bytes that stay as they are."""
    kinds = {dataset.dtypes[band - 1] for band in bands}
    if len(kinds) > 1 or "complex" in min(kinds):
        raise ImageError(f"{dataset.name} has bands of {', '.join(sorted(kinds))}; give it real ones of one type")
    if value_range is None:
        if kinds != {"uint8"}:
            raise ImageError(
                f"{dataset.name} has values of type {min(kinds)}, of which no file says what is black and what is "
                "white; say it with --range LOW HIGH (value_range=)"
            )
        return None
    low, high = value_range
    if not np.isfinite([low, high]).all() or low >= high:
        raise SegzooError(f"a range of values must be two numbers, the lower first, not {low} and {high}")
    return low, high


def _write_map(
    maker: ScoreMaker,
    raster: _Raster,
    protocol: Protocol,
    files: SavedRaster,
    place: Path,
    on_look: OnLook | None,
) -> RasterMap:
    """Write the class map to `place`, strip by strip."""
    from rasterio.windows import Window

    classes = len(maker.label_set)
    no_data = _no_data(classes)
    pixels_K = np.zeros(no_data + 1, dtype=np.int64)
    with _created(raster.dataset, place, maker.label_set) as output:
        for rows, columns, mask_HW in _strips(maker, raster, protocol, on_look):
            if (valid_HW := raster.valid(rows, columns)) is not None:
                mask_HW[~valid_HW] = no_data
            pixels_K += np.bincount(mask_HW.ravel(), minlength=len(pixels_K))
            output.write(mask_HW, 1, window=Window.from_slices(rows, columns))
    crs = raster.dataset.crs or raster.dataset.gcps[1]
    return RasterMap(
        files=files,
        size=raster.size,
        pixels=tuple(pixels_K[:classes].tolist()),
        no_data=int(pixels_K[no_data]),
        crs=crs.to_wkt() if crs else None,
        transform=tuple(raster.dataset.transform)[:6],
        bands=raster.bands,
        label_set=maker.label_set,
        source=raster.name,
        model=maker.name,
        weights_state=maker.weights_state,
        plan=maker.plan,
    )


def _strips(
    maker: ScoreMaker, raster: _Raster, protocol: Protocol, on_look: OnLook | None
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows, columns and their classes, as uint8 or uint16, until all pixels have had their turn."""
    H, W = raster.size
    row_bytes = 4 * len(maker.label_set) * min(H, protocol.crop[0])
    width = max(1, SCORE_BYTES // row_bytes // TILE) * TILE
    parts = [slice(left, min(left + width, W)) for left in range(0, W, width)]
    done, total = 0, sum(len(strip_windows(raster.size, protocol, part)) for part in parts)

    def looked() -> None:
        nonlocal done
        done += 1
        if on_look is not None:
            on_look(done, total)

    if on_look is not None:
        on_look(0, total)
    dtype = _map_dtype(len(maker.label_set))
    for part in parts:
        for rows, scores_BKHW in slide_strips(maker, raster.size, raster.read, protocol, part, looked):
            step = max(1, CHUNK_PIXELS // scores_BKHW.shape[3])
            for start in range(rows.start, rows.stop, step):
                chunk = slice(start, min(start + step, rows.stop))
                chunk_BKHW = scores_BKHW[:, :, chunk.start - rows.start : chunk.stop - rows.start]
                mask_BHW = class_map(AVERAGED, chunk_BKHW, (chunk_BKHW.shape[2], chunk_BKHW.shape[3]))
                yield chunk, part, mask_BHW[0].cpu().numpy().astype(dtype)
            del scores_BKHW, chunk_BKHW  # they keep the memory of this part, and the next needs its own


def _map_dtype(classes: int) -> type[np.unsignedinteger]:
    """The smallest that also holds the value of pixels without data."""
    return np.uint8 if classes <= 255 else np.uint16


def _no_data(classes: int) -> int:
    return np.iinfo(_map_dtype(classes)).max


@contextlib.contextmanager
def _created(dataset: DatasetReader, place: Path, labels: LabelSet) -> Iterator[DatasetWriter]:
    """An empty class map in the coordinates of a raster."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        output = rasterio.open(
            place,
            "w",
            driver="GTiff",
            width=dataset.width,
            height=dataset.height,
            count=1,
            dtype=_map_dtype(len(labels)),
            nodata=_no_data(len(labels)),
            crs=dataset.crs,
            transform=dataset.transform,
            tiled=True,
            blockxsize=TILE,
            blockysize=TILE,
            compress="deflate",
            bigtiff="if_safer",
        )
        with output:
            if dataset.gcps[0]:
                output.gcps = dataset.gcps
            if _map_dtype(len(labels)) is np.uint8:
                output.write_colormap(1, dict(enumerate(labels.palette)))
            yield output
    except RasterioError as error:
        raise SaveError(f"the class map cannot be written ({first_line(error)}); choose another place") from error
