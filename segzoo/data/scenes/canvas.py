"""Drawing on an image and its labels at once."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .basics import Colour, Point, round_half_up

ASPECT = 2.0  # canvas width over height


class Canvas:
    """An RGB image and its label map; each call draws one shape on both.

    `cls` is the class the shape gets; None leaves the labels alone (details, shadows). A fill with a fourth value is
    blended with that opacity. `edge` outlines the shape, in the labels too, so that both keep the same extent.
    """

    def __init__(self, background: Image.Image, cls: int) -> None:
        self.image = background
        self.labels = Image.new("L", background.size, cls)
        self._pixels = ImageDraw.Draw(self.image, "RGBA")
        self._classes = ImageDraw.Draw(self.labels)
        self._sx, self._sy = background.width / ASPECT, background.height
        self._edge_width = max(1, round_half_up(0.006 * background.height))

    def poly(self, points: Sequence[Point], fill: Colour, cls: int | None = None, edge: Colour | None = None) -> None:
        xy = [(round_half_up(x * self._sx), round_half_up(y * self._sy)) for x, y in points]
        self._pixels.polygon(xy, fill=fill)
        if cls is not None:
            self._classes.polygon(xy, fill=cls)
        if edge is not None:
            self._pixels.line([*xy, xy[0]], fill=edge, width=self._edge_width)
            if cls is not None:
                self._classes.line([*xy, xy[0]], fill=cls, width=self._edge_width)

    def box(
        self,
        corner: Point,
        opposite: Point,
        fill: Colour,
        cls: int | None = None,
        edge: Colour | None = None,
    ) -> None:
        xy = self._extent(*corner, *opposite)
        self._pixels.rectangle(xy, fill=fill, outline=edge, width=self._edge_width if edge else 0)
        if cls is not None:
            self._classes.rectangle(xy, fill=cls)

    def disc(
        self, centre: Point, rx: float, ry: float, fill: Colour, cls: int | None = None, edge: Colour | None = None
    ) -> None:
        xy = self._extent(centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry)
        self._pixels.ellipse(xy, fill=fill, outline=edge, width=self._edge_width if edge else 0)
        if cls is not None:
            self._classes.ellipse(xy, fill=cls)

    def line(self, points: Sequence[Point], fill: Colour, width: float, cls: int | None = None) -> None:
        xy = [(round_half_up(x * self._sx), round_half_up(y * self._sy)) for x, y in points]
        pixels = max(1, round_half_up(width * self._sy))
        self._pixels.line(xy, fill=fill, width=pixels)
        if cls is not None:
            self._classes.line(xy, fill=cls, width=pixels)

    def _extent(self, xa: float, ya: float, xb: float, yb: float) -> tuple[int, int, int, int]:
        # Pillow counts the last pixel in, hence the -1.
        x0, x1 = round_half_up(min(xa, xb) * self._sx), round_half_up(max(xa, xb) * self._sx) - 1
        y0, y1 = round_half_up(min(ya, yb) * self._sy), round_half_up(max(ya, yb) * self._sy) - 1
        return x0, y0, max(x0, x1), max(y0, y1)
