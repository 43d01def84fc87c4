"""Train students on real images with many kinds of labels, several seeds each, and print the tables.

    python tests/benchmarks/students.py TABLE IMAGES --out DIR [--annotator MODEL --checkpoint FILE ...]
    python tests/benchmarks/students.py TABLE [--figure FILE]

The first command trains and prints the table; the second prints it, or draws it. IMAGES is a folder with the ImageFolders train/ and
val/. TABLE is one of

- noise: one image in ten of each class. In some rows, 20 or 40 % of the labels are replaced by another class, at random.
- few: one image in ten, with the correct labels. It shares students with `noise`.
- mosaics: pictures of two to four photos, labeled with the class of the largest. They are as many as the images in `few`.
- all: all images.

All students of a table have the same recipe, and so the same number of steps. They are validated on the photos of val/. Photos are
reduced and decoded once, and stay in memory. The result of every student is written to RESULTS/<images>.json when it is finished,
and the student is not trained again. Run the command again after an interruption, or with more --seeds. Label maps and stored crops
are built once, in DIR. They never depend on labels. Which labels are wrong depends on the seed of the student; those of 20 % are
also wrong at 40 %. The annotator of online distillation sees crops of the full images, at --teacher-size, and has the precision of
the students. The times per step of all kinds of labels are measured at the end, in turns.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from _student_photos import AnnotatedPhotos, load_photos, main_class, with_noise
from _student_tables import CONFIGS, LABELS, TABLES, Table, draw, read_results, to_markdown

import relabel_datasets as rd
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.labels.pooling import pool_label_map
from relabel_datasets.storage.local import write_atomically
from relabel_datasets.train import Recipe, RuntimeConfig, evaluate, train_student
from relabel_datasets.train.loaders import crop_transforms
from relabel_datasets.train.seeds import seed_all


def base_recipe(args: argparse.Namespace) -> Recipe:
    """Return the recipe that all students of a table share."""
    return Recipe(
        model="resnet18", model_kwargs={} if args.width == 64 else {"channels": [args.width << i for i in range(4)]},
        image_size=args.image_size, crop_pct=1.0, epochs=args.epochs, warmup_epochs=min(5, args.epochs - 1),
        batch_size=args.batch_size, learning_rate=0.1, weight_decay=5e-4, dtype=args.student_dtype,
    )  # fmt: skip


class Bench:
    """Students of one table: their images, label maps and results."""

    def __init__(self, args: argparse.Namespace, table: Table) -> None:
        self.args, self.table, self.recipe = args, table, base_recipe(args)
        self.path = args.results / f"{table.images}.json"
        side = round(1.5 * args.image_size)
        self.photos = load_photos(args.images, table.images, side)
        self.validation = load_photos(args.images, "val", side)
        annotator = annotator_from(args)
        self.folder = args.out / table.images
        build_config = rd.annotate.BuildConfig(images=False, batch_size=32)
        rd.build(self.photos, self.folder, annotator, config="maps", build_config=build_config, progress=False)
        runs = read_results(self.path)["runs"] if self.path.is_file() else []
        kinds = set(table.labels) & {*args.labels, *(run["labels"] for run in runs)}
        if "stored crops" in kinds:
            crops_config = replace(build_config, encoding="crops", num_crops=args.num_crops)
            of_crops = annotator_from(args, args.crop_input_size)
            rd.build(self.photos, self.folder, of_crops, config="crops", build_config=crops_config, progress=False)
        if "ReLabel, two scales" in kinds:
            scales_config = replace(build_config, encoding="multiscale")
            ensemble = rd.Ensemble([annotator_from(args, size) for size in args.scale_sizes])
            rd.build(self.photos, self.folder, ensemble, config="scales", build_config=scales_config, progress=False)
        changed = {field.name: getattr(self.recipe, field.name) for field in fields(Recipe)}
        settings = {
            "recipe": {name: value for name, value in changed.items() if value != getattr(Recipe(), name)},
            "stored_side": side, "annotator": annotator.describe()["name"], "teacher_size": args.teacher_size,
            "annotator_input_size": list(annotator.input_size), "training_images": len(self.photos.keys),
            "validation_images": len(self.validation.keys), "num_crops": args.num_crops,
            "crop_input_size": args.crop_input_size, "scales": args.scale_sizes,
        }  # fmt: skip
        self.results = read_results(self.path) if self.path.is_file() else {"settings": settings, "runs": []}
        # Settings of rows that were added later are missing in earlier results.
        self.results["settings"] = {**settings, **self.results["settings"]}
        if self.results["settings"] != settings:
            raise SystemExit(
                f"{self.path} has results with other settings, {self.results['settings']} instead of {settings}: choose another "
                "--results"
            )
        self.runtime = RuntimeConfig(
            device=args.device, num_workers=args.num_workers, progress=False, save_every=0, log_every=10**6,
            validate_every=max(1, args.epochs // 3),
        )  # fmt: skip

    def run(self) -> None:
        """Train the students that have no results, one seed after the other."""
        if "label_maps" not in self.results:
            self.results["label_maps"] = self._describe_labels()
            self._save()
        for seed in range(self.args.seeds):
            for labels, noise in self.table.rows:
                done = any(
                    (run["labels"], run["noise"], run["seed"]) == (labels, noise, seed) for run in self.results["runs"]
                )
                if labels in self.args.labels and noise in self.args.noise and not done:
                    run = self._train(labels, noise, seed)
                    self.results["runs"].append(run)
                    self._save()
                    print(f"{labels}, {noise} % wrong, seed {seed}: {run['accuracy']:.1%}", flush=True)
        trained = {run["labels"] for run in self.results["runs"]}
        if trained != self.results.get("seconds_per_step", {}).keys():
            self.results["seconds_per_step"] = self._seconds_per_step(sorted(trained))
            self._save()

    def _data(self, labels: str, given: Sequence[int]) -> tuple[AnnotatedPhotos, rd.Annotator | None]:
        """Return the training images with `given` as their labels, and the annotator of online distillation."""
        teacher, side = None, self.photos.side
        if labels == "online distillation":
            args = argparse.Namespace(**{**vars(self.args), "dtype": self.recipe.dtype})
            teacher, side = annotator_from(args, self.args.teacher_size), None
        photos = self.photos.relabeled(range(len(given)), given, side)
        return AnnotatedPhotos(self.folder, photos, CONFIGS.get(labels, "maps")), teacher

    def _train(self, labels: str, noise: int, seed: int) -> dict[str, Any]:
        given = with_noise(self.photos.targets, len(self.photos.classes), noise, seed)
        dataset, teacher = self._data(labels, given)
        recipe = self.recipe.changed(**LABELS[labels], seed=seed)
        folder = self.folder / "runs" / f"{labels}-{noise}-{seed}".replace(" ", "_")
        trained = train_student(
            dataset, folder, recipe, validation=self.validation, annotator=teacher, runtime=self.runtime
        )
        with (folder / "epochs.csv").open(newline="") as file:
            curve = [row for row in csv.DictReader(file) if row["top1"]]
        accuracy, wrong = self._fit(folder, given)
        return {
            "labels": labels, "noise": noise, "seed": seed,
            "accuracy": round(trained.metrics["top1"], 5), "ece": round(trained.metrics["ece"], 5),
            "accuracy_on_training_photos": accuracy, "wrong_labels_learned": wrong,
            "epochs": [int(row["epoch"]) + 1 for row in curve],
            "training_loss": [round(float(row["loss"]), 4) for row in curve],
            "validation_accuracy": [round(float(row["top1"]), 4) for row in curve],
            "device": self._device(),
            "versions": {"relabel_datasets": rd.__version__, "torch": torch.__version__, "timm": timm.__version__},
        }  # fmt: skip

    def _seconds_per_step(self, kinds: Sequence[str]) -> dict[str, float]:
        """Compare short trainings of two lengths, in turns: CPU time, because the cores are shared, or the time on a GPU."""
        clock = time.process_time if self._device().startswith("CPU") else time.perf_counter
        data = {labels: self._data(labels, self.photos.targets) for labels in kinds}
        steps_per_epoch = len(self.photos.keys) // self.recipe.batch_size
        more_epochs = -(-40 // steps_per_epoch)
        seconds: dict[str, list[float]] = {labels: [] for labels in kinds}
        for _ in range(4):
            for labels, (dataset, teacher) in data.items():
                recipe = self.recipe.changed(**LABELS[labels], warmup_epochs=0, mix_off_epochs=0)
                took = []
                for epochs in (1, 1 + more_epochs):
                    with tempfile.TemporaryDirectory() as folder:
                        start = clock()
                        train_student(
                            dataset, folder, recipe.changed(epochs=epochs), annotator=teacher, runtime=self.runtime
                        )
                        took.append(clock() - start)
                seconds[labels].append((took[1] - took[0]) / (more_epochs * steps_per_epoch))
        # The first round decodes the photos.
        return {labels: round(statistics.median(values[1:]), 5) for labels, values in seconds.items()}

    def _fit(self, folder: Path, given: Sequence[int]) -> tuple[float, float | None]:
        """Return the accuracy on the training photos with correct labels, and the share of wrong labels that are predicted."""
        accuracy = evaluate(folder / "last.pth.tar", self.photos)["top1"]
        wrong = [row for row, (label, true) in enumerate(zip(given, self.photos.targets, strict=True)) if label != true]
        if not wrong:
            return round(accuracy, 4), None
        learned = evaluate(folder / "last.pth.tar", self.photos.relabeled(wrong, given, self.photos.side))["top1"]
        return round(accuracy, 4), round(learned, 4)

    def _describe_labels(self) -> dict[str, float]:
        """Return means over random training crops, of what they show and of their pooled labels."""
        dataset = AnnotatedPhotos(self.folder, self.photos)
        photos = {photo.key: photo for photo in self.photos.photos}
        crop = crop_transforms(self.recipe, "bicubic", None)
        sums: Counter[str] = Counter()
        for index in range(len(dataset)):
            for number in range(4):
                seed_all(number, index)
                _, label_map = crop(*dataset[index])
                view = label_map.view
                (x1, x2), (y1, y2) = sorted([view.x0, view.x0 + view.xx]), sorted([view.y0, view.y0 + view.yy])
                shown = main_class(photos[label_map.key], (x1, y1, x2, y2))
                soft = pool_label_map(label_map, view)
                sums["share that mostly shows the labeled photo"] += float(shown == label_map.label)
                sums["best class is that of the photo that is mostly shown"] += float(soft.argmax() == shown)
                sums["best class is the label of the image"] += float(soft.argmax() == label_map.label)
                for temperature in (1, 3):
                    soft = pool_label_map(label_map, view, temperature=temperature)
                    sums[f"confidence of the best class, temperature {temperature}"] += float(soft.max())
                    sums[f"entropy in nats, temperature {temperature}"] += float(torch.special.entr(soft).sum())
        return {name: round(total / (4 * len(dataset)), 4) for name, total in sums.items()}

    def _device(self) -> str:
        if (self.args.device or "cuda").startswith("cuda") and torch.cuda.is_available():
            return torch.cuda.get_device_name()
        return f"CPU, {torch.get_num_threads()} threads"

    def _save(self) -> None:
        write_atomically(self.path, (json.dumps(self.results, indent=1) + "\n").encode())


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    default = Path(__file__).parent / "students"
    option("table", choices=TABLES, help="table to compute")
    option("images", type=Path, nargs="?", metavar="IMAGES", help="folder with train/ and val/ (default: no training)")
    option("--out", type=Path, metavar="DIR", help="folder of label maps and unfinished students, required to train")
    option(
        "--results",
        type=Path,
        metavar="DIR",
        default=default,
        help="folder of results (default: students/, beside this file)",
    )
    option("--figure", type=Path, metavar="FILE", help="PNG to draw: the accuracy against the share of wrong labels")
    option(
        "--labels", nargs="+", choices=LABELS, default=list(LABELS), help="kinds of labels to train with (default: all)"
    )
    option("--noise", nargs="+", type=int, default=[0, 20, 40], help="wrong labels in per cent (default: 0 20 40)")
    option("--seeds", type=int, default=3, help="students of each row (default: %(default)s)")
    option("--epochs", type=int, default=150, help="passes over the images (default: %(default)s)")
    option("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    option("--image-size", type=int, default=48, help="side of a crop in pixels (default: %(default)s)")
    option(
        "--width",
        type=int,
        default=16,
        help="channels of the first stage of the ResNet-18 (default: %(default)s; 64 is its own)",
    )
    option("--student-dtype", default="bfloat16", help="precision of the students (default: %(default)s)")
    option(
        "--teacher-size", type=int, default=128, help="input of the annotator of distillation (default: %(default)s)"
    )
    option("--num-crops", type=int, default=24, help="stored crops of an image (default: %(default)s)")
    option(
        "--crop-input-size", type=int, default=160, help="input of the annotator of stored crops (default: %(default)s)"
    )
    option(
        "--scale-sizes", type=int, nargs="+", default=[160, 288], metavar="PX",
        help="inputs of the annotator of two scales (default: 160 288)",
    )  # fmt: skip
    option("--num-workers", type=int, default=0, help="processes that load crops (default: %(default)s)")
    add_annotator_arguments(parser, default="mobilenetv2_100")
    args = parser.parse_args()
    table = TABLES[args.table]
    if args.images is not None:
        if args.out is None:
            parser.error("--out is required to train")
        args.results.mkdir(parents=True, exist_ok=True)
        Bench(args, table).run()
    results = read_results(args.results / f"{table.images}.json")
    print(to_markdown(results, table))
    if args.figure:
        draw(results, TABLES["noise"], args.figure)


if __name__ == "__main__":
    main()
