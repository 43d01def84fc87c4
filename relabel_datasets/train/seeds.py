"""Random numbers as pure functions of (seed, epoch, step or sample): a run that is resumed draws what it would have drawn.

No generator's state has to be kept: each sample's crop and each step's mixing starts from a seed of its own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..labels.compose import run_pipeline, run_until_pooling
from ..labels.label_map import LabelMap
from ..labels.transforms import LabelPooling


def seed_all(*place: object) -> None:
    """Seed what torch, NumPy and Python draw from, by any values that tell where training is."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes 0.2 ms where CUDA is not in use
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  timm draws from it
    random.seed(number)


class SeededTransforms:
    """Transforms whose random numbers depend on the seed, the epoch and the sample alone, in any worker.

    Args:
        transforms: called with (image, label map).
        seed: of the run.
    """

    def __init__(self, transforms: Callable[..., Any], seed: int) -> None:
        self._transforms = transforms
        self._seed = seed
        # Shared with workers, which have copies of all else and live through several epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, before its first sample is asked for."""
        self._epoch[0] = epoch

    def __call__(self, image: Any, label_map: LabelMap) -> Any:
        return run_pipeline(self, image, label_map)

    def run_until_pooling(self, image: Any, label_map: LabelMap) -> tuple[Any, LabelPooling | None]:
        """See `compose.run_until_pooling`."""
        seed_all(self._seed, int(self._epoch), label_map.key)
        return run_until_pooling(self._transforms, image, label_map)
