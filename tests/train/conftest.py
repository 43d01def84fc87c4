"""Fixtures: scenes with label maps, and a student that is small enough to train in a test."""

import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.demo.dataset import make_scenes_relabel
from relabel_datasets.demo.scenes import CLASSES
from relabel_datasets.train.recipe import Recipe, RuntimeConfig
from tests.train.tiny import TINY

CPU = RuntimeConfig(device="cpu", num_workers=0, log_every=1, save_every=0, progress=False)


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, as in the subprocesses of tests, because the number of threads changes the rounding of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Folder of a dataset with 48 and 24 images."""
    root = tmp_path_factory.mktemp("train") / "scenes-relabel"
    count = 2 * len(CLASSES)
    make_scenes_relabel(root, num_train=2 * count, num_validation=count)
    return root


@pytest.fixture
def fit(scenes, tmp_path):
    """Function that trains the tiny student on the scenes with changed values of the recipe and the runtime configuration."""

    def run(out="run", *, runtime=CPU, validation=True, annotator=None, **values):
        sets = [rd.load_dataset(scenes, split=split) for split in ("train", "validation")]
        return rd.train.train_student(
            sets[0],
            tmp_path / out,
            TINY.changed(**values),
            validation=sets[1] if validation else None,
            annotator=annotator,
            runtime=runtime,
        )

    return run


@pytest.fixture
def cpu() -> RuntimeConfig:
    return CPU


@pytest.fixture
def tiny() -> Recipe:
    return TINY
