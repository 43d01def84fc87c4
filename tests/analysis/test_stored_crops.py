"""What needs label maps says so for a config of stored crops."""

import pytest

import relabel_datasets as rd
from relabel_datasets.analysis import analyze, measure_images, measure_maps
from relabel_datasets.annotate import BuildConfig
from relabel_datasets.report import draw_pictures, write_report
from tests.conftest import colours


@pytest.fixture(scope="module")
def folder(made_once, tmp_path_factory):
    """A dataset with a config of stored crops and one of label maps."""
    out = tmp_path_factory.mktemp("crops") / "data"
    source = rd.data.ImageFolderSource(made_once / "images")
    crops = BuildConfig(encoding="crops", num_crops=4)
    rd.build(source, out, colours(), config="crops", build_config=crops, progress=False)
    rd.build(source, out, colours(), config="maps", progress=False)
    return out


CALLS = {
    "analyze": lambda dataset, folder, out: analyze(folder, "crops", progress=False),
    "measure_maps": lambda dataset, folder, out: measure_maps(dataset.label_maps, progress=False),
    "measure_images": lambda dataset, folder, out: measure_images(dataset.label_maps, [0], progress=False),
    "a heatmap": lambda dataset, folder, out: draw_pictures(dataset, out / "pictures", classes=["cat"]),
    "boxes=": lambda dataset, folder, out: write_report(folder, out / "report.html", "crops", boxes=folder),
}


@pytest.mark.parametrize("purpose", CALLS)
def test_label_maps_are_asked_for(folder, tmp_path, purpose):
    dataset = rd.load_dataset(folder, "crops", split="train")
    with pytest.raises(rd.DatasetError, match=f"{purpose} needs label maps, but config 'crops' has stored crops"):
        CALLS[purpose](dataset, folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fidelity_of_stored_crops_is_compared_with_that_of_label_maps(folder):
    rows = analyze(folder, "maps", num_crops=20, progress=False).tables["fidelity"].rows
    assert [(row[0], row[2], row[3]) for row in rows] == [("crops", "4x3", "crops"), ("maps", "6x8x3", "heatmaps")]
