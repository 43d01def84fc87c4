"""Catalog of timm models that can annotate, made by running each model with random weights."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..words import counted
from .annotator import check_size
from .timm_models import create_model, make_dense

EXACT, APPROXIMATE, REFUSED = "exact", "approximate", "refused"

# Words for sizes in model names, smallest first.
_SIZES = [
    "test",
    "atto",
    "femto",
    "pico",
    "zepto",
    "nano",
    "050",
    "035",
    "xxtiny",
    "xxs",
    "tiny_window",
    "tiny",
    "mini",
    "pwee",
    "xs",
    "0",
    "t0",
    "s0",
    "m0",
    "b0",
    "m1",
    "p10",
    "small",
    "s12",
    "t",
    "ti",
    "s",
    "12",
    "18",
    "small_224",
    "26",
    "lite",
    "34",
    "48",
    "50",
    "68",
    "b",
    "base",
    "l",
    "large",
]
# Cheapest models that the names do not reveal.
_CHEAPEST = {
    "cait": "cait_xxs24_224",
    "densenet": "densenet121",
    "eva": "eva02_tiny_patch14_224",
    "gemma4_vit": "gemma4_vit_167m",
    "levit": "levit_128s",
    "naflexvit": "naflexvit_base_patch16_gap",
    "senet": "legacy_seresnet18",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
}


@dataclass(frozen=True)
class AnnotatorEntry:
    """Suitability of a timm model as an annotator.

    Attributes:
        module: Name of the timm module, a family of models.
        model: Name of the model.
        input_size: (height, width) in pixels of the input.
        grid: (height, width) of the maps, or None if the model is refused.
        head: `"exact"` if the mean over a local map equals the logits of the model, `"approximate"` if not, `"refused"` if the
            model has no map.
        reason: Reason for a refusal, or a remark. May be empty.
        stride: Size of a location in pixels: `"32"`, `"12x16"` if it is not square, or empty if the model is refused.
    """

    module: str
    model: str
    input_size: tuple[int, int]
    grid: tuple[int, int] | None
    head: str
    reason: str = ""

    @property
    def stride(self) -> str:
        """Size of a location in pixels: `"32"`, `"12x16"` if it is not square, or empty if the model is refused."""
        if self.grid is None:
            return ""
        height, width = (f"{side / cells:.3g}" for side, cells in zip(self.input_size, self.grid, strict=True))
        return height if height == width else f"{height}x{width}"

    def to_json(self) -> dict[str, Any]:
        """Convert the entry to JSON values.

        Returns:
            Fields of the entry and its stride.
        """
        return {**asdict(self), "stride": self.stride}


def describe_annotators(
    pattern: str | None = None, *, input_size: int | Sequence[int] | None = None, progress: bool = True
) -> list[AnnotatorEntry]:
    """Test timm models as annotators by running each with random weights on the CPU.

    Args:
        pattern: Model name with wildcards, such as `"convnext*"`. Default: one small model of each timm module.
        input_size: (height, width) in pixels, or an int for both. Default: that of each model.
        progress: Whether to show a progress bar on stderr. Default: True.

    Returns:
        Entries sorted by module and model.

    Raises:
        ValueError: No model name matches the pattern.

    Example:
        >>> describe_annotators("test_resnet", progress=False)
        [AnnotatorEntry(module='resnet', model='test_resnet', input_size=(160, 160), grid=(5, 5), head='exact', reason='')]
    """
    import timm  # slow import

    size = None if input_size is None else check_size(input_size)
    names = cheap_models() if pattern is None else timm.list_models(pattern)
    if not names:
        raise ValueError(f"no timm model matches {pattern!r}: use a name with wildcards, such as 'convnext*'")
    with _quiet(), tqdm(names, disable=not progress, unit="model") as bar:
        entries = []
        for name in bar:
            bar.set_postfix_str(name)
            entries.append(_try_model(name, size))
    return sorted(entries, key=lambda entry: (entry.module, entry.model))


def format_annotators(entries: Sequence[AnnotatorEntry]) -> str:
    """Format entries as a Markdown table followed by totals.

    Args:
        entries: Results of `describe_annotators`.

    Returns:
        Markdown text.
    """
    lines = ["| module | model | input | grid | stride | head | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for entry in entries:
        grid = "" if entry.grid is None else f"{entry.grid[0]}x{entry.grid[1]}"
        size = f"{entry.input_size[0]}x{entry.input_size[1]}"
        cells = (entry.module, entry.model, size, grid, entry.stride, entry.head, entry.reason.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    heads = Counter(entry.head for entry in entries)
    covered = {entry.module for entry in entries if entry.head != REFUSED}
    modules = {entry.module for entry in entries}
    totals = ", ".join(f"{heads[head]} {head}" for head in (EXACT, APPROXIMATE, REFUSED))
    lines += [
        "",
        f"{len(covered)} of {counted(len(modules), 'module')} covered; of {counted(len(entries), 'model')}, {totals}",
        "",
    ]
    return "\n".join(lines)


def cheap_models() -> list[str]:
    """Return one model of each timm module, one of the smallest as far as the names reveal.

    Returns:
        Sorted model names.
    """
    import timm

    cheapest = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            known = _CHEAPEST.get(module)
            cheapest[module] = known if known in names else min(names, key=_rank)
    return sorted(set(cheapest.values()))


def _rank(name: str) -> tuple[int, int, str]:
    words = re.split(r"[_.]", name)
    ranks = [_SIZES.index(word) for word in words if word in _SIZES]
    return min(ranks, default=len(_SIZES)), len(name), name


def _try_model(name: str, size: tuple[int, int] | None) -> AnnotatorEntry:
    """Run one model and return its entry."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    assert config is not None
    module = _module_of(name)
    own_size = size or check_size(config.input_size[1:])
    # A classifier that users train later works like a published one.
    model_kwargs = {} if config.num_classes else {"num_classes": 1000}
    reason = "" if config.num_classes else "published without a classifier"
    torch.manual_seed(0)
    try:
        model, own_size = create_model(name, False, None, size, model_kwargs)
        _randomize_zeros(model)
        dense = make_dense(model.eval(), name, "local")
        with torch.inference_mode():
            dense(torch.randn(1, 3, *own_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{name} cannot annotate: ")
        return AnnotatorEntry(module, name, own_size, None, REFUSED, reason[:200] or type(error).__name__)
    return AnnotatorEntry(module, name, own_size, dense.grid, EXACT if dense.linear_head else APPROXIMATE, reason)


def _module_of(name: str) -> str:
    import timm

    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def _randomize_zeros(model: nn.Module) -> None:
    """Initialize all-zero weights at random, because any head of zeros is linear."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning about random weights, which are intended here."""
    logger = logging.getLogger(create_model.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
