"""Annotator of the demo: a small timm model, trained on clean pictures of single objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..annotate.timm_annotator import TimmAnnotator
from .scenes import CLASSES, Scene, draw_clean

MODEL = "resnet10t"  # average pooling and one linear layer, so its label maps are exact
# A quarter of the channels, for speed. Without zero_init_last: blocks that start as the identity learn too slowly for so
# short a training.
MODEL_KWARGS: dict[str, Any] = {
    "channels": [16, 32, 64, 128],
    "stem_width": 8,
    "zero_init_last": False,
    "num_classes": len(CLASSES),
}
DENSE_KWARGS: dict[str, Any] = {
    **MODEL_KWARGS,
    "output_stride": 16,
}  # of the annotator: 8 x 8 locations for 128 x 128 pixels
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
# Clean pictures of _TILE pixels have objects of the same size as scenes of _INPUT_SIZE pixels.
_TILE = 64
_INPUT_SIZE = 128
_BATCH_SIZE = 32


def train_annotator(checkpoint: Path, *, num_pictures: int = 4096, epochs: int = 8, seed: int = 0) -> None:
    """Train the annotator on clean pictures and write its weights as safetensors that timm can load.

    Four pictures are arranged in a mosaic, and logits are pooled over each of them. The model thus learns to use only the
    pixels of one picture, and cannot use its borders.

    Args:
        checkpoint: Path of the file to write.
        num_pictures: Number of clean pictures. Default: 4096.
        epochs: Number of passes over the pictures. Default: 8.
        seed: Seed of the pictures, the initial weights and the order. Default: 0.
    """
    images, targets = _to_tensors(draw_clean(num_pictures, seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(MODEL, **DENSE_KWARGS).to(memory_format=torch.channels_last)
        batches = num_pictures // _BATCH_SIZE
        optimizer, schedule = make_optimizer(model, 6e-3, batches * epochs)
        with tqdm(total=batches * epochs, desc="training the annotator", unit="step", leave=False) as bar:
            for _ in range(epochs):
                for batch in torch.split(torch.randperm(num_pictures), _BATCH_SIZE)[:batches]:
                    logits = _tile_logits(model, _mosaics(_augmented(images[batch])))
                    step(nnf.cross_entropy(logits, targets[batch]), optimizer, schedule)
                    bar.update()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, checkpoint)


def load_demo_annotator(checkpoint: Path) -> TimmAnnotator:
    """Load the annotator from a checkpoint, on the CPU, where its label maps are reproducible."""
    return TimmAnnotator(
        MODEL, checkpoint=checkpoint, input_size=_INPUT_SIZE, mean=MEAN, std=STD, interpolation="bicubic",
        device="cpu", classes=CLASSES, **DENSE_KWARGS,
    )  # fmt: skip


def make_optimizer(
    model: nn.Module, learning_rate: float, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """Return AdamW and a one-cycle schedule over all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05, fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps)


def step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Do one training step."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    schedule.step()


def normalize(images: Tensor) -> Tensor:
    """Normalize uint8 images `[B, 3, h, w]` for the models."""
    mean, std = torch.tensor(MEAN)[:, None, None] * 255, torch.tensor(STD)[:, None, None] * 255
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Return an image, resized to a square without keeping its aspect ratio, as uint8 `[3, size, size]`."""
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def _to_tensors(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return images `[N, 3, h, w]` and targets `[N, C]`, uniform for pictures without objects."""
    targets = torch.full((len(scenes), len(CLASSES)), 1 / len(CLASSES))
    for target, scene in zip(targets, scenes, strict=True):
        for scene_object in scene.objects:
            target.copy_(nnf.one_hot(torch.tensor(scene_object.label), len(CLASSES)))
    return torch.stack([to_tensor(scene.image, _TILE) for scene in scenes]), targets


def _augmented(images: Tensor) -> Tensor:
    """Randomly flip each image and shuffle its color channels."""
    count = len(images)
    shuffled = images[torch.arange(count)[:, None], torch.rand(count, 3).argsort(1)]
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, shuffled, shuffled.flip(-1))


def _tile_logits(model: Any, mosaics: Tensor) -> Tensor:
    """Return logits `[B, C]` of the tiles of mosaics: the head of the model, applied to the pooled features of each tile."""
    pooled = nnf.adaptive_avg_pool2d(model.forward_features(normalize(mosaics)), 2)  # [B / 4, D, 2, 2]
    logits: Tensor = model.fc(pooled.permute(0, 2, 3, 1).flatten(0, 2))
    return logits


def _mosaics(tiles: Tensor) -> Tensor:
    """Arrange tiles `[B, 3, h, w]` in mosaics `[B / 4, 3, 2h, 2w]`, row by row."""
    batch, channels, height, width = tiles.shape
    grid = tiles.view(batch // 4, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch // 4, channels, 2 * height, 2 * width)
