"""Train a student on a dataset with label maps, on one device or under torchrun, with exact resume."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data.config import resolve_model_data_config
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.cuda import NativeScaler
from timm.utils.distributed import distribute_bn, init_distributed_device_so
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..annotate.annotator import Annotator
from ..data.datasets import RelabelDataset
from ..devices import find_device, widest_float
from ..keywords import checked_keywords
from ..storage.folders import local_path
from .checkpoints import EPOCH_START, Checkpoints, CsvLog
from .classifier import Classifier, Normalize, make_student
from .evaluation import LabeledImages, competing_classes, evaluate
from .loaders import train_loader
from .objective import Objective
from .recipe import Recipe, RuntimeConfig
from .seeds import seed_all
from .tokens import TokenStudent

logger = logging.getLogger(__name__)

STEPS, EPOCHS = "steps.csv", "epochs.csv"
_METRICS = ("top1", "top5", "ece", "real", "multi_label", "set_recall", "map")


@dataclass(frozen=True)
class TrainResult:
    """Result of `train_student`.

    Attributes:
        metrics: Metrics of the last epoch on the validation images, see `Metrics`. They are those of the moving average of the
            weights if the recipe has one.
        best: Top-1 accuracy of the best epoch, 0 to 1, or None without validation.
        folder: Folder with `model_best.pth.tar`, `last.pth.tar`, `steps.csv` and `epochs.csv`.
        seconds: Training time in seconds without validation, over all resumed parts.
    """

    metrics: Mapping[str, float]
    best: float | None
    folder: Path
    seconds: float


@checked_keywords()
def train_student(
    dataset: RelabelDataset,
    out: Path | str,
    recipe: Recipe = Recipe(),
    *,
    validation: LabeledImages | None = None,
    annotator: Annotator | None = None,
    runtime: RuntimeConfig = RuntimeConfig(),
) -> TrainResult:
    """Train a student from scratch, or resume the run in `out`.

    A run that was killed resumes from its last checkpoint and has the same losses as a run without interruption. Under torchrun,
    every rank must call this function. Each batch is divided among the ranks, so that a recipe has the same result on any number
    of ranks, except for batch norm, whose statistics are computed per rank.

    Args:
        dataset: Training dataset. Its transforms are replaced by those of the recipe.
        out: Folder of the run, a local path.
        recipe: Model, labels, augmentation and optimization. Default: `Recipe()`.
        validation: Images with classes to validate on, such as a `RelabelDataset` or the result of `open_images`. They need no
            label maps. Default: none.
        annotator: Annotator of distilled labels. Default: none.
        runtime: Use of the machine. Default: `RuntimeConfig()`.

    Returns:
        The metrics and the folder of the run.

    Raises:
        ValueError: Arguments do not fit together, `out` contains a run with another recipe, or the loss is not finite.

    Example:
        >>> dataset, validation = (load_dataset("imagenette-relabel", split=s) for s in ("train", "validation"))
        >>> train_student(dataset, "run", PRESETS["relabel-cutmix"].changed(model="resnet18", batch_size=256), validation=validation)
    """
    folder = local_path(out, "out=")
    folder.mkdir(parents=True, exist_ok=True)
    with _process_group(runtime.device) as (device, rank, world_size):
        run = _Run(dataset, folder, recipe, validation, annotator, runtime, device, rank, world_size)
        return run.fit()


@contextlib.contextmanager
def _process_group(device: str | None) -> Iterator[tuple[torch.device, int, int]]:
    """Yield (device, rank, world size). Under torchrun or srun, create the process group unless it exists."""
    name = str(find_device(device))
    if dist.is_available() and dist.is_initialized():
        current = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
        yield current, dist.get_rank(), dist.get_world_size()
        return
    if not _has_other_ranks():
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
        yield torch.device(name), 0, 1
        return
    group = init_distributed_device_so(name)
    try:
        yield torch.device(group["device"]), group["global_rank"], group["world_size"]
    finally:
        dist.destroy_process_group()


def _has_other_ranks() -> bool:
    """Return whether torchrun or srun started several processes. In a batch script, SLURM_NTASKS is the size of the job: timm would wait."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1


class _Run:
    """Training run on one rank."""

    def __init__(
        self,
        dataset: RelabelDataset,
        folder: Path,
        recipe: Recipe,
        validation: LabeledImages | None,
        annotator: Annotator | None,
        runtime: RuntimeConfig,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.recipe, self.runtime, self.folder, self.validation = recipe, runtime, folder, validation
        self.device, self.rank, self.world_size = device, rank, world_size
        self.model = make_student(recipe, len(dataset.classes)).to(device)
        if runtime.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        student: nn.Module = self.model
        grid = None
        if recipe.label_config.tokens:
            student = TokenStudent(self.model, recipe.model, recipe.image_size)
            grid = student.grid
        config = resolve_model_data_config(self.model)  # type: ignore[no-untyped-call]
        normalize = Normalize(config["mean"], config["std"], device, channels_last=runtime.channels_last)
        self.objective = Objective(recipe, dataset.classes, normalize, annotator=annotator)
        size = recipe.eval_size or recipe.image_size
        self.classifier = Classifier(
            self.model, len(dataset.classes), tuple(dataset.classes), (size, size), recipe.crop_pct,
            config["interpolation"], normalize, recipe.dtype,
        )  # fmt: skip
        if validation is not None:
            competing_classes(self.classifier, validation.classes, among=False)  # fail before the first epoch
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(self.model, recipe.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.momentum
        )
        self.scaler = NativeScaler(device.type) if recipe.dtype == "float16" else None  # type: ignore[no-untyped-call]
        self.loader, self.transforms = train_loader(
            dataset, recipe, interpolation=config["interpolation"], crop_size=self.objective.crop_size, grid=grid, rank=rank,
            world_size=world_size, num_workers=runtime.num_workers, window=runtime.window,
        )  # fmt: skip
        self.steps_per_epoch = len(self.loader)  # a resumed epoch's loader has fewer
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, "cosine", recipe.epochs, warmup_epochs=recipe.warmup_epochs, warmup_lr=1e-6,
            step_on_epochs=False, updates_per_epoch=self.steps_per_epoch,
        )  # fmt: skip
        self.checkpoints = Checkpoints(
            folder, recipe, self.model, self.optimizer, ema=self.ema, scaler=self.scaler, classes=tuple(dataset.classes)
        )
        self.student = self._wrap(student)
        self.seconds = 0.0

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.runtime.compile:
            model.compile()
        if self.world_size == 1:
            return model
        ids = None if self.device.type == "cpu" else [self.device.index]
        return DistributedDataParallel(model, device_ids=ids)

    def fit(self) -> TrainResult:
        """Train until the last epoch."""
        start = self.checkpoints.resume(self.device)
        self.seconds = start["seconds"]
        if self.rank == 0:
            self._open_logs((start["epoch"], start["step"]))
        if start["loader"] is not None:
            self.loader.load_state_dict(start["loader"])
        metrics: dict[str, float] = {}
        for epoch in range(start["epoch"], self.recipe.epochs):
            loss = self._train_epoch(epoch, start if epoch == start["epoch"] else EPOCH_START)
            is_due = epoch + 1 == self.recipe.epochs or (epoch + 1) % self.runtime.validate_every == 0
            metrics = self._validate() if is_due else {}
            if self.rank == 0:
                # Log first: resume can drop extra rows but cannot recover missing ones.
                self._log_epoch(epoch, loss, metrics)
                self.checkpoints.save_epoch(epoch, metrics.get("top1"), self.seconds)
                self.checkpoints.drop_steps()
        if self.rank == 0 and self._board is not None:
            self._board.close()
        if not metrics:  # the run was already complete
            metrics = self._validate()
        return TrainResult(metrics, self.checkpoints.best, self.folder, self.seconds)

    def _train_epoch(self, epoch: int, start: Mapping[str, Any]) -> float:
        """Train one epoch, beginning at the step of `start`, and return its mean loss."""
        step = start["step"]
        self.loader.set_epoch(epoch)
        self.transforms.set_epoch(epoch)
        self.objective.mixing = epoch < self.recipe.epochs - self.recipe.mix_off_epochs
        self.student.train()
        started, seconds_before, first_step = time.perf_counter(), self.seconds, step
        # [sum, count] of losses: of the epoch over all ranks, and of this rank since the last row of steps.csv.
        total, window = (
            torch.tensor(start[name], device=self.device, dtype=widest_float(self.device))
            for name in ("losses", "window")
        )
        if self.rank > 0:
            window.zero_()
        with self._bar(epoch, step) as bar:
            # After a checkpoint at the last step, no batch is left, and the state of the loader is that of the next epoch.
            for images, targets in self.loader if step < self.steps_per_epoch else ():
                loss = self._step(epoch, step, images, targets)
                step += 1
                window += torch.stack([loss.to(window.dtype), torch.ones_like(loss, dtype=window.dtype)])
                self.seconds = seconds_before + time.perf_counter() - started
                if step % self.runtime.log_every == 0:
                    total += self._sum_over_ranks(window, epoch, step)
                    if self.rank == 0:
                        steps_per_second = (step - first_step) / (self.seconds - seconds_before)
                        self._log_step(epoch, step, window, steps_per_second, bar)
                    window.zero_()
                if self.runtime.save_every and step % self.runtime.save_every == 0:
                    self._sum_over_ranks(window, epoch, step)
                    if self.rank == 0:
                        self.checkpoints.save_step(
                            epoch, step, loader=self.loader.state_dict(), losses=total.tolist(),
                            window=window.tolist(), seconds=self.seconds,
                        )  # fmt: skip
                    else:
                        window.zero_()  # as after a resume: rank 0 has the sum
                bar.update()
        total += self._sum_over_ranks(window, epoch, step)
        return float(total[0] / total[1])

    def _sum_over_ranks(self, window: Tensor, epoch: int, step: int) -> Tensor:
        """Sum `window`, [sum, count] of losses, over all ranks in-place.

        Raises:
            ValueError: The sum is not finite.
        """
        if self.world_size > 1:
            dist.all_reduce(window)
        if not bool(window.isfinite().all()):
            raise ValueError(
                f"the loss is {float(window[0])} at epoch {epoch}, step {step}: lower learning_rate=, or set clip_grad=, such as 1"
            )
        return window

    def _step(self, epoch: int, step: int, images: Tensor, targets: Any) -> Tensor:
        """Train one step and return the loss."""
        seed_all(self.recipe.seed, epoch, step, self.rank)
        updates = epoch * self.steps_per_epoch + step
        self.schedule.step_update(updates)
        loss = self.objective.loss(self.student, images, targets)
        self.optimizer.zero_grad()
        clip = self.recipe.clip_grad
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=clip, parameters=self.model.parameters())
        else:
            torch.autograd.backward(loss)
            if clip is not None:
                dispatch_clip_grad(self.model.parameters(), clip)
            self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=updates)
        return loss.detach()

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        model = self.model if self.ema is None else self.ema.module
        if self.world_size > 1:  # batch norm statistics differ between ranks: use those of rank 0
            distribute_bn(model, self.world_size)  # type: ignore[no-untyped-call]
        return evaluate(
            replace(self.classifier, model=model),
            self.validation,
            batch_size=self.recipe.batch_size // self.world_size,
            num_workers=self.runtime.num_workers,
        )

    def _bar(self, epoch: int, step: int) -> tqdm[Any]:
        return tqdm(
            total=self.steps_per_epoch, initial=step, desc=f"epoch {epoch + 1} of {self.recipe.epochs}", unit="step",
            leave=False, disable=self.rank > 0 or not self.runtime.progress,
        )  # fmt: skip

    def _open_logs(self, start: tuple[int, int]) -> None:
        steps = ("epoch", "step", "loss", "learning_rate", "images_per_second")
        epochs = ("epoch", "step", "loss", *_METRICS, "seconds")
        self._steps = CsvLog(self.folder / STEPS, steps, start)
        self._epochs = CsvLog(self.folder / EPOCHS, epochs, (start[0] - 1, self.steps_per_epoch))
        self._board: Any = None
        if self.runtime.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # of an extra

            self._board = SummaryWriter(str(self.folder), purge_step=start[0] * self.steps_per_epoch + start[1])

    def _log_step(self, epoch: int, step: int, window: Tensor, steps_per_second: float, bar: tqdm[Any]) -> None:
        loss = float(window[0] / window[1])
        rate = self.optimizer.param_groups[0]["lr"]
        per_second = steps_per_second * self.recipe.batch_size
        bar.set_postfix_str(f"loss {loss:.3f}, {per_second:.0f} images/s")
        values = {"loss": loss, "learning_rate": rate, "images_per_second": per_second}
        self._steps.add({"epoch": epoch, "step": step, **values})
        self._write_board("train", values, epoch * self.steps_per_epoch + step)

    def _log_epoch(self, epoch: int, loss: float, metrics: Mapping[str, float]) -> None:
        values = {"loss": loss, **metrics, "seconds": self.seconds}
        self._epochs.add({"epoch": epoch, "step": self.steps_per_epoch, **values})
        self._write_board("epoch", values, (epoch + 1) * self.steps_per_epoch)
        shown = "".join(f", {name} {value:.1%}" for name, value in metrics.items() if name != "ece")
        epochs_left = self.recipe.epochs - epoch - 1
        if epochs_left:
            shown += f", {tqdm.format_interval(self.seconds / (epoch + 1) * epochs_left)} of training left"
        logger.info("epoch %d of %d: loss %.3f%s", epoch + 1, self.recipe.epochs, loss, shown)

    def _write_board(self, topic: str, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{topic}/{name}", value, step)
            self._board.flush()
