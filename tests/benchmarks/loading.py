"""Measure how many samples one core delivers: `python tests/benchmarks/loading.py [IMAGES]`.

Readers of the same JPEG files take turns, epoch by epoch, from the files to normalized float batches of 64 crops of 224 px, in one
process without workers. Speeds are samples per second of CPU time, relative to torchvision's ImageFolder with v2 transforms in the
same round; medians over rounds. IMAGES is an ImageFolder of JPEGs or a tar of one. Without it, files that are as hard to decode as
those of ImageNet are drawn. NVIDIA DALI is measured if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
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
def decoder(name: str) -> Iterator[None]:
    """Decode with Pillow or torchvision alone, with simplejpeg, or with the C extension."""
    found = encoded_jpeg.jpeg_extension() if name == "extension" else None
    whole = tensor_images._simplejpeg if name == "simplejpeg" else tensor_images._torchvision
    decode = whole()
    with (
        mock.patch.object(encoded_jpeg, "jpeg_extension", return_value=found),
        mock.patch.object(tensor_images, "jpeg_decoder", return_value=decode),
    ):
        yield


def own_readers(shards: Path) -> dict[str, tuple[Reader, Reader]]:
    """Return pairs of readers of this package, without and with label maps and LabelPooling."""
    decoders = {"without the C extension": "torchvision"}
    if importlib.util.find_spec("simplejpeg"):
        decoders["with simplejpeg"] = "simplejpeg"
    if encoded_jpeg.jpeg_extension() is not None:
        decoders["with the C extension"] = "extension"
    readers = {}
    for image_format in ("pil", "tensor"):
        dataset: Any = rd.load_dataset(
            shards, "heatmaps", "train", transforms=augmentation(rd.LabelPooling()), image_format=image_format
        )
        for title, name in decoders.items():
            if image_format == "tensor" or name != "simplejpeg":
                pair = (_decoding(WithoutLabelMaps(dataset), name), _decoding(dataset, name))
                readers[f'relabel_datasets, image_format="{image_format}", {title}'] = pair
    return readers


def _decoding(dataset: Any, name: str) -> Reader:
    def epoch() -> Iterator[Any]:
        with decoder(name):
            yield from DataLoader(dataset, BATCH_SIZE, collate_fn=rd.collate)  # as RelabelLoader does

    return epoch


def measure(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Return the CPU time per sample of each epoch. The readers take turns, with the same seeds."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, reader in readers.items():
            torch.manual_seed(turn)
            start = time.process_time()
            num_samples = sum(
                len(images_of(batch)) for batch in reader()
            )  # DALI fills up its last batch, timm drops it
            if turn:  # the first is a warm-up
                seconds[name].append((time.process_time() - start) / num_samples)
    return seconds


def images_of(batch: Any) -> torch.Tensor:
    """Return the images of a batch of any reader."""
    images: torch.Tensor = batch["image"] if isinstance(batch, dict) else batch[0]
    assert images.shape[1:] == (3, 224, 224)
    assert images.dtype == torch.float32
    return images


def print_table(seconds: dict[str, list[float]]) -> None:
    """Print the speeds, and the share of a sample that its label map takes."""
    reference = seconds[REFERENCE]
    print("| reader | labels | CPU, ms per sample | speed relative to ImageFolder | share of the label map |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, values in seconds.items():
        title, _, labels = name.partition(" | ")
        ratio = statistics.median(a / b for a, b in zip(reference, values, strict=True))
        share = ""
        if labels == "label maps":
            without = seconds[f"{title} | class indices"]
            share = f"{statistics.median((b - a) / b for a, b in zip(without, values, strict=True)):.1%}"
        milliseconds = 1e3 * statistics.median(values)
        print(f"| {title} | {labels or 'class indices'} | {milliseconds:.2f} | {ratio:.2f} | {share} |")


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
        own = own_readers(shards)
        readers = other_readers(images, shards)
        for title, (without, with_maps) in own.items():
            readers |= {f"{title} | class indices": without, f"{title} | label maps": with_maps}
        print_table(measure(readers, 1 if args.small else args.rounds))


if __name__ == "__main__":
    main()
