"""Measure start-up: commands, imports, and the first batch of workers: `python tests/benchmarks/startup.py --part PART`.

Commands and imports are measured in CPU time of new processes, which take turns; medians over rounds. The first batch is measured
in a new process for each way to start two workers, also in turns: the time from the start of an iteration to its first batch, at
once after the loader was made and again when the fork server has finished its imports; the CPU time of a worker until then; and its
private memory (USS).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "relabel --help": ["--help"],
    "relabel --version": ["--version"],
    "relabel biuld": ["biuld"],
    "relabel build IMAGES OUT --annotator resnet50 --encodign": [
        "build", "IMAGES", "OUT", "--annotator", "resnet50", "--encodign",
    ],
    "relabel build --help": ["build", "--help"],
    "relabel train --help": ["train", "--help"],
    "relabel verify DATASET --quick": ["verify", "DATASET", "--quick"],
}  # fmt: skip
IMPORTS = {
    "numpy": "import numpy",
    "torch, torchvision.transforms.v2": "import torch, torchvision.transforms.v2",
    "relabel_datasets": "import relabel_datasets",
    "relabel_datasets, and load_dataset, RelabelLoader and LabelPooling used": (
        "import relabel_datasets as rd; rd.load_dataset, rd.RelabelLoader, rd.LabelPooling"
    ),
}
STARTS = {
    "fork": ("RelabelLoader", "fork"),
    "fork server, RelabelLoader": ("RelabelLoader", "forkserver"),
    "fork server, torch's DataLoader": ("DataLoader", "forkserver"),
    "spawn": ("RelabelLoader", "spawn"),
}
BATCH_SIZE, NUM_WORKERS = 64, 2


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Return the CPU time of a new Python process, with its own processes."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def median_cpu_seconds(processes: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Return the median CPU time of each process. They take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(rounds):
        for name, arguments in processes.items():
            seconds[name].append(cpu_seconds(arguments))
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_commands(dataset: Path, rounds: int) -> None:
    """Print the table of commands."""
    replaced = {"DATASET": str(dataset)}
    processes = {
        name: ["-m", "relabel_datasets", *(replaced.get(argument, argument) for argument in arguments)]
        for name, arguments in COMMANDS.items()
    }
    numpy = {"python -c 'import numpy', for comparison": ["-c", "import numpy"]}
    print("| command | CPU, s |")
    print("| --- | ---: |")
    for name, seconds in median_cpu_seconds({**processes, **numpy}, rounds).items():
        print(f"| `{name}` | {seconds:.2f} |")


def print_imports(rounds: int) -> None:
    """Print the table of imports."""
    seconds = median_cpu_seconds({name: ["-c", code] for name, code in IMPORTS.items()}, rounds)
    print("| import | CPU, s | relative to torch and torchvision |")
    print("| --- | ---: | ---: |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / seconds['torch, torchvision.transforms.v2']:.2f} |")


def cpu_of(pid: int) -> float:
    """Return the CPU time of a running process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_mib(pid: int) -> float:
    """Return the private memory of a running process in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def wait_for_server() -> None:
    """Wait until the fork server, if there is one, has been idle for a second."""
    from multiprocessing import forkserver

    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    before = -1.0
    while pid is not None and (now := cpu_of(pid)) != before:
        before = now
        time.sleep(1)


def first_batches(dataset: Path, loader_type: str, method: str) -> list[dict[str, float]]:
    """Return the measurements of two iterations: at once, and when the fork server is ready."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    import relabel_datasets as rd

    transforms = v2.Compose(
        [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            rd.LabelPooling(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    stream = rd.load_dataset(dataset, split="train", streaming=True, transforms=transforms)
    types: dict[str, Any] = {"DataLoader": DataLoader, "RelabelLoader": rd.RelabelLoader}
    loader = types[loader_type](stream, BATCH_SIZE, num_workers=NUM_WORKERS, multiprocessing_context=method)
    results = []
    for _ in range(2):
        start = time.monotonic()
        batches = iter(loader)
        next(batches)
        seconds = time.monotonic() - start
        pids = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
        results.append(
            {
                "seconds": seconds,
                "cpu": statistics.mean(map(cpu_of, pids)),
                "mib": statistics.mean(map(private_mib, pids)),
            }
        )
        del batches
        wait_for_server()
    return results


def print_first_batches(dataset: Path, rounds: int) -> None:
    """Print the table of first batches."""
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, (loader_type, method) in STARTS.items():
            command = [sys.executable, __file__, "--part", "one", "--dataset", str(dataset), loader_type, method]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(run.stdout))
    print(
        "| workers | first batch, s | later first batch, s | relative to fork | CPU of a worker, s | its private memory, MiB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, results in found.items():
        at_once, seconds, cpu, mib = (
            statistics.median(result[iteration][key] for result in results)
            for iteration, key in ((0, "seconds"), (1, "seconds"), (1, "cpu"), (1, "mib"))
        )
        forks = zip(results, found["fork"], strict=True)
        ratio = statistics.median(result[1]["seconds"] / fork[1]["seconds"] for result, fork in forks)
        print(f"| {name} | {at_once:.1f} | {seconds:.1f} | {ratio:.2f} | {cpu:.1f} | {mib:.0f} |")


def make_dataset(folder: Path) -> Path:
    """Draw and annotate the scenes."""
    from relabel_datasets.storage.resolve import open_folder

    return Path(str(open_folder("scenes-relabel", cache_dir=folder)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["commands", "imports", "workers", "one"], required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dataset", type=Path, help="folder of a dataset with images (default: drawn scenes)")
    parser.add_argument("start", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.part == "imports":
            print_imports(args.rounds)
        elif args.part == "one":
            print(json.dumps(first_batches(args.dataset, *args.start)))
        else:
            dataset = args.dataset or make_dataset(Path(scratch))
            (print_commands if args.part == "commands" else print_first_batches)(dataset, args.rounds)
