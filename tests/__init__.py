"""Tests of the package. Importing this sets the environment of all tests and their processes, before any library reads it."""

import os
import random
import re
import socket
import sys
import tempfile
from contextlib import suppress

# Variables that users and schedulers set for the libraries that tests run, or for the size and the colors of the terminal.
_SETTINGS = re.compile(
    r"(ACCELERATE|AWS|CLOUDSDK|DATASETS|FSSPEC|GCSFS|GOOGLE|HF|HUGGING_?FACE|MASTER|MPI|OMPI|PMIX?|RAY|RELABEL|SLURM|TORCH\w*|TQDM|TRANSFORMERS)_.*|"
    r"(\w+_)?(RANK|WORLD_SIZE)|\w+_PROXY|NETRC|STORAGE_EMULATOR_HOST|MPLBACKEND|COLUMNS|LINES|NO_COLOR|FORCE_COLOR",
    re.IGNORECASE,
)
_KEPT = ("RELABEL_TEST_DATA", "RELABEL_REQUIRE_EXTENSIONS")


def _free_port() -> int:
    """Return a port that systems do not choose by themselves, so that no other socket has it when a test needs it."""
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(20_000, 30_000)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def _set_environment(worker: str) -> None:
    """Give a worker of pytest-xdist, or the process without workers, its own Hub: no test may reach the real one."""
    assert "huggingface_hub" not in sys.modules  # it reads its variables when it is imported
    for name in os.environ:
        if _SETTINGS.fullmatch(name) and name not in _KEPT:
            del os.environ[name]
    port, home = _free_port(), tempfile.mkdtemp(prefix="hf-home-")
    os.environ.update(
        RELABEL_CACHE=f"{home}/relabel",  # not the one of the user
        RELABEL_TESTS_WORKER=worker,
        RELABEL_TESTS_HUB_PORT=str(port),
        HF_ENDPOINT=f"http://127.0.0.1:{port}",
        HF_HOME=home,
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        NO_PROXY="127.0.0.1,localhost",
        no_proxy="127.0.0.1,localhost",
    )


os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores, and sums depend on the number of threads
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a waiting thread, in tests with several, must not occupy a core
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if os.environ.get("RELABEL_TESTS_WORKER") != _worker:  # else this is a process that a test has started
    _set_environment(_worker)
