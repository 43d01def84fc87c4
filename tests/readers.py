"""Read the shards of a config with every supported library: each must find the same samples."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import webdataset
from timm.data import create_dataset

import relabel_datasets as rd

# webdataset leaves its tars to the garbage collector
IGNORED_WARNINGS = ("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def assert_read_everywhere(root: Path, expected: dict[str, tuple[int, bytes]], *, config: str = "colours") -> None:
    """Check that verify, our loader, `datasets`, webdataset and timm find exactly these samples in split "train".

    Args:
        root: Folder of the dataset.
        expected: Class index and bytes of the image file, by key.
        config: Name of the config.
    """
    report = rd.verify(root, config, num_workers=0, progress=False)
    assert report.ok, str(report)
    pixels = {key: np.asarray(rd.decode_image(data)) for key, (_, data) in expected.items()}

    ours = rd.RelabelDataset(root, config)
    assert sorted(ours.keys) == sorted(expected)
    for row, key in enumerate(ours.keys):
        assert (ours.targets[row], ours.label_maps.image_bytes(row)) == expected[key]
        np.testing.assert_array_equal(np.asarray(ours.image(row)), pixels[key])

    rows = datasets.load_dataset(str(root), config, split="train", streaming=True)
    _assert_samples(map(rd.decode_sample, rows), ours, expected, pixels)

    files = sorted(map(str, (root / config).glob("train-*.tar")))
    _assert_samples(map(rd.decode_sample, webdataset.WebDataset(files, shardshuffle=False)), ours, expected, pixels)

    timm_samples = list(create_dataset("wds/", root=str(root / config), split="train", is_training=False, batch_size=4))
    assert len(timm_samples) == len(expected)
    for key, (image, label) in zip(ours.keys, timm_samples, strict=True):  # it yields no keys, but reads in order
        assert label == expected[key][0]
        np.testing.assert_array_equal(np.asarray(image), pixels[key])


def _assert_samples(samples, ours, expected, pixels) -> None:
    samples = list(samples)
    assert [sample["key"] for sample in samples] == list(ours.keys)
    for sample in samples:
        assert sample["label"] == expected[sample["key"]][0]
        np.testing.assert_array_equal(np.asarray(sample["image"]), pixels[sample["key"]])
