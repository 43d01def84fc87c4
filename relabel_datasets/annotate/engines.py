"""Engines: what maps the annotation of a shard over all shards of a build. Here, the one of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from .annotator import Annotator
from .shard import Annotated
from .work import Work

MakeAnnotator = Callable[[], Annotator]
OnProgress = Callable[[int], object]
OnSkipped = Callable[[Skipped], object]


@dataclass(frozen=True)
class Description:
    """What is known of an annotator that is elsewhere: an `Annotator` that annotates nothing."""

    classes: tuple[str, ...] | None
    num_classes: int
    content: dict[str, Any]  # what describe() said
    device: str | None = None  # type of its device, such as "cuda"; None if the annotator does not tell

    @classmethod
    def of(cls, annotator: Annotator) -> Description:
        return cls(annotator.classes, annotator.num_classes, annotator.describe(), _device_type(annotator))

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return self.content


def _device_type(annotator: object) -> str | None:
    """Return the type of the device of an annotator, or of the annotators that it wraps."""
    device = getattr(annotator, "device", None)
    if device is not None:
        return torch.device(device).type
    inner = getattr(annotator, "annotators", None) or (getattr(annotator, "annotator", None),)
    types = {_device_type(each) for each in inner if each is not None}
    return types.pop() if len(types) == 1 else None


class Workers(Protocol):
    """What an engine has at work."""

    @property
    def description(self) -> Description:
        """The annotator, which all of them have."""
        ...

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        """Annotate, store and record shards; yield their numbers and what there is of them, as they are finished.

        Args:
            work: the build.
            numbers: of the shards that are missing.
            on_progress: called with the number of images done since the last call; negative for those that were lost.
            on_skipped: called with every image that cannot be read.
        """
        ...


class Engine(Protocol):
    """How a build is spread over processes; the bytes of the shards do not depend on it."""

    def start(self, make: MakeAnnotator) -> AbstractContextManager[Workers]:
        """Return the workers, each with an annotator that `make` returned; they end with the `with` block."""
        ...


class LocalEngine:
    """Annotates in this process, one shard after the other."""

    @contextmanager
    def start(self, make: MakeAnnotator) -> Iterator[_LocalWorker]:
        yield _LocalWorker(make())


class _LocalWorker:
    def __init__(self, annotator: Annotator) -> None:
        self._annotator = annotator
        self.description = Description.of(annotator)

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        annotator = work.restrict(self._annotator)
        storing: tuple[int, Annotated, Future[None]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="store") as pool:  # an upload goes on beside the next shard
            for number in numbers:
                annotated = work.annotate(number, annotator, on_progress, on_skipped)
                if storing is not None:
                    yield _stored(*storing)
                storing = number, annotated, pool.submit(work.store, number, annotated)
            if storing is not None:
                yield _stored(*storing)


def _stored(number: int, annotated: Annotated, future: Future[None]) -> tuple[int, Annotated]:
    future.result()
    return number, annotated


def find_engine(engine: str | Engine) -> Engine:
    """Return the engine of a name, `"local"` or `"ray"`, or the one given.

    Raises:
        ValueError: unknown name.
    """
    if engine == "local":
        return LocalEngine()
    if engine == "ray":
        from .ray_engine import RayEngine  # not imported where nobody asks for it

        return RayEngine()
    if isinstance(engine, str):
        raise ValueError(f"engine must be 'local', 'ray' or an engine such as RayEngine(...), got {engine!r}")
    return engine
