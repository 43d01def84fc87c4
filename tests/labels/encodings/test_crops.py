"""The stored form of crop labels does not change."""

import json
import struct

import numpy as np
import pytest

import relabel_datasets as rd
from relabel_datasets.labels.encodings.crops import seed_of

METADATA = {"relabel": r'{"canvas":[20,30],"encoding":"crops","num_classes":4,"version":1}'}
LABELS = {"crop_classes": [[2, 0], [1, 3]], "crop_probs": [[0.5, 0.25], [1, 0]], "crop_rest": 1}
DTYPES = {"crop_classes": np.uint8, "crop_probs": np.float16, "crop_rest": np.uint8}
SEED = {"crop_seed": np.array([0x0102030405060708], np.uint64)}
BOXES = {
    "crop_boxes": np.array([[0, 0.5, 0.25, 0.5], [0.25, 0, 0.75, 1]], np.float16),
    "crop_flips": np.array([1], np.uint8),
}
# Halves: 0 0000, 0.25 3400, 0.5 3800, 0.75 3A00, 1 3C00.
GOLDEN = {
    "seed": (
        SEED,
        {"crop_seed": ("U64", [1], 8), "crop_probs": ("F16", [2, 2], 8), "crop_classes": ("U8", [2, 2], 4),
         "crop_rest": ("U8", [], 1)},
        "0807060504030201  0038 0034 003c 0000  02 00 01 03  01",
        [[10, 0, 18, 8], [0, 2, 21, 20]],
    ),
    "boxes": (
        BOXES,
        {"crop_boxes": ("F16", [2, 4], 16), "crop_probs": ("F16", [2, 2], 8), "crop_classes": ("U8", [2, 2], 4),
         "crop_flips": ("U8", [1], 1), "crop_rest": ("U8", [], 1)},
        "0000 0038 0034 0038  0034 0000 003a 003c  0038 0034 003c 0000  02 00 01 03  01  01",
        [[15, 0, 30, 5], [0, 5, 30, 20]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_bytes_and_back(kind):
    located, layout, data, boxes = GOLDEN[kind]
    header, end = {"__metadata__": METADATA}, 0
    for name, (dtype, shape, size) in layout.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    golden = struct.pack("<Q", len(text)) + text.encode() + bytes.fromhex(data)
    arrays = {name: np.array(values, DTYPES[name]) for name, values in LABELS.items()} | located
    labels = rd.CropLabels(arrays, num_classes=4, canvas_size=(20, 30))
    assert labels.to_safetensors() == golden
    back = rd.CropLabels.from_safetensors(golden)
    assert back.soft_labels().tolist() == [[0.25, 0.125, 0.5, 0.125], [0, 1, 0, 0]]
    assert [list(back.pixel_box(crop)) for crop in range(2)] == boxes
    assert back.flips.tolist() == [True, False]


def test_the_seed_of_a_key_does_not_change():
    assert seed_of("n01440764_10026") == 8622913096764076126
