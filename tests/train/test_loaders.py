"""Crops and targets of each kind of labels. They depend only on seed, epoch and sample."""

import random

import numpy as np
import pytest
import torch

import relabel_datasets as rd
from relabel_datasets.labels import Calibration
from relabel_datasets.train.loaders import CenterCrops, ClassIndex, target_transform, train_loader
from relabel_datasets.train.recipe import LABELS
from relabel_datasets.train.seeds import SeededTransforms, seed_all


def batches(scenes, recipe, *, epoch=0, num_workers=0, rank=0, world_size=1):
    """Return images `[N, 3, s, s]` and targets of an epoch."""
    dataset = rd.load_dataset(scenes, split="train")
    loader, transforms = train_loader(
        dataset, recipe, interpolation="bicubic", rank=rank, world_size=world_size, num_workers=num_workers, window=8
    )
    loader.set_epoch(epoch)
    transforms.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    assert len(images) == len(loader)
    return torch.cat(images), torch.cat(targets)


@pytest.fixture
def single(scenes, tiny):
    """Images of an epoch and their class indices."""
    return batches(scenes, tiny.changed(labels="single"))


@pytest.mark.parametrize("labels", ["smoothed", "distilled"])
def test_labels_that_are_not_pooled_are_class_indices(scenes, tiny, single, labels):
    images, targets = batches(scenes, tiny.changed(labels=labels))
    assert images.dtype == torch.uint8
    assert images.shape == (48, 3, 32, 32)
    assert targets.dtype == torch.int64
    assert targets.bincount(minlength=12).tolist() == [4] * 12
    assert torch.equal(images, single[0])
    assert torch.equal(targets, single[1])


@pytest.mark.parametrize(
    "labels", [name for name, label_config in LABELS.items() if label_config.pooled and not label_config.tokens]
)
def test_pooled_labels_belong_to_the_same_crops(scenes, tiny, single, labels):
    label_config = LABELS[labels]
    images, targets = batches(scenes, tiny.changed(labels=labels))
    assert torch.equal(images, single[0])
    assert targets.shape == (48, 12)
    torch.testing.assert_close(targets.sum(1), torch.ones(48))
    _, soft = batches(scenes, tiny.changed(labels="relabel" if label_config.localized else "global-multi"))
    if label_config.multi_label:
        assert bool(((targets > 0).sum(1) > 1).all())
        assert torch.equal(targets, soft)
    else:
        assert torch.equal(targets, torch.nn.functional.one_hot(soft.argmax(1), 12).float())


@pytest.mark.parametrize("labels", [name for name, config in LABELS.items() if config.pooled and not config.tokens])
def test_pooled_labels_have_the_temperature_and_the_class_label_of_the_recipe(scenes, tiny, single, labels):
    recipe = tiny.changed(labels=labels)
    values = {"label_weight": 0.25, **({"temperature": 2.0} if recipe.uses("temperature") else {})}
    _, soft = batches(scenes, recipe)
    if "temperature" in values:
        soft = soft.sqrt() / soft.sqrt().sum(1, keepdim=True)  # softmax(x / 2) from softmax(x)
    _, targets = batches(scenes, recipe.changed(**values))
    expected = 0.75 * soft + 0.25 * torch.nn.functional.one_hot(single[1], 12)
    torch.testing.assert_close(targets, expected, rtol=1e-5, atol=1e-6)


def test_labels_of_tokens_have_the_values_of_the_recipe(tiny):
    label_config = tiny.changed(labels="tokens", temperature=2.0, label_weight=0.25).label_config
    label_map = rd.LabelMap.from_logits(torch.randn(12, 4, 4), label=3)
    soft, tokens = target_transform(label_config, (2, 2))(label_map)
    assert torch.equal(soft, rd.LabelPooling(temperature=2.0, label_weight=0.25)(label_map))
    assert torch.equal(tokens, rd.LabelPooling((2, 2), 2.0)(label_map))


@pytest.mark.parametrize("labels", ["relabel", "global-multi", "tokens"])
def test_labels_are_calibrated_if_the_recipe_says_so(tiny, labels):
    label_map = rd.LabelMap.from_logits(torch.randn(12, 4, 4))
    gains = Calibration((0.1, 1.0), ((2.0, 3.0),), num_crops=8, kl_before=1.0, kl_after=0.5)
    label_map = rd.LabelMap.wrap(label_map.logits, like=label_map, calibration=gains)
    recipe = tiny.changed(labels=labels)
    plain, calibrated = (
        target_transform(recipe.changed(calibrated=value).label_config, (2, 2))(label_map) for value in (False, True)
    )
    pairs = zip(plain, calibrated, strict=True) if labels == "tokens" else [(plain, calibrated)]
    for (before, after), gain in zip(pairs, (3.0, gains.gains_at(0.25).item()), strict=False):
        torch.testing.assert_close(after, (before.log() * gain).softmax(0), rtol=0, atol=1e-5)


def test_only_global_labels_are_equal_for_all_crops(scenes, tiny):
    for labels, same in (("global-multi", True), ("relabel", False)):
        rows = []
        for epoch in (0, 1):
            _, targets = batches(scenes, tiny.changed(labels=labels), epoch=epoch)
            rows.append(sorted(map(tuple, targets.tolist())))
        assert (rows[0] == rows[1]) is same


def test_crops_and_order_depend_only_on_seed_and_epoch(scenes, tiny):
    reference = batches(scenes, tiny, epoch=3)
    for num_workers in (0, 1, 2):
        random.seed(num_workers)
        np.random.seed(num_workers)  # noqa: NPY002
        torch.manual_seed(num_workers)
        again = batches(scenes, tiny, epoch=3, num_workers=num_workers)
        assert all(map(torch.equal, again, reference))
    assert not torch.equal(batches(scenes, tiny, epoch=2)[0], reference[0])
    assert not torch.equal(batches(scenes, tiny.changed(seed=1), epoch=3)[0], reference[0])


def test_seed_all_seeds_all_three_generators():
    def draw(*position):
        seed_all(*position)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert draw(0, 1, "key") == draw(0, 1, "key")
    others = {
        draw(*position) for position in ((0, 1, "key"), (1, 0, "key"), (0, 1, "yek"), (0, 2, "key"), (0, 1, 2, 3))
    }
    assert len({numbers[0] for numbers in others}) == len(others)
    assert len({numbers[1] for numbers in others}) == len(others)
    assert len({numbers[2] for numbers in others}) == len(others)


def test_a_sample_does_not_depend_on_previous_samples(scenes):
    dataset = rd.load_dataset(scenes, split="train")
    seeded = SeededTransforms(lambda image, label_map: (label_map.key, torch.rand(1).item(), random.random()), 5)
    forwards = [seeded(*dataset[row]) for row in range(4)]
    assert [seeded(*dataset[row]) for row in (3, 2, 1, 0)] == forwards[::-1]
    seeded.set_epoch(1)
    assert not {numbers[1] for numbers in forwards} & {seeded(*dataset[row])[1] for row in range(4)}


def test_a_batch_equals_its_samples(scenes):
    dataset = rd.load_dataset(scenes, split="train", transforms=SeededTransforms(rd.timm_transforms(32), 5))
    for (image, label), (expected_image, expected_label) in zip(
        dataset.__getitems__([3, 0, 2]), [dataset[3], dataset[0], dataset[2]], strict=True
    ):
        assert torch.equal(image, expected_image)
        torch.testing.assert_close(label, expected_label, rtol=1e-5, atol=1e-6)


def test_ranks_load_disjoint_samples_that_cover_the_dataset(scenes, tiny):
    whole, labels = batches(scenes, tiny)
    parts = [batches(scenes, tiny, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(images) for images, _ in parts] == [24, 24]
    ours = {image.numpy().tobytes() for images, _ in parts for image in images}
    assert ours == {image.numpy().tobytes() for image in whole}
    assert len(ours) == 48
    assert sorted(map(tuple, torch.cat([targets for _, targets in parts]).tolist())) == sorted(
        map(tuple, labels.tolist())
    )


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        ({"batch_size": 6, "cutmix": 1.0}, 2, "even batch size, not 3"),
        ({"batch_size": 6, "mixup": 0.2}, 2, "even batch size, not 3"),
        ({"batch_size": 7}, 2, "batch_size=7 must be a multiple of the number of ranks, 2"),
        ({"batch_size": 1}, 2, "batch_size=1 must be a multiple of the number of ranks, 2"),
        ({"batch_size": 64}, 1, "each of 1 ranks has 48 images, fewer than its batch of 64: lower batch_size="),
    ],
)
def test_impossible_batch_sizes_are_an_error(scenes, tiny, values, world_size, message):
    with pytest.raises(ValueError, match=message):
        batches(scenes, tiny.changed(**values), world_size=world_size)


def test_an_image_without_a_class_has_no_class_index():
    label_map = rd.LabelMap.from_logits(torch.zeros(3, 2, 2), "heatmaps", k=1, canvas_size=(8, 8))
    with pytest.raises(ValueError, match="has no class index"):
        ClassIndex()(label_map)


def test_center_crops_have_the_rows_of_their_images(scenes):
    dataset = rd.load_dataset(scenes, split="validation")
    crops = CenterCrops(dataset, (32, 48), 1.0, "bilinear", range(1, 24, 5))
    images, rows = map(torch.cat, zip(*crops.loader(3, 0), strict=True))
    assert images.dtype == torch.uint8
    assert images.shape == (5, 3, 32, 48)
    assert rows.tolist() == [1, 6, 11, 16, 21]
    assert torch.equal(CenterCrops(dataset, (32, 48), 1.0, "bilinear")[6][0], images[1])
