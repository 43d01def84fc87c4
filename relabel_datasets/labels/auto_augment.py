"""Make torchvision's AutoAugment, RandAugment and TrivialAugmentWide transform a LabelMap together with its image.

These transforms take the image out of the sample, shear, translate or rotate it, and put it back. Everything else passes
through unchanged, so a label map would silently stay behind, and torchvision offers no hook to prevent it. Their public
`forward` is therefore wrapped, but only once the first LabelMap exists: importing the package changes nothing. A sample
without a LabelMap takes the original path. A torchvision that implements these transforms in another way raises an error
for a sample with a LabelMap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

# These move no pixels. Every other operation is also applied to the label map, which has a kernel for it or raises.
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
_METHODS = (
    "_flatten_and_extract_image_or_video",
    "_apply_image_or_video_transform",
    "_unflatten_and_insert_image_or_video",
)
Forward = Callable[..., Any]


def support_auto_augment(label_map_type: type) -> None:
    """Let instances of `label_map_type` follow their image through the AutoAugment family. A second call is a no-op."""
    for transform in _family():
        if "forward" in vars(transform) and label_map_type not in getattr(transform.forward, "followed_by", ()):
            transform.forward = _wrap_forward(transform.forward, label_map_type)


def _family() -> Iterator[Any]:
    """Yield torchvision's automatic augmentations and the classes derived from them."""
    base = v2.RandAugment.__base__
    classes = [v2.AutoAugment, v2.RandAugment, v2.TrivialAugmentWide, v2.AugMix]
    if base is not v2.Transform:
        classes += base.__subclasses__()
    for transform in dict.fromkeys(classes):
        yield transform
        yield from transform.__subclasses__()


def _wrap_forward(forward: Forward, label_map_type: type) -> Forward:
    @functools.wraps(forward)
    def follow(transform: v2.Transform, *inputs: Any) -> Any:
        if isinstance(transform, _Follower) or not any(
            isinstance(leaf, label_map_type) for leaf in tree_leaves(inputs)
        ):
            return forward(transform, *inputs)
        if isinstance(transform, v2.AugMix):
            raise TypeError("a LabelMap cannot follow AugMix, which blends several views of an image: remove AugMix")
        follower_type = _follower_type(transform.__class__)
        follower = follower_type.__new__(follower_type)
        follower.__dict__.update(transform.__dict__)
        follower.label_map_type, follower.label_maps, follower.steps = label_map_type, {}, set()
        outputs = forward(follower, *inputs)
        if follower.steps < {"extract", "insert"}:
            raise _unknown(type(transform))
        return outputs

    follow.followed_by = (label_map_type, *getattr(forward, "followed_by", ()))  # type: ignore[attr-defined]
    return follow


class _Follower:
    """Mixin for a copy of a transform that applies its geometric operations to the label maps of one sample as well.

    Attributes:
        label_map_type: LabelMap.
        label_maps: The label maps of the sample by their place in it.
        steps: The parts of torchvision's implementation that ran.
    """

    label_map_type: type
    label_maps: dict[int, Any]
    steps: set[str]

    def _flatten_and_extract_image_or_video(self, *args: Any, **kwargs: Any) -> Any:
        flat_inputs_with_spec, image = super()._flatten_and_extract_image_or_video(*args, **kwargs)  # type: ignore[misc]
        inputs = flat_inputs_with_spec[0]
        self.label_maps = {i: inpt for i, inpt in enumerate(inputs) if isinstance(inpt, self.label_map_type)}
        self.steps.add("extract")
        return flat_inputs_with_spec, image

    def _apply_image_or_video_transform(self, image: Any, transform_id: str, *args: Any, **kwargs: Any) -> Any:
        apply = super()._apply_image_or_video_transform  # type: ignore[misc]
        if transform_id not in COLOR_OPERATIONS:
            for i, label_map in self.label_maps.items():
                self.label_maps[i] = apply(label_map, transform_id, *args, **kwargs)
        return apply(image, transform_id, *args, **kwargs)

    def _unflatten_and_insert_image_or_video(self, flat_inputs_with_spec: Any, image: Any) -> Any:
        for i, label_map in self.label_maps.items():
            flat_inputs_with_spec[0][i] = label_map
        self.steps.add("insert")
        return super()._unflatten_and_insert_image_or_video(flat_inputs_with_spec, image)  # type: ignore[misc]


@functools.cache
def _follower_type(transform_type: Any) -> Any:
    """Return the subclass of a transform's class whose instances move label maps as well.

    Raises:
        TypeError: This torchvision implements the transform in another way.
    """
    if not all(hasattr(transform_type, name) for name in _METHODS):
        raise _unknown(transform_type)
    return type(transform_type.__name__, (_Follower, transform_type), {})


def _unknown(transform_type: type) -> TypeError:
    return TypeError(
        f"a LabelMap cannot follow {transform_type.__name__} of this torchvision version, whose implementation "
        "relabel_datasets does not know: use RandomAffine and color transforms instead, or another torchvision"
    )
