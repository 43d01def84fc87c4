"""Measure the cost of label maps in a DataLoader.

    python tests/benchmarks/loading.py

Three datasets with the same JPEG files and the same augmentation take turns, epoch by epoch: torchvision's ImageFolder with class
indices, shards with class indices, and shards with label maps and LabelPooling. The ratio is the throughput with label maps
divided by that without, the median over rounds. `--num-workers 0` loads everything in one process.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.builder import build
from relabel_datasets.annotate.shard import BuildConfig
from relabel_datasets.data.sources import ImageFolderSource

CASES = {"500x375 JPEG, about 110 KB": ((375, 500), 110_000), "224x224 JPEG, about 10 KB": ((224, 224), 10_000)}


class RandomLogits(torch.nn.Module):
    """Fast network with 1000 classes and stride 32. The values of its logits do not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv2d(3, 1000, 1)
        torch.nn.init.normal_(self.head.weight, std=3.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.avg_pool2d(images, 32))


def write_images(root: Path, count: int, size: tuple[int, int], num_bytes: int) -> None:
    """Write JPEG files of about `num_bytes`: smooth images with noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (6, 8, 3), np.uint8)
        smooth = np.asarray(PIL.Image.fromarray(small).resize(size[::-1], PIL.Image.Resampling.BICUBIC), np.float32)
        noise = rng.normal(size=(*size, 1)).astype(np.float32)
        low, high = 0.0, 120.0
        for _ in range(8):
            data = io.BytesIO()
            pixels = (smooth + (low + high) / 2 * noise).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(data, "JPEG", quality=90)
            low, high = (low, (low + high) / 2) if data.tell() > num_bytes else ((low + high) / 2, high)
        path = root / f"class{i % 10}" / f"image{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())


class WithoutLabelMaps(Dataset[tuple[torch.Tensor, int]]):
    """Images of shards with their class indices."""

    def __init__(self, dataset: rd.RelabelDataset, transforms: Callable[..., torch.Tensor]) -> None:
        self.dataset, self.transforms = dataset, transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transforms(self.dataset.image(index)), int(self.dataset.targets[index])


def augmentation(*last: v2.Transform) -> v2.Compose:
    """Return the standard augmentation of ImageNet training, with `last` after the crop and flip."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            *last,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def epochs(datasets: dict[str, Dataset], num_workers: int, rounds: int) -> dict[str, list[float]]:
    """Return the time per sample of each epoch. The datasets take turns, with the same random crops."""
    times: dict[str, list[float]] = {name: [] for name in datasets}
    loaders = {
        name: DataLoader(dataset, 64, num_workers=num_workers, persistent_workers=num_workers > 0)
        for name, dataset in datasets.items()
    }
    for turn in range(rounds + 1):
        for name, loader in loaders.items():
            torch.manual_seed(turn)
            start = time.perf_counter()
            for _ in loader:
                pass
            if turn:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) / len(datasets[name]))
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=256, help="number of images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=16, help="epochs per dataset (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="worker processes (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| images | encoding | reader | ms per sample | throughput relative to the same shards without label maps |")
    print("| --- | --- | --- | --- | --- |")
    for case, (size, num_bytes) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_images(root / "images", args.num_images, size, num_bytes)
            source = ImageFolderSource(root / "images")
            source.classes = None  # keep the 1000 classes of the annotator
            annotator = ModuleAnnotator(RandomLogits(), 480, name="random")
            for encoding in ("heatmaps", "topk"):
                build(
                    source,
                    root / "data",
                    annotator,
                    config=encoding,
                    build_config=BuildConfig(encoding=encoding),
                    progress=False,
                )
                with_maps = rd.load_dataset(
                    root / "data", encoding, "train", transforms=augmentation(rd.LabelPooling())
                )
                datasets: dict[str, Dataset] = {
                    "torchvision ImageFolder": ImageFolder(root / "images", augmentation()),
                    "without label maps": WithoutLabelMaps(with_maps, augmentation()),
                    "with label maps and LabelPooling": with_maps,
                }
                times = epochs(datasets, args.num_workers, args.rounds)
                reference = times["without label maps"]
                for name, values in times.items():
                    ratio = statistics.median(a / b for a, b in zip(reference, values, strict=True))
                    print(f"| {case} | {encoding} | {name} | {1e3 * statistics.median(values):.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
