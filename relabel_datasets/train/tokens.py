"""Token labels: a target for each location of the student's map, beside that of the crop.

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
from ..labels.pooling import pool_label_map
from ..labels.precision import full_precision, pooling_dtype
from ..labels.transforms import LabelPooling

Targets = tuple[Tensor, Tensor]  # [B, C] of crops and [B, C, h, w] of tokens


class TokenLabelPooling(LabelPooling):
    """`LabelPooling` of the whole crop and of each of its tokens: each `LabelMap` becomes (`[C]`, `[C, h, w]`).

    Args:
        output_size: (h, w) tokens, or n for (n, n).
        temperature: see `LabelPooling`.

    Raises:
        ValueError: an argument is out of range.
        TypeError: in use, the sample holds no LabelMap.

    Example:
        >>> transforms = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), TokenLabelPooling(14), v2.PILToTensor()])
        >>> image, (soft_label, token_labels) = transforms(image, label_map)  # [C], [C, 14, 14]
    """

    def __init__(self, output_size: int | Sequence[int], temperature: float = 1.0) -> None:
        super().__init__((output_size, output_size) if isinstance(output_size, int) else output_size, temperature)

    def transform(self, inpt: LabelMap, params: dict[str, Any]) -> Any:
        """Return the two labels."""
        return pool_label_map(inpt, inpt.view, 1, self.temperature), super().transform(inpt, params)


class TokenStudent(nn.Module):
    """A timm classifier that is trained at every location: (`[B, C]`, `[B, C, h, w]`) logits of images.

    A location's logits are those of the model's own head on its features, as for an annotator; for a ViT the token stands in for
    the class token. (The paper's models have a second linear head instead.) In evaluation it is the classifier itself. Its
    state dict, unwrapped, is the classifier's.

    Args:
        model: of timm.
        name: of the model, for messages.
        image_size: pixels of a side of training images.

    Attributes:
        grid: (h, w).

    Raises:
        ValueError: the model has no map of features.
    """

    def __init__(self, model: nn.Module, name: str, image_size: int) -> None:
        super().__init__()
        self.module = model  # the name by which timm unwraps models
        self._hidden = (make_dense(model, name, "local"),)  # no submodule, or every parameter would have two names
        (dense,) = self._hidden
        was_training = model.training
        parameter = next(model.parameters())
        with torch.no_grad():
            dense.eval()(torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device))
        model.train(was_training)
        self.grid: tuple[int, int] = dense.grid

    def forward(self, images: Tensor) -> Any:
        """Return logits of crops and tokens in training, of images in evaluation."""
        if not self.training:
            return self.module(images)
        return self._hidden[0].both(images)


def token_label_loss(
    class_logits: Tensor, token_logits: Tensor, soft_labels: Tensor, token_labels: Tensor, weight: float = 0.5
) -> Tensor:
    """Return the mean loss of a batch: the cross-entropy of crops plus `weight` times that of tokens.

    The loss is computed in float32, or float64 for float64 logits, also for logits of lower precision and under
    `torch.autocast`.

    Args:
        class_logits: Logits of crops `[B, C]`.
        token_logits: Logits of tokens `[B, C, h, w]`.
        soft_labels: Targets of crops `[B, C]`.
        token_labels: Targets of tokens `[B, C, h, w]`.
        weight: Weight of the token loss, beta in the paper's equation 3. Default: the paper's 0.5.
    """
    dtype = pooling_dtype(class_logits)
    with full_precision(class_logits.device):
        crops = nnf.cross_entropy(class_logits.to(dtype), soft_labels.to(dtype))
        return crops + weight * nnf.cross_entropy(token_logits.to(dtype), token_labels.to(dtype))


class MixToken:
    """CutMix along the borders of tokens: images, labels of tokens and labels of crops, each with that of the batch's other end.

    Where the patches of a model do not overlap, as in ViT and DeiT, this is the paper's mixing of tokens after their embedding.
    The label of a crop is the mean of the two by the share of tokens. Random numbers are NumPy's global ones, as timm's are.

    Args:
        alpha: of the beta distribution that the share is drawn from.

    Raises:
        ValueError: alpha is not positive; in use, an odd batch, or images that do not divide into the tokens.

    Example:
        >>> images, (soft_labels, token_labels) = MixToken()(images, (soft_labels, token_labels))
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        self.alpha = alpha

    def __call__(self, images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """Return mixed images `[B, 3, H, W]` and targets; those given stay as they are."""
        soft, tokens = targets
        batch, (height, width), (rows, columns) = len(images), images.shape[-2:], tokens.shape[-2:]
        if batch % 2:
            raise ValueError(f"images are mixed in pairs, so a batch needs an even number, not {batch}")
        if height % rows or width % columns:
            raise ValueError(f"images of {height} x {width} pixels do not divide into {rows} x {columns} tokens")
        share = np.random.beta(self.alpha, self.alpha)  # noqa: NPY002
        top, bottom, left, right = rand_bbox((rows, columns), share)  # type: ignore[no-untyped-call]
        inside = torch.zeros(rows, columns, dtype=torch.bool, device=images.device)
        inside[top:bottom, left:right] = True
        pixels = inside.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
        kept = 1 - (bottom - top) * (right - left) / (rows * columns)
        mixed = torch.where(pixels, images.flip(0), images), torch.where(inside, tokens.flip(0), tokens)
        return mixed[0], (kept * soft + (1 - kept) * soft.flip(0), mixed[1])
