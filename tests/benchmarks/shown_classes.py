"""Compare the classes that images show, by their label maps, with the truth.

    python tests/benchmarks/shown_classes.py [IMAGES --annotator MODEL --checkpoint FILE ...] [--full-size IMAGES] [--scenes DATASET]

IMAGES is an ImageFolder of photos of one object each. They are annotated with the classes of the folder and with all classes of the
annotator, and mosaics of two to four of them with the classes of the folder. `--full-size` adds a folder of other photos, annotated
with all classes. For scenes of the demo, drawn here, maps are drawn from the true boxes (8x8 locations, a logit of 8 in the box of an
object); DATASET is the output of `relabel demo`, with the maps of its annotator. With `--num-crops`, labels are
those of stored crops instead of label maps, and there are no drawn maps.

*Several* is the share of pictures that show several classes. *Old measure* is that share by the measure of early versions: a
probability of at least 0.5 at any location. Precision and recall are those of the pairs of picture and class. Of photos, only the
label is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from label_errors import Pictures, real_pictures
from label_errors import scenes as demo_scenes

from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.demo.scenes import CLASSES, Scene, draw_clean, draw_scene
from relabel_datasets.labels.crop_labels import CropLabels
from relabel_datasets.labels.encodings import Encoded, encode_logits
from relabel_datasets.labels.windows import CROPS_DEFINITION, DEFINITION, measure_stored_crops, measure_windows

_GRID, _LOGIT = 8, 8.0


def confident(encoded: Encoded) -> torch.Tensor:
    """Return the number of classes with a probability of at least 0.5 at any location, `[B]`."""
    return (encoded.encoding.dense(encoded).softmax(1).amax((2, 3)) >= 0.5).sum(1)


def shown_classes(stored: Encoded | CropLabels) -> torch.Tensor:
    """Return the classes that pictures show, `[B, C]`."""
    if isinstance(stored, CropLabels):
        return measure_stored_crops(stored.soft_labels()[None], torch.zeros(1, dtype=torch.long)).shown
    return measure_windows(stored, torch.zeros(len(stored.logits), dtype=torch.long)).shown


def drawn_map(scene: Scene) -> torch.Tensor:
    """Return the logits `[C, 8, 8]` of a perfect annotator."""
    width, height = scene.image.size
    dense = torch.zeros(len(CLASSES), _GRID, _GRID)
    x, y = (torch.arange(_GRID) + 0.5) / _GRID * width, (torch.arange(_GRID) + 0.5) / _GRID * height
    for label, _, (x1, y1, x2, y2) in scene.objects:
        inside = ((y1 <= y) & (y < y2))[:, None] & ((x1 <= x) & (x < x2))
        dense[label][inside] = _LOGIT
    return dense


def drawn(name: str, pictures: Sequence[Scene]) -> Pictures:
    """Return pictures of the demo with perfect maps."""
    encoded = [encode_logits(torch.stack(list(map(drawn_map, pictures))), k=len(CLASSES))]
    present = [{scene_object.label for scene_object in scene.objects} for scene in pictures]
    labels = np.array([scene.objects[0].label for scene in pictures])
    return Pictures(name, encoded, labels, present, len(CLASSES))


def row(pictures: Pictures) -> str:
    """Return one line of the table."""
    shown = torch.cat(list(map(shown_classes, pictures.stored))).numpy()
    maps = [encoded for encoded in pictures.stored if isinstance(encoded, Encoded)]
    old = f"{np.mean(torch.cat(list(map(confident, maps))).numpy() > 1):.1%}" if maps else ""
    truth = np.zeros_like(shown)
    for i, classes in enumerate(pictures.present):
        truth[i, list(classes)] = True
    several, true_several, hits = shown.sum(1) > 1, truth.sum(1) > 1, (shown & truth).sum()
    is_known = "photos" not in pictures.name
    cells = [
        pictures.name, str(len(shown)), str(pictures.num_classes), f"{true_several.mean():.1%}" if is_known else "unknown",
        f"{several.mean():.1%}", old, f"{(several == true_several).mean():.1%}" if is_known else "",
        f"{hits / max(1, shown.sum()):.1%}" if is_known else "", f"{hits / truth.sum():.1%}",
        f"{truth.sum(1).mean():.2f}" if is_known else "", f"{shown.sum(1).mean():.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", nargs="?", help="ImageFolder of photos of one object")
    parser.add_argument("--num-images", type=int, default=500, help="number of photos (default: %(default)s)")
    parser.add_argument("--num-mosaics", type=int, default=500, help="number of mosaics (default: %(default)s)")
    parser.add_argument(
        "--num-crops", type=int, metavar="N", help="number of stored crops per picture (default: label maps)"
    )
    parser.add_argument("--full-size", type=Path, metavar="IMAGES", help="ImageFolder of other photos")
    parser.add_argument("--scenes", type=Path, metavar="DATASET", help="scenes with label maps, from `relabel demo`")
    add_annotator_arguments(parser, default="mobilenetv2_100")
    args = parser.parse_args()
    print(f"{DEFINITION if args.num_crops is None else CROPS_DEFINITION}\n")
    columns = (
        "pictures",
        "number",
        "classes",
        "several, truth",
        "several",
        "old measure",
        "right",
        "precision",
        "recall",
        "classes per picture, truth",
        "classes per picture",
    )
    print(f"| {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * (len(columns) - 1))
    sets: list[Pictures] = []
    if args.num_crops is None:
        generator = np.random.default_rng(0)
        one, many = draw_clean(470), [draw_scene(generator, i % len(CLASSES), (96, 128)) for i in range(400)]
        sets.append(drawn("scenes, perfect maps", many))
        sets.append(drawn("one object, perfect maps", [scene for scene in one if scene.objects]))
    sets += [demo_scenes(args.scenes, args.num_crops)] if args.scenes else []
    if args.images or args.full_size:
        annotator = annotator_from(args)
        if args.images:
            sets += real_pictures(annotator, args.images, args.num_images, args.num_mosaics, args.num_crops)
        if args.full_size:
            _, every, _ = real_pictures(annotator, args.full_size, args.num_images, 0, args.num_crops)
            sets.append(every._replace(name=f"full-size {every.name}"))
    for pictures in sets:
        print(row(pictures), flush=True)


if __name__ == "__main__":
    main()
