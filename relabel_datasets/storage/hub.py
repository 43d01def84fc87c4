"""A dataset on the Hugging Face Hub, at one commit: files come into the Hub's own cache and are verified before use.

huggingface_hub compares a file's length with what the Hub announces, not its content with anything. Here each file that the
manifest names is hashed once on each machine, also one that `hf download` brought; a small record beside our cache says
which files have been.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from tqdm import tqdm

from ..errors import DatasetError, UnavailableError
from ..naming import check_config, check_file_name, check_sha256
from .folders import CARD_NAME, MANIFEST_NAME, MAX_SMALL_BYTES, card_configs, default_cache, read_card
from .hub_errors import HubItem, explain_hub_error
from .local import sha256_of, write_atomically
from .recheck import has_other_content
from .redaction import redacted_cause
from .regular_files import open_regular, read_regular

logger = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (1, 4)  # between attempts; huggingface_hub makes several requests in each, for up to half a minute
_WHOLE_ATTEMPTS = 3  # downloads of a file whose content is wrong


@dataclass(frozen=True)
class HubRepo:
    """A dataset repository of the Hub at a revision.

    Attributes:
        repo_id: `"org/name"`.
        revision: a branch, a tag or a commit; None is the default branch.
        token: None takes that of `hf auth login` or of the environment variable `HF_TOKEN`.
        cache_dir: the Hub's own layout in its folder `hub`; None takes the Hub's cache, see `HF_HUB_CACHE`.
    """

    repo_id: str
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"

    def __repr__(self) -> str:  # dataclass's would show the token
        return f"HubRepo({str(self)!r})"

    def pinned(self) -> HubRepo:
        """Return the repository at the commit that the revision is now; without network, at the one last seen.

        The errors are those of `with_hub_errors`.
        """
        card = self.fetch(CARD_NAME)
        commit = card.parent.name  # <cache>/datasets--org--name/snapshots/<commit>/README.md
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
        return replace(self, revision=commit)

    def fetch(self, name: str, *, anew: bool = False) -> Path:
        """Return the local path of a file, after a download unless it is in the cache.

        Args:
            name: of the file.
            anew: download it even if it is in the cache.

        The errors are those of `with_hub_errors`.
        """
        from huggingface_hub import hf_hub_download  # slow to import, and those who read from disk do not need it

        def download() -> str:
            return hf_hub_download(
                self.repo_id,
                name,
                repo_type="dataset",
                revision=self.revision,
                token=self.token,
                cache_dir=None if self.cache_dir is None else self.cache_dir / "hub",
                force_download=anew,
                tqdm_class=cast(Any, partial(tqdm, disable=True)),  # a shard is fetched whenever one is needed
            )

        return Path(with_hub_errors(download, self, name))

    def verified(self, name: str, num_bytes: int, sha256: str) -> Path:
        """Return the local path of a file with this content.

        Raises:
            DatasetError: (a ValueError) it is another one than expected.
            OSError, ValueError: as `with_hub_errors`.
        """
        path = self.fetch(name)
        for attempts_left in reversed(range(_WHOLE_ATTEMPTS)):
            wrong = self._compare(path, num_bytes, sha256)
            if wrong is None:
                return path
            if attempts_left:
                logger.warning("%s/%s: %s; fetched anew", self, name, wrong)
                path = self.fetch(name, anew=True)
        raise DatasetError(
            f"{self}/{name}: {wrong}, by the manifest: it is damaged or of another build, publish it anew"
        )

    def _compare(self, path: Path, num_bytes: int, sha256: str) -> str | None:
        """Return what is wrong with a file in the cache, if anything is."""
        stat = path.stat()
        if stat.st_size != num_bytes:
            return f"it has {stat.st_size} bytes instead of {num_bytes}"
        verified = (self.cache_dir or default_cache()) / "verified"
        record = verified / check_sha256(sha256, "the manifest")  # it becomes a path, and comes from strangers
        state = f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}".encode()
        with suppress(FileNotFoundError):
            if record.read_bytes() == state:
                with open_regular(path) as file:
                    return f"its SHA-256 is no longer {sha256}" if has_other_content(file, sha256) else None
        actual = sha256_of(path)
        if actual != sha256:
            return f"its sha256 is {actual} instead of {sha256}"
        with suppress(OSError):  # where nothing can be written, each process hashes for itself
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, state)
        return None


class HubFolder:
    """A folder of a dataset on the Hub, see `Folder`.

    Args:
        repo: at a commit, so that all processes of a run read the same files whatever is published meanwhile.
        below: the folder in it, with a slash at its end unless it is empty.
    """

    is_remote = True

    def __init__(self, repo: HubRepo, below: str = "") -> None:
        self._repo, self._below = repo, below

    def __str__(self) -> str:
        return f"{self._repo}/{self._below}".rstrip("/")

    def child(self, name: str) -> HubFolder:
        return HubFolder(self._repo, f"{self._below}{check_config(name, str(self))}/")

    def configs(self) -> list[str] | None:
        if self._below:
            self.read(MANIFEST_NAME, bytes)
            return None
        where = f"{self}/{CARD_NAME}"
        return self.read(CARD_NAME, lambda data: card_configs(data, where))

    def card(self) -> str | None:
        return read_card(self._repo.fetch(CARD_NAME))

    def open(self, name: str, num_bytes: int, sha256: str) -> BinaryIO:
        return open_regular(self._repo.verified(self._below + check_file_name(name, str(self)), num_bytes, sha256))

    def has(self, sha256: str) -> bool:
        return True  # the Hub's cache deletes nothing of itself

    def check_room(self, num_bytes: int, what: str) -> None:
        pass

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(read_regular(self._repo.fetch(self._below + name), MAX_SMALL_BYTES))
        except DatasetError as error:
            logger.warning("%s; fetched anew", error)
            return parse(read_regular(self._repo.fetch(self._below + name, anew=True), MAX_SMALL_BYTES))


def with_hub_errors(
    call: Callable[[], T], repo: HubRepo, name: str | None = None, pauses_s: Sequence[float] = PAUSES_S
) -> T:
    """Return the result of a call to the Hub, repeated after temporary failures; its errors are those of `explain_hub_error`.

    Args:
        call: May raise errors of huggingface_hub.
        repo: The repository of the request.
        name: The file of the request, if it is about one.
        pauses_s: Seconds between attempts.

    Raises:
        FileNotFoundError: There is no such repository, revision or file, or it is private.
        RefusedError: (a ValueError) The repository is gated, or the token is invalid or lacks the permission.
        UnavailableError: (a ValueError) The Hub cannot be reached, or somebody else changed the repository meanwhile.
        DatasetError: (a ValueError) The Hub rejects the request.
        OSError: The disk of the cache is full.
    """
    item = HubItem(repo.repo_id, repo.revision, name, token=repo.token)
    for pause in (*pauses_s, None):
        try:
            return call()
        except Exception as error:
            explained = explain_hub_error(error, item)
            if explained is None:
                raise
            if pause is None or not isinstance(explained, UnavailableError):
                raise explained from redacted_cause(error, item.secrets)
            logger.warning("%s; next attempt in %g s", explained, pause)
        time.sleep(pause)
    raise AssertionError
