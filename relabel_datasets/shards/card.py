"""Write the dataset card, README.md: YAML that describes all configs, splits and features for the Hub and `datasets`, and text.

Templates are in cards/, in the style of huggingface_hub: YAML of the dataset, `{{ card_data }}` for the YAML from the manifests,
`{{ mark }}`, and a body. `{{ use(path) }}` inserts cards/shared.md, which has a table of each config and code that loads it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from yaml import YAMLError

from ..errors import DatasetError
from ..labels.statistics import total
from ..labels.windows import shown_definition
from ..naming import check_config
from ..storage.folders import CARD_NAME, MANIFEST_NAME, LocalFolder, read_card
from ..storage.local import write_atomically
from ..storage.output import LocalOutput, Output
from ..storage.temp_folders import temporary_folder
from .card_template import DEFAULT_TEMPLATE, marked_template, package_templates, read_template, render_card
from .configs import open_manifest
from .index import Index
from .manifest import Manifest, Split

__all__ = [
    "EXAMPLES_NAME",
    "find_restricted_images",
    "is_from_template",
    "read_template",
    "write_card",
    "write_output_card",
]

logger = logging.getLogger(__name__)

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
    """Write the card of a dataset from the manifests of its configs, atomically.

    A README.md that was not made from a template of this package keeps its text; only its YAML is updated. An existing card is
    never rendered: its mark can only name one of the package's templates.

    Args:
        root: Folder of the dataset.
        template: Name of one of the package's templates, or path of a file, see `read_template`. Default: the template named by
            the mark of the existing card, else `"default"`. The text of a card made from a file is kept.
        repo_id: Repository `"org/name"` on the Hub from which the examples in the card load. Default: the folder, or the short
            name in the template.

    Raises:
        FileNotFoundError: There is no config, an index is missing, or there is no such template.
        DatasetError: A manifest is not valid, the existing card cannot be read, or the template fails.
    """
    from huggingface_hub import DatasetCard, DatasetCardData  # slow to import, and not needed by readers

    manifests = _load_manifests(root)
    metadata = _metadata(manifests)
    path = root / CARD_NAME
    existing = read_card(path)
    name = _choose_template(path, existing, template)
    if name is None:
        assert existing is not None
        content = _with_metadata(existing, metadata, path)
    else:
        configs = [_describe(root, manifest) for manifest in manifests]

        def use(path: str = _FOLDER, images: str | None = None) -> dict[str, Any]:
            return {
                "configs": configs,
                "first": configs[0],
                "split": configs[0]["splits"][0],
                "path": repo_id or path,
                "folder": repo_id or _FOLDER,
                "url": f"hf://datasets/{repo_id}" if repo_id else _FOLDER,
                "images": images,
                "shown_definitions": _shown_definitions(manifests),
            }

        text = render_card(name, DatasetCardData(**metadata).to_yaml(), use)
        try:
            content = str(DatasetCard(text))
        except (YAMLError, ValueError, TypeError) as error:
            raise DatasetError(f"card template {name}: its YAML is not valid: {error}") from error
    write_atomically(path, content.encode())


def write_output_card(output: Output, template: str | os.PathLike[str] | None = None) -> None:
    """Write the card of the output of a build, see `write_card`.

    Args:
        output: Folder of the dataset. For a remote one, manifests and indexes are copied to a temporary folder.
        template: Template of the card, see `write_card`. Default: that of the existing card.
    """
    if isinstance(output, LocalOutput):
        return write_card(Path(str(output)), template)
    with temporary_folder("relabel-card-") as copy:
        with suppress(FileNotFoundError):
            (copy / CARD_NAME).write_bytes(output.read(CARD_NAME))
        for name in output.find(MANIFEST_NAME):
            content, config = output.read(name), check_config(PurePosixPath(name).parent.name, str(output))
            (copy / config).mkdir()
            (copy / name).write_bytes(content)
            for split in Manifest.parse(content, f"{output}/{name}").splits.values():
                (copy / config / split.index).write_bytes(output.read(f"{config}/{split.index}"))
        write_card(copy, template)
        output.write(CARD_NAME, (copy / CARD_NAME).read_bytes())
    return None


def _load_manifests(root: Path) -> list[Manifest]:
    """Return the manifests of all configs, in the order of their names.

    Raises:
        FileNotFoundError: There is no config.
        DatasetError: A manifest is not valid, or belongs to another config.
    """
    names = LocalFolder(root).configs()
    if not names:
        raise FileNotFoundError(f"cannot write a card: {root} has no config with a {MANIFEST_NAME}")
    return [open_manifest(LocalFolder(root), name) for name in names]


def _choose_template(
    path: Path, card: str | None, template: str | os.PathLike[str] | None
) -> str | os.PathLike[str] | None:
    """Return the template to render; None to keep the text of the card."""
    if card is None:
        return template or DEFAULT_TEMPLATE
    name = marked_template(card)
    if name is None:
        return None
    if template is not None:
        return template
    if name in package_templates():
        return name
    logger.warning(
        "%s was made from the template %.80r, which is not a template of this package: its text is kept; to render it again, give "
        "the template as card= (--card)",
        path,
        name,
    )
    return None


def _with_metadata(card: str, metadata: dict[str, Any], path: Path) -> str:
    """Return a card with its text and the metadata of the dataset.

    Raises:
        DatasetError: The YAML of the card cannot be parsed.
    """
    from huggingface_hub import DatasetCard  # see write_card

    try:
        kept = DatasetCard(card, ignore_metadata_errors=True)
        for field, value in metadata.items():
            setattr(kept.data, field, value)
        return str(kept)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(f"{path}: its YAML cannot be parsed, correct or remove it: {reason}") from error


def is_from_template(card: str) -> bool:
    """Return whether a card was made from a template rather than written by hand.

    Args:
        card: Text of the card.
    """
    return marked_template(card) is not None


def find_restricted_images(card: str | None, manifests: Iterable[Manifest]) -> str | None:
    """Find out whether the images of a dataset may be redistributed.

    Args:
        card: Text of the card, whose YAML may name restricted images (`restricted_images:`). None if there is no card.
        manifests: Manifests of the configs. If the classes are the synsets of ImageNet-1k, the images count as ImageNet's.

    Returns:
        The name of the images if they must not be redistributed, else None.

    Raises:
        DatasetError: The YAML of the card cannot be parsed.
    """
    from huggingface_hub import DatasetCard  # slow to import

    if card is not None:
        try:
            named = DatasetCard(card, ignore_metadata_errors=True).data.get("restricted_images")
        except (YAMLError, ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DatasetError(
                f"the YAML of the dataset's card cannot be parsed, correct or remove it: {reason}"
            ) from error
        if named is not None:
            return named if isinstance(named, str) else "unknown origin"  # any other value is a restriction, too
    return "ImageNet" if any(map(_is_imagenet, manifests)) else None


def _is_imagenet(manifest: Manifest) -> bool:
    return len(manifest.classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in manifest.classes)


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
    """Return the features of a sample for `datasets`, which would otherwise infer them from five samples of one split."""
    # PyYAML does not escape U+0085, which parsers treat as a line break
    names = {str(index): name.replace("\x85", " ") for index, name in enumerate(manifest.classes)}
    extensions = sorted({split.image_extension for split in manifest.splits.values() if split.image_extension})
    return [
        *({"name": extension, "dtype": "image"} for extension in extensions),
        {"name": "cls", "dtype": {"class_label": {"names": names}}},
        {"name": "safetensors", "dtype": "binary"},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _shown_definitions(manifests: Sequence[Manifest]) -> str:
    """Return what it means that an image shows a class, for each kind of labels of the configs."""
    return " ".join(shown_definition(has_maps=kind) for kind in sorted({m.has_maps for m in manifests}, reverse=True))


def _describe(root: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the variables of a config for templates."""
    splits = [
        _describe_split(root / manifest.config, split, len(manifest.classes)) for split in manifest.splits.values()
    ]
    return {
        "name": manifest.config,
        "annotator": manifest.annotator.get("name", manifest.config),
        "input_size": _as_size(manifest.annotator.get("input_size")),
        "license": manifest.annotator.get("license"),
        "exact": manifest.annotator.get("linear_head") if manifest.has_maps else None,
        "encoding": manifest.encoding,
        "map_size": " and ".join(" x ".join(map(str, size)) for size in manifest.map_sizes) or None,
        "num_crops": manifest.encoding.get("num_crops"),
        "num_classes": len(manifest.classes),
        "splits": splits,
        "made_with": manifest.made_with,
        "version": manifest.version,
        "examples": f"{manifest.config}/{EXAMPLES_NAME}"
        if (root / manifest.config / EXAMPLES_NAME).is_file()
        else None,
    }


def _as_size(size: object) -> str | None:
    """Return a size as text, such as `448 x 448`; None if it is not a list of integers."""
    if isinstance(size, Sequence) and size and all(isinstance(number, int) for number in size):
        return " x ".join(map(str, size))
    return None


def _describe_split(folder: Path, split: Split, num_classes: int) -> dict[str, Any]:
    num_samples = max(1, split.num_samples)
    statistics = total(split.shard_statistics)
    last = len(split.filenames) - 1
    return {
        "name": split.name,
        "num_samples": split.num_samples,
        "num_shards": len(split.filenames),
        "images": split.image_extension is not None,
        "megabytes": sum(split.shard_bytes) / 1e6,
        "bytes_per_sample": sum(split.shard_bytes) / num_samples,
        "map_bytes": Index(LocalFolder(folder), split, num_classes).mean_size("map"),
        "num_skipped": len(split.skipped),
        "shards": f"{split.name}-{{00000..{last:05d}}}-of-{last + 1:05d}.tar",
        "agreement": split.agreement or 0.0,
        "several": None if statistics.several is None else statistics.several / num_samples,
        "num_crops": statistics.crops,
        "kl": statistics.kl / max(1, statistics.crops),
        "same_best": statistics.same_best / max(1, statistics.crops),
        "calibration": split.calibration,
    }
