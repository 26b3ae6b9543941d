"""Pictures beyond what one call of `predict` is made for: rasters larger than the memory, and archives of images."""

from .batches import BatchSegmenter
from .rasters import RasterMap, SavedRaster, is_raster, segment_raster

__all__ = ["BatchSegmenter", "RasterMap", "SavedRaster", "is_raster", "segment_raster"]
