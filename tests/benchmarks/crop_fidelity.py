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
_KNOTS = np.geomspace(0.08, 1, 4)


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
    """Stored label maps of one input size."""

    size: int
    blobs: list[bytes]
    pooled: Tensor  # mean logits of the crops, [N, n, C]

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


def store_maps(args: argparse.Namespace, crops: Crops, size: int, encoding: str = "heatmaps") -> StoredMaps:
    """Annotate whole images at an input size, and store their maps."""
    annotator = annotator_from(args, size)
    blobs: list[bytes] = []
    for start in range(0, len(crops.images), _BATCH):
        images = crops.images[start : start + _BATCH]
        encoded = encode_logits(annotate(annotator, images), encoding)
        blobs += codec.encode(encoded, [(image.height, image.width) for image in images])
    pooled = [pooled_logits(blob, rows_of_boxes(boxes)) for blob, boxes in zip(blobs, crops.boxes, strict=True)]
    return StoredMaps(size, blobs, torch.stack(pooled))


def calibrated(maps: StoredMaps, crops: Crops) -> Tensor:
    """Return pooled logits with the gains that a build would store for the first half of the images."""
    fitted = slice(crops.num_fitted)
    records = map(measure_crops, maps.blobs[fitted], crops.boxes[fitted], crops.answers[fitted])
    calibration = fit_calibration([record for of_image in records for record in of_image])
    sys.stderr.write(f"{maps.size} px: {calibration}\n")
    return maps.pooled * torch.from_numpy(calibration.gains_at(crops.shares))[..., None]


def combined(all_maps: list[StoredMaps], crops: Crops) -> Tensor:
    """Return the sum of the pooled logits of several maps, each with weights by area that are fitted together."""
    positions = np.interp(np.log(crops.shares), np.log(_KNOTS), np.arange(len(_KNOTS)))
    hats = torch.from_numpy(np.maximum(0, 1 - np.abs(positions[..., None] - np.arange(len(_KNOTS)))))  # [N, n, knots]
    pooled = torch.stack([maps.pooled for maps in all_maps], 2)  # [N, n, maps, C]
    weights = torch.full((len(_KNOTS), len(all_maps)), 1 / len(all_maps), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")
    fitted = slice(crops.num_fitted)

    def mix(images: slice) -> Tensor:
        return torch.einsum("ijk,ks,ijsc->ijc", hats[images], weights, pooled[images])

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = divergences(mix(fitted), crops.answers[fitted]).mean()
        value.backward()
        return value

    optimizer.step(loss)
    sizes = [maps.size for maps in all_maps]
    sys.stderr.write(f"weights of {sizes} px, by area: {weights.detach().numpy().round(2).tolist()}\n")
    return mix(slice(None)).detach()


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
    stored = {size: store_maps(args, crops, size) for size in args.sizes}
    main = stored[args.size]
    paper = store_maps(args, crops, args.size, "topk")
    yield Row(f"one map, {args.size} px, topk 5 as in the paper", paper.pooled, paper.num_bytes, 1)
    yield Row("same, with gains by area", calibrated(paper, crops), paper.num_bytes, 1)
    yield Row(f"one map, {args.size} px, heatmaps", main.pooled, main.num_bytes, 1)
    for size, maps in stored.items():
        yield Row(f"one map, {size} px, heatmaps with gains by area", calibrated(maps, crops), maps.num_bytes, 1)
    groups = [[stored[min(stored)], main], list(stored.values())]
    for group in groups if len(stored) > 2 else groups[:1]:
        names = ", ".join(str(maps.size) for maps in group)
        num_bytes = sum(maps.num_bytes for maps in group)
        yield Row(f"{len(group)} maps, {names} px, gains by area", combined(group, crops), num_bytes, len(group))


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
