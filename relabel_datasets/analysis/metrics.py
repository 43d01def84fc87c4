"""Metrics of classifiers: accuracies, multi-label metrics and calibration, accumulated over batches and ranks.

Shapes: N images, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Classes = Sequence[Collection[int]]  # true classes of each image; images without classes are left out


class Metrics:
    """Metrics of predictions, accumulated batch by batch.

    `compute` returns the metrics whose ground truth `update` received, all in 0..1. The best class is the one with the highest
    logit.

    | name | ground truth | definition |
    | --- | --- | --- |
    | `top1`, `top5` | `labels` | share of images whose label is the best class, or among the five best (only if C > 5) |
    | `ece` | `labels` | expected calibration error: mean of abs(accuracy - confidence) over bins of equal width, weighted by their number of images; confidence is the softmax of the best class |
    | `real` | `real` | ReaL accuracy: share of images whose best class is one of the true classes |
    | `multi_label` | `present` | share of images whose best class is one of the true classes |
    | `set_recall` | `present` | mean over images of the share of their n true classes that are among their n best classes |
    | `map` | `present` | mean average precision over classes |

    The average precision of a class ranks all images that have true classes by the softmax of this class. It is the sum, over
    the decreasing values p of the ranking, of the precision among images at or above p, times the recall that images at p add.
    Classes that are in no image do not count. `Metrics` keeps the scores and true classes of these images: 5 * C bytes per image.

    Args:
        num_classes: Number of classes C, at least 2.
        num_bins: Number of bins of the calibration error, at least 1. Default: 15.

    Raises:
        ValueError: There are fewer than 2 classes, or no bins.

    Example:
        >>> metrics = Metrics(num_classes=1000)
        >>> for images, labels in loader:
        ...     metrics.update(model(images), labels)
        >>> metrics.gather().compute()  # of all ranks
        {'top1': 0.78, 'top5': 0.94, 'ece': 0.05}

    Reference: Guo et al., "On calibration of modern neural networks", 2017, section 2 (15 bins in section 4); Beyer et al.,
    "Are we done with ImageNet?", 2020, section 3 (ReaL accuracy).
    """

    def __init__(self, num_classes: int, *, num_bins: int = 15) -> None:
        if num_classes < 2 or num_bins < 1:
            raise ValueError(
                f"num_classes must be at least 2 and num_bins at least 1, got {num_classes} and {num_bins}"
            )
        self.num_classes = num_classes
        self.num_bins = num_bins
        # Sums, so that batches and ranks can be added.
        self._labels = torch.zeros(3, dtype=torch.float64)  # images, correct, correct among five
        self._bins = torch.zeros(num_bins, 3, dtype=torch.float64)  # images, sum of confidences, correct
        self._real = torch.zeros(2, dtype=torch.float64)  # images, correct
        self._present = torch.zeros(3, dtype=torch.float64)  # images, correct, sum of recalls
        self._scores: list[Tensor] = []  # [N, C] log softmax of images with true classes
        self._truth: list[Tensor] = []  # [N, C] bool

    @torch.no_grad()
    def update(
        self, logits: Tensor, labels: Tensor | None = None, present: Classes | None = None, real: Classes | None = None
    ) -> None:
        """Add a batch. An error leaves the metrics unchanged.

        Args:
            logits: Logits `[N, C]` on any device, of any floating point dtype.
            labels: Class index of each image `[N]`, in 0..C - 1.
            present: Classes of all objects in each image, N collections. Images with an empty collection are left out.
            real: ReaL labels of each image, N collections, see `real_labels`. Images with an empty collection are left out.

        Raises:
            ValueError: The shapes do not match, a class index is not in 0..C - 1, or a logit is NaN.
        """
        self._check(logits, labels)
        if logits.device.type == "mps":  # MPS has no float64
            logits = logits.cpu()
        objects, agreed = (
            None if classes is None else self._multi_hot(classes, len(logits)).to(logits.device)
            for classes in (present, real)
        )
        logits = logits.float()
        if labels is not None:
            self._count_labels(logits, labels.to(logits.device))
        if objects is not None:
            known = objects.any(1)
            self._count_present(logits[known], objects[known])
        if agreed is not None:
            correct = agreed.gather(1, logits.argmax(1, keepdim=True))
            self._real += torch.stack([agreed.any(1).sum(), correct.sum()]).cpu()

    def _check(self, logits: Tensor, labels: Tensor | None) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floating point [N, {self.num_classes}], got {logits.dtype} {tuple(logits.shape)}"
            )
        if bool(logits.isnan().any()):
            raise ValueError("logits contain NaN: the model has diverged, or its input is not finite")
        if labels is None:
            return
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(logits)} class indices, one per image, got {labels.dtype} {tuple(labels.shape)}"
            )
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(f"labels must be in 0 .. {self.num_classes - 1}, got {labels.min()} .. {labels.max()}")

    def _multi_hot(self, classes: Classes, count: int) -> Tensor:
        """Return the true classes as booleans `[N, C]`."""
        if len(classes) != count:
            raise ValueError(f"expected the true classes of {count} images, got those of {len(classes)}")
        rows = [row for row, image_classes in enumerate(classes) for _ in image_classes]
        columns = [int(index) for image_classes in classes for index in image_classes]
        if columns and not 0 <= min(columns) <= max(columns) < self.num_classes:
            raise ValueError(
                f"class indices must be in 0 .. {self.num_classes - 1}, got {min(columns)} .. {max(columns)}"
            )
        truth = torch.zeros(count, self.num_classes, dtype=torch.bool)
        truth[rows, columns] = True
        return truth

    def _count_labels(self, logits: Tensor, labels: Tensor) -> None:
        confidence, correct = logits.softmax(1).amax(1), logits.argmax(1) == labels
        # With at most five classes this is always true, and `compute` leaves it out.
        among_five = (logits.topk(min(5, self.num_classes)).indices == labels[:, None]).any(1)
        self._labels += torch.stack([torch.ones_like(correct).sum(), correct.sum(), among_five.sum()]).cpu()
        # Bin m of M holds confidences in (m / M, (m + 1) / M].
        bins = (confidence.double() * self.num_bins).ceil().long().clamp(1, self.num_bins) - 1
        counts = torch.stack([torch.ones_like(confidence), confidence, correct.float()], 1).double().cpu()
        self._bins.index_add_(0, bins.cpu(), counts)

    def _count_present(self, logits: Tensor, truth: Tensor) -> None:
        ranked = truth.gather(1, logits.argsort(1, descending=True))
        sizes = truth.sum(1)
        among = torch.arange(self.num_classes, device=truth.device) < sizes[:, None]
        recall = (ranked & among).sum(1) / sizes
        counts = (torch.ones_like(ranked[:, 0]).sum(), ranked[:, 0].sum(), recall.double().sum())
        self._present += torch.stack([count.double() for count in counts]).cpu()
        self._scores.append(logits.log_softmax(1).cpu())
        self._truth.append(truth.cpu())

    def merge(self, other: Metrics) -> None:
        """Add the batches of other metrics to these.

        Args:
            other: Metrics with the same numbers of classes and bins. They are not changed.

        Raises:
            ValueError: The numbers of classes or bins differ.
        """
        if (other.num_classes, other.num_bins) != (self.num_classes, self.num_bins):
            raise ValueError(
                f"cannot merge metrics of {other.num_classes} classes and {other.num_bins} bins into metrics of "
                f"{self.num_classes} classes and {self.num_bins} bins"
            )
        for name in ("_labels", "_bins", "_real", "_present"):
            getattr(self, name).add_(getattr(other, name))
        self._scores += other._scores
        self._truth += other._truth

    def gather(self) -> Metrics:
        """Merge the metrics of all ranks of torch.distributed.

        All ranks must call this method. An image that several ranks add counts several times: leave out images that a sampler
        repeats for padding.

        Returns:
            The merged metrics on every rank; a copy of these metrics if torch.distributed is not initialized.
        """
        parts: list[Metrics | None] = [self]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self)
        merged = Metrics(self.num_classes, num_bins=self.num_bins)
        for part in parts:
            assert part is not None
            merged.merge(part)
        return merged

    def compute(self) -> dict[str, float]:
        """Compute the metrics of all batches so far.

        Returns:
            The values in 0..1 by name; only those whose ground truth `update` received.
        """
        values = {}
        if images := float(self._labels[0]):
            values["top1"] = float(self._labels[1]) / images
            if self.num_classes > 5:
                values["top5"] = float(self._labels[2]) / images
            values["ece"] = float((self._bins[:, 2] - self._bins[:, 1]).abs().sum()) / images
        if images := float(self._real[0]):
            values["real"] = float(self._real[1]) / images
        if images := float(self._present[0]):
            values["multi_label"] = float(self._present[1]) / images
            values["set_recall"] = float(self._present[2]) / images
            values["map"] = mean_average_precision(torch.cat(self._scores), torch.cat(self._truth))
        return values


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Compute the mean average precision over classes, as defined in `Metrics`.

    Args:
        scores: Scores `[N, C]`. Only their order within a class matters.
        truth: True classes of each image `[N, C]`, bool.

    Returns:
        The mean over all classes that an image has, in 0..1; NaN if no image has a class.
    """
    precisions = [
        _average_precision(scores[:, index], truth[:, index]) for index in truth.any(0).nonzero()[:, 0].tolist()
    ]
    return sum(precisions) / len(precisions) if precisions else float("nan")


def _average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the average precision of one class from `[N]` scores and truth. Equal scores share one rank."""
    ranked, order = scores.sort(descending=True)
    num_correct = truth[order].double().cumsum(0)
    is_last = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])  # of equal scores
    num_correct = num_correct[is_last]
    precision = num_correct / (is_last.nonzero()[:, 0] + 1)
    return float((precision * num_correct.diff(prepend=num_correct.new_zeros(1))).sum() / num_correct[-1])


def real_labels(keys: Iterable[str], classes: Sequence[str] | None = None) -> list[list[int]]:
    """Look up the ReaL labels of images of ImageNet's validation set.

    Args:
        keys: Keys or file names, such as `ILSVRC2012_val_00000001`. Folders, extensions and the class suffix of files on the
            Hub (`ILSVRC2012_val_00000001_n01751748`) are ignored.
        classes: Classes of the dataset by index: synsets or names, all from ImageNet's 1000. ReaL labels of other classes are
            left out. Default: ImageNet's 1000 classes in their usual order.

    Returns:
        The class indices of each image; an empty list for images that are not in ImageNet's validation set.

    Raises:
        ValueError: A class is not one of ImageNet's.

    Reference: Beyer et al., "Are we done with ImageNet?", 2020; the labels come with timm.
    """
    from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import
    from timm.data.real_labels import RealLabelsImagenet

    from ..annotate.classes import match_classes

    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 50_001)]
    by_file = RealLabelsImagenet([f"{name}.JPEG" for name in names]).real_labels  # type: ignore[no-untyped-call]
    by_name: dict[str, list[int]] = {name: by_file[f"{name}.JPEG"] for name in names}
    synsets = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    imagenet_rows = match_classes(synsets, synsets if classes is None else classes)
    indices = {row: index for index, row in enumerate(imagenet_rows)}
    matches = (re.search(r"ILSVRC2012_val_\d{8}", key) for key in keys)
    return [[indices[row] for row in by_name.get(match[0] if match else "", ()) if row in indices] for match in matches]
