"""The Trainer of transformers: `train_dataset=`, `get_train_dataloader`, and `resume_from_checkpoint`."""

import warnings

import torch
from transformers import Trainer, TrainingArguments

from tests.data.stacks.common import BATCH, LOADERS, OUT, dataset, record, stream, write

DATASETS = {"DataLoader(dataset)": dataset, "DataLoader(stream)": stream}


class Model(torch.nn.Module):
    """One weight; keeps the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, numbers):
        self.seen.append(numbers.tolist())
        return {"loss": self.weight.sum() * 0}


def collate(samples):
    return {"numbers": torch.tensor(samples)}


class WithLoader(Trainer):
    """Overrides `get_train_dataloader`."""

    make, prepares = None, True

    def get_train_dataloader(self):
        loader = self.make(collate_fn=collate)
        return self.accelerator.prepare(loader) if self.prepares else loader


def trainer(name, num_epochs, cls=Trainer, train_dataset=None, **options):
    arguments = TrainingArguments(
        OUT / name.replace(" ", ""), per_device_train_batch_size=BATCH, num_train_epochs=num_epochs, use_cpu=True,
        report_to=[], disable_tqdm=True, remove_unused_columns=False, ddp_backend="gloo", logging_strategy="no",
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return cls(Model(), arguments, data_collator=collate, train_dataset=train_dataset)


def epochs_of(trained):
    """Return the batches of each epoch."""
    seen, length = trained.model.seen, int(trained.state.global_step / trained.args.num_train_epochs)
    return [seen[start : start + length] for start in range(0, len(seen), length)]


def train(name, make_dataset=None, make_loader=None, prepares=True, num_epochs=2, **options):
    cls = type("Bound", (WithLoader,), {"make": staticmethod(make_loader), "prepares": prepares})
    if make_loader is None:
        trained = trainer(name, num_epochs, train_dataset=make_dataset(), **options)
    else:
        trained = trainer(name, num_epochs, cls, train_dataset=dataset(), **options)
    trained.train()
    return epochs_of(trained)


def resumed(name, step, make_dataset=None, make_loader=None, prepares=True, **options):
    """Train three epochs, and again from the checkpoint of a step."""
    cls = type("Bound", (WithLoader,), {"make": staticmethod(make_loader), "prepares": prepares})
    seen = []
    for path in (None, OUT / name.replace(" ", "") / f"checkpoint-{step}"):
        saves = {"save_strategy": "steps", "save_steps": 1} if path is None else {}
        if make_loader is None:
            trained = trainer(name, 3, train_dataset=make_dataset(), **saves, **options)
        else:
            trained = trainer(name, 3, cls, train_dataset=dataset(), **saves, **options)
        trained.train(resume_from_checkpoint=None if path is None else str(path))
        seen.append([[batch] for batch in trained.model.seen])
    return seen


def main():
    warnings.filterwarnings("ignore", category=UserWarning)
    for name, make in DATASETS.items():
        for workers in (0, 2):
            cell = f"{name} | {workers} workers"
            record(f"train_dataset | {cell}", train, cell, make, dataloader_num_workers=workers)
            config = {"dispatch_batches": False}
            record(
                f"train_dataset | {cell} | dispatch_batches=False",
                train,
                cell,
                make,
                dataloader_num_workers=workers,
                accelerator_config=config,
            )
        for step in (2, 3, 7):
            record(f"resumed | {name} | {step}", resumed, f"{name}{step}", step, make)
        record(f"resumed | {name} | ignore_data_skip", resumed, f"{name}all", 7, make, ignore_data_skip=True)
    for name, make in LOADERS.items():
        for prepares in (True, False):
            label = "prepared" if prepares else "as it is"
            record(f"get_train_dataloader | {name} | {label}", train, name, None, make, prepares)
            record(f"resumed | {name} | {label}", resumed, f"{name}{label}", 7, None, make, prepares)
    write()


if __name__ == "__main__":
    main()
