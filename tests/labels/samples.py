"""Label maps to test with: odd, non-square sizes, so that swapped axes fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import relabel_datasets as rd
from relabel_datasets.labels import Calibration, encodings
from relabel_datasets.labels.encodings.sparse import SparseEncoding
from relabel_datasets.labels.view import rows_of_boxes
from relabel_datasets.shards.manifest import Manifest

NUM_CLASSES, HEIGHT, WIDTH = 13, 7, 5
CANVAS_SIZE = (17, 11)
GAINS = Calibration((0.1, 0.4, 1.0), ((0.5, 1.5, 3.0),), num_crops=8, kl_before=1.0, kl_after=0.5)
ENCODINGS = tuple(encodings.map_encodings())
SPARSE = tuple(name for name in ENCODINGS if isinstance(encodings.get_encoding(name), SparseEncoding))

STORED_FORMS = [(name, dtype) for name in ENCODINGS for dtype in encodings.find_entry(name).storage_dtypes]


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


def pool_boxes(encoded: encodings.Encoded, boxes: Tensor, **arguments) -> Tensor:
    """Pool by `pool_labels` where the encoding has its form, else by the encoding."""
    encoding = encoded.encoding
    if not isinstance(encoding, SparseEncoding):
        return encoding.pool(encoded, rows_of_boxes(boxes), **arguments)
    base = encoding.dense_base(encoded) if "base" in encoding.parts else None
    return rd.pool_labels(
        encoded.logits, encoded.tensors["classes"], boxes, num_classes=encoded.num_classes, base=base, **arguments
    )


def set_calibration(folder: Path, calibration: Calibration = GAINS) -> None:
    """Store a calibration of the training split in the manifest of a config."""
    manifest = Manifest.load(folder)
    splits = {**manifest.splits, "train": replace(manifest.splits["train"], calibration=calibration)}
    replace(manifest, splits=splits).save(folder)


def assert_same_map(got: rd.LabelMap, want: rd.LabelMap) -> None:
    assert type(got) is rd.LabelMap
    assert_same_metadata(got, want)
    for name, part in got.tensors.items():
        assert torch.equal(part, want.tensors[name])
        assert part.dtype == want.tensors[name].dtype


def assert_same_metadata(got: rd.LabelMap, want: rd.LabelMap) -> None:
    assert type(got) is rd.LabelMap
    assert {name: part.shape for name, part in got.tensors.items()} == {
        name: part.shape for name, part in want.tensors.items()
    }
    for name in ("num_classes", "canvas_size", "view", "key", "label", "encoding", "calibration"):
        assert getattr(got, name) == getattr(want, name)
