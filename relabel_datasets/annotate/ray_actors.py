"""Actors of a Ray cluster that annotate shards, and the driver that distributes the shards and handles failures."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import Any, NamedTuple

from ..errors import DatasetError
from .annotator import Annotator
from .engines import Description, MakeAnnotator, OnProgress, OnSkipped
from .pipeline import annotate_shards
from .shard import Annotated
from .work import Work

logger = logging.getLogger(__name__)

_MAX_FAILURES = (
    3  # of one shard by errors that may be temporary, and consecutive ones of actors that create their annotator
)
_MAX_CRASHES = 5  # of actors that annotate the same shard on live nodes, and consecutive ones of starting actors
_POLL_S = 1.0  # interval of progress and node checks
_WARN_AFTER_S = 60.0  # without any actor


class _Node(NamedTuple):
    """Location of an actor."""

    node_id: str
    host: str
    pid: int


class _Worker:
    """Actor with an annotator. Annotates a shard while the previous one is completed and the next one is decoded."""

    def __init__(self) -> None:
        # One thread creates and calls the annotator: kernels that are captured in a graph belong to a thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="annotate")
        self._waiting: deque[int] = deque()
        self._results: dict[int, Future[Annotated]] = {}
        self._counts: Counter[int] = Counter()
        self._annotator: Annotator | None = None
        self._work: Work | None = None

    def set_up(self, make: MakeAnnotator) -> tuple[Description, _Node]:
        import ray

        self._annotator = self._thread.submit(make).result()
        node_id = ray.get_runtime_context().get_node_id()
        return Description.of(self._annotator), _Node(node_id, platform.node(), os.getpid())

    def annotate(self, work_refs: list[Any], number: int) -> Annotated:
        """Return a shard, which a lost actor may already have finished."""
        if self._work is None:
            import ray

            # Ray unpickles arguments on every call, but not references in a list.
            self._work = ray.get(work_refs[0])
        annotated = self._work.load(number)
        if annotated is not None:
            return annotated
        result = self._results[number] = Future()
        self._waiting.append(number)
        self._thread.submit(self._annotate_waiting)
        return result.result()

    def _annotate_waiting(self) -> None:
        """Annotate all shards that wait, and those that arrive in the meantime."""
        assert self._annotator is not None
        if not self._waiting:  # an earlier call has annotated it
            return
        assert self._work is not None
        started: list[int] = []
        try:
            shards = annotate_shards(self._work, self._next(started), self._work.restrict(self._annotator), self._count)
            for number, annotated in shards:
                started.remove(number)
                self._counts.pop(number, None)
                self._results.pop(number).set_result(annotated)
        except BaseException as error:  # noqa: BLE001  the driver decides
            for number in started:
                self._counts.pop(number, None)
                self._results.pop(number).set_exception(error)

    def _next(self, started: list[int]) -> Iterator[int]:
        while self._waiting:
            number = self._waiting.popleft()
            started.append(number)
            yield number

    def _count(self, number: int, count: int) -> None:
        self._counts[number] += count

    def progress(self) -> dict[int, int]:
        """Return the number of images done for each unfinished shard."""
        return dict(self._counts)


@dataclass
class _Slot:
    """Actor as seen by the driver."""

    handle: Any
    setup_ref: Any  # pending result of `set_up`, or None when it has returned
    node: _Node | None = None
    tasks: dict[Any, int] = field(default_factory=dict)  # pending results of `annotate` -> shard
    progress_ref: Any = None  # pending result of `progress`


@dataclass
class _Tally:
    """State of a run."""

    partial: dict[int, int] = field(default_factory=dict)  # unfinished shard -> images done
    shown: int = 0  # images on the progress bar
    failures: Counter[int] = field(default_factory=Counter)
    crashes: Counter[int] = field(default_factory=Counter)
    next_request: float = 0.0  # time of the next request for progress


class Actors:
    """Running actors of an engine. Implements the `Workers` protocol.

    Args:
        make: Function that creates the annotator of an actor.
        max_actors: Maximum number of actors, or None for as many as the cluster has room for.
        gpus_per_actor: Number of GPUs per actor, or None for 1 if the cluster has GPUs, else 0.
        cpus_per_actor: Number of CPUs per actor.

    Raises:
        TypeError: `make` cannot be pickled.
    """

    def __init__(
        self, make: MakeAnnotator, max_actors: int | None, gpus_per_actor: float | None, cpus_per_actor: int
    ) -> None:
        import ray

        self._ray: Any = ray
        self._max_actors, self._cpus = max_actors, cpus_per_actor
        try:
            self._make = self._ray.put(make)
        except (TypeError, PicklingError) as error:
            raise TypeError(
                f"the annotator cannot be sent to other machines ({str(error).splitlines()[0]}): pass build a function without "
                "arguments that creates it"
            ) from error
        if gpus_per_actor is None:
            gpus_per_actor = 1.0 if self._ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        self._gpus = gpus_per_actor
        self._slots: list[_Slot] = []
        self._description: Description | None = None
        self._failed_setups = 0
        self._next_node_check = 0.0

    @property
    def description(self) -> Description:
        """Description of the annotator, valid after `wait_for_first`."""
        assert self._description is not None
        return self._description

    def wait_for_first(self) -> None:
        """Wait until an actor has created its annotator."""
        warn_at = time.monotonic() + _WARN_AFTER_S
        while self._description is None:
            self._start_actors(max_needed=1)
            list(self._handle_results(deque(), _Tally()))
            if time.monotonic() > warn_at:
                warn_at += _WARN_AFTER_S
                logger.warning(
                    "no actor has started: each needs %d CPUs and %g GPUs, the cluster has %s", self._cpus, self._gpus,
                    {name: count for name, count in self._ray.cluster_resources().items() if name in ("CPU", "GPU")},
                )  # fmt: skip

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        """Annotate, store and record shards, see `Workers.run`."""
        if not numbers:
            return
        work_refs = [self._put(work)]
        waiting, tally = deque(numbers), _Tally()
        done = 0
        while waiting or any(slot.tasks for slot in self._slots):
            self._start_actors(max_needed=len(waiting) + sum(len(slot.tasks) for slot in self._slots))
            self._assign(waiting, work_refs)
            for number, annotated in self._handle_results(waiting, tally):
                done += len(work.shards[number])
                for skipped in annotated.skipped:
                    on_skipped(skipped)
                yield number, annotated
            on_progress(done + sum(tally.partial.values()) - tally.shown)
            tally.shown = done + sum(tally.partial.values())

    def _assign(self, waiting: deque[int], work_refs: list[Any]) -> None:
        """Give each actor a shard, and another to decode ahead unless idle actors could soon take it."""
        ready = [slot for slot in self._slots if slot.setup_ref is None]
        for depth in (1, 2):
            for slot in ready:
                if len(slot.tasks) < depth and len(waiting) >= (1 if depth == 1 else len(ready)):
                    number = waiting.popleft()
                    slot.tasks[slot.handle.annotate.remote(work_refs, number)] = number

    def close(self) -> None:
        """End all actors."""
        for slot in self._slots:
            self._kill(slot)
        self._slots = []

    def _put(self, work: Work) -> Any:
        try:
            return self._ray.put(work)
        except (TypeError, PicklingError) as error:
            raise TypeError(
                f"{type(work.source).__name__} cannot be sent to other machines ({str(error).splitlines()[0]}): build with "
                "engine='local', or from image files or tars"
            ) from error

    def _start_actors(self, max_needed: int) -> None:
        """Start actors in free resources of the cluster, after nodes have joined or actors were lost."""
        if time.monotonic() < self._next_node_check:
            return
        self._next_node_check = time.monotonic() + _POLL_S
        room = self._max_actors or sum(map(self._room, self._ray.nodes()))
        options = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_concurrency": 4,  # two shards, and progress
            "scheduling_strategy": "SPREAD",
        }
        while len(self._slots) < min(max_needed, max(1, room)):  # a pending actor shows an autoscaler what is needed
            handle = self._ray.remote(_Worker).options(**options).remote()
            self._slots.append(_Slot(handle, handle.set_up.remote(self._make)))

    def _room(self, node: dict[str, Any]) -> int:
        """Return the number of actors that fit on a node."""
        if not node["Alive"]:
            return 0
        resources = node["Resources"]
        room = int(resources.get("CPU", 0) // self._cpus)
        return min(room, int(resources.get("GPU", 0) / self._gpus + 1e-6)) if self._gpus else room

    def _handle_results(self, waiting: deque[int], tally: _Tally) -> Iterator[tuple[int, Annotated]]:
        """Wait briefly for results. Yield finished shards, and put lost ones back into `waiting`."""
        ray = self._ray
        pending = {ref: slot for slot in self._slots for ref in (slot.setup_ref, slot.progress_ref, *slot.tasks) if ref}
        if not pending:
            time.sleep(_POLL_S / 10)
            return
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S / 4)
        for ref in done:
            slot = pending[ref]
            if slot not in self._slots:
                continue  # dropped after another of its results
            try:
                result = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                self._on_error(slot, ref, error.cause or error, waiting, tally)
            except ray.exceptions.RayError as error:  # the actor or its node has ended or cannot be reached
                self._on_loss(slot, error, waiting, tally)
            else:
                if ref == slot.setup_ref:
                    self._on_set_up(slot, *result)
                elif ref == slot.progress_ref:
                    slot.progress_ref = None
                    tally.partial.update({number: result.get(number, 0) for number in slot.tasks.values()})
                else:
                    number = slot.tasks.pop(ref)
                    tally.partial.pop(number, None)
                    yield number, result
        self._request_progress(tally)

    def _request_progress(self, tally: _Tally) -> None:
        if time.monotonic() >= tally.next_request:
            tally.next_request = time.monotonic() + _POLL_S
            for slot in self._slots:
                if slot.progress_ref is None and slot.tasks:
                    slot.progress_ref = slot.handle.progress.remote()

    def _on_set_up(self, slot: _Slot, description: Description, node: _Node) -> None:
        slot.setup_ref, slot.node = None, node
        self._failed_setups = 0
        self._description = self._description or description
        if description != self._description:
            raise DatasetError(
                f"the annotator on {node.host} differs from that on the other nodes: {_shown(description)} there, "
                f"{_shown(self._description)} elsewhere. All nodes need the same weights and software"
            )
        logger.info("an actor is ready on %s, process %d", node.host, node.pid)

    def _on_error(self, slot: _Slot, ref: Any, error: BaseException, waiting: deque[int], tally: _Tally) -> None:
        """Retry a shard on another actor after an error that may be specific to this one. Raise all other errors."""
        if ref == slot.progress_ref:
            slot.progress_ref = None
            return
        if ref == slot.setup_ref:
            self._failed_setups += 1
            if self._description is None or self._failed_setups >= _MAX_FAILURES:
                raise error
            logger.warning("an actor could not create its annotator: %s", error)
            self._drop(slot)
            return
        number = slot.tasks.pop(ref)
        tally.partial.pop(number, None)
        tally.failures[number] += 1
        host = slot.node.host if slot.node else "a node"
        logger.warning("shard %d failed on %s: %s", number, host, error)
        if isinstance(error, (ValueError, TypeError)) or tally.failures[number] >= _MAX_FAILURES:
            raise error
        waiting.append(number)  # at the end, so that another actor retries it

    def _on_loss(self, slot: _Slot, error: Exception, waiting: deque[int], tally: _Tally) -> None:
        self._drop(slot)
        location = f"on {slot.node.host}, process {slot.node.pid}" if slot.node else "that was starting"
        numbers = list(slot.tasks.values())
        logger.warning("lost the actor %s; other actors retry its shards: %s", location, numbers)
        waiting.extendleft(numbers)
        for number in numbers:
            tally.partial.pop(number, None)
        if slot.node is not None and self._is_alive(slot.node.node_id):
            tally.crashes.update(numbers)
            fatal = [number for number in numbers if tally.crashes[number] >= _MAX_CRASHES]
            if fatal:
                raise ChildProcessError(
                    f"{_MAX_CRASHES} actors ended at shard {fatal[0]}: out of memory, or do the images crash a library? {error}"
                )
        elif slot.node is None:
            self._failed_setups += 1
            if self._failed_setups >= _MAX_CRASHES:
                raise ChildProcessError(
                    f"{self._failed_setups} actors ended while they created their annotators: {error}"
                ) from error

    def _is_alive(self, node_id: str) -> bool:
        return any(node["NodeID"] == node_id and node["Alive"] for node in self._ray.nodes())

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._kill(slot)

    def _kill(self, slot: _Slot) -> None:
        with suppress(Exception):  # the actor may be unreachable
            self._ray.kill(slot.handle)


def _shown(description: Description) -> str:
    return f"{description.content}, {'compiled' if description.compiled else 'not compiled'}"
