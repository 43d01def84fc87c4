"""Measure the cost of ReLabel and of online distillation in training, as ratios within one process.

    python tests/benchmarks/training.py                      # both tables, on a GPU if available
    python tests/benchmarks/training.py --part steps --rounds 20

Loader-bound: epochs of training loaders without a consumer, on the same shards of 500x375 JPEGs and 1000 classes, with timm's crops.
They are compared with a plain DataLoader that never reads a label map. Mixing is part of the step, so ReLabel + CutMix has the same
loader as ReLabel.

Compute-bound: training steps on batches in memory, compared with torch's cross-entropy of class indices. The student is a ResNet-50 at
224 px on a GPU, or a ResNet-18 at 128 px on the CPU. The annotator of distillation is a ResNet-50 or a ResNet-10-t. Ratios are medians
over rounds. Each round contains all rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import timm
import torch
from loading import RandomLogits, write_images
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.annotate.builder import build
from relabel_datasets.data.sources import ImageFolderSource
from relabel_datasets.train.classifier import Normalize, autocast
from relabel_datasets.train.loaders import train_loader, use_one_thread
from relabel_datasets.train.objective import Objective

NUM_CLASSES = 1000
CLASSES = tuple(f"class{index}" for index in range(NUM_CLASSES))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImagesAlone(Dataset[tuple[Tensor, int]]):
    """Images of shards with timm's crops and class indices. Label maps are never read."""

    def __init__(self, dataset: rd.RelabelDataset, image_size: int) -> None:
        self.dataset = dataset
        self.transform = create_transform(
            image_size, is_training=True, color_jitter=None, interpolation="bicubic", use_prefetcher=True
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.transform(self.dataset.image(index))
        return torch.from_numpy(np.asarray(image)), int(self.dataset.targets[index])


def print_table(first: str, seconds: Mapping[str, list[float]], unit: str, scale: float) -> None:
    """Print medians, and medians of the ratios to the first row within each round."""
    print(f"| {first} | {unit} | extra time | minimum and maximum |")
    print("| --- | ---: | ---: | --- |")
    baseline = next(iter(seconds.values()))
    for name, values in seconds.items():
        extra = [100 * (value / base - 1) for value, base in zip(values, baseline, strict=True)]
        median = statistics.median(extra)
        print(
            f"| {name} | {scale * statistics.median(values):.2f} | {median:+.2f} % | {min(extra):+.2f} .. {max(extra):+.2f} % |"
        )
    print()


def in_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the results of all runs, round by round. Their order rotates, and the first round is a warm-up."""
    names = list(runs)
    results: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = runs[name]()
            if turn:
                results[name].append(value)
    return results


def loader_bound(args: argparse.Namespace) -> None:
    """Print the time per sample in epochs of loaders."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images", args.num_images)
        source = ImageFolderSource(root / "images")
        source.classes = None  # keep the 1000 classes of the annotator
        build(source, root / "data", ModuleAnnotator(RandomLogits(), 480, name="random"), config="maps", progress=False)
        runs = {name: epoch_of(loader, args.batch_size) for name, loader in loaders(root / "data", args).items()}
        print(f"Loader-bound: {args.num_images} images, {args.num_workers} workers, batches of {args.batch_size}\n")
        print_table("loader", in_turns(runs, args.rounds), "ms per sample", 1e3)


def loaders(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the loaders by name of their row."""

    def dataset() -> rd.RelabelDataset:
        return rd.load_dataset(path, "maps", "train")

    options: dict[str, Any] = {
        "num_workers": args.num_workers, "persistent_workers": args.num_workers > 0, "worker_init_fn": use_one_thread,
        "drop_last": True, "shuffle": True,
    }  # fmt: skip
    by_name: dict[str, Any] = {
        "single label, no label maps read": DataLoader(ImagesAlone(dataset(), 224), args.batch_size, **options)
    }
    for name, labels in (("single label, by `relabel train`", "single"), ("ReLabel", "relabel")):
        recipe = rd.train.Recipe(labels=labels, batch_size=args.batch_size)
        by_name[name], _ = train_loader(
            dataset(), recipe, interpolation="bicubic", rank=0, world_size=1, num_workers=args.num_workers, window=8
        )
    unpooled = dataset()
    unpooled.transforms = rd.timm_transforms(
        224, pooling=None, color_jitter=None, interpolation="bicubic", use_prefetcher=True
    )
    by_name["ReLabel, pooled on the device later"] = DataLoader(
        unpooled, args.batch_size, collate_fn=rd.collate, **options
    )
    return by_name


def epoch_of(loader: Any, batch: int) -> Callable[[], float]:
    """Return a function that runs an epoch and returns the seconds per sample."""

    def run() -> float:
        start, count = time.perf_counter(), 0
        for _ in loader:
            count += batch
        return (time.perf_counter() - start) / count

    return run


def compute_bound(args: argparse.Namespace) -> None:
    """Print the time per step on batches in memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    model, teacher, size = ("resnet50", "resnet50", 224) if gpu else ("resnet18", "resnet10t", 128)
    batch, dtype = (args.step_batch_size or (256 if gpu else 32)), ("bfloat16" if gpu else "float32")
    torch.manual_seed(0)
    student = timm.create_model(model, num_classes=NUM_CLASSES).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9)
    normalize = Normalize(MEAN, STD, device)
    annotator = rd.TimmAnnotator(teacher, input_size=size, device=device, dtype=dtype, classes=CLASSES)
    images, indices, maps = batch_in_memory(batch, size, pinned=gpu)
    soft = maps.pool()

    def loss_of(labels: str, targets: Tensor, cutmix: float = 0.0) -> Callable[[], Tensor]:
        recipe = rd.train.Recipe(labels=labels, image_size=size, cutmix=cutmix, dtype=dtype)
        objective = Objective(recipe, CLASSES, normalize, annotator=annotator)
        return lambda: objective.loss(student, images, targets)

    def plain() -> Tensor:
        with autocast(device, getattr(torch, dtype)):
            logits = student(normalize(images))
        return nn.functional.cross_entropy(logits.float(), indices.to(device, non_blocking=True))

    on_device = Objective(rd.train.Recipe(dtype=dtype), CLASSES, normalize)
    losses = {
        "single label, torch's cross entropy": plain,
        "single label, by `relabel train`": loss_of("single", indices),
        "ReLabel": loss_of("relabel", soft),
        "ReLabel, pooled on the device": lambda: on_device.loss(
            student, images, maps.to(device, non_blocking=True).pool()
        ),
        "ReLabel + CutMix": loss_of("relabel", soft, 1.0),
        f"online distillation from {teacher}": loss_of("distilled", indices),
    }
    runs = {name: steps_of(loss, optimizer, args.steps, gpu) for name, loss in losses.items()}
    machine = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"Compute-bound: {model} at {size} pixels, batches of {batch}, {dtype}, {machine}\n")
    print_table("labels", in_turns(runs, args.rounds), "ms per step", 1e3)


def batch_in_memory(batch: int, size: int, *, pinned: bool) -> tuple[Tensor, Tensor, Any]:
    """Return images, class indices, and label maps of random crops."""
    transforms = rd.timm_transforms(size, pooling=None, color_jitter=None, use_prefetcher=True)
    generator = np.random.default_rng(0)
    samples = []
    for index in range(batch):
        logits = 3 * torch.randn(NUM_CLASSES, 15, 15)
        label_map = rd.LabelMap.from_logits(logits, "heatmaps", k=10, canvas_size=(size, size), label=index)
        pixels = generator.integers(0, 256, (size, size, 3), np.uint8)
        image, label_map = transforms(PIL.Image.fromarray(pixels), label_map)
        samples.append((torch.from_numpy(np.asarray(image)), label_map))
    batch_images, maps = rd.collate(samples)
    indices = torch.arange(batch) % NUM_CLASSES
    return (
        (batch_images.pin_memory(), indices.pin_memory(), maps.pin_memory())
        if pinned
        else (batch_images, indices, maps)
    )


def steps_of(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int, gpu: bool
) -> Callable[[], float]:
    """Return a function that trains `steps` steps and returns the seconds per step."""

    def run() -> float:
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    return run


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=["loader", "steps", "both"], default="both", help="tables to print (default: both)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="measurements per row (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=512, help="images per epoch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="batch size of the loaders (default: %(default)s)")
    parser.add_argument(
        "--num-workers", type=int, default=1, help="worker processes of the loaders (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="training steps per measurement (default: %(default)s)")
    parser.add_argument(
        "--step-batch-size", type=int, help="batch size of the steps (default: 256 on a GPU, 32 on the CPU)"
    )
    args = parser.parse_args()
    if args.part != "steps":
        loader_bound(args)
    if args.part != "loader":
        compute_bound(args)


if __name__ == "__main__":
    main()
