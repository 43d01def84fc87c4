"""The `relabel` command: thin over the package's functions. Results go to stdout, messages to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annotate.timm_annotator import TimmAnnotator


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 after an error that the user can mend, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of each request to the Hub
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"relabel {args.command}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\nrelabel {args.command}: stopped; the same command goes on from here\n")
        return 130  # as shells have it for Ctrl-C
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="relabel", description="Label maps for image datasets, and LabelPooling.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="see it work: no data, no network, under 4 minutes")
    demo.add_argument("out", nargs="?", type=Path, default=Path("relabel-demo"), help="folder (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=3, help="students per method (default: %(default)s)")
    demo.set_defaults(run=_demo)

    build = commands.add_parser("build", help="annotate images and write shards")
    build.add_argument("images", help="ImageFolder, WebDataset tars (a folder or a glob), saved HF dataset, or hf:NAME")
    build.add_argument("out", type=Path, help="folder of the dataset; the config goes into OUT/CONFIG")
    build.add_argument("--config", help="name of the config (default: the annotator's)")
    build.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    build.add_argument("--no-images", action="store_true", help="label maps only, to be joined with images by key")
    build.add_argument("--encoding", choices=["heatmaps", "topk"], default="heatmaps")
    build.add_argument("--k", type=int, help="heatmaps an image (default: 10) or classes a location (default: 5)")
    build.add_argument(
        "--store", choices=["uint4", "uint8", "float16"], help="of logits (default: uint4; topk float16)"
    )
    build.add_argument("--shard-size", type=int, default=5000, help="samples a shard (default: %(default)s)")
    build.add_argument("--class-mapping", type=Path, metavar="JSON", help="{dataset class: annotator class or index}")
    build.add_argument("--card", help="template of the dataset card: a file, or a name in cards/")
    build.add_argument("--batch-size", type=int, default=32, help="images annotated at a time (default: %(default)s)")
    build.add_argument("--threads", type=int, default=4, help="threads that decode images (default: %(default)s)")
    add_annotator_arguments(build)
    build.set_defaults(run=_build)
    return parser


def add_annotator_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that choose a timm annotator; builder scripts use them, too."""
    group = parser.add_argument_group("annotator")
    group.add_argument("--annotator", metavar="MODEL", required=default is None, default=default, help="any timm model")
    group.add_argument("--checkpoint", type=Path, help="weights (default: timm's pretrained ones, downloaded)")
    group.add_argument("--input-size", type=int, nargs="+", metavar="PX", help="one side, or height and width")
    group.add_argument("--mean", type=float, nargs=3, help="(default: the model's own)")
    group.add_argument("--std", type=float, nargs=3, help="(default: the model's own)")
    group.add_argument("--interpolation", help="(default: the model's own)")
    group.add_argument(
        "--model-arg", action="append", default=[], metavar="KEY=VALUE", help="timm argument; repeatable"
    )
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    group.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")


def annotator_from(args: argparse.Namespace) -> TimmAnnotator:
    """Return the annotator that the options of `add_annotator_arguments` choose."""
    from .annotate.timm_annotator import TimmAnnotator  # timm takes seconds to import

    size = args.input_size
    if size is not None and len(size) not in (1, 2):
        raise ValueError(f"--input-size takes one side, or height and width, got {size}")
    return TimmAnnotator(
        args.annotator,
        pretrained=args.checkpoint is None,
        checkpoint=args.checkpoint,
        input_size=None if size is None else (size[0], size[-1]),
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
        dtype=args.dtype,
        device=args.device,
        **dict(map(_model_argument, args.model_arg)),
    )


def _model_argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--model-arg takes KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value  # a word


def _build(args: argparse.Namespace) -> None:
    from .annotate.build import build  # the producer's libraries take seconds to import
    from .annotate.shard import Settings
    from .annotate.sources import open_source

    source = open_source(args.images, args.split)
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
        annotator_from(args),
        config=args.config,
        split=args.split,
        settings=settings,
        shard_size=args.shard_size,
        class_mapping=mapping,
        card=args.card,
    )
    split = manifest.splits[args.split]
    images = "" if settings.images else f", images={args.images!r}"
    sys.stdout.write(
        f"{args.out / manifest.config}: {split.num_samples} samples in {len(split.filenames)} shards, "
        f"{sum(split.shard_bytes) / 1e6:.1f} MB, {len(split.skipped)} images skipped\n"
        f"load_dataset({str(args.out)!r}, {manifest.config!r}, split={args.split!r}{images})\n"
    )


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo  # see _build

    result = run_demo(args.out, seeds=args.seeds)
    sys.stdout.write(result.to_markdown())
    sys.stderr.write(result.next_steps())


if __name__ == "__main__":
    sys.exit(main())
