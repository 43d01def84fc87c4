"""Measures of scenes against a reference in plain loops that uses torchvision's roi_align on dense maps."""

import csv
import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

import relabel_datasets as rd
from relabel_datasets.analysis import batches
from relabel_datasets.analysis import label_maps as module
from relabel_datasets.analysis.boxes import Objects, read_boxes
from relabel_datasets.analysis.label_maps import MapMeasures, measure_images, measure_maps
from relabel_datasets.demo.scenes import CLASSES
from tests.analysis.conftest import ENCODINGS
from tests.analysis.references import entropy, iou

NUM_CROPS = 48 * 5


def _measure(label_maps, objects, num_crops):
    """Return measures in small batches, and the boxes of the crops that each generator has drawn."""
    crops = {}

    def record_crops(sizes, generator):
        crops.setdefault(generator, []).append(random_resized_crops(sizes, generator))
        return crops[generator][-1]

    random_resized_crops = batches.random_resized_crops
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "random_resized_crops", record_crops)
        patch.setattr(batches, "BATCH_CROPS", 37)
        patch.setattr(module, "BATCH_CROPS", 37)
        measures = measure_maps(label_maps, objects=objects, num_crops=num_crops, progress=False)
    return measures, list(map(np.concatenate, crops.values()))


@pytest.fixture(scope="module", params=ENCODINGS)
def measured(request, scenes, scene_boxes):
    """Label maps, their measures in small batches, and the boxes of the crops."""
    label_maps = rd.LabelMaps(scenes / "dataset", request.param)
    measures, (crops,) = _measure(label_maps, read_boxes(scene_boxes), NUM_CROPS)
    return label_maps, measures, crops


@pytest.fixture(scope="module")
def rows(scene_boxes):
    """Rows of the CSV table of objects, by picture."""
    rows = {}
    with scene_boxes.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["image"], []).append(row)
    return rows


def _pooled(dense, box):
    """Return the label of one box in the unit square, pooled by torchvision."""
    _, height, width = dense.shape
    scaled = torch.tensor([[0, box[0] * width, box[1] * height, box[2] * width, box[3] * height]], dtype=torch.float32)
    return roi_align(dense[None], scaled, 1, aligned=True)[0, :, 0, 0].softmax(0).tolist()


WINDOWS = [
    [(x, y, x + side, y + side) for y in starts for x in starts]
    for side, starts in ((1, [0]), (0.7, [0, 0.3]), (0.4, [0, 0.15, 0.3, 0.45, 0.6]))
]


def _num_shown(windows):
    """Return the number of classes that the smallest windows show."""
    ranked = [sorted(soft, reverse=True) for soft in windows]
    leads = [math.log(first / second) for first, second, *_ in ranked]
    shown = [lead >= 0.15 * max(leads) and first >= 0.5 for lead, (first, *_) in zip(leads, ranked, strict=True)]
    return len({soft.index(max(soft)) for soft, is_shown in zip(windows, shown, strict=True) if is_shown})


def _margin(windows, label):
    """Return the log odds of the power mean of the label's probabilities."""
    means = [sum(soft[label] ** 0.3 for soft in scale) / len(scale) for scale in windows]
    support = (sum(means) / len(means)) ** (1 / 0.3)
    return math.log(support / (1 - support))


def _own_boxes(rows, name):
    """Return the boxes of the objects of the picture's class in pixels, and the picture's width and height."""
    boxes = [[float(row[side]) for side in ("x1", "y1", "x2", "y2")] for row in rows if row["class"] == name]
    return boxes, int(rows[0]["width"]), int(rows[0]["height"])


def test_measures_of_whole_images_equal_a_reference_in_plain_loops(measured):
    label_maps, measures, _ = measured
    assert measures.images["key"].tolist() == list(label_maps)
    for i, label_map in enumerate(label_maps.values()):
        label = _pooled(label_map.dense(), (0, 0, 1, 1))
        best = max(range(len(label)), key=label.__getitem__)
        windows = [[_pooled(label_map.dense(), box) for box in boxes] for boxes in WINDOWS]
        image = {name: column[i] for name, column in measures.images.items()}
        assert (image["label"], image["best"], image["num_shown"]) == (label_map.label, best, _num_shown(windows[-1]))
        assert image["margin"] == pytest.approx(_margin(windows, label_map.label), abs=1e-3)
        assert image["p_best"] == pytest.approx(label[best], abs=1e-5)
        assert image["p_label"] == pytest.approx(label[label_map.label], abs=1e-5)
        assert image["entropy"] == pytest.approx(entropy(label), abs=1e-4)
    assert len(set(measures.images["num_shown"].tolist())) > 2  # otherwise the comparison would be trivial


def test_measures_of_crops_equal_a_reference_in_plain_loops(measured, rows):
    label_maps, measures, crops = measured
    assert measures.objects.keys == measures.images["key"].tolist()
    for name, column in measures.crops.items():
        np.testing.assert_array_equal(measures.objects.crops[name], column)
    assert len(crops) == NUM_CROPS
    assert measures.crops["agrees"].any()
    _check_crops(label_maps, measures.objects, crops, rows)


def test_measures_of_few_images_with_objects_equal_a_reference_in_plain_loops(scenes, scene_boxes, rows):
    label_maps, objects = rd.LabelMaps(scenes / "dataset", "topk"), read_boxes(scene_boxes)
    few = {key: objects[key] for key in list(objects)[::5]}
    measures, (crops, own_crops) = _measure(label_maps, few, 48)
    without, (same_crops,) = _measure(label_maps, None, 48)
    np.testing.assert_array_equal(crops, same_crops)
    for columns, same in ((measures.images, without.images), (measures.crops, without.crops)):
        assert all(np.array_equal(column, same[name]) for name, column in columns.items())
    assert measures.objects.keys == [key for key in label_maps if key in few]
    assert len(measures.objects.localization["pointed"]) == len(few) == 10
    _check_crops(label_maps, measures.objects, own_crops, rows)


def _check_crops(label_maps, measures, crops, rows):
    assert np.bincount(measures.crops["image"]).tolist() == [5] * len(measures.keys)
    for i, crop in enumerate(crops.tolist()):
        label_map = label_maps[measures.keys[measures.crops["image"][i]]]
        label = _pooled(label_map.dense(), crop)
        boxes, width, height = _own_boxes(rows[label_map.key], CLASSES[label_map.label])
        pixels = [crop[0] * width, crop[1] * height, crop[2] * width, crop[3] * height]
        measured_crop = {name: column[i] for name, column in measures.crops.items()}
        assert measured_crop["confidence"] == pytest.approx(max(label), abs=1e-5)
        assert label[measured_crop["best"]] == pytest.approx(max(label), abs=1e-5)
        assert measured_crop["agrees"] == (measured_crop["best"] == label_map.label)
        assert measured_crop["entropy"] == pytest.approx(entropy(label), abs=1e-4)
        assert measured_crop["num_classes"] == sum(value >= 0.1 for value in label)
        assert measured_crop["best_iou"] == pytest.approx(max(iou(pixels, box) for box in boxes))


def test_localization_equals_a_reference_in_plain_loops(measured, rows):
    label_maps, measures, _ = measured
    for i, (key, label_map) in enumerate(label_maps.items()):
        boxes, width, height = _own_boxes(rows[key], CLASSES[label_map.label])
        heatmap = label_map.dense()[label_map.label].double().tolist()
        down, across = len(heatmap), len(heatmap[0])
        values = [value for line in heatmap for value in line]
        low, high = min(values), max(values)
        y, x = divmod(values.index(high), across)
        point = (x + 0.5) / across * width, (y + 0.5) / down * height
        pointed = any(x1 <= point[0] <= x2 and y1 <= point[1] <= y2 for x1, y1, x2, y2 in boxes)
        assert measures.objects.localization["pointed"][i] == (pointed and high > low), key
        for step in range(1, 21):
            above = [
                (x, y) for y in range(down) for x in range(across)
                if high > low and (heatmap[y][x] - low) / (high - low) >= step / 20 - 1e-9
            ]  # fmt: skip
            expected = 0.0
            if above:
                xs, ys = [x for x, _ in above], [y for _, y in above]
                enclosing = [
                    min(xs) / across * width, min(ys) / down * height,
                    (max(xs) + 1) / across * width, (max(ys) + 1) / down * height,
                ]  # fmt: skip
                expected = max(iou(enclosing, box) for box in boxes)
            assert measures.objects.localization["iou"][i, step - 1] == pytest.approx(expected), (key, step)
    assert 0 < measures.objects.localization["pointed"].mean() < 1


def test_a_heatmap_localizes_its_object():
    dense = torch.zeros(3, 4, 5)
    dense[1, 1:3, 2:4] = 9
    dense[1, 2, 3] = 10  # the maximum, at (0.7, 0.625)
    label_map = rd.LabelMap.from_logits(dense)
    boxes = np.array([[0.0, 0, 0.3, 0.3], [0.4, 0.25, 0.8, 0.75]])
    localized = batches.MapBatch([label_map], torch.tensor([1])).localize(np.array([0]), [boxes])
    assert localized["pointed"].tolist() == [True]
    assert localized["iou"].max() == pytest.approx(1)
    missed = batches.MapBatch([label_map], torch.tensor([1])).localize(np.array([0]), [boxes[:1]])
    assert missed["pointed"].tolist() == [False]
    for label in (0, 2):  # constant heatmaps localize nothing
        flat = batches.MapBatch([label_map], torch.tensor([label])).localize(np.array([0]), [boxes])
        assert flat["pointed"].tolist() == [False]
        assert not flat["iou"].any()


def test_num_crops_num_samples_and_seed_select_images_and_crops(scenes):
    label_maps = rd.LabelMaps(scenes / "dataset", "heatmaps")
    few = measure_maps(label_maps, num_crops=30, num_samples=7, progress=False)
    assert few.images["key"].tolist() == [label_maps.index.key(row) for row in (0, 8, 16, 24, 31, 39, 47)]
    assert np.bincount(few.crops["image"]).tolist() == [5] * 7  # rounded up
    assert few.objects is None
    again, other = (measure_maps(label_maps, num_crops=30, num_samples=7, seed=s, progress=False) for s in (0, 1))
    assert all(np.array_equal(again.crops[name], few.crops[name]) for name in few.crops)
    assert not np.array_equal(other.crops["confidence"], few.crops["confidence"])


def test_unknown_names_raise_an_error(scenes, scene_boxes):
    label_maps = rd.LabelMaps(scenes / "dataset", "topk")
    objects = read_boxes(scene_boxes)
    with pytest.raises(
        ValueError, match=r"none of the 48 images .*, such as 'train_.*', matches any of the 1 image with boxes"
    ):
        measure_maps(label_maps, objects={"other": objects["train_00000"]}, progress=False)


def test_samples_are_matched_by_image_name_and_repeated_names_raise_an_error(image_folder, annotator, tmp_path):
    for name, path in (("v1.0 %", "cat/photo_00.jpg"), ("photo_02", "dog/photo_01.jpg")):
        (image_folder / path).rename((image_folder / path).with_name(f"{name}.jpg"))
    rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "data", annotator, progress=False)
    label_maps = rd.LabelMaps(tmp_path / "data")
    box = Objects((40, 56), np.array([[0.0, 0, 1, 1]]))
    measures = measure_maps(label_maps, objects={"v1.0 %": box, "photo_03": box}, num_crops=1, progress=False)
    assert sorted(measures.objects.keys) == ["cat/photo_03", "cat/v1%2E0 %25"]
    with pytest.raises(ValueError, match=r"'.*/photo_02' and '.*/photo_02' have images of the same name 'photo_02'"):
        measure_maps(label_maps, objects={"photo_02": box}, progress=False)


def test_images_are_measured_by_row_and_in_any_batch(scenes, monkeypatch):
    label_maps = rd.LabelMaps(scenes / "dataset", "topk")
    expected = measure_maps(label_maps, num_crops=1, progress=False).images
    monkeypatch.setattr(module, "_BATCH_IMAGES", 5)
    rows = [40, 3, *range(20, 27)]
    images = measure_images(label_maps, rows, progress=False)
    for name, column in expected.items():
        assert images[name].tolist() == pytest.approx(column[rows].tolist()) if name != "key" else column[rows].tolist()


def test_columns_of_one_attribute_have_the_same_length(measured):
    _, measures, _ = measured
    assert isinstance(measures, MapMeasures)
    for columns, length in (
        (measures.images, 48),
        (measures.crops, NUM_CROPS),
        (measures.objects.crops, NUM_CROPS),
        (measures.objects.localization, 48),
    ):
        assert {len(column) for column in columns.values()} == {length}
