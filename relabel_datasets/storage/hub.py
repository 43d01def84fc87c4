"""Datasets on the Hugging Face Hub at one commit. Files are stored in the Hub's own cache and verified before use.

huggingface_hub verifies the length of a file, but not its content. Here each file of the manifest is hashed once per machine,
including files from `hf download`. Small records next to the package's cache remember which files have been verified.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from ..errors import DatasetError, UnavailableError
from ..naming import check_config, check_file_name, check_sha256
from .folders import CARD_NAME, MANIFEST_NAME, MAX_SMALL_BYTES, card_configs, default_cache, read_card
from .hub_errors import HubItem, explain_hub_error
from .local import sha256_of, write_atomically
from .recheck import has_other_content
from .redaction import redacted_cause
from .regular_files import open_regular, read_regular
from .retries import Failure, retry

logger = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (1, 4)  # between attempts, in each of which huggingface_hub repeats requests for up to 30 s
_WHOLE_ATTEMPTS = 3  # downloads of a file whose content is wrong


@dataclass(frozen=True)
class HubRepo:
    """Dataset repository of the Hub at a revision.

    Attributes:
        repo_id: Name of the repository, such as `"org/name"`.
        revision: Branch, tag or commit. None is the default branch.
        token: Access token. None uses the token of `hf auth login` or of the environment variable `HF_TOKEN`.
        cache_dir: Folder whose subfolder `hub` has the layout of the Hub's cache. None uses the Hub's cache, see
            `HF_HUB_CACHE`.
    """

    repo_id: str
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"

    def __repr__(self) -> str:  # the dataclass's own shows the token
        return f"HubRepo({str(self)!r})"

    def pinned(self) -> HubRepo:
        """Return the repository at the current commit of its revision; without a network, at the last commit seen.

        Raises:
            FileNotFoundError, RefusedError, DatasetError: As for `with_hub_errors`.
        """
        card = self.fetch(CARD_NAME)
        commit = card.parent.name  # <cache>/datasets--org--name/snapshots/<commit>/README.md
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
        return replace(self, revision=commit)

    def fetch(self, name: str, *, force: bool = False) -> Path:
        """Download a file unless it is in the cache.

        Args:
            name: Name of the file in the repository.
            force: Whether to download a file that is in the cache. Default: False.

        Returns:
            Local path of the file.

        Raises:
            FileNotFoundError, RefusedError, DatasetError: As for `with_hub_errors`.
        """
        from huggingface_hub import hf_hub_download  # slow to import, and not needed for local datasets

        # Without progress bars: shards are downloaded throughout the run.
        has_class = "tqdm_class" in signature(hf_hub_download).parameters  # huggingface_hub 1.3
        options: dict[str, Any] = {"tqdm_class": partial(tqdm, disable=True)} if has_class else {}

        def download() -> str:
            with progress_bars(has_class):
                path: str = hf_hub_download(
                    self.repo_id,
                    name,
                    repo_type="dataset",
                    revision=self.revision,
                    token=self.token,
                    cache_dir=None if self.cache_dir is None else self.cache_dir / "hub",
                    force_download=force,
                    **options,
                )
                return path

        return Path(with_hub_errors(download, self, name))

    def verified(self, name: str, num_bytes: int, sha256: str) -> Path:
        """Download a file unless it is in the cache, and verify it.

        Args:
            name: Name of the file in the repository.
            num_bytes: Expected size in bytes.
            sha256: Expected SHA-256, in hex.

        Returns:
            Local path of the file.

        Raises:
            DatasetError: The file differs from the expected one after several downloads. It is a ValueError.
            OSError, ValueError: As for `with_hub_errors`.
        """
        path = self.fetch(name)
        for attempts_left in reversed(range(_WHOLE_ATTEMPTS)):
            problem = self._compare(path, num_bytes, sha256)
            if problem is None:
                return path
            if attempts_left:
                logger.warning("%s/%s: %s; downloading it again", self, name, problem)
                path = self.fetch(name, force=True)
        raise DatasetError(
            f"{self}/{name}: {problem}, which the manifest says: it is damaged or from another build; publish the dataset again"
        )

    def _compare(self, path: Path, num_bytes: int, sha256: str) -> str | None:
        """Return how a file in the cache differs from the expected one; None if it does not."""
        stat = path.stat()
        if stat.st_size != num_bytes:
            return f"it has {stat.st_size} bytes instead of {num_bytes}"
        verified = (self.cache_dir or default_cache()) / "verified"
        record = verified / check_sha256(sha256, "the manifest")  # it becomes a path, and the manifest may be hostile
        state = f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}".encode()
        with suppress(FileNotFoundError):
            if record.read_bytes() == state:
                with open_regular(path) as file:
                    return f"its SHA-256 is no longer {sha256}" if has_other_content(file, sha256) else None
        actual = sha256_of(path)
        if actual != sha256:
            return f"its SHA-256 is {actual} instead of {sha256}"
        with suppress(OSError):  # without write access, each process hashes the file again
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, state)
        return None


class HubFolder:
    """Folder of a dataset on the Hub, see `Folder`.

    Args:
        repo: Repository at a commit, so that all processes of a run read the same files even if a new version is published.
        below: Path of the folder in the repository, empty or ending in a slash. Default: the root.
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
        return True  # the Hub's cache does not evict files

    def check_room(self, num_bytes: int, what: str) -> None:
        pass

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(read_regular(self._repo.fetch(self._below + name), MAX_SMALL_BYTES))
        except DatasetError as error:
            logger.warning("%s; downloading it again", error)
            return parse(read_regular(self._repo.fetch(self._below + name, force=True), MAX_SMALL_BYTES))


def with_hub_errors(
    call: Callable[[], T], repo: HubRepo, name: str | None = None, pauses_s: Sequence[float] = PAUSES_S
) -> T:
    """Call the Hub, with retries after temporary failures and with errors in the words of this package.

    Args:
        call: Function that may raise errors of huggingface_hub.
        repo: Repository of the request.
        name: File of the request. Default: the request is not about a file.
        pauses_s: Pauses between attempts in seconds. Default: 1 and 4.

    Returns:
        The result of `call`.

    Raises:
        FileNotFoundError: There is no such repository, revision or file, or it is private.
        RefusedError: The repository is gated, or the token is invalid or lacks the permission. It is a ValueError.
        UnavailableError: The Hub cannot be reached, or the repository was changed by someone else. It is a ValueError.
        DatasetError: The Hub rejects the request. It is a ValueError.
        OSError: The disk of the cache is full.
    """
    item = HubItem(repo.repo_id, repo.revision, name, token=repo.token)

    def explain(error: Exception) -> Failure:
        explained = explain_hub_error(error, item)
        if explained is None:
            return Failure(error)
        is_temporary = isinstance(explained, UnavailableError)
        return Failure(explained, redacted_cause(error, item.secrets), is_temporary=is_temporary)

    return retry(call, explain, pauses_s)


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Switch the progress bars of huggingface_hub on or off in this process."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
