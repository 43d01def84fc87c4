"""Measure the size and fidelity of stored crop labels, and the time to compress and read them.

    python tests/benchmarks/crop_codec.py IMAGES --annotator MODEL [--checkpoint FILE ...]

IMAGES is an ImageFolder. The annotator labels `--num-crops` random crops of each of `--num-images` random images, as
`relabel build --encoding crops` does. KL is the divergence of the stored label from the annotator's in nats, of all crops. Bytes
are those of the stored tensors of the labels. What the rest of a file takes is printed below the table.
Encoding is the time per image, reading that of the label of one crop, both on one thread.

The settings of the codec were chosen on the first 100 images of the random order, so `--skip 100` leaves them out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import Annotator, classify
from relabel_datasets.annotate.crop_shard import cut_crops
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.labels.encodings.base import Array
from relabel_datasets.labels.encodings.crop_codec import compress_crops, decompress_labels, sparse_crops

Compress = Callable[[torch.Tensor], dict[str, Array]]


class Measured(NamedTuple):
    """What one form of stored labels costs and loses, as means over images."""

    bytes_per_crop: float
    kl: float
    median_kl: float
    agreement: float
    encode_ms: float
    read_us: float


def sparse(k: int) -> Compress:
    """Return a function that stores the best k probabilities, the rest evenly: FKD's marginal smoothing."""

    def compress(logits: torch.Tensor) -> dict[str, Array]:
        probs, classes = logits.softmax(1).topk(k)
        return sparse_crops(classes.numpy(), probs.half().numpy(), logits.shape[1], spread_rest=True)

    return compress


def compact(k: int) -> Compress:
    """Return a function that compresses logits to k components."""
    return lambda logits: compress_crops(logits, k)


FORMS: dict[str, Compress] = {
    "top 5, the rest evenly (FKD)": sparse(5),
    "top 10, the rest evenly (FKD)": sparse(10),
    **{f"compact, k = {k}": compact(k) for k in (4, 8, 16, 32)},
}


def measure(images: list[torch.Tensor], compress: Compress) -> Measured:
    """Measure one form on the logits `[N, C]` of the crops of some images."""
    sizes, divergences, agreements, encode_times, read_times = [], [], [], [], []
    for logits in images:
        num_crops, num_classes = logits.shape
        start = time.perf_counter()
        arrays = compress(logits)
        encode_times.append(time.perf_counter() - start)
        sizes.append(sum(array.nbytes for array in arrays.values()) / num_crops)
        labels = torch.from_numpy(decompress_labels(arrays, num_classes, range(num_crops))).double()
        wanted = logits.double().log_softmax(1)
        divergences.append((wanted.exp() * (wanted - labels.clamp_min(1e-30).log())).sum(1))
        agreements.append((labels.argmax(1) == wanted.argmax(1)).double())
        for crop in range(num_crops):
            start = time.perf_counter()
            decompress_labels(arrays, num_classes, [crop])
            read_times.append(time.perf_counter() - start)
    kl = torch.cat(divergences)
    return Measured(
        float(np.mean(sizes)), kl.mean().item(), kl.median().item(), torch.cat(agreements).mean().item(),
        1e3 * float(np.median(encode_times)), 1e6 * float(np.median(read_times)),
    )  # fmt: skip


def annotate(annotator: Annotator, images: Path, args: argparse.Namespace) -> list[torch.Tensor]:
    """Return the annotator's logits `[N, C]` of random crops of each image."""
    source = rd.data.ImageFolderSource(images)
    chosen = np.random.default_rng(0).permutation(len(source.keys))[args.skip :][: args.num_images].tolist()
    logits = []
    for i in chosen:
        image = rd.decode_image(source.read(i), source.name(i))
        crops = cut_crops(image, source.keys[i], (image.height, image.width), args.num_crops)
        pixels = torch.stack([annotator.preprocess(crop) for crop in crops])
        logits.append(torch.cat([classify(annotator, batch).float().cpu() for batch in pixels.split(25)]))
    return logits


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="ImageFolder to annotate")
    parser.add_argument("--num-images", type=int, default=60, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--skip", type=int, default=0, help="number of images of the random order to leave out (default: 0)"
    )
    parser.add_argument("--num-crops", type=int, default=100, help="number of crops per image (default: %(default)s)")
    parser.add_argument(
        "--subset", type=int, nargs="*", default=[24], help="also measure the first crops only (default: 24)"
    )
    add_annotator_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = annotate(annotator_from(args), args.images, args)
    print(
        "| crops per image | labels | bytes per crop | KL, mean | KL, median | same best class | encode, ms | read, µs |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for num_crops in [args.num_crops, *args.subset]:
        for name, compress in FORMS.items():
            result = measure([logits[:num_crops] for logits in images], compress)
            print(
                f"| {num_crops} | {name} | {result.bytes_per_crop:.1f} | {result.kl:.4f} | {result.median_kl:.4f} | "
                f"{result.agreement:.1%} | {result.encode_ms:.0f} | {result.read_us:.0f} |"
            )
    blob = rd.CropLabels.from_logits(images[0], canvas_size=(375, 500), key="a").to_safetensors()
    rest = len(blob) - sum(array.nbytes for array in compress_crops(images[0]).values())
    print(f"\nThe header of a file and the seed of its boxes take {rest} bytes more per image.")


if __name__ == "__main__":
    main()
