"""Build imagenet-relabel: label maps of ImageNet-1k without its images, whose license forbids redistribution.

    python builders/imagenet_relabel.py /path/to/imagenet

The folder has `train/<synset>/*.JPEG` and optionally `val/<synset>/*.JPEG`. The default annotator is that of the paper,
EfficientNet-L2 (Noisy Student, JFT) at 475 px, with maps of 15 x 15 x 1000. Each annotator has its own config. Rerun the
same command after an interruption. The paper reports 10 GPU hours. To load the result:

    load_dataset("imagenet-relabel", split="train", images="/path/to/imagenet")
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from relabel_datasets.annotate import BuildConfig, build
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.data import ImageFolderSource
from relabel_datasets.storage.folders import default_cache


def main() -> None:
    """Build the splits that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imagenet", type=Path, help="folder with train/ and optionally val/")
    parser.add_argument(
        "--out", type=Path, default=default_cache() / "imagenet-relabel", help="output folder (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    add_annotator_arguments(parser, default="tf_efficientnet_l2.ns_jft_in1k_475")
    args = parser.parse_args()
    annotator = annotator_from(args)
    for split, folder in (("train", "train"), ("validation", "val")):
        if split == "train" or (args.imagenet / folder).is_dir():
            build(
                ImageFolderSource(args.imagenet / folder),
                args.out,
                annotator,
                split=split,
                build_config=BuildConfig(images=False, batch_size=args.batch_size, num_threads=8),
                shard_size=10_000,
                card="imagenet-relabel",
            )
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
