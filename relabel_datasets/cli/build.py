"""`relabel build`: annotate images and write shards."""

from __future__ import annotations

import argparse
import functools
import json
import reprlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError
from ..labels.encodings import DEFAULT_ENCODING, ENCODINGS
from ..storage.redaction import redact_path
from .annotator_options import add_annotator_arguments, annotator_from, check_annotator_package
from .image_options import add_columns
from .next_step import config_words, say_next
from .options import add_command, add_config, path_argument, positive

if TYPE_CHECKING:
    from ..annotate.annotator import Annotator
    from ..annotate.engines import Engine
    from ..data.sources import ImageSource
    from ..shards.manifest import Manifest, Split


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "build",
        "annotate images and write label maps as shards",
        _run,
        examples=[
            "relabel build photos OUT --annotator resnet50.a1_in1k",
            "relabel build hf:cifar10 s3://bucket/OUT --annotator my_models.py:annotator --no-images",
        ],
        note="Builds are resumable: rerun the same command after any interruption.",
    )
    parser.add_argument(
        "images", metavar="IMAGES",
        help="ImageFolder, WebDataset tars (a folder or a glob), saved Hugging Face dataset, hf:NAME, or a folder with one of these "
        "per split, such as train/ and val/",
    )  # fmt: skip
    add_columns(parser)
    parser.add_argument("out", metavar="OUT", help="folder or URL of the dataset; the config is written to OUT/CONFIG")
    add_config(parser, default="the name of the annotator")
    parser.add_argument(
        "--split", help="name of the split (default: train, or each split of a folder with train/, val/ or test/)"
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="store label maps without images; when loaded, they are joined with images by key",
    )
    entries = ENCODINGS.values()
    add_writing_options(
        parser,
        storage_dtypes=list(dict.fromkeys(dtype for entry in entries for dtype in entry.storage_dtypes)),
        default=", ".join(f"{entry.storage_dtypes[0]} for {entry.name}" for entry in entries),
    )
    summaries = "; ".join(f"{entry.name}: {entry.summary}" for entry in entries)
    parser.add_argument(
        "--encoding", choices=list(ENCODINGS), default=DEFAULT_ENCODING, help=f"{summaries} (default: %(default)s)"
    )
    units = " or ".join(f"{entry.k_unit} ({entry.name}, default: {entry.default_k})" for entry in entries)
    parser.add_argument("--k", type=positive, metavar="K", help=f"number of {units}")
    parser.add_argument(
        "--num-crops", type=positive, metavar="N",
        help="crops per image, with --encoding crops; the annotator sees each as an image of its own (default: "
        f"{ENCODINGS['crops'].default_num_crops})",
    )  # fmt: skip
    parser.add_argument(
        "--class-mapping", type=path_argument, metavar="JSON",
        help="JSON file that maps each class of the images to a class name or index of the annotator (default: by name)",
    )  # fmt: skip
    parser.add_argument(
        "--all-classes", action="store_true", help="keep all classes of the annotator instead of those of the images"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="images, or crops, per batch of the annotator; it must not change when a build is resumed (default: %(default)s)",
    )
    _add_engine_options(parser)
    add_annotator_arguments(parser)


def add_writing_options(parser: argparse.ArgumentParser, storage_dtypes: list[str], default: str) -> None:
    """Add the options of commands that write shards."""
    parser.add_argument(
        "--storage-dtype", choices=storage_dtypes, help=f"precision of the stored logits (default: {default})"
    )
    parser.add_argument(
        "--shard-size", type=positive, default=5000, metavar="N", help="samples per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--card", metavar="TEMPLATE",
        help="template of the dataset card: a file, or a name in cards/ (default: that of the existing card, or \"default\")",
    )  # fmt: skip
    parser.add_argument(
        "--num-threads",
        type=positive,
        default=4,
        metavar="N",
        help="threads that read and decode files (default: %(default)s)",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine", "where annotators run")
    group.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="this process, or a Ray cluster (default: %(default)s)",
    )
    group.add_argument(
        "--address", help="Ray cluster: auto, host:port or ray://host:port (default: start one on this machine)"
    )
    group.add_argument(
        "--actors",
        type=positive,
        metavar="N",
        help="maximum number of Ray actors (default: as many as fit into the cluster)",
    )
    group.add_argument(
        "--gpus-per-actor",
        type=float,
        metavar="N",
        help="GPUs per Ray actor (default: 1 if the cluster has GPUs, else 0)",
    )
    group.add_argument("--cpus-per-actor", type=positive, metavar="N", help="CPUs per Ray actor (default: 1)")


def _run(args: argparse.Namespace) -> None:
    from ..annotate.builder import build
    from ..annotate.shard import BuildConfig
    from ..data.split_folders import check_same_classes
    from ..storage.output import open_output

    engine = _engine_from(args)
    check_annotator_package(args)
    open_output(args.out)  # refuses a URL whose package is missing, before the images are listed
    sources = _open_sources(args)
    check_same_classes({str(images): source.classes for images, source in sources.values()})
    build_config = BuildConfig(
        encoding=args.encoding,
        k=args.k,
        storage_dtype=args.storage_dtype,
        num_crops=args.num_crops,
        images=not args.no_images,
        batch_size=args.batch_size,
        num_threads=args.num_threads,
    )
    class_mapping = None if args.class_mapping is None else _read_class_mapping(args.class_mapping)
    # Created once the output is known to be writable: once for all splits here, or on each node of a cluster.
    make: Callable[[], Annotator] = partial(annotator_from, args)
    make = make if args.engine == "ray" else functools.cache(make)
    for split, (images, source) in sources.items():
        manifest = build(
            source,
            args.out,
            make,
            config=args.config,
            split=split,
            build_config=build_config,
            shard_size=args.shard_size,
            class_mapping=class_mapping,
            all_classes=args.all_classes,
            card=args.card,
            engine=engine,
        )
        sys.stdout.write(describe_result(manifest, args.out, split, str(images) if args.no_images else None))
    split, (images, source) = next(iter(sources.items()))
    _check_labels(args, manifest, split, source, make, class_mapping)
    joined = ["--images", args.images] if args.no_images else []
    say_next("relabel", "train", args.out, *config_words(args.config), *joined, "--out", "run")


def _open_sources(args: argparse.Namespace) -> dict[str, tuple[str | Path, ImageSource]]:
    """Return the path and the source of the images of each split to build.

    Raises:
        DatasetError: (a ValueError) The images have no such split.
    """
    from ..data.joins import split_folder
    from ..data.sources import open_source
    from ..data.split_folders import find_split_folders

    folders: dict[str, str | Path] = {**find_split_folders(args.images)}
    if folders and args.split is not None:
        folder = split_folder(Path(args.images), args.split)
        if folder == Path(args.images):
            raise DatasetError(f"{args.images} has no folder of split {args.split!r}, only {sorted(folders)}")
        folders = {args.split: folder}
    folders = folders or {args.split or "train": args.images}
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    return {split: (images, open_source(images, split, **columns)) for split, images in folders.items()}


def _check_labels(
    args: argparse.Namespace,
    manifest: Manifest,
    split: str,
    source: ImageSource,
    make: Callable[[], Annotator],
    class_mapping: Mapping[str, str | int] | None,
) -> None:
    """Warn if few label maps agree with the labels, or more would with another preprocessing."""
    from ..annotate.preprocessing import find_better_preprocessing
    from ..data.store import LabelMaps
    from ..shards.manifest import LOW_AGREEMENT
    from ..storage.folders import is_url

    entry = manifest.splits[split]
    if entry.agreement is not None and entry.agreement < LOW_AGREEMENT:
        sys.stderr.write(
            f"warning: the label maps of split {split!r} agree with less than half of the labels. Check that the labels are right and "
            "that each class is matched with the right class of the annotator (--class-mapping), or choose an annotator that "
            "knows these classes\n"
        )
    if args.engine == "ray" or is_url(args.out) or not ENCODINGS[args.encoding].is_map:
        return  # the check needs the annotator in this process, and label maps on this machine
    better = find_better_preprocessing(
        make(), source, LabelMaps(args.out, manifest.config, split), class_mapping=class_mapping
    )
    if better is not None:
        sys.stderr.write(f"warning: {better}\n")


def describe_result(manifest: Any, out: Any, split: str, images: str | None) -> str:
    """Describe the result of a command that wrote shards: the size of the split, and the line of Python that loads it."""
    entry = manifest.splits[split]
    num_shards, num_skipped = len(entry.filenames), len(entry.skipped)
    argument = "" if images is None else f", images={redact_path(images)!r}"
    shown = redact_path(str(out)).rstrip("/")  # a URL is shown without its credentials
    return (
        f"{shown}/{manifest.config}: {entry.num_samples} samples in "
        f"{num_shards} {'shard' if num_shards == 1 else 'shards'}, {sum(entry.shard_bytes) / 1e6:.1f} MB, "
        f"{num_skipped} {'image' if num_skipped == 1 else 'images'} skipped\n"
        f"{_describe_agreement(manifest, entry)}{_describe_calibration(entry)}"
        f"load_dataset({shown!r}, {manifest.config!r}, split={split!r}{argument})\n"
    )


def _describe_agreement(manifest: Manifest, split: Split) -> str:
    if split.agreement is None:
        return ""
    labels = "label maps, pooled over the whole image," if manifest.has_maps else "mean labels of the crops of an image"
    return f"{split.agreement:.1%} of the {labels} agree with the label of their image\n"


def _describe_calibration(split: Split) -> str:
    if split.calibration is None:
        return ""
    calibration = split.calibration
    return (
        f"calibrated labels: KL {calibration.kl_after:.3f} instead of {calibration.kl_before:.3f} from the annotator's answers to "
        f"{calibration.num_crops} random crops\n"
    )


def _read_class_mapping(path: Path) -> dict[str, str | int]:
    """Read the file of `--class-mapping`.

    Raises:
        ValueError: The file is not a JSON object whose values are names or indices of classes.
    """
    expected = '--class-mapping must be a JSON object of names or indices, such as {"cat": "tabby", "dog": 207}'
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {expected}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} holds a JSON {type(mapping).__name__}: {expected}")
    for name, value in mapping.items():
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(f"{path} maps class {name!r} to {reprlib.repr(value)}: {expected}")
    return mapping


def _engine_from(args: argparse.Namespace) -> Engine:
    from ..annotate.engines import find_engine
    from ..annotate.ray_engine import RayEngine

    if args.engine == "ray":
        return RayEngine(args.address, args.actors, args.gpus_per_actor, args.cpus_per_actor or 1)
    if any(value is not None for value in (args.address, args.actors, args.gpus_per_actor, args.cpus_per_actor)):
        raise ValueError("--address, --actors, --gpus-per-actor and --cpus-per-actor need --engine ray")
    return find_engine(args.engine)
