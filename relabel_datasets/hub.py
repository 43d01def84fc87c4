"""Publish a dataset on the Hugging Face Hub in one atomic commit.

Shards are uploaded first; those that an interrupted run has uploaded are recognized by their sha256 and skipped. Then one
commit adds shards, indexes, manifests and the card together. Each run compares the repository with the dataset and applies
only the difference, so a failed run can be repeated.

Example:
    >>> from relabel_datasets.hub import publish
    >>> publish("path/to/dataset", "org/name").url
    'https://huggingface.co/datasets/org/name'
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .data.datasets import RelabelDataset
from .errors import DatasetError, UnavailableError
from .hub_files import PublishedFile, link_metadata
from .keywords import checked_keywords
from .naming import check_config
from .report.overlay import contact_sheet
from .shards.card import EXAMPLES_NAME, find_restricted_images, is_from_template, read_template, write_card
from .shards.configs import open_manifest
from .shards.manifest import Manifest
from .shards.verification import verify
from .storage.folders import CARD_NAME, MANIFEST_NAME, LocalFolder, local_path, read_card
from .storage.hub import PAUSES_S, HubRepo, progress_bars, with_hub_errors
from .storage.retries import Failure, retry
from .storage.temp_folders import temporary_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.hf_api import RepoFile

__all__ = ["PublishResult", "publish"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_COMMIT_PAUSES_S = (1, 2, 4, 8, 16, 32)  # between attempts to commit, which huggingface_hub does not retry
_TAG_ATTEMPTS = 5
_REPO_TYPE = "dataset"


@dataclass(frozen=True)
class PublishResult:
    """Result of `publish`.

    Attributes:
        repo_id: Repository, as "org/name".
        commit: Id of the commit with the published files.
        tag: Tag of this commit, for `load_dataset(..., revision=tag)`.
        url: Web page of the repository.
        load_line: Python expression that loads the published dataset.
    """

    repo_id: str
    commit: str
    tag: str
    url: str
    load_line: str


@checked_keywords()
def publish(
    path: str | os.PathLike[str],
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
    """Publish configs of a dataset in a dataset repository of the Hugging Face Hub, and verify the upload.

    The local files are verified first. Files that are already in the repository are not uploaded again, so an interrupted call
    can be repeated. Other configs in the repository are unchanged, and the card describes all configs. Earlier revisions remain
    available by tag or commit.

    Args:
        path: Local folder of the dataset.
        repo_id: Repository, as "org/name". It is created if it does not exist.
        config: Name of the config to publish. Default: all configs in the folder.
        public: Whether a new repository is public. The visibility of an existing repository is unchanged. Default: False.
        tag: Tag of the revision. Default: the next of `v1`, `v2`, ..., or the existing tag if nothing has changed.
        card: Template of the card, see `shards.card.write_card`. Default: the template of the folder's card. Text of a card
            that was written by hand is kept: that of the folder's card, otherwise that of the repository's card.
        restricted_images: Name of images that must not be redistributed, as in the card (`restricted_images:`), to publish
            shards that contain them. Default: such shards raise an error.
        token: Access token for the Hub. Default: the token of `hf auth login` or of the environment variable `HF_TOKEN`.
        progress: Whether to show progress on stderr. Default: True.

    Returns:
        Repository, commit and tag of the published files.

    Raises:
        FileNotFoundError: The folder does not exist.
        DatasetError: (a ValueError) The dataset is corrupt, the config is unknown, the images must not be redistributed, the
            repository has splits that are missing in the folder, or the Hub is unavailable. The repository is then unchanged.
        RefusedError: (a ValueError) The token has no write access to the repository.

    Example:
        >>> publish("path/to/dataset", "org/name").load_line
        'load_dataset("org/name", "resnet50.a1_in1k", split="train", revision="v1")'
    """
    root = local_path(path, "the folder to publish")
    names = _find_configs(root, config)
    read_card(root / CARD_NAME)  # fail before hours of uploads, also for the template
    if card is not None:
        read_template(card)
    for name in names:  # the card is not verified because it is rewritten
        report = verify(root / name, progress=progress)
        if not report.ok:
            raise DatasetError(f"{root} is corrupt, nothing was published:\n{report}")
    manifests = {name: open_manifest(LocalFolder(root), name) for name in names}
    with temporary_folder("relabel-publish-") as staging, progress_bars(progress):
        publisher = _Publisher(root, manifests, HubRepo(repo_id, token=token), staging / "card", card)
        publisher.create(public)
        commit = publisher.commit(tag, restricted_images)
        publisher.check(commit)
        tag = publisher.tag(commit, tag)
    name, manifest = next(iter(manifests.items()))
    split = next(iter(manifest.splits.values()))
    images = "" if split.image_extension else ', images="path/to/images"'
    line = f'load_dataset("{repo_id}", "{name}", split="{split.name}", revision="{tag}"{images})'
    return PublishResult(repo_id, commit, tag, f"{publisher.api.endpoint}/datasets/{repo_id}", line)


class _CommitError(Exception):
    """Temporary failure of a commit, after which the repository must be compared again."""

    def __init__(self, reason: UnavailableError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Publisher:
    """Publishes configs in a repository.

    Args:
        root: Folder of the dataset.
        manifests: Manifests of the configs to publish, by config.
        repo: Repository to publish in.
        staging: Temporary folder in which the card and the example pictures are created.
        template: Template of the card, see `publish`.
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
        """Create the repository if it does not exist."""
        name = self._repo.repo_id
        self._call(lambda: self.api.create_repo(name, repo_type=_REPO_TYPE, private=not public, exist_ok=True))
        is_private = self._call(lambda: self.api.dataset_info(name)).private
        if public and is_private:
            logger.warning(
                "%s exists and remains private: its visibility can be changed in its settings on the Hub", name
            )

    def commit(self, tag: str | None, restricted_images: str | None) -> str:
        """Commit the configs if the repository differs, and return the commit that contains them. See `publish` for arguments."""

        def explain(error: Exception) -> Failure:
            if isinstance(error, _CommitError):
                return Failure(error.reason, error.reason.__cause__, is_temporary=True)
            return Failure(error)

        return retry(lambda: self._commit_once(tag, restricted_images), explain, _COMMIT_PAUSES_S)

    def _commit_once(self, tag: str | None, restricted_images: str | None) -> str:
        head = str(self._call(lambda: self.api.dataset_info(self._repo.repo_id)).sha)
        existing = self._tree(head)
        self._stage(replace(self._repo, revision=head), existing, restricted_images)
        operations = list(self._operations(existing))
        if not operations:
            return head
        if tag is not None and tag in self._tags():
            raise DatasetError(f"{self._repo.repo_id} already has a tag {tag!r} for other content: choose another tag")
        try:
            # Fails if the repository has changed since `head`; the next attempt compares again.
            return self._call(
                lambda: (
                    self.api.create_commit(
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
            raise _CommitError(error) from error

    def check(self, commit: str) -> None:
        """Raise DatasetError unless all published files have the expected size and sha256."""
        existing = self._tree(commit)
        for name, file in self._files().items():
            if name not in existing or not file.equals(existing[name]):
                raise DatasetError(
                    f"{self._repo.repo_id}/{name} in commit {commit} does not match the uploaded file: publish it again"
                )

    def tag(self, commit: str, tag: str | None) -> str:
        """Return the tag of a commit; create it if necessary."""
        from huggingface_hub.errors import HfHubHTTPError

        for _ in range(_TAG_ATTEMPTS):  # other processes may create tags, too
            tags = self._tags()
            existing = [name for name, target in tags.items() if target == commit]
            if tag in existing or (tag is None and existing):
                return tag or existing[-1]
            if tag in tags:
                raise DatasetError(
                    f"{self._repo.repo_id} already has a tag {tag!r}, of commit {tags[tag]}: choose another tag"
                )
            numbers = [int(name[1:]) for name in tags if re.fullmatch(r"v\d+", name)]
            name = tag or f"v{max(numbers, default=0) + 1}"

            def create(name: str = name) -> None:
                try:
                    self.api.create_tag(self._repo.repo_id, tag=name, revision=commit, repo_type=_REPO_TYPE)
                except HfHubHTTPError as error:
                    if error.response.status_code != 409:  # it was just created, or a response was lost
                        raise

            self._call(create)
        raise DatasetError(
            f"{self._repo.repo_id}: tag {name!r} cannot be created for commit {commit}: choose another with tag="
        )

    def _stage(self, head: HubRepo, existing: Mapping[str, RepoFile], restricted_images: str | None) -> None:
        """Write the card and the example pictures; the card also covers other configs in the repository."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        for name, manifest in self._manifests.items():
            link_metadata(self._staging / name, lambda file, name=name: self._root / name / file, manifest)  # type: ignore[misc]
        for path in existing:
            name, _, file = path.rpartition("/")
            if file == MANIFEST_NAME and "/" not in name and name:
                check_config(name, f"{head}/{path}")
                manifest = Manifest.parse(head.fetch(path).read_bytes(), f"{head}/{path}")
                if name not in self._manifests:
                    link_metadata(self._staging / name, lambda file, name=name: head.fetch(f"{name}/{file}"), manifest)  # type: ignore[misc]
                    if f"{name}/{EXAMPLES_NAME}" in existing:
                        (self._staging / name / EXAMPLES_NAME).touch()
                elif missing := set(manifest.splits) - set(self._manifests[name].splits):
                    raise DatasetError(
                        f"{head.repo_id} has splits {sorted(missing)} of config {name!r} that are missing in {self._root} and "
                        "would be deleted: build them in this folder, use another config name, or delete them on the Hub"
                    )
        paths = [self._root / CARD_NAME, *([head.fetch(CARD_NAME)] if CARD_NAME in existing else [])]
        cards = [card for card in map(read_card, paths) if card is not None]
        handwritten = [card for card in cards if not is_from_template(card)]
        for card in (handwritten or cards)[:1]:
            (self._staging / CARD_NAME).write_bytes(card.encode())
        write_card(self._staging, self._template, repo_id=head.repo_id)
        if self._may_show_images(restricted_images):
            for name in self._configs_with_images():
                split = next(iter(self._manifests[name].splits))
                contact_sheet(RelabelDataset(self._root, name, split)).save(self._staging / name / EXAMPLES_NAME)
            write_card(self._staging, self._template, repo_id=head.repo_id)

    def _may_show_images(self, allowed: str | None) -> bool:
        """Return whether publishing the images is permitted.

        Raises:
            DatasetError: The images are restricted and not allowed, and the shards contain images.
        """
        card = read_card(self._staging / CARD_NAME)
        restricted = find_restricted_images(card, self._manifests.values())
        if restricted is not None and restricted != allowed and (configs := self._configs_with_images()):
            raise DatasetError(
                f"the shards of {configs} contain images of {restricted}, which must not be redistributed: build label-only "
                "shards (--no-images), or, if you are permitted to publish the images, confirm it with "
                f"restricted_images={restricted!r}"
            )
        return restricted is None

    def _configs_with_images(self) -> list[str]:
        return [
            name
            for name, manifest in self._manifests.items()
            if any(split.image_extension for split in manifest.splits.values())
        ]

    def _files(self) -> dict[str, PublishedFile]:
        """Return the files to publish by name, without those of other configs in the repository."""
        files = {CARD_NAME: PublishedFile.read(self._staging / CARD_NAME)}
        for name, manifest in self._manifests.items():
            for path in (self._root / name / MANIFEST_NAME, self._staging / name / EXAMPLES_NAME):
                if path.is_file():
                    files[f"{name}/{path.name}"] = PublishedFile.read(path)
            for split in manifest.splits.values():
                files[f"{name}/{split.index}"] = PublishedFile(
                    self._root / name / split.index, split.index_bytes, split.index_sha256
                )
                for shard in zip(split.filenames, split.shard_bytes, split.shard_sha256, strict=True):
                    files[f"{name}/{shard[0]}"] = PublishedFile(self._root / name / shard[0], *shard[1:])
        return files

    def _operations(self, existing: Mapping[str, RepoFile]) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
        """Yield the operations that update the repository."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = self._files()
        for name, file in files.items():
            if name not in existing or not file.equals(existing[name]):
                operation = CommitOperationAdd(name, file.path)
                if operation.upload_info.sha256.hex() != file.sha256:
                    raise DatasetError(f"{file.path} has changed during publishing: publish it again")
                yield operation
        for name in existing:
            config, _, file_name = name.rpartition("/")
            is_generated = file_name == EXAMPLES_NAME or file_name.endswith((".tar", ".index.safetensors"))
            if config in self._manifests and is_generated and name not in files:
                yield CommitOperationDelete(name)

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        def read() -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(self._repo.repo_id, recursive=True, revision=commit, repo_type=_REPO_TYPE)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        return self._call(read)

    def _tags(self) -> dict[str, str]:
        """Return the commit of each tag."""
        refs = self._call(lambda: self.api.list_repo_refs(self._repo.repo_id, repo_type=_REPO_TYPE))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def _call(self, call: Callable[[], T], pauses_s: Sequence[float] = PAUSES_S) -> T:
        return with_hub_errors(call, self._repo, pauses_s=pauses_s)


def _find_configs(root: Path, config: str | None) -> list[str]:
    """Return the configs to publish: the given one, or all."""
    if config is not None:
        check_config(config, "config=")
    names = LocalFolder(root).configs()
    if names is None:
        raise DatasetError(f"{root} is one config of a dataset: give its parent folder, and its name as config=")
    if not names:
        raise FileNotFoundError(f"no dataset at {root}: expected {root}/<config>/{MANIFEST_NAME}")
    if config is not None and config not in names:
        raise DatasetError(f"{root} has no config {config!r}: expected one of {names}")
    return names if config is None else [config]
