"""Recipe of a run whose values are not given: values that fit the number of training images."""

from __future__ import annotations

import math
from typing import Any

from .recipe import Recipe

DERIVED = ("model", "image_size", "epochs", "batch_size", "learning_rate", "warmup_epochs", "mix_off_epochs")
_FEW, _MANY = 2_000, 100_000  # images


def default_recipe(num_images: int, **values: Any) -> Recipe:
    """Return a recipe whose values fit the number of training images, unless they are given.

    | value | rule |
    | --- | --- |
    | `model`, `image_size`, `epochs` | below 2,000 images resnet18, 64 px, 100; below 100,000 images resnet18, 128 px, 100; else those of the paper: resnet50, 224 px, 300 |
    | `batch_size` | the power of two nearest to `num_images / 32`, from 16 to 1024, and at most `num_images` |
    | `learning_rate` | 0.1 for SGD and 0.001 for other optimizers, times `batch_size / 256` where that is below 1 |
    | `warmup_epochs`, `mix_off_epochs` | a twentieth of the epochs, at most 5 |

    All other values are those of `Recipe`. A rule uses the given values: the warm-up follows given epochs.

    Args:
        num_images: Number of training images, at least 1.
        values: Values of the recipe that are given, by name of the attribute.

    Returns:
        The recipe.

    Raises:
        TypeError: A recipe has no such attribute.
        ValueError: A value is out of range or unknown.

    Example:
        >>> default_recipe(600, labels="single").batch_size
        16
    """
    recipe = Recipe().changed(warmup_epochs=0, mix_off_epochs=0, **_sizes(num_images))
    recipe = recipe.changed(batch_size=_batch_size(num_images)).changed(
        **{name: value for name, value in values.items() if name not in ("warmup_epochs", "mix_off_epochs")}
    )
    rate = 0.1 if "sgd" in recipe.optimizer.lower() else 0.001
    few_epochs = min(5, recipe.epochs // 20)
    derived = {
        "learning_rate": rate * min(1.0, recipe.batch_size / 256),
        "warmup_epochs": few_epochs,
        "mix_off_epochs": few_epochs,
    }
    return recipe.changed(**{**derived, **values})


def _sizes(num_images: int) -> dict[str, Any]:
    if num_images >= _MANY:
        return {}
    return {"model": "resnet18", "image_size": 64 if num_images < _FEW else 128, "epochs": 100}


def _batch_size(num_images: int) -> int:
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    nearest = round(math.log2(max(num_images / 32, 1)))
    return int(min(max(2**nearest, 16), 1024, 2 ** math.floor(math.log2(num_images))))
