"""Measure the speed and memory of a build, and the precision of its label maps.

    python tests/benchmarks/building.py IMAGES --annotator MODEL [--checkpoint FILE ...]

IMAGES is an ImageFolder. The rate of the build is compared with that of the bare model, timm's forward pass on batches of the same
size in the same run. The time of a stage is the CPU time of its threads, which overlap. The time of inference is wall-clock time,
because torch has its own threads, and on a GPU it ends when the work is queued. The start and end of a build do not matter for
millions of images but do for few, so the rate between the first and the last tenth of the images is printed as well. At the end,
the mean of each label map over its locations is compared with the logits of the model, and with the step of the quantization.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch

import relabel_datasets as rd
from relabel_datasets.annotate import prefetch, shard
from relabel_datasets.annotate.classes import match_classes
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from


def timm_model(args: argparse.Namespace, annotator: rd.TimmAnnotator) -> torch.nn.Module:
    """Create timm's model with the same weights, without code of this package."""
    model = timm.create_model(args.annotator[0], pretrained=not args.checkpoint, **annotator.model_kwargs)
    if args.checkpoint:
        timm.models.load_checkpoint(model, args.checkpoint[0])
    return model.to(annotator.device, memory_format=torch.channels_last).eval()


def bare_images_per_second(model: torch.nn.Module, annotator: rd.TimmAnnotator, batch_size: int) -> float:
    """Return the median rate of the forward pass on normalized random batches, in the precision of the annotator."""
    device = annotator.device
    images = torch.randn(batch_size, 3, *annotator.input_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    dtype, batches = getattr(torch, annotator.dtype), 4 if device.type == "cuda" else 1  # keep the queue of a GPU full
    rates = []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(6):  # the first is a warm-up
            start = time.perf_counter()
            for _ in range(batches):
                logits = model(images)
            logits.cpu()
            rates.append(batches * batch_size / (time.perf_counter() - start))
    return statistics.median(rates[1:])


class Measured(NamedTuple):
    """Measurements of a build."""

    seconds: Counter[str]  # by stage
    written: list[float]  # wall-clock time at which each image was written

    def images_per_second_between_ends(self) -> float:
        """Return the rate between the first and the last tenth of the images."""
        first, last = len(self.written) // 10, len(self.written) * 9 // 10
        return (last - first) / (self.written[last] - self.written[first])


@contextmanager
def measuring() -> Iterator[Measured]:
    """Measure a build that runs in this context."""
    seconds: Counter[str] = Counter()
    written: list[float] = []
    add = shard.ShardWriter.add

    def add_and_note(*arguments: Any) -> None:
        add(*arguments)
        written.append(time.perf_counter())

    def timed(stage: str, function: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **more: Any) -> Any:
            start = clock()
            try:
                return function(*arguments, **more)
            finally:
                seconds[stage] += clock() - start

        return wrapper

    stages = [
        ("read and decode", rd.data.ImageFolderSource, "read", time.thread_time),
        ("read and decode", prefetch, "decode_reduced", time.thread_time),
        ("preprocess", rd.TimmAnnotator, "preprocess", time.thread_time),
        ("inference (wall-clock time)", rd.TimmAnnotator, "__call__", time.perf_counter),
        ("encode", shard, "encode_to_cpu", time.thread_time),
        ("encode", shard.codec, "encode", time.thread_time),
        ("write", shard.ShardWriter, "add", time.thread_time),  # of `add_and_note`
        ("write", shard.ShardWriter, "close", time.thread_time),
    ]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(shard.ShardWriter, "add", add_and_note))
        for stage, owner, name, clock in stages:
            stack.enter_context(mock.patch.object(owner, name, timed(stage, getattr(owner, name), clock)))
        yield Measured(seconds, written)


def deviations(
    dataset: rd.RelabelDataset, annotator: rd.TimmAnnotator, model: torch.nn.Module, count: int
) -> tuple[float, float, float]:
    """Return the mean and the largest difference between means of maps and logits of the model, and the mean quantization step."""
    rows = match_classes(annotator.classes, dataset.classes, num_classes=annotator.num_classes)
    mean, std = (
        torch.tensor(values, device=annotator.device)[:, None, None] for values in (annotator.mean, annotator.std)
    )
    distances, steps = [], []
    for start in range(0, count, 32):
        samples = [dataset[i] for i in range(start, min(start + 32, count))]
        pixels = torch.stack([annotator.preprocess(image) for image, _ in samples]).to(annotator.device)
        with torch.inference_mode():
            logits = model((pixels / 255 - mean) / std)[:, rows].cpu()
        for (_, label_map), own in zip(samples, logits, strict=True):
            distances.append((label_map.dense().mean((1, 2)) - own).abs().max())
            steps.append((label_map.logits.amax((1, 2)) - label_map.logits.amin((1, 2))).mean() / 15)
    return float(torch.stack(distances).mean()), float(max(distances)), float(torch.stack(steps).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="ImageFolder to annotate")
    parser.add_argument("--out", type=Path, help="folder of the dataset (default: a temporary folder)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=4, help="threads that read files (default: %(default)s)")
    parser.add_argument("--all-classes", action="store_true", help="keep all classes of the annotator")
    parser.add_argument("--num-samples", type=int, help="number of maps to compare with the model (default: all)")
    add_annotator_arguments(parser)
    args = parser.parse_args()
    annotator = annotator_from(args)
    model = timm_model(args, annotator)
    rates = [bare_images_per_second(model, annotator, args.batch_size)]
    source = rd.data.ImageFolderSource(args.images)
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        build_config = rd.annotate.BuildConfig(batch_size=args.batch_size, num_threads=args.num_threads)
        start = time.perf_counter()
        with measuring() as measured:
            manifest = rd.build(source, out, annotator, build_config=build_config, all_classes=args.all_classes)
        built = len(source.keys) / (time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rates.append(bare_images_per_second(model, annotator, args.batch_size))
        dataset = rd.load_dataset(out, manifest.config, "train")
        split = manifest.splits["train"]
        map_bytes = dataset.label_maps.index.mean_size("map")
        count = min(len(dataset), args.num_samples or len(dataset))
        mean, largest, step = deviations(dataset, annotator, model, count)
    bare = statistics.mean(rates)
    print("| | |\n| --- | --- |")
    print(f"| images, skipped | {split.num_samples}, {len(split.skipped)} |")
    print(f"| map | {'x'.join(map(str, (*manifest.encoding['map_size'], len(manifest.classes))))} |")
    print(f"| build | {built:.1f} images/s |")
    print(f"| bare model, before and after | {rates[0]:.1f} and {rates[1]:.1f} images/s |")
    print(f"| build / bare model | {built / bare:.2f} |")
    between = measured.images_per_second_between_ends()
    print(
        f"| build, between its first and last tenth | {between:.1f} images/s, {between / bare:.2f} of the bare model's |"
    )
    print(f"| label map | {map_bytes:.0f} bytes per image |")
    print(f"| shards, images inside | {sum(split.shard_bytes) / split.num_samples:.0f} bytes per image |")
    print(f"| peak memory of the process | {peak:.2f} GiB |")
    print(
        f"| mean of map minus logits of the model | {mean:.4f} on average, {largest:.4f} at most, over all classes and {count} images |"
    )
    print(f"| one step of the 4-bit quantization | {step:.4f} on average |")
    print("\n| stage | s per 1000 images |\n| --- | --- |")
    for stage, seconds in measured.seconds.items():
        print(f"| {stage} | {seconds / len(source.keys) * 1000:.2f} |")


if __name__ == "__main__":
    main()
