"""Benchmarks of builds on one GPU, within a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_LIMIT_S = 8 * 60
_COMMON = (
    f"--random-weights --dtype bfloat16 --num-threads {os.cpu_count()} --all-classes --no-calibration --num-samples 0"
)
_L2 = f"--annotator tf_efficientnet_l2.ns_jft_in1k_475 --num-images 8000 --batch-size 64 {_COMMON}"
# Without images, since a disk may be slower than the GPU.
_RESNET = f"--annotator resnet50.a1_in1k --input-size 224 --num-images 50000 --batch-size 256 --shard-size 10000 --no-images {_COMMON}"


class Step(NamedTuple):
    """Arguments of the benchmark, and the time that it may take."""

    arguments: str
    limit_s: float


STEPS = {  # the last may be cut off by the limit of all
    "resnet50_compiled": Step(f"{_RESNET} --compile --profile 50", 150),
    "l2_compiled": Step(f"{_L2} --compile --profile 50", 300),
    "l2_eager": Step(f"{_L2} --bare eager", 120),
    "resnet50_eager": Step(f"{_RESNET} --bare eager", 60),
}


def run_suite(script: Path, out: Path, steps: Mapping[str, Step] = STEPS, limit_s: float = _LIMIT_S) -> None:
    """Run all steps, and write the output of each to a file while it runs. A step that exceeds its limit is stopped.

    Args:
        script: Benchmark of builds.
        out: Folder of results.
        steps: Steps by the name of their file. Default: `STEPS`.
        limit_s: Limit of all steps in seconds. Default: 480.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limit_s
    for name, step in steps.items():
        start = time.monotonic()
        limit = min(step.limit_s, deadline - start)
        if limit <= 0:
            print(f"{name}: left out, the limit of {limit_s:g} s is reached", flush=True)
            continue
        command = [sys.executable, "-u", str(script), *step.arguments.split(), "--out", str(out)]
        with (out / f"{name}.txt").open("w") as file:
            print(*command[2:], "\n", file=file, flush=True)
            try:
                run = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False)
                result = f"exit status {run.returncode}"
            except subprocess.TimeoutExpired:
                result = "stopped at its limit"
        print(f"{name}: {result} after {time.monotonic() - start:.0f} s, see {out / name}.txt", flush=True)
