"""How well a classifier does: accuracies, several true classes, calibration; counted batch by batch, on any number of ranks.

Shapes: N images, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Classes = Sequence[Collection[int]]  # the true classes of each image; none: left out


class Metrics:
    """Counts what predictions have in common with the truth, and gives the shares of all that was counted.

    What `compute` gives depends on what `update` was told; all are shares in 0..1:

    | name | of images with | what it is |
    | --- | --- | --- |
    | `top1`, `top5` | `labels` | images whose label is the best class, or among the five best (where C > 5) |
    | `ece` | `labels` | expected calibration error: mean of abs(accuracy - confidence) over bins of equal width, weighted by their images; confidence is the softmax of the best class |
    | `real` | `real` | images whose best class is one of the true ones: ReaL accuracy |
    | `multi_label` | `present` | images whose best class is one of the true ones |
    | `set_recall` | `present` | mean over images of the share of their n true classes that are among their n best |
    | `map` | `present` | mean over classes of average precision |

    The average precision of a class ranks all images that have true classes by the softmax of this class: the sum, over the
    falling values p of the ranking, of the precision among images at or above p times the recall that those at p add.
    Classes that no image has do not count. The scores and classes of these images are kept until `compute`: 5 * C bytes each.

    Args:
        num_classes: C.
        num_bins: of the calibration error.

    Raises:
        ValueError: fewer than 2 classes, or no bin.

    Example:
        >>> metrics = Metrics(num_classes=1000)
        >>> for images, labels in loader:
        ...     metrics.update(model(images), labels)
        >>> metrics.gather().compute()  # over all ranks
        {'top1': 0.78, 'top5': 0.94, 'ece': 0.05}

    Reference: Guo et al., "On calibration of modern neural networks", 2017, section 2 (15 bins in section 4); Beyer et al.,
    "Are we done with ImageNet?", 2020, section 3 (ReaL accuracy).
    """

    def __init__(self, num_classes: int, *, num_bins: int = 15) -> None:
        if num_classes < 2 or num_bins < 1:
            raise ValueError(f"expected at least 2 classes and 1 bin, got {num_classes} and {num_bins}")
        self.num_classes = num_classes
        self.num_bins = num_bins
        # Sums, so that those of batches and of ranks add up.
        self._labels = torch.zeros(3, dtype=torch.float64)  # images, right, right among five
        self._bins = torch.zeros(num_bins, 3, dtype=torch.float64)  # images, sum of confidences, right
        self._real = torch.zeros(2, dtype=torch.float64)  # images, right
        self._present = torch.zeros(3, dtype=torch.float64)  # images, right, sum of recalls
        self._scores: list[Tensor] = []  # [N, C] log softmax, of images with true classes
        self._truth: list[Tensor] = []  # [N, C] bool

    @torch.no_grad()
    def update(
        self, logits: Tensor, labels: Tensor | None = None, present: Classes | None = None, real: Classes | None = None
    ) -> None:
        """Count a batch.

        Args:
            logits: `[N, C]` on any device, of any floating point dtype.
            labels: `[N]` class index of each image.
            present: the classes of all objects in each image, N collections; images of none are left out.
            real: the ReaL labels of each image, likewise; see `real_labels`.

        Raises:
            ValueError: shapes do not fit together, a class index is not below C, or a logit is NaN.
        """
        self._check(logits, labels)
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
            right = agreed.gather(1, logits.argmax(1, keepdim=True))
            self._real += torch.stack([agreed.any(1).sum(), right.sum()]).cpu()

    def _check(self, logits: Tensor, labels: Tensor | None) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floating point [N, {self.num_classes}], got {logits.dtype} {tuple(logits.shape)}"
            )
        if bool(logits.isnan().any()):
            raise ValueError("the logits have NaN: the model has diverged, or its input is not finite")
        if labels is None:
            return
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(logits)} class indices, one an image, got {labels.dtype} {tuple(labels.shape)}"
            )
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(f"labels must be in 0 .. {self.num_classes - 1}, got {labels.min()} .. {labels.max()}")

    def _multi_hot(self, classes: Classes, count: int) -> Tensor:
        """Return `[N, C]` bool."""
        if len(classes) != count:
            raise ValueError(f"expected the true classes of {count} images, got {len(classes)}")
        rows = [row for row, each in enumerate(classes) for _ in each]
        columns = [int(index) for each in classes for index in each]
        if columns and not 0 <= min(columns) <= max(columns) < self.num_classes:
            raise ValueError(
                f"class indices must be in 0 .. {self.num_classes - 1}, got {min(columns)} .. {max(columns)}"
            )
        truth = torch.zeros(count, self.num_classes, dtype=torch.bool)
        truth[rows, columns] = True
        return truth

    def _count_labels(self, logits: Tensor, labels: Tensor) -> None:
        confidence, right = logits.softmax(1).amax(1), logits.argmax(1) == labels
        # Without five others, all would be right: `compute` then leaves it out.
        among_five = (logits.topk(min(5, self.num_classes)).indices == labels[:, None]).any(1)
        self._labels += torch.stack([torch.ones_like(right).sum(), right.sum(), among_five.sum()]).cpu()
        # Bin m holds confidences in (m / M, (m + 1) / M].
        place = (confidence.double() * self.num_bins).ceil().long().clamp(1, self.num_bins) - 1
        counts = torch.stack([torch.ones_like(confidence), confidence, right.float()], 1).double().cpu()
        self._bins.index_add_(0, place.cpu(), counts)

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
        """Count what `other` has counted as well.

        Raises:
            ValueError: it has another number of classes or of bins.
        """
        if (other.num_classes, other.num_bins) != (self.num_classes, self.num_bins):
            raise ValueError(
                f"metrics of {other.num_classes} classes and {other.num_bins} bins do not add up with those of "
                f"{self.num_classes} and {self.num_bins}"
            )
        for name in ("_labels", "_bins", "_real", "_present"):
            getattr(self, name).add_(getattr(other, name))
        self._scores += other._scores
        self._truth += other._truth

    def gather(self) -> Metrics:
        """Return the metrics of all ranks of torch.distributed together; of this process, where there are none.

        All ranks must call it, and an image that several of them have counted counts as often: leave out what a sampler
        has repeated.
        """
        parts: list[Metrics | None] = [self]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self)
        together = Metrics(self.num_classes, num_bins=self.num_bins)
        for part in parts:
            assert part is not None
            together.merge(part)
        return together

    def compute(self) -> dict[str, float]:
        """Return every metric that something was counted for, by its name."""
        found = {}
        if images := float(self._labels[0]):
            found["top1"] = float(self._labels[1]) / images
            if self.num_classes > 5:
                found["top5"] = float(self._labels[2]) / images
            found["ece"] = float((self._bins[:, 2] - self._bins[:, 1]).abs().sum()) / images
        if images := float(self._real[0]):
            found["real"] = float(self._real[1]) / images
        if images := float(self._present[0]):
            found["multi_label"] = float(self._present[1]) / images
            found["set_recall"] = float(self._present[2]) / images
            found["map"] = mean_average_precision(torch.cat(self._scores), torch.cat(self._truth))
        return found


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the mean over classes of average precision, as `Metrics` defines it; NaN where no image has any class.

    Args:
        scores: `[N, C]` greater for what is more likely; only their order within a class matters.
        truth: `[N, C]` bool: which classes each image has.
    """
    precisions = [
        _average_precision(scores[:, index], truth[:, index]) for index in truth.any(0).nonzero()[:, 0].tolist()
    ]
    return sum(precisions) / len(precisions) if precisions else float("nan")


def _average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the average precision of one class from `[N]` scores and truth; equal scores are taken together."""
    falling, order = scores.sort(descending=True)
    right = truth[order].double().cumsum(0)
    last = torch.cat([falling[1:] != falling[:-1], falling.new_ones(1, dtype=torch.bool)])  # of equal scores
    found = right[last]
    precision = found / (last.nonzero()[:, 0] + 1)
    return float((precision * found.diff(prepend=found.new_zeros(1))).sum() / found[-1])


def real_labels(keys: Iterable[str], classes: Sequence[str] | None = None) -> list[list[int]]:
    """Return the ReaL labels of images of ImageNet's validation set, none for any other image.

    Args:
        keys: Keys or file names, such as `ILSVRC2012_val_00000001`. Folders, extensions and the class suffix of files on the
            Hub (`ILSVRC2012_val_00000001_n01751748`) do not matter.
        classes: of the dataset, by index: synsets or names, some of ImageNet's 1000. Labels of others are left out.
            Default: these 1000 in their usual order.

    Raises:
        ValueError: a class is none of ImageNet's.

    Reference: Beyer et al., "Are we done with ImageNet?", 2020; the labels are those that timm ships.
    """
    from timm.data.imagenet_info import ImageNetInfo  # timm takes seconds to import
    from timm.data.real_labels import RealLabelsImagenet

    from ..annotate.classes import match_classes

    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 50_001)]
    of_files = RealLabelsImagenet([f"{name}.JPEG" for name in names]).real_labels  # type: ignore[no-untyped-call]
    by_name: dict[str, list[int]] = {name: of_files[f"{name}.JPEG"] for name in names}
    synsets = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    own = {theirs: ours for ours, theirs in enumerate(match_classes(synsets, synsets if classes is None else classes))}
    found = (re.search(r"ILSVRC2012_val_\d{8}", key) for key in keys)
    return [[own[index] for index in by_name.get(match[0] if match else "", ()) if index in own] for match in found]
