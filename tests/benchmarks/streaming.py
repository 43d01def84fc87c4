"""Measure streaming over HTTP and S3 on this machine, compared with the same shards on local disk.

    python tests/benchmarks/streaming.py [--dataset FOLDER --config NAME]

An epoch of a `RelabelStream` with standard augmentation and LabelPooling in a `RelabelLoader` is read from local disk, cold (an empty
cache; shards are fetched during the epoch) and warm (from the cache that the cold epoch filled). The second table reads the same
without decoding. The sources take turns, with local disk first and last in each round, and the ratios are medians over rounds. The
servers are separate processes on the same cores; their CPU time is listed separately. S3 is emulated by moto.

The other tables show the duration of a resume, and the memory during an epoch. Private memory is not backed by a file. The rest of
the resident memory is pages of mapped shards, which the kernel reclaims when needed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from loading import augmentation
from readers import make_dataset

import relabel_datasets as rd
from relabel_datasets.data.sampling import WINDOW, Order, Progress, Stage

BATCH = 64


class Handler(SimpleHTTPRequestHandler):
    """Request handler that serves files of the current folder, complete or by `Range: bytes=A-B`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    latency = 0.0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        time.sleep(self.latency)
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        stop = min(int(wanted[2]) + 1, size) if wanted and wanted[2] else size
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            self.connection.sendfile(file, start, stop - start)
        return None

    def log_message(self, *args: object) -> None:
        pass


def serve_http(folder: str, latency: float) -> None:
    """Serve a folder over HTTP, and print the port."""
    os.chdir(folder)
    Handler.latency = latency
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def serve_s3(folder: str) -> None:
    """Serve a folder as an S3 bucket, and print the port."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id="bench", aws_secret_access_key="bench",
    )  # fmt: skip
    client.create_bucket(Bucket="bench")
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "bench", str(path.relative_to(folder)))
    print(port, flush=True)
    time.sleep(1e6)


@contextmanager
def server(protocol: str, folder: Path, latency: float = 0) -> Iterator[tuple[int, int]]:
    """Start a server in a new process, and yield its port and process id."""
    with subprocess.Popen(
        [sys.executable, __file__, f"--serve-{protocol}", str(folder), "--latency", str(latency)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.terminate()


class BytesAlone(rd.RelabelDataset):
    """Dataset that reads samples without decoding images."""

    def __getitem__(self, index: int) -> int:
        return len(self.label_maps.image_bytes(index)) + self.label_maps.at(index).num_classes


class Epoch(NamedTuple):
    """Measurements of an epoch. CPU times are in seconds per sample."""

    first_batch: float
    rate: float
    rate_after: float  # after the first batch
    own_cpu: float
    server_cpu: float


class Source(NamedTuple):
    """Source of shards: URL or path, fsspec options, and the process id of the server."""

    url: str
    options: dict[str, Any]
    pid: int | None


def cpu_seconds(pid: int | None) -> tuple[float, float]:
    """Return the CPU time of this process and its finished workers, and of another process."""
    own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    if pid is None:
        return own, 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return own, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_stream(source: Source, config: str, cache: Path, decode: bool) -> rd.RelabelStream:
    """Open a stream with or without decoding."""
    folder = rd.storage.open_folder(source.url, storage_options=source.options, cache_dir=cache)
    if not decode:
        return rd.RelabelStream(BytesAlone(folder, config, "train"))
    return rd.load_dataset(folder, config, "train", streaming=True, transforms=augmentation(rd.LabelPooling()))


def run_epoch(source: Source, config: str, cache: Path, decode: bool, num_workers: int) -> Epoch:
    """Measure an epoch."""
    before = cpu_seconds(source.pid)
    start = time.perf_counter()
    loader = rd.RelabelLoader(open_stream(source, config, cache, decode), BATCH, num_workers=num_workers)
    times, counts = [], []
    for batch in loader:
        times.append(time.perf_counter() - start)
        counts.append(len(batch[0] if isinstance(batch, list) else batch))
    total = sum(counts)
    own, other = (after - earlier for after, earlier in zip(cpu_seconds(source.pid), before, strict=True))
    after = (total - counts[0]) / (times[-1] - times[0])
    return Epoch(times[0], total / times[-1], after, own / total, other / total)


def print_rates(sources: dict[str, Source], config: str, decode: bool, num_workers: int, rounds: int) -> None:
    """Print the rates of all sources, which take turns."""
    epochs: dict[str, list[Epoch]] = {}
    ratios: dict[str, list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        measured: dict[str, Epoch] = {}
        run = partial(run_epoch, config=config, decode=decode, num_workers=num_workers)
        for name, source in [*sources.items(), ("local, again", sources["local"])]:
            with tempfile.TemporaryDirectory() as cache:
                if name.startswith("local"):
                    measured[name] = run(source, cache=Path(cache))
                else:
                    measured.update({f"{name}, {state}": run(source, cache=Path(cache)) for state in ("cold", "warm")})
        if turn:  # the first is a warm-up
            rate, after = (np.mean([measured[name][i] for name in ("local", "local, again")]) for i in (1, 2))
            for name, epoch in measured.items():
                epochs.setdefault(name, []).append(epoch)
                ratios.setdefault(name, []).append((epoch.rate / rate, epoch.rate_after / after))
    print(f"\n{'Decoded, augmented and pooled' if decode else 'Bytes alone'}, {num_workers} workers\n")
    print(
        "| shards | samples/s | relative to local | relative to local, after the first batch | first batch, s | CPU, ms per sample | "
        "CPU of the server, ms per sample |"
    )
    print("| --- " * 7 + "|")
    for name, measurements in epochs.items():
        median = Epoch(*map(statistics.median, zip(*measurements, strict=True)))
        whole, after = map(statistics.median, zip(*ratios[name], strict=True))
        print(
            f"| {name} | {median.rate:.0f} | {whole:.3f} | {after:.3f} | {median.first_batch:.2f} | "
            f"{1e3 * median.own_cpu:.2f} | {1e3 * median.server_cpu:.2f} |",
            flush=True,
        )


def print_resume(root: Path, config: str, num_workers: int, rounds: int) -> None:
    """Print the time from a resume to the first batch."""
    times: dict[float, list[float]] = {}
    for part in (0, 0.01, 0.5, 0.99) * rounds:
        stream = open_stream(Source(str(root), {}, None), config, root, decode=True)
        loader = rd.RelabelLoader(stream, BATCH // 2, num_workers=num_workers)  # small enough for the rest at 99 %
        state = stream.state_dict(int(part * len(stream)))
        start = time.perf_counter()
        loader.load_state_dict(state)
        next(iter(loader))
        times.setdefault(part, []).append(time.perf_counter() - start)
    print(f"\nResume, local, {num_workers} workers: from load_state_dict to the first batch\n")
    print("| resumed at | s | relative to the start |\n| --- | --- | --- |")
    for part, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times[0], strict=True))
        print(f"| {part:.0%} | {statistics.median(seconds):.3f} | {ratio:.2f} |")
    order = Order(shard_lengths=(5000,) * 256 + (1167,), seed=0, window=WINDOW, remainder="drop")
    start = time.perf_counter()
    order.rows(Progress(0, (Stage(1, 600_000),)), 1, 0)
    print(f"\nThe order of ImageNet's 1,281,167 samples: {time.perf_counter() - start:.2f} s")


def trivial(image: object, label_map: rd.LabelMap) -> int:
    """Transform that drops the image."""
    return label_map.num_classes


def memory() -> tuple[float, float]:
    """Return resident and private memory of this process and its children in MiB. Shared pages count once."""
    resident = private = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        values = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
        resident += int(values["Pss"])
        private += int(values["Pss_Anon"])
    return resident / 1024, private / 1024


def print_memory(sources: dict[str, Source], config: str, num_workers: int) -> None:
    """Print the memory during an epoch."""
    print("\nMemory in MiB at ten points of an epoch of images that are decoded and dropped\n")
    print(
        "| shards | workers | memory | at 10 to 100 % | growth after 20 %, KiB per 1000 samples | scatter around the trend, MiB |"
    )
    print("| --- " * 6 + "|")
    for (name, source), worker_count in itertools.product(sources.items(), dict.fromkeys((0, num_workers))):
        with tempfile.TemporaryDirectory() as cache:
            split = rd.LabelMaps(
                rd.storage.open_folder(source.url, storage_options=source.options, cache_dir=cache), config
            ).split
            folder = rd.storage.open_folder(
                source.url, storage_options=source.options, cache_dir=cache, cache_limit=sum(split.shard_bytes) // 2
            )
            stream = rd.load_dataset(folder, config, "train", streaming=True, transforms=trivial)
            last = len(stream) // BATCH - 2 * worker_count - 2  # idle workers exit before the end
            marks = [last * tenth // 10 for tenth in range(1, 11)]
            loader = rd.RelabelLoader(stream, BATCH, num_workers=worker_count)
            samples = [memory() for number, _ in enumerate(loader) if number in marks]
        for memory_type, values in zip(("resident", "private"), zip(*samples, strict=True), strict=True):
            positions = np.array(marks[1:]) * BATCH / 1000
            slope, start = np.polyfit(positions, values[1:], 1)
            scatter = float(np.std(values[1:] - (start + slope * positions)))
            print(
                f"| {name} | {worker_count} | {memory_type} | {' '.join(f'{value:.0f}' for value in values)} | {slope * 1024:.0f} | {scatter:.1f} |"
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="folder of a dataset (default: random images of about 110 KB)")
    parser.add_argument("--config", help="config of the dataset (default: the only one)")
    parser.add_argument("--num-samples", type=int, default=8192, help="number of random images (default: %(default)s)")
    parser.add_argument("--num-shards", type=int, default=32, help="shards of the random images (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs per source (default: %(default)s)")
    parser.add_argument(
        "--latency",
        type=float,
        default=0,
        help="seconds that the HTTP server waits before each response (default: %(default)s)",
    )
    parser.add_argument("--serve-http", help=argparse.SUPPRESS)
    parser.add_argument("--serve-s3", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_http or args.serve_s3:
        return serve_http(args.serve_http, args.latency) if args.serve_http else serve_s3(args.serve_s3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = args.dataset or Path(folder, "data")
        if args.dataset is None:
            make_dataset(root, num_samples=args.num_samples, num_shards=args.num_shards)
        config = args.config or rd.LabelMaps(root).manifest.config
        split = rd.LabelMaps(root, config).split
        print(
            f"{split.num_samples} samples, {sum(split.shard_bytes) / split.num_samples / 1e3:.0f} KB each, {len(split.filenames)} shards"
        )
        sources = open_sources(root, stack, args.latency)
        for decode in (True, False):
            print_rates(sources, config, decode, args.num_workers, args.rounds)
        print_resume(root, config, args.num_workers, args.rounds)
        small = Path(folder, "small")
        make_dataset(small, num_samples=20_480, num_shards=32, size=(224, 224), num_bytes=10_000)
        sources = open_sources(small, stack)
        print_memory({name: sources[name] for name in ("local", "HTTP")}, "random", args.num_workers)
    return None


def open_sources(root: Path, stack: ExitStack, latency: float = 0) -> dict[str, Source]:
    """Start the servers of a folder, and return the sources by name."""
    port, pid = stack.enter_context(server("http", root, latency))
    sources = {"local": Source(str(root), {}, None), "HTTP": Source(f"http://127.0.0.1:{port}", {}, pid)}
    if find_spec("moto") is None or find_spec("s3fs") is None:
        print("S3 is left out: moto[server] and s3fs are not installed")
    else:
        port, pid = stack.enter_context(server("s3", root))
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "bench", "secret": "bench"}
        sources["S3"] = Source("s3://bench", options, pid)
    return sources


if __name__ == "__main__":
    main()
