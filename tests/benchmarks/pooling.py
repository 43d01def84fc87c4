"""How fast LabelPooling is, against the published way of doing it: `python tests/benchmarks/pooling.py`.

The published way (Yun et al., "Re-labeling ImageNet", 2021) scatters the stored logits into dense `[B, C, H, W]` maps, then
runs torchvision's roi_align and a softmax. Both ways get the same maps and boxes, those of RandomResizedCrop, in turns, in
one process; times are medians. Batches are pooled with torch's threads as they are, and with one thread, as a DataLoader
worker has; single samples with one. Memory is by how much one call raises the peak of a process that does nothing else, after
a call for two maps.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.label_map import read_label_maps

BATCH, NUM_CLASSES, HEIGHT, WIDTH = 256, 1000, 15, 15
NUM_KEPT = {"topk": 5, "heatmaps": 10}
REPEATS = 9
ALL_THREADS = torch.get_num_threads()


class Maps(NamedTuple):
    logits: Tensor  # [B, K, H, W]
    classes: Tensor  # [B, K, H, W] or [B, K, 1, 1]
    base: Tensor | None  # [B, C]
    boxes_xyxy: Tensor  # [B, 4], 0..1

    def first(self, num_maps: int) -> Maps:
        return Maps(*(part if part is None else part[:num_maps] for part in self))


def random_maps(encoding: str) -> Maps:
    """Return maps that no dense ones were needed for: those would set the peak of memory."""
    generator = torch.manual_seed(0)
    num_kept = NUM_KEPT[encoding]
    logits = 10 + 3 * torch.randn(BATCH, num_kept, HEIGHT, WIDTH, generator=generator)
    grid = (1, 1) if encoding == "heatmaps" else (HEIGHT, WIDTH)
    first = torch.randint(NUM_CLASSES, (BATCH, 1, *grid), generator=generator)
    classes = (first + 7 * torch.arange(num_kept)[:, None, None]) % NUM_CLASSES
    base = 3 * torch.randn(BATCH, NUM_CLASSES, generator=generator) if encoding == "heatmaps" else None
    crops = [v2.RandomResizedCrop.get_params(torch.empty(1, 375, 500), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(BATCH)]
    boxes = [[left / 500, top / 375, (left + width) / 500, (top + height) / 375] for top, left, height, width in crops]
    return Maps(logits, classes, base, torch.tensor(boxes))


def pool(maps: Maps) -> Tensor:
    return rd.pool_labels(maps.logits, maps.classes, maps.boxes_xyxy, num_classes=NUM_CLASSES, base=maps.base)


def pool_as_published(maps: Maps) -> Tensor:
    dense = maps.logits.new_zeros(len(maps.logits), NUM_CLASSES, HEIGHT, WIDTH)
    if maps.base is not None:
        dense += maps.base[:, :, None, None]
    dense.scatter_(1, maps.classes.expand_as(maps.logits), maps.logits)
    boxes = maps.boxes_xyxy * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    boxes = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
    return ops.roi_align(dense, boxes, 1, aligned=True)[:, :, 0, 0].softmax(1)


POOLS: dict[str, Callable[[Maps], Tensor]] = {"sparse": pool, "published": pool_as_published}


def batch_seconds(maps: Maps) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in POOLS}
    for _ in range(REPEATS):
        for name, function in POOLS.items():
            calls = 200 if name == "sparse" else 1  # about as much time for each
            seconds[name].append(timeit.timeit(lambda function=function: function(maps), number=calls) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def added_peak(name: str, encoding: str) -> float:
    """Return MiB, measured in this process: of use only in a new one, started by one that has never been larger."""
    maps = random_maps(encoding)
    POOLS[name](maps.first(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    POOLS[name](maps)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # Linux counts in KiB


def added_peak_of_new_process(name: str, encoding: str) -> float:
    command = [sys.executable, __file__, "--added-peak", name, encoding]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def microseconds(call: Callable[[], object], calls: int = 1000) -> float:
    return statistics.median(timeit.repeat(call, number=calls, repeat=REPEATS)) / calls * 1e6


def print_batches() -> None:
    peaks = {(name, encoding): added_peak_of_new_process(name, encoding) for encoding in NUM_KEPT for name in POOLS}
    print(f"Labels of {BATCH} boxes in maps of {HEIGHT}x{WIDTH}x{NUM_CLASSES}\n")
    print(
        "| encoding | threads | published, ms | pool_labels, ms | ratio | published, MiB | pool_labels, MiB | difference |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for encoding in NUM_KEPT:
        for threads in dict.fromkeys((ALL_THREADS, 1)):
            torch.set_num_threads(threads)
            maps = random_maps(encoding)
            difference = (pool(maps) - pool_as_published(maps)).abs().max()
            seconds = batch_seconds(maps)
            ours, published = seconds["sparse"] * 1e3, seconds["published"] * 1e3
            print(
                f"| {encoding} {NUM_KEPT[encoding]} | {threads} | {published:.0f} | {ours:.2f} | {published / ours:.0f} | "
                f"{peaks['published', encoding]:.0f} | {peaks['sparse', encoding]:.0f} | {difference:.1e} |"
            )
        torch.set_num_threads(ALL_THREADS)


def print_samples() -> None:
    dense = 3 * torch.randn(NUM_CLASSES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    image = tv_tensors.Image(torch.zeros(3, 224, 224, dtype=torch.uint8))
    pooling = rd.LabelPooling()
    print("\nOne sample, microseconds\n")
    print("| encoding, stored as | bytes | read | read with 63 others | LabelPooling | LabelPooling with image |")
    print("| --- | --- | --- | --- | --- | --- |")
    for encoding, dtype in (("topk", "float16"), ("heatmaps", "uint4"), ("heatmaps", "uint8"), ("heatmaps", "float16")):
        blob = rd.LabelMap.from_logits(dense, encoding, k=NUM_KEPT[encoding], canvas_size=(375, 500)).to_safetensors(
            dtype
        )
        label_map = v2.functional.resized_crop(rd.LabelMap.from_safetensors(blob), 20, 30, 200, 220, [224, 224])
        decoding = microseconds(lambda blob=blob: rd.LabelMap.from_safetensors(blob))
        of_many = microseconds(lambda blob=blob: read_label_maps([blob] * 64, [""] * 64, [0] * 64), 50) / 64
        alone = microseconds(lambda label_map=label_map: pooling(label_map))
        in_sample = microseconds(lambda label_map=label_map: pooling(image, label_map))
        print(f"| {encoding}, {dtype} | {len(blob)} | {decoding:.0f} | {of_many:.0f} | {alone:.0f} | {in_sample:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--added-peak"]:
        print(added_peak(*sys.argv[2:]))
    else:
        print_batches()
        torch.set_num_threads(1)
        print_samples()
