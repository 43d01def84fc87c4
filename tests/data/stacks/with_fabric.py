"""Fabric: `setup_dataloaders`, also resumed within an epoch; torchdata and plain DataLoaders without a framework."""

import os

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy

from tests.data.stacks.common import LOADERS, OPTIONS, SPAWNED, read, record, write


def resumed(fabric, make):
    """Resume from a state within epoch 5; Fabric counts iterations from 0."""
    first, second = make(), make()
    first.set_epoch(5)
    batches = iter(first)
    next(batches)
    second.load_state_dict(first.state_dict())
    return [
        [[batch.tolist() for batch in batches], *read(first)],
        read(fabric.setup_dataloaders(second), 3),
    ]


def main():
    fabric = Fabric(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=DDPStrategy(process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
    )  # fmt: skip
    fabric.launch()
    for name, make in LOADERS.items():
        for label, options in OPTIONS.items():
            record(f"epochs | {name} | {label}", read, fabric.setup_dataloaders(make(**options)))
            if name != "DataLoader(dataset)":  # torch's own loader splits nothing
                record(f"torchrun | {name} | {label}", read, make(**options))
        if name.startswith("RelabelLoader"):
            record(f"resumed | {name}", resumed, fabric, make)
    record("torchrun | RelabelLoader(stream) | spawned", read, LOADERS["RelabelLoader(stream)"](**SPAWNED))
    write()


if __name__ == "__main__":
    main()
