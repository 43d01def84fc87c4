"""Local files of a dataset to publish, compared with the files of a repository on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .shards.manifest import Manifest
from .storage.folders import MANIFEST_NAME
from .storage.local import sha256_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


@dataclass(frozen=True)
class PublishedFile:
    """A local file to publish, with its expected size and sha256."""

    path: Path
    num_bytes: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> PublishedFile:
        """Measure a file."""
        return cls(path, path.stat().st_size, sha256_of(path))

    def equals(self, repo_file: RepoFile) -> bool:
        """Return whether a file in the repository has the same content."""
        if repo_file.size != self.num_bytes:
            return False
        if repo_file.lfs is not None:
            return repo_file.lfs.sha256 == self.sha256
        content = self.path.read_bytes()
        # Git identifies small files by this hash: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
        is_unchanged = hashlib.sha256(content).hexdigest() == self.sha256
        return is_unchanged and repo_file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


def link_metadata(folder: Path, find: Callable[[str], Path], manifest: Manifest) -> None:
    """Create a folder with links to the files that the card of a config is generated from.

    Args:
        folder: Folder to create.
        find: Function that returns the path of a file by its name.
        manifest: Manifest of the config.
    """
    folder.mkdir()
    for file in (MANIFEST_NAME, *(split.index for split in manifest.splits.values())):
        (folder / file).symlink_to(find(file).absolute())
