import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import relabel_datasets as rd

TRAIN = v2.Compose(
    [
        v2.RandomResizedCrop(16),
        v2.RandomHorizontalFlip(),
        rd.LabelPooling(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
    ]
)


@pytest.fixture
def dataset(dataset_folder):
    return rd.RelabelDataset(dataset_folder, "colours")


def test_samples_are_images_with_their_label_maps(dataset, image_folder):
    reference = {path.rsplit("/", 1)[1][:-4]: (path, label) for path, label in ImageFolder(image_folder).samples}
    assert len(dataset) == len(reference)
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.class_to_idx == {"cat": 0, "dog": 1, "emu": 2}
    for i in range(len(dataset)):
        image, label_map = dataset[i]
        path, label = reference[dataset.keys[i]]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(PIL.Image.open(path)))
        assert label_map.key == dataset.keys[i]
        assert label_map.label == dataset.targets[i] == label
        assert label_map.canvas_size == (image.height, image.width)


def test_indices_are_those_of_a_sequence(dataset):
    assert dataset[-1][1].key == dataset.keys[-1] == dataset.keys[len(dataset) - 1]
    assert dataset.keys[:3] == [dataset.keys[i] for i in range(3)]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"index {index} is out of range for {len(dataset)} samples"):
            dataset[index]
    for index in ("key", slice(2), 1.0, None, [0, 1]):
        with pytest.raises(TypeError, match=f"a sample index must be an integer, got {type(index).__name__}"):
            dataset[index]
    for index in (np.int64(1), torch.tensor(1), True):
        assert dataset[index][1].key == dataset.keys[1]
    assert sum(1 for _ in dataset) == len(dataset)
    last = dataset.image(len(dataset) - 1)
    assert dataset.image(-1).tobytes() == last.tobytes()


def test_label_maps_are_aligned_with_their_images(tmp_path, annotator):
    """Crops of an image with a red and a blue half have the class of their half, not that of the folder."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32, 0] = pixels[:, 32:, 2] = 255
    for name in ("cat", "dog", "emu"):
        (tmp_path / "images" / name).mkdir(parents=True)
        PIL.Image.fromarray(pixels).save(tmp_path / "images" / name / f"{name}.png")
    rd.build(rd.data.ImageFolderSource(tmp_path / "images"), tmp_path / "data", annotator, progress=False)
    dataset = rd.load_dataset(tmp_path / "data", split="train")
    _, label_map = dataset[0]
    pool = rd.LabelPooling()
    for left, expected in ((0, 0), (40, 2)):
        crop = v2.functional.crop(label_map, 10, left, 20, 20)
        assert pool(crop).argmax() == expected
        mirrored = v2.functional.crop(v2.functional.horizontal_flip(label_map), 10, 44 - left, 20, 20)
        torch.testing.assert_close(pool(mirrored), pool(crop))


def test_label_only_shards_take_their_images_from_a_folder(dataset_folder, dataset, image_folder):
    joined = rd.load_dataset(dataset_folder, "labels-only", "train", images=image_folder)
    assert list(joined.keys) == list(dataset.keys)
    for (image, label_map), (joined_image, joined_map) in zip(dataset, joined, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(joined_image))
        torch.testing.assert_close(label_map.dense(), joined_map.dense(), rtol=0, atol=0)


def test_images_may_be_the_parent_of_the_folder_of_the_split(dataset_folder, image_folder, tmp_path):
    (tmp_path / "both").mkdir()
    image_folder.rename(tmp_path / "both" / "train")
    splits = rd.load_dataset(dataset_folder, "labels-only", images=tmp_path / "both")
    assert list(splits) == ["train"]
    assert splits["train"][0][0].mode == "RGB"


def test_label_only_shards_take_their_images_from_a_mapping(dataset_folder, image_folder):
    images = {path.stem: path.read_bytes() for path in image_folder.glob("*/*")}
    joined = rd.RelabelDataset(dataset_folder, "labels-only", images=images)
    assert joined[3][0].size == joined[3][1].canvas_size[::-1]
    del images["photo_05"]
    with pytest.raises(rd.DatasetError, match=r"1 label map has no image, such as 'photo_05'"):
        rd.RelabelDataset(dataset_folder, "labels-only", images=images)


def test_images_in_another_resolution_keep_their_label_map(dataset_folder, image_folder):
    for path in image_folder.glob("*/*"):
        PIL.Image.open(path).resize((24, 20)).save(path)
    joined = rd.RelabelDataset(dataset_folder, "labels-only", images=image_folder, transforms=TRAIN)
    image, soft_label = joined[0]
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(soft_label.sum(), torch.tensor(1.0))


def test_the_error_for_missing_images_names_the_argument(dataset_folder):
    with pytest.raises(rd.DatasetError, match="images="):
        rd.RelabelDataset(dataset_folder, "labels-only")


def test_images_and_label_maps_that_do_not_match_are_counted_and_named(dataset_folder, image_folder):
    (image_folder / "cat" / "photo_00.jpg").rename(image_folder / "cat" / "renamed.jpg")
    with pytest.raises(rd.DatasetError) as caught:
        rd.RelabelDataset(dataset_folder, "labels-only", images=image_folder)
    assert "1 label map has no image, such as 'photo_00'" in str(caught.value)
    assert "1 image has no label map, such as 'renamed'" in str(caught.value)


def test_an_unreadable_image_is_named(dataset_folder, image_folder):
    joined = rd.RelabelDataset(dataset_folder, "labels-only", images=image_folder)
    (image_folder / "cat" / "photo_00.jpg").write_bytes(b"gone")
    with pytest.raises(rd.errors.ImageError, match="photo_00"):
        joined[list(joined.keys).index("photo_00")]


def soft_labels_by_key(loader):
    return {key: label for keys, labels in loader for key, label in zip(keys, labels, strict=True)}


def with_key(image, label_map):
    """Deterministic transform that returns the key and the label of the whole image."""
    return label_map.key, rd.LabelPooling()(image, label_map)[1]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers_return_the_samples_of_the_dataset(dataset_folder, context):
    dataset = rd.RelabelDataset(dataset_folder, "colours", transforms=with_key)
    expected = dict(iter(dataset))
    loader = DataLoader(dataset, 4, num_workers=2, multiprocessing_context=context, shuffle=True)
    loaded = soft_labels_by_key(loader)
    assert loaded.keys() == expected.keys()
    for key, label in expected.items():
        torch.testing.assert_close(loaded[key], label, rtol=0, atol=0)


class Named(rd.RelabelDataset):
    """Subclass with its own samples."""

    def __getitem__(self, index):
        return {"image": super().__getitem__(index)[0], "name": self.keys[index]}


def test_a_batch_has_the_samples_of_its_indices(dataset_folder, image_folder):
    (image_folder / "dog" / "photo_04.jpg").unlink()
    joined = rd.RelabelDataset(dataset_folder, "labels-only", images=image_folder, unmatched="skip", transforms=TRAIN)
    indices = [3, -1, 0, 3]
    torch.manual_seed(0)
    singly = [joined[index] for index in indices]
    torch.manual_seed(0)
    together = joined.__getitems__(indices)
    for (image, label), (expected_image, expected_label) in zip(together, singly, strict=True):
        assert torch.equal(image, expected_image)
        torch.testing.assert_close(label, expected_label, rtol=1e-5, atol=1e-6)
    joined.transforms = None
    assert [label_map.key for _, label_map in joined.__getitems__(indices)] == [joined.keys[i] for i in indices]
    assert joined.__getitems__([]) == []
    with pytest.raises(IndexError):
        joined.__getitems__([0, len(joined)])


def test_a_subclass_defines_its_samples(dataset_folder):
    dataset = Named(dataset_folder, "colours", transforms=TRAIN)
    assert next(iter(DataLoader(dataset, 4)))["name"] == list(dataset.keys[:4])


def test_ranks_of_a_distributed_sampler_share_the_samples(dataset_folder):
    dataset = rd.RelabelDataset(dataset_folder, "colours", transforms=with_key)
    keys = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
        keys.append(set(soft_labels_by_key(DataLoader(dataset, 3, sampler=sampler))))
    assert keys[0] | keys[1] == set(dataset.keys)


def test_accelerate_prepares_its_loader(dataset_folder):
    from accelerate import Accelerator

    dataset = rd.RelabelDataset(dataset_folder, "colours", transforms=TRAIN)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(dataset, 4, shuffle=True)
    )
    seen = 0
    for images, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen += len(images)
    assert seen == len(dataset)
    assert torch.isfinite(loss)


def test_a_dataset_can_be_pickled_and_its_repr_describes_it(dataset):
    assert pickle.loads(pickle.dumps(dataset))[2][1].key == dataset.keys[2]
    text = repr(dataset)
    assert "Number of datapoints: 13" in text
    assert "Config: colours" in text
    assert "Left out" not in text
