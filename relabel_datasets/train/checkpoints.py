"""What a run keeps on disk: checkpoints to go on from, the best and the last weights, and its curves."""

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

from ..storage.folders import local_path
from ..storage.local import explaining_full_disk, write_atomically
from .recipe import Recipe

# Of an epoch: the step, the state of the loader, and sums and numbers of losses: of all, and since the last line of steps.csv.
BEGINNING: dict[str, Any] = {"step": 0, "loader": None, "losses": [0.0, 0.0], "window": [0.0, 0.0]}
LAST, BEST = "last.pth.tar", "model_best.pth.tar"  # timm's names


class _Saver(CheckpointSaver):
    """timm's saver, with atomic files: neither a kill nor a full disk leaves a run without its last or best checkpoint."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with _whole_file(Path(save_path)) as path, path.open("wb") as file:  # a temporary name: timm renames it
            try:
                super()._save(file, epoch, metric)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides it
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, src: str, dst: str) -> None:
        Path(src).replace(dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with _whole_file(Path(f"{dst}.tmp")) as copy:
            super()._duplicate(src, str(copy))  # type: ignore[no-untyped-call]
        self._replace(f"{dst}.tmp", dst)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Remove a file that could not be written to its end, and explain a full disk."""
    try:
        with explaining_full_disk(path):
            yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class Checkpoints:
    """The checkpoints of a run, in timm's format: `last`, `model_best`, and `resume` from within an epoch.

    Each has, beside weights and optimizer, where training is: its epoch, the step within it, and the loader's state.

    Args:
        folder: of the run.
        recipe: of the run; another one is refused when a run is resumed.
        model: whose weights are kept.
        optimizer: of the model.
        ema: moving average of the weights, if there is one.
        scaler: of gradients, if there is one.
        classes: names of the classes, kept for those who use the weights.
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
        """The best metric so far."""
        best: float | None = self._saver.best_metric
        return best

    def save_epoch(self, epoch: int, metric: float | None, seconds: float) -> None:
        """Keep the state after an epoch and so many seconds of training, and as the best if its metric is."""
        self._args.progress = {"epoch": epoch + 1, **BEGINNING, "seconds": seconds}
        self._saver.save_checkpoint(epoch, metric)  # type: ignore[no-untyped-call]

    def save_step(self, epoch: int, step: int, **progress: Any) -> None:
        """Keep the state within an epoch, after so many of its steps; `progress` is what `BEGINNING` has, and `seconds`."""
        self._args.progress = {"epoch": epoch, "step": step, **progress}
        self._saver.save_recovery(epoch, step)  # type: ignore[no-untyped-call]

    def resume(self, device: torch.device) -> dict[str, Any]:
        """Go on from the state that has come farthest; return where that is: `epoch`, `seconds`, and what `BEGINNING` has.

        Raises:
            ValueError: it is of another recipe or of other classes, or damaged.
        """
        found = [(_progress(path), path) for path in (*self._folder.glob("recovery-*.pth.tar"), self._folder / LAST)]
        states = [(progress["epoch"], progress["step"], str(path)) for progress, path in found if progress is not None]
        if not states:
            return {"epoch": 0, "seconds": 0.0, **BEGINNING}
        path = max(states)[2]
        state = load_checkpoint(path, device)
        theirs, ours = state["args"].recipe, self._args.recipe
        if other := sorted(name for name in ours if theirs.get(name) != ours[name]):
            raise ValueError(
                f"{self._folder} is a run of another recipe: "
                + ", ".join(f"{name} is {theirs.get(name)!r} there, {ours[name]!r} here" for name in other)
                + ". Choose another folder, or give the same recipe"
            )
        if state["args"].classes != self._args.classes:
            raise ValueError(f"{self._folder} is a run on other classes than the dataset has: choose another folder")
        unwrap_model(self._model).load_state_dict(state["state_dict"])  # type: ignore[no-untyped-call]
        self._optimizer.load_state_dict(state["optimizer"])
        if self._ema is not None:
            unwrap_model(self._ema).load_state_dict(state["state_dict_ema"])  # type: ignore[no-untyped-call]
        if self._scaler is not None:
            self._scaler.load_state_dict(state[self._scaler.state_dict_key])  # type: ignore[no-untyped-call]
        self._saver.load_state_dict(state["saver"])  # type: ignore[no-untyped-call]
        return {"seconds": 0.0, **BEGINNING, **state["args"].progress}

    def drop_steps(self) -> None:
        """Delete the states within epochs that are over."""
        for path in self._folder.glob("recovery-*.pth.tar"):
            path.unlink()


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """Return the state in a checkpoint, of which nothing but tensors and plain values is ever loaded.

    Args:
        path: of the file.
        device: where its tensors go.
        mmap: leave tensors on disk until they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no checkpoint of `train`.
    """
    path = local_path(path, "the checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: a run writes {BEST} and {LAST} into its folder")
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        except Exception as error:  # of many kinds, from a bad zip file to a pickle that is not allowed
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{path} is no checkpoint of a training run, or damaged; a run without the file goes on from the one before, "
                f"or from its beginning. {reason}"
            ) from error
    if not isinstance(state, dict) or not hasattr(state.get("args"), "recipe"):
        raise ValueError(f"{path} is no checkpoint of `relabel train`: it has no recipe")
    return state


def _progress(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    progress: dict[str, Any] = load_checkpoint(path, mmap=True)["args"].progress
    return progress


class Curve:
    """A CSV file with a line for each step or epoch; what is later than a run's new start is dropped.

    Args:
        path: of the file.
        columns: names, of which the first two are `epoch` and `step`.
        start: (epoch, step) that the run starts or goes on from.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], start: tuple[int, int]) -> None:
        self._path, self._columns = path, columns
        rows = [",".join(columns)]
        if path.is_file():
            whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a kill may have cut the last line
            kept = [row for row in csv.DictReader(whole.splitlines()) if (int(row["epoch"]), int(row["step"])) <= start]
            rows += [",".join(row[name] for name in columns) for row in kept]
        write_atomically(path, ("\n".join(rows) + "\n").encode())

    def add(self, values: Mapping[str, Any]) -> None:
        """Write a line; what is missing is empty."""
        with explaining_full_disk(self._path), self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([_text(values.get(name, "")) for name in self._columns])


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
