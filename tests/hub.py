"""A Hugging Face Hub on 127.0.0.1 for tests: dataset repositories, their storage, accounts, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.hub_repo import Commit, File, Refused, Repo, apply, is_large, metadata
from tests.servers import Answer, FaultyServer, Request, in_range

NO_CREDENTIALS = "Invalid username or password."
_SECRET = "of the storage"
_REPO = "([^/]+/[^/]+)"
_API = f"/api/datasets/{_REPO}"
_LFS = f"/datasets/{_REPO}\\.git/info/lfs/objects"
_STORED = "/lfs/([0-9a-f]{64})"


@dataclass
class Call:
    """A request to the Hub, and who asks."""

    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: str | None

    @property
    def token(self) -> str | None:
        return self.headers["authorization"].removeprefix("Bearer ") if "authorization" in self.headers else None

    def json(self) -> dict[str, Any]:
        content = json.loads(self.body or b"{}")
        if not isinstance(content, dict):
            raise TypeError("not a JSON object")
        return content

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


_Route = Callable[..., Answer]
_ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], _Route]] = []


def _route(methods: str, pattern: str) -> Callable[[_Route], _Route]:
    """Let a method of the hub answer requests of paths; it gets the unquoted groups of the pattern."""

    def register(function: _Route) -> _Route:
        _ROUTES.append((tuple(methods.split()), re.compile(pattern), function))
        return function

    return register


@dataclass(repr=False)  # pytest shows it, and it may hold a lot
class LocalHub(FaultyServer):
    """A Hub with dataset repositories in memory, started with `with`.

    Its storage of LFS objects has another host name, as on the Hub: the client follows redirects within a host itself, and
    would miss what the redirect says of the file.

    Args:
        users: names by access tokens.
        members: for each user, the namespaces besides the own one that may be written to.
        read_tokens: those of the tokens that may not write.
        page_size: of listings.

    Attributes:
        repos: by `namespace/name`.
        objects: LFS objects by sha256, also those that no commit names.
        uploads: sha256 of all objects whose content was received, in this order.
        leaks: requests to the storage that had an access token of the Hub.
    """

    users: dict[str, str] = field(default_factory=lambda: {"hf_of_a_user": "user", "hf_of_another": "another"})
    members: dict[str, set[str]] = field(default_factory=lambda: {"user": {"org"}})
    read_tokens: set[str] = field(default_factory=set)
    page_size: int = 1000
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    leaks: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state = threading.RLock()  # one request after the other: commits are atomic

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.url.rpartition(':')[2]}"

    # What a test may do without a client

    def create(self, name: str, *, private: bool = False, gated: str | bool = False) -> Repo:
        """Make a repository."""
        with self._state:
            self.repos[name] = Repo(name, name.split("/")[0], private, gated)
            return self.repos[name]

    def commit(self, name: str, files: Mapping[str, bytes | None], *, branch: str = "main") -> Commit:
        """Add, replace or delete (None) files behind the back of all clients."""
        with self._state:
            repo = self.repos[name]
            kept = dict(repo.tip(branch, None).files)
            for path, content in files.items():
                kept.pop(path, None)
                if content is not None:
                    kept[path] = self._file(path, content)
            return repo.commit(branch, kept, "behind the back", author="somebody")

    def publish(self, name: str, folder: Path) -> Commit:
        """Make a repository of the files of a folder."""
        self.create(name)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return self.commit(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return the contents of all files of a repository, by path."""
        with self._state:
            return {path: file.content for path, file in self.repos[name].resolve(revision).files.items()}

    def _file(self, path: str, content: bytes) -> File:
        if not is_large(path, len(content)):
            return File(content)
        sha256 = hashlib.sha256(content).hexdigest()
        return File(self.objects.setdefault(sha256, content), sha256)

    # Requests

    def note(self, request: Request) -> None:
        super().note(request)
        if request.host.startswith("localhost") and request.authorization is not None:
            self.leaks.append(request)

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(target)
        try:
            with self._state:
                for methods, pattern, function in _ROUTES:
                    match = pattern.fullmatch(url.path)
                    if match is None or method not in methods:
                        continue
                    if url.path.startswith("/lfs/") != headers.get("host", "").startswith("localhost"):
                        break  # that is the other of the two hosts
                    call = Call(url.path, parse_qs(url.query, keep_blank_values=True), headers, body, None)
                    if not url.path.startswith("/lfs/"):
                        call.user = self._user(call.token)
                    return function(self, call, *(unquote(group or "") for group in match.groups()))
                raise Refused("Sorry, we can't find the page you are looking for.", status=404)
        except Refused as refused:
            return _json({"error": refused.message, **refused.details}, refused.status, _said(refused))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return _json({"error": f"malformed request: {error!r}"}, 400)

    def _user(self, token: str | None) -> str | None:
        if token is not None and token not in self.users:
            raise Refused("Invalid credentials in Authorization header", status=401)
        return None if token is None else self.users[token]

    def _is_member(self, user: str | None, namespace: str) -> bool:
        return user is not None and namespace in {user, *self.members.get(user, ())}

    def _check_writer(self, call: Call, namespace: str) -> None:
        if call.user is None:
            raise Refused(NO_CREDENTIALS, status=401)
        if not self._is_member(call.user, namespace):
            message = f"You don't have the rights to write to the namespace {namespace!r}"
            raise Refused(message, status=403)
        if call.token in self.read_tokens:
            raise Refused("Forbidden: you must use a write token.", status=403)

    def _seen(self, call: Call, name: str) -> Repo:
        """Return a repository, if there is one that the user may see."""
        repo = self.repos.get(name)
        if repo is not None and (not repo.private or self._is_member(call.user, name.split("/")[0])):
            return repo
        if call.user is None:
            raise Refused(NO_CREDENTIALS, "RepoNotFound", 401)
        raise Refused("Repository not found", "RepoNotFound")

    def _written(self, call: Call, name: str) -> Repo:
        """Return a repository that the user may write to."""
        repo = self._seen(call, name)
        if call.user is None:  # over https, the client takes each 401 for a repository that is not found
            raise Refused(NO_CREDENTIALS, "RepoNotFound", 401)
        self._check_writer(call, name.split("/")[0])
        return repo

    def _check_reader(self, call: Call, repo: Repo) -> None:
        if repo.gated and not self._is_member(call.user, repo.name.split("/")[0]) and call.user not in repo.granted:
            message = f"Access to dataset {repo.name} is restricted and you are not in the authorized list."
            raise Refused(message, "GatedRepo", 401 if call.user is None else 403)

    def _page(self, call: Call, items: Sequence[Mapping[str, object]]) -> Answer:
        first = int(call.query.get("cursor", ["0"])[0])
        stop = first + self.page_size
        query = urlencode({**call.query, "cursor": stop}, doseq=True)
        more = {"Link": f'<{self.url}{call.path}?{query}>; rel="next"'} if stop < len(items) else {}
        return _json(items[first:stop], headers=more)

    # Accounts and repositories

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Answer:
        if call.user is None:
            raise Refused(NO_CREDENTIALS, status=401)
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in sorted(self.members.get(call.user, ()))]
        role = {"displayName": "tests", "role": "read" if call.token in self.read_tokens else "write"}
        auth = {"type": "access_token", "accessToken": role}
        return _json({"type": "user", "id": call.user, "name": call.user, "orgs": orgs, "auth": auth})

    @_route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Answer:
        asked = call.json()
        name = self._named(call, asked)
        if name in self.repos:
            refused = Refused("You already created this dataset repo", status=409)
            refused.details = {"url": f"{self.url}/datasets/{name}"}
            raise refused
        self.repos[name] = Repo(name, str(call.user), _is_private(asked) or False)
        return _json({"url": f"{self.url}/datasets/{name}", "name": name, "id": name})

    @_route("DELETE", "/api/repos/delete")
    def _delete(self, call: Call) -> Answer:
        name = self._named(call, call.json())
        self._written(call, name)
        del self.repos[name]
        return _json({})

    def _named(self, call: Call, asked: Mapping[str, Any]) -> str:
        if asked.get("type") != "dataset":
            raise Refused("there are only datasets here")
        namespace = str(asked.get("organization") or call.user)
        self._check_writer(call, namespace)
        return f"{namespace}/{asked['name']}"

    @_route("PUT", f"{_API}/settings")
    def _settings(self, call: Call, name: str) -> Answer:
        repo, asked = self._written(call, name), call.json()
        private = _is_private(asked)
        repo.private = repo.private if private is None else private
        repo.gated = asked.get("gated", repo.gated)
        return _json({"private": repo.private, "gated": repo.gated})

    @_route("GET", f"{_API}(?:/revision/([^/]+))?")
    def _info(self, call: Call, name: str, revision: str) -> Answer:
        repo = self._seen(call, name)
        info = repo.info(repo.resolve(revision or "main"), blobs=call.asks("blobs"))
        wanted = {"id", *call.query["expand"]} if "expand" in call.query else set(info)
        return _json({key: value for key, value in info.items() if key in wanted})

    @_route("GET", f"{_API}/auth-check(/write)?")
    def _auth_check(self, call: Call, name: str, write: str) -> Answer:
        self._check_reader(call, self._written(call, name) if write else self._seen(call, name))
        return _json({})

    # Branches, tags, history

    @_route("GET", f"{_API}/refs")
    def _refs(self, call: Call, name: str) -> Answer:
        repo = self._seen(call, name)
        listed = {
            kind: [{"name": ref, "ref": f"refs/{path}/{ref}", "targetCommit": oid} for ref, oid in sorted(refs.items())]
            for kind, path, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        return _json({**listed, "converts": [], "pullRequests": []})

    @_route("POST", f"{_API}/tag/([^/]+)")
    def _tag(self, call: Call, name: str, revision: str) -> Answer:
        repo = self._written(call, name)
        return self._point(repo, repo.tags, str(call.json()["tag"]), revision)

    @_route("POST", f"{_API}/branch/([^/]+)")
    def _branch(self, call: Call, name: str, branch: str) -> Answer:
        repo = self._written(call, name)
        return self._point(repo, repo.branches, branch, str(call.json().get("startingPoint", "main")))

    def _point(self, repo: Repo, refs: dict[str, str], ref: str, revision: str) -> Answer:
        commit = repo.resolve(revision)
        if ref in refs:
            raise Refused(f"Reference already exists: {ref}", status=409)
        refs[ref] = commit.oid
        return _json({})

    @_route("DELETE", f"{_API}/(tag|branch)/([^/]+)")
    def _delete_ref(self, call: Call, name: str, kind: str, ref: str) -> Answer:
        repo = self._written(call, name)
        refs = repo.tags if kind == "tag" else repo.branches
        if ref not in refs:
            raise Refused(f"Invalid rev id: {ref}", "RevisionNotFound")
        if refs is repo.branches and ref == "main":
            raise Refused("The main branch cannot be deleted", status=403)
        del refs[ref]
        return _json({})

    @_route("GET", f"{_API}/commits/([^/]+)")
    def _commits(self, call: Call, name: str, revision: str) -> Answer:
        repo = self._seen(call, name)
        shown = [
            {"id": each.oid, "title": each.title, "message": each.message, "date": each.date,
             "authors": [{"user": each.author}]}
            for each in repo.history(repo.resolve(revision))
        ]  # fmt: skip
        return self._page(call, shown)

    # Reading

    @_route("GET", f"{_API}/tree/([^/]+)(?:/(.+))?")
    def _tree(self, call: Call, name: str, revision: str, folder: str) -> Answer:
        repo = self._seen(call, name)
        entries = repo.entries(repo.resolve(revision), expand=call.asks("expand"))
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refused(f"{folder} does not exist on {revision!r}", "EntryNotFound")
        start = len(folder) + 1 if folder else 0
        inside = [path for path in entries if not folder or path.startswith(f"{folder}/")]
        return self._page(call, [entries[path] for path in inside if call.asks("recursive") or "/" not in path[start:]])

    @_route("POST", f"{_API}/paths-info/([^/]+)")
    def _paths_info(self, call: Call, name: str, revision: str) -> Answer:
        repo, form = self._seen(call, name), parse_qs(call.body.decode())
        entries = repo.entries(repo.resolve(revision), expand=form.get("expand") == ["true"])
        return _json([entries[path] for path in form.get("paths", ()) if path in entries])

    @_route("GET HEAD", f"/datasets/{_REPO}/resolve/([^/]+)/(.+)")
    def _resolve(self, call: Call, name: str, revision: str, path: str) -> Answer:
        repo = self._seen(call, name)
        commit = repo.resolve(revision)
        self._check_reader(call, repo)
        file, headers = commit.files.get(path), {"X-Repo-Commit": commit.oid}
        if file is None:
            refused = Refused("Entry not found", "EntryNotFound")
            refused.headers = headers  # the client remembers in which commit there is no such file
            raise refused
        if file.sha256 is None:
            answer = in_range(file.content, call.headers)
            return Answer(answer.status, {**answer.headers, **headers, "ETag": f'"{file.oid}"'}, answer.body)
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
        # the name at the end, so that faults and counts of a file's path include its storage
        location = f"{self._stored_at(file.sha256)}/{quote(path)}?Signature={_signature('GET', file.sha256)}"
        return Answer(302, {**headers, **linked, "Location": location}, b"")

    # Writing

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Answer:
        try:
            card = metadata(str(call.json()["content"]))
        except Refused as refused:
            refused.details = {"errors": [{"message": refused.message}], "warnings": []}
            raise
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return _json({"errors": [], "warnings": warnings})

    @_route("POST", f"{_API}/preupload/([^/]+)")
    def _preupload(self, call: Call, name: str, revision: str) -> Answer:
        files = self._written(call, name).resolve(revision).files
        modes = []
        for asked in call.json()["files"]:
            path = asked["path"]
            mode = "lfs" if is_large(path, asked["size"]) else "regular"
            old = {"oid": files[path].sha256 or files[path].oid} if path in files else {}
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **old})
        return _json({"files": modes})

    @_route("POST", f"{_LFS}/batch")
    def _batch(self, call: Call, name: str) -> Answer:
        self._written(call, name)
        objects = [self._instruction(name, each["oid"], each["size"]) for each in call.json()["objects"]]
        return _json({"transfer": "basic", "objects": objects})

    def _instruction(self, name: str, sha256: str, num_bytes: int) -> dict[str, object]:
        instruction: dict[str, object] = {"oid": sha256, "size": num_bytes}
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            instruction["error"] = {"code": 422, "message": "not a sha256"}
        elif sha256 not in self.objects:
            query = urlencode({"size": num_bytes, "Signature": _signature(f"PUT {num_bytes}", sha256)})
            verify = f"{self.url}/datasets/{name}.git/info/lfs/objects/verify"
            instruction["actions"] = {
                "upload": {"href": f"{self._stored_at(sha256)}?{query}"},
                "verify": {"href": verify},
            }
        return instruction

    @_route("POST", f"{_LFS}/verify")
    def _verify(self, call: Call, name: str) -> Answer:
        self._written(call, name)
        self._stored(str(call.json()["oid"]), call.json()["size"])
        return _json({})

    def _stored(self, sha256: str, num_bytes: object) -> bytes:
        if sha256 not in self.objects or num_bytes not in (None, len(self.objects[sha256])):
            raise Refused(f"The object {sha256} of {num_bytes} bytes was not uploaded")
        return self.objects[sha256]

    @_route("POST", f"{_API}/commit/([^/]+)")
    def _commit(self, call: Call, name: str, branch: str) -> Answer:
        repo = self._written(call, name)
        if call.asks("create_pr"):
            raise Refused("There are no pull requests here", status=501)
        header, *changes = (json.loads(line) for line in call.body.splitlines())
        files = dict(repo.tip(branch, header["value"].get("parentCommit")).files)
        for change in changes:
            apply(change["key"], change["value"], files, self._stored)
        title, message = header["value"]["summary"], header["value"].get("description", "")
        commit = repo.commit(branch, files, title, message, str(call.user))
        url = f"{self.url}/datasets/{name}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # Storage: the other host

    def _stored_at(self, sha256: str) -> str:
        return f"{self.storage_url}/lfs/{sha256}"

    @_route("PUT", _STORED)
    def _take(self, call: Call, sha256: str) -> Answer:
        self._check_signature(call, f"PUT {call.query.get('size', [''])[0]}", sha256)
        if len(call.body) != int(call.query["size"][0]) or hashlib.sha256(call.body).hexdigest() != sha256:
            raise Refused("The content is not of this size and sha256")
        self.objects[sha256] = call.body
        self.uploads.append(sha256)
        return Answer(200, {"ETag": f'"{sha256}"'}, b"")

    @_route("GET HEAD", f"{_STORED}/.+")
    def _give(self, call: Call, sha256: str) -> Answer:
        self._check_signature(call, "GET", sha256)
        answer = in_range(self.objects[sha256], call.headers)
        return Answer(answer.status, {**answer.headers, "ETag": f'"{sha256}"'}, answer.body)

    def _check_signature(self, call: Call, what: str, sha256: str) -> None:
        if call.token is not None:
            raise Refused("Only one auth mechanism allowed")
        if call.query.get("Signature") != [_signature(what, sha256)]:
            raise Refused("SignatureDoesNotMatch", status=403)


def _signature(what: str, sha256: str) -> str:
    return hashlib.sha256(f"{_SECRET} {what} {sha256}".encode()).hexdigest()[:32]


def _is_private(asked: Mapping[str, Any]) -> bool | None:
    """Return what a request says of the visibility, if anything."""
    return asked["visibility"] == "private" if "visibility" in asked else asked.get("private")


def _said(refused: Refused) -> dict[str, str]:
    line = refused.message.partition("\n")[0].encode("ascii", "replace").decode()
    code = {} if refused.code is None else {"X-Error-Code": refused.code}
    return {**refused.headers, **code, "X-Error-Message": line}


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())
