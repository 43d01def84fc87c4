"""The `relabel` command: thin over the package's functions. Results go to stdout, messages to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .annotator_options import add_annotator_arguments, annotator_from, parse_size
from .image_options import add_column_arguments
from .naming import check_config, check_split
from .report.analyze_command import add_analyze
from .report.inspect_command import add_inspect
from .report.pictures_command import add_pictures
from .report.report_command import add_report
from .runner import Parser, output_argument, path_argument, run_command
from .train.command import add_compare, add_train
from .train.evaluate_command import add_evaluate

if TYPE_CHECKING:
    from .annotate.engines import Engine

_RESUMABLE = frozenset(("build", "compare", "demo", "publish", "train"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, see `run_command`."""
    return run_command(make_parser, argv, resumable=_RESUMABLE, check=_check_names)


def _check_names(args: argparse.Namespace) -> None:
    """Raise DatasetError unless configs and splits are valid names, before anything is read or written."""
    checks = {"config": check_config, "configs": check_config, "split": check_split, "validation": check_split}
    if args.command == "evaluate":
        del checks["split"]  # may be one of `datasets`, such as test[:100]
    for option, check in checks.items():
        value = getattr(args, option, None)
        for name in value if isinstance(value, list) else [value]:
            if name is not None:
                check(name, f"--{option}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="relabel", description="Label maps for image datasets, and LabelPooling.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="see it work: no data, no network, under 4 minutes")
    demo.add_argument(
        "out", nargs="?", type=path_argument, default=Path("relabel-demo"), help="folder (default: %(default)s)"
    )
    demo.add_argument("--seeds", type=int, default=3, help="students per method (default: %(default)s)")
    demo.set_defaults(run=_demo)

    build = commands.add_parser("build", help="annotate images and write shards")
    build.add_argument("images", help="ImageFolder, WebDataset tars (a folder or a glob), saved HF dataset, or hf:NAME")
    build.add_argument("out", help="folder or URL (s3://...) of the dataset; the config goes into OUT/CONFIG")
    build.add_argument("--config", help="name of the config (default: the annotator's)")
    build.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    build.add_argument("--no-images", action="store_true", help="label maps only, to be joined with images by key")
    build.add_argument("--encoding", choices=["heatmaps", "topk"], default="heatmaps")
    build.add_argument("--k", type=int, help="heatmaps an image (default: 10) or classes a location (default: 5)")
    build.add_argument(
        "--store", choices=["uint4", "uint8", "float16"], help="of logits (default: uint4; topk float16)"
    )
    build.add_argument("--shard-size", type=int, default=5000, help="samples a shard (default: %(default)s)")
    build.add_argument(
        "--class-mapping", type=path_argument, metavar="JSON", help="{dataset class: annotator class or index}"
    )
    build.add_argument("--all-classes", action="store_true", help="keep all of the annotator's classes")
    build.add_argument("--card", help="template of the dataset card: a file, or a name in cards/")
    build.add_argument("--batch-size", type=int, default=32, help="images annotated at a time; the same for every run of a build (default: %(default)s)")
    build.add_argument("--threads", type=int, default=4, help="threads that decode images (default: %(default)s)")
    add_column_arguments(build)
    _add_engine_arguments(build)
    add_annotator_arguments(build)
    build.set_defaults(run=_build)

    _add_import(commands)

    _add_annotators(commands)

    verify = commands.add_parser("verify", help="check every byte and every sample of a dataset, local or remote")
    verify.add_argument("path", help="folder, URL, org/name on the Hub, or short name")
    verify.add_argument("--config", help="(default: all)")
    verify.add_argument("--revision", help="of a dataset on the Hub: branch, tag or commit")
    verify.add_argument(
        "--json", type=output_argument, metavar="FILE", help="where to write the whole report; - is stdout"
    )
    verify.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")
    verify.add_argument("--quick", action="store_true", help="look only into shards whose size or sha256 is wrong")
    verify.set_defaults(run=_verify)

    publish = commands.add_parser(
        "publish", help="put a dataset on the Hugging Face Hub", epilog="Log in with `hf auth login`, or set HF_TOKEN."
    )
    publish.add_argument("folder", type=path_argument, help="folder of the dataset")
    publish.add_argument("repo", help="org/name; made if need be")
    publish.add_argument("--config", help="(default: all in the folder)")
    publish.add_argument("--public", action="store_true", help="let everybody see a repository that is made")
    publish.add_argument("--tag", help="name of this revision (default: v1, v2, ...)")
    publish.add_argument("--card", help="template of the dataset card: a file, or a name in cards/")
    publish.add_argument(
        "--restricted-images", metavar="NAME", help="publish images although the card says those of NAME may not be"
    )
    publish.set_defaults(run=_publish)

    add_analyze(commands)
    add_train(commands)
    add_compare(commands)
    add_evaluate(commands)
    add_pictures(commands)
    add_report(commands)
    add_inspect(commands)
    return parser


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=["local", "ray"], default="local", help="(default: %(default)s)")
    group.add_argument(
        "--address", help="Ray cluster: auto, host:port or ray://host:port (default: one on this machine)"
    )
    group.add_argument("--actors", type=int, metavar="N", help="at most (default: as many as the cluster has room for)")
    group.add_argument("--gpus-per-actor", type=float, metavar="N", help="(default: 1 where the cluster has GPUs)")
    group.add_argument("--cpus-per-actor", type=int, metavar="N", help="(default: 1)")


def _engine_from(args: argparse.Namespace) -> Engine:
    from .annotate.engines import find_engine  # see _build
    from .annotate.ray_engine import RayEngine

    if args.engine == "ray":
        return RayEngine(args.address, args.actors, args.gpus_per_actor, args.cpus_per_actor or 1)
    if any(value is not None for value in (args.address, args.actors, args.gpus_per_actor, args.cpus_per_actor)):
        raise ValueError("--address, --actors, --gpus-per-actor and --cpus-per-actor are for --engine ray")
    return find_engine(args.engine)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    importer = commands.add_parser(
        "import", help="write shards of the label maps that ReLabel or TokenLabeling publish"
    )
    importer.add_argument("source", help="folder, or uncompressed tar, of <class>/<name>.pt")
    importer.add_argument("out", type=path_argument, help="folder of the dataset; the config goes into OUT/CONFIG")
    importer.add_argument("--format", choices=["relabel", "tokenlabeling"], required=True, help="whose files they are")
    importer.add_argument(
        "--order",
        choices=["hw", "wh", "auto"],
        required=True,
        help="which axis is the height, the last but one or the last; auto finds out with --images and --annotator",
    )
    importer.add_argument("--images", metavar="DIR", help="ImageFolder that the maps are of, for the images' sizes")
    importer.add_argument("--include-images", action="store_true", help="put the images' bytes into the shards")
    importer.add_argument("--classes", type=path_argument, metavar="FILE", help="class folders in order, one a line")
    importer.add_argument("--config", help="name of the config (default: the format's)")
    importer.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    importer.add_argument("--store", choices=["uint8", "float16"], help="of logits (default: float16)")
    importer.add_argument("--shard-size", type=int, default=5000, help="samples a shard (default: %(default)s)")
    importer.add_argument("--skip-bad", action="store_true", help="leave out what is bad or unmatched, and list it")
    importer.add_argument("--card", help="template of the dataset card: a file, or a name in cards/")
    importer.add_argument("--threads", type=int, default=4, help="threads that read files (default: %(default)s)")
    add_annotator_arguments(importer, default="")  # only --order auto needs one
    importer.set_defaults(run=_import)


def _add_annotators(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    annotators = commands.add_parser("annotators", help="list which of timm's models can annotate, and how well")
    annotators.add_argument(
        "pattern", nargs="?", help="of names, such as 'convnext*' (default: one model of each of timm's modules)"
    )
    annotators.add_argument("--input-size", type=int, nargs="+", metavar="PX", help="(default: each model's own)")
    annotators.add_argument("--json", type=output_argument, metavar="FILE", help="where to write the list as JSON, too")
    annotators.set_defaults(run=_annotators)


def _build(args: argparse.Namespace) -> None:
    from .annotate.build import build  # the producer's libraries take seconds to import
    from .annotate.shard import Settings
    from .data.sources import open_source

    source = open_source(args.images, args.split, image_column=args.image_column, label_column=args.label_column)
    mapping = None if args.class_mapping is None else json.loads(args.class_mapping.read_text(encoding="utf-8"))
    settings = Settings(
        encoding=args.encoding,
        k=args.k,
        dtype=args.store,
        images=not args.no_images,
        batch_size=args.batch_size,
        num_threads=args.threads,
    )
    manifest = build(
        source,
        args.out,
        partial(annotator_from, args),  # made after the output is found to be writable, and on each node
        config=args.config,
        split=args.split,
        settings=settings,
        shard_size=args.shard_size,
        class_mapping=mapping,
        all_classes=args.all_classes,
        card=args.card,
        engine=_engine_from(args),
    )
    split = manifest.splits[args.split]
    images = "" if settings.images else f", images={args.images!r}"
    sys.stdout.write(
        f"{args.out.rstrip('/')}/{manifest.config}: {split.num_samples} samples in {len(split.filenames)} shards, "
        f"{sum(split.shard_bytes) / 1e6:.1f} MB, {len(split.skipped)} images skipped\n"
        f"load_dataset({args.out!r}, {manifest.config!r}, split={args.split!r}{images})\n"
    )


def _import(args: argparse.Namespace) -> None:
    from .annotate.importers import import_label_maps  # see _build
    from .annotate.orientation import detect_order
    from .annotate.published import PublishedMaps

    if args.order == "auto" and not (args.images and args.annotator):
        raise ValueError(
            "--order auto compares the maps with an annotator's of the images: give --images and --annotator"
        )
    classes = None if args.classes is None else args.classes.read_text(encoding="utf-8").splitlines()
    maps = PublishedMaps(args.source, args.format, classes)
    order = args.order
    if order == "auto":
        check = detect_order(maps, args.images, annotator_from(args), split=args.split)
        sys.stderr.write(f"order {check.order}: {check}\n")
        order = check.order
    manifest = import_label_maps(
        maps,
        args.out,
        order=order,
        images=args.images,
        include_images=args.include_images,
        config=args.config,
        split=args.split,
        dtype=args.store,
        shard_size=args.shard_size,
        skip_bad=args.skip_bad,
        num_threads=args.threads,
        card=args.card,
    )
    split = manifest.splits[args.split]
    images = "" if args.include_images else f", images={args.images or 'path/to/images'!r}"
    sys.stdout.write(
        f"{args.out / manifest.config}: {split.num_samples} samples in {len(split.filenames)} shards, "
        f"{sum(split.shard_bytes) / 1e6:.1f} MB, {len(split.skipped)} left out\n"
        f"load_dataset({str(args.out)!r}, {manifest.config!r}, split={args.split!r}{images})\n"
    )


def _verify(args: argparse.Namespace) -> int:
    from .shards.verify import verify
    from .storage.local import write_atomically

    report = verify(args.path, args.config, revision=args.revision, num_workers=args.workers, quick=args.quick)
    if args.json == Path("-"):
        sys.stdout.write(f"{report.to_json()}\n")
        sys.stderr.write(f"{report}\n")
    else:
        sys.stdout.write(f"{report}\n")
        if args.json is not None:
            write_atomically(args.json, f"{report.to_json()}\n".encode())
    return 0 if report.ok else 1


def _publish(args: argparse.Namespace) -> None:
    from .hub import publish  # see _build

    published = publish(
        args.folder,
        args.repo,
        config=args.config,
        public=args.public,
        tag=args.tag,
        card=args.card,
        restricted_images=args.restricted_images,
    )
    sys.stdout.write(f"{published.url} at {published.tag}, commit {published.commit}\n{published.load_line}\n")


def _annotators(args: argparse.Namespace) -> None:
    from .annotate.catalogue import describe_annotators, to_markdown  # see _build
    from .storage.local import write_atomically

    entries = describe_annotators(args.pattern, input_size=parse_size(args.input_size))
    if args.json is not None:
        write_atomically(args.json, json.dumps([entry.to_json() for entry in entries], indent=1).encode())
    sys.stdout.write(to_markdown(entries))


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo  # see _build

    result = run_demo(args.out, seeds=args.seeds)
    sys.stdout.write(result.to_markdown())
    sys.stderr.write(result.next_steps())


if __name__ == "__main__":
    sys.exit(main())
