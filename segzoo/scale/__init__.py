"""Pictures beyond what one call of `predict` is made for: rasters larger than the memory, and archives of images."""

from .archives import ArchiveReport, segment_archive
from .batches import BatchSegmenter
from .rasters import RasterMap, SavedRaster, is_raster, segment_raster

__all__ = [
    "ArchiveReport",
    "BatchSegmenter",
    "RasterMap",
    "SavedRaster",
    "is_raster",
    "segment_archive",
    "segment_raster",
]
