"""CropLabels: what they hold, how they are copied and stored, and what is refused."""

import pickle

import numpy as np
import pytest
import safetensors.numpy
import torch
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.errors import LabelMapError
from relabel_datasets.labels import codec
from relabel_datasets.labels.crops import seeded_crops
from relabel_datasets.labels.encodings import get_encoding
from relabel_datasets.labels.encodings.crops import seed_of
from relabel_datasets.labels.reading import read_labels
from relabel_datasets.train.tokens import TokenLabelPooling

from .samples import random_dense, random_map

NUM_CROPS, NUM_CLASSES, CANVAS = 6, 13, (17, 23)
BOXES = [[0.1 * i / 2, 0.05 * i, 0.5, 0.25 + 0.05 * i] for i in range(NUM_CROPS)]  # top, left, height, width
FLIPS = [i % 2 == 1 for i in range(NUM_CROPS)]


def made(key="images/a_1", **arguments):
    """Labels of seeded crops."""
    logits = 4 * torch.randn(NUM_CROPS, NUM_CLASSES)
    return rd.CropLabels.from_logits(logits, canvas_size=CANVAS, key=key, label=4, **arguments)


def imported(dtype=np.float32, *, spread_rest=True):
    """Labels with boxes of their own, and probabilities of three classes each."""
    generator = np.random.default_rng(0)
    classes = np.argsort(generator.random((NUM_CROPS, NUM_CLASSES)))[:, :3]
    probs = (generator.random((NUM_CROPS, 3)) / 3).astype(dtype)
    return rd.CropLabels.from_probabilities(
        classes, probs, num_classes=NUM_CLASSES, canvas_size=CANVAS, boxes=np.array(BOXES, dtype), flips=FLIPS,
        spread_rest=spread_rest, key="b", label=2,
    )  # fmt: skip


def assert_same(got, want):
    assert type(got) is rd.CropLabels
    assert torch.equal(got.boxes_xyxy, want.boxes_xyxy)
    assert torch.equal(got.flips, want.flips)
    assert torch.equal(got.soft_labels(), want.soft_labels())
    for name in ("num_crops", "num_classes", "canvas_size", "key", "label", "epoch", "seed", "encoding"):
        assert getattr(got, name) == getattr(want, name)


def test_labels_of_seeded_crops_are_those_of_the_logits():
    logits = 4 * torch.randn(NUM_CROPS, NUM_CLASSES)
    labels = rd.CropLabels.from_logits(logits, canvas_size=CANVAS, key="a", k=NUM_CLASSES)
    for temperature in (1.0, 2.5):
        wanted = (logits / temperature).softmax(1)
        divergence = (wanted * (wanted / labels.soft_labels(temperature=temperature)).log()).sum(1)
        assert divergence.mean() < 0.2
    assert torch.equal(labels.soft_labels([4, 1, 4]), labels.soft_labels()[[4, 1, 4]])
    torch.testing.assert_close(labels.mean_label(), labels.soft_labels().mean(0))
    boxes, flips = seeded_crops([seed_of("a")], [CANVAS], NUM_CROPS)
    assert np.array_equal(labels.boxes_xyxy.numpy(), boxes[0])
    assert np.array_equal(labels.flips.numpy(), flips[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("spread_rest", [True, False])
def test_imported_labels_are_the_given_probabilities_and_boxes(dtype, spread_rest):
    labels = imported(dtype, spread_rest=spread_rest)
    classes, probs = (labels.tensors[name].numpy().astype(float) for name in ("crop_classes", "crop_probs"))
    soft = labels.soft_labels().double().numpy()
    for i in range(NUM_CROPS):
        rest = (1 - probs[i].sum()) / (NUM_CLASSES - 3) if spread_rest else 0
        expected = [
            probs[i, list(classes[i]).index(c)] if c in classes[i] else rest for c in map(float, range(NUM_CLASSES))
        ]
        assert soft[i] == pytest.approx(expected, abs=1e-6)
        top, left, height, width = np.array(BOXES, dtype)[i].astype(float)
        assert labels.boxes_xyxy[i].tolist() == [left, top, left + width, top + height]
    assert labels.flips.tolist() == FLIPS


@pytest.mark.parametrize("labels", [made(), imported(), imported(np.float16)], ids=["seeded", "float32", "float16"])
def test_copies_and_stored_labels_are_the_same(labels):
    again = rd.CropLabels.from_safetensors(labels.to_safetensors(), key=labels.key, label=labels.label)
    assert_same(again, labels)
    assert again.to_safetensors() == labels.to_safetensors()
    assert set(safetensors.numpy.load(labels.to_safetensors())) == set(labels.tensors)
    remade = rd.CropLabels(
        labels.tensors, num_classes=NUM_CLASSES, canvas_size=CANVAS, key=labels.key, label=labels.label
    )
    assert_same(remade, labels)
    for copied in (pickle.loads(pickle.dumps(labels)), labels.clone(), labels.detach(), labels.to("cpu")):
        assert_same(copied, labels)
    assert pickle.loads(pickle.dumps(labels.at_epoch(3, 5))).epoch == 3


def test_a_pickle_is_as_small_as_boxes_and_stored_labels():
    labels = rd.CropLabels.from_logits(torch.randn(100, 1000), canvas_size=CANVAS, key="a")
    blobs = [labels.to_safetensors()] * 8
    for read in read_labels(blobs, ["a"] * 8, [0] * 8):  # they share one piece of memory
        assert len(pickle.dumps(read)) < len(blobs[0]) + 100 * 4 * 8 + 2000


def test_maps_and_crops_are_read_together():
    seeded, own, label_map = made(), imported(), random_map()
    blobs = [own.to_safetensors(), label_map.to_safetensors(), seeded.to_safetensors(), own.to_safetensors()]
    got = read_labels(blobs, ["b", "m", "images/a_1", "b"], [2, 4, 4, 2], NUM_CLASSES)
    assert_same(got[0], own)
    assert_same(got[2], seeded)
    assert_same(got[3], own)
    assert isinstance(got[1], rd.LabelMap)
    assert (got[1].key, got[1].label) == ("m", 4)


def test_the_boxes_depend_on_the_stored_seed_only_not_on_the_key_that_a_reader_gives():
    labels = made(key="a")
    assert torch.equal(rd.CropLabels.from_safetensors(labels.to_safetensors(), key="b").boxes_xyxy, labels.boxes_xyxy)
    assert not torch.equal(made(key="b").boxes_xyxy, labels.boxes_xyxy)


def test_crops_of_an_image_in_another_resolution_show_the_same_part():
    labels = made()
    larger = labels.with_canvas_size((170, 230))
    for crop in range(NUM_CROPS):
        assert larger.pixel_box(crop) == tuple(10 * edge for edge in labels.pixel_box(crop))
    left, top, right, bottom = np.array([labels.with_canvas_size((1, 2)).pixel_box(i) for i in range(NUM_CROPS)]).T
    assert ((left >= 0) & (top >= 0) & (right <= 2) & (bottom <= 1) & (left < right) & (top < bottom)).all()


def damaged(**changes):
    """Bytes of imported labels with other tensors; None removes one."""
    tensors = {**{name: tensor.numpy() for name, tensor in imported().tensors.items()}, **changes}
    return {name: values for name, values in tensors.items() if values is not None}


FLAT = np.zeros((NUM_CROPS, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (damaged(crop_flips=None), r"either crop_seed or crop_boxes and crop_flips, got \['crop_boxes'\]"),
        (damaged(crop_seed=np.zeros(1, np.uint64)), "either crop_seed or crop_boxes and crop_flips"),
        (damaged(crop_flips=np.zeros(2, np.uint8)), r"crop_flips must be uint8 \(1,\), got uint8 \(2,\)"),
        (damaged(crop_boxes=FLAT[:5]), r"crop_boxes must be float32 \(6, 4\), got float32 \(5, 4\)"),
        (damaged(crop_boxes=FLAT.astype(np.uint8)), "crop_boxes must be floating point, got uint8"),
        (damaged(crop_boxes=FLAT), "crop_boxes must be .* within the image"),
        (damaged(crop_boxes=FLAT + np.float32(0.9)), "crop_boxes must be .* within the image"),
        (damaged(crop_boxes=FLAT * np.float32("nan")), "crop_boxes must be .* within the image"),
        (damaged(crop_classes=None), "stored crops have the tensors"),
        (damaged(crop_classes=np.full((NUM_CROPS, 3), 13, np.uint8)), "class index 13 is not below num_classes=13"),
    ],
)
def test_damaged_labels_are_refused(tensors, message):
    with pytest.raises(LabelMapError, match=message):
        rd.CropLabels(tensors, num_classes=NUM_CLASSES, canvas_size=CANVAS)
    blob = codec.serialize(get_encoding("crops"), tensors, NUM_CLASSES, CANVAS)
    with pytest.raises(LabelMapError, match=f"label map 'x': .*{message}"):
        rd.CropLabels.from_safetensors(blob, key="x")


def test_a_seed_of_another_shape_is_refused():
    tensors = {**made().tensors, "crop_seed": torch.zeros(2, dtype=torch.uint64)}
    with pytest.raises(LabelMapError, match=r"crop_seed must be uint64 \(1,\), got uint64 \(2,\)"):
        rd.CropLabels(tensors, num_classes=NUM_CLASSES, canvas_size=CANVAS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(boxes=BOXES), "boxes= and flips= belong together"),
        (lambda: made(boxes=BOXES[:2], flips=FLIPS), r"boxes must be \[N, 4\] and flips \[N\]"),
        (lambda: made(boxes=BOXES[:2], flips=FLIPS[:2]), r"crop_boxes must be float64 \(6, 4\), got float64 \(2, 4\)"),
        (lambda: made(k=0), "k must be at least 1"),
        (lambda: made().soft_labels(temperature=0), "temperature"),
        (lambda: rd.CropLabels({"logits": np.zeros(1)}, num_classes=3, canvas_size=(4, 4)), "no tensors"),
        (lambda: rd.CropLabels(made().tensors, num_classes=13, canvas_size=(0, 4)), "canvas sizes of positive"),
        (lambda: rd.CropLabels(made().tensors, num_classes=1, canvas_size=(4, 4)), "2 to"),
        (
            lambda: rd.LabelMap(random_dense(), "crops", num_classes=13),
            "got 'crops', which stores crops: use CropLabels",
        ),
        (lambda: rd.LabelMap.from_logits(random_dense(), "crops"), "got 'crops', which stores"),
        (lambda: rd.LabelMap.from_safetensors(made().to_safetensors()), "hold crop labels, not a label map"),
        (lambda: rd.CropLabels.from_safetensors(random_map().to_safetensors()), "hold a label map, not crop labels"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_crop_labels_are_not_collated():
    with pytest.raises(TypeError, match=r"CropLabels cannot be collated: use RandomStoredCrop\(size\)"):
        rd.collate([(torch.zeros(3, *CANVAS), made())] * 2)


def test_label_pooling_names_the_transform_for_crops():
    with pytest.raises(TypeError, match=r"LabelPooling needs a LabelMap.* use RandomStoredCrop\(size\)"):
        v2.Compose([rd.LabelPooling()])(torch.zeros(3, *CANVAS), made())


@pytest.mark.parametrize("pooling", [rd.LabelPooling((2, 2)), TokenLabelPooling(2)])
def test_labels_of_cells_and_tokens_need_label_maps(pooling):
    name = type(pooling).__name__
    with pytest.raises(
        TypeError, match=f"^{name} needs a LabelMap, but .* CropLabels: stored crops have no labels of cells"
    ):
        pooling(torch.zeros(3, *CANVAS), made())
