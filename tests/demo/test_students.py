import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.demo.scenes import CLASSES, read_objects
from relabel_datasets.demo.students import METHODS, DemoRecipe, PicturesInMemory, Score, _score, train_demo_student

TINY = DemoRecipe(epochs=1, batch_size=8, crop_size=32, test_size=32, num_workers=0)


@pytest.fixture(scope="module")
def pictures(scenes_relabel):
    return [PicturesInMemory(rd.load_dataset(scenes_relabel, split=split)) for split in ("train", "validation")]


@pytest.fixture(scope="module")
def present(scenes_relabel):
    objects = read_objects(scenes_relabel / "pictures" / "validation-boxes.csv")
    return {key: [scene_object.label for scene_object in scene] for key, scene in objects.items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_is_reproducible_and_keeps_the_global_random_state(pictures, present, method):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    epochs = []
    first = train_demo_student(*pictures, present, method, 0, recipe=TINY, on_epoch=lambda: epochs.append(1))
    again = train_demo_student(*pictures, present, method, 0, recipe=TINY)
    assert first[:3] == again[:3]
    assert all(0 <= value <= 1 for value in first[:3])
    assert first.multi_label >= first.single_label
    assert first.seconds_per_epoch > 0
    assert len(epochs) == TINY.epochs
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_scores_equal_hand_computed_accuracies():
    logits = torch.zeros(3, len(CLASSES))
    logits[0, [4, 2]] = torch.tensor([2.0, 1.0])  # main object first, the other second
    logits[1, [5, 4]] = torch.tensor([2.0, 1.0])  # another object first, main object second
    logits[2, 9] = 1.0  # no object
    present = {"a": [4, 2], "b": [4, 5], "c": [1]}
    score = _score(logits, [("a", 4), ("b", 4), ("c", 1)], present, 0.5)
    assert score == Score(pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 0.5)
