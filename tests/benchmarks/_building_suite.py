"""Benchmarks of builds on one GPU, within a time limit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_LIMIT_S = 8 * 60
_L2 = "--annotator tf_efficientnet_l2.ns_jft_in1k_475 --batch-size 64"
_RESNET = "--annotator resnet50.a1_in1k --input-size 224 --batch-size 256"
_COMMON = "--random-weights --dtype bfloat16 --num-threads 16 --all-classes --num-images 8000 --num-samples 0"
STEPS = {  # from the most to the least important, since the last may be cut off
    "l2_eager": _L2,
    "resnet50_compiled": f"{_RESNET} --compile --profile 50",
    "l2_compiled": f"{_L2} --compile --profile 50",
    "resnet50_eager": _RESNET,
}


def run_suite(script: Path, out: Path) -> None:
    """Run all steps, and write the output of each to a file. A step that exceeds the limit is stopped.

    Args:
        script: Benchmark of builds.
        out: Folder of results.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _LIMIT_S
    for name, arguments in STEPS.items():
        remaining = deadline - time.monotonic()
        if remaining < 20:
            print(f"{name}: left out, the limit of {_LIMIT_S} s is reached")
            continue
        command = [sys.executable, "-u", str(script), *arguments.split(), *_COMMON.split(), "--out", str(out)]
        start = time.monotonic()
        with (out / f"{name}.txt").open("w") as file:
            print(*command[2:], "\n", file=file, flush=True)
            try:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=remaining, check=False
                ).returncode
                result = f"exit status {status}"
            except subprocess.TimeoutExpired:
                result = "stopped at the limit"
        print(f"{name}: {result} after {time.monotonic() - start:.0f} s, see {out / name}.txt", flush=True)
