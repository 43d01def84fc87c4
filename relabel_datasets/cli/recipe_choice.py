"""Choose the recipe of a run: a named preset, or values that fit the number of training images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..train.recipe import PRESETS, Recipe
from .student_options import recipe_values

AUTO = "auto"
_FILE = "derived.json"


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Add `--preset`."""
    parser.add_argument(
        "--preset", choices=[AUTO, *PRESETS], default=AUTO,
        help=f"recipe to start from. {AUTO} fits model, image size, epochs, batch size, learning rate and warm-up to the number of "
        "training images; a named preset has exactly the values of its publication, such as 300 epochs at batch size 1024 for "
        "relabel (default: %(default)s)",
    )  # fmt: skip


def recipe_from(args: argparse.Namespace, num_images: int) -> Recipe:
    """Create the recipe of `relabel train`, and print the values that were derived from the number of images.

    Derived values are written to `derived.json` in the folder of the run. A run that is resumed keeps them.

    Args:
        args: Parsed arguments with `preset`, `out` and the values of the recipe.
        num_images: Number of training images.

    Returns:
        The recipe.

    Raises:
        ValueError: A value is out of range.
    """
    if args.preset != AUTO:
        return PRESETS[args.preset].changed(**recipe_values(args))
    return derived_recipe(args.out, num_images, recipe_values(args))


def derived_recipe(folder: Path, num_images: int, values: Mapping[str, Any]) -> Recipe:
    """Create the default recipe, see `default_recipe`, with the derived values of an existing run in `folder`.

    Args:
        folder: Folder of the run or of several runs.
        num_images: Number of training images.
        values: Values that are given.

    Returns:
        The recipe.

    Raises:
        ValueError: A value is out of range, or `derived.json` is corrupt.
    """
    from ..storage.local import write_atomically
    from ..train.defaults import DERIVED, default_recipe

    derived_names = [name for name in DERIVED if name not in values]
    path = folder / _FILE
    before = _read(path) if any(folder.glob("**/*.pth.tar")) else {}
    kept = {name: before[name] for name in derived_names if name in before}
    recipe = default_recipe(num_images, **{**kept, **values})
    derived = {name: getattr(recipe, name) for name in derived_names}
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(derived, indent=1) + "\n").encode())
        options = " ".join(f"--{name.replace('_', '-')} {value:g}" if isinstance(value, float)
                           else f"--{name.replace('_', '-')} {value}" for name, value in derived.items())  # fmt: skip
        source = "as in the run that is resumed" if kept else f"for {num_images:,} training images"
        sys.stderr.write(f"recipe {source}: {options}; override with --epochs and so on, or choose a --preset\n")
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): delete it, and give the values of the run as options"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold an object of recipe values: delete it, and give the values of the run as options"
        )
    return content
