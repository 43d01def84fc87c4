"""The dataset card, README.md: YAML that tells the Hub and `datasets` every config, split and feature, then text.

Templates are in cards/, in huggingface_hub's card style: YAML of the dataset itself, `{{ card_data }}` for what the
manifests say, and a body. `{{ use(path) }}` there is cards/shared.md: a table of each config, and how to load them.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..labels.statistics import CONFIDENT, Statistics, add_up
from ..storage.folders import CARD_NAME, MANIFEST_NAME, LocalFolder
from ..storage.local import write_atomically
from ..storage.output import LocalOutput, Output
from .index import Index
from .manifest import Manifest, Split

logger = logging.getLogger(__name__)

_MARK = "<!-- Made by relabel_datasets from the template {name}: edit the template, not this text. -->"
_MARKED = re.compile(r"<!-- Made by relabel_datasets from (?:a template|the template (?P<name>.*?)): edit the template")
_DEFAULT = "default"
_FOLDER = "path/to/this/folder"
EXAMPLES_NAME = "examples.png"  # in a config's folder
_SIZES = (
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
)


def write_card(root: Path, template: str | os.PathLike[str] | None = None, *, repo_id: str | None = None) -> None:
    """Write the card of a dataset from the manifests of its configs, whole or not at all.

    A README.md that is not from a template, since somebody wrote it, keeps its text; only its YAML is brought up to date.

    Args:
        root: folder of the dataset.
        template: file with the template, or the name of one in cards/. Default: the one that the card there is from, as
            its text says, else the general one. If that was a file, the text is kept as if somebody had written it.
        repo_id: `"org/name"` on the Hub, from where the card's examples then load. Default: the folder, or the short name
            that the template gives.

    Raises:
        FileNotFoundError: there is no config, or its index is missing.
    """
    from huggingface_hub import DatasetCard, DatasetCardData  # slow to import, and readers do not need them
    from jinja2 import Template

    manifests = [Manifest.load(path.parent) for path in sorted(root.glob(f"*/{MANIFEST_NAME}"))]
    if not manifests:
        raise FileNotFoundError(f"{root} has no config with a {MANIFEST_NAME}, of which to write a card")
    metadata = _metadata(manifests)
    path = root / CARD_NAME
    name, keep_text = _template_of(path, template)
    if keep_text:
        card = DatasetCard.load(path, ignore_metadata_errors=True)
        for field, value in metadata.items():
            setattr(card.data, field, value)
    else:
        shared = Template(read_template("shared"), trim_blocks=True, lstrip_blocks=True)
        configs = [_describe(root, manifest) for manifest in manifests]
        card = DatasetCard.from_template(
            DatasetCardData(**metadata),
            template_str=read_template(name),
            mark=_MARK.format(name=Path(name).name),  # whoever reads the card need not know of our folders
            use=lambda path=_FOLDER, images=None: shared.render(
                configs=configs,
                first=configs[0],
                split=configs[0]["splits"][0],
                path=repo_id or path,
                folder=repo_id or _FOLDER,
                url=f"hf://datasets/{repo_id}" if repo_id else _FOLDER,
                images=images,
                confident=CONFIDENT,
            ),
        )
    write_atomically(path, str(card).encode())


def write_output_card(output: Output, template: str | os.PathLike[str] | None = None) -> None:
    """Write the card of the dataset that a build has written, see `write_card`.

    Args:
        output: Folder of the dataset. The card of a remote one is written from copies of its manifests and indexes.
        template: Template of the card, see `write_card`.
    """
    if isinstance(output, LocalOutput):
        return write_card(Path(str(output)), template)
    with tempfile.TemporaryDirectory(prefix="relabel-card-") as folder:
        copy = Path(folder)
        with suppress(FileNotFoundError):
            (copy / CARD_NAME).write_bytes(output.read(CARD_NAME))
        for name in output.find(MANIFEST_NAME):
            content, config = output.read(name), PurePosixPath(name).parent.name
            (copy / config).mkdir()
            (copy / name).write_bytes(content)
            for split in Manifest.parse(content, f"{output}/{name}").splits.values():
                (copy / config / split.index).write_bytes(output.read(f"{config}/{split.index}"))
        write_card(copy, template)
        output.write(CARD_NAME, (copy / CARD_NAME).read_bytes())
    return None


def _template_of(card: Path, template: str | os.PathLike[str] | None) -> tuple[str | os.PathLike[str], bool]:
    """Return the template to make a card from, and whether to keep the text that is there instead."""
    if not card.exists():
        return template or _DEFAULT, False
    mark = _MARKED.search(card.read_text(encoding="utf-8"))
    if mark is None:
        return template or _DEFAULT, True
    name = template or mark["name"] or _DEFAULT
    try:
        read_template(name)
    except FileNotFoundError:
        logger.warning(
            "%s is from a template %s that is not here: its text is kept, give card= to renew it", card, name
        )
        return name, True
    return name, False


def is_from_template(card: Path) -> bool:
    """Return whether a card's text is from a template, and not somebody's own."""
    return _MARKED.search(card.read_text(encoding="utf-8")) is not None


def find_restricted_images(card: str | None, manifests: Iterable[Manifest]) -> str | None:
    """Return the name of the images of a dataset if they may not be redistributed, else None.

    Args:
        card: its text, whose YAML may name them (`restricted_images:`).
        manifests: of its configs. Images of ImageNet-1k's classes, by their synsets, are taken to be ImageNet's, whatever
            the card says.
    """
    from huggingface_hub import DatasetCard  # slow to import

    if card is not None:
        named = DatasetCard(card, ignore_metadata_errors=True).data.get("restricted_images")
        if named is not None:
            return str(named)
    return "ImageNet" if any(map(_is_imagenet, manifests)) else None


def _is_imagenet(manifest: Manifest) -> bool:
    return len(manifest.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in manifest.classes)


def read_template(template: str | os.PathLike[str]) -> str:
    """Return the text of a template: a file, or a name in cards/.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(template)
    if not path.is_file():
        package = Path(__file__).parents[1]
        folders = (package / "cards", package.parent / "cards")  # in the wheel; in the repository
        found = [folder / f"{path}.md" for folder in folders if (folder / f"{path}.md").is_file()]
        if not found:
            raise FileNotFoundError(f"no card template {template}: neither a file nor a name in cards/")
        path = found[0]
    return path.read_text(encoding="utf-8")


def _metadata(manifests: list[Manifest]) -> dict[str, Any]:
    num_samples = max(sum(split.num_samples for split in manifest.splits.values()) for manifest in manifests)
    return {
        "size_categories": [next((name for limit, name in _SIZES if num_samples < limit), "n>1T")],
        "configs": [
            {
                "config_name": manifest.config,
                **({"default": True} if manifest is manifests[0] else {}),
                "data_files": [{"split": name, "path": f"{manifest.config}/{name}-*.tar"} for name in manifest.splits],
            }
            for manifest in manifests
        ],
        "dataset_info": [
            {
                "config_name": manifest.config,
                "features": _features(manifest),
                "splits": [
                    {"name": name, "num_bytes": sum(split.shard_bytes), "num_examples": split.num_samples}
                    for name, split in manifest.splits.items()
                ],
            }
            for manifest in manifests
        ],
    }


def _features(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what `datasets` reads from a sample; it would else guess from five samples of one split."""
    names = {str(index): name for index, name in enumerate(manifest.classes)}
    extensions = sorted({split.image_extension for split in manifest.splits.values() if split.image_extension})
    return [
        *({"name": extension, "dtype": "image"} for extension in extensions),
        {"name": "cls", "dtype": {"class_label": {"names": names}}},
        {"name": "safetensors", "dtype": "binary"},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _describe(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what a template may say of a config."""
    splits = [_describe_split(root / manifest.config, split) for split in manifest.splits.values()]
    return {
        "name": manifest.config,
        "annotator": manifest.annotator,
        "exact": manifest.annotator.get("linear_head"),
        "encoding": manifest.encoding,
        "num_classes": len(manifest.classes),
        "splits": splits,
        "made_with": manifest.made_with,
        "version": manifest.version,
        "examples": f"{manifest.config}/{EXAMPLES_NAME}"
        if (root / manifest.config / EXAMPLES_NAME).is_file()
        else None,
    }


def _describe_split(folder: Path, split: Split) -> dict[str, Any]:
    num_samples = max(1, split.num_samples)
    statistics = add_up([Statistics(), *split.shard_statistics])
    last = len(split.filenames) - 1
    return {
        "name": split.name,
        "num_samples": split.num_samples,
        "num_shards": len(split.filenames),
        "images": split.image_extension is not None,
        "megabytes": sum(split.shard_bytes) / 1e6,
        "bytes_per_sample": sum(split.shard_bytes) / num_samples,
        "map_bytes": Index(LocalFolder(folder), split).mean_size("map"),
        "num_skipped": len(split.skipped),
        "shards": f"{split.name}-{{00000..{last:05d}}}-of-{last + 1:05d}.tar",
        "agreement": statistics.agreeing / num_samples,
        "several": statistics.several / num_samples,
        "num_crops": statistics.crops,
        "kl": statistics.kl / max(1, statistics.crops),
        "same_best": statistics.same_best / max(1, statistics.crops),
    }
