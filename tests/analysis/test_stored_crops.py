"""Measures of stored crops against a reference in plain loops on their labels."""

import csv
import io
import math

import numpy as np
import pytest

import relabel_datasets as rd
from relabel_datasets.analysis import analyze, measure_images, measure_maps, read_boxes, suspects
from relabel_datasets.analysis import label_maps as module
from relabel_datasets.demo.scenes import CLASSES, draw_scenes
from relabel_datasets.labels import crop_labels as crop_labels_module
from relabel_datasets.labels import windows
from relabel_datasets.report import draw_pictures
from relabel_datasets.shards.tars import ShardReader
from tests.analysis.conftest import RandomNet
from tests.analysis.references import entropy, iou

NUM_IMAGES, NUM_CROPS = 12, 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with `train`, 12 scenes, and `train-boxes.csv`."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_scenes(folder, "train", NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def boxes(pictures):
    return pictures / "train-boxes.csv"


@pytest.fixture(scope="module")
def dataset(pictures, tmp_path_factory):
    """A dataset with a config of stored crops, and one of label maps of two sizes."""
    out = tmp_path_factory.mktemp("crops") / "data"
    sizes = {"random": (80, 112), "small": (48, 64)}
    annotators = [rd.ModuleAnnotator(RandomNet(), size, classes=CLASSES, name=name) for name, size in sizes.items()]
    for annotator, options in (
        (annotators[0], {"encoding": "crops", "num_crops": NUM_CROPS}),
        (rd.Ensemble(annotators), {"encoding": "multiscale"}),
    ):
        build_config = rd.annotate.BuildConfig(**options)
        source = rd.data.ImageFolderSource(pictures / "train")
        rd.build(source, out, annotator, config=options["encoding"], build_config=build_config, progress=False)
    return out


@pytest.fixture(scope="module")
def crop_labels(dataset):
    return rd.LabelMaps(dataset, "crops")


@pytest.fixture(scope="module")
def both(dataset, boxes):
    return analyze(dataset, "crops", boxes=boxes, num_crops=NUM_IMAGES * 4, progress=False)


def _shown(softs):
    """Return the classes that at least one crop in twenty shows."""
    counts = [sum(soft[index] >= 0.5 for soft in softs) for index in range(len(CLASSES))]
    return {index for index, count in enumerate(counts) if count >= max(1, len(softs) / 20)}


def test_measures_of_images_equal_a_reference_in_plain_loops(crop_labels, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_IMAGES", 5)
    images = measure_images(crop_labels, range(len(crop_labels)), progress=False)
    assert images["key"].tolist() == list(crop_labels)
    for i, labels in enumerate(crop_labels.values()):
        softs = labels.soft_labels().double().tolist()
        mean = [sum(column) / NUM_CROPS for column in zip(*softs, strict=True)]
        p_label = mean[labels.label]
        image = {name: column[i] for name, column in images.items()}
        assert (image["label"], image["best"]) == (labels.label, mean.index(max(mean)))
        assert image["num_shown"] == len(_shown(softs))
        assert image["margin"] == pytest.approx(math.log(p_label / (1 - p_label)), abs=1e-4)
        assert image["p_best"] == pytest.approx(max(mean), abs=1e-5)
        assert image["p_label"] == pytest.approx(p_label, abs=1e-5)
        assert image["entropy"] == pytest.approx(entropy(mean), abs=1e-4)
    assert len(set(images["num_shown"].tolist())) > 1  # otherwise the comparison would be trivial


@pytest.mark.parametrize(("num_crops", "measured"), [(1, 1), (NUM_IMAGES * 4, 4), (100_000, NUM_CROPS)])
def test_the_first_crops_of_each_image_are_measured(crop_labels, boxes, num_crops, measured):
    objects = read_boxes(boxes)
    measures = measure_maps(crop_labels, objects=objects, num_crops=num_crops, progress=False)
    assert measures.objects.localization == {}
    assert np.bincount(measures.crops["image"]).tolist() == [measured] * NUM_IMAGES
    crops = [(labels, crop) for labels in crop_labels.values() for crop in range(measured)]
    for i, (labels, crop) in enumerate(crops):
        soft = labels.soft_labels([crop])[0].tolist()
        row = {name: column[i] for name, column in measures.objects.crops.items()}
        assert all(row[name] == column[i] for name, column in measures.crops.items())
        assert row["confidence"] == pytest.approx(max(soft))
        assert (row["best"], row["agrees"]) == (soft.index(max(soft)), soft.index(max(soft)) == labels.label)
        assert row["entropy"] == pytest.approx(entropy(soft), abs=1e-4)
        assert row["num_classes"] == sum(p >= 0.1 for p in soft)
        own = objects[labels.key.rpartition("/")[2]].of_class(CLASSES[labels.label])
        assert row["best_iou"] == pytest.approx(max(iou(labels.boxes_xyxy[crop].tolist(), box) for box in own))


def test_stored_crops_are_analyzed_as_label_maps_are_but_for_localization(dataset, boxes, both):
    maps = analyze(dataset, "multiscale", boxes=boxes, num_crops=NUM_IMAGES * 4, progress=False)
    assert list(both.summary) == ["crops and objects", "stored crops", "stored crops and objects"]
    assert set(both.tables) == set(maps.tables)
    for name, table in both.tables.items():
        assert table.columns == maps.tables[name].columns
    of_maps, of_crops = maps.summary["label maps and objects"], both.summary["stored crops and objects"]
    missing = {name for name in of_maps if name not in of_crops}
    assert missing == {"pointing game, share", "localised, mean of these, share"} | {
        f"localised at IoU {level}, share" for level in (0.3, 0.5, 0.7)
    }
    assert of_crops["localization"] == "needs label maps"
    assert of_crops["crops"] == NUM_IMAGES * 4
    numbers = both.summary["stored crops"]
    statistics = rd.LabelMaps(dataset, "crops").split
    assert numbers["images that agree with their label, share"] == pytest.approx(statistics.agreement)
    assert numbers["crops of the same best class as annotated, share"] > 0.9


def test_suspects_of_stored_crops_are_listed_with_their_suggestion(crop_labels, both):
    images = measure_images(crop_labels, range(len(crop_labels)), progress=False)
    rows = list(csv.DictReader(io.StringIO(both.tables["suspects"].to_csv())))
    assert len(rows) == both.summary["stored crops"]["images with a suspect label"] > 2
    expected = sorted(
        (margin, key, CLASSES[label], CLASSES[best])
        for key, label, best, margin in zip(*(images[name] for name in ("key", "label", "best", "margin")), strict=True)
        if label != best and margin < 0
    )
    assert [(row["key"], row["label"], row["suggestion"]) for row in rows] == [row[1:] for row in expected]


def test_the_text_defines_the_measures_of_stored_crops(both):
    text = " ".join(str(both).split())
    for definition in (windows.CROPS_DEFINITION, suspects.CROPS_DEFINITION):
        assert definition in text
    assert windows.DEFINITION not in text


def test_the_fidelity_of_stored_crops_is_compared_with_that_of_label_maps(dataset, both):
    rows = both.tables["fidelity"].rows
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("crops", "6x12", "crops"),
        ("multiscale", "5x7x12+3x4x12", "multiscale"),
    ]


@pytest.mark.parametrize("config", ["crops", "multiscale"])
@pytest.mark.parametrize(
    ("every", "num_samples", "measured", "with_objects"),
    [(1, None, range(12), range(12)), (3, None, range(12), [0, 3, 6, 9]), (3, 2, [0, 11], [0, 9])],
)
def test_a_sample_is_read_once_and_its_crops_are_decompressed_once(
    dataset, boxes, monkeypatch, config, every, num_samples, measured, with_objects
):
    label_maps, all_objects, calls = rd.LabelMaps(dataset, config), read_boxes(boxes), {"read": [], "decompress": []}
    keys = list(label_maps)
    objects = {key.rpartition("/")[2]: all_objects[key.rpartition("/")[2]] for key in keys[::every]}
    read, decompress = ShardReader.read, crop_labels_module.decompress_labels
    monkeypatch.setattr(
        ShardReader, "read", lambda self, row, *args: calls["read"].append(row) or read(self, row, *args)
    )
    monkeypatch.setattr(
        crop_labels_module, "decompress_labels", lambda *given: calls["decompress"].append(given) or decompress(*given)
    )
    measures = measure_maps(label_maps, objects=objects, num_crops=24, num_samples=num_samples, progress=False)
    assert measures.images["key"].tolist() == [keys[row] for row in measured]
    assert measures.objects.keys == [keys[row] for row in with_objects]
    per_image = min(24 // len(with_objects), NUM_CROPS if config == "crops" else 24)
    assert np.bincount(measures.objects.crops["image"]).tolist() == [per_image] * len(with_objects)
    assert sorted(calls["read"]) == sorted({*measured, *with_objects})
    assert len(calls["decompress"]) == (len(calls["read"]) if config == "crops" else 0)


def test_num_samples_select_images(crop_labels):
    few = measure_maps(crop_labels, num_crops=9, num_samples=4, progress=False)
    assert few.images["key"].tolist() == [crop_labels.index.key(row) for row in (0, 4, 7, 11)]
    assert np.bincount(few.crops["image"]).tolist() == [3] * 4


def test_a_heatmap_of_stored_crops_is_an_error(dataset, tmp_path):
    crops = rd.load_dataset(dataset, "crops", split="train")
    with pytest.raises(rd.DatasetError, match="a heatmap needs label maps, but config 'crops' has stored crops"):
        draw_pictures(crops, tmp_path / "pictures", classes=["cat"])
    assert not list(tmp_path.iterdir())
