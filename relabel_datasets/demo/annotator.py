"""Annotator of the drawn scenes: a small timm model, whose trained weights are part of this package.

`builders/scenes_annotator.py` trains it and writes the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..annotate.timm_annotator import TimmAnnotator
from .scenes import CLASSES

MODEL = "resnet10t"  # average pooling and one linear layer, so its label maps are exact
# A quarter of the channels, for speed. Without zero_init_last: blocks that start as the identity learn too slowly in a short
# training.
MODEL_KWARGS: dict[str, Any] = {"channels": [16, 32, 64, 128], "stem_width": 8, "zero_init_last": False}
# 8 x 8 locations for 128 x 128 pixels.
ANNOTATOR_KWARGS: dict[str, Any] = {**MODEL_KWARGS, "num_classes": len(CLASSES), "output_stride": 16}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
INPUT_SIZE = 128
WEIGHTS = Path(__file__).with_name("annotator.safetensors")


def load_demo_annotator(checkpoint: Path = WEIGHTS) -> TimmAnnotator:
    """Load the annotator, on the CPU, where its label maps are reproducible.

    Args:
        checkpoint: File with the weights. Default: the file of this package.
    """
    return TimmAnnotator(
        MODEL, checkpoint=checkpoint, input_size=INPUT_SIZE, mean=MEAN, std=STD, interpolation="bicubic",
        device="cpu", classes=CLASSES, **ANNOTATOR_KWARGS,
    )  # fmt: skip
