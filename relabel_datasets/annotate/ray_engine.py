"""The engine of many machines: actors of a Ray cluster, each with an annotator of its own, take shard after shard.

What is lost with a worker, an actor or a node is the shard that it was at; another actor makes that one. Actors start on
nodes that join. Shards and records are written by the actors themselves, so that also a driver that dies loses no shard.

One machine, all of its GPUs, or without any its CPU cores:

    relabel build IMAGES OUT --annotator MODEL --engine ray

Several, with IMAGES and OUT on a file system that all have under the same path, or OUT a URL. Ray lets in whoever has its
token; `~/.ray/auth_token` must be the same file on all machines, as in a shared home:

    export RAY_AUTH_MODE=token                        # on each machine
    ray get-auth-token --generate > /dev/null         # once
    ray start --head --port=6379                      # on the first
    ray start --address=FIRST:6379                    # on each of the others, now or later
    relabel build IMAGES OUT --annotator MODEL --engine ray --address auto        # on any of them

SLURM, a task a node:

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
    export RAY_AUTH_MODE=token
    ray get-auth-token --generate > /dev/null
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun --overlap -N1 -n1 -w "$head" ray start --head --port=6379 --num-cpus=64 --num-gpus=8 --block &
    sleep 30
    srun --overlap -N3 -n3 -x "$head" ray start --address="$head:6379" --num-cpus=64 --num-gpus=8 --block &
    srun --overlap -N1 -n1 -w "$head" relabel build IMAGES OUT --annotator MODEL --engine ray --address "$head:6379"

The bytes are those of the local engine wherever the same software on the same kind of processor, with as many threads
(`cpus_per_actor`), gives the same logits.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import Any, NamedTuple

from ..errors import DatasetError
from ..storage.output import RemoteOutput
from .annotator import Annotator
from .engines import Description, MakeAnnotator, OnProgress, OnSkipped
from .shard import Annotated
from .work import Work

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3  # of one shard by errors that may pass, and of setting up actors in a row
_MAX_CRASHES = 5  # of actors at one shard, on nodes that stay, and of starting actors in a row
_POLL_S = 1.0  # between looks at progress and nodes
_PATIENCE_S = 60.0  # without an actor, before a warning


@dataclass(frozen=True)
class RayEngine:
    """Annotates on a Ray cluster, see this module for the commands.

    Args:
        address: of the cluster: `"auto"` for the one that this machine is in, `"host:port"`, or `"ray://host:port"` for one
            from outside, where source and output must have the same paths. Default: the environment variable `RAY_ADDRESS`, a
            cluster on this machine, or a new one that ends with the build. Where Ray is initialised, that is used.
        num_actors: so many at most. Default: as many as the cluster has room for, more when nodes join.
        gpus_per_actor: may be a fraction. Default: 1 where the cluster has GPUs, else 0.
        cpus_per_actor: CPUs, and threads for the computations on them.
    """

    address: str | None = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None
    cpus_per_actor: int = 1

    def __post_init__(self) -> None:
        for name, least in (("num_actors", 1), ("gpus_per_actor", 0), ("cpus_per_actor", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    @contextmanager
    def start(self, make: MakeAnnotator) -> Iterator[_Actors]:
        """Return the actors; they end with the `with` block, and so does the cluster where this began it.

        Raises:
            ImportError: Ray is not installed.
            ConnectionError: there is no cluster at the address.
            TypeError: `make` cannot be pickled.
        """
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "engine 'ray' needs Ray: pip install 'relabel-datasets[ray]', here and on all nodes"
            ) from error
        began = not ray.is_initialized()
        if began:
            ray.init(address=self.address, include_dashboard=False if self.address is None else None)
        actors = _Actors(self, make)
        try:
            actors.wait_for_first()
            yield actors
        finally:
            actors.close()
            if began:
                ray.shutdown()


class _Node(NamedTuple):
    """Where an actor is."""

    node_id: str
    host: str
    pid: int


class _Worker:
    """The actor: an annotator, and the shards that it makes, one at a time; the last one's upload goes on meanwhile."""

    def __init__(self) -> None:
        self._annotating = threading.Lock()
        self._counts: Counter[int] = Counter()
        self._annotator: Annotator | None = None
        self._work: Work | None = None

    def set_up(self, make: MakeAnnotator) -> tuple[Description, _Node]:
        import ray

        self._annotator = make()
        node_id = ray.get_runtime_context().get_node_id()
        return Description.of(self._annotator), _Node(node_id, platform.node(), os.getpid())

    def annotate(self, sent: list[Any], number: int) -> Annotated:
        """Return what there is of a shard; it may have been finished by an actor that could not say so any more."""
        assert self._annotator is not None
        with self._annotating:
            if self._work is None:
                import ray

                self._work = ray.get(sent[0])  # once: in a list, Ray does not unpickle it at every call
            annotated = self._work.load(number)
            if annotated is not None:
                return annotated
            annotator = self._work.restrict(self._annotator)
            annotated = self._work.annotate(number, annotator, lambda count: self._count(number, count))
        self._work.store(number, annotated)
        self._counts.pop(number, None)
        return annotated

    def _count(self, number: int, count: int) -> None:
        self._counts[number] += count

    def progress(self) -> dict[int, int]:
        """Return how many images of each shard in work are done."""
        return dict(self._counts)


@dataclass
class _Slot:
    """An actor, as the driver sees it."""

    handle: Any
    setting_up: Any  # reference to what set_up will return; None when it has
    node: _Node | None = None
    tasks: dict[Any, int] = field(default_factory=dict)  # reference -> shard
    asked: Any = None  # reference to what progress will return


class _Actors:
    """The actors of an engine and the work among them."""

    def __init__(self, engine: RayEngine, make: MakeAnnotator) -> None:
        import ray

        self._ray: Any = ray
        self._engine = engine
        try:
            self._make = self._ray.put(make)
        except (TypeError, PicklingError) as error:
            raise TypeError(
                f"the annotator cannot be sent to other machines ({str(error).splitlines()[0]}): give build a function without "
                "arguments that makes it"
            ) from error
        self._gpus = engine.gpus_per_actor
        if self._gpus is None:
            self._gpus = 1.0 if self._ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        self._slots: list[_Slot] = []
        self._description: Description | None = None
        self._failed_set_ups = 0
        self._next_look = 0.0

    @property
    def description(self) -> Description:
        assert self._description is not None
        return self._description

    def wait_for_first(self) -> None:
        """Wait until an actor has its annotator."""
        warn_at = time.monotonic() + _PATIENCE_S
        while self._description is None:
            self._look_at_nodes(most=1)
            list(self._handle_done(deque(), _Tally()))
            if time.monotonic() > warn_at:
                warn_at += _PATIENCE_S
                logger.warning(
                    "no actor yet: each needs %d CPUs and %g GPUs, the cluster has %s", self._engine.cpus_per_actor, self._gpus,
                    {name: count for name, count in self._ray.cluster_resources().items() if name in ("CPU", "GPU")},
                )  # fmt: skip

    def run(
        self, work: Work, numbers: Sequence[int], on_progress: OnProgress, on_skipped: OnSkipped
    ) -> Iterator[tuple[int, Annotated]]:
        """See `Workers.run`."""
        if not numbers:
            return
        sent = [self._send(work)]
        depth = 2 if isinstance(work.output, RemoteOutput) else 1  # so that an actor annotates while it uploads
        waiting, tally = deque(numbers), _Tally()
        done = 0
        while waiting or any(slot.tasks for slot in self._slots):
            self._look_at_nodes(most=len(waiting) + sum(len(slot.tasks) for slot in self._slots))
            for slot in self._slots:
                while waiting and slot.setting_up is None and len(slot.tasks) < depth:
                    number = waiting.popleft()
                    slot.tasks[slot.handle.annotate.remote(sent, number)] = number
            for number, annotated in self._handle_done(waiting, tally):
                done += len(work.shards[number])
                for skipped in annotated.skipped:
                    on_skipped(skipped)
                yield number, annotated
            on_progress(done + sum(tally.partial.values()) - tally.shown)
            tally.shown = done + sum(tally.partial.values())

    def close(self) -> None:
        """End all actors."""
        for slot in self._slots:
            self._kill(slot)
        self._slots = []

    def _send(self, work: Work) -> Any:
        try:
            return self._ray.put(work)
        except (TypeError, PicklingError) as error:
            raise TypeError(
                f"{type(work.source).__name__} cannot be sent to other machines ({str(error).splitlines()[0]}): build with "
                "engine='local', or from image files or tars"
            ) from error

    def _look_at_nodes(self, most: int) -> None:
        """Start actors where there is room for them, since nodes have joined or actors were lost."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _POLL_S
        room = self._engine.num_actors or sum(map(self._room, self._ray.nodes()))
        options = {
            "num_cpus": self._engine.cpus_per_actor,
            "num_gpus": self._gpus,
            "max_concurrency": 4,  # a shard, the upload of the one before, progress
            "scheduling_strategy": "SPREAD",
        }
        while len(self._slots) < min(most, max(1, room)):  # one that waits tells an autoscaler what is needed
            handle = self._ray.remote(_Worker).options(**options).remote()
            self._slots.append(_Slot(handle, handle.set_up.remote(self._make)))

    def _room(self, node: dict[str, Any]) -> int:
        if not node["Alive"]:
            return 0
        has = node["Resources"]
        room = int(has.get("CPU", 0) // self._engine.cpus_per_actor)
        return min(room, int(has.get("GPU", 0) / self._gpus + 1e-6)) if self._gpus else room

    def _handle_done(self, waiting: deque[int], tally: _Tally) -> Iterator[tuple[int, Annotated]]:
        """Wait a moment for anything to come back; yield shards, put those that were lost back into `waiting`."""
        ray = self._ray
        pending = {ref: slot for slot in self._slots for ref in (slot.setting_up, slot.asked, *slot.tasks) if ref}
        if not pending:
            time.sleep(_POLL_S / 10)
            return
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S / 4)
        for ref in done:
            slot = pending[ref]
            if slot not in self._slots:
                continue  # lost with another of its references
            try:
                result = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                self._on_error(slot, ref, error.cause or error, waiting, tally)
            except ray.exceptions.RayError as error:  # the actor or its node is no more, or cannot be reached
                self._on_loss(slot, error, waiting, tally)
            else:
                if ref == slot.setting_up:
                    self._on_set_up(slot, *result)
                elif ref == slot.asked:
                    slot.asked = None
                    tally.partial.update({number: result.get(number, 0) for number in slot.tasks.values()})
                else:
                    number = slot.tasks.pop(ref)
                    tally.partial.pop(number, None)
                    yield number, result
        self._ask_for_progress(tally)

    def _ask_for_progress(self, tally: _Tally) -> None:
        if time.monotonic() >= tally.ask_at:
            tally.ask_at = time.monotonic() + _POLL_S
            for slot in self._slots:
                if slot.asked is None and slot.tasks:
                    slot.asked = slot.handle.progress.remote()

    def _on_set_up(self, slot: _Slot, description: Description, node: _Node) -> None:
        slot.setting_up, slot.node = None, node
        self._failed_set_ups = 0
        self._description = self._description or description
        if description != self._description:
            raise DatasetError(
                f"the annotator on {node.host} is another than on the other nodes: {description.content} there, "
                f"{self._description.content} elsewhere. All need the same weights and software"
            )
        logger.info("an actor is ready on %s, process %d", node.host, node.pid)

    def _on_error(self, slot: _Slot, ref: Any, error: BaseException, waiting: deque[int], tally: _Tally) -> None:
        """Give a shard to another actor after an error that may be this one's; raise errors of the job."""
        if ref == slot.asked:
            slot.asked = None
            return
        if ref == slot.setting_up:
            self._failed_set_ups += 1
            if self._description is None or self._failed_set_ups >= _MAX_FAILURES:
                raise error
            logger.warning("an actor could not make its annotator: %s", error)
            self._drop(slot)
            return
        number = slot.tasks.pop(ref)
        tally.partial.pop(number, None)
        tally.failures[number] += 1
        where = slot.node.host if slot.node else "a node"
        logger.warning("shard %d failed on %s: %s", number, where, error)
        if isinstance(error, (ValueError, TypeError)) or tally.failures[number] >= _MAX_FAILURES:
            raise error
        waiting.append(number)  # at the end: another actor will be at it

    def _on_loss(self, slot: _Slot, error: Exception, waiting: deque[int], tally: _Tally) -> None:
        self._drop(slot)
        where = f"on {slot.node.host}, process {slot.node.pid}" if slot.node else "that was starting"
        numbers = list(slot.tasks.values())
        logger.warning("lost the actor %s; shards that others make instead: %s", where, numbers)
        waiting.extendleft(numbers)
        for number in numbers:
            tally.partial.pop(number, None)
        if slot.node is not None and self._is_alive(slot.node.node_id):
            tally.crashes.update(numbers)
            poison = [number for number in numbers if tally.crashes[number] >= _MAX_CRASHES]
            if poison:
                raise ChildProcessError(
                    f"{_MAX_CRASHES} actors ended at shard {poison[0]}: out of memory, or the images crash a library? {error}"
                )
        elif slot.node is None:
            self._failed_set_ups += 1
            if self._failed_set_ups >= _MAX_CRASHES:
                raise ChildProcessError(
                    f"{self._failed_set_ups} actors ended as they made their annotators: {error}"
                ) from error

    def _is_alive(self, node_id: str) -> bool:
        return any(node["NodeID"] == node_id and node["Alive"] for node in self._ray.nodes())

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._kill(slot)

    def _kill(self, slot: _Slot) -> None:
        with suppress(Exception):
            self._ray.kill(slot.handle)  # also one that cannot be reached now


@dataclass
class _Tally:
    """The state of a run."""

    partial: dict[int, int] = field(default_factory=dict)  # shard in work -> images done
    shown: int = 0  # images that the progress bar knows of
    failures: Counter[int] = field(default_factory=Counter)
    crashes: Counter[int] = field(default_factory=Counter)
    ask_at: float = 0.0
