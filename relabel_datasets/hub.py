"""Publish a dataset on the Hugging Face Hub: all of it in one commit, so that nobody ever reads half of one.

Shards are uploaded first, where those that an interrupted run brought are known by their sha256. Then one commit puts
shards, indices, manifests and card in their places, or none of them. Whatever happened to an earlier try, the next
compares what is to be there with what is, and does the rest.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .data.datasets import RelabelDataset
from .errors import DatasetError, UnavailableError
from .keywords import checked_keywords
from .naming import check_config
from .report.overlay import contact_sheet
from .shards.card import EXAMPLES_NAME, find_restricted_images, is_from_template, read_template, write_card
from .shards.configs import open_manifest
from .shards.manifest import Manifest
from .shards.verification import verify
from .storage.folders import CARD_NAME, MANIFEST_NAME, LocalFolder, local_path, read_card
from .storage.hub import PAUSES_S, HubRepo, with_hub_errors
from .storage.local import sha256_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.hf_api import RepoFile

__all__ = ["PublishResult", "publish"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_COMMIT_PAUSES_S = (1, 2, 4, 8, 16, 32)  # between tries of a commit, which huggingface_hub makes only once
_TAG_ATTEMPTS = 5
_REPO_TYPE = "dataset"


@dataclass(frozen=True)
class PublishResult:
    """What `publish` did.

    Attributes:
        repo_id: `"org/name"`.
        commit: that holds the dataset.
        tag: by which this revision can be loaded for ever.
        url: of its page.
        load_line: the line of Python that loads it.
    """

    repo_id: str
    commit: str
    tag: str
    url: str
    load_line: str


@checked_keywords()
def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    config: str | None = None,
    public: bool = False,
    tag: str | None = None,
    card: str | os.PathLike[str] | None = None,
    restricted_images: str | None = None,
    token: str | None = None,
    progress: bool = True,
) -> PublishResult:
    """Upload the configs of a dataset to a dataset repository of the Hub, and verify what has arrived.

    The folder is verified first. What the repository holds already is not uploaded again, so that the same call goes on where
    an interrupted one stopped. Configs of other names that the repository has stay as they are, and the card describes all.
    Earlier revisions stay readable by their tags or commits.

    Args:
        folder: of the dataset, on disk.
        repo_id: `"org/name"`; made if need be.
        config: the one to publish. Default: all in the folder.
        public: whether a repository that is made can be seen by everybody. One that exists stays as it is.
        tag: name of the revision. Default: `v1`, `v2`, ...; a commit that has a tag already keeps it.
        card: template of the card, see `shards.card.write_card`. Default: that of the folder's card, if it is from a template.
            Text that somebody wrote is kept: that of the folder's card, else that of the repository's.
        restricted_images: the name of images that may not be redistributed, as the card has it (`restricted_images:`), to
            publish shards that hold them all the same.
        token: for the Hub. Default: that of `hf auth login`, or of the environment variable `HF_TOKEN`.
        progress: whether to show progress on stderr.

    Raises:
        FileNotFoundError: no such folder.
        DatasetError: (a ValueError) the folder is damaged or has no such config, its images may not be redistributed, the repository has splits that
            the folder lacks, or the Hub cannot be reached. The repository is then as it was.
        RefusedError: (a ValueError) the token may not write there.

    Example:
        >>> publish("path/to/dataset", "org/name").load_line
        'load_dataset("org/name", "resnet50.a1_in1k", split="train", revision="v1")'
    """
    root = local_path(folder, "the folder to publish")
    names = _find_configs(root, config)
    read_card(root / CARD_NAME)  # if it cannot be read, better now than after hours; likewise the template
    if card is not None:
        read_template(card)
    for name in names:  # without the card, which is made anew
        report = verify(root / name, progress=progress)
        if not report.ok:
            raise DatasetError(f"{root} is damaged, nothing was published:\n{report}")
    manifests = {name: open_manifest(LocalFolder(root), name) for name in names}
    with TemporaryDirectory(prefix="relabel-publish-") as staging, _progress_bars(progress):
        publisher = _Publisher(root, manifests, HubRepo(repo_id, token=token), Path(staging) / "card", card)
        publisher.create(public)
        commit = publisher.commit(tag, restricted_images)
        publisher.check(commit)
        tag = publisher.tag(commit, tag)
    name, manifest = next(iter(manifests.items()))
    split = next(iter(manifest.splits.values()))
    images = "" if split.image_extension else ', images="path/to/images"'
    line = f'load_dataset("{repo_id}", "{name}", split="{split.name}", revision="{tag}"{images})'
    return PublishResult(repo_id, commit, tag, f"{publisher.api.endpoint}/datasets/{repo_id}", line)


class _File(NamedTuple):
    """A file that is to be in the repository."""

    path: Path
    num_bytes: int
    sha256: str


class _Publisher:
    """Brings configs into a repository.

    Args:
        root: folder of the dataset.
        manifests: of the configs to publish.
        repo: where to.
        staging: folder for what is made for the repository, card and pictures, from copies of all manifests.
        template: of the card, see `publish`.
    """

    def __init__(
        self,
        root: Path,
        manifests: Mapping[str, Manifest],
        repo: HubRepo,
        staging: Path,
        template: str | os.PathLike[str] | None,
    ) -> None:
        from huggingface_hub import HfApi  # slow to import

        self.api, self._repo = HfApi(token=repo.token), repo
        self._root, self._manifests, self._staging, self._template = root, manifests, staging, template

    def create(self, public: bool) -> None:
        """Make the repository, unless it exists."""
        name = self._repo.repo_id
        self._call(lambda: self.api.create_repo(name, repo_type=_REPO_TYPE, private=not public, exist_ok=True))
        is_private = self._call(lambda: self.api.dataset_info(name)).private
        if public and is_private:
            logger.warning("%s exists and stays private: its settings on the Hub can change that", name)

    def commit(self, tag: str | None, restricted_images: str | None) -> str:
        """Return the commit that holds the configs, made if need be; see `publish` for the arguments and errors."""
        for pause in (*_COMMIT_PAUSES_S, None):
            head = str(self._call(lambda: self.api.dataset_info(self._repo.repo_id)).sha)
            there = self._tree(head)
            self._stage(replace(self._repo, revision=head), there, restricted_images)
            operations = list(self._operations(there))
            if not operations:
                return head
            if tag is not None and tag in self._tags():
                raise DatasetError(f"{self._repo.repo_id} has a tag {tag!r} already, of something else: choose another")
            try:
                # Refused if somebody else has changed the repository since: then all is compared anew.
                return self._call(
                    lambda head=head, operations=operations: (
                        self.api.create_commit(  # type: ignore[misc]
                            self._repo.repo_id,
                            operations,
                            repo_type=_REPO_TYPE,
                            commit_message=f"Publish {', '.join(self._manifests)}",
                            parent_commit=head,
                        ).oid
                    ),
                    pauses_s=(),
                )
            except UnavailableError as error:
                if pause is None:
                    raise
                logger.warning("%s; again in %d s", error, pause)
                time.sleep(pause)
        raise AssertionError

    def check(self, commit: str) -> None:
        """Raise DatasetError unless the repository holds exactly what was to be published, by size and sha256."""
        there = self._tree(commit)
        for name, file in self._files().items():
            if name not in there or not _is_same(there[name], file):
                raise DatasetError(
                    f"{self._repo.repo_id}/{name} has arrived otherwise than it was sent, in commit {commit}: publish it anew"
                )

    def tag(self, commit: str, tag: str | None) -> str:
        """Return the tag of a commit, made if need be."""
        from huggingface_hub.errors import HfHubHTTPError

        for _ in range(_TAG_ATTEMPTS):  # others may be at it
            tags = self._tags()
            mine = [name for name, target in tags.items() if target == commit]
            if tag in mine or (tag is None and mine):
                return tag or mine[-1]
            if tag in tags:
                raise DatasetError(
                    f"{self._repo.repo_id} has a tag {tag!r} already, of commit {tags[tag]}: choose another"
                )
            numbers = [int(name[1:]) for name in tags if re.fullmatch(r"v\d+", name)]
            name = tag or f"v{max(numbers, default=0) + 1}"

            def create(name: str = name) -> None:
                try:
                    self.api.create_tag(self._repo.repo_id, tag=name, revision=commit, repo_type=_REPO_TYPE)
                except HfHubHTTPError as error:
                    if error.response.status_code != 409:  # another process has just made it, or an answer was lost
                        raise

            self._call(create)
        raise DatasetError(
            f"{self._repo.repo_id}: no tag {name!r} can be made of commit {commit}: choose another with tag="
        )

    def _stage(self, head: HubRepo, there: Mapping[str, RepoFile], restricted_images: str | None) -> None:
        """Write card and pictures, as they are to be beside what the repository has of other configs."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        for name, manifest in self._manifests.items():
            _link(self._staging / name, lambda file, name=name: self._root / name / file, manifest)  # type: ignore[misc]
        for path in there:
            name, _, file = path.rpartition("/")
            if file == MANIFEST_NAME and "/" not in name and name:
                check_config(name, f"{head}/{path}")
                manifest = Manifest.parse(head.fetch(path).read_bytes(), f"{head}/{path}")
                if name not in self._manifests:
                    _link(self._staging / name, lambda file, name=name: head.fetch(f"{name}/{file}"), manifest)  # type: ignore[misc]
                    if f"{name}/{EXAMPLES_NAME}" in there:
                        (self._staging / name / EXAMPLES_NAME).touch()
                elif lost := set(manifest.splits) - set(self._manifests[name].splits):
                    raise DatasetError(
                        f"{head.repo_id} has split {sorted(lost)} of config {name!r}, which {self._root} lacks and publishing "
                        "would delete: build it there, too, publish under another config's name, or delete it on the Hub"
                    )
        paths = [self._root / CARD_NAME, *([head.fetch(CARD_NAME)] if CARD_NAME in there else [])]
        cards = [card for card in map(read_card, paths) if card is not None]
        by_hand = [card for card in cards if not is_from_template(card)]
        for card in (by_hand or cards)[:1]:
            (self._staging / CARD_NAME).write_bytes(card.encode())
        write_card(self._staging, self._template, repo_id=head.repo_id)
        if self._may_show_images(restricted_images):
            for name in self._with_images():
                split = next(iter(self._manifests[name].splits))
                contact_sheet(RelabelDataset(self._root, name, split)).save(self._staging / name / EXAMPLES_NAME)
            write_card(self._staging, self._template, repo_id=head.repo_id)

    def _may_show_images(self, allowed: str | None) -> bool:
        """Return whether nothing is said against publishing images.

        Raises:
            DatasetError: something is, and there are images in the shards.
        """
        card = read_card(self._staging / CARD_NAME)
        restricted = find_restricted_images(card, self._manifests.values())
        if restricted is not None and restricted != allowed and self._with_images():
            raise DatasetError(
                f"the shards of {self._with_images()} hold images of {restricted}, which may not be redistributed: build "
                "label-only shards (--no-images); or, if you may publish them, say so by their name with "
                f"restricted_images={restricted!r} (--restricted-images {restricted!r})"
            )
        return restricted is None

    def _with_images(self) -> list[str]:
        return [
            name
            for name, manifest in self._manifests.items()
            if any(split.image_extension for split in manifest.splits.values())
        ]

    def _files(self) -> dict[str, _File]:
        """Return what is to be in the repository, by name; what is in configs of other names is not in it."""
        files = {CARD_NAME: _file_at(self._staging / CARD_NAME)}
        for name, manifest in self._manifests.items():
            for made in (self._root / name / MANIFEST_NAME, self._staging / name / EXAMPLES_NAME):
                if made.is_file():
                    files[f"{name}/{made.name}"] = _file_at(made)
            for split in manifest.splits.values():
                files[f"{name}/{split.index}"] = _File(
                    self._root / name / split.index, split.index_bytes, split.index_sha256
                )
                for shard in zip(split.filenames, split.shard_bytes, split.shard_sha256, strict=True):
                    files[f"{name}/{shard[0]}"] = _File(self._root / name / shard[0], *shard[1:])
        return files

    def _operations(self, there: Mapping[str, RepoFile]) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
        """Yield what makes the repository what it is to be."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = self._files()
        for name, file in files.items():
            if name not in there or not _is_same(there[name], file):
                operation = CommitOperationAdd(name, file.path)
                if operation.upload_info.sha256.hex() != file.sha256:
                    raise DatasetError(f"{file.path} was changed while it was published: publish it anew")
                yield operation
        for name in there:
            config, _, file_name = name.rpartition("/")
            is_ours = file_name == EXAMPLES_NAME or file_name.endswith((".tar", ".index.safetensors"))
            if config in self._manifests and is_ours and name not in files:
                yield CommitOperationDelete(name)

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        def read() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self._repo.repo_id, recursive=True, revision=commit, repo_type=_REPO_TYPE)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        return self._call(read)

    def _tags(self) -> dict[str, str]:
        """Return the commits of tags."""
        refs = self._call(lambda: self.api.list_repo_refs(self._repo.repo_id, repo_type=_REPO_TYPE))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def _call(self, call: Callable[[], T], pauses_s: Sequence[float] = PAUSES_S) -> T:
        return with_hub_errors(call, self._repo, pauses_s=pauses_s)


def _find_configs(root: Path, config: str | None) -> list[str]:
    """Return the configs to publish: the one named, or all."""
    if config is not None:
        check_config(config, "config=")
    names = LocalFolder(root).configs()
    if names is None:
        raise DatasetError(f"{root} is one config of a dataset: give the folder that holds it, and its name as config=")
    if not names:
        raise FileNotFoundError(f"no dataset at {root}: expected {root}/<config>/{MANIFEST_NAME}")
    if config is not None and config not in names:
        raise DatasetError(f"{root} has no config {config!r}, only {names}")
    return names if config is None else [config]


def _link(folder: Path, find: Callable[[str], Path], manifest: Manifest) -> None:
    """Make a folder with links to what the card says of a config is from."""
    folder.mkdir()
    for file in (MANIFEST_NAME, *(split.index for split in manifest.splits.values())):
        (folder / file).symlink_to(find(file).absolute())


def _file_at(path: Path) -> _File:
    return _File(path, path.stat().st_size, sha256_of(path))


def _is_same(there: RepoFile, file: _File) -> bool:
    """Return whether a file in the repository has the content of one that is here."""
    if there.size != file.num_bytes:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == file.sha256
    content = file.path.read_bytes()
    # Git knows small files by this hash: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    is_unchanged = hashlib.sha256(content).hexdigest() == file.sha256
    return is_unchanged and there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """Let huggingface_hub show its progress, or not."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
