"""Ranges, resumed downloads, pauses, permanent errors, and redaction of secrets."""

import itertools
import logging
import pickle
import re
import traceback
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryFile
from types import SimpleNamespace

import fsspec
import pytest

import relabel_datasets as rd
from relabel_datasets.shards.manifest import Manifest
from relabel_datasets.storage import remote as remote_module
from relabel_datasets.storage import retries
from relabel_datasets.storage.remote import RemoteFiles
from relabel_datasets.storage.resolve import open_folder
from tests.fixtures import INDEX, MANIFEST, SHARDS, check_cache, contents, run_apart
from tests.servers import FaultyServer

pytestmark = pytest.mark.usefixtures("quick")


def ranges_of(server, name):
    """Return the (start, stop) of the requested ranges of a file, at its storage if that is another host."""
    gets = server.gets(name)
    hosts = {request.host for request in gets}
    matches = [
        re.fullmatch(r"bytes=(\d+)-(\d+)", request.range)
        for request in gets
        if len(hosts) == 1 or request.host.startswith("localhost")
    ]
    return [(int(match[1]), int(match[2]) + 1) for match in matches]


def chained(ranges, start, stop):
    """Return whether ranges cover start to stop without gaps or overlaps."""
    return [start, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), stop]


def download(remote, file, beginning=b""):
    with TemporaryFile() as data:
        data.write(beginning)
        RemoteFiles(remote.url, remote.options).download(f"colours/{file.name}", file.num_bytes, file.sha256, data)
        data.seek(0)
        return data.read()


def test_every_byte_is_read_once(tmp_path, remote, files):
    remote.load(tmp_path).download(progress=False)
    for file in files:
        ranges = ranges_of(remote.server, file.name)
        assert len(ranges) > 1 or file.name == INDEX
        assert chained(ranges, 0, file.num_bytes)


def test_only_the_range_that_failed_is_read_again(tmp_path, remote, files):
    remote.server.fail("drop", SHARDS[0], after=2)
    remote.load(tmp_path).download(progress=False)
    ranges = ranges_of(remote.server, SHARDS[0])
    assert ranges[2] == ranges[3]
    assert chained([*ranges[:2], *ranges[3:]], 0, files[0].num_bytes)


def test_an_interrupted_download_is_resumed(tmp_path, remote, files, expected, monkeypatch):
    monkeypatch.setattr(remote_module, "MAX_ATTEMPTS", 2)
    remote.server.fail("503", SHARDS[0], after=2, times=None)
    with pytest.raises(rd.DatasetError, match="503"):
        contents(remote.load(tmp_path))
    received = ranges_of(remote.server, SHARDS[0])[1][1]
    assert (tmp_path / "shards" / f"{files[0].sha256}.part").stat().st_size == received
    remote.server.reset()
    assert contents(remote.load(tmp_path)) == expected
    assert chained(ranges_of(remote.server, SHARDS[0]), received, files[0].num_bytes)
    assert not list((tmp_path / "shards").glob("*.part"))


def test_a_download_that_was_complete_when_killed_is_not_repeated(served_folder, remote, files):
    whole = (served_folder / "colours" / SHARDS[0]).read_bytes()
    assert download(remote, files[0], whole) == whole
    assert remote.server.requests == []


@pytest.mark.parametrize("beginning", [b"garbage", bytes(3000), bytes(1 << 20)], ids=["short", "zeros", "too long"])
def test_wrong_first_bytes_are_downloaded_again(served_folder, remote, files, beginning):
    whole = (served_folder / "colours" / SHARDS[0]).read_bytes()
    assert download(remote, files[0], beginning) == whole
    ranges = ranges_of(remote.server, SHARDS[0])
    restart = next(i for i, (start, _) in enumerate(ranges) if start == 0)
    assert chained(ranges[restart:], 0, files[0].num_bytes)


def test_a_server_that_ignores_ranges_gets_one_request_per_file(tmp_path, remote, expected):
    remote.server.fail("whole", "", times=None)
    assert contents(remote.load(tmp_path)) == expected
    assert [len(remote.server.gets(name)) for name in SHARDS] == [1, 1, 1]


def test_a_download_is_resumed_from_a_server_that_ignores_ranges(served_folder, remote, files):
    whole = (served_folder / "colours" / SHARDS[0]).read_bytes()
    remote.server.fail("whole", "", times=None)
    assert download(remote, files[0], whole[:3000]) == whole


def test_ranges_are_smaller_on_a_slow_connection(served_folder, remote, files, monkeypatch):
    whole = (served_folder / "colours" / SHARDS[0]).read_bytes()
    monkeypatch.setattr(remote_module, "STALL_S", 0.5)
    remote.server.fail("stall", SHARDS[0], times=None, longer_than=3000)
    assert download(remote, files[0], whole[:-4096]) == whole
    sizes = [stop - start for start, stop in ranges_of(remote.server, SHARDS[0])]
    assert sizes[:2] == [4096, 2048]


def assert_the_token_is_for_the_hub_only(server):
    for_storage = [request.host.startswith("localhost") for request in server.requests]
    assert any(for_storage)
    assert not all(for_storage)
    given = ["Bearer hf_of_a_user" if not stored else None for stored in for_storage]
    assert [request.authorization for request in server.requests] == given


def test_every_byte_is_read_once_from_the_hub(tmp_path, hub, files, expected):
    assert contents(hub.load(tmp_path)) == expected
    for file in files:
        assert chained(ranges_of(hub.server, file.name), 0, file.num_bytes)
    assert_the_token_is_for_the_hub_only(hub.server)


def test_a_name_on_the_hub_is_read_from_the_hub(tmp_path, hub, expected):
    options = {"cache_dir": tmp_path, "token": "hf_of_a_user"}
    dataset = rd.load_dataset("org/name", "colours", "train", revision="main", **options)
    assert contents(dataset) == expected
    assert_the_token_is_for_the_hub_only(hub.server)
    with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'dev'"):
        rd.load_dataset("org/name", "colours", "train", revision="dev", **options)


def test_files_that_are_published_later_are_found(hub):
    files = RemoteFiles(hub.url, hub.options)
    hub.server.commit("org/name", {"old.bin": b"short"})
    assert files.read_small("old.bin", len, 1 << 20) == b"short"
    with pytest.raises(FileNotFoundError, match=r"there is no new\.bin"):
        files.read_small("new.bin", len, 1 << 20)
    hub.server.commit("org/name", {"new.bin": b"new"})
    assert files.read_small("new.bin", len, 1 << 20) == b"new"
    hub.server.commit("org/name", {"old.bin": b"longer now"})
    assert b"".join(files._ranges("old.bin", 0, 10)) == b"longer now"


@pytest.fixture
def pauses(monkeypatch):
    """List of the pauses, which are skipped."""
    made = []
    for module in (remote_module, retries):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=made.append, monotonic=lambda: 0.0))
    return made


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("3600", 20.0), ("soon", 0.0), ("", 0.0)])
def test_retry_after_is_respected_up_to_a_limit(remote, files, pauses, monkeypatch, asked, waited):
    monkeypatch.setattr(remote_module, "LONGEST_PAUSE_S", 20.0)
    remote.server.fail("429", SHARDS[0], headers={"Retry-After": asked})
    download(remote, files[0])
    assert [max(pause, 1.0) for pause in pauses] == [max(waited, 1.0)]


def test_pauses_double_up_to_a_limit_with_jitter(remote, pauses, monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(remote_module, "LONGEST_PAUSE_S", 8.0)
    remote.server.fail("503", MANIFEST, times=None)
    with pytest.raises(rd.DatasetError, match=r"_info\.json cannot be read, 10 times in a row"):
        Manifest.read(open_folder(f"{remote.url}/colours", storage_options=remote.options))
    middle = [1, 2, 4, 8, 8, 8, 8, 8, 8]
    assert all(0.5 * usual <= pause <= 1.5 * usual for pause, usual in zip(pauses, middle, strict=True))
    assert len(set(pauses)) == len(pauses)


@pytest.mark.parametrize(("fault", "says"), [("500", "500"), ("drop", "not completed")])
def test_s3_requests_are_retried_by_this_package_only(s3, pauses, fault, says):
    s3.server.fail(fault, MANIFEST, times=None)
    with pytest.raises(rd.DatasetError, match=rf"10 times in a row.*{says}"):
        Manifest.read(open_folder(f"{s3.url}/colours", storage_options=s3.options))
    assert len(s3.server.gets(MANIFEST)) == 10


def test_users_may_set_the_retries_of_botocore(s3, pauses):
    options = {**s3.options, "config_kwargs": {"retries": {"max_attempts": 1}, "user_agent": "me"}}
    s3.server.fail("503", MANIFEST)
    Manifest.read(open_folder(f"{s3.url}/colours", storage_options=options))
    assert pauses == []
    assert options["config_kwargs"] == {"retries": {"max_attempts": 1}, "user_agent": "me"}


@pytest.mark.parametrize(
    ("status", "says"),
    [("401", "credentials are given and valid"), ("403", "credentials are given and valid"), ("404", "check the URL"),
     ("400", "400"), ("405", "405")],
)  # fmt: skip
def test_permanent_errors_are_not_retried(tmp_path, remote, pauses, status, says):
    remote.server.fail(status, SHARDS[0], times=None)
    with pytest.raises((rd.DatasetError, FileNotFoundError), match=says):
        contents(remote.load(tmp_path))
    assert len(remote.server.gets(SHARDS[0])) == 1
    assert pauses == []
    assert [path.suffix for path in (tmp_path / "shards").iterdir() if path.name != ".evict"] == [""]  # the index


def test_missing_credentials_are_an_error_without_retries(s3, pauses, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    options = {
        **s3.options,
        "client_kwargs": {"region_name": "us-west-1"},
    }  # a new file system: fsspec caches the one with credentials
    with pytest.raises(rd.DatasetError, match="credentials"):
        Manifest.read(open_folder(f"{s3.url}/colours", storage_options=options))
    assert pauses == []


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("nowhere://a/b", {}, "cannot open nowhere:// URLs"),
        ("s3://a/b", {"key": "a", "username": "b"}, "cannot open s3:// URLs"),
        ("http://127.0.0.1:1/", {"no_such_option": 1}, "no_such_option"),
        ("http://[/", {}, "cannot be read"),
    ],
)
def test_invalid_urls_and_options_are_an_error_without_retries(url, options, says, pauses):
    with pytest.raises(rd.DatasetError, match=says):
        Manifest.read(open_folder(url, storage_options=options))
    assert pauses == []


@pytest.mark.usefixtures("_no_user_credentials")
def test_an_unreachable_server_is_an_error_after_all_retries(pauses):
    with FaultyServer() as server:
        url = server.url
    with pytest.raises(rd.DatasetError, match=rf"{url}/_info\.json cannot be read, 10 times in a row: .*onnect"):
        Manifest.read(open_folder(url))
    assert len(pauses) == 9


@pytest.mark.usefixtures("_no_user_credentials")
def test_file_names_may_contain_any_character(tmp_path):
    name = "a b#c%20d?e=ü&f/x+y.bin"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"data")
    fsspec.filesystem("memory").pipe_file(f"/odd/{name}", b"data")
    with FaultyServer(tmp_path) as server:
        for url in (
            f"{server.url}/?signature=x%2Fy",
            f"{server.url}#here",
            f"local://{tmp_path}",
            "memory://odd",
            "memory:///odd",
        ):
            assert RemoteFiles(url, {}).read_small(name, len, 1 << 20) == b"data"


def test_threads_may_share_a_folder(remote, files, served_folder):
    folder = RemoteFiles(remote.url, remote.options)
    with ThreadPoolExecutor(8) as pool:
        read = list(
            pool.map(lambda name: folder.read_small(name, len, 1 << 20), [f"colours/{file.name}" for file in files] * 8)
        )
    assert read == [(served_folder / "colours" / file.name).read_bytes() for file in files] * 8


def test_a_folder_is_pickled_without_its_connections(remote):
    folder = open_folder(f"{remote.url}/colours", storage_options=remote.options)
    manifest = Manifest.read(folder)
    assert Manifest.read(pickle.loads(pickle.dumps(folder))) == manifest


def test_forked_children_do_not_close_the_connections_of_their_parent(http, files):
    """A child that frees its parent's file system would remove the parent's connections from the shared epoll."""
    done = run_apart(
        """
import gc, logging
logging.basicConfig(level=logging.WARNING)
url, name, num_bytes = arguments
remote.STALL_S = 20.0
files = remote.RemoteFiles(url, {})
def read():
    return sum(map(len, files._ranges(name, 0, num_bytes)))
lengths = [read()]
for _ in range(2):
    child = os.fork()
    if child == 0:
        length = read()
        gc.collect()
        os._exit(length != num_bytes)
    lengths.append(os.waitpid(child, 0)[1])
began = time.monotonic()
lengths.append(read())
print(json.dumps([lengths, time.monotonic() - began < remote.STALL_S]))
""",
        http.url,
        f"colours/{SHARDS[0]}",
        files[0].num_bytes,
    )
    assert done == [[files[0].num_bytes, 0, 0, files[0].num_bytes], True]


# Kinds of credentials: the text before the host, the text after the URL, and the options.

USER, PASSWORD, SIGNATURE, TOKEN = "a-user", "p%40ss-w%2Ford", "A%2BSIG%2Fna%3Dture", "TOKEN+of/mine=="
KINDS = {
    "user": (f"{USER}:{PASSWORD}@", "", {}),
    "query": ("", f"?X-Amz-Signature={SIGNATURE}&token={TOKEN}", {}),
    "headers": ("", "", {"headers": {"Authorization": f"Bearer {TOKEN}", "X-Key": SIGNATURE}}),
    "client": ("", "", {"client_kwargs": {"headers": {"Authorization": TOKEN, "Cookie": f"sid={SIGNATURE}"}}}),
    "s3": ("", "", {"key": USER, "secret": TOKEN, "token": SIGNATURE}),
}
SECRETS = (
    "p%40ss",
    "p@ss",
    "w/ord",
    "w%2Ford",
    "SIG%2F",
    "SIG/",
    "na%3D",
    "na=t",
    "TOKEN+",
    "TOKEN%2B",
    "of/mine",
    "a-user",
)


def assert_no_secret(*texts):
    for text, secret in itertools.product(texts, SECRETS):
        assert secret not in text, (secret, text)


def with_credentials(kind, http, s3):
    user, query, options = KINDS[kind]
    if kind == "s3":
        return s3.server, s3.url, {**s3.options, **options}
    return http.server, f"http://{user}{http.server.address}{query}", options


FAULTS = ("drop", "stall", "short", "flip", "page", "401", "403", "404", "429", "500", "redirect", "unreachable")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_in_an_error_or_a_log(tmp_path, http, s3, monkeypatch, caplog, kind, fault):
    server, url, options = with_credentials(kind, http, s3)
    monkeypatch.setattr(remote_module, "MAX_ATTEMPTS", 2)
    caplog.set_level(logging.DEBUG, "relabel_datasets")
    dataset = rd.load_dataset(url, "colours", "train", cache_dir=tmp_path, storage_options=options)
    if fault == "redirect":  # to a signed URL, as the Hub does
        server.fail("302", SHARDS[0], times=None, headers={"Location": f"/elsewhere?Signature={SIGNATURE}"})
        server.fail("403", "/elsewhere", times=None)
    elif fault == "unreachable":
        files = RemoteFiles(
            url.replace(server.address, "127.0.0.1:1"), {**options, "endpoint_url": "http://127.0.0.1:1"}
        )
        monkeypatch.setattr(
            dataset.label_maps.shards._folder,
            "_files",
            files if kind == "s3" else RemoteFiles(url.replace(server.address, "127.0.0.1:1"), options),
        )
    else:
        monkeypatch.setattr(remote_module, "STALL_S", 0.3 if fault == "stall" else 60.0)
        server.fail(fault, SHARDS[0], times=None)
    with pytest.raises((rd.DatasetError, FileNotFoundError)) as caught:
        contents(dataset)
    assert_no_secret(*traceback.format_exception(caught.value), str(caught.value), repr(caught.value))
    assert_no_secret(*(f"{record.getMessage()} {record.exc_text}" for record in caplog.records))
    for text in (repr(dataset), str(dataset), str(dataset.root), repr(dataset.label_maps.manifest)):
        assert_no_secret(text)
    assert_no_secret(*(path.name for path in tmp_path.rglob("*")))
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or not any(secret.encode() in path.read_bytes() for secret in SECRETS)


def test_secrets_are_hidden_in_every_encoding():
    files = RemoteFiles(
        f"http://{USER}:{PASSWORD}@host/a?sig={SIGNATURE}&t={TOKEN}", {"headers": {"X": "of another kind"}}
    )
    shown = "A%2BSIG%2Fna%3Dture A+SIG/na=ture A%2BSIG/na%3Dture p@ss-w/ord p%40ss-w/ord TOKEN%2Bof%2Fmine%3D%3D of another kind"
    assert set(files.redact(shown).split()) == {"***"}
    assert files.redact("see 's3://me:mine@b/c?d=e' and http://host/a.") == "see 's3://b/c' and http://host/a."


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_in_an_error_about_the_manifest(tmp_path, http, s3, monkeypatch, caplog, kind):
    server, url, options = with_credentials(kind, http, s3)
    monkeypatch.setattr(remote_module, "MAX_ATTEMPTS", 2)
    caplog.set_level(logging.DEBUG, "relabel_datasets")
    for name, fault in itertools.product(("colours", None), ("503", "403", "404", "short")):
        server.reset()
        server.fail(fault, MANIFEST, times=None)
        server.fail(fault, "README.md", times=None)
        with pytest.raises((rd.DatasetError, FileNotFoundError)) as caught:
            rd.load_dataset(url, name, "train", cache_dir=tmp_path, storage_options=options)
        assert_no_secret(*traceback.format_exception(caught.value), caplog.text)


def test_a_query_is_sent_with_each_request(tmp_path, http, expected):
    dataset = rd.load_dataset(
        f"{http.url}/?X-Amz-Signature=abc%2Fdef&token=ghi", "colours", "train", cache_dir=tmp_path
    )
    assert contents(dataset) == expected
    assert {request.query.replace("%2F", "/") for request in http.server.requests} == {
        "X-Amz-Signature=abc/def&token=ghi"
    }
    check_cache(tmp_path)


@pytest.mark.parametrize("kind", ["user", "headers", "client", "netrc", "s3"])
def test_credentials_reach_the_server(tmp_path, http, s3, monkeypatch, kind):
    if kind == "netrc":
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        # a new session: fsspec caches those of the other tests
        server, url, options = http.server, http.url, {"client_kwargs": {"headers": {"X-Test": "netrc"}}}
    else:
        server, url, options = with_credentials(kind, http, s3)
    rd.load_dataset(url, "colours", "train", cache_dir=tmp_path, storage_options=options).download(progress=False)
    given = {request.authorization for request in server.requests if request.method == "GET"}
    if kind == "s3":
        assert all(f"Credential={USER}/" in value for value in given)
    else:
        assert given == {
            {
                "user": "Basic YS11c2VyOnBAc3Mtdy9vcmQ=",  # a-user:p@ss-w/ord
                "netrc": "Basic bWU6bWluZQ==",  # me:mine
                "headers": f"Bearer {TOKEN}",
                "client": TOKEN,
            }[kind]
        }
