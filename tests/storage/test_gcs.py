"""Datasets on Google Cloud Storage, with the real gcsfs and an emulated server."""

import fsspec
import numpy as np
import pytest

import relabel_datasets as rd
from relabel_datasets.errors import DatasetError, RefusedError
from relabel_datasets.storage.remote import RemoteFiles
from tests.fixtures import MANIFEST, SHARDS, contents

core = pytest.importorskip("gcsfs.core")
emulator = pytest.importorskip("gcp_storage_emulator.server")
BUCKET = "bucket"
pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.filterwarnings("ignore::DeprecationWarning:gcsfs")]


@pytest.fixture(scope="module")
def gcs():
    """Options for an empty bucket, and its URL."""
    # The default class first asks for the kind of the bucket over gRPC, for a minute, which the emulator does not answer.
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, core.GCSFileSystem, clobber=True)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    options = {"token": "anon", "endpoint_url": "http://{}:{}".format(*server._api._httpd.server_address)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", options["endpoint_url"])
        yield f"gs://{BUCKET}", options
    server.stop()


@pytest.fixture
def uploaded(gcs, served_folder):
    url, options = gcs
    files = RemoteFiles(url, options)._file_system()
    for path in served_folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{BUCKET}/data/{path.relative_to(served_folder)}", path.read_bytes())
    return f"{url}/data", options


def test_a_dataset_is_read_and_streamed_from_a_bucket(uploaded, expected, tmp_path):
    url, options = uploaded
    dataset = rd.load_dataset(url, "colours", "train", storage_options=options, cache_dir=tmp_path)
    assert contents(dataset) == expected
    stream = rd.load_dataset(
        url, "colours", "train", storage_options=options, cache_dir=tmp_path, streaming=True, shuffle=False
    )
    assert [label_map.key for _, label_map in stream] == [key for key, *_ in expected]


def test_a_build_into_a_bucket_writes_the_files_of_a_local_build(gcs, image_folder, annotator, served_folder, tmp_path):
    url, options = gcs
    source = rd.data.ImageFolderSource(image_folder)
    for folder, storage_options in ((f"{url}/built", options), (tmp_path / "built", None)):
        rd.build(
            source, folder, annotator, config="colours", shard_size=5, storage_options=storage_options, progress=False
        )
    remote = rd.load_dataset(f"{url}/built", "colours", "train", storage_options=options, cache_dir=tmp_path / "cache")
    local = rd.load_dataset(tmp_path / "built", "colours", "train")
    assert contents(remote) == contents(local)
    assert remote.label_maps.manifest == local.label_maps.manifest
    np.testing.assert_array_equal(remote.targets, local.targets)


def test_what_is_missing_refused_too_large_or_empty_is_named(uploaded, monkeypatch):
    url, options = uploaded
    files = RemoteFiles(f"{url}/colours", options)
    with pytest.raises(FileNotFoundError, match=r"there is no other\.json in gs://bucket/data/colours"):
        files.read_small("other.json", len, 100)
    with pytest.raises(DatasetError, match=f"{MANIFEST} cannot be read: it has more than 100 bytes"):
        files.read_small(MANIFEST, len, 100)
    files._file_system().pipe_file(f"{BUCKET}/data/colours/empty", b"")
    assert files.read_small("empty", len, 100) == b""

    async def forbidden(*args, **kwargs):
        raise OSError(f"Forbidden: {SHARDS[0]}\nno access")  # as gcsfs does for 403; the emulator allows everything

    monkeypatch.setattr(files._file_system(), "_cat_file", forbidden)
    with pytest.raises(RefusedError, match="check the URL, and that credentials are given and valid"):
        files.read_small(SHARDS[0], len, 100)
