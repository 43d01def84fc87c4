"""What tests of the analysis share: scenes whose maps have many classes, and where their objects are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.annotate.annotator import ModuleAnnotator
from relabel_datasets.demo.scenes import CLASSES, draw_scenes

ENCODINGS = ("heatmaps", "topk")


class RandomNet(torch.nn.Module):
    """A fully-convolutional classifier of the scenes that has not learnt: its classes differ from place to place."""

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
    """A dataset of 48 scenes with a config for each encoding, and `train-boxes.csv` beside it in `pictures`."""
    root = tmp_path_factory.mktemp("scenes")
    draw_scenes(root / "pictures", "train", 4 * len(CLASSES))
    annotator = ModuleAnnotator(RandomNet(), (80, 112), classes=CLASSES, name="random")  # maps of 5 x 7
    for encoding in ENCODINGS:
        settings = rd.Settings(encoding=encoding, k=5, dtype="float16", batch_size=16)
        source = rd.ImageFolderSource(root / "pictures" / "train")
        rd.build(source, root / "dataset", annotator, config=encoding, settings=settings, shard_size=20, progress=False)
    return root


@pytest.fixture(scope="session")
def scene_boxes(scenes) -> Path:
    """The table of the objects of the scenes."""
    return scenes / "pictures" / "train-boxes.csv"
