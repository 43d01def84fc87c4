import pytest

from relabel_datasets.demo.dataset import make_scenes_relabel
from relabel_datasets.demo.scenes import CLASSES
from relabel_datasets.demo.students import RECIPE

TINY = RECIPE.changed(epochs=1, warmup_epochs=0, batch_size=8, image_size=32, eval_size=32)


@pytest.fixture(scope="session")
def scenes_relabel(tmp_path_factory):
    """The scenes dataset with few pictures."""
    root = tmp_path_factory.mktemp("demo") / "scenes-relabel"
    make_scenes_relabel(root, num_train=2 * len(CLASSES), num_validation=4 * len(CLASSES))
    return root
