"""The demo's annotator: a small timm model that learns the classes from clean pictures of one object each."""

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

MODEL = "resnet10t"  # average pooling, then one linear layer: its map is exact
# A quarter of its channels, for speed. Blocks begin with all of their weights, since those that begin as the identity
# (zero_init_last) learn later than these few epochs last.
MODEL_ARGS: dict[str, Any] = {
    "channels": [16, 32, 64, 128],
    "stem_width": 8,
    "zero_init_last": False,
    "num_classes": len(CLASSES),
}
DENSE_ARGS: dict[str, Any] = {
    **MODEL_ARGS,
    "output_stride": 16,
}  # the annotator's: 8 x 8 locations for 128 x 128 pixels
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_TILE = 64  # pixels that a clean picture is squashed to; then its objects are as large as those of a scene squashed to
_INPUT_SIZE = 128  # this
_BATCH = 32


def train_annotator(checkpoint: Path, *, num_pictures: int = 4096, epochs: int = 8, seed: int = 0) -> None:
    """Train the annotator on clean pictures and write its weights, as safetensors that timm can load.

    The pictures are laid side by side, two by two, and logits are pooled over each: so the model learns to look only
    at what is there, and a picture's border is no clue.

    Args:
        checkpoint: path of the file.
        num_pictures: how many pictures are drawn.
        epochs: how often each is seen.
        seed: of pictures, weights and order.
    """
    images, targets = _to_tensors(draw_clean(num_pictures, seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(MODEL, **DENSE_ARGS).to(memory_format=torch.channels_last)
        batches = num_pictures // _BATCH
        optimizer, schedule = make_optimizer(model, 6e-3, batches * epochs)
        with tqdm(total=batches * epochs, desc="training the annotator", unit="step", leave=False) as bar:
            for _ in range(epochs):
                for batch in torch.split(torch.randperm(num_pictures), _BATCH)[:batches]:
                    logits = _tile_logits(model, _mosaics(_augmented(images[batch])))
                    step(nnf.cross_entropy(logits, targets[batch]), optimizer, schedule)
                    bar.update()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, checkpoint)


def load_annotator(checkpoint: Path) -> TimmAnnotator:
    """Return the annotator of a checkpoint, on the CPU, where it gives the same maps whatever else there is."""
    return TimmAnnotator(
        MODEL, checkpoint=checkpoint, input_size=_INPUT_SIZE, mean=MEAN, std=STD, interpolation="bicubic",
        device="cpu", classes=CLASSES, **DENSE_ARGS,
    )  # fmt: skip


def make_optimizer(
    model: nn.Module, learning_rate: float, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """Return AdamW and a schedule of one cycle over all steps."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05, fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps)


def step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Take one step of training."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    schedule.step()


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images `[B, 3, h, w]` as the models take them."""
    mean, std = torch.tensor(MEAN)[:, None, None] * 255, torch.tensor(STD)[:, None, None] * 255
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Return an image squashed to a square, as uint8 `[3, size, size]`."""
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def _to_tensors(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return images `[N, 3, h, w]` and targets `[N, C]`, all classes alike where there is no object."""
    targets = torch.full((len(scenes), len(CLASSES)), 1 / len(CLASSES))
    for target, scene in zip(targets, scenes, strict=True):
        for scene_object in scene.objects:
            target.copy_(nnf.one_hot(torch.tensor(scene_object.label), len(CLASSES)))
    return torch.stack([to_tensor(scene.image, _TILE) for scene in scenes]), targets


def _augmented(images: Tensor) -> Tensor:
    """Mirror each image or not, and shuffle its colour channels."""
    count = len(images)
    shuffled = images[torch.arange(count)[:, None], torch.rand(count, 3).argsort(1)]
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, shuffled, shuffled.flip(-1))


def _tile_logits(model: Any, mosaics: Tensor) -> Tensor:
    """Return `[B, C]` logits of the tiles of mosaics: the model's own head, on the features under each tile."""
    pooled = nnf.adaptive_avg_pool2d(model.forward_features(normalize(mosaics)), 2)  # [B / 4, D, 2, 2]
    logits: Tensor = model.fc(pooled.permute(0, 2, 3, 1).flatten(0, 2))
    return logits


def _mosaics(tiles: Tensor) -> Tensor:
    """Return `[B / 4, 3, 2h, 2w]` of tiles `[B, 3, h, w]`, in the order of rows and then columns."""
    batch, channels, height, width = tiles.shape
    grid = tiles.view(batch // 4, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch // 4, channels, 2 * height, 2 * width)
