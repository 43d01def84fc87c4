"""Fixtures and helpers for tests of remote reading: one dataset behind faulty servers, and its expected content."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

import relabel_datasets as rd
from relabel_datasets.storage import remote as remote_module
from tests.conftest import ROOT
from tests.servers import FaultyServer, s3_server

INDEX, MANIFEST = "train.index.safetensors", "_info.json"
SHARDS = tuple(f"train-{i:05d}-of-00003.tar" for i in range(3))
BUCKET = "bucket"
_APART_S = 200  # for programs that take a few seconds


@pytest.fixture(scope="session")
def served_folder(made_once) -> Path:
    """Dataset of `dataset_folder`. Tests must not change it."""
    return made_once / "dataset"


def contents(dataset: rd.RelabelDataset) -> list[tuple[str, int, bytes, bytes]]:
    """Return (key, label, bytes of the image, bytes of the label map) of all samples."""
    label_maps = dataset.label_maps
    return [
        (
            key,
            int(dataset.targets[row]),
            label_maps.image_bytes(row),
            label_maps.shards.read(row, label_maps.index.extent(row, "map"), f"{key}.safetensors"),
        )
        for row, key in enumerate(dataset.keys)
    ]


@pytest.fixture(scope="session")
def expected(served_folder) -> list[tuple[str, int, bytes, bytes]]:
    """Result of `contents` for the local folder."""
    return contents(rd.load_dataset(served_folder, "colours", "train"))


class File(NamedTuple):
    """File of the manifest."""

    name: str
    num_bytes: int
    sha256: str


@pytest.fixture(scope="session")
def files(served_folder) -> list[File]:
    """Shards of the config with images, followed by its index."""
    split = json.loads((served_folder / "colours" / MANIFEST).read_bytes())["splits"]["train"]
    shards = map(File, split["filenames"], split["shard_bytes"], split["shard_sha256"])
    return [*shards, File(split["index"], split["index_bytes"], split["index_sha256"])]


class Remote(NamedTuple):
    """A dataset behind a faulty server."""

    server: FaultyServer
    url: str
    options: dict[str, object]

    def load(self, cache: Path, **arguments: object) -> rd.RelabelDataset:
        return rd.load_dataset(
            self.url,
            **{"name": "colours", "split": "train", "cache_dir": cache, "storage_options": self.options, **arguments},
        )


@pytest.fixture(scope="session")
def _no_user_credentials():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "NETRC"):
            patch.setenv(name, "/dev/null")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def _http(served_folder, _no_user_credentials):
    with FaultyServer(served_folder) as server:
        yield Remote(server, server.url, {})


@pytest.fixture(scope="session")
def _s3(served_folder, _no_user_credentials):
    with s3_server(served_folder, BUCKET) as address, FaultyServer(upstream=address) as server:
        options = {"endpoint_url": server.url, "client_kwargs": {"region_name": "us-east-1"}}
        # creating a botocore client is slow; fsspec caches it, so that no test takes it for a stall
        remote_module.RemoteFiles(f"s3://{BUCKET}", options).read_small("README.md", len, 1 << 20)
        yield Remote(server, f"s3://{BUCKET}", options)


@pytest.fixture
def http(_http) -> Remote:
    """The dataset over HTTP."""
    _http.server.reset()
    return _http


@pytest.fixture
def s3(_s3) -> Remote:
    """The dataset on S3."""
    _s3.server.reset()
    return _s3


@pytest.fixture
def hub(served_folder, local_hub, impatient) -> Remote:
    """The dataset on the Hub, in a private repository. The retries of the Hub's client take no time."""
    local_hub.publish("org/name", served_folder)
    local_hub.repos["org/name"].private = True
    return Remote(local_hub, "hf://datasets/org/name@main", {"endpoint": local_hub.url, "token": "hf_of_a_user"})


@pytest.fixture(params=["http", "s3"])
def remote(request) -> Remote:
    """The dataset over each protocol."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def quick(monkeypatch):
    """Set several ranges per shard, and short pauses."""
    for name, value in {
        "FIRST_PAUSE_S": 0.01,
        "LONGEST_PAUSE_S": 0.05,
        "STALL_S": 60.0,
        "RANGE_BYTES": 8192,
        "SMALLEST_RANGE_BYTES": 512,
    }.items():
        monkeypatch.setattr(remote_module, name, value)


def check_cache(folder: Path) -> None:
    """Assert that the name of every complete file in a cache is its SHA-256."""
    for path in (folder / "shards").iterdir():
        if path.suffix != ".part" and not path.name.startswith("."):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def run_apart(code: str, *arguments: object) -> dict[str, object]:
    """Run a program in another process, which may fork since it has no threads, and return the JSON that it prints.

    Args:
        code: Program to run. `cache`, `folders`, `remote` and `resolve` are imported without importing torch.
        arguments: Values of the program's `arguments`, passed as JSON.
    """
    head = f"""
import json, os, random, signal, sys, threading, time, types
signal.alarm({_APART_S})  # even if the parent is killed
package = types.ModuleType("relabel_datasets")
package.__path__ = [{str(ROOT / "relabel_datasets")!r}]
sys.modules["relabel_datasets"] = package
from relabel_datasets.storage import cache, folders, remote, resolve
arguments = [json.loads(argument) for argument in sys.argv[1:]]
"""
    process = subprocess.Popen(
        [sys.executable, "-c", head + code, *(json.dumps(argument, default=str) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=_APART_S + 10)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # including its children
        process.wait()
        raise
    assert process.returncode == 0, errors
    return json.loads(output)
