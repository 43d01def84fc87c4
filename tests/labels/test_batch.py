import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import relabel_datasets as rd
from relabel_datasets.labels.batch import LabelMapBatch, collate

from .samples import ENCODINGS, STORED_FORMS, random_map

TRANSFORMS = v2.Compose(
    [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.RandomApply([v2.RandomRotation(30)], 0.5)]
)


def viewed_maps(encoding, count=6):
    """Label maps under crops, flipped and, some of them, rotated."""
    image = torch.zeros(3, 17, 11, dtype=torch.uint8)
    return [TRANSFORMS(image, random_map(encoding, key=f"image {i}"))[1] for i in range(count)]


@pytest.mark.parametrize("output_size", [1, (3, 2)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_is_pooled_as_each_of_its_maps(encoding, output_size):
    maps = viewed_maps(encoding)
    assert {each.view.is_box for each in maps} == {True, False}
    pooled = LabelMapBatch.of(maps).pool(output_size, temperature=1.5)
    single = [rd.LabelPooling(output_size, 1.5)(each) for each in maps]
    torch.testing.assert_close(pooled, torch.stack(single), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_many_classes(encoding):
    dense = 4 * torch.randn(2, 21841, 5, 7)
    maps = [rd.LabelMap.from_logits(each, encoding) for each in dense]
    pooled = LabelMapBatch.of(maps).pool()
    assert pooled.shape == (2, 21841)
    torch.testing.assert_close(pooled, torch.stack([rd.LabelPooling()(each) for each in maps]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("encoding", "dtype"), STORED_FORMS)
def test_maps_that_were_stored_are_pooled_as_one_by_one(encoding, dtype):
    stored = [rd.LabelMap.from_safetensors(each.to_safetensors(dtype)) for each in viewed_maps(encoding)]
    image = torch.zeros(3, *stored[0].canvas_size, dtype=torch.uint8)
    maps = [TRANSFORMS(image, each)[1] for each in stored]
    expected = torch.stack([rd.LabelPooling()(each) for each in maps])
    torch.testing.assert_close(LabelMapBatch.of(maps).pool(), expected, rtol=1e-5, atol=1e-6)
    elsewhere = [each.to(torch.float64) if i % 2 else each for i, each in enumerate(maps)]  # some are packed no more
    mixed = LabelMapBatch.of([each.to(torch.float32) for each in elsewhere])
    torch.testing.assert_close(mixed.pool(), expected, rtol=1e-5, atol=1e-6)


def test_a_stored_map_of_many_classes_travels_lighter_than_its_label():
    dense = 4 * torch.randn(2, 21841, 15, 15)
    maps = [rd.LabelMap.from_safetensors(rd.LabelMap.from_logits(each).to_safetensors()) for each in dense]
    batch = pickle.loads(pickle.dumps(LabelMapBatch.of(maps)))
    pooled = batch.pool()
    torch.testing.assert_close(pooled, torch.stack([rd.LabelPooling()(each) for each in maps]), rtol=1e-5, atol=1e-7)
    assert sum(tensor.nbytes for tensor in batch.encoded.tensors.values()) < pooled.nbytes / 4


def test_all_else_is_collated_as_torch_does():
    maps = viewed_maps("heatmaps", 2)
    samples = [{"pair": (torch.full((3,), i), each), "name": str(i), "index": i} for i, each in enumerate(maps)]
    batch = collate(samples)
    images, label_maps = batch["pair"]
    assert torch.equal(images, torch.tensor([[0] * 3, [1] * 3]))
    assert isinstance(label_maps, LabelMapBatch)
    assert len(label_maps) == 2
    assert label_maps.labels == (4, 4)
    assert batch["name"] == ["0", "1"]
    assert torch.equal(batch["index"], torch.tensor([0, 1]))


def test_label_maps_are_refused_by_the_default_collate_of_torch(dataset_folder):
    dataset = rd.load_dataset(
        dataset_folder, "colours", "train", transforms=v2.Compose([v2.CenterCrop(8), v2.PILToTensor()])
    )
    with pytest.raises(TypeError, match=r"LabelPooling\(\), or pass collate_fn=relabel_datasets.collate"):
        next(iter(DataLoader(dataset, 4)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_out_of_loaders(dataset_folder, num_workers):
    transforms = v2.Compose([v2.CenterCrop(32), v2.PILToTensor()])
    dataset = rd.load_dataset(dataset_folder, "colours", "train", transforms=transforms)
    pooled = rd.load_dataset(dataset_folder, "colours", "train", transforms=v2.Compose([transforms, rd.LabelPooling()]))
    stream = rd.RelabelStream(dataset, shuffle=False)
    for loader in (
        DataLoader(dataset, 4, num_workers=num_workers, collate_fn=collate),
        rd.RelabelLoader(stream, 4, num_workers=num_workers, collate_fn=collate),
    ):
        labels = torch.cat([label_maps.pool() for _, label_maps in loader])
        expected = torch.stack([pooled[i][1] for i in range(len(pooled))])
        torch.testing.assert_close(labels, expected)
    for loader in (
        DataLoader(pooled, 4, num_workers=num_workers),
        rd.RelabelLoader(rd.RelabelStream(pooled, shuffle=False), 4, num_workers=num_workers),
    ):
        torch.testing.assert_close(torch.cat([labels for _, labels in loader]), expected)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_batch_survives_pickle_and_moves(encoding, stored):
    maps = viewed_maps(encoding)
    batch = LabelMapBatch.of([rd.LabelMap.from_safetensors(m.to_safetensors()) for m in maps] if stored else maps)
    again = pickle.loads(pickle.dumps(batch)).to("cpu", non_blocking=True)
    assert torch.equal(again.pool(), batch.pool())
    assert again.views == batch.views


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pooling_on_a_gpu_equals_the_cpu(encoding):
    batch = LabelMapBatch.of([rd.LabelMap.from_safetensors(each.to_safetensors()) for each in viewed_maps(encoding)])
    pooled = batch.pin_memory().to("cuda", non_blocking=True).pool()
    assert pooled.device.type == "cuda"
    torch.testing.assert_close(pooled.cpu(), batch.pool(), rtol=1e-4, atol=1e-6)


def test_maps_of_different_kinds_are_refused():
    maps = [random_map("heatmaps", key="a"), random_map("topk", key="b")]
    with pytest.raises(ValueError, match=r"'a' has heatmaps 3x7x5 of 13 classes and 'b' has topk 3x7x5 of 13 classes"):
        LabelMapBatch.of(maps)
    with pytest.raises(ValueError, match="'c' has heatmaps 2x7x5"):
        collate([random_map(key="a"), random_map(k=2, key="c")])
    with pytest.raises(ValueError, match="at least one"):
        LabelMapBatch.of([])
