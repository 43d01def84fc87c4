"""Measure the speed and memory of a build, and the precision of its label maps.

    python tests/benchmarks/building.py [IMAGES] --annotator MODEL [--checkpoint FILE ...]

IMAGES is an ImageFolder. Without it, JPEGs of 500x375 pixels and about 110 KB are generated.

Costs are per forward pass: a build annotates every image and, of one image in 20, four crops that calibrate labels; both count.
The build is compared with the bare model: timm's forward pass on random batches of the same size, eager and compiled, before and
after the build. On a CPU, costs are CPU time of all threads of the process, since other processes disturb the clock, and decoding
competes with the model for the same cores. The second comparison therefore adds the cost of reading, decoding and resizing an image
with Pillow in one thread to the bare model. On a GPU, costs are wall-clock time, and decoding runs beside the model. The part
between the first and the last tenth of the images leaves out the start and the end, which do not matter for millions of images.

The times of stages overlap. On a GPU, the annotator's ends when its work is queued. At the end, the mean of each label map over its
locations is compared with the logits of the model, and with the step of the quantization.

On one GPU, everything that matters there, in at most 8 minutes, with all output in the folder of --out or $OUT:

    python tests/benchmarks/building.py --gpu-suite --out DIR

It builds 8,000 generated images with EfficientNet-L2 at 475 px, and label maps only of 50,000 with ResNet-50 at 224 px, compiled and
eager, and profiles 50 batches of each compiled build in the middle of the run (torch.profiler: `*_profile.txt` and `*_trace.json.gz`).
Weights are random. Each step is a process with its own limit, and writes its results as soon as it has them, so a step that fails or
is stopped loses nothing else. Crops that calibrate labels are left out, since they do not matter for a large build.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from _building_images import write_images
from _building_measures import Cost, Measured, bare_cost, compiled, decoding_cost, measuring, print_machine, timm_model
from _building_suite import run_suite

import relabel_datasets as rd
from relabel_datasets.annotate import work
from relabel_datasets.annotate.classes import match_classes
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from, parse_size

_IMAGENET = 1_281_167  # images


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


class Benchmark:
    """Builds of one set of images with one annotator."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self.annotator = _annotator(args)
        self.device = self.annotator.device
        self.images = args.images or folder / "images"
        if args.images is None:
            classes = self.annotator.classes or [str(i) for i in range(10)]
            write_images(self.images, args.num_images, sorted(classes)[:10])
        self.source = rd.data.ImageFolderSource(self.images)
        self.eager = timm_model(args, self.annotator)
        self._bare = {"eager": self.eager} if "eager" in args.bare else {}
        if "compiled" in args.bare and (model := compiled(self.eager, self.annotator, args.batch_size)) is not None:
            self._bare["compiled"] = model

    def bare(self) -> dict[str, Cost]:
        """Print and return the costs of the bare models."""
        costs = {name: bare_cost(model, self.annotator, self._args.batch_size) for name, model in self._bare.items()}
        for name, cost in costs.items():
            print(f"| bare model, {name} | {1 / cost.of(self.device):.1f} |", flush=True)
        return costs

    def build(self, name: str, on_batch: Callable[[], object] = lambda: None) -> tuple[Measured, rd.Manifest, Path]:
        """Build into a new folder, and return its measurements, manifest and path."""
        args = self._args
        build_config = rd.annotate.BuildConfig(
            batch_size=args.batch_size, num_threads=args.num_threads, images=not args.no_images
        )
        out = self._folder / name
        with ExitStack() as stack:
            if args.no_calibration:
                stack.enter_context(mock.patch.object(work, "num_calibrated_images", return_value=0))
            measured = stack.enter_context(measuring(self.device, on_batch))
            manifest = rd.build(
                self.source,
                out,
                self.annotator,
                build_config=build_config,
                shard_size=args.shard_size,
                all_classes=args.all_classes,
            )
        return measured, manifest, out

    def profile(self, num_batches: int, out: Path) -> None:
        """Profile batches in the middle of a build, and write a table and a trace."""
        total = len(self.source.keys) // self._args.batch_size
        first = total // 4
        last = min(first + num_batches, total - 1)
        number, profile = 0, torch.profiler.profile()

        def on_batch() -> None:
            nonlocal number
            if number == first:
                profile.start()
            if number == last:
                profile.stop()
            number += 1

        self.build("profile", on_batch)
        name = self._args.annotator[0].partition(".")[0]
        order = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}_profile.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=60))
        profile.export_chrome_trace(str(out / f"{name}_trace.json.gz"))


def _annotator(args: argparse.Namespace) -> rd.TimmAnnotator:
    if not args.random_weights:
        return annotator_from(args)
    size = parse_size(args.input_size[0]) if args.input_size else None
    return rd.TimmAnnotator(
        args.annotator[0],
        input_size=size,
        dtype=args.dtype,
        device=args.device,
        compile=args.compile,
        **args.model_kwargs,
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "images", type=Path, nargs="?", metavar="IMAGES", help="ImageFolder to annotate (default: generated)"
    )
    parser.add_argument(
        "--num-images", type=int, default=8000, help="number of generated images (default: %(default)s)"
    )
    parser.add_argument(
        "--bare", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"],
        help="bare models to compare with (default: both)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1, help="number of builds (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=5000, help="images per shard (default: %(default)s)")
    parser.add_argument(
        "--num-threads", type=int, default=4, help="threads or processes that decode (default: %(default)s)"
    )
    parser.add_argument("--all-classes", action="store_true", help="keep all classes of the annotator")
    parser.add_argument("--no-images", action="store_true", help="do not copy the images into the shards")
    parser.add_argument(
        "--no-calibration", action="store_true",
        help="annotate no crops, which are 17 %% of the forward passes of a small build, but 0.2 %% for ImageNet",
    )  # fmt: skip
    parser.add_argument("--random-weights", action="store_true", help="use a timm model with random weights")
    parser.add_argument("--num-samples", type=int, help="number of maps to compare with the model (default: all)")
    parser.add_argument(
        "--profile", type=int, metavar="N", help="profile N batches of another build, and write to --out"
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of results (default: $OUT)")
    add_annotator_arguments(parser)
    args = parser.parse_args()
    args.pretrained = not args.checkpoint and not args.random_weights
    if args.profile and args.out is None:
        parser.error("--profile needs --out")
    args.out = args.out and Path(args.out)
    return args


def print_builds(benchmark: Benchmark, num_rounds: int) -> tuple[Measured, rd.Manifest, Path]:
    """Build several times, each between measurements of the bare models, print the costs and return the last build."""
    device, decoding = benchmark.device, decoding_cost(benchmark.source, benchmark.annotator)
    print(f"Decoding with Pillow in one thread: {decoding.cpu_s * 1000:.2f} ms of CPU time per image.")
    print(
        f"\n| forward passes per {'CPU second' if device.type == 'cpu' else 'second'} | |\n| --- | ---: |", flush=True
    )
    ratios: dict[str, list[float]] = {}
    bare = benchmark.bare()
    for number in range(num_rounds):
        measured, manifest, out = benchmark.build(f"build-{number}")
        build = {"whole run": measured.whole().of(device), "between first and last tenth": measured.steady().of(device)}
        for part, cost in build.items():
            print(f"| build {number + 1}, {part} | {1 / cost:.1f} |", flush=True)
        before, bare = bare, benchmark.bare()
        for name in bare:
            bare_s = (before[name].of(device) + bare[name].of(device)) / 2
            comparisons = {f"bare model, {name}": bare_s}
            if device.type == "cpu":
                comparisons[f"bare model, {name}, with decoding"] = bare_s + decoding.cpu_s
            for text, own_s in comparisons.items():
                for part, cost in build.items():
                    ratios.setdefault(f"{part} / {text}", []).append(own_s / cost)
    print("\n| speed of the build / speed of the bare model | median | all |\n| --- | ---: | --- |")
    for text, values in ratios.items():
        print(f"| {text} | {statistics.median(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
    hours = _IMAGENET * measured.steady().wall_s / 3600
    print(
        f"\nAt the rate between the first and the last tenth, the {_IMAGENET:,} images of ImageNet take {hours:.2f} hours."
    )
    return measured, manifest, out


def print_stages(measured: Measured) -> None:
    """Print the times of stages and the utilization of the GPU."""
    print("\n| stage | s per 1000 forward passes |\n| --- | ---: |")
    for stage, seconds in measured.seconds.items():
        print(f"| {stage} | {seconds / measured.num_rows * 1000:.2f} |")
    if (utilization := measured.steady_utilization()) is not None:
        print(f"\nGPU utilization between the first and the last tenth: {utilization:.0f} % on average.")


def print_dataset(
    benchmark: Benchmark, measured: Measured, manifest: rd.Manifest, out: Path, count: int | None
) -> None:
    """Print sizes, memory and the precision of maps."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    label_maps, split = rd.LabelMaps(out, manifest.config, "train"), manifest.splits["train"]
    count = split.num_samples if count is None else min(split.num_samples, count)
    print("\n| | |\n| --- | --- |")
    print(f"| images, skipped, forward passes | {split.num_samples}, {len(split.skipped)}, {measured.num_rows} |")
    print(f"| map | {'x'.join(map(str, (*manifest.encoding['map_size'], len(manifest.classes))))} |")
    print(f"| label map | {label_maps.index.mean_size('map'):.0f} bytes per image |")
    print(f"| shards, images inside | {sum(split.shard_bytes) / split.num_samples:.0f} bytes per image |")
    print(f"| peak memory of the process | {peak:.2f} GiB |")
    if count:
        dataset = rd.load_dataset(out, manifest.config, "train", images=benchmark.images)
        mean, largest, step = deviations(dataset, benchmark.annotator, benchmark.eager, count)
        print(
            f"| mean of map minus logits of the model | {mean:.4f} on average, {largest:.4f} at most, over all classes and "
            f"{count} images |"
        )
        print(f"| one step of the 4-bit quantization | {step:.4f} on average |")


def main() -> None:
    """Print the tables."""
    if "--gpu-suite" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--gpu-suite", action="store_true")
        parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), required="OUT" not in os.environ)
        run_suite(Path(__file__), Path(parser.parse_args().out))
        return
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(args, Path(folder))
        print_machine(benchmark.device)
        measured, manifest, out = print_builds(benchmark, args.rounds)
        print_stages(measured)
        print_dataset(benchmark, measured, manifest, out, args.num_samples)
        if args.profile:
            benchmark.profile(args.profile, args.out)


if __name__ == "__main__":
    main()
