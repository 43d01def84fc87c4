"""Files of a training run: checkpoints for resuming, the best and the last weights, and CSV logs."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.cuda import NativeScaler
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from ..compatibility import safe_globals
from ..storage.folders import local_path
from ..storage.local import explaining_full_disk, write_atomically
from .recipe import Recipe

# Progress at the start of an epoch. `losses` and `window` are [sum, count] of the losses of the epoch and since the last row of steps.csv.
EPOCH_START: dict[str, Any] = {"step": 0, "loader": None, "losses": [0.0, 0.0], "window": [0.0, 0.0]}
LAST, BEST = "last.pth.tar", "model_best.pth.tar"  # timm's names


class _Saver(CheckpointSaver):
    """timm's checkpoint saver with atomic writes, so that a kill or a full disk never loses the last or best checkpoint."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with _removed_on_error(Path(save_path)) as path, path.open("wb") as file:  # a temporary name: timm renames it
            try:
                super()._save(file, epoch, metric)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch raises a RuntimeError in its place
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, src: str, dst: str) -> None:
        Path(src).replace(dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with _removed_on_error(Path(f"{dst}.tmp")) as copy:
            super()._duplicate(src, str(copy))  # type: ignore[no-untyped-call]
        self._replace(f"{dst}.tmp", dst)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[Path]:
    """Remove a partially written file on any error, and explain a full disk."""
    try:
        with explaining_full_disk(path):
            yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class Checkpoints:
    """Checkpoints of a run in timm's format: the last, the best, and recovery checkpoints within an epoch.

    Besides weights and optimizer, each contains the progress of the run: epoch, step, and the state of the loader.

    Args:
        folder: Folder of the run.
        recipe: Recipe of the run. A run with another recipe is not resumed.
        model: Model whose weights are saved.
        optimizer: Optimizer of the model.
        ema: Moving average of the weights, or None.
        scaler: Gradient scaler of float16 training, or None.
        classes: Names of the classes, saved with the weights.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ema: ModelEmaV3 | None,
        scaler: NativeScaler | None,
        classes: tuple[str, ...],
    ) -> None:
        self._folder, self._recipe = folder, recipe
        self._model, self._optimizer, self._ema, self._scaler = model, optimizer, ema, scaler
        self._args = argparse.Namespace(
            model=recipe.model,
            recipe={**asdict(recipe), "model_kwargs": dict(recipe.model_kwargs)},
            classes=list(classes),
        )
        self._saver = _Saver(
            model,
            optimizer,
            args=self._args,
            model_ema=ema,
            amp_scaler=scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=1,
        )  # type: ignore[no-untyped-call]

    @property
    def best(self) -> float | None:
        """Best metric so far, or None."""
        best: float | None = self._saver.best_metric
        return best

    def save_epoch(self, epoch: int, metric: float | None, seconds: float) -> None:
        """Save the state after an epoch, and as the best checkpoint if `metric` is the best so far.

        Args:
            epoch: Epoch that ended, counted from 0.
            metric: Validation metric, or None if the epoch was not validated.
            seconds: Training time so far.
        """
        self._args.progress = {"epoch": epoch + 1, **EPOCH_START, "seconds": seconds}
        self._saver.save_checkpoint(epoch, metric)  # type: ignore[no-untyped-call]

    def save_step(self, epoch: int, step: int, **progress: Any) -> None:
        """Save the state within an epoch, after `step` steps.

        Args:
            epoch: Current epoch, counted from 0.
            step: Number of steps done in the epoch.
            progress: The other values of `EPOCH_START`, and `seconds`.
        """
        self._args.progress = {"epoch": epoch, "step": step, **progress}
        self._saver.save_recovery(epoch, step)  # type: ignore[no-untyped-call]

    def resume(self, device: torch.device) -> dict[str, Any]:
        """Load the most advanced checkpoint.

        Args:
            device: Device of the weights.

        Returns:
            The progress of that checkpoint: `epoch`, `seconds`, and the values of `EPOCH_START`.

        Raises:
            ValueError: The checkpoint has another recipe or other classes, or is corrupt.
        """
        paths = (*self._folder.glob("recovery-*.pth.tar"), self._folder / LAST)
        checkpoints = [(_progress(path), path) for path in paths]
        states = [
            (progress["epoch"], progress["step"], str(path)) for progress, path in checkpoints if progress is not None
        ]
        if not states:
            return {"epoch": 0, "seconds": 0.0, **EPOCH_START}
        path = max(states)[2]
        state = load_checkpoint(path, device)
        current = self._args.recipe
        # A value that the run's release did not have yet had the effect of today's default.
        saved = {**{name: getattr(Recipe(), name) for name in current}, **state["args"].recipe}
        if changed := sorted(name for name in current if saved.get(name) != current[name]):
            raise ValueError(
                f"{self._folder} contains a run with another recipe: "
                + ", ".join(f"{name}={saved.get(name)!r} in that run, {current[name]!r} now" for name in changed)
                + ". Choose another folder, or use the same recipe"
            )
        if state["args"].classes != self._args.classes:
            raise ValueError(
                f"{self._folder} contains a run on a dataset with other classes: choose another folder, or use that dataset"
            )
        unwrap_model(self._model).load_state_dict(state["state_dict"])  # type: ignore[no-untyped-call]
        self._optimizer.load_state_dict(state["optimizer"])
        if self._ema is not None:
            unwrap_model(self._ema).load_state_dict(state["state_dict_ema"])  # type: ignore[no-untyped-call]
        if self._scaler is not None:
            self._scaler.load_state_dict(state[self._scaler.state_dict_key])  # type: ignore[no-untyped-call]
        self._saver.load_state_dict(state["saver"])  # type: ignore[no-untyped-call]
        return {"seconds": 0.0, **EPOCH_START, **state["args"].progress}

    def drop_steps(self) -> None:
        """Delete the recovery checkpoints of finished epochs."""
        for path in self._folder.glob("recovery-*.pth.tar"):
            path.unlink()


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """Load a checkpoint of `train_student`. Only tensors and plain values are unpickled, never code.

    Args:
        path: Checkpoint file.
        device: Device of the tensors. Default: the CPU.
        mmap: Whether to leave tensors on disk until they are used. Default: False.

    Returns:
        The content in timm's format: `state_dict`, `state_dict_ema`, `optimizer`, `args` and so on.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint of `train_student`, or is corrupt.
    """
    path = local_path(path, "the checkpoint")
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: check the path. A training run writes {BEST} and {LAST} to its folder"
        )
    with safe_globals([argparse.Namespace]):
        try:
            state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        except Exception as error:  # any type, from a bad zip file to a pickle that is not allowed
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{path} is not a checkpoint of a training run, or is corrupt: delete it to resume the run from its previous "
                f"checkpoint. {reason}"
            ) from error
    if not isinstance(state, dict) or not hasattr(state.get("args"), "recipe"):
        raise ValueError(
            f"{path} is not a checkpoint of `relabel train`, because it contains no recipe: choose a {BEST} or {LAST}"
        )
    return state


def _progress(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    progress: dict[str, Any] = load_checkpoint(path, mmap=True)["args"].progress
    return progress


class CsvLog:
    """CSV file with one row per logged step or epoch. Rows after the point where a run resumes are dropped.

    Args:
        path: File to write.
        columns: Column names. The first two are `epoch` and `step`.
        start: (epoch, step) at which the run starts or resumes.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], start: tuple[int, int]) -> None:
        self._path, self._columns = path, columns
        rows = [",".join(columns)]
        if path.is_file():
            complete = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a kill may have truncated the last row
            kept = [
                row for row in csv.DictReader(complete.splitlines()) if (int(row["epoch"]), int(row["step"])) <= start
            ]
            rows += [",".join(row[name] for name in columns) for row in kept]
        write_atomically(path, ("\n".join(rows) + "\n").encode())

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a row. Columns without a value are empty."""
        with explaining_full_disk(self._path), self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([_text(values.get(name, "")) for name in self._columns])


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
