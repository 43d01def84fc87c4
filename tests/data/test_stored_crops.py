"""Datasets of stored crops: every reader returns the crop and the label that the annotator gave it."""

import io
import json
import threading

import PIL.Image
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import relabel_datasets as rd
from relabel_datasets.annotate import BuildConfig
from relabel_datasets.data import RelabelPipeline
from tests.conftest import colours, picture

NUM_IMAGES, NUM_CROPS = 13, 6
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of 13 images with 6 crops each in 3 shards, and the same without images."""
    root = tmp_path_factory.mktemp("crops")
    for i in range(NUM_IMAGES):
        path = root / "images" / ("cat", "dog", "emu")[i % 3] / f"photo_{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40, 56) if i % 2 else (48, 32)).save(path)
    for config, images in (("crops", True), ("labels-only", False)):
        build_config = BuildConfig(encoding="crops", num_crops=NUM_CROPS, batch_size=4, images=images)
        source = rd.data.ImageFolderSource(root / "images")
        rd.build(
            source, root / "data", colours(), config=config, build_config=build_config, shard_size=5, progress=False
        )
    return root / "data"


class Trace:
    """Crop and label with the key of the sample and the indices of the crops."""

    def __init__(self, num_crops=1):
        self.crop = rd.RandomStoredCrop(8, num_crops=num_crops)

    def __call__(self, image, labels):
        crop, soft = self.crop(image, labels)
        soft = soft.reshape(-1, soft.shape[-1])
        places = (labels.soft_labels() - soft[:, None]).abs().sum(2).argmin(1)
        images = F.pil_to_tensor(crop)[None] if isinstance(crop, PIL.Image.Image) else crop
        return images, soft, torch.full((len(soft),), int(labels.key[-2:])), places


def test_a_dataset_returns_crop_labels_with_key_and_class(folder):
    dataset = rd.load_dataset(folder, "crops", split="train")
    for i in range(len(dataset)):
        image, labels = dataset[i]
        assert isinstance(labels, rd.CropLabels)
        assert (labels.key, labels.label, labels.num_crops) == (dataset.keys[i], dataset.targets[i], NUM_CROPS)
        assert labels.canvas_size == (image.height, image.width)
        assert labels.epoch is None
    assert dataset.label_maps[dataset.keys[3]].key == dataset.keys[3]


def test_images_elsewhere_are_joined_also_in_another_resolution(folder):
    inside = rd.load_dataset(folder, "crops", split="train")
    larger = {}
    for i, key in enumerate(inside.keys):
        image = inside.image(i)
        larger[key] = image_bytes(image.resize((2 * image.width, 2 * image.height)))
    outside = rd.load_dataset(folder, "labels-only", split="train", images=larger)
    for i in range(len(inside)):
        (_, own), (image, joined) = inside[i], outside[i]
        assert joined.canvas_size == (image.height, image.width)
        assert torch.equal(joined.boxes_xyxy, own.boxes_xyxy)
        assert torch.equal(joined.soft_labels(), own.soft_labels())
        crop, _ = rd.RandomStoredCrop(8)(image, joined)
        assert crop.size == (8, 8)


def image_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_shows_each_crop_once_in_as_many_epochs_as_there_are_crops(folder, num_workers):
    stream = rd.load_dataset(folder, "crops", split="train", streaming=True, transforms=Trace())
    loader = rd.RelabelLoader(stream, 4, num_workers=num_workers, collate_fn=rd.collate_crops)
    shown = {i: [] for i in range(NUM_IMAGES)}
    for _ in range(NUM_CROPS):
        for _, _, numbers, places in loader:
            for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
                shown[number].append(place)
    assert all(sorted(places) == list(range(NUM_CROPS)) for places in shown.values())
    assert len({tuple(places) for places in shown.values()}) > NUM_IMAGES / 2


def loader_of(folder, num_crops, num_workers=0):
    stream = rd.load_dataset(folder, "crops", split="train", streaming=True, transforms=Trace(num_crops), seed=3)
    return rd.RelabelLoader(stream, 4, num_workers=num_workers, collate_fn=rd.collate_crops)


@pytest.mark.parametrize("num_crops", [1, 4])
def test_a_run_resumes_exactly_after_every_batch(folder, num_crops):
    loader, batches, states = loader_of(folder, num_crops), [], []
    for _ in range(2):
        for batch in loader:
            batches.append(batch)
            states.append(json.dumps(loader.state_dict()))
    assert batches[0][0].shape == (4 * num_crops, 3, 8, 8)
    for step, state in enumerate(states[:-1]):
        resumed = loader_of(folder, num_crops, num_workers=2 if step == 2 else 0)
        resumed.load_state_dict(json.loads(state))
        rest = list(resumed)
        for got, expected in zip(rest, batches[step + 1 :], strict=False):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert len(rest) == 4 - (step + 1) % 4  # to the end of the epoch


def test_samples_read_outside_a_stream_are_drawn_at_random(folder):
    stream = rd.load_dataset(folder, "crops", split="train", streaming=True, transforms=Trace())
    list(stream)
    places = {int(stream.dataset[0][3]) for _ in range(60)}
    assert places == set(range(NUM_CROPS))


def test_batches_are_mixed_and_pixels_are_changed_after_the_crop(folder):
    transforms = v2.Compose(
        [rd.RandomStoredCrop(8), v2.ColorJitter(0.4), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    stream = rd.load_dataset(folder, "crops", split="train", streaming=True, transforms=transforms)
    for images, labels in rd.RelabelLoader(stream, 4, drop_last=True):
        mixed, targets = v2.MixUp(num_classes=3)(images, labels)
        assert (mixed.shape, mixed.dtype) == ((4, 3, 8, 8), torch.float32)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))


@pytest.mark.parametrize("resampled", [False, True])
def test_a_webdataset_pipeline_walks_through_the_crops_unless_it_is_resampled(folder, resampled):
    dataset = rd.load_dataset(folder, "crops", split="train", transforms=Trace())
    pipeline = RelabelPipeline(dataset, resampled=resampled)
    shown = {i: [] for i in range(NUM_IMAGES)}
    for _ in range(NUM_CROPS):
        samples = iter(pipeline)
        for _ in range(NUM_IMAGES):
            _, _, numbers, places = next(samples)
            shown[int(numbers)].append(int(places))
    if resampled:
        assert {place for places in shown.values() for place in places} == set(range(NUM_CROPS))
    else:
        assert all(sorted(places) == list(range(NUM_CROPS)) for places in shown.values())


def test_rows_that_other_libraries_read_are_decoded(folder):
    dataset = rd.load_dataset(folder, "crops", split="train")
    for row, key in enumerate(dataset.keys):
        _, labels = dataset[row]
        sample = {"__key__": key, "cls": b"%d" % labels.label, "png": dataset.label_maps.image_bytes(row)}
        decoded = rd.decode_sample({**sample, "safetensors": dataset.label_maps.map_bytes(row)})
        assert (decoded["key"], decoded["label"]) == (labels.key, labels.label)
        assert torch.equal(decoded["label_map"].soft_labels(), labels.soft_labels())
        again = rd.decode_sample({"__key__": "a", "cls": 1, "safetensors": decoded["label_map"]})
        assert (again["label_map"].key, again["label_map"].label) == ("a", 1)


def test_transforms_of_the_other_kind_of_labels_are_named(folder):
    pooled = v2.Compose([v2.CenterCrop(8), rd.LabelPooling()])
    with pytest.raises(TypeError, match="RandomStoredCrop"):
        rd.load_dataset(folder, "crops", split="train", transforms=pooled)[0]
    with pytest.raises(TypeError, match="RandomStoredCrop"):
        rd.load_dataset(folder, "crops", split="train", transforms=rd.LabelPooling())[0]


def test_streams_of_two_threads_read_one_dataset_in_their_own_epochs(folder):
    read, is_reading, may_read = [], threading.Event(), threading.Event()

    def transforms(image, labels):
        if threading.current_thread() is not threading.main_thread():
            is_reading.set()
            assert may_read.wait(10)
        return labels.epoch

    dataset = rd.load_dataset(folder, "crops", split="train", transforms=transforms)
    streams = [rd.data.RelabelStream(dataset, batch_size=NUM_IMAGES) for _ in range(2)]
    streams[0].set_epoch(5)
    thread = threading.Thread(target=lambda: read.extend(streams[0]))
    thread.start()
    assert is_reading.wait(10)
    assert list(streams[1]) == [0] * NUM_IMAGES  # while the other stream reads
    may_read.set()
    thread.join()
    assert read == [5] * NUM_IMAGES
