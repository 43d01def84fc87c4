"""Build imagenette-relabel: the images of Imagenette, ten classes of ImageNet, with label maps of these classes.

    python builders/imagenette_relabel.py /path/to/imagenette2-320

The folder has `train/<synset>/*.JPEG` and `val/<synset>/*.JPEG`. The classes of the annotator, any classifier of ImageNet-1k,
are matched with the ten classes by synset. To load the result:

    load_dataset("imagenette-relabel", split="train")
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from relabel_datasets.annotate import build
from relabel_datasets.cli.annotator_options import add_annotator_arguments, annotator_from
from relabel_datasets.data import ImageFolderSource
from relabel_datasets.storage.folders import default_cache


def main() -> None:
    """Build both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imagenette", type=Path, help="folder with train/ and val/")
    parser.add_argument(
        "--out", type=Path, default=default_cache() / "imagenette-relabel", help="output folder (default: %(default)s)"
    )
    add_annotator_arguments(parser, default="tf_efficientnet_b4.ns_jft_in1k")
    args = parser.parse_args()
    annotator = annotator_from(args)
    for split, folder in (("train", "train"), ("validation", "val")):
        build(ImageFolderSource(args.imagenette / folder), args.out, annotator, split=split, card="imagenette-relabel")
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
