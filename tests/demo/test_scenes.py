import csv

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from relabel_datasets.demo import scenes
from relabel_datasets.demo.scenes import BOX_COLUMNS, CLASSES, draw_clean, draw_scene, draw_scenes, read_objects

COUNT = 4 * len(CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    draw_scenes(root, "train", COUNT, seed=3)
    return root


def _files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_pictures_depend_only_on_seed_and_split(folder, tmp_path):
    draw_scenes(tmp_path / "again", "train", COUNT, seed=3)
    assert _files(tmp_path / "again") == _files(folder)
    pictures = {data for path, data in _files(folder).items() if path.suffix == ".jpg"}
    for name, split, seed in (("seed", "train", 4), ("split", "validation", 3)):
        draw_scenes(tmp_path / name, split, COUNT, seed=seed)
        assert not pictures & {data for path, data in _files(tmp_path / name).items() if path.suffix == ".jpg"}


def test_a_picture_does_not_depend_on_the_number_of_pictures(folder, tmp_path):
    draw_scenes(tmp_path, "train", 5, seed=3)
    pictures = {path: data for path, data in _files(tmp_path).items() if path.suffix == ".jpg"}
    assert len(pictures) == 5
    assert pictures.items() <= _files(folder).items()


def test_scenes_form_an_image_folder_with_balanced_classes_and_unique_stems(folder):
    dataset = ImageFolder(str(folder / "train"))
    assert tuple(dataset.classes) == CLASSES
    assert np.bincount(dataset.targets).tolist() == [4] * len(CLASSES)
    assert len({path.rsplit("/", 1)[-1] for path, _ in dataset.samples}) == COUNT


def test_the_orientation_of_a_picture_is_independent_of_its_class(folder):
    # Otherwise the distortion of resizing to a square would reveal the class.
    dataset = ImageFolder(str(folder / "train"))
    num_portrait = [0] * len(CLASSES)
    for image, label in dataset:
        assert image.size in ((128, 96), (96, 128))
        num_portrait[label] += image.height > image.width
    assert num_portrait == [2] * len(CLASSES)


def test_the_table_has_one_main_object_and_others_per_picture(folder):
    with (folder / "train-boxes.csv").open() as file:
        assert tuple(next(csv.reader(file))) == BOX_COLUMNS
    objects = read_objects(folder / "train-boxes.csv")
    assert len(objects) == COUNT
    for path in (folder / "train").rglob("*.jpg"):
        scene_objects = objects[path.stem]
        assert [scene_object.is_main for scene_object in scene_objects] == [True] + [False] * (len(scene_objects) - 1)
        assert CLASSES[scene_objects[0].label] == path.parent.name
        assert len({scene_object.label for scene_object in scene_objects}) == len(scene_objects) <= 4
    assert {len(scene_objects) for scene_objects in objects.values()} == {1, 2, 3, 4}


def test_boxes_are_tight(monkeypatch):
    # White objects on black without noise, so that the white pixels are the objects.
    monkeypatch.setattr(scenes, "_background", lambda _generator, size: np.zeros((*size, 3), np.float32))
    monkeypatch.setattr(scenes, "_colors", lambda _generator, _background: np.ones((2, 3), np.float32))
    monkeypatch.setattr(scenes, "_to_image", lambda _generator, pixels: Image.fromarray(np.uint8(pixels * 255)))
    for i in range(2 * len(CLASSES)):
        size = (96, 128) if i % 2 else (128, 96)
        scene = draw_scene(np.random.default_rng(i), i % len(CLASSES), size)
        white = np.array(scene.image)[..., 0] >= 127  # half covered: 127.5, rounded down
        inside = np.zeros_like(white)
        for _, _, (x1, y1, x2, y2) in scene.objects:
            assert 0 <= x1 < x2 <= size[1]
            assert 0 <= y1 < y2 <= size[0]
            edges = (white[y1, x1:x2], white[y2 - 1, x1:x2], white[y1:y2, x1], white[y1:y2, x2 - 1])
            assert all(edge.any() for edge in edges)
            inside[y1:y2, x1:x2] = True
        assert not (white & ~inside).any()


def test_clean_pictures_have_one_object_or_none():
    clean = list(draw_clean(2 * (len(CLASSES) + 2)))
    labels = [[scene_object.label for scene_object in scene.objects] for scene in clean]
    assert labels == 2 * ([[label] for label in range(len(CLASSES))] + [[], []])
    assert [scene.image.size for scene in clean] == [(72, 54)] * 14 + [(54, 72)] * 14
