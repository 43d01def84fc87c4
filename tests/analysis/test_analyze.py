import csv
import io
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.analysis.analyze import Analysis, Table, analyze
from relabel_datasets.analysis.boxes import read_boxes
from relabel_datasets.analysis.label_maps import measure_maps
from relabel_datasets.demo.scenes import CLASSES, read_objects
from relabel_datasets.labels.crops import random_resized_crops

TABLES_OF_MAPS = {"num_classes", "classes", "confused", "suspects", "fidelity"}


@pytest.fixture(scope="module")
def of_both(scenes, scene_boxes):
    return analyze(scenes / "dataset", "heatmaps", boxes=scene_boxes, num_crops=480, progress=False)


@pytest.fixture(scope="module")
def measures(scenes):
    return measure_maps(rd.LabelMaps(scenes / "dataset", "heatmaps"), num_crops=480, progress=False)


def _rows(analysis, name):
    table = analysis.tables[name]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_boxes_alone_are_enough(scene_boxes):
    found = analyze(boxes=scene_boxes, num_crops=1000, seed=4, progress=False)
    assert set(found.summary) == {"crops and objects"}
    assert set(found.tables) == {"overlap"}
    numbers = found.summary["crops and objects"]
    objects = read_objects(scene_boxes)
    assert (numbers["images with boxes"], numbers["boxes"]) == (48, sum(map(len, objects.values())))
    assert numbers["crops"] == 48 * 21
    for name in ("largest", "best", "union", "enclosing"):
        assert sum(row[name] for row in _rows(found, "overlap")) == 48 * 21
    assert numbers["share above IoU 0.5, largest"] <= numbers["share above IoU 0.5, best"]


def test_shares_above_a_half_are_those_of_painted_crops(scene_boxes):
    found = analyze(boxes=scene_boxes, num_crops=480, progress=False).summary["crops and objects"]
    with scene_boxes.open(newline="") as file:
        sizes = {row["image"]: (int(row["height"]), int(row["width"])) for row in csv.DictReader(file)}
    crops = random_resized_crops(np.repeat(list(sizes.values()), 10, 0), np.random.default_rng(0))
    above = Counter()
    for i, (key, objects) in enumerate(read_objects(scene_boxes).items()):
        height, width = sizes[key]
        boxes = [each.box_xyxy for each in objects]
        masks = {"each": [_painted(box, (height, width)) for box in boxes]}
        masks["union"] = [np.any(masks["each"], 0)]
        low, high = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
        masks["enclosing"] = [_painted((*low, *high), (height, width))]
        masks["largest"] = [max(masks["each"], key=np.sum)]
        for crop in crops[10 * i : 10 * i + 10]:
            crop = _painted((crop * (width, height, width, height)).round().astype(int), (height, width))
            for name, several in masks.items():
                above[name] += any((crop & mask).sum() > 0.5 * (crop | mask).sum() for mask in several)
    for name, count in above.items():
        assert found[f"share above IoU 0.5, {'best' if name == 'each' else name}"] == pytest.approx(count / 480)


def _painted(box, size):
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_a_dataset_alone_is_enough(scenes):
    found = rd.analyze(scenes / "dataset", "heatmaps", num_crops=48, progress=False)
    assert set(found.summary) == {"label maps"}
    assert set(found.tables) == TABLES_OF_MAPS
    assert rd.analyze(rd.open_folder(scenes / "dataset"), "heatmaps", num_crops=48, progress=False) == found


def test_both_give_all_and_the_same_as_each_alone(scenes, scene_boxes, of_both):
    alone = analyze(scenes / "dataset", "heatmaps", num_crops=480, progress=False)
    boxes = analyze(boxes=scene_boxes, num_crops=480, progress=False)
    assert of_both.summary["label maps"] == alone.summary["label maps"]
    assert of_both.summary["crops and objects"] == boxes.summary["crops and objects"]
    assert set(of_both.summary) == {"crops and objects", "label maps", "label maps and objects"}
    assert set(of_both.tables) == {*TABLES_OF_MAPS, "overlap", "by_overlap"}


def test_confidence_and_agreement_by_overlap(scenes, scene_boxes, of_both):
    label_maps = rd.LabelMaps(scenes / "dataset", "heatmaps")
    crops = measure_maps(label_maps, objects=read_boxes(scene_boxes), num_crops=480, progress=False).crops
    rows = _rows(of_both, "by_overlap")
    assert [row["iou_from"] for row in rows] == pytest.approx([i / 10 for i in range(10)])
    for row in rows:
        chosen = [
            i for i, iou in enumerate(crops["best_iou"].tolist())
            if row["iou_from"] <= iou < row["iou_to"] or (iou == 1 and row["iou_to"] == 1)
        ]  # fmt: skip
        assert row["crops"] == len(chosen)
        for name, column in (("confidence", "confidence"), ("agreement", "agrees")):
            expected = sum(float(crops[column][i]) for i in chosen) / len(chosen) if chosen else math.nan
            assert row[name] == pytest.approx(expected, nan_ok=True)
    assert sum(row["crops"] for row in rows) == 480
    numbers = of_both.summary["label maps and objects"]
    assert numbers["share above IoU 0.5, best"] == pytest.approx(np.mean(crops["best_iou"] > 0.5))
    without = crops["confidence"][crops["best_iou"] == 0]
    assert numbers["confidence without overlap"] == pytest.approx(without.mean())
    levels = [numbers[f"localised at IoU {level}, share"] for level in (0.3, 0.5, 0.7)]
    assert levels == sorted(levels, reverse=True)
    assert numbers["localised, mean of these, share"] == pytest.approx(np.mean(levels))


def test_tables_of_label_maps_are_those_of_plain_loops(of_both, measures):
    images, crops = measures.images, measures.crops
    for row in _rows(of_both, "classes"):
        chosen = [i for i in range(48) if CLASSES[images["label"][i]] == row["class"]]
        assert row["images"] == len(chosen) == 4
        assert row["agreement"] == sum(images["best"][i] == images["label"][i] for i in chosen) / 4
        for name in ("p_label", "entropy", "num_confident"):
            assert row[name] == pytest.approx(sum(float(images[name][i]) for i in chosen) / 4)
    pairs = Counter((CLASSES[a], CLASSES[b]) for a, b in zip(images["label"], images["best"], strict=True) if a != b)
    confused = of_both.tables["confused"].rows
    assert Counter({(label, best): count for label, best, count in confused}) == pairs
    assert [row[2] for row in confused] == sorted((row[2] for row in confused), reverse=True)
    suspects = _rows(of_both, "suspects")
    assert {row["key"] for row in suspects} == {
        key for key, a, b in zip(images["key"], images["label"], images["best"], strict=True) if a != b
    }
    odds = [row["p_best"] / row["p_label"] for row in suspects]
    assert odds == sorted(odds, reverse=True)
    for row in _rows(of_both, "num_classes"):
        assert row["images_confident_0.5"] == pytest.approx(np.mean(images["num_confident"] == row["classes"]))
        assert row["crops_share_0.1"] == pytest.approx(np.mean(crops["num_classes"] == row["classes"]))
    numbers = of_both.summary["label maps"]
    assert numbers["images that agree with their label, share"] == pytest.approx(1 - len(suspects) / 48)
    assert numbers["classes a crop"] == pytest.approx(np.mean(crops["num_classes"]))


def test_fidelity_compares_the_encodings_of_all_configs(scenes, of_both):
    rows = _rows(of_both, "fidelity")
    assert [(row["config"], row["split"], row["encoding"], row["k"], row["dtype"]) for row in rows] == [
        ("heatmaps", "train", "heatmaps", 5, "float16"),
        ("topk", "train", "topk", 5, "float16"),
    ]
    assert {row["map"] for row in rows} == {"5x7x12"}
    assert rows[0]["kl"] < rows[1]["kl"]
    assert of_both.summary["label maps"]["KL of dense from stored labels, nats"] == rows[0]["kl"]
    config = analyze(scenes / "dataset" / "topk", num_crops=1, progress=False)  # the folder of a config knows no other
    assert [row["config"] for row in _rows(config, "fidelity")] == ["topk"]


def test_all_of_it_as_json_and_the_tables_as_csv(of_both):
    read = json.loads(of_both.to_json())
    assert read["summary"].keys() == of_both.summary.keys()
    for name, table in of_both.tables.items():
        rows = list(csv.DictReader(io.StringIO(table.to_csv())))
        assert len(rows) == len(read["tables"][name]) == len(table.rows)
        for row, same in zip(rows, read["tables"][name], strict=True):
            assert {key: "" if value is None else str(value) for key, value in same.items()} == row


def test_what_is_not_a_number_is_empty_in_csv_and_null_in_json():
    table = Table(("name", "value"), [("a, b", math.nan), ('"', 0.12345678)])
    assert table.to_csv() == 'name,value\n"a, b",\n"""",0.123457\n'
    found = Analysis({"topic": {"share": math.nan, "count": 3}}, {"table": table})
    assert json.loads(found.to_json())["summary"] == {"topic": {"share": None, "count": 3}}
    assert json.loads(found.to_json())["tables"]["table"][0] == {"name": "a, b", "value": None}


def test_as_text_each_number_is_on_a_line_of_its_topic(of_both):
    lines = str(of_both).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(of_both.summary)
    assert len(lines) == sum(1 + len(numbers) for numbers in of_both.summary.values())
    share = of_both.summary["label maps"]["images that agree with their label, share"]
    assert any("agree with their label" in line and f"{share:.1%}" in line for line in lines)


def test_maps_that_all_agree_have_no_suspects(tmp_path, image_folder):
    class Perfect(torch.nn.Module):
        def forward(self, images):
            return torch.stack([images.new_full((len(images), 2, 3), value) for value in (9.0, 1.0, 0.0)], 1)

    annotator = rd.ModuleAnnotator(Perfect(), (32, 48), classes=("cat", "dog", "emu"), name="perfect")
    for name in ("dog", "emu"):
        for path in (image_folder / name).iterdir():
            path.rename(image_folder / "cat" / path.name)
        (image_folder / name).rmdir()
    rd.build(rd.ImageFolderSource(image_folder), tmp_path / "data", annotator, all_classes=True, progress=False)
    found = analyze(tmp_path / "data", num_crops=1, progress=False)
    assert found.summary["label maps"]["images that agree with their label, share"] == 1
    assert found.tables["suspects"].rows == found.tables["confused"].rows == []
    assert [row["images"] for row in _rows(found, "classes")] == [13, 0, 0]
    assert found.tables["classes"].to_csv().splitlines()[2] == "dog,0,,,,"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing to analyse: give a dataset, boxes, or both"),
        ({"boxes": "/nowhere.csv"}, FileNotFoundError, "no boxes at /nowhere.csv"),
        ({"dataset": "/nowhere"}, FileNotFoundError, "no dataset at /nowhere"),
        ({"dataset": "{root}"}, ValueError, "has several configs, name one of"),
        ({"dataset": "{root}", "name": "topk", "split": "test"}, ValueError, "has no split 'test'"),
        (
            {"dataset": "{root}", "name": "topk", "num_crops": 0},
            ValueError,
            "num_crops and num_samples must be at least 1",
        ),
        ({"dataset": "{root}", "name": "topk", "num_samples": 0}, ValueError, "got 100000 and 0"),
    ],
)
def test_what_cannot_be_analysed_is_told_of(scenes, arguments, error, message):
    arguments = {key: str(scenes / "dataset") if value == "{root}" else value for key, value in arguments.items()}
    with pytest.raises(error, match=message):
        analyze(**arguments, progress=False)


def test_crops_of_imagenets_validation_images(real_data):
    table = real_data / "imagenet-val-boxes.csv"
    if not table.is_file():
        pytest.skip("the boxes of ImageNet's validation images are not at hand")
    found = analyze(boxes=table, progress=False).summary["crops and objects"]
    assert (found["images with boxes"], found["boxes"], found["crops"]) == (50_000, 80_477, 100_000)
    # Counted independently: 25.4, 26.0 and 29.5 %; of so many crops, one share scatters by 0.14 points.
    assert found["share above IoU 0.5, largest"] == pytest.approx(0.254, abs=0.005)
    assert found["share above IoU 0.5, best"] == pytest.approx(0.260, abs=0.005)
    assert found["share above IoU 0.5, enclosing"] == pytest.approx(0.295, abs=0.005)
    assert found["share above IoU 0.5, best"] < found["share above IoU 0.5, union"] < 0.28
