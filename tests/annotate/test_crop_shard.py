"""Builds of stored crops: the annotator answers each crop as an image of its own."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

import relabel_datasets as rd
from relabel_datasets.analysis import analyze
from relabel_datasets.annotate import BuildConfig, FlipAveraged, ModuleAnnotator
from relabel_datasets.annotate.annotator import classify
from relabel_datasets.annotate.class_subset import ClassSubset
from relabel_datasets.annotate.heads import DenseClassifier, Stream
from relabel_datasets.labels.reading import read_label
from relabel_datasets.labels.statistics import total
from relabel_datasets.shards.tars import ShardWriter
from tests.annotate.test_kill import tree_of

CLASSES = ("cat", "dog", "emu")


class Patches(nn.Module):
    """Classifier whose logits are not the mean of those of its locations."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 8, 8)
        self.head = nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 3 * torch.randn(parameter.shape, generator=generator)


def patches(input_size=(24, 32)):
    model = Patches()
    dense = DenseClassifier(
        model,
        "patches",
        model.body,
        lambda features: model.head(torch.tanh(features.mean((2, 3)))),
        lambda images, features: [Stream("NCHW", tuple(features.shape[2:]))],
    )
    return ModuleAnnotator(dense, input_size, classes=CLASSES, name="patches")


def config(**arguments):
    return BuildConfig(**{"encoding": "crops", "num_crops": 7, "batch_size": 4, "k": 3, **arguments})


def build(images, out, annotator, build_config=None, **arguments):
    source = rd.data.ImageFolderSource(images)
    return rd.build(source, out, annotator, build_config=build_config or config(), progress=False, **arguments)


def expected_logits(annotator, image, labels):
    """Return the logits of each crop, annotated alone."""
    rows = []
    for crop in range(labels.num_crops):
        part = image.crop(labels.pixel_box(crop))
        part = part.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if labels.flips[crop] else part
        rows.append(classify(annotator, annotator.preprocess(part)[None])[0])
    return torch.stack(rows)


def made_of(kind):
    if kind == "ensemble":
        return rd.Ensemble([FlipAveraged(patches()), patches((16, 24))])
    return {"classifier": patches, "subset": lambda: ClassSubset(patches(), [2, 0, 1], CLASSES)}[kind]()


@pytest.mark.parametrize("kind", ["classifier", "ensemble", "subset"])
def test_stored_labels_are_the_answers_of_the_classifier_to_each_crop(tmp_path, image_folder, kind):
    annotator = made_of(kind)
    manifest = build(image_folder, tmp_path / "out", annotator)
    assert manifest.encoding == {
        "name": "crops", "k": 3, "dtype": "compact", "num_crops": 7, "map_size": None,
    }  # fmt: skip
    dataset = rd.load_dataset(tmp_path / "out", split="train")
    assert len(dataset) == 13
    agreeing = 0
    for image, labels in (dataset[i] for i in range(13)):
        want = expected_logits(annotator, image, labels).softmax(1)
        torch.testing.assert_close(labels.soft_labels(), want, rtol=0, atol=0.02)
        agreeing += int(want.mean(0).argmax() == labels.label)
    assert manifest.splits["train"].agreement == pytest.approx(agreeing / 13, abs=1 / 13)
    assert rd.verify(tmp_path / "out", num_workers=0, progress=False).problems == []


def test_a_classifier_is_called_itself_not_as_a_map():
    annotator = patches()
    images = torch.stack([annotator.preprocess(PIL.Image.new("RGB", (9, 9), color)) for color in ("red", "blue")])
    images[0, :, :9] //= 3
    model, (mean, std) = Patches(), (torch.tensor(v)[:, None, None] for v in (annotator.mean, annotator.std))
    with torch.no_grad():
        own = model.head(torch.tanh(model.body((images / 255 - mean) / std).mean((2, 3))))
    torch.testing.assert_close(annotator.classify(images), own)
    assert not torch.allclose(annotator(images).mean((2, 3)), own, atol=0.01)
    with pytest.raises(ValueError, match="images must be uint8"):
        annotator.classify(images.float())


def test_an_annotator_without_a_classifier_answers_with_the_mean_over_its_map(annotator):
    class Plain:
        classes, num_classes = annotator.classes, 3
        preprocess, __call__, describe = annotator.preprocess, staticmethod(annotator), annotator.describe

    images = torch.randint(256, (2, 3, 48, 64), dtype=torch.uint8)
    torch.testing.assert_close(classify(Plain(), images), annotator(images).mean((2, 3)))


@pytest.mark.parametrize("changes", [{"num_threads": 1}, {"shard_size": 5}, {"batch_size": 3}])
def test_labels_and_statistics_do_not_depend_on_threads_shards_and_the_place_of_a_crop_in_its_batch(
    tmp_path, image_folder, changes
):
    build(image_folder, tmp_path / "one", patches())
    shard_size = {"shard_size": changes["shard_size"]} if "shard_size" in changes else {}
    more = {name: value for name, value in changes.items() if name != "shard_size"}
    build(image_folder, tmp_path / "two", patches(), config(**more), **shard_size)
    one, two = (rd.load_dataset(tmp_path / name, split="train").label_maps for name in ("one", "two"))
    for key in one:
        if "batch_size" in changes:  # rounding depends on the shape of a batch
            torch.testing.assert_close(one[key].soft_labels(), two[key].soft_labels(), rtol=0, atol=0.02)
        else:
            assert one[key].to_safetensors() == two[key].to_safetensors()
    numbers = analyze(tmp_path / "one", progress=False).summary["stored crops"]
    for label_maps in (one, two):
        statistics = total(label_maps.split.shard_statistics)
        assert statistics.several / 13 == numbers["images that show several classes, share"] > 0
        assert statistics.shown / 13 == pytest.approx(numbers["classes that an image shows"])


def test_crops_of_a_file_above_the_pixel_limit_are_those_of_its_full_size(tmp_path, monkeypatch):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(24, 31, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels).resize((499, 389))
    image.save(tmp_path / "images" / "cat" / "large.jpg", quality=95)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 60_000)  # decoded at half its size
    annotator = patches()
    build(tmp_path / "images", tmp_path / "out", annotator, all_classes=True)
    image, labels = rd.load_dataset(tmp_path / "out", split="train")[0]
    assert image.size == (250, 195)
    want = expected_logits(annotator, image, labels).softmax(1)
    torch.testing.assert_close(labels.soft_labels(), want, rtol=0, atol=0.02)


def test_damaged_images_are_skipped_and_counted(tmp_path, image_folder):
    (image_folder / "cat" / "photo_03.jpg").write_bytes(b"no image")
    manifest = build(image_folder, tmp_path / "out", patches())
    split = manifest.splits["train"]
    assert (split.num_samples, [entry["key"] for entry in split.skipped]) == (12, ["photo_03"])
    assert rd.verify(tmp_path / "out", num_workers=0, progress=False).problems == []


def test_a_large_image_is_cropped_at_full_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    (tmp_path / "images" / "cat").mkdir(parents=True)
    PIL.Image.fromarray(noise).resize((800, 600)).save(tmp_path / "images" / "cat" / "a.jpg")
    annotator = patches((8, 8))
    build(tmp_path / "images", tmp_path / "out", annotator, all_classes=True)
    image, labels = rd.load_dataset(tmp_path / "out", split="train")[0]
    want = expected_logits(annotator, image, labels).softmax(1)
    torch.testing.assert_close(labels.soft_labels(), want, rtol=0, atol=0.02)


def test_the_number_of_forward_passes_is_printed_before_the_first(tmp_path, image_folder, capsys):
    class Announced(Exception):
        pass

    class Stops(ModuleAnnotator):
        def classify(self, images):
            raise Announced(capsys.readouterr().err)

    annotator = Stops(nn.AvgPool2d(8), (48, 64), classes=CLASSES)
    with pytest.raises(Announced, match="91 annotator forward passes: 7 crops of 13 images, in batches of 4\n"):
        rd.build(rd.data.ImageFolderSource(image_folder), tmp_path / "out", annotator, build_config=config())


def test_a_rerun_repairs_a_shard_and_refuses_another_number_of_crops(tmp_path, image_folder):
    build(image_folder, tmp_path / "out", patches(), shard_size=5)
    before = tree_of(tmp_path / "out")
    next(tmp_path.glob("out/*/train-00001*.tar")).write_bytes(b"damaged")
    build(image_folder, tmp_path / "out", patches(), shard_size=5)
    assert tree_of(tmp_path / "out") == before
    with pytest.raises(rd.DatasetError, match=r"another encoding.*\"num_crops\": 7.* there, .*\"num_crops\": 8"):
        build(image_folder, tmp_path / "out", patches(), config(num_crops=8), shard_size=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_crops": 0}, "num_crops must be 1 to 65536, got 0"),
        ({"num_crops": 65537}, "num_crops must be 1 to 65536, got 65537"),
        ({"encoding": "topk"}, "num_crops=7 needs encoding='crops', got 'topk'"),
        ({"storage_dtype": "uint8"}, "storage_dtype must be one of 'compact' for crops, got 'uint8'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, image_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(image_folder, tmp_path / "out", patches(), config(**arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            lambda size: rd.CropLabels.from_logits(torch.randn(3, 3), canvas_size=size),
            "has 3 crops, the manifest says 7",
        ),
        (lambda size: rd.CropLabels.from_logits(torch.randn(7, 4), canvas_size=size), "has 4 classes"),
        (
            lambda size: rd.LabelMap.from_logits(torch.randn(3, 2, 2), canvas_size=size),
            "has the encoding heatmaps, the manif",
        ),
    ],
)
def test_verify_reports_labels_that_the_manifest_does_not_describe(
    tmp_path, image_folder, annotator, monkeypatch, labels, message
):
    add = ShardWriter.add

    def add_other(self, key, label, image, blob):
        is_third = key == "photo_03"
        add(self, key, label, image, labels(read_label(blob).canvas_size).to_safetensors() if is_third else blob)

    monkeypatch.setattr(ShardWriter, "add", add_other)
    build(image_folder, tmp_path / "out", annotator)
    (problem,) = rd.verify(tmp_path / "out", num_workers=0, progress=False).problems
    assert (problem.key, message in problem.problem) == ("photo_03", True)
