"""Tensors in place of PIL images: the same samples from every reader, and nearly the same after v2 transforms."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.train.seeds import SeededTransforms

TRAIN = v2.Compose(
    [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), rd.LabelPooling(), v2.ToImage(), v2.ToDtype(torch.uint8)]
)


def of_dataset(folder, image_folder, **options):
    dataset = rd.load_dataset(folder, "colours", split="train", **options)
    return [dataset[i] for i in range(len(dataset))]


def joined_with_folder(folder, image_folder, **options):
    dataset = rd.load_dataset(folder, "labels-only", split="train", images=image_folder, **options)
    return dataset.__getitems__(range(len(dataset)))


def joined_with_tars(folder, image_folder, **options):
    return list(rd.load_dataset(folder, "labels-only", split="train", images=folder / "colours", **options))


def joined_with_hugging_face(folder, image_folder, **options):
    rows = datasets.Dataset.from_list([{"image": str(path)} for path in sorted(image_folder.rglob("*.jpg"))])
    rows = rows.cast_column("image", datasets.Image())
    return list(rd.load_dataset(folder, "labels-only", split="train", images=rows, **options))


def of_stream(folder, image_folder, **options):
    stream = rd.load_dataset(folder, "colours", split="train", streaming=True, shuffle=False, **options)
    return list(rd.RelabelLoader(stream, batch_size=4, collate_fn=list)) and list(stream)


def of_pipeline(folder, image_folder, **options):
    return list(rd.data.RelabelPipeline(rd.load_dataset(folder, "colours", split="train", **options), shuffle=0))


READERS = [of_dataset, joined_with_folder, joined_with_tars, joined_with_hugging_face, of_stream, of_pipeline]


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_returns_upright_tensors_with_the_pixels_of_pil_images(
    reader, dataset_folder, image_folder, hf_cache
):
    samples, tensors = (
        reader(dataset_folder, image_folder, image_format=image_format) for image_format in ("pil", "tensor")
    )
    assert len(samples) == len(tensors) > 4
    for (image, label_map), (tensor, other) in zip(samples, tensors, strict=True):
        assert type(tensor) is tv_tensors.Image
        np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(image))
        assert (other.key, other.canvas_size) == (label_map.key, label_map.canvas_size)


@pytest.mark.parametrize("seeded", [False, True])
def test_transforms_draw_the_same_crops_and_labels_for_both_formats(dataset_folder, image_folder, seeded):
    batches = []
    for image_format in ("pil", "tensor"):
        transforms = SeededTransforms(TRAIN, 3) if seeded else TRAIN
        torch.manual_seed(0)
        samples = of_dataset(dataset_folder, image_folder, image_format=image_format, transforms=transforms)
        batches.append(default_collate(samples))
    (images, labels), (tensors, other_labels) = batches
    assert torch.equal(labels, other_labels)
    assert (images.int() - tensors.int()).abs().max() <= 1  # a resize rounds


def test_cutmix_accepts_batches_of_tensors_and_a_stream_resumes_exactly(dataset_folder):
    transforms = SeededTransforms(
        v2.Compose([v2.RandomResizedCrop(16), rd.LabelPooling(), v2.ToDtype(torch.float32)]), 1
    )
    options = {"split": "train", "streaming": True, "transforms": transforms, "image_format": "tensor"}
    loaders = [
        rd.RelabelLoader(rd.load_dataset(dataset_folder, "colours", **options), 3, num_workers=number)
        for number in (0, 1)
    ]
    whole = []
    for batch in loaders[0]:
        whole.append(batch)
        if len(whole) == 1:
            state = loaders[0].state_dict()
    loaders[1].load_state_dict(state)
    for resumed, expected in zip(loaders[1], whole[1:], strict=True):
        assert all(map(torch.equal, resumed, expected))
    mixed, soft = v2.CutMix(num_classes=3)(*whole[0])
    assert mixed.shape == (3, 3, 16, 16)
    assert soft.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_the_image_of_a_sample_has_the_format_of_the_dataset(dataset_folder):
    dataset = rd.load_dataset(dataset_folder, "colours", split="train", image_format="tensor")
    assert isinstance(dataset.image(0), tv_tensors.Image)
    with pytest.raises(ValueError, match=r"image_format must be one of \('pil', 'tensor'\), got 'numpy'"):
        rd.load_dataset(dataset_folder, "colours", split="train", image_format="numpy")


def test_damaged_images_raise_one_error_that_names_the_sample(dataset_folder, image_folder):
    dataset = rd.load_dataset(
        dataset_folder, "labels-only", split="train", images=image_folder, image_format="tensor", transforms=TRAIN
    )
    path = next(image_folder.rglob(f"{dataset.keys[2]}.*"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(rd.errors.ImageError, match=f"{dataset.keys[2]}: cannot be read as an image: .*truncated"):
        dataset[2]


@pytest.mark.parametrize("image_format", ["pil", "tensor"])
def test_decode_sample_returns_the_format(dataset_folder, image_folder, hf_cache, image_format):
    rows = datasets.load_dataset(str(dataset_folder), "colours", split="train", streaming=True)
    rows = rows.cast_column("jpg", datasets.Image(decode=False))
    decoded = [rd.decode_sample(row, image_format=image_format) for row in rows]
    expected = of_dataset(dataset_folder, image_folder, image_format=image_format)
    for sample, (image, _) in zip(decoded, expected, strict=True):
        assert type(sample["image"]) is type(image)
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(image))
