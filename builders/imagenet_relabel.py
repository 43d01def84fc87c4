"""Build imagenet-relabel: soft labels of ImageNet-1k without its images, whose license forbids redistribution.

    python builders/imagenet_relabel.py /path/to/imagenet
    python builders/imagenet_relabel.py /path/to/imagenet --published FKD_soft_label_500_crops_marginal_smoothing_k_5

The folder has `train/<synset>/*.JPEG` and optionally `val/<synset>/*.JPEG`. The default annotator is that of the paper,
EfficientNet-L2 (Noisy Student, JFT) at 475 px, with maps of 15 x 15 x 1000. The paper reports 10 GPU hours.

`--published` needs no GPU: it converts the labels of the training images that ReLabel, FKD, FerKD or ImageNet+ have published,
a folder or an uncompressed tar. Each annotator and each release has its own config. Rerun the same command after an
interruption. To load the result:

    load_dataset("imagenet-relabel", split="train", images="/path/to/imagenet")
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from relabel_datasets.annotate import (
    BuildConfig,
    PublishedCrops,
    PublishedMaps,
    build,
    find_format,
    import_crops,
    import_label_maps,
)
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.data import ImageFolderSource
from relabel_datasets.storage.folders import default_cache

SHARD_SIZE = 10_000
CARD = "imagenet-relabel"


def main() -> None:
    """Build the splits that exist, or convert published labels of the training images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imagenet", type=Path, help="folder with train/ and optionally val/")
    parser.add_argument(
        "--out", type=Path, default=default_cache() / "imagenet-relabel", help="output folder (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--published", type=Path, metavar="PATH", help="convert these published labels instead of annotating"
    )
    parser.add_argument(
        "--order", choices=["hw", "wh"], default="wh",
        help="order of the last two axes of published label maps (default: %(default)s, as ReLabel's training reads them)",
    )  # fmt: skip
    parser.add_argument(
        "--label-type", help="type of FKD's labels, see `relabel import --help` (default: by their shape)"
    )
    add_annotator_arguments(parser, default="tf_efficientnet_l2.ns_jft_in1k_475")
    args = parser.parse_args()
    if args.published is None:
        annotate(args)
    else:
        convert(args)
    print(args.out)


def annotate(args: argparse.Namespace) -> None:
    """Annotate the splits that exist."""
    annotator = annotator_from(args)
    for split, folder in (("train", "train"), ("validation", "val")):
        if split == "train" or (args.imagenet / folder).is_dir():
            build(
                ImageFolderSource(args.imagenet / folder),
                args.out,
                annotator,
                split=split,
                build_config=BuildConfig(images=False, batch_size=args.batch_size, num_threads=8),
                shard_size=SHARD_SIZE,
                card=CARD,
            )


def convert(args: argparse.Namespace) -> None:
    """Convert published labels of the training images."""
    published = find_format(args.published)
    if published in ("relabel", "tokenlabeling"):
        maps = PublishedMaps(args.published, published)
        import_label_maps(
            maps, args.out, order=args.order, images=args.imagenet, shard_size=SHARD_SIZE, card=CARD, num_threads=8
        )
    else:
        crops = PublishedCrops(args.published, published, args.imagenet, label_type=args.label_type)
        import_crops(crops, args.out, shard_size=SHARD_SIZE, card=CARD, num_threads=8)


if __name__ == "__main__":
    sys.exit(main())
