"""Measure size and speed for other numbers of classes, map sizes and images: `python tests/benchmarks/sizes.py`.

The logits are random with a few strong classes at each location. Bytes on disk are those of label-only shards, including the overhead
of the tar. Bytes in a batch are those that a worker sends with `collate`; a pooled soft label takes four bytes per class. The index is
memory-mapped when the dataset is opened. Times are those of one thread: to encode a map, to read it from its bytes, and to pool the
label of one crop.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import torch
from fidelity import bytes_on_disk

import relabel_datasets as rd
from relabel_datasets.labels import codec
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.shards.index import Row, make_index

CASES = [(10, 9), (1000, 15), (1000, 32), (21_841, 15), (21_841, 32)]  # classes, map side
VARIANTS = [("heatmaps", "uint4"), ("topk", "float16")]
NUM_IMAGES = (1_281_167, 10_000_000)
BATCH = 4


def random_logits(num_classes: int, side: int) -> torch.Tensor:
    """Return logits `[B, C, H, W]` with eight strong classes at different locations."""
    logits = torch.randn(BATCH, num_classes, side, side)
    strong = torch.randint(num_classes, (BATCH, 8))
    heat = torch.nn.functional.interpolate(20 * torch.rand(BATCH, 8, 3, 3), (side, side), mode="bilinear")
    return logits.scatter_add_(1, strong[:, :, None, None].expand_as(heat), heat)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Return the duration of a call in milliseconds."""
    function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return 1e3 * (time.perf_counter() - start) / repeats


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keys = [f"n{i % 1000:08d}_{i}" for i in range(20_000)]
    index = len(make_index([Row(key, 0, i, 1) for i, key in enumerate(keys)], images=False)) / len(keys)
    totals = " | ".join(f"GB for {count / 1e6:.2f} million" for count in NUM_IMAGES)
    print(
        f"| map | encoding | bytes per map | bytes in a batch | bytes on disk | {totals} | encode, ms | read, ms | pool, ms |"
    )
    print("| --- " * (8 + len(NUM_IMAGES)) + "|")
    for num_classes, side in CASES:
        logits = random_logits(num_classes, side)
        for encoding, dtype in VARIANTS:
            k = min(5 if encoding == "topk" else 10, num_classes)
            sizes = [(375, 500)] * BATCH

            def encode(encoding: str = encoding, k: int = k, dtype: str = dtype) -> list[bytes]:
                return codec.encode(encode_logits(logits, encoding, k), sizes, dtype)  # noqa: B023

            blobs = encode()
            label_map, pooling = rd.LabelMap.from_safetensors(blobs[0]), rd.LabelPooling()
            disk = bytes_on_disk(blobs * 50)
            total = " | ".join(f"{count * disk / 1e9:.1f}" for count in NUM_IMAGES)
            times = (
                milliseconds(encode, 2) / BATCH,
                milliseconds(lambda: rd.LabelMap.from_safetensors(blobs[0]), 200),  # noqa: B023
                milliseconds(lambda: pooling(label_map), 200),  # noqa: B023
            )
            batch = len(pickle.dumps(rd.labels.LabelMapBatch.of([label_map] * 64))) / 64
            mean = sum(map(len, blobs)) / len(blobs)
            print(
                f"| {side}x{side}x{num_classes} | {encoding} {k}, {dtype} | {mean:.0f} | {batch:.0f} | {disk:.0f} | {total} | "
                f"{' | '.join(f'{value:.3g}' for value in times)} |"
            )
    print(f"\nThe index takes {index:.0f} bytes per image: {NUM_IMAGES[1] * index / 1e9:.2f} GB for 10 million.")


if __name__ == "__main__":
    main()
