"""Content of the HTML report about each sample: the stored label map and a small picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import PIL.Image
from tqdm import tqdm

from ..data.store import LabelMaps
from ..labels.label_map import LabelMap
from .opening import Opening
from .tiles import CLASS_COLORS

PICTURE_SIZE = 256  # longer side of an embedded picture, in pixels
_JPEG_QUALITY = 75
PAGE_ENCODINGS = ("heatmaps", "topk")  # those that page/label_map.js decodes
_PAGE_K = 20  # heatmaps of a map in any other encoding

ReadImage = Callable[[int], PIL.Image.Image]  # row -> RGB image


def sample_index(images: Mapping[str, npt.NDArray[Any]], names: Sequence[str], opening: Opening) -> dict[str, Any]:
    """Return the index of the samples for the page: columns of equal length, and the names and colors of classes.

    Args:
        images: Measures of the samples, see `analysis.label_maps.measure_images`.
        names: Legible names of the classes, by index.
        opening: Sample and crop that the page opens on.

    Returns:
        The content of the page's JSON element `index`.
    """
    return {
        "classes": list(names),
        "colors": CLASS_COLORS,
        "opening": opening._asdict(),
        "samples": {
            "key": images["key"].tolist(),
            "label": images["label"].tolist(),
            "best": images["best"].tolist(),
            "shown": images["num_shown"].tolist(),
            "p_label": images["p_label"].round(4).tolist(),
            "p_best": images["p_best"].round(4).tolist(),
            "margin": images["margin"].round(4).tolist(),
        },
    }


def sample_contents(
    label_maps: LabelMaps, keys: Sequence[str], read_image: ReadImage | None, *, progress: bool = True
) -> Iterator[dict[str, str | None]]:
    """Yield the stored label map (`map`) and a small JPEG or None (`image`) of each sample, both in base64.

    Args:
        label_maps: Label maps of the split.
        keys: Keys of the samples.
        read_image: Function that reads the image of a row. None leaves images out.
        progress: Whether to show a progress bar on stderr. Default: True.
    """
    for key in tqdm(keys, desc="samples", unit="img", disable=not progress):
        row = label_maps.index.row(key)
        assert row is not None
        image = None if read_image is None else embedded_picture(read_image(row))
        yield {"map": _to_base64(_readable_by_page(label_maps.map_bytes(row))), "image": image}


def _readable_by_page(blob: bytes) -> bytes:
    """Return a stored map in an encoding that the page can decode."""
    label_map = LabelMap.from_safetensors(blob)
    if label_map.encoding in PAGE_ENCODINGS:
        return blob
    encoded = LabelMap.from_logits(label_map.dense(), "heatmaps", k=_PAGE_K, canvas_size=label_map.canvas_size)
    return encoded.to_safetensors("uint8")


def embedded_picture(image: PIL.Image.Image) -> str:
    """Return a small JPEG of an image in base64."""
    return _to_base64(_small_jpeg(image))


def _small_jpeg(image: PIL.Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return data.getvalue()


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
