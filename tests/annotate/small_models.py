"""Small timm annotators of several families, with the same random weights in every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import relabel_datasets as rd

SIZE = 64
MODELS: dict[str, dict[str, object]] = {  # arguments that make them small
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": SIZE},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "img_size": SIZE, "window_size": 4
    },
    "test_nfnet": {},  # its convolutions are standardized in float32
}  # fmt: skip
ONE_BY_DEFAULT = [
    "test_resnet",
    *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "test_resnet"),
]


def random_pixels(batch: int = 2, size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def make(name: str, dtype: str, device: str = "cpu", **arguments) -> rd.TimmAnnotator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rd.TimmAnnotator(
            name, dtype=dtype, input_size=SIZE, num_classes=7, device=device, **MODELS[name], **arguments
        )
