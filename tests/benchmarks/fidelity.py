"""Measure the size of label maps, and the distance of their labels from those of dense logits, per encoding and input size.

    python tests/benchmarks/fidelity.py IMAGES --annotator MODEL [--checkpoint FILE ...]

IMAGES is an ImageFolder, of which `--num-images` random images are annotated. For `--num-crops` random crops of each image (as
RandomResizedCrop draws them, 8 to 100 % of the area), labels are pooled from the stored map, after a round trip through its bytes,
and from the dense logits by torchvision's roi_align. KL is the divergence of the stored from the dense label in nats. Agreement is
the share of crops with the same best class. Bytes on disk are those of label-only shards, including the overhead of the tar.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import roi_align
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.labels import codec
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.shards.tars import ShardWriter

VARIANTS = [
    ("topk", 5, "float16"),  # the published scheme
    ("topk", 10, "float16"),
    ("heatmaps", 3, "uint8"),
    ("heatmaps", 5, "uint4"),
    ("heatmaps", 5, "uint8"),
    ("heatmaps", 10, "uint4"),  # the default
    ("heatmaps", 10, "uint8"),
    ("heatmaps", 15, "uint4"),
    ("heatmaps", 20, "uint4"),
    ("heatmaps", 20, "float16"),
]


def random_boxes(sizes: list[tuple[int, int]], crops: int) -> torch.Tensor:
    """Return boxes of random crops `[N, crops, 4]`, 0 to 1, of images of (height, width)."""
    boxes = []
    for height, width in sizes:
        image = torch.empty(1, 1, 1).expand(1, height, width)
        for _ in range(crops):
            top, left, h, w = v2.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            boxes.append([left / width, top / height, (left + w) / width, (top + h) / height])
    return torch.tensor(boxes).reshape(len(sizes), crops, 4)


def dense_labels(dense: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return log probabilities `[N, crops, C]` pooled from dense logits."""
    height, width = dense.shape[2:]
    scaled = boxes * torch.tensor([width, height, width, height])
    pooled = roi_align(dense, list(scaled), 1, aligned=True)[:, :, 0, 0]
    return pooled.log_softmax(1).reshape(*boxes.shape[:2], -1)


def stored_labels(blobs: list[bytes], boxes: torch.Tensor) -> torch.Tensor:
    """Return probabilities `[N, crops, C]` pooled from stored maps."""
    labels = []
    for blob, image_boxes in zip(blobs, boxes, strict=True):
        label_map = rd.LabelMap.from_safetensors(blob)
        count = len(image_boxes)
        base = None if label_map.base is None else label_map.base.expand(count, -1)
        logits, classes = (t.expand(count, -1, -1, -1) for t in (label_map.logits, label_map.classes))
        labels.append(rd.pool_labels(logits, classes, image_boxes, num_classes=label_map.num_classes, base=base))
    return torch.stack(labels)


def bytes_on_disk(blobs: list[bytes]) -> float:
    """Return the bytes per image of a label-only shard."""
    with tempfile.TemporaryDirectory() as folder, ShardWriter(Path(folder) / "s.tar", None) as writer:
        for i, blob in enumerate(blobs):
            writer.add(f"n01440764_{i}", 0, None, blob)
        return writer.close().num_bytes / len(blobs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="ImageFolder to annotate")
    parser.add_argument("--num-images", type=int, default=200, help="number of images (default: %(default)s)")
    parser.add_argument("--num-crops", type=int, default=8, help="number of crops per image (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[480], help="input sizes in pixels (default: 480)")
    add_annotator_arguments(parser)
    args = parser.parse_args()
    source = rd.data.ImageFolderSource(args.images)
    chosen = np.random.default_rng(0).permutation(len(source.keys))[: args.num_images].tolist()
    images = [rd.decode_image(source.read(i), source.name(i)) for i in chosen]
    sizes = [(image.height, image.width) for image in images]
    print("| map | encoding | k | stored as | bytes per map | bytes on disk | KL | top-1 agreement |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in args.sizes:
        annotator = annotator_from(args, size)
        pixels = [annotator.preprocess(image) for image in images]
        dense = torch.cat([annotator(torch.stack(pixels[i : i + 16])).cpu() for i in range(0, len(pixels), 16)])
        torch.manual_seed(0)
        boxes = random_boxes(sizes, args.num_crops)
        reference = dense_labels(dense, boxes)
        for encoding, k, dtype in VARIANTS:
            blobs = codec.encode(encode_logits(dense, encoding, k), sizes, dtype)
            labels = stored_labels(blobs, boxes)
            kl = (reference.exp() * (reference - labels.clamp_min(1e-30).log())).sum(-1).mean()
            agreement = (reference.argmax(-1) == labels.argmax(-1)).float().mean()
            grid = "x".join(map(str, (*dense.shape[2:], dense.shape[1])))
            mean_bytes = sum(map(len, blobs)) / len(blobs)
            print(
                f"| {grid} | {encoding} | {k} | {dtype} | {mean_bytes:.0f} | {bytes_on_disk(blobs):.0f} | {kl:.4f} | "
                f"{agreement:.4f} |"
            )


if __name__ == "__main__":
    main()
