"""Engine protocol, which distributes the shards of a build over workers, and the engine of the current process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor

from ..data.skipped import Skipped
from .annotator import Annotator, prepare, wrapped
from .pipeline import annotate_shards
from .shard import Annotated
from .work import Work

MakeAnnotator = Callable[[], Annotator]
OnProgress = Callable[[int], object]
OnSkipped = Callable[[Skipped], object]


@dataclass(frozen=True)
class Description:
    """Description of an annotator in another process. Implements the `Annotator` protocol, but cannot annotate.

    Attributes:
        classes: Names of the classes, or None if unknown.
        num_classes: Number of classes.
        content: Result of `Annotator.describe`.
        device: Type of the annotator's device, such as `"cuda"`, or None if unknown.
        compiled: Whether the annotator runs compiled, or None if only some annotators of an ensemble do.
    """

    classes: tuple[str, ...] | None
    num_classes: int
    content: dict[str, Any]
    device: str | None = None
    compiled: bool | None = False

    @classmethod
    def of(cls, annotator: Annotator) -> Description:
        """Describe an annotator.

        Args:
            annotator: Annotator of this process.

        Returns:
            Its description, which can be sent to other processes.
        """
        device, compiled = _common(annotator, _device_type), _common(annotator, _is_compiled)
        return cls(annotator.classes, annotator.num_classes, annotator.describe(), device, compiled)

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """Raise NotImplementedError, because the annotator is in another process."""
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        """Raise NotImplementedError, because the annotator is in another process."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the description of the annotator.

        Returns:
            Result of `Annotator.describe` in its process.
        """
        return self.content


def _device_type(annotator: object) -> str | None:
    device = getattr(annotator, "device", None)
    return None if device is None else torch.device(device).type


def _is_compiled(annotator: object) -> bool:
    return bool(getattr(annotator, "compiled", False))


def _common(annotator: object, value_of: Callable[[object], Any]) -> Any:
    """Return a value of an annotator, or of the annotators that it wraps if they have the same, else None."""
    values = {_common(inner, value_of) for inner in wrapped(annotator)} or {value_of(annotator)}
    return values.pop() if len(values) == 1 else None


@dataclass(frozen=True)
class PreparedFactory:
    """Picklable function that creates an annotator and prepares it for the batches of a build, see `annotator.prepare`.

    Attributes:
        make: Function that creates the annotator.
        batch_size: Number of images per batch.
        num_images: Number of images that the build annotates.
        classify: Whether the build stores labels of whole images or crops, not label maps.
    """

    make: MakeAnnotator
    batch_size: int
    num_images: int
    classify: bool

    def __call__(self) -> Annotator:
        annotator = self.make()
        prepare(annotator, self.batch_size, self.num_images, classify=self.classify)
        return annotator


class ShardWorker(Protocol):
    """Protocol of what writes the shards of a build."""

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        """Write, store and record shards.

        Args:
            work: Build that the shards belong to.
            numbers: Numbers of the missing shards.
            on_progress: Function called with the number of images done since its last call, negative if images were lost.
            on_skipped: Function called with every unreadable image.

        Yields:
            Number and result of each shard, in the order in which they finish.
        """
        ...


class Workers(ShardWorker, Protocol):
    """Protocol of the running workers of an engine, which all have the same annotator."""

    @property
    def description(self) -> Description:
        """Description of the annotator."""
        ...


class Engine(Protocol):
    """Protocol of engines, which distribute a build over processes. The bytes of the shards do not depend on the engine."""

    def start(self, make: MakeAnnotator) -> AbstractContextManager[Workers]:
        """Start the workers.

        Args:
            make: Function that creates the annotator of a worker.

        Returns:
            Context manager that returns the workers and stops them at the end of its block.
        """
        ...


class LocalEngine:
    """Engine that annotates one shard after the other in the current process."""

    @contextmanager
    def start(self, make: MakeAnnotator) -> Iterator[_LocalWorker]:
        """Create the annotator.

        Args:
            make: Function that creates the annotator.

        Yields:
            The only worker, which annotates in this process.
        """
        yield _LocalWorker(make())


class _LocalWorker:
    def __init__(self, annotator: Annotator) -> None:
        self._annotator = annotator
        self.description = Description.of(annotator)

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        annotator = work.restrict(self._annotator)
        yield from annotate_shards(work, numbers, annotator, lambda _number, count: on_progress(count), on_skipped)


def find_engine(engine: str | Engine) -> Engine:
    """Return an engine by its name.

    Args:
        engine: `"local"`, `"ray"`, or an engine object, which is returned unchanged.

    Returns:
        The engine.

    Raises:
        ValueError: The name is unknown.
    """
    if engine == "local":
        return LocalEngine()
    if engine == "ray":
        from .ray_engine import RayEngine  # imported only on demand

        return RayEngine()
    if isinstance(engine, str):
        raise ValueError(f"engine must be 'local', 'ray' or an engine such as RayEngine(...), got {engine!r}")
    return engine
