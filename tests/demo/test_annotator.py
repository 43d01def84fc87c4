import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import relabel_datasets as rd
from relabel_datasets.demo.annotator import ANNOTATOR_KWARGS, WEIGHTS, load_demo_annotator
from relabel_datasets.demo.scenes import read_objects


@pytest.fixture(scope="module")
def maps_and_objects(scenes_relabel):
    """Class scores `[C, H, W]` of each validation scene, and its objects."""
    dataset = rd.load_dataset(scenes_relabel, split="validation")
    objects = read_objects(scenes_relabel / "pictures" / "validation-boxes.csv")
    return [(dataset.label_maps.at(row).dense(), objects[key]) for row, key in enumerate(dataset.keys)]


def test_the_weights_are_small_and_say_how_they_were_trained():
    assert WEIGHTS.stat().st_size < 1_000_000
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16, torch.int64}  # noqa: SIM118
    assert metadata["script"] == "builders/scenes_annotator.py"
    settings = json.loads(metadata["settings"])
    assert settings["num_clean"] + settings["num_scenes"] > 5 * 1920  # far more pictures than the students see
    assert settings["seed"] != 0  # the seed of the dataset
    assert {"versions", "accuracy", "seconds", "model"} <= metadata.keys()


def test_the_manifest_describes_the_annotator_of_the_package(scenes_relabel):
    annotator = load_demo_annotator()
    manifest = rd.load_dataset(scenes_relabel, split="train").label_maps.manifest
    assert annotator.describe() == manifest.annotator
    assert annotator.model_kwargs == ANNOTATOR_KWARGS


def test_the_annotator_names_an_object_of_nearly_every_scene(maps_and_objects):
    is_present = [
        int(dense.mean((1, 2)).argmax()) in {scene_object.label for scene_object in objects}
        for dense, objects in maps_and_objects
    ]
    assert np.mean(is_present) >= 0.9


def test_the_strongest_location_of_the_main_object_is_inside_its_box(maps_and_objects, scenes_relabel):
    dataset = rd.load_dataset(scenes_relabel, split="validation")
    is_inside = []
    for row, (dense, objects) in enumerate(maps_and_objects):
        main = objects[0]
        heatmap = dense.softmax(0)[main.label]
        y, x = divmod(int(heatmap.argmax()), heatmap.shape[1])
        image = dataset.image(row)
        x, y = (x + 0.5) / heatmap.shape[1] * image.width, (y + 0.5) / heatmap.shape[0] * image.height
        x1, y1, x2, y2 = main.box_xyxy
        is_inside.append(x1 <= x < x2 and y1 <= y < y2)
    assert np.mean(is_inside) >= 0.9
