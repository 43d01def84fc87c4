"""Measure lookups of ImageNet's 1,281,167 label maps by key: `python tests/benchmarks/lookup.py`.

LabelMaps with an index of keys like those of ImageNet, in the shuffled order of a build, is compared with a pickled Python dict
{key: row}. Each is opened in a new process, after the imports, with its file in the page cache. A lookup of LabelMaps is
`index.row(key)`. Reading and decoding a label map is timed separately; the shards are sparse files that contain a few. Memory is the
growth of /proc/self/smaps_rollup from before opening until after 100,000 lookups: RSS counts all pages, PSS divides pages by the
processes that share them. A forked worker's private memory is the memory that it does not share after 100,000 lookups. The join
matches all images in the order of an ImageFolder, and again with keys such as "train/KEY", as in tars, which match in the second
step only.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import relabel_datasets as rd
from relabel_datasets.data.joins import join_images
from relabel_datasets.labels.statistics import Statistics
from relabel_datasets.shards.index import Row, make_index
from relabel_datasets.shards.manifest import Manifest, Split
from relabel_datasets.shards.tars import shard_names
from relabel_datasets.storage.local import sha256_of

NUM_SAMPLES, NUM_CLASSES, NUM_SHARDS = 1_281_167, 1000, 64
NUM_LOOKUPS, NUM_READS = 100_000, 5_000
SAMPLE_BYTES = 3584  # size of a label-only sample: .cls, then .safetensors
MAP_OFFSET = 3 * 512
LIMITS = "at most 1 s to open, 30 us per lookup, 150 MB"
COLUMNS = ("open, ms", "lookup, us", "read a label map, us", "RSS, MB", "PSS, MB", "private memory of a forked worker, MB",
           "join, s", "join of train/KEY, s")  # fmt: skip


def image_folder_keys() -> list[str]:
    """Return keys like `n01440764_10026`, in the order of an ImageFolder."""
    generator = np.random.default_rng(0)
    synsets = np.sort(generator.choice(np.arange(1_440_764, 15_075_141), NUM_CLASSES, replace=False)).tolist()
    sizes = np.diff(np.linspace(0, NUM_SAMPLES, NUM_CLASSES + 1).astype(int))
    return [
        f"n{synset:08d}_{number}"
        for synset, size in zip(synsets, sizes.tolist(), strict=True)
        for number in sorted(generator.choice(30_000, size, replace=False).tolist())
    ]


def write_dataset(folder: Path, keys: Sequence[str]) -> float:
    """Write a config whose shards contain only their first label maps, and return the duration of make_index in seconds."""
    order = np.random.default_rng(1).permutation(NUM_SAMPLES).tolist()
    lengths = [len(part) for part in np.array_split(np.empty(NUM_SAMPLES, bool), NUM_SHARDS)]
    label_map = rd.LabelMap.from_logits(3 * torch.randn(NUM_CLASSES, 15, 15)).to_safetensors()
    offsets = [MAP_OFFSET + SAMPLE_BYTES * i for length in lengths for i in range(length)]
    rows = [Row(keys[i], i * NUM_CLASSES // NUM_SAMPLES, offset, len(label_map))
            for i, offset in zip(order, offsets, strict=True)]  # fmt: skip
    start = time.perf_counter()
    index = make_index(rows, images=False)
    seconds = time.perf_counter() - start
    folder.mkdir()
    (folder / "train.index.safetensors").write_bytes(index)
    names, first = list(shard_names("train", NUM_SHARDS)), 0
    for name, length in zip(names, lengths, strict=True):
        with (folder / name).open("wb") as file:
            file.truncate(length * SAMPLE_BYTES + 1024)
            for row in rows[first : first + NUM_READS // NUM_SHARDS]:
                file.seek(row.map_offset - 512)
                file.write(f"{row.key}.safetensors".encode().ljust(512, b"\0") + label_map)
        first += length
    split = Split(
        name="train",
        num_samples=NUM_SAMPLES,
        filenames=names,
        shard_lengths=lengths,
        shard_bytes=[length * SAMPLE_BYTES + 1024 for length in lengths],
        shard_sha256=["0" * 64] * NUM_SHARDS,
        shard_statistics=[list(Statistics())] * NUM_SHARDS,
        index="train.index.safetensors",
        index_bytes=len(index),
        index_sha256=sha256_of(folder / "train.index.safetensors"),
        image_extension=None,
        key_rule="stem",
        source_sha256="0" * 64,
    )
    classes = [f"class {i}" for i in range(NUM_CLASSES)]
    encoding = {"name": "heatmaps", "k": 10, "dtype": "uint4", "map_size": [15, 15]}
    Manifest(folder.name, classes, {"name": "none"}, encoding, {"train": split}, "lookup.py").save(folder)
    with (folder / "table.pickle").open("wb") as file:
        pickle.dump({row.key: i for i, row in enumerate(rows)}, file)
    chosen = np.random.default_rng(2).integers(NUM_SAMPLES, size=NUM_LOOKUPS).tolist()
    (folder / "chosen.txt").write_text("\n".join(keys[i] for i in chosen))
    return seconds


class Images:
    """Images of an ImageFolder, as far as a join needs them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys

    def read(self, index: int) -> bytes:
        raise NotImplementedError


def memory(*fields: str) -> float:
    """Return the sum of fields of smaps_rollup in MB."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(line[1]) * 1024 for line in lines if line[0].rstrip(":") in fields) / 1e6


def private_memory_of_a_fork(function: Callable[[], object]) -> float:
    """Return the growth of the private memory of a forked process in MB."""
    receive, send = os.pipe()
    if os.fork() == 0:
        private = ("Private_Clean", "Private_Dirty")
        before = memory(*private)
        function()
        os.write(send, str(memory(*private) - before).encode())
        os._exit(0)
    os.wait()
    return float(os.read(receive, 100))


def seconds_of(function: Callable[[], object]) -> float:
    """Return the duration of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(reader: str, folder: Path) -> dict[str, float]:
    """Return the values of a row of the table."""
    chosen = (folder / "chosen.txt").read_text()  # one string, because many would be copied into the forked worker
    before = {field: memory(field) for field in ("Rss", "Pss")}

    @cache
    def opened() -> Any:
        return rd.LabelMaps(folder) if reader == "LabelMaps" else pickle.loads((folder / "table.pickle").read_bytes())

    results = {"open, ms": 1000 * seconds_of(opened)}
    lookup = opened().index.row if reader == "LabelMaps" else opened().__getitem__

    def lookup_all() -> None:
        for key in chosen.split():
            lookup(key)

    results["lookup, us"] = seconds_of(lookup_all) / NUM_LOOKUPS * 1e6
    results |= {f"{field.upper()}, MB": memory(field) - before[field] for field in before}
    results["private memory of a forked worker, MB"] = private_memory_of_a_fork(lookup_all)
    for column, prefix in (("join, s", ""), ("join of train/KEY, s", "train/")):
        images = Images([prefix + key for key in image_folder_keys()])
        if reader == "LabelMaps":
            results[column] = seconds_of(lambda images=images: join_images(opened(), images, "error"))
        elif not prefix:
            results[column] = seconds_of(lambda images=images: [lookup(key) for key in images.keys])
    if reader == "LabelMaps":
        label_maps = opened()
        starts = np.cumsum([0, *label_maps.split.shard_lengths[:-1]]).tolist()
        written = [label_maps.index.key(start + i) for i in range(NUM_READS // NUM_SHARDS) for start in starts]
        results["read a label map, us"] = seconds_of(lambda: [label_maps[key] for key in written]) / len(written) * 1e6
    return results


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Print the table, or measure one row in a new process."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "labels-only"
        seconds = write_dataset(folder, image_folder_keys())
        sizes = {"LabelMaps": (folder / "train.index.safetensors").stat().st_size,
                 "dict": (folder / "table.pickle").stat().st_size}  # fmt: skip
        print(f"| {NUM_SAMPLES:,} keys | file, MB | {' | '.join(COLUMNS)} |\n{'| --- ' * (len(COLUMNS) + 2)}|")
        for reader, size in sizes.items():
            arguments = [sys.executable, __file__, reader, str(folder)]
            results = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
            values = [_number(results.get(column)) for column in COLUMNS]
            print(f"| {reader} | {size / 1e6:.0f} | {' | '.join(values)} |")
    print(f"\nThe index was made in {seconds:.1f} s. Limits: {LIMITS}.")


if __name__ == "__main__":
    main()
