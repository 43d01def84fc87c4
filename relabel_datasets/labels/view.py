"""View: the part of the original image that the current image shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
_ALL: Box = (0.0, 0.0, 1.0, 1.0)
Rows = npt.NDArray[np.float64]  # views as [B, 10], see `to_rows`
_UPRIGHT = 1e-9  # larger off-diagonal numbers rotate or shear


class View(NamedTuple):
    """The part of the original image that the current image shows, as an affine map.

    The point (u, v) of the current image lies at `(xx * u + xy * v + x0, yx * u + yy * v + y0)` of the original image. Both
    points are in units of their whole image. x and u point to the right, y and v down, and (0, 0) is the top left corner.

    `visible_xyxy` is the box of the original image that the current image has pixels of. Pixels outside it were filled, for
    example by a translation after a crop.
    """

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0
    visible_xyxy: Box = _ALL

    def compose(self, inner: View) -> View:
        """Return the view of an image that shows the part `inner` of the current image.

        The visible box is limited to the bounding box of this view, which is exact for an upright view.
        """
        if self is WHOLE and inner.visible_xyxy is _ALL:  # the first move of most images
            return inner
        a, b, c, d, e, f, (x1, y1, x2, y2) = self
        p, q, r, s, t, u, _ = inner
        left, right, top, bottom = c, c, f, f  # comparisons take half as long as calls of min and max
        for x, y in ((a, d), (b, e)):
            if x < 0:
                left += x
            else:
                right += x
            if y < 0:
                top += y
            else:
                bottom += y
        visible = (
            left if left > x1 else x1, top if top > y1 else y1, right if right < x2 else x2, bottom if bottom < y2 else y2,
        )  # fmt: skip
        return View(
            a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f, visible
        )  # fmt: skip

    @property
    def is_box(self) -> bool:
        """Whether the view is an upright box: neither rotated nor sheared, but possibly mirrored."""
        return abs(self.xy) + abs(self.yx) < _UPRIGHT

    @property
    def box_xyxy(self) -> Box:
        """Box (x1, y1, x2, y2) of an upright view, with x1 > x2 or y1 > y2 if it is mirrored."""
        return (self.x0, self.y0, self.x0 + self.xx, self.y0 + self.yy)


WHOLE = View()


def to_rows(views: Sequence[View]) -> Rows:
    """Return B views as rows `[B, 10]`, the form in which batches are pooled: the six numbers of the map, then the visible box."""
    numbers: list[float] = []  # NumPy converts one list in two thirds of the time for a list of tuples
    for view in views:
        numbers += view[:6]
        numbers += view.visible_xyxy
    return np.array(numbers, np.float64).reshape(-1, 10)


def rows_of_boxes(boxes_xyxy: npt.ArrayLike) -> Rows:
    """Return the rows `[B, 10]` of views that show the boxes `[B, 4]`, which are mirrored if x1 > x2 or y1 > y2."""
    x1, y1, x2, y2 = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4).T
    rows = np.zeros((len(x1), 10))
    rows[:, 0], rows[:, 2], rows[:, 4], rows[:, 5] = x2 - x1, x1, y2 - y1, y1
    rows[:, 8:] = 1
    return rows


def are_boxes(rows: Rows) -> npt.NDArray[np.bool_]:
    """Return `[B]`: whether each view is an upright box, see `View.is_box`."""
    boxes: npt.NDArray[np.bool_] = np.abs(rows[:, 1]) + np.abs(rows[:, 3]) < _UPRIGHT
    return boxes
