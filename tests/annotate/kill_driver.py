"""Run a build, or an import if JOB has a release, repeatedly in forked processes and kill each at another moment: `python kill_driver.py < JOB`.

One interpreter imports all modules, which is most of the time of a small build. It computes nothing before it forks, so that
the threads of torch start in the child. JOB is JSON, see `main`. The result is printed as JSON.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import huggingface_hub  # noqa: F401  a build imports these when it needs them
import jinja2  # noqa: F401
import timm  # noqa: F401

import relabel_datasets as rd
import relabel_datasets.annotate.crop_importers
import relabel_datasets.annotate.timm_annotator
from relabel_datasets.annotate import prefetch
from relabel_datasets.annotate.annotator import ModuleAnnotator
from tests.annotate.crop_releases import CLASSES


def start(job, root, kill_at=None):
    """Fork a build, which kills itself before change number `kill_at` to the folder, or before that batch, if it is given."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if job.get("processes"):
            prefetch.uses_processes = lambda: True
        if kill_at is not None and job.get("kill_at") == "batches":
            die_at_batch(kill_at)
        elif kill_at is not None:
            die_at(kill_at, root)
        build(job, root)
        status = 0
    finally:
        os._exit(status)


def build(job, root):
    if "release" in job:
        crops = rd.annotate.PublishedCrops(job["release"], "fkd", job["images"], classes=CLASSES)
        rd.annotate.import_crops(crops, root, shard_size=job["shard_size"], num_threads=2, progress=False)
        return
    source = rd.data.ImageFolderSource(job["images"])
    build_config = rd.annotate.BuildConfig(batch_size=job["batch_size"], num_threads=2, **job.get("build_config", {}))
    rd.build(source, root, make(job), shard_size=job["shard_size"], build_config=build_config, progress=False)


def make(job):
    if "model" in job:
        return rd.TimmAnnotator(job["model"], **job["model_kwargs"])
    from tests.annotate.slow_annotators import slow_annotator

    return slow_annotator(job["seconds"])


def die_at(number, root):
    """Kill this process when Python is about to open, rename or remove a file of the folder for the n-th time."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        changes = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        in_rmtree = (
            event in ("os.remove", "os.rmdir") and not Path(arguments[0]).is_absolute()
        )  # relative to an open folder
        if changes and (in_rmtree or str(arguments[0]).startswith(root)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_at_batch(number):
    """Kill this process when it is about to annotate a batch for the n-th time."""
    remaining, call = iter(range(number - 1)), ModuleAnnotator.__call__

    def call_or_die(annotator, images):
        if next(remaining, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(annotator, images)

    ModuleAnnotator.__call__ = call_or_die


def end_of(pid, timeout=None):
    """Return whether a child was killed, by itself or after `timeout` seconds. Otherwise it must succeed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, f"the build ended with status {status}"
    return killed


def main():
    """Build into new folders below `out` until `kills` builds were killed, or build once if `kills` is 0.

    With `seconds_alive`, each build is killed after a random time up to this limit. Without it, the first build is killed at its
    first change to the folder, the second at its second change, and so on, or at batches if `kill_at` says so. Each is followed by an uninterrupted build in the same
    folder.
    """
    job = json.load(sys.stdin)
    gc.freeze()
    generator = random.Random(job["seed"])
    kills, rounds = 0, 0
    while kills < max(1, job["kills"]):
        root = str(Path(job["out"]) / f"{rounds:03d}")
        if not job["kills"]:
            kills += 1
        elif "seconds_alive" in job:
            while kills < job["kills"] and end_of(start(job, root), generator.uniform(0, job["seconds_alive"])):
                kills += 1
        elif end_of(start(job, root, kill_at=rounds + 1)):
            kills += 1
        else:
            break  # all changes are done
        assert not end_of(start(job, root))
        rounds += 1
    print(json.dumps({"kills": kills, "rounds": rounds}))


if __name__ == "__main__":
    main()
