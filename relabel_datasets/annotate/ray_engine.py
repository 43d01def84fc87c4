"""Engine for several GPUs or machines: the actors of a Ray cluster each have an annotator and annotate one shard after another.

Losing a worker, an actor or a node costs only its shards, at most two, which other actors annotate. Actors also start on nodes that
join later. The actors write shards and records themselves, so that no shard is lost if the driver dies.

One machine, with all of its GPUs, or its CPU cores if it has none:

    relabel build IMAGES OUT --annotator MODEL --engine ray

Several machines. IMAGES and OUT must have the same path on all of them, as on a shared file system, or OUT must be a URL. Ray
authenticates by a token: `~/.ray/auth_token` must be the same file on all machines, as in a shared home directory:

    export RAY_AUTH_MODE=token                        # on each machine
    ray get-auth-token --generate > /dev/null         # once
    ray start --head --port=6379                      # on the first
    ray start --address=FIRST:6379                    # on each of the others, now or later
    relabel build IMAGES OUT --annotator MODEL --engine ray --address auto        # on any of them

SLURM, with one task per node:

    #!/bin/bash
    #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
    export RAY_AUTH_MODE=token
    ray get-auth-token --generate > /dev/null
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun --overlap -N1 -n1 -w "$head" ray start --head --port=6379 --num-cpus=64 --num-gpus=8 --block &
    sleep 30
    srun --overlap -N3 -n3 -x "$head" ray start --address="$head:6379" --num-cpus=64 --num-gpus=8 --block &
    srun --overlap -N1 -n1 -w "$head" relabel build IMAGES OUT --annotator MODEL --engine ray --address "$head:6379"

The shards have the same bytes as with the local engine if the same software on the same type of processor with the same number of
threads (`cpus_per_actor`) computes the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..extras import check_extra
from .engines import MakeAnnotator
from .ray_actors import Actors


@dataclass(frozen=True)
class RayEngine:
    """Engine that annotates on a Ray cluster. The docstring of the module shows the commands.

    Args:
        address: Address of the cluster: `"auto"` for the cluster of this machine, `"host:port"`, or `"ray://host:port"` to
            connect from outside, where source and output must have the same paths. Default: the environment variable
            `RAY_ADDRESS`, else a cluster on this machine, else a new cluster that ends with the build. Ignored if Ray is
            already initialized.
        num_actors: Maximum number of actors. Default: as many as the cluster has room for, more when nodes join.
        gpus_per_actor: Number of GPUs per actor, which may be a fraction. Default: 1 if the cluster has GPUs, else 0.
        cpus_per_actor: Number of CPUs, and of threads, per actor. Default: 1.

    Raises:
        ValueError: An argument is out of range.
        MissingExtraError: (an ImportError) Ray is not installed.

    Example:
        >>> build(source, "path/to/dataset", annotator, engine=RayEngine(num_actors=8))
    """

    address: str | None = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None
    cpus_per_actor: int = 1

    def __post_init__(self) -> None:
        for name, minimum in (("num_actors", 1), ("gpus_per_actor", 0), ("cpus_per_actor", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        check_extra("ray", "engine 'ray'")

    @contextmanager
    def start(self, make: MakeAnnotator) -> Iterator[Actors]:
        """Start the actors. They end with the `with` block, and so does a cluster that this call started.

        Args:
            make: Function that creates the annotator of an actor.

        Yields:
            Running actors.

        Raises:
            ConnectionError: There is no cluster at the address.
            TypeError: `make` cannot be pickled.
        """
        import ray

        is_started_here = not ray.is_initialized()
        if is_started_here:
            ray.init(address=self.address, include_dashboard=False if self.address is None else None)
        actors = Actors(make, self.num_actors, self.gpus_per_actor, self.cpus_per_actor)
        try:
            actors.wait_for_first()
            yield actors
        finally:
            actors.close()
            if is_started_here:
                ray.shutdown()
