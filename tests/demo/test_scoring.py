import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.demo.scenes import CLASSES, SceneObject, read_objects
from relabel_datasets.demo.scoring import Score, ScoringScenes, visible_class

OBJECTS = [SceneObject(3, True, (0, 0, 40, 40)), SceneObject(7, False, (60, 60, 80, 80))]


@pytest.fixture(scope="module")
def scenes(scenes_relabel):
    return rd.load_dataset(scenes_relabel, split="validation"), read_objects(
        scenes_relabel / "pictures" / "validation-boxes.csv"
    )


@pytest.fixture(scope="module")
def scoring(scenes):
    return ScoringScenes(*scenes, image_size=32, crop_size=24, min_area=0.08)


@pytest.mark.parametrize(
    ("crop", "label"),
    [
        ((0, 0, 100, 100), 3),  # both objects: the larger counts
        ((30, 30, 50, 50), 7),  # 100 pixels of the main object, 400 of the other
        ((70, 70, 30, 30), 7),  # 100 of 900 pixels
        ((72, 72, 28, 28), None),  # 64 of 784 pixels: less than a tenth
        ((0, 50, 50, 50), None),  # no object
        ((10, 10, 5, 5), 3),  # a small part of an object fills the crop
    ],
)
def test_a_crop_shows_the_object_whose_box_covers_most_of_it(crop, label):
    assert visible_class(crop, OBJECTS) == label


def test_scores_are_shares_of_scenes_and_of_crops(scoring, scenes):
    dataset, objects = scenes
    labels = torch.tensor([int(label) for label in dataset.targets])
    other = torch.tensor([objects[key][-1].label for key in dataset.keys])  # the main object if it is the only one
    whole, crops = (torch.eye(len(CLASSES))[rows] for rows in (labels, scoring._truth))
    assert scoring.score(whole, crops) == Score(1, 1, 1)
    share_alone = float((other == labels).float().mean())
    assert 0 < share_alone < 1
    assert scoring.score(torch.eye(len(CLASSES))[other], -crops) == Score(pytest.approx(share_alone), 1, 0)
    assert scoring.score(-whole, crops).main_object == 0


def test_the_crops_are_the_same_each_time_and_keep_the_random_state(scoring, scenes):
    state = torch.get_rng_state()
    again = ScoringScenes(*scenes, image_size=32, crop_size=24, min_area=0.08)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again._crops, scoring._crops)
    assert len(scoring._crops) == len(scoring._truth) > len(scenes[0])


def test_label_maps_of_crops_name_the_object_that_the_crop_shows(scoring):
    score = scoring.score_label_maps()
    assert score.any_object >= 0.9
    assert score.crops >= 0.8
