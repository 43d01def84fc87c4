"""decode_sample on samples that `datasets` and `webdataset` read from real shards, compared with RelabelDataset."""

import io
import re

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import relabel_datasets as rd
from tests.conftest import picture

# webdataset leaves its tars to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TRANSFORMS = v2.Compose([v2.Resize((32, 32)), rd.LabelPooling(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(autouse=True)
def _hf_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


@pytest.fixture
def root(image_folder, request):
    """The dataset of `dataset_folder`, with a rotated, a CMYK and a gray image among its images."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(3, (40, 56)).save(image_folder / "cat" / "photo_03.jpg", exif=exif)
    picture(4).convert("CMYK").save(image_folder / "dog" / "photo_04.jpg")
    picture(5).convert("L").save(image_folder / "emu" / "photo_05.jpg")
    return request.getfixturevalue("dataset_folder")


@pytest.fixture
def ours(root):
    return rd.RelabelDataset(root, "colours")


def rows_of(root, config="colours", **kwargs):
    return datasets.load_dataset(str(root), config, split="train", **kwargs)


def tars_of(root, config="colours"):
    return webdataset.WebDataset(sorted(map(str, (root / config).glob("train-*.tar"))), shardshuffle=False)


def assert_same_samples(samples, ours):
    samples = list(samples)
    assert [sample["key"] for sample in samples] == list(ours.keys)
    for i, sample in enumerate(samples):
        image, label_map = ours[i]
        assert (sample["image"].mode, sample["label"]) == ("RGB", ours.targets[i])
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(image))
        assert_same_label_map(sample["label_map"], label_map)


def assert_same_label_map(read, expected):
    assert isinstance(read, rd.LabelMap)
    for name in ("key", "label", "canvas_size", "num_classes", "view"):
        assert getattr(read, name) == getattr(expected, name)
    for name in ("logits", "classes", "base"):
        torch.testing.assert_close(getattr(read, name), getattr(expected, name), rtol=0, atol=0)


def collate(samples):
    return default_collate([TRANSFORMS(sample["image"], sample["label_map"]) for sample in samples])


def assert_same_soft_labels(loader, ours):
    """Train loader of the guide: batches of images and soft labels."""
    images, soft_labels = map(torch.cat, zip(*loader, strict=True))
    expected = [TRANSFORMS(*ours[i]) for i in range(len(ours))]
    torch.testing.assert_close(images, torch.stack([image for image, _ in expected]))
    torch.testing.assert_close(soft_labels, torch.stack([label for _, label in expected]))


def test_rows_of_datasets_streaming(root, ours):
    rows = rows_of(root, streaming=True)
    samples = rows.map(rd.decode_sample, remove_columns=rows.column_names)
    assert list(next(iter(samples))) == ["key", "image", "label_map", "label"]
    assert_same_samples(samples, ours)
    assert_same_samples(rows.map(rd.decode_sample), ours)  # the row's columns are kept
    assert_same_samples(samples.map(lambda sample: {"more": sample["label_map"].key}), ours)
    assert_same_soft_labels(DataLoader(samples, batch_size=4, collate_fn=collate), ours)


def test_rows_of_datasets_by_index(root, ours):
    samples = rows_of(root).with_transform(rd.decode_sample)
    assert_same_samples(samples, ours)
    assert [sample["key"] for sample in samples.__getitems__([7, 2])] == [ours.keys[7], ours.keys[2]]
    assert_same_soft_labels(DataLoader(samples, batch_size=4, collate_fn=collate), ours)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_datasets_with_undecoded_images(root, ours, streaming):
    rows = rows_of(root, streaming=streaming).cast_column("jpg", datasets.Image(decode=False))
    assert_same_samples(map(rd.decode_sample, rows), ours)


def test_batches_of_datasets(root, ours):
    batches = rows_of(root, streaming=True).map(rd.decode_sample, batched=True, batch_size=4)
    assert_same_samples(batches, ours)
    empty = {"__key__": [], "cls": [], "safetensors": []}
    assert rd.decode_sample(empty) == {}


def test_samples_of_webdataset(root, ours):
    assert_same_samples(tars_of(root).map(rd.decode_sample), ours)
    samples = tars_of(root).map(rd.decode_sample)
    assert_same_soft_labels(DataLoader(samples, batch_size=4, collate_fn=collate), ours)


def test_samples_that_webdataset_decoded(root, ours):
    assert_same_samples(tars_of(root).decode("pil").map(rd.decode_sample), ours)
    handler = webdataset.handle_extension("safetensors", rd.LabelMap.from_safetensors)
    decoded = list(tars_of(root).decode(handler, "pil"))
    for i, sample in enumerate(decoded):
        assert isinstance(sample["safetensors"], rd.LabelMap)
        torch.testing.assert_close(sample["safetensors"].dense(), ours.label_maps.at(i).dense(), rtol=0, atol=0)
    assert_same_samples(map(rd.decode_sample, decoded), ours)


@pytest.mark.parametrize("read", [lambda root: rows_of(root, "labels-only"), lambda root: tars_of(root, "labels-only")])
def test_label_only_samples_have_no_image(root, read):
    label_maps = rd.LabelMaps(root, "labels-only")
    samples = list(map(rd.decode_sample, read(root)))
    assert [sample["key"] for sample in samples] == list(label_maps)
    for sample in samples:
        assert list(sample) == ["key", "label_map", "label"]
        assert_same_label_map(sample["label_map"], label_maps[sample["key"]])


def raw_sample(image=None, canvas_size=(6, 8), **fields):
    label_map = rd.LabelMap.from_logits(torch.randn(3, 2, 2), canvas_size=canvas_size)
    sample = {"__key__": "one", "cls": b"2", "safetensors": label_map.to_safetensors(), **fields}
    return sample if image is None else {"jpg": image, **sample}


def png(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def test_16_bit_images_keep_their_upper_8_bits_in_every_form():
    values = (np.arange(48).reshape(6, 8) * 1000).astype(np.uint16)
    image = PIL.Image.fromarray(values)
    for stored in (image, png(image)):
        read = np.asarray(rd.decode_sample(raw_sample(stored))["image"])
        np.testing.assert_array_equal(read, np.repeat((values >> 8)[..., None], 3, 2))


def test_a_decoded_image_with_an_orientation_tag_is_turned():
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    opened = PIL.Image.open(io.BytesIO(png(picture(0, (8, 6)), exif=exif)))
    assert rd.decode_sample(raw_sample(opened))["image"].size == (8, 6)


def test_an_image_in_another_resolution_resizes_its_label_map():
    sample = rd.decode_sample(raw_sample(picture(0, (12, 20))))
    assert sample["label_map"].canvas_size == (12, 20)


@pytest.mark.parametrize("label", [b"2", 2, np.int64(2)])
def test_labels_of_every_library_become_an_int(label):
    decoded = rd.decode_sample(raw_sample(cls=label))["label"]
    assert (type(decoded), decoded) == (int, 2)


MAP = rd.LabelMap.from_logits(torch.randn(3, 2, 2))


def test_an_empty_field_of_the_image_extension_of_another_split_is_ignored():
    assert rd.decode_sample(raw_sample(picture(0, (6, 8)), png=None))["image"].size == (8, 6)


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (raw_sample(picture(0, (8, 6))), rd.DatasetError, "'one': its image is 8x6.* 6x8.*EXIF"),
        (raw_sample(b"", png=b""), rd.DatasetError, r"'one' has several images, \['jpg', 'png'\]"),
        (raw_sample(__key__=None), rd.DatasetError, "no '__key__'"),
        (raw_sample(cls=None), rd.DatasetError, "'one': 'cls' must be a class index, got None"),
        (raw_sample(cls=b"cat"), rd.DatasetError, "'one': 'cls' must be a class index, got b'cat'"),
        *[
            (raw_sample(cls=value), rd.DatasetError, f"'one': 'cls' must be .*, got {re.escape(repr(value))}")
            for value in (b"-1", b"", b" 1", b"1.0", b"1" * 40, -1, 1.7, 1.0, True, "1", [1], np.float32(1))
        ],
        (raw_sample(cls=b"3"), rd.DatasetError, "'one': 'cls' must be in 0 .. 2, the classes of its label map, got 3"),
        (raw_sample(cls=10**9), rd.DatasetError, "'one': 'cls' must be in 0 .. 2"),
        (raw_sample(cls=7, safetensors=MAP), rd.DatasetError, "'one': 'cls' must be in 0 .. 2"),
        (raw_sample(safetensors=None), rd.DatasetError, "'one' has no label map in 'safetensors'"),
        (raw_sample(safetensors=b"1234"), rd.errors.LabelMapError, "'one': 4 bytes"),
        (raw_sample(safetensors={}), TypeError, "'safetensors' must be bytes or a LabelMap, got dict"),
        (raw_sample(b"no image"), rd.errors.ImageError, r"one\.jpg: cannot be read"),
        (raw_sample(np.zeros((6, 8, 3))), TypeError, r"one\.jpg must be bytes or a PIL image, got ndarray"),
    ],
)
def test_the_error_for_an_undecodable_sample_says_why(sample, error, message):
    with pytest.raises(error, match=message):
        rd.decode_sample(sample)
