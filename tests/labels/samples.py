"""Label maps to test with: odd, non-square sizes, so that swapped axes fail."""

from __future__ import annotations

import torch
from torch import Tensor

import relabel_datasets as rd
from relabel_datasets.labels import encoding

NUM_CLASSES, HEIGHT, WIDTH = 13, 7, 5
CANVAS_SIZE = (17, 11)
ENCODINGS = tuple(encoding.ENCODINGS)

STORED_FORMS = [
    ("heatmaps", "uint4"),
    ("heatmaps", "uint8"),
    ("heatmaps", "float16"),
    ("topk", "uint8"),
    ("topk", "float16"),
]


def random_dense(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 4 * torch.randn(*(shape or (NUM_CLASSES, HEIGHT, WIDTH)), dtype=dtype)


def random_map(
    encoding: str = "heatmaps",
    *,
    k: int = 3,
    canvas_size: tuple[int, int] = CANVAS_SIZE,
    key: str | None = "images/a_1",
) -> rd.LabelMap:
    return rd.LabelMap.from_logits(random_dense(), encoding, k=k, canvas_size=canvas_size, key=key, label=4)


def stored_map(
    encoding: str = "heatmaps", dtype: str | None = None, canvas_size: tuple[int, int] = CANVAS_SIZE
) -> bytes:
    return random_map(encoding, canvas_size=canvas_size).to_safetensors(dtype)


def random_classes(num_kept: int, num_classes: int, *grid: int) -> Tensor:
    """Return `[num_kept, *grid]` class indices, different from each other at every location."""
    return torch.rand(num_classes, *grid).topk(num_kept, dim=0).indices


def assert_same_map(got: rd.LabelMap, want: rd.LabelMap) -> None:
    assert type(got) is rd.LabelMap
    assert torch.equal(got.logits, want.logits)
    assert got.logits.dtype == want.logits.dtype
    assert_same_metadata(got, want)


def assert_same_metadata(got: rd.LabelMap, want: rd.LabelMap) -> None:
    assert type(got) is rd.LabelMap
    assert got.classes.shape == want.classes.shape
    assert (got.base is None) == (want.base is None)
    for name in ("num_classes", "canvas_size", "view", "key", "label", "encoding"):
        assert getattr(got, name) == getattr(want, name)
