"""How a LabelMap follows torchvision's automatic augmentations: AutoAugment, RandAugment and TrivialAugmentWide.

They take the image out of the sample, shear, translate or rotate it, and put it back; everything else passes through, so
a label map would silently be left behind. torchvision offers no place to say otherwise: three private methods of their
common base class are wrapped here. Samples without a LabelMap do not notice, and no random number is drawn.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torchvision.transforms import v2

from .label_map import LabelMap

# These change no position. All others are asked of the label map, too: it follows, or has no kernel for them and raises.
COLOR_OPERATIONS = frozenset(
    [
        "AutoContrast",
        "Brightness",
        "Color",
        "Contrast",
        "Equalize",
        "Identity",
        "Invert",
        "Posterize",
        "Sharpness",
        "Solarize",
    ]
)
Method = Callable[..., Any]


class _Sample(threading.local):
    """The label maps of the sample that this thread is augmenting, and their places in it."""

    def __init__(self) -> None:
        self.label_maps: dict[int, LabelMap] = {}


_sample = _Sample()


def _extracting(original: Method) -> Method:
    def flatten_and_extract(transform: v2.Transform, *args: Any, **kwargs: Any) -> Any:
        _sample.label_maps = {}
        flat_inputs_with_spec, image = original(transform, *args, **kwargs)
        label_maps = {i: inpt for i, inpt in enumerate(flat_inputs_with_spec[0]) if isinstance(inpt, LabelMap)}
        if label_maps and isinstance(transform, v2.AugMix):
            raise TypeError("AugMix mixes several views of an image, which no LabelMap can follow: leave it out")
        _sample.label_maps = label_maps
        return flat_inputs_with_spec, image

    return flatten_and_extract


def _applying(original: Method) -> Method:
    def apply(transform: v2.Transform, image: Any, transform_id: str, *args: Any, **kwargs: Any) -> Any:
        if transform_id not in COLOR_OPERATIONS:
            for i, label_map in _sample.label_maps.items():
                _sample.label_maps[i] = original(transform, label_map, transform_id, *args, **kwargs)
        return original(transform, image, transform_id, *args, **kwargs)

    return apply


def _inserting(original: Method) -> Method:
    def unflatten_and_insert(transform: v2.Transform, flat_inputs_with_spec: Any, image: Any) -> Any:
        for i, label_map in _sample.label_maps.items():
            flat_inputs_with_spec[0][i] = label_map
        _sample.label_maps = {}
        return original(transform, flat_inputs_with_spec, image)

    return unflatten_and_insert


_WRAPPERS = {
    "_flatten_and_extract_image_or_video": _extracting,
    "_apply_image_or_video_transform": _applying,
    "_unflatten_and_insert_image_or_video": _inserting,
}


def follow_auto_augment(base: type = v2.RandAugment.__base__) -> None:
    """Make label maps follow the automatic augmentations derived from `base`. Doing it again changes nothing.

    Raises:
        ImportError: this torchvision's augmentations are built otherwise, and label maps would silently go astray.
    """
    for name, wrapper in _WRAPPERS.items():
        original = vars(base).get(name)
        if original is None:
            raise ImportError(f"relabel_datasets cannot follow the augmentations of this torchvision: no {name}")
        if not hasattr(original, "follows_label_maps"):
            method = functools.wraps(original)(wrapper(original))
            method.follows_label_maps = True  # type: ignore[attr-defined]
            setattr(base, name, method)
