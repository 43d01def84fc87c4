"""Find out whether an annotator agrees with more labels if its images are preprocessed in another way.

Weights do not say with which mean, standard deviation and padding they were trained. A wrong one costs a few points of accuracy,
without any error. The check compares the label maps' hardest cases: images whose map disagrees with their label are annotated
again in other ways. Only if that corrects enough of them, images whose map agrees are annotated as well.

Shapes: B images, C classes of the dataset.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.layers.conv2d_same import Conv2dSame
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from ..data.sources import ImageSource
from ..data.store import LabelMaps
from ..labels.batch import LabelMapBatch
from ..shards.images import decode_image
from .annotator import Annotator, ModuleAnnotator
from .classes import match_classes
from .combine import models_of

logger = logging.getLogger(__name__)

NORMALIZATIONS = (
    (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
)
_MIN_GAIN = 0.01  # smaller gains also come from chance, such as a different crop of the border
_NUM_DEVIATIONS = 3  # by which a gain must exceed 0
_NUM_SCORED = 2000  # label maps among which the images are chosen
_NUM_IMAGES = 100  # that are annotated again, of each kind
_PADDED = (EfficientNet, MobileNetV3)  # models of timm that accept pad_type

Floats = npt.NDArray[np.float64]


class Preprocessing(NamedTuple):
    """How images are normalized, and whether convolutions pad as in TensorFlow."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    same_padding: bool | None  # None for a model whose padding cannot be chosen


class BetterPreprocessing(NamedTuple):
    """Preprocessing with which an annotator agrees with more labels.

    Attributes:
        annotator: Name of the annotator.
        options: Options of the command line that choose the preprocessing.
        agreement: Estimated share of the labels that the annotator agrees with.
        better: Estimated share with the other preprocessing.
    """

    annotator: str
    options: str
    agreement: float
    better: float

    def __str__(self) -> str:
        return (
            f"{self.annotator} agrees with {self.agreement:.1%} of the labels, but with about {self.better:.1%} if its images are "
            f"preprocessed with {self.options}: its weights were probably trained that way. Build again into another folder with "
            "these options"
        )


class _Sample(NamedTuple):
    """Images to annotate again: those whose map disagrees with their label, or those whose map agrees."""

    share: float  # of the split
    indices: list[int]  # in the source


def find_better_preprocessing(
    annotator: Annotator,
    source: ImageSource,
    label_maps: LabelMaps,
    *,
    class_mapping: Mapping[str, str | int] | None = None,
) -> BetterPreprocessing | None:
    """Look for a preprocessing with which an annotator agrees with clearly more labels.

    Clearly means by at least one point and three standard errors. An ensemble is checked model by model. Annotators that are not
    a `ModuleAnnotator` have their own preprocessing and are not checked.

    Args:
        annotator: Annotator that made the label maps.
        source: Images of the label maps.
        label_maps: Label maps of a split.
        class_mapping: Annotator class of each dataset class whose name does not match, as in the build. Default: none.

    Returns:
        The best such preprocessing of the first model that has one, or None.
    """
    wrong, right = _choose(label_maps, source)
    if wrong.share < _MIN_GAIN:
        return None
    rows: list[int] | None = None
    if source.classes is not None and (tuple(source.classes) != annotator.classes or class_mapping):
        rows = match_classes(annotator.classes, source.classes, class_mapping, annotator.num_classes)
    for model in models_of(annotator):
        if isinstance(model, ModuleAnnotator):
            better = _check(model, source, rows, wrong, right)
            if better is not None:
                return better
    return None


def _choose(label_maps: LabelMaps, source: ImageSource) -> tuple[_Sample, _Sample]:
    """Choose images whose label map disagrees with their label, and images whose map agrees, evenly spaced over the split."""
    rows = np.unique(np.linspace(0, len(label_maps) - 1, min(len(label_maps), _NUM_SCORED)).astype(int))
    agrees = np.concatenate([_agree(label_maps, part.tolist()) for part in np.array_split(rows, -(-len(rows) // 256))])
    keys = [label_maps.index.key(row) for row in rows.tolist()]
    samples = []
    for chosen in (np.flatnonzero(~agrees), np.flatnonzero(agrees)):
        places = np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), _NUM_IMAGES)).astype(int))
        wanted = {keys[position] for position in chosen[places].tolist()}
        indices = [index for index, key in enumerate(source.keys) if key in wanted]
        samples.append(_Sample(len(chosen) / len(rows), indices))
    return samples[0], samples[1]


def _agree(label_maps: LabelMaps, rows: Sequence[int]) -> npt.NDArray[np.bool_]:
    pooled = LabelMapBatch.of(label_maps.at_rows(rows)).pool()
    agree: npt.NDArray[np.bool_] = pooled.argmax(1).numpy() == label_maps.index.labels[np.asarray(rows)]
    return agree


def _check(
    model: ModuleAnnotator, source: ImageSource, rows: Sequence[int] | None, wrong: _Sample, right: _Sample
) -> BetterPreprocessing | None:
    current = preprocessing_of(model)
    was_right = [_score(model, source, rows, sample, current) for sample in (wrong, right)]
    best: BetterPreprocessing | None = None
    for candidate in _alternatives(current):
        corrected = _score(model, source, rows, wrong, candidate) - was_right[0]
        if not len(corrected) or wrong.share * corrected.mean() < _MIN_GAIN:
            continue
        differences = [corrected, _score(model, source, rows, right, candidate) - was_right[1]]
        shares = wrong.share, right.share
        gain = sum(
            share * float(values.mean()) for share, values in zip(shares, differences, strict=True) if len(values)
        )
        if gain < max(_MIN_GAIN, _NUM_DEVIATIONS * _standard_error(shares, differences)):
            continue
        agreement = sum(
            share * float(values.mean()) for share, values in zip(shares, was_right, strict=True) if len(values)
        )
        if best is None or agreement + gain > best.better:
            best = BetterPreprocessing(model.name, _options(current, candidate), agreement, min(1.0, agreement + gain))
    return best


def _standard_error(shares: Sequence[float], differences: Sequence[Floats]) -> float:
    """Return the standard error of a mean over strata. One more loss per stratum keeps it above 0 if nothing changed."""
    strata = [
        (share, np.append(values, -1.0)) for share, values in zip(shares, differences, strict=True) if len(values)
    ]
    return math.sqrt(sum(share**2 * float(values.var()) / len(values) for share, values in strata))


def preprocessing_of(model: ModuleAnnotator) -> Preprocessing:
    """Return how a model preprocesses images."""
    same = None
    if any(isinstance(module, _PADDED) for module in model._module.modules()):
        same = any(isinstance(module, Conv2dSame) for module in model._module.modules())
    return Preprocessing(model.mean, model.std, same)


def _alternatives(current: Preprocessing) -> Iterator[Preprocessing]:
    paddings = (None,) if current.same_padding is None else (current.same_padding, not current.same_padding)
    for padding in paddings:
        for mean, std in dict.fromkeys(((current.mean, current.std), *NORMALIZATIONS)):
            candidate = Preprocessing(mean, std, padding)
            if candidate != current:
                yield candidate


def _options(current: Preprocessing, other: Preprocessing) -> str:
    words = []
    if (other.mean, other.std) != (current.mean, current.std):
        words += ["--mean", *map(str, other.mean), "--std", *map(str, other.std)]
    if other.same_padding != current.same_padding:
        words += ["--model-kwargs", "pad_type=same" if other.same_padding else "pad_type="]
    return " ".join(words)


@torch.inference_mode()
def _score(
    model: ModuleAnnotator,
    source: ImageSource,
    rows: Sequence[int] | None,
    sample: _Sample,
    preprocessing: Preprocessing,
) -> Floats:
    """Return 1 for each image of a sample whose mean logits rank its label first, else 0."""
    scores: list[float] = []
    with preprocessed(model, preprocessing):
        for start in range(0, len(sample.indices), 32):
            indices = sample.indices[start : start + 32]
            images = [model.preprocess(decode_image(source.read(i), source.name(i))) for i in indices]
            logits = model(torch.stack(images)).mean((2, 3))
            best = (logits if rows is None else logits[:, list(rows)]).argmax(1).tolist()
            scores += [float(label == source.labels[i]) for label, i in zip(best, indices, strict=True)]
    return np.array(scores)


@contextmanager
def preprocessed(model: ModuleAnnotator, preprocessing: Preprocessing) -> Iterator[None]:
    """Change how a model preprocesses images, and restore it afterwards."""
    before = preprocessing_of(model)
    restore = (
        _set_padding(model._module, preprocessing.same_padding)
        if preprocessing.same_padding != before.same_padding
        else []
    )
    model.set_normalization(preprocessing.mean, preprocessing.std)
    try:
        with model.uncompiled():
            yield
    finally:
        model.set_normalization(before.mean, before.std)
        for module, module_type, padding in restore:
            module.__class__, module.padding = module_type, padding


def _set_padding(
    network: nn.Module, same: bool | None
) -> list[tuple[nn.Conv2d, type[nn.Conv2d], tuple[int, ...] | str]]:
    """Change the padding of strided convolutions, and return their types and paddings before."""
    changed: list[tuple[nn.Conv2d, type[nn.Conv2d], tuple[int, ...] | str]] = []
    for module in network.modules():
        is_strided = isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1
        if not is_strided or type(module) not in (nn.Conv2d, Conv2dSame):
            continue
        assert isinstance(module, nn.Conv2d)
        changed.append((module, type(module), module.padding))
        symmetric = tuple(
            dilation * (size - 1) // 2 for dilation, size in zip(module.dilation, module.kernel_size, strict=True)
        )
        module.__class__, module.padding = (Conv2dSame, (0, 0)) if same else (nn.Conv2d, symmetric)
    return changed
