"""Measure how close the labels of random crops are to the annotator's own answers to these crops, per kind of stored label.

    python tests/benchmarks/crop_fidelity.py IMAGES --annotator MODEL [--checkpoint FILE ...]

IMAGES is an ImageFolder, of which `--num-images` random images are used, with `--num-crops` random crops each (as RandomResizedCrop
draws them, 8 to 100 % of the area). The answer is the softmax of the annotator's logits for the crop as an image of its own, at
`--input-size`. Labels are read from stored bytes. What depends on data, such as gains, is fitted on the first half of the images;
all figures are those of the other half. KL is the divergence of the label from the answer in nats.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.ops import roi_align

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import Annotator, classify
from relabel_datasets.annotate.calibrate import fit_calibration, measure_crops, pooled_logits
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.labels import codec
from relabel_datasets.labels.crops import random_resized_crops
from relabel_datasets.labels.encodings import encode_logits
from relabel_datasets.labels.view import rows_of_boxes

_BATCH = 16
Kind = tuple[str, tuple[int, ...]]  # encoding and input sizes


class Crops(NamedTuple):
    """Random crops of N images, and the annotator's answers to them."""

    images: list[PIL.Image.Image]
    boxes: np.ndarray  # [N, n, 4]
    answers: Tensor  # logits [N, n, C]

    @property
    def num_fitted(self) -> int:
        """Number of images, the first ones, for whatever is fitted to data."""
        return len(self.images) // 2

    @property
    def shares(self) -> np.ndarray:
        """Shares of the image area `[N, n]`."""
        return (self.boxes[..., 2] - self.boxes[..., 0]) * (self.boxes[..., 3] - self.boxes[..., 1])


class Row(NamedTuple):
    """Row of the table."""

    name: str
    logits: Tensor  # of the labels, up to a constant, [N, n, C]
    num_bytes: float  # per image
    passes: int  # forward passes of the annotator per image


class StoredMaps(NamedTuple):
    """Stored label maps, each of one or several input sizes."""

    sizes: tuple[int, ...]
    blobs: list[bytes]
    pooled: Tensor  # mean logits of the crops, [N, n, S, C]

    @property
    def num_bytes(self) -> float:
        return sum(map(len, self.blobs)) / len(self.blobs)


def annotate(
    annotator: Annotator, images: list[PIL.Image.Image], call: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return dense logits `[N, C, H, W]`, or what another function of the preprocessed images returns."""
    pixels = [annotator.preprocess(image) for image in images]
    return torch.cat(
        [(call or annotator)(torch.stack(pixels[i : i + _BATCH])).float().cpu() for i in range(0, len(pixels), _BATCH)]
    )


def draw_crops(images: list[PIL.Image.Image], num_crops: int, annotator: Annotator) -> Crops:
    """Draw random crops and annotate them."""
    generator, boxes, answers = np.random.default_rng(0), [], []
    for image in images:
        drawn = random_resized_crops([(image.height, image.width)] * num_crops, generator)
        corners = np.rint(drawn * [*image.size, *image.size])
        parts = [image.crop(tuple(box)) for box in corners.astype(int).tolist()]
        boxes.append(drawn)
        answers.append(annotate(annotator, parts, partial(classify, annotator)))
    return Crops(images, np.stack(boxes), torch.stack(answers))


def store_maps(args: argparse.Namespace, crops: Crops, kinds: list[Kind]) -> Iterator[StoredMaps]:
    """Annotate whole images at all input sizes, and yield their stored maps of each encoding."""
    annotators = {size: annotator_from(args, size) for size in args.sizes}
    blobs: dict[Kind, list[bytes]] = {kind: [] for kind in kinds}
    for start in range(0, len(crops.images), _BATCH):
        images = crops.images[start : start + _BATCH]
        dense = {size: annotate(annotator, images) for size, annotator in annotators.items()}
        for encoding, sizes in kinds:
            encoded = encode_logits([dense[size] for size in sizes], encoding)
            blobs[encoding, sizes] += codec.encode(encoded, [(image.height, image.width) for image in images])
    for kind, stored in blobs.items():
        pooled = [pooled_logits(blob, rows_of_boxes(boxes)) for blob, boxes in zip(stored, crops.boxes, strict=True)]
        yield StoredMaps(kind[1], stored, torch.stack(pooled))


def averaged(maps: StoredMaps) -> Tensor:
    """Return the pooled logits of uncalibrated labels."""
    return maps.pooled.mean(2)


def calibrated(maps: StoredMaps, crops: Crops) -> Tensor:
    """Return pooled logits with the gains that a build would store for the first half of the images."""
    fitted = slice(crops.num_fitted)
    records = map(measure_crops, maps.blobs[fitted], crops.boxes[fitted], crops.answers[fitted])
    calibration = fit_calibration([record for of_image in records for record in of_image])
    labels = torch.einsum("ijsc,ijs->ijc", maps.pooled, torch.from_numpy(calibration.gains_at(crops.shares)))
    exact = divergences(labels[fitted], crops.answers[fitted]).mean()
    sys.stderr.write(f"{maps.sizes} px: {calibration}, {exact:.4f} with all classes\n")
    return labels


def divergences(labels: Tensor, answers: Tensor) -> Tensor:
    """Return KL(answer || label) `[N, n]` of logits `[N, n, C]`."""
    target = answers.double().log_softmax(-1)
    return (target.exp() * (target - labels.double().log_softmax(-1))).sum(-1)


def dense_row(args: argparse.Namespace, crops: Crops) -> Row:
    """Return the row of dense logits in float16, pooled by torchvision."""
    annotator, pooled = annotator_from(args, args.size), []
    for image, boxes in zip(crops.images, crops.boxes, strict=True):
        dense = annotate(annotator, [image])
        height, width = dense.shape[2:]
        scaled = torch.from_numpy(boxes * [width, height, width, height]).float()
        pooled.append(roi_align(dense, [scaled], 1, aligned=True)[:, :, 0, 0])
    return Row(f"one dense map, {args.size} px, pooled as in the paper", torch.stack(pooled), 2 * dense[0].numel(), 1)


def map_rows(args: argparse.Namespace, crops: Crops) -> Iterator[Row]:
    """Yield the rows of label maps: the paper's, one map with gains at each size, and several maps with gains."""
    yield dense_row(args, crops)
    groups = list(dict.fromkeys([(min(args.sizes), args.size), tuple(args.sizes)]))
    kinds = [("topk", (args.size,)), *(("heatmaps", (size,)) for size in args.sizes)]
    kinds += [("multiscale", group) for group in groups]
    stored = dict(zip(kinds, store_maps(args, crops, kinds), strict=True))
    paper, main = stored["topk", (args.size,)], stored["heatmaps", (args.size,)]
    yield Row(f"one map, {args.size} px, topk 5 as in the paper", averaged(paper), paper.num_bytes, 1)
    yield Row("same, with gains by area", calibrated(paper, crops), paper.num_bytes, 1)
    yield Row(f"one map, {args.size} px, heatmaps", averaged(main), main.num_bytes, 1)
    for size in args.sizes:
        maps = stored["heatmaps", (size,)]
        yield Row(f"one map, {size} px, heatmaps with gains by area", calibrated(maps, crops), maps.num_bytes, 1)
    for group in groups:
        maps, name = stored["multiscale", group], f"{len(group)} maps, {', '.join(map(str, group))} px, multiscale"
        yield Row(name, averaged(maps), maps.num_bytes, len(group))
        yield Row(f"{name} with gains by area", calibrated(maps, crops), maps.num_bytes, len(group))


ROWS = [map_rows]  # functions of the arguments and the crops that yield rows


def print_row(row: Row, crops: Crops) -> None:
    """Print a row, measured on the images that nothing was fitted to."""
    chosen = slice(crops.num_fitted, None)
    values = divergences(row.logits[chosen], crops.answers[chosen])
    same = (row.logits[chosen].argmax(-1) == crops.answers[chosen].argmax(-1)).double().mean()
    print(
        f"| {row.name} | {values.mean():.3f} | {values.median():.3f} | {same:.3f} | {row.num_bytes:,.0f} | {row.passes} |",
        flush=True,
    )


def main(arguments: Any = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="ImageFolder to annotate")
    parser.add_argument("--num-images", type=int, default=120, help="number of images (default: %(default)s)")
    parser.add_argument("--num-crops", type=int, default=12, help="number of crops per image (default: %(default)s)")
    parser.add_argument("--size", type=int, default=448, help="side of the main map's input (default: %(default)s px)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[224, 320, 448, 640, 896],
        help="sides of all maps' inputs, --size among them",
    )
    add_annotator_arguments(parser)
    args = parser.parse_args(arguments)
    source = rd.data.ImageFolderSource(args.images)
    chosen = np.random.default_rng(0).permutation(len(source.keys))[: args.num_images].tolist()
    images = [rd.decode_image(source.read(i), source.name(i)) for i in chosen]
    crops = draw_crops(images, args.num_crops, annotator_from(args))
    print("| label of a crop | KL, mean | KL, median | same top class | bytes per image | forward passes per image |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for make_rows in ROWS:
        for row in make_rows(args, crops):
            print_row(row, crops)


if __name__ == "__main__":
    main()
