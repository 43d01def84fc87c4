"""Token labels: a target for each location of the student's feature map, in addition to that of the crop.

Reference: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", 2021, section 3.
Shapes: B images, C classes, h x w tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from timm.data.mixup import rand_bbox
from torch import Tensor, nn

from ..annotate.timm_models import make_dense
from ..labels.label_map import LabelMap
from ..labels.precision import full_precision, pooling_dtype
from ..labels.transforms import LabelPooling

Targets = tuple[Tensor, Tensor]  # [B, C] of crops and [B, C, h, w] of tokens


class TokenLabelPooling(LabelPooling):
    """Pool each `LabelMap` to a label of the whole crop `[C]` and a label of each token `[C, h, w]`.

    Args:
        output_size: Number of tokens (h, w), or n for (n, n).
        temperature: Temperature of the softmax, see `LabelPooling`. Default: 1.
        label_weight: Weight of the original class label in the label of the crop, see `LabelPooling`. Labels of tokens are not
            blended, because the class label does not say where the object is. Default: 0.
        calibrated: Whether to apply the gains of the dataset, see `LabelPooling`. Default: False.

    Raises:
        ValueError: An argument is out of range. In use: `label_weight` is above 0 and a label map has no label, or `calibrated`
            is True and it has no calibration.
        TypeError: The sample contains no LabelMap. Raised in use.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), TokenLabelPooling(14), v2.PILToTensor()])
        >>> image, (soft_label, token_labels) = transforms(image, label_map)  # [C], [C, 14, 14]
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        temperature: float = 1.0,
        *,
        label_weight: float = 0.0,
        calibrated: bool = False,
    ) -> None:
        grid = (output_size, output_size) if isinstance(output_size, int) else output_size
        super().__init__(grid, temperature, calibrated=calibrated)
        self._crop = LabelPooling(temperature=temperature, label_weight=label_weight, calibrated=calibrated)

    def transform(self, inpt: LabelMap, params: dict[str, Any]) -> Any:
        """Return the labels of the crop and of its tokens."""
        return self._crop.transform(inpt, params), super().transform(inpt, params)


class TokenStudent(nn.Module):
    """timm classifier that also returns logits of every location during training: (`[B, C]`, `[B, C, h, w]`).

    The logits of a location are the output of the classifier's head on the features of that location, as for an annotator. In a
    ViT, each token takes the place of the class token. (The models of the paper have a second linear head instead.) In evaluation
    mode, the output is that of the classifier. The unwrapped state dict is that of the classifier.

    Args:
        model: Model to train, from timm.
        name: Name of the model, for error messages.
        image_size: Side of the training images in pixels.

    Attributes:
        grid: Number of locations (h, w).

    Raises:
        ValueError: The model has no feature map.
    """

    def __init__(self, model: nn.Module, name: str, image_size: int) -> None:
        super().__init__()
        self.module = model  # timm unwraps models by this name
        self._hidden = (make_dense(model, name, "local"),)  # in a tuple, because a submodule would duplicate parameters
        (dense,) = self._hidden
        was_training = model.training
        parameter = next(model.parameters())
        with torch.no_grad():
            dense.eval()(torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device))
        model.train(was_training)
        self.grid: tuple[int, int] = dense.grid

    def forward(self, images: Tensor) -> Any:
        """Return the logits of crops and tokens in training mode, else the logits of images."""
        if not self.training:
            return self.module(images)
        return self._hidden[0].both(images)


def token_label_loss(
    class_logits: Tensor, token_logits: Tensor, soft_labels: Tensor, token_labels: Tensor, weight: float = 0.5
) -> Tensor:
    """Compute the mean loss of a batch: the cross-entropy of crops plus `weight` times that of tokens.

    The loss is computed in float32, or float64 for float64 logits, also for logits of lower precision and under
    `torch.autocast`.

    Args:
        class_logits: Logits of crops `[B, C]`.
        token_logits: Logits of tokens `[B, C, h, w]`.
        soft_labels: Targets of crops `[B, C]`.
        token_labels: Targets of tokens `[B, C, h, w]`.
        weight: Weight of the token loss, beta in the paper's equation 3. Default: 0.5, as in the paper.

    Returns:
        The loss, a scalar.
    """
    dtype = pooling_dtype(class_logits)
    with full_precision(class_logits.device):
        crops = nnf.cross_entropy(class_logits.to(dtype), soft_labels.to(dtype))
        return crops + weight * nnf.cross_entropy(token_logits.to(dtype), token_labels.to(dtype))


class MixToken:
    """CutMix of images, token labels and crop labels along the borders of tokens. Image i is mixed with image B - 1 - i.

    For models whose patches do not overlap, such as ViT and DeiT, this equals mixing tokens after their embedding, as in the
    paper. The labels of crops are mixed in proportion to the tokens. Random numbers come from NumPy's global generator, as in timm.

    Args:
        alpha: Parameter of the beta distribution of the mixing ratio, above 0. Default: 1.

    Raises:
        ValueError: `alpha` is not positive, the batch size is odd, or the image size is not a multiple of the token grid.

    Example:
        >>> images, (soft_labels, token_labels) = MixToken()(images, (soft_labels, token_labels))
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha= must be positive, got {alpha}")
        self.alpha = alpha

    def __call__(self, images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """Return mixed images `[B, 3, H, W]` and targets. The inputs are not modified."""
        soft, tokens = targets
        batch, (height, width), (rows, columns) = len(images), images.shape[-2:], tokens.shape[-2:]
        if batch % 2:
            raise ValueError(f"images are mixed in pairs, so the batch size must be even, got {batch}")
        if height % rows or width % columns:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be divided into {rows} x {columns} tokens: choose an image size "
                "that is a multiple of the number of tokens"
            )
        share = np.random.beta(self.alpha, self.alpha)  # noqa: NPY002
        top, bottom, left, right = rand_bbox((rows, columns), share)  # type: ignore[no-untyped-call]
        inside = torch.zeros(rows, columns, dtype=torch.bool, device=images.device)
        inside[top:bottom, left:right] = True
        pixels = inside.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
        kept = 1 - (bottom - top) * (right - left) / (rows * columns)
        mixed = torch.where(pixels, images.flip(0), images), torch.where(inside, tokens.flip(0), tokens)
        return mixed[0], (kept * soft + (1 - kept) * soft.flip(0), mixed[1])
