"""Compare soft labels pooled from label maps, with the local and the linearised head, with the model applied to each crop.

    python tests/benchmarks/annotators.py IMAGES [--num-images 200] [--num-crops 4] [--steps 300] [--checkpoint FILE]

IMAGES is an ImageFolder with train/ and val/. All models except MobileNetV2 are trained from scratch on train/ for `--steps`
batches of 32, which results in weak classifiers. The numbers compare the two maps of a model, not the models.
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

SIZE = 128  # input size of the trained models as annotators, in pixels
TRAIN_SIZE = 64  # image size in training, for models of variable input size
MODELS: dict[str, dict[str, object]] = {
    "resnet10t": {},
    "convnext_atto": {},
    "mobilenetv3_small_100": {},
    "vit_tiny_patch16_224": {"img_size": SIZE, "depth": 4},
}


def train(name: str, args: dict[str, object], source: rd.data.ImageFolderSource, steps: int) -> Path:
    """Train a classifier from scratch and return the file with its weights."""
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
    """Return boxes xyxy `[count, 4]`, 0 to 1, with 8 to 100 % of the area, as RandomResizedCrop draws them."""
    corners = []
    while len(corners) < count:
        area, ratio = random.uniform(0.08, 1), random.uniform(0.75, 4 / 3)
        width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if width <= 1 and height <= 1:
            x, y = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
            corners.append((x, y, x + width, y + height))
    return torch.tensor(corners)


def own_labels(annotator: rd.TimmAnnotator, images: list[PIL.Image.Image], boxes: torch.Tensor) -> torch.Tensor:
    """Return the soft labels of the model `[images * crops, C]` for crops resized to its input size."""
    rows = []
    mean, std = (torch.tensor(values)[:, None, None] for values in (annotator.mean, annotator.std))
    for image, crops in zip(images, boxes, strict=True):
        width, height = image.size
        pieces = [
            image.crop([round(float(v) * s) for v, s in zip(box, (width, height) * 2, strict=True)]) for box in crops
        ]
        pixels = torch.stack([annotator.preprocess(crop) for crop in pieces])
        with torch.inference_mode():
            rows.append(annotator._module.model((pixels / 255 - mean) / std).softmax(1))
    return torch.cat(rows)


def pooled_labels(annotator: rd.TimmAnnotator, images: list[PIL.Image.Image], boxes: torch.Tensor) -> torch.Tensor:
    """Return the soft labels of crops `[images * crops, C]`, pooled from the dense map."""
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
    parser.add_argument("images", type=Path, metavar="IMAGES", help="ImageFolder with train/ and val/")
    parser.add_argument("--num-images", type=int, default=200, help="number of images (default: %(default)s)")
    parser.add_argument("--num-crops", type=int, default=4, help="number of crops per image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps per model (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="weights of mobilenetv2_100 (default: leave the model out)")
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
    if args.checkpoint:
        mobilenet = rd.TimmAnnotator(
            "mobilenetv2_100", checkpoint=args.checkpoint, input_size=224, pad_type="same", **half
        )
        rows = torch.tensor(match_classes(mobilenet.classes, held_out.classes))
        compare("mobilenetv2_100", "ImageNet", {"local": mobilenet}, images, rows[labels], args.num_crops)
    for name, model_kwargs in MODELS.items():
        weights = train(name, model_kwargs, source, args.steps)
        heads = {
            head: rd.TimmAnnotator(
                name, checkpoint=weights, input_size=SIZE, head=head, num_classes=10, **half, **model_kwargs
            )
            for head in ("local", "linearised")
        }
        compare(name, f"{args.steps} steps", heads, images, labels, args.num_crops)


if __name__ == "__main__":
    main()
