"""Calibration: a gain of pooled logits that depends on the share of the image that a crop covers.

The mean of the logits under a crop is not what the annotator answers to the crop alone: a large crop spreads an object over many
locations, and their mean is less sure than the annotator is. The gain is a factor of the pooled logits that corrects this.

An image with several label maps has gains for each of them. Its label is the softmax of the sum of their pooled logits.

Shapes: B images, S label maps per image, n = h * w output cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .view import Rows, are_boxes

Floats = npt.NDArray[np.float64]
_POINTS = 32  # sampling points along a side of a rotated or sheared view


@dataclass(frozen=True)
class Calibration:
    """Gain of pooled logits as a function of the share of the image area, fitted when the label maps were built.

    The gain is interpolated linearly over the logarithm of the share, and constant outside the knots.

    Attributes:
        shares: Knots, increasing shares of the image area in 0..1.
        gains: Positive gain at each knot, for each of the S label maps of an image. S is 1 unless the encoding is multiscale.
        num_crops: Number of random crops that the gains were fitted to.
        kl_before: Mean divergence in nats of the pooled labels from the annotator's answers to these crops, without gains.
        kl_after: The same divergence with the gains.
    """

    shares: tuple[float, ...]
    gains: tuple[tuple[float, ...], ...]
    num_crops: int
    kl_before: float
    kl_after: float

    def gains_at(self, shares: npt.ArrayLike) -> Floats:
        """Return the gain at each share `[...]` of the image area for each label map, `[..., S]`."""
        positions, knots = np.log(np.maximum(shares, self.shares[0])), np.log(self.shares)
        gains: Floats = np.stack([np.interp(positions, knots, gains) for gains in self.gains], -1)
        return gains


def calibrated_temperature(
    calibrations: Sequence[Calibration | None],
    keys: Sequence[str | None],
    views: Rows,
    grid: tuple[int, int],
    temperature: float,
) -> Floats:
    """Return the divisor of the pooled logits in each cell of each map, `[B, n, S]`: the temperature over the gain.

    Args:
        calibrations: Calibration of each image.
        keys: Key of each image, which errors name.
        views: View of each image, `[B, 10]`.
        grid: Number of output cells (h, w).
        temperature: Divisor of the calibrated logits.

    Raises:
        ValueError: An image has no calibration, or the numbers of maps differ.
    """
    shares = covered_shares(views, grid)
    first = calibrations[0]
    # The usual case, as fast as possible.
    if first is not None and all(calibration is first for calibration in calibrations):
        return temperature / first.gains_at(shares)
    numbers = {len(calibration.gains) for calibration in calibrations if calibration is not None}
    if len(numbers) > 1:
        raise ValueError(
            f"the calibrations of a batch have gains of {sorted(numbers)} label maps per image: use one loader per config"
        )
    gains = np.empty((*shares.shape, *numbers))
    for calibration in dict.fromkeys(calibrations):
        rows = [row for row, other in enumerate(calibrations) if other == calibration]
        if calibration is None:
            raise ValueError(
                f"the label map of {keys[rows[0]]!r} has no calibration, which calibrated=True applies: build the label maps of "
                "at least 20 images with `relabel build`, which fits the gains, and read them with load_dataset; or leave out "
                "calibrated=True"
            )
        gains[rows] = calibration.gains_at(shares[rows])
    return temperature / gains


def covered_shares(views: Rows, grid: tuple[int, int]) -> Floats:
    """Return the share of the image area that each cell of each view covers, `[B, n]`.

    Parts of a cell outside the visible box do not count. The shares of upright views are exact. Those of other views are counted
    on a grid of points.

    Args:
        views: Views `[B, 10]`, see `view.to_rows`.
        grid: Number of output cells (h, w).
    """
    upright = are_boxes(views)
    if upright.all():
        return _shares_of_boxes(views, grid)
    shares = np.empty((len(views), grid[0] * grid[1]))
    for chosen, measure in ((upright, _shares_of_boxes), (~upright, _shares_of_others)):
        if chosen.any():
            shares[chosen] = measure(views[chosen], grid)
    return shares


def _shares_of_boxes(views: Rows, grid: tuple[int, int]) -> Floats:
    xx, _, x0, _, yy, y0, left, top, right, bottom = views.T[..., None]
    # Functions such as np.clip, np.diff and np.linspace take several times as long as these for few numbers.
    columns = np.minimum(np.maximum(x0 + xx * (np.arange(grid[1] + 1) / grid[1]), left), right)
    rows = np.minimum(np.maximum(y0 + yy * (np.arange(grid[0] + 1) / grid[0]), top), bottom)
    widths, heights = np.abs(columns[:, 1:] - columns[:, :-1]), np.abs(rows[:, 1:] - rows[:, :-1])
    shares: Floats = (heights[:, :, None] * widths[:, None]).reshape(len(views), -1)
    return shares


def _shares_of_others(views: Rows, grid: tuple[int, int]) -> Floats:
    height, width = grid
    down, across = (max(4, -(-_POINTS // cells)) for cells in grid)  # points in a cell
    u = (np.arange(width * across) + 0.5) / (width * across)
    v = (np.arange(height * down)[:, None] + 0.5) / (height * down)
    xx, xy, x0, yx, yy, y0, left, top, right, bottom = views.T[..., None, None]
    x, y = xx * u + xy * v + x0, yx * u + yy * v + y0
    inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    counted = inside.reshape(-1, height, down, width, across).mean((2, 4))
    shares: Floats = (np.abs(xx * yy - xy * yx) / (height * width) * counted).reshape(len(views), -1)
    return shares
