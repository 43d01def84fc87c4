"""`relabel publish`: upload a dataset to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .next_step import say_next
from .options import add_command, add_config, path_argument


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "publish",
        "upload a dataset to the Hugging Face Hub",
        _run,
        examples=["relabel publish OUT org/name", "relabel publish OUT org/name --public --tag v2"],
        note="Log in with `hf auth login`, or set HF_TOKEN. Rerun the same command after an interruption.",
    )
    parser.add_argument("path", type=path_argument, metavar="PATH", help="folder of the dataset")
    parser.add_argument("repo", metavar="REPO", help="org/name on the Hub, created if it does not exist")
    add_config(parser, default="all configs in the folder")
    parser.add_argument("--public", action="store_true", help="make the repository public if it is created")
    parser.add_argument("--tag", help="tag of the published revision (default: v1, v2, ...)")
    parser.add_argument(
        "--card", metavar="TEMPLATE",
        help="template of the dataset card: a file, or a name in cards/ (default: that of the folder's card)",
    )  # fmt: skip
    parser.add_argument(
        "--restricted-images", metavar="NAME",
        help="publish the images even though the card says that images of NAME must not be redistributed",
    )  # fmt: skip


def _run(args: argparse.Namespace) -> None:
    from ..hub import publish

    result = publish(
        args.path,
        args.repo,
        config=args.config,
        public=args.public,
        tag=args.tag,
        card=args.card,
        restricted_images=args.restricted_images,
    )
    sys.stdout.write(f"{result.url} at {result.tag}, commit {result.commit}\n{result.load_line}\n")
    say_next("relabel", "verify", args.repo, "--revision", result.tag)
