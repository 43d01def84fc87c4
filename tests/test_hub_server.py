"""The local Hub serves the real client like the Hub: repositories, commits, storage, access, faults."""

import hashlib
import http.client
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.versions import needs

try:
    from huggingface_hub.errors import RemoteEntryNotFoundError
except ImportError:  # before huggingface_hub 1.0, see below
    RemoteEntryNotFoundError = HfHubHTTPError

pytestmark = needs("huggingface_hub", 2, 0)  # earlier clients ask for less, and retry less

REPO = "org/name"
CARD = b"---\nlicense: mit\ntags: [labels]\n---\n# A dataset\n"
SHARD = bytes(range(256)) * 9


@pytest.fixture
def api(local_hub) -> HfApi:
    """The client of a member of `org`."""
    return HfApi(token="hf_of_a_user")


@pytest.fixture
def other(local_hub) -> HfApi:
    """The client of a user outside `org`."""
    return HfApi(token="hf_of_another")


@pytest.fixture
def nobody(local_hub) -> HfApi:
    """A client without a token."""
    return HfApi(token=False)


@pytest.fixture
def head(local_hub) -> str:
    """The head commit of a repository with a card and two shards."""
    local_hub.create(REPO)
    return local_hub.commit(
        REPO, {"README.md": CARD, "a/x.tar": SHARD, "a/b/y.tar": SHARD[1:], "a/b/_info.json": b"{}"}
    ).oid


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations, **options) -> str:
    return api.create_commit(REPO, operations, commit_message="a test", repo_type="dataset", **options).oid


def paths(api: HfApi, **options) -> list[str]:
    return [entry.path for entry in api.list_repo_tree(REPO, repo_type="dataset", **options)]


# Accounts and repositories


def test_tokens_identify_users(api):
    me = api.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("user", ["org"])
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_of_nobody").whoami()


def test_a_repository_is_created_once_and_deleted(api, local_hub):
    url = api.create_repo(REPO, repo_type="dataset")
    assert (url.repo_id, url.repo_type, str(url)) == (REPO, "dataset", f"{local_hub.url}/datasets/{REPO}")
    assert api.create_repo(REPO, repo_type="dataset", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO, repo_type="dataset")
    assert paths(api) == [".gitattributes"]
    api.delete_repo(REPO, repo_type="dataset")
    assert not api.repo_exists(REPO, repo_type="dataset")
    assert api.create_repo("mine", repo_type="dataset").repo_id == "user/mine"


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_of_nobody", 401), ("hf_of_another", 403), ("r", 403)])
def test_only_members_can_write(local_hub, head, token, status):
    local_hub.users["r"] = "user"
    local_hub.read_tokens.add("r")
    api = HfApi(token=token)
    for write in (
        lambda: api.create_repo("org/new", repo_type="dataset"),
        lambda: api.create_tag(REPO, tag="v1", repo_type="dataset"),
        lambda: api.update_repo_settings(REPO, private=True, repo_type="dataset"),
        lambda: commit(api, add("a.txt", b"a")),
    ):
        with pytest.raises(HfHubHTTPError, match=str(status)):
            write()
    assert local_hub.repos[REPO].head.oid == head


def test_a_private_repository_is_hidden_from_others(api, other, nobody, head):
    api.update_repo_settings(REPO, private=True, repo_type="dataset")
    assert api.dataset_info(REPO).private
    for client, status in ((other, "404"), (nobody, "401")):
        with pytest.raises(RepositoryNotFoundError, match=status):
            client.dataset_info(REPO)
        with pytest.raises(RepositoryNotFoundError, match=status):
            client.hf_hub_download(REPO, "README.md", repo_type="dataset")
        with pytest.raises(RepositoryNotFoundError, match=status):
            client.dataset_info("org/none")
    api.update_repo_settings(REPO, visibility="public", repo_type="dataset")
    assert nobody.dataset_info(REPO).private is False


def test_a_gated_repository_can_be_listed_but_not_read(api, other, nobody, local_hub, head):
    api.update_repo_settings(REPO, gated="auto", repo_type="dataset")
    api.auth_check(REPO, repo_type="dataset", write=True)
    for client, status in ((other, 403), (nobody, 401)):
        with pytest.raises(GatedRepoError):
            client.auth_check(REPO, repo_type="dataset")
        assert client.dataset_info(REPO).gated == "auto"
        assert "a/x.tar" in paths(client, recursive=True)
        with pytest.raises(GatedRepoError) as caught:
            client.hf_hub_download(REPO, "a/x.tar", repo_type="dataset")
        assert caught.value.response.status_code == status
    local_hub.repos[REPO].granted.add("another")
    for client in (api, other):
        client.hf_hub_download(REPO, "a/x.tar", repo_type="dataset")


def test_repository_info(api, head):
    info = api.repo_info(REPO, repo_type="dataset", files_metadata=True)
    assert (info.sha, info.private, info.gated, info.author) == (head, False, False, "org")
    assert info.tags == ["labels", "license:mit"]
    assert info.card_data.license == "mit"
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs and sibling.lfs.sha256) for sibling in info.siblings}
    assert sizes["README.md"] == (len(CARD), None)
    assert sizes["a/x.tar"] == (len(SHARD), hashlib.sha256(SHARD).hexdigest())
    assert api.dataset_info(REPO, expand=["sha"]).siblings is None
    assert api.repo_info(REPO, repo_type="dataset", revision=head).sha == head
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, repo_type="dataset", revision="v1")


# Commits


def test_files_can_be_uploaded_before_the_commit(api, local_hub, tmp_path):
    api.create_repo(REPO, repo_type="dataset")
    (tmp_path / "x.tar").write_bytes(SHARD)
    operations = [
        CommitOperationAdd("a/x.tar", tmp_path / "x.tar"),
        add("a/y.tar", SHARD[1:]),
        add("_info.json", b"{}"),
    ]
    api.preupload_lfs_files(REPO, operations, repo_type="dataset")
    assert len(local_hub.uploads) == len(local_hub.objects) == 2
    assert paths(api) == [".gitattributes"]
    oid = commit(api, *operations, add("README.md", CARD))
    assert local_hub.files(REPO, oid) == {
        ".gitattributes": local_hub.files(REPO)[".gitattributes"],
        "README.md": CARD,
        "_info.json": b"{}",
        "a/x.tar": SHARD,
        "a/y.tar": SHARD[1:],
    }
    assert len(local_hub.uploads) == len(local_hub.asked("PUT")) == 2
    assert {request.num_bytes for request in local_hub.asked("PUT")} == {len(SHARD), len(SHARD) - 1}
    assert len(local_hub.asked("POST", "/verify")) == 2
    assert api.list_repo_commits(REPO, repo_type="dataset")[0].commit_id == oid
    assert local_hub.leaks == []


def test_existing_objects_are_not_uploaded_again(api, local_hub, head):
    assert commit(api, add("a/x.tar", SHARD), add("README.md", CARD)) == head  # the client sends no empty commit
    commit(api, add("z.tar", SHARD))
    assert local_hub.uploads == []
    assert local_hub.files(REPO)["z.tar"] == SHARD


def test_commits_delete_and_copy(api, local_hub, head):
    commit(api, CommitOperationDelete("a/b/", is_folder=True), CommitOperationDelete("README.md"))
    assert set(local_hub.files(REPO)) == {".gitattributes", "a/x.tar"}
    commit(api, CommitOperationCopy("a/x.tar", "c/x.tar"))
    assert local_hub.files(REPO)["c/x.tar"] == SHARD
    for deletion in (CommitOperationDelete("a"), CommitOperationDelete("none/"), CommitOperationDelete("a/x.tar/")):
        with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
            commit(api, deletion, add("a.txt", b"a"))
    assert "a.txt" not in local_hub.files(REPO)
    assert len(local_hub.repos[REPO].commits) == 4


def test_a_commit_on_an_outdated_parent_fails(api, local_hub, head):
    newer = local_hub.commit(REPO, {"b.txt": b"b"}).oid
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("a.txt", b"a"), parent_commit=head)
    commit(api, add("a.txt", b"a"), parent_commit=newer)
    with pytest.raises(RevisionNotFoundError):
        commit(api, add("a.txt", b"a"), revision="dev")


@pytest.mark.parametrize(
    "line",
    [
        {"key": "lfsFile", "value": {"path": "x.tar", "algo": "sha256", "oid": "0" * 64, "size": 1}},
        {"key": "file", "value": {"path": "../x", "content": "", "encoding": "base64"}},
        {"key": "file", "value": {"path": "x", "content": "?", "encoding": "base64"}},
        {"key": "file", "value": {"path": "README.md", "content": "LS0tCmE6IFsKLS0tCg==", "encoding": "base64"}},
        {"key": "other", "value": {"path": "x"}},
        {},
    ],
)
def test_invalid_commits_change_nothing(local_hub, head, line):
    lines = [{"key": "header", "value": {"summary": "bad"}}, line]
    request = urllib.request.Request(
        f"{local_hub.url}/api/datasets/{REPO}/commit/main",
        data=b"".join(json.dumps(content).encode() + b"\n" for content in lines),
        headers={"Authorization": "Bearer hf_of_a_user"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert local_hub.repos[REPO].head.oid == head


def test_card_metadata_is_validated(api, local_hub, head):
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api, add("README.md", b"---\na: [\n---\n"))
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(api, add("README.md", b"# No metadata\n"))


def test_large_files_use_lfs_regardless_of_their_names(api, local_hub, head):
    large = add("large.txt", bytes(10 << 20) + b"1")
    commit(api, large, add("empty.tar", b""))
    lfs = {
        entry.path: entry.lfs is not None
        for entry in api.get_paths_info(REPO, ["large.txt", "empty.tar"], repo_type="dataset")
    }
    assert lfs == {"large.txt": True, "empty.tar": False}


def test_folders_and_files_can_be_uploaded(api, local_hub, head, tmp_path):
    (tmp_path / "folder" / "d").mkdir(parents=True)
    (tmp_path / "folder" / "d" / "z.tar").write_bytes(SHARD)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "folder", repo_type="dataset", delete_patterns="a/**")
    assert set(local_hub.files(REPO)) == {".gitattributes", "README.md", "d/z.tar"}
    api.upload_file(repo_id=REPO, path_or_fileobj=io.BytesIO(b"x"), path_in_repo="x.txt", repo_type="dataset")
    assert local_hub.files(REPO)["x.txt"] == b"x"


# Trees, branches and tags


@pytest.mark.parametrize("page_size", [1, 2, 1000])
def test_trees_are_listed_in_pages(api, local_hub, head, page_size):
    local_hub.page_size = page_size
    assert paths(api) == [".gitattributes", "README.md", "a"]
    all_paths = [".gitattributes", "README.md", "a", "a/b", "a/b/_info.json", "a/b/y.tar", "a/x.tar"]
    assert paths(api, recursive=True) == all_paths
    assert paths(api, path_in_repo="a/b") == ["a/b/_info.json", "a/b/y.tar"]
    shard = next(
        entry for entry in api.list_repo_tree(REPO, "a", repo_type="dataset", expand=True) if entry.path == "a/x.tar"
    )
    assert (shard.size, shard.lfs.sha256) == (len(SHARD), hashlib.sha256(SHARD).hexdigest())
    assert shard.last_commit.oid == head
    with pytest.raises(RemoteEntryNotFoundError):
        paths(api, path_in_repo="none")


def test_paths_info_skips_missing_paths(api, head):
    entries = api.get_paths_info(REPO, ["a", "README.md", "none"], repo_type="dataset", expand=True)
    assert [entry.path for entry in entries] == ["a", "README.md"]
    assert entries[1].blob_id == hashlib.sha1(b"blob %d\0" % len(CARD) + CARD).hexdigest()


def test_revisions_are_commits_branches_and_tags(api, head):
    api.create_tag(REPO, tag="v1", repo_type="dataset")
    api.create_branch(REPO, branch="a/branch", repo_type="dataset", revision="v1")
    on_branch = commit(api, add("b.txt", b"b"), revision="a/branch")
    refs = api.list_repo_refs(REPO, repo_type="dataset")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": head, "a/branch": on_branch}
    assert {(ref.ref, ref.target_commit) for ref in refs.tags} == {("refs/tags/v1", head)}
    for revision, has_it in (("main", False), ("v1", False), (head, False), ("a/branch", True), (on_branch, True)):
        assert ("b.txt" in paths(api, revision=revision)) == has_it
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1", repo_type="dataset")
    api.create_tag(REPO, tag="v1", repo_type="dataset", exist_ok=True)
    api.create_branch(REPO, branch="a/branch", repo_type="dataset", exist_ok=True)
    api.delete_tag(REPO, tag="v1", repo_type="dataset")
    api.delete_branch(REPO, branch="a/branch", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        paths(api, revision="v1")


# Reading


def test_files_are_downloaded_through_a_second_host(api, local_hub, head):
    for path, content in (("a/x.tar", SHARD), ("README.md", CARD)):
        local = hf_hub_download(REPO, path, repo_type="dataset", token="hf_of_a_user")
        assert Path(local).read_bytes() == content
        assert head in local
    hosts = [request.host.partition(":")[0] for request in local_hub.gets("a/x.tar")]
    assert hosts[-1] == "localhost"
    assert local_hub.leaks == []
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "none.tar", repo_type="dataset")


def test_a_snapshot_is_available_offline(api, local_hub, head, monkeypatch):
    folder = snapshot_download(REPO, repo_type="dataset", allow_patterns="a/*")
    local_hub.reset()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert snapshot_download(REPO, repo_type="dataset", allow_patterns="a/*") == folder
    assert Path(hf_hub_download(REPO, "a/x.tar", repo_type="dataset")).read_bytes() == SHARD
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "README.md", repo_type="dataset")
    assert local_hub.requests == []


def test_the_file_system_reads_ranges(local_hub, head):
    files = HfFileSystem(token="hf_of_a_user")
    assert files.ls(f"datasets/{REPO}/a", detail=False) == [f"datasets/{REPO}/a/b", f"datasets/{REPO}/a/x.tar"]
    for path, content in (("a/x.tar", SHARD), ("README.md", CARD)):
        assert files.cat_file(f"datasets/{REPO}@{head}/{path}") == content
        with files.open(f"datasets/{REPO}/{path}", block_size=100) as file:
            file.seek(10)
            assert file.read(7) == content[10:17]
    assert local_hub.leaks == []


def test_datasets_can_be_pushed_and_loaded(api, local_hub, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3]})
    rows.push_to_hub("org/rows", token="hf_of_a_user", private=True)
    loaded = datasets.load_dataset("org/rows", split="train", token="hf_of_a_user")
    assert loaded["x"][:] == [1, 2, 3]
    stream = datasets.load_dataset("org/rows", split="train", token="hf_of_a_user", streaming=True)
    assert [row["x"] for row in stream] == [1, 2, 3]
    assert local_hub.leaks == []


# Storage and faults


def status_of(method: str, url: str, data: bytes | None = None, **headers) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_storage_accepts_only_signed_and_complete_uploads(local_hub, head):
    sha256 = hashlib.sha256(b"new").hexdigest()
    actions = local_hub._instruction(REPO, sha256, 3)["actions"]
    url = actions["upload"]["href"]
    for unsigned in (url.partition("?")[0], url.replace("size=3", "size=4"), url.replace("Signature=", "Signature=0")):
        assert status_of("PUT", unsigned, b"new") == 403
    assert status_of("PUT", url, b"ne") == status_of("PUT", url, b"old") == 400
    assert status_of("PUT", url.replace("localhost", "127.0.0.1"), b"new") == 404
    assert local_hub.leaks == local_hub.uploads == []
    assert status_of("PUT", url, b"new", Authorization="Bearer hf_of_a_user") == 400
    assert len(local_hub.leaks) == 1
    assert status_of("PUT", url, b"new") == 200
    assert local_hub.objects[sha256] == b"new"


@pytest.mark.parametrize("fault", ["drop", "reset", "503", "429", "lost"])
def test_an_upload_is_retried(api, local_hub, head, impatient, fault):
    local_hub.fail(fault, "", method="PUT", headers={"Retry-After": "0"})
    content = bytes(1 << 20) + b"new"
    commit(api, add("new.tar", content))
    assert local_hub.files(REPO)["new.tar"] == content
    assert len(local_hub.asked("PUT")) == 2
    assert len(local_hub.uploads) == 1 + (fault == "lost")
    is_complete = local_hub.asked("PUT")[0].num_bytes == len(content)
    assert is_complete == (fault not in ("drop", "reset"))


def test_a_commit_with_a_lost_response_is_applied(api, local_hub, head):
    local_hub.fail("lost", "/commit/main", method="POST")
    with pytest.raises(Exception, match="disconnected"):
        commit(api, add("b.txt", b"b"), parent_commit=head)
    assert local_hub.files(REPO)["b.txt"] == b"b"
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("c.txt", b"c"), parent_commit=head)


@pytest.mark.parametrize(("fault", "error"), [("503", HfHubHTTPError), ("400", BadRequestError), ("page", ValueError)])
def test_a_failed_commit_changes_nothing(api, local_hub, head, fault, error):
    local_hub.fail(fault, "/commit/main", method="POST")
    with pytest.raises(error):
        commit(api, add("b.txt", b"b"))
    assert local_hub.repos[REPO].head.oid == head


@pytest.mark.parametrize("method", ["GET", "HEAD", None])
def test_a_fault_applies_to_one_method_or_to_all(local_hub, head, method):
    url = f"{local_hub.url}/datasets/{REPO}/resolve/main/README.md"
    local_hub.fail("429", "/README.md", method=method, times=2, after=1)
    used = {"GET": "GET", "HEAD": "HEAD", None: "POST"}[method]
    normal = status_of(used, url)
    assert [status_of(used, url) for _ in range(3)] == [429, 429, normal]
    local_hub.fail("lost", "/README.md", method=method)
    with pytest.raises(http.client.RemoteDisconnected):
        status_of(used, url)
    assert status_of("HEAD", url) == status_of("GET", url) == 200


def test_a_callback_can_run_before_each_request(api, local_hub, head):
    def change(request):
        if request.path.endswith("/commit/main"):
            local_hub.commit(REPO, {"other.txt": b"other"})

    local_hub.before = change
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("b.txt", b"b"), parent_commit=head)


@pytest.mark.parametrize("fault", ["drop", "reset", "flip", "short", "503"])
def test_the_client_handles_each_fault_of_a_download(api, local_hub, head, impatient, fault):
    def read():
        return Path(hf_hub_download(REPO, "a/x.tar", repo_type="dataset")).read_bytes()

    local_hub.fail(fault, "a/x.tar")
    if fault in ("drop", "flip"):  # the client does not check the sha256
        assert (read() == SHARD) == (fault == "drop")
    else:
        with pytest.raises(Exception, match=r"reset by peer|Consistency check failed|503"):
            read()
        assert read() == SHARD
    assert local_hub.leaks == []


def test_commit_ids_are_reproducible(local_hub, head):
    assert head == local_hub.commit(REPO, {}).parent
    local_hub.create(REPO)
    assert (
        head
        == local_hub.commit(
            REPO, {"README.md": CARD, "a/x.tar": SHARD, "a/b/y.tar": SHARD[1:], "a/b/_info.json": b"{}"}
        ).oid
    )
