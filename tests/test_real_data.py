"""End-to-end test with real ImageNet images and a real annotator. Skipped if they are absent."""

import tarfile

import pytest
import timm
import torch

import relabel_datasets as rd
from relabel_datasets.analysis import label_margins, measure_images
from relabel_datasets.annotate.classes import match_classes
from relabel_datasets.labels.batch import LabelMapBatch
from relabel_datasets.labels.windows import measure_windows

MODEL = {"checkpoint": "mobilenetv2_100.safetensors", "mean": (0.5,) * 3, "std": (0.5,) * 3, "pad_type": "same"}


@pytest.fixture(scope="module")
def images(real_data, tmp_path_factory):
    """ImageFolder of the first ten images of each Imagenette class."""
    root = tmp_path_factory.mktemp("imagenette")
    seen = {}
    with tarfile.open(real_data / "imagenette-train.tar") as tar:
        for member in tar:
            if member.isfile():
                synset = member.name.split("/")[1]
                seen[synset] = seen.get(synset, 0) + 1
                if seen[synset] <= 10:
                    tar.extract(member, root, filter="data")
    return root / "train"


@pytest.fixture(scope="module")
def annotator(real_data):
    return rd.TimmAnnotator(
        "mobilenetv2_100", input_size=288, **{**MODEL, "checkpoint": real_data / MODEL["checkpoint"]}
    )


@pytest.fixture(scope="module")
def dataset(images, annotator, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rd.build(rd.data.ImageFolderSource(images), root, annotator, progress=False)
    return rd.load_dataset(root, split="train")


def test_label_maps_have_the_ten_classes_of_the_dataset(dataset):
    assert len(dataset) == 100
    assert len(dataset.classes) == 10
    assert all(label_map.shape == (10, 9, 9) and label_map.num_classes == 10 for _, label_map in dataset)


def test_the_mean_of_a_map_equals_the_logits_of_the_model(dataset, annotator, real_data):
    model = timm.create_model(
        "mobilenetv2_100", pad_type="same", checkpoint_path=str(real_data / MODEL["checkpoint"])
    ).eval()
    rows = match_classes(annotator.classes, dataset.classes)
    samples = list(dataset)
    for batch in (samples[start : start + 20] for start in range(0, len(samples), 20)):
        pixels = torch.stack([annotator.preprocess(image) for image, _ in batch])
        with torch.inference_mode():
            expected = model(pixels / 127.5 - 1)[:, rows]
        for (_, label_map), logits in zip(batch, expected, strict=True):
            steps = (
                label_map.logits.amax((1, 2)) - label_map.logits.amin((1, 2))
            ) / 15  # step of the 4-bit quantization
            distance = (label_map.dense().mean((1, 2)) - logits)[label_map.classes[:, 0, 0]].abs()
            assert (distance <= steps / 2).all()


def test_the_pooled_label_of_the_whole_image_is_usually_the_true_class(dataset):
    pool = rd.LabelPooling()
    right = sum(int(pool(label_map).argmax()) == label_map.label for _, label_map in dataset)
    assert right >= 95  # the annotator is right on 98.8 % of Imagenette among its ten classes


def test_few_photos_of_one_object_show_several_classes(dataset):
    images = measure_images(dataset.label_maps, range(len(dataset)), progress=False)
    assert (
        images["num_shown"] > 1
    ).mean() < 0.25  # a probability of 0.5 at a location is reached by several classes in most
    assert (images["num_shown"] > 0).mean() > 0.95


def test_replaced_labels_have_lower_margins_than_correct_ones(dataset):
    batch = LabelMapBatch.of(list(dataset.label_maps.values()))
    encoded = batch.encoded
    labels = torch.from_numpy(dataset.label_maps.index.labels.astype("int64"))
    correct, wrong = (label_margins(measure_windows(encoded, given).p_label) for given in (labels, (labels + 1) % 10))
    assert (wrong[:, None] < correct).double().mean() > 0.98  # area under the ROC curve
