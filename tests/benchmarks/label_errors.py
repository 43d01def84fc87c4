"""Rank images by how likely their label is wrong, compared with cleanlab on the same probabilities.

    python tests/benchmarks/label_errors.py [IMAGES --annotator MODEL --checkpoint FILE ...] [--scenes DATASET] [--num-crops N]

IMAGES is an ImageFolder, of which `--num-images` random images are annotated, with the classes of the folder and with all classes of
the annotator. Mosaics of two to four of these images show several objects; their label is the largest. DATASET is the output of
`relabel demo`, whose scenes show several objects, too. Its label maps are those of the demo. With `--num-crops`, labels are those of
stored crops instead of label maps.

A share of the labels is replaced by classes that are not in the image: uniform noise draws any class, pair noise takes the next one.
AUROC is that of the margin for wrong against correct labels. Precision is the share of wrong labels among as many images with the
lowest margin as there are wrong labels. cleanlab gets the label of the whole image, pooled from its map or the mean of its crops; for
each row and column, the best of its five rankings counts. The last columns compare the images that `relabel analyze` lists with those
of cleanlab's `find_label_issues`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

import relabel_datasets as rd
from relabel_datasets.analysis.suspects import find_suspects, label_margins
from relabel_datasets.annotate.annotator import classify
from relabel_datasets.annotate.classes import match_classes
from relabel_datasets.annotate.crop_shard import cut_crops
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.demo.annotator import load_demo_annotator
from relabel_datasets.demo.scenes import CLASSES, read_objects
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.crop_labels import CropLabels
from relabel_datasets.labels.encodings import Encoded, encode_logits
from relabel_datasets.labels.windows import SCALES, pool_box, window_boxes

RATES = (0.05, 0.2, 0.4)
NOISES = ("uniform", "pair")
RANKINGS = [(method, adjust) for method in ("self_confidence", "normalized_margin") for adjust in (False, True)]
RANKINGS.append(("confidence_weighted_entropy", False))
MOSAIC_SIDE = 320  # pixels
_BATCH = 32


class Pictures(NamedTuple):
    """Labels of pictures, and the classes that each picture really shows as far as known."""

    name: str
    stored: Sequence[Encoded | CropLabels]  # label maps in batches, or the stored crops of each picture
    labels: np.ndarray
    present: list[set[int]]
    num_classes: int


def mosaics(
    images: Sequence[PIL.Image.Image], labels: Sequence[int], count: int
) -> tuple[list[PIL.Image.Image], list[list[int]]]:
    """Return mosaics of two to four images of different classes, and their classes, the largest first."""
    random = np.random.default_rng(0)
    pictures, classes = [], []
    by_class = {label: np.flatnonzero(np.array(labels) == label) for label in sorted(set(labels))}
    for i in range(count):
        order = [list(by_class)[i % len(by_class)]]
        order += random.permutation([label for label in by_class if label != order[0]])[
            : random.integers(1, 4)
        ].tolist()
        side, middle = MOSAIC_SIDE, round(MOSAIC_SIDE * random.uniform(0.5, 0.65))
        cells = {
            2: [(0, 0, middle, side), (middle, 0, side, side)],
            3: [(0, 0, middle, side), (middle, 0, side, side // 2), (middle, side // 2, side, side)],
            4: [
                (0, 0, middle, middle),
                (middle, 0, side, middle),
                (0, middle, middle, side),
                (middle, middle, side, side),
            ],
        }[len(order)]
        picture = PIL.Image.new("RGB", (side, side))
        for label, (x1, y1, x2, y2) in zip(order, cells, strict=True):
            picture.paste(images[random.choice(by_class[label])].resize((x2 - x1, y2 - y1)), (x1, y1))
        pictures.append(picture)
        classes.append(order)
    return pictures, classes


def annotate(annotator: rd.Annotator, images: Sequence[PIL.Image.Image]) -> Iterator[torch.Tensor]:
    """Yield the dense logits of the images, in batches."""
    for start in range(0, len(images), _BATCH):
        pixels = torch.stack([annotator.preprocess(image) for image in images[start : start + _BATCH]])
        with torch.inference_mode():
            yield annotator(pixels).float().cpu()


def annotate_crops(
    annotator: rd.Annotator, images: Sequence[PIL.Image.Image], num_crops: int
) -> Iterator[torch.Tensor]:
    """Yield the logits `[N, C]` of the stored crops of each image."""
    for number, image in enumerate(images):
        crops = cut_crops(image, str(number), (image.height, image.width), num_crops)
        with torch.inference_mode():
            yield classify(annotator, torch.stack(list(map(annotator.preprocess, crops)))).float().cpu()


def label_pictures(
    annotator: rd.Annotator, images: Sequence[PIL.Image.Image], num_crops: int | None, *choices: Sequence[int] | slice
) -> list[list[Encoded | CropLabels]]:
    """Return the label maps in batches, or the stored crops of each image, for each choice of the annotator's classes."""
    if num_crops is None:
        maps = list(annotate(annotator, images))
        return [[encode_logits(dense[:, rows]) for dense in maps] for rows in choices]
    crops = list(annotate_crops(annotator, images, num_crops))
    return [
        [CropLabels.from_logits(answers[:, rows], canvas_size=(1, 1), key=str(i)) for i, answers in enumerate(crops)]
        for rows in choices
    ]


def real_pictures(
    annotator: rd.Annotator, folder: Path, num_images: int, num_mosaics: int, num_crops: int | None
) -> list[Pictures]:
    """Return the photos with the classes of the folder, the photos with all classes of the annotator, and the mosaics."""
    source = rd.data.ImageFolderSource(folder)
    chosen = np.random.default_rng(0).permutation(len(source.keys))[:num_images].tolist()
    images = [rd.decode_image(source.read(i), source.name(i)) for i in chosen]
    labels = [source.labels[i] for i in chosen]
    rows = match_classes(annotator.classes, source.classes)
    pictures, classes = mosaics(images, labels, num_mosaics)
    few, every = label_pictures(annotator, images, num_crops, rows, slice(None))
    (of_mosaics,) = label_pictures(annotator, pictures, num_crops, rows)
    in_all = [rows[label] for label in labels]
    suffix = "" if num_crops is None else f", {num_crops} crops"
    first = np.array([order[0] for order in classes])
    return [
        Pictures(f"photos{suffix}", few, np.array(labels), [{label} for label in labels], len(rows)),
        Pictures(f"photos{suffix}", every, np.array(in_all), [{label} for label in in_all], len(annotator.classes)),
        Pictures(f"mosaics{suffix}", of_mosaics, first, list(map(set, classes)), len(rows)),
    ]


def scenes(path: Path, num_crops: int | None = None, split: str = "validation") -> Pictures:
    """Return the scenes of the demo, with their label maps, or with stored crops of the demo's annotator."""
    label_maps = rd.LabelMaps(path, split=split)
    objects = read_objects(path / "pictures" / f"{split}-boxes.csv")
    present = [{scene_object.label for scene_object in objects[key]} for key in label_maps]
    labels = label_maps.index.labels.astype(np.int64)
    if num_crops is not None:
        source = rd.data.ImageFolderSource(path / "pictures" / split)
        images = [rd.decode_image(source.read(source.keys.index(key))) for key in label_maps]
        (crops,) = label_pictures(load_demo_annotator(), images, num_crops, slice(None))
        return Pictures(f"scenes, {num_crops} crops", crops, labels, present, len(CLASSES))
    maps = list(label_maps.values())
    batches = [LabelMapBatch.of(maps[start : start + _BATCH]).encoded for start in range(0, len(maps), _BATCH)]
    return Pictures("scenes", batches, labels, present, len(CLASSES))


def replace_labels(pictures: Pictures, noise: str, rate: float, seed: int) -> np.ndarray:
    """Return the labels, of which a share is replaced by classes that the pictures do not show."""
    random = np.random.default_rng(seed)
    labels = pictures.labels.copy()
    for i in random.permutation(len(labels))[: round(rate * len(labels))].tolist():
        others = np.arange(1, pictures.num_classes)
        candidates = (labels[i] + (random.permutation(others) if noise == "uniform" else others)) % pictures.num_classes
        labels[i] = next(label for label in candidates.tolist() if label not in pictures.present[i])
    return labels


def pool_windows(pictures: Pictures) -> list[torch.Tensor]:
    """Return the labels `[N, W, C]` of the windows of each scale, of stored crops their mean. They do not depend on the noise."""
    crops = [labels.mean_label() for labels in pictures.stored if isinstance(labels, CropLabels)]
    if crops:
        return [torch.stack(crops)[:, None]]
    maps = [encoded for encoded in pictures.stored if isinstance(encoded, Encoded)]
    return [
        torch.cat([torch.stack([pool_box(encoded, box) for box in window_boxes(*scale)], 1) for encoded in maps])
        for scale in SCALES
    ]


def score(pictures: Pictures, windows: list[torch.Tensor], whole: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the values of one row for one seed. `whole` are the labels `[N, C]` pooled over the whole pictures."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.metrics import roc_auc_score

    wrong = labels != pictures.labels
    every = torch.arange(len(labels))
    margins = label_margins([soft[every, :, torch.from_numpy(labels)] for soft in windows]).numpy()
    rankings = {"margin": margins}
    for method, adjust in RANKINGS:
        scores = get_label_quality_scores(labels, whole, method=method, adjust_pred_probs=adjust)
        rankings[f"cleanlab {method} {adjust}"] = scores
    values = {}
    for name, quality in rankings.items():
        values[f"AUROC {name}"] = float(roc_auc_score(wrong, -quality))
        values[f"precision {name}"] = float(wrong[np.argsort(quality, kind="stable")[: wrong.sum()]].mean())
    suspects = find_suspects({"label": labels, "best": whole.argmax(1), "margin": margins})
    issues = find_label_issues(labels, whole, return_indices_ranked_by="self_confidence", n_jobs=1)
    for name, listed in (("suspects", suspects), ("cleanlab issues", issues)):
        values[f"listed precision {name}"] = float(wrong[listed].mean()) if len(listed) else float("nan")
        values[f"listed recall {name}"] = float(wrong[listed].sum() / wrong.sum())
    return values


def row(pictures: Pictures, windows: list[torch.Tensor], noise: str, rate: float, seeds: int) -> str:
    """Return one line of the table: means over the seeds."""
    whole = windows[0][:, 0].double()
    probabilities = (whole / whole.sum(1, keepdim=True)).numpy()
    runs = [
        score(pictures, windows, probabilities, replace_labels(pictures, noise, rate, seed)) for seed in range(seeds)
    ]
    mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    best = {
        kind: max(v for name, v in mean.items() if name.startswith(f"{kind} cleanlab"))
        for kind in ("AUROC", "precision")
    }
    cells = [
        pictures.name, str(len(pictures.labels)), str(pictures.num_classes), noise, f"{rate:.0%}",
        f"{mean['AUROC margin']:.4f}", f"{best['AUROC']:.4f}", f"{mean['precision margin']:.1%}", f"{best['precision']:.1%}",
        *(f"{mean[f'listed precision {name}']:.0%} / {mean[f'listed recall {name}']:.0%}" for name in ("suspects", "cleanlab issues")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", nargs="?", help="ImageFolder to annotate")
    parser.add_argument("--num-images", type=int, default=1500, help="number of images (default: %(default)s)")
    parser.add_argument("--num-mosaics", type=int, default=400, help="number of mosaics (default: %(default)s)")
    parser.add_argument(
        "--num-crops", type=int, metavar="N", help="number of stored crops per picture (default: label maps)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--scenes", type=Path, metavar="DATASET", help="scenes with label maps, from `relabel demo`")
    add_annotator_arguments(parser, default="mobilenetv2_100")
    args = parser.parse_args()
    try:
        import cleanlab  # noqa: F401
    except ImportError:
        sys.exit("label_errors.py compares with cleanlab: pip install cleanlab")
    sets: list[Pictures] = []
    if args.images:
        sets = real_pictures(annotator_from(args), args.images, args.num_images, args.num_mosaics, args.num_crops)
    sets += [scenes(args.scenes, args.num_crops)] if args.scenes else []
    columns = (
        "pictures", "number", "classes", "noise", "wrong labels", "AUROC", "cleanlab", "precision", "cleanlab",
        "listed: precision / recall", "cleanlab",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("| --- | ---: | ---: | --- |" + " ---: |" * (len(columns) - 4))
    for pictures in sets:
        windows = pool_windows(pictures)
        for noise in NOISES:
            for rate in RATES:
                print(row(pictures, windows, noise, rate, args.seeds), flush=True)


if __name__ == "__main__":
    main()
