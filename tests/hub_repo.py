"""What a Hub keeps of a dataset repository: files, commits, branches and tags, as git would have them."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import yaml

LARGE_BYTES = 10 << 20  # from here on, files are stored with LFS whatever their names
# Not all that the Hub has, but what datasets are made of.
LFS_PATTERNS = (
    *("*.7z", "*.arrow", "*.bin", "*.bz2", "*.gz", "*.h5", "*.lz4", "*.npy", "*.npz", "*.parquet", "*.pickle", "*.pkl"),
    *("*.pt", "*.pth", "*.rar", "*.safetensors", "*.tar", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst", "*tfevents*"),
    *("*.flac", "*.mp3", "*.ogg", "*.wav", "*.bmp", "*.gif", "*.png", "*.tiff", "*.jpg", "*.jpeg", "*.webp", "*.mp4"),
)
_BORN = datetime(2026, 1, 1, tzinfo=timezone.utc)  # of every repository: commits have the same ids in every run
_HTTP_OF = {"RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403, "RepoNotFound": 404}


class Refused(Exception):
    """A request that the Hub answers with an error."""

    def __init__(self, message: str, code: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.message, self.code = message, code
        self.status = status or _HTTP_OF.get(code or "", 400)
        self.details: dict[str, object] = {}
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class File:
    """A file in a tree; with a sha256, it is a git LFS pointer to its content."""

    content: bytes
    sha256: str | None = None

    @cached_property
    def blob(self) -> bytes:
        if self.sha256 is None:
            return self.content
        head = "version https://git-lfs.github.com/spec/v1\n"
        return f"{head}oid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    def lfs(self, key: str) -> dict[str, object]:
        """Return what the API says of its LFS object, whose sha256 some routes call `oid`."""
        if self.sha256 is None:
            return {}
        return {"lfs": {key: self.sha256, "size": len(self.content), "pointerSize": len(self.blob)}}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """A dataset repository.

    Args:
        name: `namespace/name`.
        author: of the first commit.
        private: whether only members of the namespace see it.
        gated: `auto` or `manual`: only members and `granted` users may read its files.
        granted: names of users.
    """

    name: str
    author: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.commit("main", {".gitattributes": File(attributes.encode())}, "initial commit", author=self.author)

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def resolve(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or the id of a commit names."""
        name = re.sub("^refs/(heads|tags)/", "", revision)
        oid = self.branches.get(name) or self.tags.get(name) or name
        if oid not in self.commits:
            raise Refused(f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def tip(self, branch: str, parent: str | None) -> Commit:
        """Return the commit to build on, which must be `parent` if that is given."""
        if branch not in self.branches:
            raise Refused(f"Invalid rev id: {branch}", "RevisionNotFound")
        tip = self.commits[self.branches[branch]]
        if parent not in (None, tip.oid):
            raise Refused("A commit has happened since. Please refresh and try again.", status=412)
        return tip

    def commit(self, branch: str, files: Mapping[str, File], title: str, message: str = "", author: str = "") -> Commit:
        """Add a commit with these files, and no others; also if nothing changes, as the Hub does."""
        metadata(files.get("README.md", File(b"")).content.decode())
        parent = self.branches.get(branch)
        date = (_BORN + timedelta(seconds=len(self.commits))).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        oid = _digest([parent or "", title, message, author, date, _tree_id(files.items())])
        self.commits[oid] = Commit(oid, parent, title, message, author, date, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, commit: Commit) -> list[Commit]:
        """Return a commit and all before it, newest first."""
        commits = [commit]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def entries(self, commit: Commit, *, expand: bool = False) -> dict[str, dict[str, object]]:
        """Return what the API says of each file and folder of a commit, in the order of their paths."""
        entries = {path: _of_file(path, file) for path, file in commit.files.items()}
        for folder in _folders(commit.files):
            entries[folder] = {"type": "directory", "oid": _id_at(commit, folder), "size": 0, "path": folder}
        if expand:
            for path, entry in entries.items():
                entry["lastCommit"] = self._last_commit(commit, path)
                entry["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
        return dict(sorted(entries.items()))

    def _last_commit(self, commit: Commit, path: str) -> dict[str, str]:
        history = self.history(commit)
        while len(history) > 1 and _id_at(history[0], path) == _id_at(history[1], path):
            del history[0]
        return {"id": history[0].oid, "title": history[0].title, "date": history[0].date}

    def info(self, commit: Commit, *, blobs: bool = False) -> dict[str, object]:
        """Return what the API says of the repository at a commit, with the sizes of files if `blobs`."""
        readme = commit.files.get("README.md", File(b""))
        card = metadata(readme.content.decode())
        sizes = {
            path: {"blobId": file.oid, "size": len(file.content), **file.lfs("sha256")} if blobs else {}
            for path, file in commit.files.items()
        }
        return {
            "id": self.name,
            "author": self.name.split("/")[0],
            "sha": commit.oid,
            "createdAt": _BORN.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "lastModified": self.head.date,
            "private": self.private,
            "gated": self.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [*(card.get("tags") or ()), *(f"license:{card[key]}" for key in ("license",) if key in card)],
            "cardData": card,
            "siblings": [{"rfilename": path, **size} for path, size in sorted(sizes.items())],
        }


def is_large(path: str, num_bytes: int) -> bool:
    """Return whether the Hub takes a file as an LFS object."""
    name = PurePosixPath(path).name
    return num_bytes > LARGE_BYTES or any(fnmatch.fnmatchcase(name, pattern) for pattern in LFS_PATTERNS)


def metadata(readme: str) -> dict[str, Any]:
    """Return the YAML block that begins a dataset card.

    Raises:
        Refused: it is not YAML, or not a mapping.
    """
    match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", readme, re.DOTALL | re.MULTILINE)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise Refused(f"Invalid YAML in README.md: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise Refused("Invalid YAML in README.md: the metadata must be a mapping")
    return content or {}


def apply(
    key: str, value: Mapping[str, object], files: dict[str, File], stored: Callable[[str, object], bytes]
) -> None:
    """Change the files of a commit as one line of a request to commit says.

    Args:
        key: the kind of change.
        value: its arguments.
        files: by path, to be changed.
        stored: gives the content of an LFS object of a sha256 and a number of bytes, or refuses.
    """
    path = str(value["path"]).rstrip("/")
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise Refused(f"Invalid path in a commit: {path!r}")
    if key == "file":
        content = base64.b64decode(str(value["content"]), validate=True)
        if len(content) > LARGE_BYTES:
            raise Refused(f"{path} is too large for a regular file: use git LFS")
        files[path] = File(content)
    elif key == "lfsFile":
        files[path] = File(stored(str(value["oid"]), value.get("size")), str(value["oid"]))
    elif key in ("deletedFile", "deletedFolder"):
        gone = [each for each in files if each == path or each.startswith(f"{path}/")]
        if (path in gone) != (key == "deletedFile") or not gone:
            raise Refused(f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for each in gone:
            del files[each]
    else:
        raise Refused(f"Unknown operation in a commit: {key!r}")


def _of_file(path: str, file: File) -> dict[str, object]:
    return {"type": "file", "oid": file.oid, "size": len(file.content), "path": path, **file.lfs("oid")}


def _folders(paths: Iterable[str]) -> set[str]:
    return {str(folder) for path in paths for folder in PurePosixPath(path).parents if str(folder) != "."}


def _id_at(commit: Commit, path: str) -> str | None:
    if path in commit.files:
        return commit.files[path].oid
    inside = [item for item in commit.files.items() if item[0].startswith(f"{path}/")]
    return _tree_id(inside) if inside else None


def _tree_id(files: Iterable[tuple[str, File]]) -> str:
    return _digest(f"{path}\0{file.oid}" for path, file in sorted(files, key=lambda item: item[0]))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()
