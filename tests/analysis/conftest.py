"""Fixtures of the analysis tests: scenes whose label maps have many classes, and the boxes of their objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.demo.scenes import CLASSES, draw_scenes

ENCODINGS = ("heatmaps", "topk")


class RandomNet(torch.nn.Module):
    """An untrained fully convolutional classifier; its predictions vary between locations."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 16, 16, stride=16), torch.nn.ReLU(), torch.nn.Conv2d(16, len(CLASSES), 1)
            )
        for layer in (self.layers[0], self.layers[2]):
            layer.weight.data *= 5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder with a dataset of 48 scenes, one config per encoding, and `pictures/train-boxes.csv`."""
    root = tmp_path_factory.mktemp("scenes")
    draw_scenes(root / "pictures", "train", 4 * len(CLASSES))
    annotator = ModuleAnnotator(RandomNet(), (80, 112), classes=CLASSES, name="random")  # maps of 5 x 7
    for encoding in ENCODINGS:
        build_config = rd.annotate.BuildConfig(encoding=encoding, k=5, storage_dtype="float16", batch_size=16)
        source = rd.data.ImageFolderSource(root / "pictures" / "train")
        rd.build(
            source,
            root / "dataset",
            annotator,
            config=encoding,
            build_config=build_config,
            shard_size=20,
            progress=False,
        )
    return root


@pytest.fixture(scope="session")
def scene_boxes(scenes) -> Path:
    """The CSV table of the objects in the scenes."""
    return scenes / "pictures" / "train-boxes.csv"
