"""A server cannot make a reader take more bytes than a file may have."""

import gzip
import io
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import relabel_datasets as rd
from relabel_datasets.errors import DatasetError
from relabel_datasets.storage import folders
from relabel_datasets.storage.remote import RemoteFiles
from tests.fixtures import MANIFEST, SHARDS

LIMIT = 1 << 16
ENDLESS = ("without a length", "with a large length", "compressed")


class Endless(BaseHTTPRequestHandler):
    """Sends zeros until the client goes away."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        kind = self.server.kind
        self.server.ranges.append(self.headers["Range"])
        self.send_response(200)
        if kind == "with a large length":
            self.send_header("Content-Length", str(1 << 50))
        elif kind == "compressed":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Connection", "close")
        self.end_headers()
        part = gzip.compress(bytes(1 << 24)) if kind == "compressed" else bytes(1 << 16)
        with suppress(ConnectionError):
            while True:
                self.server.num_sent += self.wfile.write(part)

    def log_message(self, *args):
        pass


@pytest.fixture(params=ENDLESS)
def endless(request):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.kind, server.num_sent, server.ranges = request.param, 0, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/data"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def assert_little_was_read(server):
    """Sockets buffer a few MB. A request that was repeated would be sent again."""
    assert server.num_sent < 32 << 20
    assert len(server.ranges) == 1


@pytest.mark.parametrize("limit", ["MAX_SMALL_BYTES", "MAX_CARD_BYTES"])
def test_an_endless_manifest_or_card_is_refused_at_its_limit(endless, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, limit, LIMIT)
    folder = rd.storage.open_folder(endless.url, cache_dir=tmp_path)
    with pytest.raises(DatasetError, match=rf"/data/.* cannot be read: it has more than {LIMIT} bytes, the limit"):
        folder.card() if limit == "MAX_CARD_BYTES" else folder.configs()
    assert_little_was_read(endless)


def test_an_endless_answer_to_a_range_is_refused_at_the_size_in_the_manifest(endless):
    with pytest.raises(DatasetError, match=f"shard.tar cannot be read: it has more than {LIMIT} bytes"):
        RemoteFiles(endless.url, {}).download("shard.tar", LIMIT, "0" * 64, io.BytesIO())
    assert_little_was_read(endless)
    assert endless.ranges == [f"bytes=0-{LIMIT - 1}"]


@pytest.mark.parametrize("name", [MANIFEST, SHARDS[0]])
def test_a_small_file_of_every_protocol_has_a_limit_and_may_be_just_as_large(name, remote, served_folder):
    data = (served_folder / "colours" / name).read_bytes()
    files = RemoteFiles(f"{remote.url}/colours", remote.options)
    assert files.read_small(name, len, len(data)) == data
    with pytest.raises(DatasetError, match=f"more than {len(data) - 1} bytes"):
        files.read_small(name, len, len(data) - 1)
