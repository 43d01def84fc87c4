"""Score the students and the annotator of the demo on validation scenes, whose objects are known.

Shapes: N scenes, M crops, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..data.datasets import RelabelDataset
from ..labels.transforms import LabelPooling
from ..train.classifier import Classifier
from .scenes import SceneObject

Crop = tuple[int, int, int, int]  # top, left, height and width in pixels

_CROPS_PER_SCENE = 2
_MIN_SHARE = 0.1  # of a crop that the box of an object covers at least, else the crop is regarded as empty
_BATCH_SIZE = 96


class Score(NamedTuple):
    """Accuracy on the validation scenes, 0 to 1."""

    main_object: float  # share of scenes whose best class is that of the main object, their label
    any_object: float  # share of scenes whose best class is that of any object
    crops: float  # share of crops whose best class is that of the object that covers most of the crop


class ScoringScenes:
    """Validation scenes and random crops of them, with the classes that they really show.

    The crops are drawn as in training, with a fixed seed. The true class of a crop is that of the object whose box covers the
    largest part of it. Crops are left out if no box covers at least a tenth of them.

    Args:
        dataset: Validation scenes, without transforms.
        objects: Objects of the scenes by key, see `read_objects`.
        image_size: Side of whole scenes for students in pixels. They are resized without keeping their aspect ratio.
        crop_size: Side of crops for students in pixels.
        min_area: Minimum share of a scene that a crop shows.
    """

    def __init__(
        self,
        dataset: RelabelDataset,
        objects: Mapping[str, Sequence[SceneObject]],
        *,
        image_size: int,
        crop_size: int,
        min_area: float,
    ) -> None:
        self._labels = [int(label) for label in dataset.targets]
        self._present = [{scene_object.label for scene_object in objects[key]} for key in dataset.keys]
        images, crops, truth = [], [], []
        soft_labels, crop_soft_labels = [], []
        pool = LabelPooling()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for index, key in enumerate(dataset.keys):
                image, label_map = dataset[index]
                pixels = F.pil_to_tensor(image)
                images.append(_resized(pixels, image_size))
                soft_labels.append(pool(label_map))
                for _ in range(_CROPS_PER_SCENE):
                    crop = _random_crop(pixels, min_area)
                    visible = visible_class(crop, objects[key])
                    if visible is not None:
                        truth.append(visible)
                        crops.append(_resized(F.crop(pixels, *crop), crop_size))
                        crop_soft_labels.append(pool(F.crop(label_map, *crop)))
        self._images, self._crops, self._truth = torch.stack(images), torch.stack(crops), torch.tensor(truth)
        self._label_maps = torch.stack(soft_labels), torch.stack(crop_soft_labels)

    def score_student(self, student: Classifier) -> Score:
        """Return the accuracy of a student."""
        student.model.eval()
        with torch.inference_mode():
            whole, crops = (
                torch.cat([student(batch) for batch in torch.split(images, _BATCH_SIZE)])
                for images in (self._images, self._crops)
            )
        return self.score(whole, crops)

    def score_label_maps(self) -> Score:
        """Return the accuracy of the label maps, pooled over whole scenes and under crops."""
        return self.score(*self._label_maps)

    def score(self, whole: Tensor, crops: Tensor) -> Score:
        """Return the accuracy of logits or probabilities of whole scenes `[N, C]` and of crops `[M, C]`."""
        best = whole.argmax(1).tolist()
        main = sum(index == label for index, label in zip(best, self._labels, strict=True))
        present = sum(index in classes for index, classes in zip(best, self._present, strict=True))
        visible = (crops.argmax(1) == self._truth).sum()
        return Score(main / len(best), present / len(best), int(visible) / max(1, len(self._truth)))


def visible_class(crop: Crop, objects: Sequence[SceneObject]) -> int | None:
    """Return the class of the object whose box covers the largest part of a crop, or None if it is less than a tenth."""
    *_, height, width = crop
    area, label = max((_overlap(crop, scene_object.box_xyxy), scene_object.label) for scene_object in objects)
    return label if area >= _MIN_SHARE * height * width else None


def _overlap(crop: Crop, box_xyxy: tuple[int, int, int, int]) -> int:
    """Return the area in pixels that a crop and a box share."""
    top, left, height, width = crop
    x1, y1, x2, y2 = box_xyxy
    return max(0, min(x2, left + width) - max(x1, left)) * max(0, min(y2, top + height) - max(y1, top))


def _random_crop(image: Tensor, min_area: float) -> Crop:
    top, left, height, width = v2.RandomResizedCrop.get_params(image, [min_area, 1.0], [3 / 4, 4 / 3])
    return int(top), int(left), int(height), int(width)


def _resized(image: Tensor, size: int) -> Tensor:
    resized: Tensor = F.resize(image, [size, size], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    return resized
