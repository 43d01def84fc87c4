"""Compare the speed and memory of LabelPooling with the published implementation: `python tests/benchmarks/pooling.py`.

The published implementation (Yun et al., "Re-labeling ImageNet", 2021) scatters the stored logits into dense `[B, C, H, W]` maps, and
applies torchvision's roi_align and a softmax. Both get the same maps and the same boxes of RandomResizedCrop, in turns, in one
process. Times are medians. Batches are pooled with the default number of torch threads and with one thread, as in a DataLoader
worker; single samples with one. Memory is the growth of the peak of a new process during one call, after a call for two maps.

`--busy` measures batches while other processes keep all cores busy: with small kernels in the calling thread, as `pool_labels` runs
them, and in all threads of torch, in turns.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torchvision import ops, tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.cpus import num_cpus
from relabel_datasets.labels import stored, threads
from relabel_datasets.labels.batch import MapRow
from relabel_datasets.labels.reading import read_labels, read_rows

BATCH, NUM_CLASSES, HEIGHT, WIDTH = 256, 1000, 15, 15
NUM_KEPT = {"topk": 5, "heatmaps": 10}
REPEATS = 9
ALL_THREADS = torch.get_num_threads()


class Maps(NamedTuple):
    """Label maps and the boxes to pool."""

    logits: Tensor  # [B, K, H, W]
    classes: Tensor  # [B, K, H, W] or [B, K, 1, 1]
    base: Tensor | None  # [B, C]
    boxes_xyxy: Tensor  # [B, 4], 0 to 1

    def first(self, num_maps: int) -> Maps:
        """Return the first maps."""
        return Maps(*(part if part is None else part[:num_maps] for part in self))


def random_maps(encoding: str) -> Maps:
    """Return random maps, created without dense maps, which would raise the peak of memory."""
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
    """Pool labels with this package."""
    return rd.pool_labels(maps.logits, maps.classes, maps.boxes_xyxy, num_classes=NUM_CLASSES, base=maps.base)


def pool_as_published(maps: Maps) -> Tensor:
    """Pool labels as published."""
    dense = maps.logits.new_zeros(len(maps.logits), NUM_CLASSES, HEIGHT, WIDTH)
    if maps.base is not None:
        dense += maps.base[:, :, None, None]
    dense.scatter_(1, maps.classes.expand_as(maps.logits), maps.logits)
    boxes = maps.boxes_xyxy * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    boxes = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
    return ops.roi_align(dense, boxes, 1, aligned=True)[:, :, 0, 0].softmax(1)


POOLS: dict[str, Callable[[Maps], Tensor]] = {"sparse": pool, "published": pool_as_published}


def batch_seconds(maps: Maps) -> dict[str, float]:
    """Return the median duration of a call of each implementation."""
    seconds: dict[str, list[float]] = {name: [] for name in POOLS}
    for _ in range(REPEATS):
        for name, function in POOLS.items():
            calls = 200 if name == "sparse" else 1  # about equal total time
            seconds[name].append(timeit.timeit(lambda function=function: function(maps), number=calls) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def added_peak(name: str, encoding: str) -> float:
    """Return the growth of the peak memory in MiB. Call this in a new process, started by a small process."""
    maps = random_maps(encoding)
    POOLS[name](maps.first(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    POOLS[name](maps)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # Linux counts in KiB


def added_peak_of_new_process(name: str, encoding: str) -> float:
    """Return `added_peak`, measured in a new process."""
    command = [sys.executable, __file__, "--added-peak", name, encoding]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def microseconds(call: Callable[[], object], calls: int = 1000) -> float:
    """Return the median duration of a call in microseconds."""
    return statistics.median(timeit.repeat(call, number=calls, repeat=REPEATS)) / calls * 1e6


def print_batches() -> None:
    """Print the table of batches."""
    peaks = {(name, encoding): added_peak_of_new_process(name, encoding) for encoding in NUM_KEPT for name in POOLS}
    print(f"Labels of {BATCH} boxes in maps of {HEIGHT}x{WIDTH}x{NUM_CLASSES}\n")
    print(
        "| encoding | threads | published, ms | pool_labels, ms | ratio | published, MiB | pool_labels, MiB | difference |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for encoding in NUM_KEPT:
        for num_threads in dict.fromkeys((ALL_THREADS, 1)):
            torch.set_num_threads(num_threads)
            maps = random_maps(encoding)
            difference = (pool(maps) - pool_as_published(maps)).abs().max()
            seconds = batch_seconds(maps)
            ours, published = seconds["sparse"] * 1e3, seconds["published"] * 1e3
            print(
                f"| {encoding} {NUM_KEPT[encoding]} | {num_threads} | {published:.0f} | {ours:.2f} | {published / ours:.0f} | "
                f"{peaks['published', encoding]:.0f} | {peaks['sparse', encoding]:.0f} | {difference:.1e} |"
            )
        torch.set_num_threads(ALL_THREADS)


def print_samples() -> None:
    """Print the table of single samples."""
    dense = 3 * torch.randn(NUM_CLASSES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    image = tv_tensors.Image(torch.zeros(3, 224, 224, dtype=torch.uint8))
    pooling = rd.LabelPooling()
    print("\nOne sample, microseconds\n")
    print(
        f"| encoding, stored as | bytes | read | read with 63 others | LabelPooling | LabelPooling with image | batch of {BATCH} "
        "| read and pool with 63 others | same, with the C extension |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    both = [3 * torch.randn(NUM_CLASSES, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(1)), dense]
    for encoding, dtype in (
        ("topk", "float16"), ("heatmaps", "uint4"), ("heatmaps", "uint8"), ("heatmaps", "float16"), ("multiscale", "uint4"),
    ):  # fmt: skip
        maps = both if encoding == "multiscale" else dense
        blob = rd.LabelMap.from_logits(maps, encoding, canvas_size=(375, 500)).to_safetensors(dtype)
        label_map = v2.functional.resized_crop(rd.LabelMap.from_safetensors(blob), 20, 30, 200, 220, [224, 224])
        decoding = microseconds(lambda blob=blob: rd.LabelMap.from_safetensors(blob))
        of_many = microseconds(lambda blob=blob: read_labels([blob] * 64, [""] * 64, [0] * 64), 50) / 64
        alone = microseconds(lambda label_map=label_map: pooling(label_map))
        in_sample = microseconds(lambda label_map=label_map: pooling(image, label_map))
        batch = rd.collate([label_map] * BATCH)
        in_batch = microseconds(batch.pool, 20) / BATCH
        with mock.patch.object(stored, "pooling_extension", return_value=None):
            decoded = stored_microseconds(blob, label_map)
        from_bytes = "" if stored.pooling_extension() is None else f"{stored_microseconds(blob, label_map):.1f}"
        print(
            f"| {encoding}, {dtype} | {len(blob)} | {decoding:.0f} | {of_many:.0f} | {alone:.0f} | {in_sample:.0f} | {in_batch:.1f} "
            f"| {decoded:.1f} | {from_bytes} |"
        )


def stored_microseconds(blob: bytes, label_map: rd.LabelMap) -> float:
    """Return the time to read and pool one of 64 stored label maps in microseconds."""
    views = [label_map.view] * 64

    def read_and_pool() -> Tensor:
        first = read_rows([blob] * 64, [""] * 64, [0] * 64)[0]
        assert isinstance(first, MapRow)
        return first.batch.with_views(views).pool()

    return microseconds(read_and_pool, 50) / 64


def busy_milliseconds(maps: Maps, num_threads: int, max_elements: int) -> list[float]:
    """Return the durations of calls in milliseconds.

    Args:
        maps: Maps to pool.
        num_threads: Number of threads of torch.
        max_elements: Largest number of elements for which kernels run in the calling thread.
    """
    torch.set_num_threads(num_threads)
    with mock.patch.object(threads, "MAX_ELEMENTS", max_elements):
        pool(maps)
        return [timeit.timeit(lambda: pool(maps), number=1) * 1e3 for _ in range(40)]


def print_busy() -> None:
    """Print the table of batches on a busy machine."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_cpus())]
    cases = [(name, number, limit) for name in NUM_KEPT for number in (1, 2, 4) for limit in (threads.MAX_ELEMENTS, 0)]
    durations: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
    try:
        maps = {name: random_maps(name) for name in NUM_KEPT}
        for _ in range(REPEATS):
            for name, number, limit in cases:
                durations[name, number, limit] += busy_milliseconds(maps[name], number, limit)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    print(f"Labels of {BATCH} boxes while {num_cpus()} other processes keep all cores busy\n")
    print(
        "| encoding | threads of torch | mean, ms | median, ms | mean in all threads, ms | median in all threads, ms |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in NUM_KEPT:
        for number in (1, 2, 4):
            ours, all_threads = (durations[name, number, limit] for limit in (threads.MAX_ELEMENTS, 0))
            values = [
                average(values) for values in (ours, all_threads) for average in (statistics.mean, statistics.median)
            ]
            print(f"| {name} {NUM_KEPT[name]} | {number} | {' | '.join(f'{value:.2f}' for value in values)} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["--busy"]:
        print_busy()
    elif sys.argv[1:2] == ["--added-peak"]:
        print(added_peak(*sys.argv[2:]))
    else:
        print_batches()
        torch.set_num_threads(1)
        print_samples()
