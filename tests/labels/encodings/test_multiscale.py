"""The encoding multiscale, with maps of different sizes."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.labels import Calibration, codec
from relabel_datasets.labels.calibration import covered_shares
from relabel_datasets.labels.encodings import encode_logits, find_entry
from relabel_datasets.labels.reading import read_labels
from relabel_datasets.labels.resample import resample_area
from relabel_datasets.labels.view import rows_of_boxes, to_rows

from ..samples import CANVAS_SIZE, NUM_CLASSES, random_dense
from ..test_codec_damage import join, split

SIZES = [(5, 3), (7, 5), (2, 4)]
GAINS = Calibration((0.1, 1.0), ((0.2, 1.5), (1.0, 0.3), (0.05, 0.4)), num_crops=8, kl_before=1.0, kl_after=0.5)
DTYPES = find_entry("multiscale").storage_dtypes


def random_maps(sizes=SIZES):
    return [random_dense(NUM_CLASSES, *size) for size in sizes]


def random_map(sizes=SIZES, key="a", dense=None, calibration=GAINS):
    dense = random_maps(sizes) if dense is None else dense
    label_map = rd.LabelMap.from_logits(dense, "multiscale", k=NUM_CLASSES, canvas_size=CANVAS_SIZE, key=key, label=4)
    return rd.LabelMap.wrap(label_map.logits, like=label_map, calibration=calibration)


def reference(dense, boxes, gains, grid=(1, 1)):
    """Return the soft labels of boxes `[n, 4]` of one image, in float64, with gains `[n, cells, S]`."""
    pooled = 0
    for scale, logits in enumerate(dense):
        height, width = logits.shape[1:]
        scaled = (boxes * torch.tensor([width, height, width, height])).double()
        means = roi_align(logits[None].double(), [scaled], grid, aligned=True)
        pooled = pooled + means * torch.tensor(gains[:, None, :, scale]).reshape(len(boxes), 1, *grid)
    return pooled.softmax(1)


BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.7, 0.9], [0.5, 0.25, 0.75, 0.5], [0.3, 0.3, 0.32, 0.9]])


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_labels_are_the_softmax_of_the_weighted_sum_of_all_maps(grid, calibrated):
    dense = random_maps()
    label_map = random_map(dense=dense)
    rows = rows_of_boxes(BOXES.numpy())
    gains = np.full((len(BOXES), grid[0] * grid[1], len(SIZES)), 1 / len(SIZES))
    if calibrated:
        gains = GAINS.gains_at(covered_shares(rows, grid))
    want = reference(dense, BOXES, gains, grid)
    crops = []
    for x1, y1, x2, y2 in BOXES.tolist():
        view = rd.labels.View(x2 - x1, 0, x1, 0, y2 - y1, y1)
        crops.append(rd.LabelMap.wrap(label_map.logits, like=label_map, view=view))
    alone = torch.stack([rd.LabelPooling(grid, calibrated=calibrated)(crop) for crop in crops])
    together = rd.collate(crops).pool(grid, calibrated=calibrated)
    if grid == (1, 1):
        single = torch.stack([rd.LabelPooling(calibrated=calibrated)(crop) for crop in crops])  # computed in NumPy
        torch.testing.assert_close(single.double(), want[:, :, 0, 0], rtol=0, atol=1e-5)
    for got in (alone, together):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda one: F.resized_crop(F.horizontal_flip(one), 2, 3, 9, 6, [20, 20]),
        lambda one: F.rotate(one, 30),
        lambda one: F.crop(F.rotate(one, 70), 2, 2, 9, 7),
        lambda one: F.crop(one, 40, 40, 5, 5),
    ],
    ids=["flipped crop", "rotated", "crop of rotated", "outside"],
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_map_follows_the_view(change, temperature):
    label_map = random_map()
    moved = change(label_map)
    want = 0
    gains = GAINS.gains_at(covered_shares(to_rows([moved.view]), (1, 1)))[0, 0]
    for gain, one in zip(gains, heatmaps_of(label_map), strict=True):
        want = want + gain * rd.LabelPooling()(change(one)).double().log()
    got = rd.LabelPooling(temperature=temperature, calibrated=True)(moved)
    torch.testing.assert_close(got.double(), (want / temperature).softmax(0), rtol=0, atol=1e-5)
    # Views of a batch are pooled in groups.
    batch = rd.collate([label_map, moved, F.crop(label_map, 1, 1, 9, 9)])
    together = batch.pool(temperature=temperature, calibrated=True)
    torch.testing.assert_close(together[1], got, rtol=0, atol=1e-5)


def heatmaps_of(label_map):
    """Return the maps of an image as separate label maps."""
    for suffix in ("", "_1", "_2"):
        tensors = {name: label_map.tensors[name + suffix] for name in ("logits", "classes", "base")}
        yield rd.LabelMap(
            **tensors, encoding="heatmaps", num_classes=label_map.num_classes, canvas_size=label_map.canvas_size
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_map_is_stored_as_by_heatmaps(dtype):
    label_map = random_map()
    read = rd.LabelMap.from_safetensors(label_map.to_safetensors(dtype))
    assert read.map_sizes == label_map.map_sizes == [list(size) for size in SIZES]
    for got, one in zip(heatmaps_of(read), heatmaps_of(label_map), strict=True):
        want = rd.LabelMap.from_safetensors(one.to_safetensors(dtype))
        for name, tensor in want.tensors.items():
            assert torch.equal(got.tensors[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_are_read_together_and_copied_with_their_values(dtype):
    maps = [random_map(key=key) for key in "abc"]
    blobs = [one.to_safetensors(dtype) for one in maps]
    together = read_labels(blobs, list("abc"), [4] * 3, NUM_CLASSES, GAINS)
    alone = [rd.LabelMap.from_safetensors(blob) for blob in blobs]
    for read, single in zip(together, alone, strict=True):
        assert read.to_safetensors(dtype) == single.to_safetensors(dtype)
        for copied in (pickle.loads(pickle.dumps(read)), copy.deepcopy(read), read.clone()):
            assert copied.map_sizes == read.map_sizes
            assert torch.equal(rd.LabelPooling(calibrated=True)(copied), rd.LabelPooling(calibrated=True)(read))
        in_double = read.to(torch.float64)
        assert {tensor.dtype for tensor in in_double.tensors.values()} == {torch.float64, torch.int64}
        torch.testing.assert_close(rd.LabelPooling()(in_double).float(), rd.LabelPooling()(read), rtol=0, atol=1e-6)
    packed, plain = rd.collate(together), rd.collate([one.to(torch.float64).to(torch.float32) for one in together])
    torch.testing.assert_close(packed.pool(), plain.pool(), rtol=0, atol=1e-6)
    encoded = packed.encoded
    torch.testing.assert_close(
        encoded.encoding.unpacked(encoded).encoding.pool(encoded, to_rows(packed.views)), plain.pool()
    )


def test_the_stored_bytes_are_stable():
    ramps = [torch.arange(3 * h * w, dtype=torch.float32).reshape(3, h, w) % 7 for h, w in ((2, 3), (4, 1))]
    classes, bases = (
        torch.tensor([[2, 0, 1], [3, 0, 2]])[:, :, None, None],
        torch.tensor([[1.0, 2, 3, 4], [4, 0, 8, 1]]),
    )
    label_map = rd.LabelMap(
        ramps[0], "multiscale", num_classes=4, canvas_size=(20, 30), classes=classes[0], base=bases[0], logits_1=ramps[1],
        classes_1=classes[1], base_1=bases[1],
    )  # fmt: skip
    blobs = [label_map.to_safetensors(dtype) for dtype in DTYPES]
    digests = [hashlib.sha256(blob).hexdigest()[:16] for blob in blobs]
    assert digests == ["f0a32cb57398eec9", "7b39301fd583bfe0", "232b7360b5515a34"]
    head, _ = split(blobs[0])
    assert {name: entry["shape"] for name, entry in head.items() if name != "__metadata__"} == {
        "base": [2, 2], "classes": [2, 3], "logits": [2, 2, 3], "logits_1": [2, 4, 1], "ranges": [2, 4, 2],
    }  # fmt: skip


def test_the_dense_map_is_the_mean_at_the_locations_of_the_largest():
    dense = random_maps()
    label_map = random_map(dense=dense)
    want = sum(resample_area(one, (7, 5)) for one in dense) / 3
    # Heatmaps are defined up to a constant of each location.
    torch.testing.assert_close(label_map.dense().softmax(0), want.softmax(0), rtol=0, atol=1e-5)
    encoded = label_map._encoded()
    (of_class,) = encoded.encoding.class_logits(encoded, torch.tensor([6]))
    torch.testing.assert_close(of_class, label_map.dense()[6])


def test_gradients_reach_every_map():
    label_map = random_map()
    tensors = {name: tensor.clone() for name, tensor in label_map.tensors.items()}
    for name, tensor in tensors.items():
        tensor.requires_grad_(not name.startswith("classes"))
    made = rd.LabelMap(**tensors, encoding="multiscale", num_classes=NUM_CLASSES)
    rd.LabelPooling()(made).square().sum().backward()
    assert all(tensors[name].grad.abs().sum() > 0 for name in ("logits", "logits_1", "logits_2"))


def test_a_batch_needs_maps_of_equal_sizes():
    with pytest.raises(
        ValueError, match="'a' has multiscale 13x5x3 and 7x5 and 2x4 of 13 classes and 'b' has multiscale"
    ):
        rd.collate([random_map(key="a"), random_map(SIZES[:2], key="b")])


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        (((1.0,),), "gains of 1 map per image, but there are 3"),
        (((1.0,),) * 4, "gains of 4 maps per image, but there are 3"),
    ],
)
@pytest.mark.parametrize(
    "pool", [lambda one: rd.LabelPooling(calibrated=True)(one), lambda one: rd.collate([one]).pool(calibrated=True)]
)
def test_gains_of_another_number_of_maps_are_refused(gains, message, pool):
    wrong = Calibration((1.0,), gains, num_crops=1, kl_before=0.0, kl_after=0.0)
    with pytest.raises(ValueError, match=message):
        pool(random_map(calibration=wrong))


def test_several_maps_need_an_encoding_that_stores_them():
    for encoding in ("heatmaps", "topk"):
        with pytest.raises(
            ValueError, match=f"{encoding} maps are made of the logits of one input size, got those of 3"
        ):
            rd.LabelMap.from_logits(random_maps(), encoding)
    with pytest.raises(ValueError, match="1 to 8 sizes, got 9"):
        rd.LabelMap.from_logits(random_maps([(1, 1)] * 9), "multiscale")
    with pytest.raises(ValueError, match="equal B and C in all maps"):
        encode_logits([torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2)], "multiscale")


@pytest.mark.parametrize("changed", ["logits_1", "classes_2", "base", "logits_3", "other"])
def test_missing_and_unknown_tensors_are_refused(changed):
    tensors = dict(random_map().tensors)
    if tensors.pop(changed, None) is None:
        tensors[changed] = torch.zeros(1)
    with pytest.raises(ValueError, match="multiscale maps are made of logits, classes, base"):
        rd.LabelMap(**tensors, encoding="multiscale", num_classes=NUM_CLASSES)


def with_head(change, dtype="uint8"):
    head, data = split(random_map().to_safetensors(dtype))
    change(head)
    return join(head, data)


def renamed(head, old, new):
    head[new] = head.pop(old)


def reshaped(head, name, *shape):
    head[name]["shape"] = list(shape)


DAMAGED = {
    "a gap in the numbers": (lambda head: renamed(head, "logits_1", "logits_3"), "must be logits, logits_1, logits_2"),
    "an unknown number": (lambda head: renamed(head, "logits_2", "logits_8"), "logits_8"),
    "another name of a number": (lambda head: renamed(head, "logits_2", "logits_02"), "logits_02"),
    "classes of fewer maps": (
        lambda head: reshaped(head, "classes", 39),
        "classes must have a first dimension of size 3",
    ),
    "ranges of another shape": (lambda head: reshaped(head, "ranges", 3, 2, 14), "ranges must be"),
    "base of fewer maps": (lambda head: reshaped(head, "base", 1, 39), "base must have a first dimension of size 3"),
    "a map without planes": (lambda head: reshaped(head, "logits_1", 455), r"logits must be \[K, H, W\]"),
    "a map of fewer planes": (lambda head: reshaped(head, "logits_1", 7, 13, 5), "logits must be uint8"),
    "a name that is missing": (lambda head: head.pop("base"), "base"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(change, message):
    with pytest.raises(rd.errors.LabelMapError, match=message):
        rd.LabelMap.from_safetensors(with_head(change))


def test_damaged_values_of_any_map_are_refused():
    head, data = split(random_map().to_safetensors("float16"))
    for name in ("logits", "logits_1", "logits_2", "base"):
        end = head[name]["data_offsets"][1]
        wrong = data[: end - 2] + np.float16(np.nan).tobytes() + data[end:]
        with pytest.raises(rd.errors.LabelMapError, match="must be finite"):
            codec.decode([join(head, wrong)])
    end = head["classes"]["data_offsets"][1]
    with pytest.raises(rd.errors.LabelMapError, match="class index 200 is not below"):
        codec.decode([join(head, data[: end - 1] + bytes([200]) + data[end:])])


def test_pipelines_pool_them():
    image = v2.functional.to_pil_image(torch.zeros(3, *CANVAS_SIZE, dtype=torch.uint8))
    transforms = v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), rd.LabelPooling(calibrated=True)])
    _, label = transforms(image, random_map())
    assert label.shape == (NUM_CLASSES,)
    assert label.sum() == pytest.approx(1, abs=1e-5)
