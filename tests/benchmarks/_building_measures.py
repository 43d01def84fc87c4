"""Measurements of the benchmark of builds: bare models, stages of a build, and the utilization of a GPU."""

from __future__ import annotations

import argparse
import io
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import PIL.Image
import timm
import torch

import relabel_datasets as rd
from relabel_datasets.annotate import pipeline, prefetch, shard


class Cost(NamedTuple):
    """Cost of an annotated image or crop."""

    wall_s: float
    cpu_s: float  # of all threads of the process

    def of(self, device: torch.device) -> float:
        """Return CPU time on a CPU, whose clock other processes disturb, and wall-clock time on a GPU."""
        return self.cpu_s if device.type == "cpu" else self.wall_s


def timm_model(args: argparse.Namespace, annotator: rd.TimmAnnotator) -> torch.nn.Module:
    """Create timm's model with the same weights, without code of this package."""
    model = timm.create_model(args.annotator[0], pretrained=args.pretrained, **annotator.model_kwargs)
    if args.checkpoint:
        timm.models.load_checkpoint(model, args.checkpoint[0])
    return model.to(annotator.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def compiled(model: torch.nn.Module, annotator: rd.TimmAnnotator, batch_size: int) -> torch.nn.Module | None:
    """Return the compiled model after its first batch, or None, with the reason on stdout."""
    mode = "reduce-overhead" if annotator.device.type == "cuda" else "default"
    model = torch.compile(model, mode=mode)  # type: ignore[assignment]
    try:
        bare_cost(model, annotator, batch_size, num_rounds=1)
    except Exception as error:  # noqa: BLE001  there is no compiler
        print(f"no compiled model: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    return model


def bare_cost(model: torch.nn.Module, annotator: rd.TimmAnnotator, batch_size: int, num_rounds: int = 5) -> Cost:
    """Return the median cost of the forward pass on normalized random batches, in the precision of the annotator."""
    device = annotator.device
    images = torch.randn(batch_size, 3, *annotator.input_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    dtype, batches = getattr(torch, annotator.dtype), 4 if device.type == "cuda" else 1  # keep the queue of a GPU full
    costs = []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(num_rounds + 1):  # the first is a warm-up
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(batches):
                logits = model(images)
            logits.cpu()
            count = batches * batch_size
            costs.append(((time.perf_counter() - start) / count, (time.process_time() - cpu) / count))
    return Cost(*(statistics.median(values) for values in zip(*costs[1:], strict=True)))


def print_machine(device: torch.device) -> None:
    """Print what the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}\n", flush=True
    )


def decoding_cost(source: rd.data.ImageFolderSource, annotator: rd.TimmAnnotator, count: int = 200) -> Cost:
    """Return the cost of reading, decoding and resizing an image in one thread with Pillow, without code of this package."""
    height, width = annotator.input_size
    indices = np.random.default_rng(0).permutation(len(source.keys))[:count].tolist()
    start, cpu = time.perf_counter(), time.process_time()
    for index in indices:
        with PIL.Image.open(io.BytesIO(source.read(index))) as image:
            image.draft(None, (2 * width, 2 * height))
            np.array(image.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC))
    return Cost((time.perf_counter() - start) / len(indices), (time.process_time() - cpu) / len(indices))


@dataclass
class Measured:
    """Measurements of a build.

    Attributes:
        seconds: Seconds by stage.
        moments: Wall-clock time, CPU time, and number of images and crops so far, after each batch was encoded and written.
        utilization: Wall-clock time, and utilization of the GPU in percent since the previous time.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    moments: list[tuple[float, float, int]] = field(default_factory=list)
    utilization: list[tuple[float, float]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Number of images and crops."""
        return self.moments[-1][2]

    def whole(self) -> Cost:
        """Return the cost of an image or crop between the start of the build and its last batch."""
        return self._between(0, len(self.moments) - 1)

    def steady(self) -> Cost:
        """Return that between the first and the last tenth of the images and crops."""
        return self._between(*self._steady_part())

    def steady_utilization(self) -> float | None:
        """Return the mean utilization of the GPU in percent in the same part, or None if it was not measured."""
        start, end = (self.moments[i][0] for i in self._steady_part())
        values = [percent for moment, percent in self.utilization if start <= moment <= end]
        return statistics.mean(values) if values else None

    def _steady_part(self) -> tuple[int, int]:
        """Return the indices of its first and last moment: those of the whole build if it has too few batches."""
        rows = [row for _, _, row in self.moments]
        first = next(i for i, row in enumerate(rows) if row >= 0.1 * self.num_rows)
        last = max((i for i, row in enumerate(rows) if row <= 0.9 * self.num_rows), default=first)
        return (first, last) if last > first else (0, len(rows) - 1)

    def _between(self, first: int, last: int) -> Cost:
        (wall, cpu, rows), (end_wall, end_cpu, end_rows) = self.moments[first], self.moments[last]
        return Cost((end_wall - wall) / (end_rows - rows), (end_cpu - cpu) / (end_rows - rows))


@contextmanager
def measuring(device: torch.device, on_batch: Callable[[], object] = lambda: None) -> Iterator[Measured]:
    """Measure a build that runs in this context.

    Args:
        device: Device of the annotator.
        on_batch: Function called before each batch, in the thread of the annotator.
    """
    measured = Measured(moments=[(time.perf_counter(), time.process_time(), 0)])
    seconds, take, batches = measured.seconds, shard.OpenShard.take, prefetch.Loader.batches

    def timed(stage: str, function: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            start = clock()
            try:
                return function(*arguments, **more)
            finally:
                seconds[stage] += clock() - start

        return wrapper

    def take_and_note(self: shard.OpenShard, batch: prefetch.Batch[Any], logits: list[torch.Tensor]) -> None:
        take(self, batch, logits)
        rows = measured.num_rows + len(batch.images) * batch.stage.rows_per_image
        measured.moments.append((time.perf_counter(), time.process_time(), rows))

    def timed_batches(self: prefetch.Loader, stages: Any) -> Iterator[Any]:
        inner = batches(self, stages)
        following = timed("wait for decoded images", lambda: next(inner, None), time.perf_counter)
        try:
            while (batch := following()) is not None:
                on_batch()
                yield batch
        finally:
            inner.close()

    stages = [
        ("read, decode and resize (CPU time, threads only)", prefetch._Worker, "load", time.thread_time),
        ("annotator", pipeline._Pipeline, "_annotate", time.perf_counter),
        ("wait for the encoder", pipeline._Pipeline, "_wait_for_encoder", time.perf_counter),
        ("encode and write (CPU time)", pipeline._Pipeline, "_take", time.thread_time),
        ("of it write (CPU time)", shard.ShardWriter, "add", time.thread_time),
        ("complete shards (in the background)", pipeline._Pipeline, "_store", time.perf_counter),
    ]
    seconds.update(dict.fromkeys(("wait for decoded images", *(stage for stage, *_ in stages)), 0.0))  # in this order
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(shard.OpenShard, "take", take_and_note))
        stack.enter_context(mock.patch.object(prefetch.Loader, "batches", timed_batches))
        for stage, owner, name, clock in stages:
            stack.enter_context(mock.patch.object(owner, name, timed(stage, getattr(owner, name), clock)))
        if device.type == "cuda":
            stack.enter_context(_sampling_utilization(measured.utilization))
        yield measured


@contextmanager
def _sampling_utilization(values: list[tuple[float, float]]) -> Iterator[None]:
    """Append the time and the utilization of the current GPU to `values`, five times per second."""
    if shutil.which("nvidia-smi") is None:
        print("no utilization of the GPU: nvidia-smi is not installed")
        yield
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))
    command += ["-i", f"GPU-{uuid}"] if uuid else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stdout is not None
            values.extend((time.perf_counter(), float(line)) for line in process.stdout if line.strip().isdigit())

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            process.terminate()
            thread.join()
