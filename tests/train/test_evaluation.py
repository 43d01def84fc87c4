"""Metrics of classifiers on folders, tars, Hugging Face datasets and our datasets, with classes matched by name."""

import csv
import json
import tarfile

import datasets
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import save_file

import relabel_datasets as rd
from relabel_datasets.analysis.boxes import read_boxes
from relabel_datasets.cli import main
from relabel_datasets.demo.scenes import CLASSES
from relabel_datasets.train.classifier import Classifier, Normalize
from relabel_datasets.train.evaluation import SourceImages, open_images
from tests.train.tiny import MODEL_ARGS

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class MeanColor(torch.nn.Module):
    """Return logits of red, green, blue, and a fourth class that exceeds all except bright red."""

    def forward(self, images):
        mean = images.mean((2, 3))
        colors = mean * torch.tensor([4.0, 1.0, 1.0]) + torch.tensor([0.0, 0.0, 0.1])  # all differ
        return torch.cat([colors, torch.full((len(images), 1), 2.0)], 1)


def classifier(classes=("red", "green", "blue", "white")):
    normalize = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu"))
    return Classifier(MeanColor(), 4, classes, (8, 12), 1.0, "bilinear", normalize)


@pytest.fixture
def folder(tmp_path):
    """Two images per color, one blue image in the wrong folder. The order of the classes differs from that of the model."""
    for name in ("blue", "green", "red"):
        for number in range(2):
            color = "blue" if (name, number) == ("green", 1) else name
            path = tmp_path / "images" / name / f"{name}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (16, 16), COLORS[color]).save(path)
    return tmp_path / "images"


@pytest.fixture
def boxes(tmp_path):
    """All images contain green. The red ones also contain red, and a cat, which is not a class of the model."""
    path = tmp_path / "boxes.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "width", "height", "class", "x1", "y1", "x2", "y2"])
        for name in COLORS:
            for number in range(2):
                for label in ("green", *(["red", "cat"] if name == "red" else [])):
                    table.writerow([f"{name}_{number}.png", 16, 16, label, 0, 0, 8, 8])
    return path


def test_all_classes_of_the_model_compete_by_default(folder):
    assert rd.train.evaluate(classifier(), folder)["top1"] == pytest.approx(2 / 6)  # white exceeds green and blue
    assert rd.train.evaluate(classifier(), folder, among=True)["top1"] == pytest.approx(5 / 6)


def test_objects_are_matched_by_name_and_unknown_classes_are_ignored(folder, boxes):
    found = rd.train.evaluate(classifier(), folder, boxes=boxes, among=True)
    assert found["multi_label"] == pytest.approx(3 / 6)  # both red images and the green image
    assert found["set_recall"] == pytest.approx((1 + 2 * 0.5) / 6)  # the green image; of the red images only red
    assert 0 < found["map"] <= 1
    assert rd.train.evaluate(classifier(), folder, boxes=read_boxes(boxes), among=True) == found


def test_boxes_from_coco_json_equal_those_from_a_table(folder, boxes, tmp_path, caplog):
    reference = rd.train.evaluate(classifier(), folder, boxes=boxes, among=True)
    assert "1 of 3 object classes match none of the 3 classes, such as 'blue': 'cat'; objects of these" in caplog.text
    names = [f"{name}_{number}.png" for name in COLORS for number in range(2)]
    content = {
        "images": [{"id": i, "file_name": f"val/{name}", "width": 16, "height": 16} for i, name in enumerate(names)],
        "categories": [
            {"id": i, "name": name} for i, name in enumerate(("Green", "red", "cat"))
        ],  # matched in any case
        "annotations": [
            {"image_id": i, "category_id": category, "bbox": [0, 0, 8, 8], "iscrowd": 0}
            for i, name in enumerate(names)
            for category in ([0, 1, 2] if name.startswith("red") else [0])
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    assert rd.train.evaluate(classifier(), folder, boxes=path, among=True) == reference
    content["images"] = [
        {**image, "file_name": f"{image['id']}.png", "id": names[image["id"]][:-4]} for image in content["images"]
    ]
    content["annotations"] = [{**item, "image_id": names[item["image_id"]][:-4]} for item in content["annotations"]]
    path.write_text(json.dumps(content))
    assert rd.train.evaluate(classifier(), folder, boxes=path, among=True) == reference  # by id
    content["categories"] = [{"id": i, "name": f"other {i}"} for i in range(3)]
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="none of the 3 object classes, such as 'other 0', is one of the 4 classes, such"
    ):
        rd.train.evaluate(classifier(), folder, boxes=path)


def test_batches_and_workers_do_not_matter(folder, boxes):
    model = classifier()
    model.model.train()
    reference = rd.train.evaluate(model, folder, boxes=boxes)
    assert model.model.training
    for batch_size, num_workers in ((1, 0), (4, 1)):
        again = rd.train.evaluate(model, folder, boxes=boxes, batch_size=batch_size, num_workers=num_workers)
        assert again == pytest.approx(reference)


def test_the_same_images_in_any_container_give_the_same(folder, tmp_path):
    reference = rd.train.evaluate(classifier(), folder, among=True)
    names = ["red", "green", "blue"]
    files = sorted(folder.rglob("*.png"))
    rows = {"image": [str(path) for path in files], "label": [names.index(path.parent.name) for path in files]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    assert rd.train.evaluate(classifier(), tmp_path / "saved", among=True) == pytest.approx(reference)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in files:
            (path.with_suffix(".cls")).write_text(str(names.index(path.parent.name)))
            for member in (path, path.with_suffix(".cls")):
                tar.add(member, member.name)
    found = rd.train.evaluate(classifier(), tmp_path / "images.tar")  # indices without names are the model's
    assert found["top1"] == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="have no names"):
        rd.train.evaluate(classifier(), tmp_path / "images.tar", among=True)


def test_real_labels_are_used_for_names_of_imagenet_validation_images(tmp_path):
    for number, synset in ((2, "n04228054"), (4, "n04263257")):  # ReaL also lists n09193705 for the first
        path = tmp_path / "val" / synset / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True)
        PIL.Image.new("RGB", (16, 16), (255, 0, 0)).save(path)
    names = ("n09193705", "n04228054", "n02105855", "n04263257")
    found = rd.train.evaluate(classifier(names), tmp_path / "val")  # predicts the first class for both
    assert found["top1"] == 0
    assert found["real"] == 0.5


@pytest.mark.parametrize(
    ("classes", "message"),
    [(("red", "green", "violet", "white"), "blue"), (None, "4 classes have no names, so 3 of the dataset's 3")],
)
def test_a_model_without_the_classes_is_an_error(folder, classes, message):
    with pytest.raises(ValueError, match=message):
        rd.train.evaluate(classifier(classes), folder)


def test_boxes_of_other_images_are_an_error(folder, boxes):
    boxes.write_text(boxes.read_text().replace("_0.png", "_x.png").replace("_1.png", "_y.png"))
    with pytest.raises(ValueError, match=r"none of the 6 images .*, matches any of the 6 images with boxes"):
        rd.train.evaluate(classifier(), folder, boxes=boxes)


def test_class_indices_beyond_those_of_the_model_are_an_error(folder):
    images = SourceImages(rd.data.open_source(folder))
    images.classes, images.targets = None, [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"class indices 0 to 5, but the model has 4 classes"):
        rd.train.evaluate(classifier(), images)


def test_the_content_of_a_path_decides_how_images_are_opened(scenes, folder):
    assert isinstance(open_images(scenes), rd.RelabelDataset)
    assert isinstance(open_images(folder), SourceImages)
    with pytest.raises(FileNotFoundError, match="no dataset at"):
        open_images(folder / "nothing")


def test_the_command_prints_the_metrics_of_the_run(scenes, fit, tmp_path, capsys):
    trained = fit(eval_size=40)
    pictures = scenes / "pictures"
    out = tmp_path / "metrics.json"
    command = ["evaluate", str(trained.folder / "last.pth.tar"), "--device", "cpu", "--num-workers", "0"]
    assert (
        main(
            [
                *command,
                str(pictures / "validation"),
                "--json",
                str(out),
                "--boxes",
                str(pictures / "validation-boxes.csv"),
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert {name: found[name] for name in trained.metrics} == pytest.approx(dict(trained.metrics))
    assert found["multi_label"] >= found["top1"]
    printed = capsys.readouterr().out
    for text in ("| top-1 accuracy | ", "| mean average precision | ", "| expected calibration error | "):
        assert text in printed
    assert f"{found['set_recall']:.1%}" in printed
    assert main([*command, str(scenes), "--split", "validation"]) == 0
    assert f"| top-1 accuracy | {found['top1']:.1%} |" in capsys.readouterr().out


def test_a_timm_model_by_name_with_a_checkpoint(scenes, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=len(CLASSES), **MODEL_ARGS)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    model_kwargs = [f"{key}={value}" for key, value in {**MODEL_ARGS, "num_classes": len(CLASSES)}.items()]
    options = ["--checkpoint", str(tmp_path / "weights.safetensors"), "--model-kwargs", *model_kwargs,
               "--image-size", "32", "--crop-pct", "1", "--device", "cpu", "--num-workers", "0"]  # fmt: skip
    assert main(["evaluate", "resnet10t", str(scenes), *options]) == 0
    whole = rd.RelabelDataset(scenes, split="validation")
    right = 0
    transform = timm.data.create_transform(32, crop_pct=1.0, interpolation=model.default_cfg["interpolation"])
    with torch.inference_mode():
        for row in range(len(whole)):
            right += int(model.eval()(transform(whole.image(row))[None]).argmax()) == int(whole.targets[row])
    assert f"| top-1 accuracy | {right / len(whole):.1%} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth.tar", "{scenes}"], "no checkpoint at none.pth.tar"),
        (["resnet10x", "{scenes}"], "timm has no model 'resnet10x'"),
        (["resnet10t", "/nowhere"], "no dataset at /nowhere"),
        (["resnet10t", "{scenes}", "--checkpoint", "none.safetensors"], "no checkpoint 'none.safetensors'"),
        (["none.pth.tar", "{scenes}", "--pretrained"], "leave out --pretrained, --checkpoint and --model-kwargs"),
    ],
)
def test_an_error_is_one_line(scenes, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *(argument.format(scenes=scenes) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err
