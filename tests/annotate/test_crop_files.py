import io
import os
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch

from relabel_datasets.annotate import crop_files
from relabel_datasets.annotate.crop_files import PlusConfig, find_label_type, parse_fkd, parse_imagenet_plus
from relabel_datasets.errors import LabelMapError
from tests.annotate.crop_releases import (
    NUM_CLASSES,
    STEPS,
    fkd_file,
    plus_config,
    plus_file,
    read_fkd_labels,
    read_plus_labels,
    save,
)

SIZE = (30, 50)


def dense_labels(crops, num_classes=NUM_CLASSES):
    """Soft labels `[N, C]` of parsed crops."""
    probs = torch.from_numpy(crops.probs.astype(np.float32))
    others = num_classes - probs.shape[1]
    rest = (1 - probs.sum(1, keepdim=True)).clamp(min=0) / max(others, 1) * crops.spread_rest
    return rest.repeat(1, num_classes).scatter_(1, torch.from_numpy(crops.classes), probs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("label_type", crop_files.LABEL_TYPES)
def test_labels_equal_those_of_the_reader_of_fkd(label_type, dtype):
    boxes, flips, labels = fkd_file(0, SIZE, label_type, dtype)
    crops = parse_fkd(save([boxes, flips, labels]), NUM_CLASSES, label_type)
    np.testing.assert_array_equal(crops.boxes, boxes)
    assert crops.boxes.dtype == dtype
    np.testing.assert_array_equal(crops.flips, flips)
    tolerance = 1e-6 if dtype == np.float32 else 1e-4  # the probabilities of a crop in float16 may exceed 1 together
    torch.testing.assert_close(dense_labels(crops), read_fkd_labels(labels, label_type), rtol=1e-6, atol=tolerance)
    if label_type != "marginal_renorm":
        assert crops.probs.dtype == (np.float32 if label_type == "hard" else dtype)  # as in the file


@pytest.mark.parametrize("label_type", [name for name in crop_files.LABEL_TYPES if name != "marginal_renorm"])
def test_the_label_type_is_that_of_the_shape(label_type):
    content = save(fkd_file(0, SIZE, label_type))
    found, given = parse_fkd(content, NUM_CLASSES), parse_fkd(content, NUM_CLASSES, label_type)
    torch.testing.assert_close(dense_labels(found), dense_labels(given), rtol=0, atol=0)


def test_the_writers_name_of_a_label_type_is_known():
    assert find_label_type("marginal_renorm_k5") == "marginal_renorm"
    assert find_label_type(None) is None
    assert {find_label_type(name) for name in crop_files.LABEL_TYPES} == set(crop_files.LABEL_TYPES)
    with pytest.raises(ValueError, match=r"label_type must be one of hard, .*, got 'soft'"):
        find_label_type("soft")


def of_numpy(content, other):
    """Return a zip file of torch as another major version of NumPy writes it."""
    buffer = io.BytesIO()
    names = {
        "1": (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        "2": (b"numpy.core.multiarray", b"numpy._core.multiarray"),
    }
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(*names[other]))
    return buffer.getvalue()


BOXES, FLIPS, LABELS = fkd_file(0, SIZE)
LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    "content",
    [
        of_numpy(save([BOXES, FLIPS, LABELS]), "1"),
        of_numpy(save([BOXES, FLIPS, LABELS]), "2"),
        save([BOXES, FLIPS, LABELS], **LEGACY),
        save([torch.from_numpy(BOXES), torch.from_numpy(FLIPS), torch.from_numpy(LABELS)]),
        save([torch.from_numpy(BOXES), FLIPS.tolist(), LABELS], **LEGACY),
        save((BOXES, FLIPS.astype(np.uint8), torch.from_numpy(LABELS))),
        save([np.asfortranarray(BOXES), FLIPS, LABELS.astype(">f4")]),
        save([BOXES[:, ::-1].copy()[:, ::-1], FLIPS, np.moveaxis(np.moveaxis(LABELS, 0, 2).copy(), 2, 0)]),
    ],
    ids=["numpy 1", "numpy 2", "legacy", "tensors", "legacy mix", "tuple", "orders of bytes", "strides"],
)
def test_arrays_tensors_and_lists_are_read_in_every_form(content):
    crops = parse_fkd(content, NUM_CLASSES)
    np.testing.assert_array_equal(crops.boxes, BOXES)
    np.testing.assert_array_equal(crops.flips, FLIPS)
    np.testing.assert_array_equal(crops.classes, LABELS[:, 0])
    np.testing.assert_array_equal(crops.probs, LABELS[:, 1])


def test_threads_read_files_at_the_same_time_and_numpy_stays_refused_elsewhere():
    content, results = save([BOXES, FLIPS, LABELS]), []
    threads = [threading.Thread(target=lambda: results.append(parse_fkd(content, NUM_CLASSES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(content), weights_only=True)


class Evil:
    """Object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def changed(part, index, value):
    arrays = [BOXES.copy(), FLIPS.copy(), LABELS.copy()]
    arrays[part][index] = value
    return save(arrays)


def smaller(part, cut):
    arrays = [BOXES, FLIPS, LABELS]
    arrays[part] = cut(arrays[part])
    return save(arrays)


def tar_with_storages():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("storages")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    return buffer.getvalue()


def deflated(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(save(content))) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def overlapping(count):
    """Return a zip file with one entry of a megabyte that it lists several times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
        archive.filelist *= count
    return buffer.getvalue()


def lying_bomb(method):
    """Return a zip file of a pickle of a megabyte, which states a size of 100 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
        archive.filelist[0].file_size = 100
    return buffer.getvalue()


def nested(value):
    """Return lists or tuples in which `value` occurs 2^40 times, in a kilobyte."""
    for _ in range(40):
        value = type(value)([value, value])
    return value


BAD_FKD = {
    "nan box": (changed(0, (1, 2), np.nan), "within the image"),
    "box beyond the right edge": (changed(0, (1, 1), 1.0), "within the image"),
    "negative corner": (changed(0, (0, 0), -0.1), "within the image"),
    "empty box": (changed(0, (0, 3), 0), "within the image"),
    "infinite box": (changed(0, (0, 3), np.inf), "within the image"),
    "integer boxes": (smaller(0, lambda boxes: boxes.astype(int)), "boxes must be floating point"),
    "three coordinates": (smaller(0, lambda boxes: boxes[:, :3]), r"boxes must be \[N, 4\]"),
    "no crops": (save([torch.zeros(0, 4), FLIPS, LABELS]), r"boxes must be \[N, 4\] with N of 1 to"),
    "too many crops": (save([np.tile(BOXES, (3000, 1)), FLIPS, LABELS]), r"boxes must be \[N, 4\] with N of 1 to"),
    "fewer flips": (smaller(1, lambda flips: flips[1:]), "flips must be 7 bools"),
    "flip of 2": (smaller(1, lambda flips: flips + 1), "flips must be 7 bools"),
    "fewer labels": (smaller(2, lambda labels: labels[1:]), r"labels of 7 crops must be \[N\]"),
    "seven classes": (smaller(2, lambda labels: np.tile(labels, 2)[:, :, :7]), r"labels of 7 crops must be \[N\]"),
    "three rows": (smaller(2, lambda labels: np.tile(labels, (1, 2, 1))[:, :3]), r"labels of 7 crops must be \[N\]"),
    "nan probability": (changed(2, (0, 1, 0), np.nan), "probabilities must be 0 to 1"),
    "negative probability": (changed(2, (0, 1, 4), -1e-3), "probabilities must be 0 to 1"),
    "probability above 1": (changed(2, (0, 1, 0), 1.5), "probabilities must be 0 to 1"),
    "sum above 1": (changed(2, (0, 1), 0.3), "sum of at most 1, got 1.5"),
    "half a class": (changed(2, (0, 0, 0), 0.5), "class indices must be whole numbers"),
    "nan class": (changed(2, (0, 0, 0), np.nan), "class indices must be whole numbers"),
    "negative class": (changed(2, (0, 0, 0), -1), r"class indices must be in 0 \.\. 11, got -1"),
    "class beyond the last": (changed(2, (0, 0, 0), 12), r"class indices must be in 0 \.\. 11"),
    "class twice": (changed(2, (0, 0), 3), "classes of a crop must differ"),
    "bools as labels": (smaller(2, lambda labels: labels[:, 0, 0] > 3), "class indices must be whole numbers"),
    "two parts": (save([BOXES, FLIPS]), "expected a list of boxes, flips and labels"),
    "a tensor": (save(torch.zeros(3, 4)), "expected a list of boxes, flips and labels"),
    "text": (save([BOXES, FLIPS, "text"]), "labels must be an array of numbers, got str"),
    "lists of different lengths": (save([[[0.0], [0.0, 1.0]], FLIPS, LABELS]), "boxes must be an array of numbers, got list"),
    "complex numbers": (save([torch.zeros(7, 4, dtype=torch.cfloat), FLIPS, LABELS]), "boxes must be a dense tensor of numbers"),
    "sparse tensor": (save([torch.from_numpy(BOXES).to_sparse(), FLIPS, LABELS]), "boxes must be a dense tensor"),
    "one number shown often": (save([torch.zeros(1).expand(7, 4), FLIPS, LABELS]), "stores less"),
    "array of objects": (save([np.array([None] * 7), FLIPS, LABELS]), "no code was executed"),
    "array of text": (save([np.array(["a"] * 7), FLIPS, LABELS]), "no code was executed"),
    "records": (save([np.zeros(7, [("a", "f4")]), FLIPS, LABELS]), "no code was executed"),
    "allocation of terabytes": (save([Evil(np.ndarray, (1 << 40,)), FLIPS, LABELS]), "damaged"),
    "empty array of numpy": (save([Evil(np.zeros(1).__reduce__()[0], np.ndarray, (1 << 40,), b"O"), FLIPS, LABELS]), "boxes must be an array"),
    "code": (save([BOXES, FLIPS, Evil(os.system, "true")]), "no code was executed"),
    "other function of numpy": (save([BOXES, FLIPS, Evil(np.fromfile, "x")]), "no code was executed"),
    "a tar": (tar_with_storages(), "is a tar archive"),
    "empty file": (b"", "damaged"),
    "truncated": (save([BOXES, FLIPS, LABELS])[:-100], "damaged"),
    "truncated in the middle": (save([BOXES, FLIPS, LABELS])[:300], "damaged"),
    "compressed": (deflated([BOXES, FLIPS, LABELS]), "is a compressed zip file"),
    "zip bomb": (overlapping(100), "unpacks to 104857600 bytes"),
    "a list a billion times in lists": (save([nested([0.5]), FLIPS, LABELS]), "boxes must be an array of numbers, got list"),
    "tensors in a list": (save([[torch.zeros(4).expand(1 << 30, 4)] * 7, FLIPS, LABELS]), "boxes must be an array"),
    "a dtype a billion times in tuples": (save([Evil(np.dtype, nested((0,))), FLIPS, LABELS]), "no code was executed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # of torch with weights_only
@pytest.mark.parametrize("name", BAD_FKD)
def test_bad_files_of_fkd_are_refused(name):
    content, message = BAD_FKD[name]
    with pytest.raises(LabelMapError, match=message):
        parse_fkd(content, NUM_CLASSES)


def test_other_label_types_and_sums_of_zero_are_refused():
    with pytest.raises(
        LabelMapError, match=r"'hard' were expected, but those of shape \[7, 2, 5\] are of type 'marginal_smoothing_k5'"
    ):
        parse_fkd(save([BOXES, FLIPS, LABELS]), NUM_CLASSES, "hard")
    with pytest.raises(LabelMapError, match="'marginal_renorm' were expected"):
        parse_fkd(save(fkd_file(0, SIZE, "smoothing")), NUM_CLASSES, "marginal_renorm")
    with pytest.raises(LabelMapError, match="must not all be 0"):
        parse_fkd(changed(2, (0, 1), 0), NUM_CLASSES, "marginal_renorm")


def test_half_precision_is_refused_for_more_classes_than_it_represents():
    content = save(fkd_file(0, SIZE, dtype=np.float16))
    assert parse_fkd(content, 2048).classes.shape == (7, 5)
    with pytest.raises(
        LabelMapError, match=r"float16, which represents them exactly up to 2048 only, but there are 2049 classes"
    ):
        parse_fkd(content, 2049)


CONFIG = PlusConfig(7, has_flips=True)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["compressed", "dict", "dense"])
def test_labels_of_imagenet_plus_equal_those_of_its_reader(form, protocol):
    content, (boxes, flips, _) = plus_file(0, 5, SIZE, form)
    crops = parse_imagenet_plus(save(content, pickle_protocol=protocol), 5, CONFIG, NUM_CLASSES)
    np.testing.assert_array_equal(crops.boxes, boxes)
    np.testing.assert_array_equal(crops.flips, flips)
    expected = torch.stack([read_plus_labels(sample["prob"]) for sample in content[1]])
    torch.testing.assert_close(dense_labels(crops), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(crops.shares(SIZE) * np.tile(SIZE, 2), boxes)
    with pytest.raises(LabelMapError, match="crops exceed the image of 29 x 50 pixels"):
        parse_imagenet_plus(save(plus_file(0, 5, (30, 50))[0]), 5, CONFIG, NUM_CLASSES).shares((29, 50))


def test_variants_without_flips_are_read():
    content, (boxes, _, _) = plus_file(0, 5, SIZE)
    for sample in content[1]:
        sample["params"] = sample["params"][:1]
    config = PlusConfig.parse(save(plus_config(steps={"random_resized_crop": {}})))
    crops = parse_imagenet_plus(save(content), 5, config, NUM_CLASSES)
    np.testing.assert_array_equal(crops.boxes, boxes)
    assert not crops.flips.any()


def test_other_operations_of_a_configuration_are_listed():
    assert PlusConfig.parse(save(plus_config(50))) == PlusConfig(50, has_flips=True)
    steps = {
        **STEPS,
        "rand_augment": {"enable": True},
        "random_erase": {"p": 0.25},
        "mixup": {},
        "cutmix": {"enable": False},
    }
    with pytest.raises(
        LabelMapError, match=r"also augmented by rand_augment, random_erase, mixup, which is not imported"
    ):
        PlusConfig.parse(save(plus_config(steps=steps)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (plus_config(1 << 70), "num_samples` must be 1 to .*, got a value of type int"),
        (plus_config(nested([1])), "num_samples` must be 1 to .*, got a value of type list"),
        (plus_config(steps={(1, 2): {}}), "must have operations by name"),
        ([1], "no configuration of ImageNet"),
        ({"reinforce": {"num_samples": 3}}, "no configuration of ImageNet"),
        (plus_config(0), "num_samples` must be 1 to"),
        (plus_config("7"), "num_samples` must be 1 to"),
        (plus_config(steps={"random_horizontal_flip": {}}), "has no random_resized_crop, only random_horizontal_flip"),
        (plus_config(steps={}), "has no random_resized_crop, only nothing"),
        ({"reinforce": torch.zeros(1)}, "contains torch._utils._rebuild_tensor_v2"),
        (Evil(os.system, "true"), r"contains posix.system, expected only .*; no code was executed"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(LabelMapError, match=message):
        PlusConfig.parse(save(config))


def plus_with(change):
    content = plus_file(0, 5, SIZE)[0]
    change(content[1][0])
    return save(content)


def params(*values):
    return plus_with(lambda sample: sample.update(params=list(values)))


def prob(*values):
    return plus_with(lambda sample: sample.update(prob=values))


TEN = [0.01] * 10, list(range(10))
BAD_PLUS = {
    "another index": (save(plus_file(0, 6, SIZE)[0]), "expected index 5 and 7 samples, got 6 and 7 samples"),
    "fewer samples": (save((5, plus_file(0, 5, SIZE)[0][1][1:])), "got 5 and 6 samples"),
    "a dict": (save({5: []}), "expected an index and a list of samples"),
    "samples without labels": (save((5, [{"params": []}] * 7)), "each sample must have `params` and `prob`"),
    "a third operation": (params((0, 0, 1, 1), True, 3), "a list of the crop and the flip"),
    "no crop": (params(True, (0, 0, 1, 1)), "a crop of four numbers"),
    "flip of text": (params((0, 0, 1, 1), "yes"), "a flip that is a bool"),
    "flip of 2": (params((0, 0, 1, 1), 2), "flips must be 7 bools"),
    "fractional crop": (params((0, 0, 1.5, 1), True), "whole pixels"),
    "negative corner": (params((0, -1, 1, 1), True), "whole pixels"),
    "empty crop": (params((0, 0, 0, 1), True), "whole pixels"),
    "crop of text": (params(("0", 0, 1, 1), True), "crops must be an array of numbers"),
    "gigantic crop": (params((1 << 62, 0, 1 << 62, 1), True), "whole pixels"),
    "crop beyond 64 bits": (params((1 << 70, 0, 1, 1), True), "crops must be an array of numbers"),
    "fewer classes in one crop": (prob([0.1] * 9, list(range(9))), "must be an array of numbers"),
    "negative probability": (prob([-0.1] * 10, TEN[1]), "probabilities must be 0 to 1"),
    "nan probability": (prob([float("nan")] * 10, TEN[1]), "probabilities must be 0 to 1"),
    "sum above 1": (prob([0.2] * 10, TEN[1]), "sum of at most 1, got 2"),
    "fractional class": (prob(TEN[0], [0.5, *range(1, 10)]), "whole numbers"),
    "class beyond the last": (prob(TEN[0], [12, *range(1, 10)]), r"in 0 \.\. 11"),
    "class twice": (prob(TEN[0], [3] * 10), "must differ"),
    "code": (save((5, [Evil(os.system, "true")] * 7)), "contains posix.system"),
    "numpy": (save((5, [np.float32(1)] * 7)), "contains numpy"),
    "tensors": (save((5, [torch.zeros(1)] * 7)), "contains torch"),
    "no pickle": (save(3)[:100], "damaged"),
    "zip without pickle": (save(3).replace(b"data.pkl", b"date.pkl"), "damaged"),
    "legacy format": (save(3, **LEGACY), "damaged"),
    "compressed": (lying_bomb(zipfile.ZIP_DEFLATED), "is a compressed zip file"),
    "compressed by bzip2": (lying_bomb(zipfile.ZIP_BZIP2), "is a compressed zip file"),
    "compressed by xz": (lying_bomb(zipfile.ZIP_LZMA), "is a compressed zip file"),
    "zip bomb": (overlapping(100), "unpacks to 104857600 bytes"),
    "an index a billion times in lists": (save((nested([5]), [])), "expected index 5 and 7 samples, got a value of type list"),
    "an index of a million digits": (save((1 << (1 << 22), [])), "expected index 5 and 7 samples, got a value of type int"),
    "a crop a billion times in lists": (params((nested([0]), 0, 1, 1), True), "crops must be an array of numbers"),
    "crops of lists": (params((nested([0]),) * 4, True), "must be an array of numbers"),
    "probabilities a billion times in lists": (prob(nested([0.1]), nested([1])), "must be an array of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLUS)
def test_bad_files_of_imagenet_plus_are_refused(name):
    content, message = BAD_PLUS[name]
    with pytest.raises(LabelMapError, match=message):
        parse_imagenet_plus(content, 5, CONFIG, NUM_CLASSES)


def test_a_pickle_cannot_reserve_memory_by_large_indices():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02K\x05r\xff\xff\xff\xff.")  # stores 5 at index 2^32 - 1
    with pytest.raises(LabelMapError, match="expected an index and a list of samples"):
        parse_imagenet_plus(buffer.getvalue(), 5, CONFIG, NUM_CLASSES)
