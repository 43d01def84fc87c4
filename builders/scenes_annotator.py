"""Train the annotator of the drawn scenes, whose weights are part of the package.

    python builders/scenes_annotator.py relabel_datasets/demo/annotator.safetensors

As in the paper, the annotator sees far more pictures than its students. First it learns from clean pictures of single objects,
then from scenes and their single labels. Boxes of objects are never used, and no scene of the dataset is drawn: they have
another seed. It takes a few minutes on an idle core. The file has half precision, and its metadata record the training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import relabel_datasets as rd
from relabel_datasets.demo.annotator import ANNOTATOR_KWARGS, INPUT_SIZE, MEAN, MODEL, STD
from relabel_datasets.demo.scenes import CLASSES, Scene, draw_clean, scenes_of_split

TILE = INPUT_SIZE // 2  # objects in clean pictures of this size are as large as in scenes of INPUT_SIZE pixels
CLEAN_PER_STEP, SCENES_PER_STEP = 64, 16
VALIDATION_SCENES = 480

Pictures = tuple[Tensor, Tensor]  # images [N, 3, s, s] uint8 and targets [N, C]
Step = Callable[[Callable[[], Tensor]], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Train the annotator and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="safetensors file to write")
    for name, default, meaning in (
        ("num-clean", 12288, f"number of clean pictures, at least {CLEAN_PER_STEP}"),
        ("clean-epochs", 10, "passes over the clean pictures"),
        ("num-scenes", 4096, f"number of scenes, at least {SCENES_PER_STEP}"),
        ("scene-epochs", 2, "passes over the scenes"),
        ("seed", 1000, "seed of pictures, weights and order, other than 0, the seed of the dataset"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # rounding depends on the number of threads
    model = timm.create_model(MODEL, **ANNOTATOR_KWARGS).to(memory_format=torch.channels_last)
    clean = to_tensors(draw_clean(args.num_clean, seed=args.seed), args.num_clean, TILE)
    pretrain(model, clean, args.clean_epochs)
    scenes = to_tensors(scenes_of_split("train", args.num_scenes, seed=args.seed), args.num_scenes, INPUT_SIZE)
    finetune(model, clean, scenes, args.scene_epochs)
    model.half().float()  # as stored
    metadata = {
        "script": f"builders/{Path(__file__).name}",
        "model": MODEL,
        "settings": json.dumps({name: value for name, value in vars(args).items() if name != "out"}),
        "versions": f"relabel_datasets {rd.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        "accuracy": json.dumps(accuracy(model)),
        "seconds": f"{time.perf_counter() - start:.0f}",
    }
    half = {name: value.contiguous() for name, value in model.half().state_dict().items()}
    save_file(half, args.out, metadata)
    print(json.dumps(metadata, indent=1))


def pretrain(model: Any, clean: Pictures, epochs: int) -> None:
    """Train on mosaics of four clean pictures, with the logits pooled over each of them.

    The model thus learns to use only the pixels of one picture, and cannot use its borders.
    """
    batches = list(shuffled_batches(len(clean[0]), CLEAN_PER_STEP, epochs))
    with training(model, 6e-3, len(batches), "clean pictures") as step:
        for batch in batches:
            step(lambda: tile_loss(model, clean, batch))  # noqa: B023  called at once


def finetune(model: Any, clean: Pictures, scenes: Pictures, epochs: int) -> None:
    """Train on whole scenes with their single labels, and on clean pictures, so that no location forgets its object."""
    batches = list(shuffled_batches(len(scenes[0]), SCENES_PER_STEP, epochs))
    rounds = -(-len(batches) // (len(clean[0]) // CLEAN_PER_STEP))
    tiles = shuffled_batches(len(clean[0]), CLEAN_PER_STEP, rounds)
    with training(model, 3e-3, len(batches), "scenes") as step:
        for batch, tile in zip(batches, tiles, strict=False):
            step(lambda: scene_loss(model, scenes, batch) + tile_loss(model, clean, tile))  # noqa: B023  called at once


@contextmanager
def training(model: Any, learning_rate: float, num_steps: int, pictures: str) -> Iterator[Step]:
    """Yield a function that does one training step: AdamW with a one-cycle schedule, in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps)
    model.train()
    with tqdm(total=num_steps, desc=f"training on {pictures}", unit="step", mininterval=2) as bar:

        def step(loss: Callable[[], Tensor]) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {float(value.detach()):.3f}", refresh=False)
            bar.update()

        yield step


def shuffled_batches(count: int, batch_size: int, epochs: int) -> Iterator[Tensor]:
    """Yield the rows of each batch. Incomplete batches are left out."""
    for _ in range(epochs):
        yield from torch.randperm(count)[: count // batch_size * batch_size].split(batch_size)


def scene_loss(model: Any, scenes: Pictures, batch: Tensor) -> Tensor:
    """Return the loss of whole scenes."""
    return nnf.cross_entropy(model(normalize(augment(scenes[0][batch]))), scenes[1][batch])


def tile_loss(model: Any, clean: Pictures, batch: Tensor) -> Tensor:
    """Return the loss of the tiles of mosaics: the head is applied to the mean features of each tile."""
    features = model.forward_features(normalize(mosaics(augment(clean[0][batch]))))
    pooled = nnf.adaptive_avg_pool2d(features, 2)  # [B / 4, D, 2, 2]
    return nnf.cross_entropy(model.fc(pooled.permute(0, 2, 3, 1).flatten(0, 2)), clean[1][batch])


@torch.inference_mode()
def accuracy(model: Any) -> dict[str, float]:
    """Return the accuracy on the validation scenes of the dataset: of the main object, and of any object."""
    model.eval()
    scenes = list(scenes_of_split("validation", VALIDATION_SCENES))
    images, _ = to_tensors(scenes, len(scenes), INPUT_SIZE)
    best = torch.cat([model(normalize(batch)) for batch in images.split(CLEAN_PER_STEP)]).argmax(1).tolist()
    labels = [[scene_object.label for scene_object in scene.objects] for scene in scenes]
    main_object = sum(index == present[0] for index, present in zip(best, labels, strict=True))
    any_object = sum(index in present for index, present in zip(best, labels, strict=True))
    return {"main object": round(main_object / len(best), 4), "any object": round(any_object / len(best), 4)}


def to_tensors(scenes: Iterable[Scene], count: int, size: int) -> Pictures:
    """Return pictures, resized to a square, and their labels, uniform for pictures without objects."""
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    targets = torch.full((count, len(CLASSES)), 1 / len(CLASSES))
    for image, target, scene in zip(images, targets, scenes, strict=True):
        image.copy_(
            torch.from_numpy(np.array(scene.image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        )
        if scene.objects:
            target.copy_(nnf.one_hot(torch.tensor(scene.objects[0].label), len(CLASSES)))
    return images, targets


def augment(images: Tensor) -> Tensor:
    """Randomly flip each image and shuffle its color channels."""
    count = len(images)
    shuffled = images[torch.arange(count)[:, None], torch.rand(count, 3).argsort(1)]
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, shuffled, shuffled.flip(-1))


def normalize(images: Tensor) -> Tensor:
    """Normalize uint8 images `[B, 3, h, w]`."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def mosaics(tiles: Tensor) -> Tensor:
    """Arrange tiles `[B, 3, h, w]` in mosaics `[B / 4, 3, 2h, 2w]`, row by row."""
    batch, channels, height, width = tiles.shape
    grid = tiles.view(batch // 4, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch // 4, channels, 2 * height, 2 * width)


if __name__ == "__main__":
    sys.exit(main())
