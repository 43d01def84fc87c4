"""Compare readers of shards: the same images and label maps from local files, with the same work per sample.

    python tests/benchmarks/readers.py [--dataset FOLDER --config NAME]

The first table reads the bytes of images and label maps. The second decodes, crops, flips, pools and normalizes them with the same
functions for all readers. Every reader shuffles as its documentation recommends. Rates are those of whole epochs, including the
start of workers and the filling of buffers. The readers take turns, and the ratios are medians over rounds. The third table shows
whether an epoch contains every sample exactly once, and whether an epoch that was interrupted half-way and resumed from the state of
the reader contains exactly the rest.

litdata and mosaicml-streaming are measured if they are installed, on copies in their own formats. mosaicml-streaming 0.13 requires an
older torch, but works with `pip install --no-deps` and transformers, zstd, Brotli, python-snappy and catalogue.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import timm.data
import timm.data.readers.reader_wds as timm_wds
import torch
import webdataset
from loading import RandomLogits, augmentation, write_images
from torch.utils.data import DataLoader, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.shards.card import write_card
from relabel_datasets.shards.index import make_index
from relabel_datasets.shards.tars import ShardWriter, shard_names
from relabel_datasets.storage.local import sha256_of

BATCH, BUFFER = 64, 1000
Read = Callable[[bytes, bytes], tuple[Any, ...]]  # processes an image file and the bytes of its label map
Members = Callable[
    [Mapping[str, Any]], tuple[str, bytes, bytes]
]  # returns key, image and label map of a library's sample


def make_dataset(
    root: Path,
    *,
    num_samples: int,
    num_shards: int,
    num_distinct: int = 256,
    size: tuple[int, int] = (375, 500),
    num_bytes: int = 110_000,
) -> None:
    """Build a dataset of random images. A few distinct images are repeated under many keys."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder, "images"), num_distinct, size, num_bytes)
        source = rd.data.ImageFolderSource(Path(folder, "images"))
        source.classes = None
        annotator = ModuleAnnotator(RandomLogits(), 480, name="random")
        manifest = rd.build(source, Path(folder, "data"), annotator, progress=False)
        few = rd.LabelMaps(Path(folder, "data"))
        samples = [(int(few.index.labels[row]), few.image_bytes(row), map_bytes(few, row)) for row in range(len(few))]
    (root / "random").mkdir(parents=True)
    names, infos = shard_names("train", num_shards), []
    for i, name in enumerate(names):
        with ShardWriter(root / "random" / name, few.split.image_extension) as writer:
            for row in range(i * num_samples // num_shards, (i + 1) * num_samples // num_shards):
                writer.add(f"image{row:07d}", *samples[row % num_distinct])
            infos.append(writer.close())
    index = root / "random" / few.split.index
    index.write_bytes(make_index([row for info in infos for row in info.rows], images=True))
    split = replace(
        few.split,
        num_samples=num_samples,
        filenames=list(names),
        shard_lengths=[len(info.rows) for info in infos],
        shard_bytes=[info.num_bytes for info in infos],
        shard_sha256=[info.sha256 for info in infos],
        shard_statistics=[list(info.statistics) for info in infos],
        index_bytes=index.stat().st_size,
        index_sha256=sha256_of(index),
        key_rule=None,
    )
    replace(manifest, splits={"train": split}).save(root / "random")
    write_card(root)


def map_bytes(label_maps: rd.LabelMaps, row: int) -> bytes:
    """Return the bytes of a label map in the shard."""
    return label_maps.shards.read(row, label_maps.index.extent(row, "map"), f"{label_maps.index.key(row)}.safetensors")


def sizes(image: bytes, label_map: bytes) -> tuple[int, int]:
    """Return the sizes of the bytes of a sample."""
    return len(image), len(label_map)


def sizes_with_map(image: bytes, label_map: bytes) -> tuple[int, float]:
    """Return the size of an image, and the number of classes of the decoded label map."""
    return len(image), rd.LabelMap.from_safetensors(label_map).num_classes


class Train:
    """Decode and augment a sample as in training."""

    def __init__(self) -> None:
        self.transforms = augmentation(rd.LabelPooling())

    def __call__(self, image: bytes, label_map: bytes) -> tuple[Any, ...]:
        return self.transforms(rd.decode_image(image), rd.LabelMap.from_safetensors(label_map))


class Collate:
    """Process the samples of a library in the workers of its DataLoader."""

    def __init__(self, members: Members, read: Read) -> None:
        self.members, self.read = members, read

    def __call__(self, samples: list[Mapping[str, Any]]) -> list[Any]:
        return default_collate([(key, *self.read(image, blob)) for key, image, blob in map(self.members, samples)])


class Keyed(rd.RelabelDataset):
    """Dataset that adds keys to samples and processes them with `read`, if it is not None."""

    read: Read | None = None

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self.read is None:
            return self.keys[index], *super().__getitem__(index)
        return self.keys[index], *self.read(self.label_maps.image_bytes(index), map_bytes(self.label_maps, index))


class ImagesAlone(Keyed):
    """Dataset of the sizes of images, without label maps."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.keys[index], len(self.label_maps.image_bytes(index))


class Data:
    """Dataset on disk with copies in other formats."""

    def __init__(self, root: Path, config: str, copies: Path) -> None:
        self.root, self.config, self.copies = root, config, copies
        self.label_maps = rd.LabelMaps(root, config)
        split = self.label_maps.split
        self.shards = [str(root / config / name) for name in split.filenames]
        self.image = str(split.image_extension)
        self.num_samples = len(self.label_maps)

    def row(self, row: int) -> dict[str, Any]:
        """Return a sample for a writer."""
        maps = self.label_maps
        return {"key": maps.index.key(row), "image": maps.image_bytes(row), "map": map_bytes(maps, row)}


# Each reader returns the loader of one epoch. `stateful` says whether its state will be saved.


def ours(data: Data, read: Read, num_workers: int, stateful: bool, kind: type[Keyed] = Keyed) -> Iterable[Any]:
    return rd.RelabelLoader(rd.RelabelStream(our_dataset(data, read, kind)), BATCH, num_workers=num_workers)


def our_pipeline(data: Data, read: Read, num_workers: int, stateful: bool) -> Iterable[Any]:
    pipeline = rd.data.RelabelPipeline(our_dataset(data, read), shuffle=BUFFER)
    return DataLoader(pipeline, BATCH, num_workers=num_workers)


def our_dataset(data: Data, read: Read, kind: type[Keyed] = Keyed) -> Keyed:
    dataset = kind(data.root, data.config, transforms=read.transforms if isinstance(read, Train) else None)
    dataset.read = None if isinstance(read, Train) else read
    return dataset


def hf_datasets(data: Data, read: Read, num_workers: int, stateful: bool, shuffle: bool = True) -> Iterable[Any]:
    rows = datasets.load_dataset(str(data.root), data.config, split="train", streaming=True)
    rows = rows.cast_column(data.image, datasets.Image(decode=False))
    rows = rows.shuffle(seed=0, buffer_size=BUFFER) if shuffle else rows
    collate = Collate(partial(hf_members, image=data.image), read)
    return (StatefulDataLoader if stateful else DataLoader)(rows, BATCH, num_workers=num_workers, collate_fn=collate)


def hf_members(sample: Mapping[str, Any], image: str) -> tuple[str, bytes, bytes]:
    return sample["__key__"], sample[image]["bytes"], sample["safetensors"]


def web_dataset(data: Data, read: Read, num_workers: int, stateful: bool) -> Iterable[Any]:
    samples = webdataset.WebDataset(data.shards, shardshuffle=len(data.shards), seed=0).shuffle(BUFFER)
    collate = Collate(partial(web_members, image=data.image), read)
    return DataLoader(samples, BATCH, num_workers=num_workers, collate_fn=collate)


def web_members(sample: Mapping[str, Any], image: str) -> tuple[str, bytes, bytes]:
    return sample["__key__"], sample[image], sample["safetensors"]


def timm_reader(data: Data, read: Read, num_workers: int, stateful: bool) -> Iterable[Any]:
    dataset = timm.data.create_dataset(
        "wds/", root=str(data.root / data.config), split="train", is_training=True, batch_size=BATCH,
        input_key=data.image, transform=augmentation(),
    )  # fmt: skip
    dataset.set_loader_cfg(num_workers)
    return DataLoader(dataset, BATCH, num_workers=num_workers, collate_fn=timm_collate)


def timm_collate(samples: list[tuple[torch.Tensor, str]]) -> list[Any]:
    return default_collate([(key, image) for image, key in samples])


def timm_decode(decode: Callable[..., dict[str, Any]], sample: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return {**decode(sample, **kwargs), "target": sample["__key__"]}  # timm's reader does not return keys


def lit_data(data: Data, read: Read, num_workers: int, stateful: bool) -> Iterable[Any]:
    library = importlib.import_module("litdata")
    copy = data.copies / "litdata"
    if not copy.exists():
        library.optimize(
            data.row, list(range(data.num_samples)), str(copy), num_workers=1, reorder_files=False, verbose=False,
            start_method="fork",
            chunk_size=data.label_maps.split.shard_lengths[0],
        )  # fmt: skip
    dataset = library.StreamingDataset(str(copy), shuffle=True, drop_last=False)
    return library.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=num_workers, collate_fn=Collate(copied_members, read)
    )


def copied_members(sample: Mapping[str, Any]) -> tuple[str, bytes, bytes]:
    return sample["key"], sample["image"], sample["map"]


def mosaic_streaming(data: Data, read: Read, num_workers: int, stateful: bool) -> Iterable[Any]:
    library = mosaic()
    copy = data.copies / "mds"
    if not copy.exists():
        columns = {"key": "str", "image": "bytes", "map": "bytes"}
        size = max(data.label_maps.split.shard_bytes)
        with library.MDSWriter(out=str(copy), columns=columns, size_limit=size) as writer:
            for row in range(data.num_samples):
                writer.write(data.row(row))
    gc.collect()  # the library refuses a second dataset of the same files
    library.base.util.clean_stale_shared_memory()
    dataset = library.StreamingDataset(local=str(copy), shuffle=True, batch_size=BATCH)
    return library.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=num_workers, collate_fn=Collate(copied_members, read)
    )


def mosaic() -> Any:
    """Import MosaicML's module `streaming`, which streaming.py in this folder would shadow."""
    if "streaming" not in sys.modules:
        path = sys.path[:]
        sys.path[:] = [folder for folder in path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
        importlib.import_module("streaming")
        sys.path[:] = path
    return sys.modules["streaming"]


Reader = Callable[[Data, Read, int, bool], Iterable[Any]]
OURS = "relabel_datasets"
PIPELINE = f"{OURS}, RelabelPipeline"
READERS: dict[str, Reader] = {
    OURS: ours,
    PIPELINE: our_pipeline,
    "datasets": hf_datasets,
    "webdataset": web_dataset,
    "litdata": lit_data,
    "mosaicml-streaming": mosaic_streaming,
}


class Epoch(NamedTuple):
    """Measurements of an epoch. CPU time is in seconds per sample."""

    keys: list[str]
    rate: float
    first_batch: float
    cpu: float


def run(loader: Iterable[Any]) -> Epoch:
    """Measure an epoch."""
    start, cpu = time.perf_counter(), cpu_seconds()
    keys: list[str] = []
    times = []
    for batch in loader:
        times.append(time.perf_counter() - start)
        keys.extend(batch[0])
    return Epoch(keys, len(keys) / times[-1], times[0], (cpu_seconds() - cpu) / len(keys))


def cpu_seconds() -> float:
    """Return the CPU time of this process and its finished workers."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def print_rates(title: str, data: Data, readers: Mapping[str, Callable[[int], Iterable[Any]]], rounds: int) -> None:
    """Print the rates of all readers, which take turns."""
    epochs: dict[tuple[str, int], list[Epoch]] = {}
    names = list(readers)
    for turn in range(rounds + 1):
        for name, num_workers in itertools.product(names[turn % len(names) :] + names[: turn % len(names)], (0, 2)):
            epoch = run(readers[name](num_workers=num_workers))
            if turn:  # the first is a warm-up
                epochs.setdefault((name, num_workers), []).append(epoch)
    print(f"\n{title}: {data.num_samples} samples\n")
    print("| reader | workers | samples/s | relative to relabel_datasets | CPU, ms per sample | first batch, s |")
    print("| --- " * 6 + "|")
    for num_workers, name in itertools.product((0, 2), names):
        measured = epochs[name, num_workers]
        ratio = statistics.median(a.rate / b.rate for a, b in zip(measured, epochs[OURS, num_workers], strict=True))
        rate, first, cpu = (statistics.median(values) for values in list(zip(*measured, strict=True))[1:])
        print(f"| {name} | {num_workers} | {rate:.0f} | {ratio:.2f} | {1e3 * cpu:.3f} | {first:.2f} |", flush=True)


def difference(keys: Iterable[str], wanted: set[str]) -> str:
    """Return whether each wanted key occurs exactly once, else how many are missing or repeated."""
    counts = Counter(keys)
    missing, repeated = len(wanted - counts.keys()), sum(counts.values()) - len(counts)
    return f"no: {missing} missing, {repeated} repeated" if missing or repeated else "yes"


def interrupted_and_resumed(reader: Reader, data: Data, num_workers: int, then: int) -> Iterator[str]:
    """Yield the keys of the first half of an epoch, and of the rest from the saved state in a new loader."""
    loader: Any = reader(data, sizes, num_workers, True)
    batches = iter(loader)
    for batch in itertools.islice(batches, data.num_samples // BATCH // 2):
        yield from batch[0]
    state = loader.state_dict()
    del batches, loader
    gc.collect()
    loader = reader(data, sizes, then, True)
    loader.load_state_dict(state)
    for batch in loader:
        yield from batch[0]


def resumes(reader: Reader, data: Data, num_workers: int, then: int) -> str:
    """Return whether an interrupted epoch resumes exactly."""
    try:
        return difference(interrupted_and_resumed(reader, data, num_workers, then), set(data.label_maps))
    except AttributeError:  # torch's DataLoader
        return "has no state"
    except Exception as error:  # noqa: BLE001  an error of another library is a result
        return f"raises {type(error).__name__}"


def print_correctness(data: Data, readers: Mapping[str, Reader]) -> None:
    """Print whether epochs are complete and resume exactly."""
    print(
        "\nThe numbers are worker processes; 0 is one process. Epochs are interrupted half-way and resumed from their state.\n"
    )
    print("| reader | complete, 0 | complete, 2 | exact resume, 0 | exact resume, 2 | 2, resumed with 3 |")
    print("| --- " * 6 + "|")
    for name, reader in readers.items():
        wanted = set(data.label_maps)
        cells = [difference(run(reader(data, sizes, num_workers, False)).keys, wanted) for num_workers in (0, 2)]
        cells += [resumes(reader, data, *workers) for workers in ((0, 0), (2, 2), (2, 3))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="folder of a dataset (default: random images)")
    parser.add_argument("--config", help="config of the dataset (default: the only one)")
    parser.add_argument(
        "--num-samples", type=int, default=5000, help="number of random images, in 32 shards (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="epochs per reader (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    timm_wds._decode = partial(timm_decode, timm_wds._decode)
    with tempfile.TemporaryDirectory() as folder:
        root = args.dataset or Path(folder, "data")
        if args.dataset is None:
            make_dataset(root, num_samples=args.num_samples, num_shards=32)
        data = Data(root, args.config or rd.LabelMaps(root).manifest.config, Path(folder))
        readers = {}
        for name, reader in READERS.items():
            try:
                print(f"{name} {version('relabel-datasets' if name.startswith(OURS) else name)}")
                readers[name] = reader
            except PackageNotFoundError:
                print(f"{name}: not installed")
        alone = {f"{OURS}, label map decoded": partial(ours, data, sizes_with_map, stateful=False)}
        alone[f"{OURS}, image alone"] = partial(ours, data, sizes, stateful=False, kind=ImagesAlone)
        loaders = {name: partial(reader, data, sizes, stateful=False) for name, reader in readers.items()}
        print_rates("Bytes", data, {**loaders, **alone}, args.rounds)
        loaders = {name: partial(reader, data, Train(), stateful=False) for name, reader in readers.items()}
        loaders["timm, without label maps"] = partial(timm_reader, data, Train(), stateful=False)
        print_rates("Training samples", data, loaders, args.rounds)
        print_correctness(
            data, {**readers, "datasets, not shuffled": partial(hf_datasets, shuffle=False), "timm": timm_reader}
        )


if __name__ == "__main__":
    main()
