"""Soft labels of crops, pooled from maps with the local and the linearised head, against the model run on each crop.

    python tests/benchmarks/annotators.py IMAGES [--images 200] [--crops 4] [--steps 300]
        [--mobilenet mobilenetv2_100.safetensors]

IMAGES is an ImageFolder with train/ and val/. Models other than MobileNetV2 are trained from scratch on train/ for so many
batches of 32, which makes weak classifiers; the numbers compare their two maps, not the models.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import PIL.Image
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.annotate.classes import match_classes

SIZE = 128  # of the trained models' images as annotators
TRAIN_SIZE = 64  # in training, where that is not fixed
MODELS: dict[str, dict[str, object]] = {
    "resnet10t": {},
    "convnext_atto": {},
    "mobilenetv3_small_100": {},
    "vit_tiny_patch16_224": {"img_size": SIZE, "depth": 4},
}


def train(name: str, args: dict[str, object], source: rd.data.ImageFolderSource, steps: int) -> Path:
    """Train a classifier from scratch, and return its weights."""
    model = timm.create_model(name, num_classes=len(source.classes), **args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    size = SIZE if "img_size" in args else TRAIN_SIZE
    transform = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(size, scale=(0.3, 1)), v2.RandomHorizontalFlip(),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])  # fmt: skip
    for _ in range(steps):
        chosen = random.sample(range(len(source.keys)), 32)
        images = torch.stack([transform(rd.decode_image(source.read(i))) for i in chosen])
        loss = F.cross_entropy(model(images), torch.tensor([source.labels[i] for i in chosen]), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    path = Path(tempfile.mkdtemp()) / f"{name}.safetensors"
    save_file(model.state_dict(), path)
    return path


def random_crops(count: int) -> torch.Tensor:
    """Return `[count, 4]` boxes xyxy in 0 .. 1, of 8 % of the area to all of it, as RandomResizedCrop's."""
    corners = []
    while len(corners) < count:
        area, ratio = random.uniform(0.08, 1), random.uniform(0.75, 4 / 3)
        width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if width <= 1 and height <= 1:
            x, y = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
            corners.append((x, y, x + width, y + height))
    return torch.tensor(corners)


def own_labels(annotator: rd.TimmAnnotator, images: list[PIL.Image.Image], boxes: torch.Tensor) -> torch.Tensor:
    """Return the model's own soft labels `[images * crops, C]` of crops that are resized to its input size."""
    rows = []
    mean, std = (torch.tensor(values)[:, None, None] for values in (annotator.mean, annotator.std))
    for image, crops in zip(images, boxes, strict=True):
        width, height = image.size
        cut = [
            image.crop([round(float(v) * s) for v, s in zip(box, (width, height) * 2, strict=True)]) for box in crops
        ]
        pixels = torch.stack([annotator.preprocess(crop) for crop in cut])
        with torch.inference_mode():
            rows.append(annotator._module.model((pixels / 255 - mean) / std).softmax(1))
    return torch.cat(rows)


def pooled_labels(annotator: rd.TimmAnnotator, images: list[PIL.Image.Image], boxes: torch.Tensor) -> torch.Tensor:
    """Return the soft labels `[images * crops, C]` of crops that are pooled from the dense map."""
    rows = []
    for image, crops in zip(images, boxes, strict=True):
        maps = annotator(annotator.preprocess(image)[None]).clone().cpu()
        height, width = maps.shape[2:]
        scaled = crops * torch.tensor([width, height] * 2)
        rows.append(roi_align(maps, [scaled], 1, aligned=True)[:, :, 0, 0].softmax(1))
    return torch.cat(rows)


def compare(
    name: str, note: str, annotators: dict[str, rd.TimmAnnotator], images: list[PIL.Image.Image], labels: torch.Tensor,
    num_crops: int,
) -> None:  # fmt: skip
    """Print a row of the table for each head."""
    boxes = torch.stack([random_crops(num_crops) for _ in images])
    first = next(iter(annotators.values()))
    own = own_labels(first, images, boxes)
    whole = torch.tensor([[[0.0, 0, 1, 1]]]).repeat(len(images), 1, 1)
    on_whole = own_labels(first, images, whole)
    accuracy = (on_whole.argmax(1) == labels).float().mean()
    for head, annotator in annotators.items():
        pooled = pooled_labels(annotator, images, boxes)
        kl = (own * (own.clamp(min=1e-12).log() - pooled.clamp(min=1e-12).log())).sum(1).mean()
        agreement = (own.argmax(1) == pooled.argmax(1)).float().mean()
        kept = (pooled_labels(annotator, images, whole) - on_whole).abs().sum(1).mean()
        exact = "exact" if annotator.linear_head else "approximate"
        print(
            f"| {name} | {note} | {exact} | {head} | {accuracy:.3f} | {kl:.4f} | {agreement:.4f} | {kept:.1e} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--images", dest="num_images", type=int, default=200)
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mobilenet", type=Path)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    source = rd.data.ImageFolderSource(args.images / "train")
    held_out = rd.data.ImageFolderSource(args.images / "val")
    chosen = random.sample(range(len(held_out.keys)), args.num_images)
    images = [rd.decode_image(held_out.read(i)) for i in chosen]
    labels = torch.tensor([held_out.labels[i] for i in chosen])
    print("| model | weights | local map | head | accuracy | KL of crops | top-1 agreement | whole image |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "device": "cpu"}
    if args.mobilenet:
        one = rd.TimmAnnotator("mobilenetv2_100", checkpoint=args.mobilenet, input_size=224, pad_type="same", **half)
        rows = torch.tensor(match_classes(one.classes, held_out.classes))
        compare("mobilenetv2_100", "ImageNet", {"local": one}, images, rows[labels], args.crops)
    for name, model_kwargs in MODELS.items():
        weights = train(name, model_kwargs, source, args.steps)
        heads = {
            head: rd.TimmAnnotator(
                name, checkpoint=weights, input_size=SIZE, head=head, num_classes=10, **half, **model_kwargs
            )
            for head in ("local", "linearised")
        }
        compare(name, f"{args.steps} steps", heads, images, labels, args.crops)


if __name__ == "__main__":
    main()
