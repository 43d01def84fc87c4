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


def test_the_same_seed_draws_the_same_bytes_and_other_seeds_and_splits_do_not(folder, tmp_path):
    draw_scenes(tmp_path / "again", "train", COUNT, seed=3)
    assert _files(tmp_path / "again") == _files(folder)
    pictures = {data for path, data in _files(folder).items() if path.suffix == ".jpg"}
    for name, split, seed in (("seed", "train", 4), ("split", "validation", 3)):
        draw_scenes(tmp_path / name, split, COUNT, seed=seed)
        assert not pictures & {data for path, data in _files(tmp_path / name).items() if path.suffix == ".jpg"}


def test_a_picture_does_not_depend_on_how_many_are_drawn(folder, tmp_path):
    draw_scenes(tmp_path, "train", 5, seed=3)
    pictures = {path: data for path, data in _files(tmp_path).items() if path.suffix == ".jpg"}
    assert len(pictures) == 5
    assert pictures.items() <= _files(folder).items()


def test_scenes_are_an_image_folder_of_balanced_classes_with_unique_stems(folder):
    dataset = ImageFolder(str(folder / "train"))
    assert tuple(dataset.classes) == CLASSES
    assert np.bincount(dataset.targets).tolist() == [4] * len(CLASSES)
    assert len({path.rsplit("/", 1)[-1] for path, _ in dataset.samples}) == COUNT


def test_the_shape_of_a_picture_does_not_tell_its_class(folder):
    # Every class lies as often as it stands; were one class always to lie, squashing would give it away.
    dataset = ImageFolder(str(folder / "train"))
    standing = [0] * len(CLASSES)
    for image, label in dataset:
        assert image.size in ((128, 96), (96, 128))
        standing[label] += image.height > image.width
    assert standing == [2] * len(CLASSES)


def test_the_table_has_one_main_object_a_picture_of_its_folders_class_and_others_beside_it(folder):
    with (folder / "train-boxes.csv").open() as file:
        assert tuple(next(csv.reader(file))) == BOX_COLUMNS
    objects = read_objects(folder / "train-boxes.csv")
    assert len(objects) == COUNT
    for path in (folder / "train").rglob("*.jpg"):
        in_picture = objects[path.stem]
        assert [each.is_main for each in in_picture] == [True] + [False] * (len(in_picture) - 1)
        assert CLASSES[in_picture[0].label] == path.parent.name
        assert len({each.label for each in in_picture}) == len(in_picture) <= 4
    assert sum(len(in_picture) for in_picture in objects.values()) > 2 * COUNT


def test_boxes_hold_all_of_their_object_and_nothing_more(monkeypatch):
    # Black ground and white objects, without noise: the objects are the white pixels.
    monkeypatch.setattr(scenes, "_background", lambda _generator, size: np.zeros((*size, 3), np.float32))
    monkeypatch.setattr(scenes, "_colors", lambda _generator, _background: np.ones((2, 3), np.float32))
    monkeypatch.setattr(scenes, "_to_image", lambda _generator, pixels: Image.fromarray(np.uint8(pixels * 255)))
    for i in range(2 * len(CLASSES)):
        size = (96, 128) if i % 2 else (128, 96)
        scene = draw_scene(np.random.default_rng(i), i % len(CLASSES), size)
        white = np.array(scene.image)[..., 0] >= 128
        inside = np.zeros_like(white)
        for _, _, (x1, y1, x2, y2) in scene.objects:
            assert 0 <= x1 < x2 <= size[1]
            assert 0 <= y1 < y2 <= size[0]
            edges = (white[y1, x1:x2], white[y2 - 1, x1:x2], white[y1:y2, x1], white[y1:y2, x2 - 1])
            assert all(edge.any() for edge in edges)
            inside[y1:y2, x1:x2] = True
        assert not (white & ~inside).any()


def test_clean_pictures_show_one_object_or_none():
    clean = draw_clean(2 * (len(CLASSES) + 2))
    labels = [[each.label for each in scene.objects] for scene in clean]
    assert labels == 2 * ([[label] for label in range(len(CLASSES))] + [[], []])
    assert [scene.image.size for scene in clean] == [(72, 54)] * 14 + [(54, 72)] * 14
