"""What the page of a report holds of each sample: its label map as it is stored, and a small picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from ..analysis.label_maps import MapMeasures
from ..data.store import LabelMaps
from .tiles import CLASS_COLORS

PICTURE_SIZE = 256  # pixels: longer side of an embedded picture
_QUALITY = 75  # of its JPEG

Pictures = Callable[[int], PIL.Image.Image]  # row -> RGB image


def sample_index(measures: MapMeasures, names: Sequence[str]) -> dict[str, Any]:
    """Return what the page looks up of all samples: columns of equal length, and the names and colours of classes.

    Args:
        measures: of the samples.
        names: of the classes, for people.
    """
    images = measures.images
    least = np.finfo(np.float32).tiny
    doubt = np.log(images["p_best"]) - np.log(np.maximum(images["p_label"], least))
    return {
        "classes": list(names),
        "colors": CLASS_COLORS,
        "samples": {
            "key": images["key"].tolist(),
            "label": images["label"].tolist(),
            "best": images["best"].tolist(),
            "confident": images["num_confident"].tolist(),
            "p_label": images["p_label"].round(4).tolist(),
            "p_best": images["p_best"].round(4).tolist(),
            "doubt": doubt.round(4).tolist(),
        },
    }


def sample_contents(
    label_maps: LabelMaps, keys: Sequence[str], pictures: Pictures | None, *, progress: bool = True
) -> Iterator[dict[str, str | None]]:
    """Yield the `map` of each sample, its stored bytes, and its `image`, a JPEG or None, in base64.

    Args:
        label_maps: of the split.
        keys: of the samples.
        pictures: gives images; None leaves them out.
        progress: whether to show a progress bar on stderr.
    """
    for key in tqdm(keys, desc="samples", unit="img", disable=not progress):
        row = label_maps.index.row(key)
        assert row is not None
        image = None if pictures is None else _to_base64(_small_jpeg(pictures(row)))
        yield {"map": _to_base64(label_maps.map_bytes(row)), "image": image}


def _small_jpeg(image: PIL.Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=_QUALITY, optimize=True)
    return data.getvalue()


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
