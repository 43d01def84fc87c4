"""Lightning: `Trainer.fit`, also with limited batches, reloaded loaders, and resumed within an epoch."""

import logging
import os
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from tests.data.stacks.common import LOADERS, OPTIONS, OUT, record, write

WORLD = int(os.environ["WORLD_SIZE"])


class Model(lightning.LightningModule):
    """One weight; keeps the samples of each epoch."""

    def __init__(self, make=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.make = {}, make

    def training_step(self, batch, index):
        self.seen.setdefault(self.current_epoch, []).append(batch.tolist())
        return self.weight.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Reloading(Model):
    """Makes its loader by itself, in each epoch."""

    def train_dataloader(self):
        return self.make()


def trainer(num_epochs, **options):
    return lightning.Trainer(
        accelerator="cpu", devices=WORLD, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=num_epochs,
        plugins=[TorchElasticEnvironment()], logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=OUT, **{"enable_checkpointing": False, **options},
    )  # fmt: skip


def fit(make, num_epochs=2, loader_options=None, **options):
    model = Model()
    trainer(num_epochs, **options).fit(model, make(**(loader_options or {})))
    return list(model.seen.values())


def reloaded(make):
    model = Reloading(make)
    trainer(3, reload_dataloaders_every_n_epochs=1).fit(model)
    return list(model.seen.values())


def resumed(name, make, num_steps, loader_options=None, every=1, **options):
    """Stop after some steps, and resume from the checkpoint with a new loader for the rest of four epochs."""
    folder = OUT / name.replace(" ", "")
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    first, second = Model(), Model()
    loader_options = loader_options or {}
    trainer(4, enable_checkpointing=True, callbacks=[keep], **options).fit(first, make(**loader_options))
    trainer(4, **options).fit(second, make(**loader_options), ckpt_path=folder / f"step={num_steps}.ckpt")
    return [list(first.seen.values()), list(second.seen.values())]


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name, make in LOADERS.items():
        for label, options in list(OPTIONS.items())[:2]:
            record(f"fit | {name} | {label}", fit, make, loader_options=options)
        record(f"limited | {name}", fit, make, 3, limit_train_batches=2)
        record(f"reloaded | {name}", reloaded, make)
        if name.startswith("RelabelLoader"):
            for label, options in list(OPTIONS.items())[:2]:
                record(f"resumed | {name} | {label}", resumed, f"{name}{label}", make, 3, options)
            record(f"resumed later | {name}", resumed, f"{name}later", make, 8)
            record(f"resumed at the end | {name}", resumed, f"{name}end", make, 5)
            record(f"resumed limited | {name}", resumed, f"{name}limited", make, 3, limit_train_batches=2)
        write()


if __name__ == "__main__":
    main()
