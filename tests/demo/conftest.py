import pytest

from relabel_datasets.demo.dataset import make_scenes_relabel
from relabel_datasets.demo.scenes import CLASSES


@pytest.fixture(scope="session")
def scenes_relabel(tmp_path_factory):
    """The scenes dataset with few pictures and a barely trained annotator."""
    root = tmp_path_factory.mktemp("demo") / "scenes-relabel"
    count = 2 * len(CLASSES)
    make_scenes_relabel(root, num_train=count, num_validation=count, num_clean=64, annotator_epochs=1)
    return root
