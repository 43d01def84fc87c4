"""Images whose pixels say where they came from, to check that a label map follows them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors

import relabel_datasets as rd

from .samples import CANVAS_SIZE

FILL = -9.0  # of pixels outside the image
KINDS = ("tensor", "pil")


def ramp(size: tuple[int, int] = CANVAS_SIZE) -> Tensor:
    """Return `[2, H, W]`: x and y of the centre of each pixel, in units of the image."""
    height, width = size
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y])


def ramp_images(kind: str = "tensor", size: tuple[int, int] = CANVAS_SIZE) -> list[tv_tensors.Image | PIL.Image.Image]:
    """Return the ramp as an image of two channels, or as two of one."""
    if kind == "tensor":
        return [tv_tensors.Image(ramp(size))]
    return [PIL.Image.fromarray(channel.numpy()) for channel in ramp(size)]  # of mode F, float32


def ramp_map(canvas_size: tuple[int, int] = CANVAS_SIZE) -> rd.LabelMap:
    """Return the map of an image, which pools to the mean of its ramp: x for class 0, y for class 1."""
    logits = ramp((51, 33))
    return rd.LabelMap(
        logits, "heatmaps", classes=[[[0]], [[1]]], base=[0, 0, 0], num_classes=3, canvas_size=canvas_size
    )


def read(images: Sequence[tv_tensors.Image | PIL.Image.Image]) -> Tensor:
    """Return what became of the images, `[2, H, W]`."""
    if isinstance(images[0], Tensor):
        return images[0].as_subclass(Tensor)
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def assert_follows(
    label_map: rd.LabelMap,
    images: Sequence[tv_tensors.Image | PIL.Image.Image],
    *,
    outside: float | None = FILL,
    margin: float = 1.01,
    tolerance: float = 2e-4,
    size: tuple[int, int] = CANVAS_SIZE,
) -> None:
    """Check that the view takes every pixel to where its values say it came from.

    Args:
        label_map: the map that should have followed.
        images: what became of `ramp_images`.
        outside: the values of pixels that came from outside the image; None for any.
        margin: how near to the border, in pixels of the original, interpolation may have changed a value.
        tolerance: of values; a ramp does not stay exact where an image is made smaller.
        size: of the original image.
    """
    got = read(images)
    assert label_map.canvas_size == got.shape[1:]
    view, (u, v) = label_map.view, ramp(label_map.canvas_size)
    x, y = view.xx * u + view.xy * v + view.x0, view.yx * u + view.yy * v + view.y0
    x1, y1, x2, y2 = view.compose(rd.labels.View()).visible_xyxy  # beyond it, pixels are filled or not there
    inwards = torch.stack([(x - x1) * size[1], (x2 - x) * size[1], (y - y1) * size[0], (y2 - y) * size[0]])
    depth = inwards.amin(0)  # in pixels of the original, negative outside
    inside = depth > margin
    assert inside.any()
    torch.testing.assert_close(got[:, inside], torch.stack([x, y])[:, inside], rtol=0, atol=tolerance)
    if outside is not None:
        assert ((got[:, depth < -margin] - outside).abs() < 1e-4).all()
