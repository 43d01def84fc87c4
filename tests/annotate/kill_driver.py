"""Runs a build again and again in forked processes, and kills each at another moment: `python kill_driver.py < JOB`.

One interpreter imports what it takes, which is most of the time of a small build, and computes nothing before it forks, so that
torch's threads start in the child. JOB is JSON: see `main`. Prints what happened as JSON.
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
import relabel_datasets.annotate.builder
import relabel_datasets.annotate.timm_annotator


def start(job, root, kill_at=None):
    """Fork a build; it kills itself before its `kill_at`-th change to the folder, if that is given."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if kill_at is not None:
            die_at(kill_at, root)
        build(job, root)
        status = 0
    finally:
        os._exit(status)


def build(job, root):
    source = rd.data.ImageFolderSource(job["images"])
    build_config = rd.annotate.BuildConfig(batch_size=job["batch_size"], num_threads=2)
    rd.build(source, root, make(job), shard_size=job["shard_size"], build_config=build_config, progress=False)


def make(job):
    if "model" in job:
        return rd.TimmAnnotator(job["model"], **job["model_kwargs"])
    from tests.annotate.slow_annotators import slow_annotator

    return slow_annotator(job["seconds"])


def die_at(number, root):
    """Kill this process when Python is about to open, rename or remove a file of the folder for the n-th time."""
    seen = 0

    def look(event, arguments):
        nonlocal seen
        changes = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        in_rmtree = event in ("os.remove", "os.rmdir") and not Path(arguments[0]).is_absolute()  # by an open folder
        if changes and (in_rmtree or str(arguments[0]).startswith(root)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def end_of(pid, timeout=None):
    """Return whether a child was killed, by us after `timeout` seconds or by itself; it must not end otherwise but well."""
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
    """Build into new folders below `out` until there were `kills`; build once if that is 0.

    With `seconds_alive`, each build is killed after a random time of at most that; else at its first change to the folder, the
    next at its second, and so on, each followed by an undisturbed one in the same folder.
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
            break  # all moments are done
        assert not end_of(start(job, root))
        rounds += 1
    print(json.dumps({"kills": kills, "rounds": rounds}))


if __name__ == "__main__":
    main()
