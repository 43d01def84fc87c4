"""Measure how many samples one core delivers: `python tests/benchmarks/loading.py [IMAGES]`.

Readers of the same JPEG files take turns, epoch by epoch, from the files to normalized float batches of 64 crops of 224 px, in one
process without workers. Speeds are samples per second of CPU time, relative to torchvision's ImageFolder with v2 transforms in the
same round; medians over rounds. Readers with and without label maps take turns batch by batch, with the same crops, and what a label
map takes is the median of their differences. IMAGES is an ImageFolder of JPEGs or a tar of one. Without it, files that are as hard to decode as
those of ImageNet are drawn. NVIDIA DALI is measured if it is installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import datasets
import numpy as np
import PIL.Image
import timm.data
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.builder import build
from relabel_datasets.annotate.shard import BuildConfig
from relabel_datasets.data.sources import ImageFolderSource
from relabel_datasets.labels import stored
from relabel_datasets.labels.compose import run_batch
from relabel_datasets.shards import encoded_jpeg, tensor_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE = 64
REFERENCE = "torchvision ImageFolder, v2"
Reader = Callable[[], Iterable[Any]]  # yields the batches of an epoch


class RandomLogits(torch.nn.Module):
    """Fast network with 1000 classes and stride 32. The values of its logits do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(3, 1000, 1)
        torch.nn.init.normal_(self.head.weight, std=3.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.avg_pool2d(images, 32))


def noise(rng: np.random.Generator, height: int, width: int, exponent: float) -> np.ndarray:
    """Return noise of unit variance whose amplitude falls with the frequency."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    radius[0, 0] = 1.0
    values = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / radius**exponent, s=(height, width))
    return values / values.std()


def draw_photo(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth image with edges, and texture with the spectrum of photos that can be added to it."""
    smooth = 50 * noise(rng, height, width, 2)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        smooth[top : top + rng.integers(20, 200), left : left + rng.integers(20, 200)] += 30 * rng.normal()
    colors = [128 + smooth + 15 * noise(rng, height, width, 2) for _ in range(3)]
    return np.stack(colors, -1), noise(rng, height, width, 1)[..., None]


def write_images(root: Path, count: int, size: tuple[int, int] = (375, 500), num_bytes: int = 110_000) -> None:
    """Write JPEG files of about `num_bytes`, four of five with chroma at full size (4:4:4), as in ImageNet."""
    rng = np.random.default_rng(0)
    for i in range(count):
        smooth, texture = draw_photo(rng, *size)
        low, high = 0.0, 120.0
        for _ in range(8):
            data = io.BytesIO()
            pixels = (smooth + (low + high) / 2 * texture).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(data, "JPEG", quality=94, subsampling=0 if i % 5 else 2)
            low, high = (low, (low + high) / 2) if data.tell() > num_bytes else ((low + high) / 2, high)
        path = root / f"class{i % 10}" / f"image{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())


def augmentation(*last: v2.Transform) -> v2.Compose:
    """Return the standard augmentation of ImageNet training, with `last` after the crop and flip."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            *last,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


class WithoutLabelMaps(Dataset[Any]):
    """Images of shards with their class indices, transformed by the code that also transforms label maps."""

    def __init__(self, dataset: rd.RelabelDataset) -> None:
        self.dataset, self.transforms = dataset, augmentation()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        labels = torch.from_numpy(self.dataset.targets[indices])  # plain tensors, which no transform looks at
        return run_batch(self.transforms, zip(map(self.dataset._opened, indices), labels, strict=True))


def make_shards(images: Path, root: Path) -> Path:
    """Build shards of the images with label maps of random logits."""
    source = ImageFolderSource(images)
    source.classes = None  # keep the 1000 classes of the annotator
    annotator = ModuleAnnotator(RandomLogits(), 480, name="random")
    build(
        source,
        root,
        annotator,
        config="heatmaps",
        build_config=BuildConfig(encoding="heatmaps"),
        progress=False,
    )
    return root


def other_readers(images: Path, shards: Path) -> dict[str, Reader]:
    """Return readers of other libraries."""
    folder, transform = ImageFolder(images, augmentation()), augmentation()
    timm_loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(images)),
        224,
        BATCH_SIZE,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=0,
        persistent_workers=False,
    )
    paths, targets = zip(*folder.samples, strict=True)
    rows = datasets.Dataset.from_dict({"image": list(paths), "label": list(targets)})
    rows = rows.cast_column("image", datasets.Image())
    rows = rows.with_transform(
        lambda batch: {**batch, "image": [transform(image.convert("RGB")) for image in batch["image"]]}
    )
    files = sorted(map(str, shards.glob("heatmaps/train-*.tar")))
    tars = (
        webdataset.WebDataset(files, shardshuffle=False)
        .decode("pilrgb")
        .to_tuple("jpg;jpeg", "cls")
        .map_tuple(transform, int)
    )
    readers: dict[str, Reader] = {
        REFERENCE: lambda: DataLoader(folder, BATCH_SIZE),
        f"timm {timm.__version__}, create_loader": lambda: timm_loader,
        f"datasets {datasets.__version__}, v2": lambda: DataLoader(rows, BATCH_SIZE),
        f"webdataset {webdataset.__version__}, v2": lambda: DataLoader(tars, BATCH_SIZE),
    }
    if importlib.util.find_spec("nvidia.dali"):
        readers["NVIDIA DALI, on the CPU"] = dali_reader(list(paths), list(targets))
    return readers


def dali_reader(paths: list[str], targets: list[int]) -> Reader:
    """Return a reader that decodes the crops and transforms them in DALI's own kernels, in one thread."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        files, labels = fn.readers.file(files=paths, labels=targets, name="files", pad_last_batch=True)
        crops = fn.decoders.image_random_crop(files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        crops = fn.resize(crops, size=[224, 224], interp_type=types.INTERP_LINEAR, antialias=True)
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(crops, mean=mean, std=std, mirror=mirror, output_layout="CHW"), labels

    pipe = pipeline()
    pipe.build()
    num_batches = -(-len(paths) // BATCH_SIZE)
    return lambda: ([torch.from_numpy(pipe.run()[0].as_array())] for _ in range(num_batches))


@contextmanager
def using(decoder: str) -> Iterator[None]:
    """Decode with the C extension or simplejpeg, or use no C extension and decode with Pillow or torchvision."""
    jpeg = encoded_jpeg.jpeg_extension() if decoder == "extension" else None
    pooling = None if decoder == "torchvision" else stored.pooling_extension()
    whole = tensor_images._simplejpeg if decoder == "simplejpeg" else tensor_images._torchvision
    decode = whole()
    with (
        mock.patch.object(encoded_jpeg, "jpeg_extension", return_value=jpeg),
        mock.patch.object(stored, "pooling_extension", return_value=pooling),
        mock.patch.object(tensor_images, "jpeg_decoder", return_value=decode),
    ):
        yield


class Group(NamedTuple):
    """Readers that take turns batch by batch, and the name of the decoder that they are `using`, if they can choose it."""

    readers: tuple[Reader, ...]
    decoder: str | None = None


def own_readers(shards: Path) -> dict[str, Group]:
    """Return pairs of readers of this package, without and with label maps and LabelPooling."""
    decoders = {"without C extensions": "torchvision"}
    if importlib.util.find_spec("simplejpeg"):
        decoders["with simplejpeg"] = "simplejpeg"
    if encoded_jpeg.jpeg_extension() is not None:
        decoders["with the C extensions"] = "extension"
    groups = {}
    for image_format in ("pil", "tensor"):
        dataset: Any = rd.load_dataset(
            shards, "heatmaps", "train", transforms=augmentation(rd.LabelPooling()), image_format=image_format
        )
        for title, name in decoders.items():
            if image_format == "tensor" or name != "simplejpeg":
                # Batches are collated as by RelabelLoader.
                loaders = (
                    DataLoader(rows, BATCH_SIZE, collate_fn=rd.collate) for rows in (WithoutLabelMaps(dataset), dataset)
                )
                pair = tuple(functools.partial(iter, loader) for loader in loaders)
                groups[f'relabel_datasets, image_format="{image_format}", {title}'] = Group(pair, name)
    return groups


class Epoch(NamedTuple):
    """CPU time of the readers of a group in one epoch.

    Attributes:
        seconds: CPU time per sample of each reader.
        differences: CPU time per sample of the second reader minus that of the first, for each batch of `BATCH_SIZE` samples.
    """

    seconds: list[float]
    differences: list[float]


def measure(groups: dict[str, Group], rounds: int) -> dict[str, list[Epoch]]:
    """Measure the epochs of groups of readers. Groups take turns epoch by epoch, the readers of a group batch by batch."""
    epochs: dict[str, list[Epoch]] = {name: [] for name in groups}
    for turn in range(rounds + 1):
        for name, (readers, decoder) in groups.items():
            with nullcontext() if decoder is None else using(decoder):
                epoch = read_epoch(readers, turn)
            if turn:  # the first is a warm-up
                epochs[name].append(epoch)
    return epochs


def read_epoch(readers: tuple[Reader, ...], turn: int) -> Epoch:
    """Read an epoch with each reader, with the same random numbers for each batch. The order of the readers alternates."""
    iterators = [iter(reader()) for reader in readers]
    seconds, counts = np.zeros((2, len(readers)))
    differences = []
    for number in itertools.count():
        took, num_samples = np.zeros(len(readers)), np.zeros(len(readers))
        for i in range(len(readers))[:: 1 if number % 2 else -1]:
            torch.manual_seed(1000 * turn + number)
            start = time.process_time()
            batch = next(iterators[i], None)
            # DALI fills up its last batch, timm drops it.
            num_samples[i] = 0 if batch is None else len(images_of(batch))
            took[i] = time.process_time() - start
        seconds += took
        counts += num_samples
        if len(readers) == 2 and num_samples[0] == BATCH_SIZE:
            differences.append(float(took[1] - took[0]) / BATCH_SIZE)
        if not num_samples.any():
            break
    return Epoch((seconds / counts).tolist(), differences)


def images_of(batch: Any) -> torch.Tensor:
    """Return the images of a batch of any reader."""
    images: torch.Tensor = batch["image"] if isinstance(batch, dict) else batch[0]
    assert images.shape[1:] == (3, 224, 224)
    assert images.dtype == torch.float32
    return images


def print_table(epochs: dict[str, list[Epoch]]) -> None:
    """Print the speeds, and the share of a sample that its label map takes."""
    reference = [epoch.seconds[0] for epoch in epochs[REFERENCE]]
    print("| reader | labels | CPU, ms per sample | speed relative to ImageFolder | label map, µs per sample | share |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for title, measured in epochs.items():
        for i, values in enumerate(zip(*(epoch.seconds for epoch in measured), strict=True)):
            seconds, difference = statistics.median(values), ""
            if i:
                of_map = statistics.median(value for epoch in measured for value in epoch.differences)
                difference = f"{1e6 * of_map:.0f} | {of_map / seconds:.1%}"
            ratio = statistics.median(a / b for a, b in zip(reference, values, strict=True))
            labels = "label maps" if i else "class indices"
            print(f"| {title} | {labels} | {1e3 * seconds:.2f} | {ratio:.2f} | {difference or ' | '} |")


def describe(images: Path) -> str:
    """Return the number, the mean size and the time to decode of the files."""
    files = [path.read_bytes() for path in sorted(images.rglob("*")) if path.is_file()]
    start = time.process_time()
    for data in files:
        PIL.Image.open(io.BytesIO(data)).convert("RGB")
    milliseconds = 1e3 * (time.process_time() - start) / len(files)
    kilobytes = sum(map(len, files)) / len(files) / 1000
    return f"{len(files)} files of {kilobytes:.0f} KB, which Pillow decodes in {milliseconds:.2f} ms each"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?", help="ImageFolder of JPEGs, or a tar of one (default: drawn)")
    parser.add_argument("--rounds", type=int, default=10, help="epochs per reader (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="one round of few small files, for the tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or Path(folder) / "images"
        if args.images is None:
            write_images(images, BATCH_SIZE, (60, 80), 4000) if args.small else write_images(images, 200)
        elif images.is_file():
            with tarfile.open(images) as tar:
                tar.extractall(Path(folder) / "images", filter="data")
            images = Path(folder) / "images"
        print(f"{describe(images)}\n")
        shards = make_shards(images, Path(folder) / "shards")
        groups = {name: Group((reader,)) for name, reader in other_readers(images, shards).items()}
        print_table(measure(groups | own_readers(shards), 1 if args.small else args.rounds))


if __name__ == "__main__":
    main()
