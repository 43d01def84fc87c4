import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.demo.students import train_demo_student
from relabel_datasets.train import load_checkpoint
from tests.demo.conftest import TINY


@pytest.fixture(scope="module")
def dataset(scenes_relabel):
    return rd.load_dataset(scenes_relabel, split="train")


def test_a_student_is_the_last_checkpoint_of_its_run_and_is_not_trained_twice(dataset, tmp_path):
    threads = torch.get_num_threads()
    student = train_demo_student(dataset, tmp_path, TINY)
    last = tmp_path / "last.pth.tar"
    saved, written = load_checkpoint(last)["state_dict"], last.stat().st_mtime_ns
    again = train_demo_student(dataset, tmp_path, TINY)
    assert last.stat().st_mtime_ns == written
    for classifier in (student, again):
        assert all(torch.equal(value, saved[name]) for name, value in classifier.model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_a_run_with_another_recipe_is_not_mixed_with_it(dataset, tmp_path):
    train_demo_student(dataset, tmp_path, TINY)
    with pytest.raises(ValueError, match=r"another recipe: epochs=1 in that run, 2 now"):
        train_demo_student(dataset, tmp_path, TINY.changed(epochs=2))
